"""Derived values: the same samples for any number of ranks, and the paper's numbers at full size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.read import load_recipe
from vitpipe.config.resolve import Accelerator, layer_scales, num_threads, num_workers, resolve, train_plan
from vitpipe.contracts.errors import RecipeError
from vitpipe.optim.schedules import learning_rate

FULL = load_recipe("itpn/pixel_base", "full")
GPU = Accelerator("cuda", has_bf16=True)


def _plan(section, path="pretrain", num_images=1_281_167, num_ranks=1, accelerator=GPU):
    return train_plan(section, path=path, num_images=num_images, num_ranks=num_ranks, accelerator=accelerator)


def test_full_pretraining_has_the_paper_s_numbers():
    plan = _plan(FULL.pretrain, num_ranks=64)
    assert plan.peak_lr == pytest.approx(2.4e-3)
    assert (plan.micro_batch, plan.accumulation) == (64, 1)
    assert plan.steps_per_epoch == 312
    assert plan.num_steps == 1600 * 312
    assert plan.warmup_steps == 40 * 312
    assert plan.precision == "bf16"


@given(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
def test_the_recipe_does_not_depend_on_the_number_of_gpus(num_ranks: int):
    plan, alone = _plan(FULL.pretrain, num_ranks=num_ranks), _plan(FULL.pretrain)
    assert plan.micro_batch * plan.accumulation * num_ranks == FULL.pretrain.global_batch
    assert (plan.num_steps, plan.peak_lr, plan.warmup_steps) == (
        alone.num_steps,
        alone.peak_lr,
        alone.warmup_steps,
    )


def test_a_warm_up_longer_than_the_run_says_so():
    optim = FULL.pretrain.optim.model_copy(update={"warmup_epochs": 3.0})
    plan = _plan(FULL.pretrain.model_copy(update={"optim": optim, "epochs": 2.0}))
    assert plan.warmup_steps == plan.num_steps == 2 * 312
    (why,) = [reason.why for reason in plan.reasons if reason.path == "pretrain.warmup_steps"]
    assert why == "3 epochs x 312 steps, cut to the length of the run"


def test_absolute_learning_rates_are_not_scaled():
    optim = FULL.finetune.optim.model_copy(update={"lr_reference_batch": None})
    plan = _plan(FULL.finetune.model_copy(update={"optim": optim}), "finetune")
    assert plan.peak_lr == FULL.finetune.optim.base_lr


@pytest.mark.parametrize(
    ("gpus", "factor", "peak", "floor", "start"),
    [
        (4, 1.0, 5e-4, 5e-6, 5e-7),
        (8, 2.0, 1e-3, 1e-5, 1e-6),
        (9, 2.25, 1.125e-3, 1.125e-5, 1.125e-6),
        (10, 2.5, 1.25e-3, 1.25e-5, 1.25e-6),
    ],
)
def test_pacas_factor_multiplies_all_three_rates(gpus, factor, peak, floor, start):
    """Supplement of PaCa-ViT, table 5: 128 images per GPU over 512."""
    section = load_recipe("paca/imagenet/tiny", "full", [f"finetune.global_batch={128 * gpus}"]).finetune
    assert section is not None
    plan = _plan(section, "finetune", num_ranks=gpus)
    assert (plan.peak_lr, plan.min_lr, plan.warmup_lr) == pytest.approx((peak, floor, start), rel=1e-12)
    derived = {reason.path: (reason.value, reason.why) for reason in plan.reasons}
    assert derived["finetune.min_lr"] == (plan.min_lr, f"5e-06 x {128 * gpus} / 512")
    assert learning_rate(0, plan, section.optim) == pytest.approx(start)
    # The printed 2.25 for 1,280 images, or any other factor.
    optim = section.optim.model_copy(update={"lr_factor": 2.25})
    given = _plan(section.model_copy(update={"optim": optim}), "finetune", num_ranks=gpus)
    assert given.peak_lr / plan.peak_lr == pytest.approx(2.25 / factor)
    assert given.warmup_lr == pytest.approx(1.125e-6)


def test_a_stated_floor_is_absolute():
    section = FULL.finetune.model_copy(update={"global_batch": 2 * FULL.finetune.global_batch})
    assert _plan(section, "finetune").min_lr == _plan(FULL.finetune, "finetune").min_lr == 5e-6


def test_layer_scales_follow_the_thirteen_layer_rule():
    scales = layer_scales(0.5, 32, 13)
    assert len(scales) == 32
    assert scales[-1] == 1.0
    assert scales[-2] == pytest.approx(0.7477, abs=1e-4)
    assert scales[0] == pytest.approx(0.5**13)


@pytest.mark.parametrize(
    ("kind", "bf16", "expected"), [("cpu", False, "off"), ("cuda", True, "bf16"), ("cuda", False, "fp16")]
)
def test_precision_is_chosen_by_the_machine(kind, bf16, expected):
    assert _plan(FULL.pretrain, accelerator=Accelerator(kind, bf16)).precision == expected


@pytest.mark.parametrize(
    ("update", "num_images", "num_ranks", "part"),
    [
        ({}, 1_281_167, 3, "cannot be shared by 3 ranks"),
        ({}, 100, 1, "fewer than one global batch"),
        ({"micro_batch": 100}, 1_281_167, 1, "does not divide"),
    ],
)
def test_impossible_batches_are_refused(update, num_images, num_ranks, part):
    with pytest.raises(RecipeError, match=part):
        _plan(FULL.pretrain.model_copy(update=update), num_images=num_images, num_ranks=num_ranks)


def test_every_derived_value_has_a_reason():
    sizes = {"imagenet": 1_281_167, "imagenet22k": 14_197_122}
    reasons = resolve(FULL, sizes=sizes, num_layers=32, decay_stated_for=13, num_ranks=8, accelerator=GPU)
    assert all(reason.why for reason in reasons)
    paths = [reason.path for reason in reasons]
    assert len(set(paths)) == len(paths)
    assert sum(path.startswith("finetune.layer_lr.") for path in paths) == 32


def test_workers_as_given_win():
    assert num_workers(FULL.data.model_copy(update={"workers": 3})) == 3
    assert num_workers(FULL.data) >= 0


def test_small_networks_get_one_thread():
    assert num_threads(500_000) == 1
    assert num_threads(80_000_000) is None


def test_a_precision_that_the_gpu_lacks_is_refused():
    section = FULL.finetune.model_copy(update={"precision": "bf16"})
    old = Accelerator("cuda", has_bf16=False)
    with pytest.raises(RecipeError, match=r"no bfloat16.*finetune\.precision.*use fp16"):
        train_plan(section, path="finetune", num_images=10_000, num_ranks=1, accelerator=old)
