"""What one step does: accumulation, clipping, averages, precision, schedules, points."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_runs import (
    PLAN,
    SECTION,
    batches_of,
    digit_method,
    shared_plan,
    train_digits,
)
from torch import nn

from vitpipe.contracts.errors import CheckpointError, DivergenceError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.method import Judgement, Method
from vitpipe.optim.schedules import learning_rate
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.ranks import Ranks

PLAIN = SECTION.model_copy(update={"optim": SECTION.optim.model_copy(update={"clip_grad_norm": None})})


class Quadratic(Method):
    """Loss 0.5 * |w - mean of the batch's images|^2: its steps are known in closed form."""

    @classmethod
    def build(cls, config, family, model, *, section, classes):
        return cls()

    def judge(self, batches, ranks, precision):
        return Judgement({"distance": float(self.model.weight.norm())})

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(1, 4, bias=False)
        nn.init.constant_(self.model.weight, 2.0)

    def losses(self, batch):
        gap = self.model.weight[:, 0] - batch.images.mean(dim=0).flatten()
        loss = 0.5 * gap.square().sum()
        return {"loss": loss, "gap": gap.detach().abs().max()}


def _numbers(plan, values=lambda step, micro: 1.0):
    """Batches whose images all have one value."""

    def batches(start_step):
        for step in range(start_step, plan.num_steps):
            for micro in range(plan.accumulation):
                images = torch.full((plan.micro_batch, 1, 2, 2), float(values(step, micro)))
                indices = torch.arange(len(images)) + micro * len(images)
                moment = Moment(0, step, plan.num_steps, plan.steps_per_epoch)
                yield Batch((images,), torch.zeros(len(images)), indices, moment)

    return batches


def _train_quadratic(folder, plan, batches=None, section=PLAIN, logger=None):
    method = Quadratic()
    groups = [{"params": list(method.parameters()), "lr_scale": 1.0, "decays": True}]
    logger = logger or MemoryLogger()
    state = train(
        method,
        batches or _numbers(plan),
        plan,
        optimiser=torch.optim.SGD(groups, lr=0.0),
        section=section,
        ranks=Ranks(),
        states=StateFolder(folder, "0123456789abcdef", logger.say),
        logger=logger,
    )
    return state, method.model.weight.detach().flatten()


ONE_STEP = replace(PLAN, num_steps=1, warmup_steps=0, peak_lr=1.0, micro_batch=4, accumulation=2)


def test_a_step_goes_down_the_mean_gradient_of_its_micro_batches(tmp_path):
    batches = _numbers(ONE_STEP, lambda step, micro: [1.0, 4.0][micro])
    _, weight = _train_quadratic(tmp_path, ONE_STEP, batches)
    # Gradients 2 - 1 and 2 - 4, mean -0.5, learning rate 1.
    assert weight.tolist() == pytest.approx([2.5] * 4)


@pytest.mark.parametrize(("max_norm", "moved"), [(0.5, 0.25), (100.0, 1.0), (None, 1.0)])
def test_clipping_bounds_the_whole_gradient(tmp_path, max_norm, moved):
    section = SECTION.model_copy(
        update={"optim": SECTION.optim.model_copy(update={"clip_grad_norm": max_norm})}
    )
    logger = MemoryLogger()
    _, weight = _train_quadratic(tmp_path, ONE_STEP, section=section, logger=logger)
    # The gradient is 1 in four coordinates: norm 2.
    assert weight.tolist() == pytest.approx([2.0 - moved] * 4, rel=1e-4)
    assert (1, "train/grad_norm", pytest.approx(2.0)) in logger.points


class Exploding(Quadratic):
    """A finite loss whose gradient is infinite in step 2 (the square root at 0)."""

    def losses(self, batch):
        loss = super().losses(batch)["loss"]
        return {"loss": loss + (self.model.weight * 0.0).sum().sqrt() if batch.moment.step == 1 else loss}


@pytest.mark.parametrize(
    ("changes", "what", "saved"),
    [
        ({}, "the loss is not finite in step 3", []),
        ({"log_every_steps": 2}, "the gradient is not finite in step 2", []),
        ({"checkpoint_minutes": 1e-9}, "the gradient is not finite in step 2", [1]),
    ],
)
def test_a_gradient_that_is_not_finite_reaches_no_saved_state(tmp_path, changes, what, saved):
    """Without clipping the norm is computed only for steps that are logged or saved."""
    plan = replace(PLAN, num_steps=6, warmup_steps=0, peak_lr=0.1, min_lr=0.1)
    states = StateFolder(tmp_path, "0123456789abcdef", print)
    method = Exploding()
    groups = [{"params": list(method.parameters()), "lr_scale": 1.0, "decays": True}]
    with pytest.raises(DivergenceError, match=what):
        train(
            method,
            _numbers(plan),
            plan,
            optimiser=torch.optim.SGD(groups, lr=0.0),
            section=PLAIN.model_copy(update={"log_every_steps": 10, **changes}),
            ranks=Ranks(),
            states=states,
            logger=MemoryLogger(),
        )
    assert [states.path_of(step).exists() for step in range(1, 4)] == [step in saved for step in range(1, 4)]


def test_accumulation_does_not_change_the_run(tmp_path):
    method = {"drop_path": 0.0, "mixup_alpha": 0.0}
    ends = []
    for micro_batch in (8, 4, 2):
        plan = shared_plan(1, micro_batch, num_steps=4)
        state = train_digits(
            tmp_path / str(micro_batch), plan=plan, method=digit_method(**method), logger=MemoryLogger()
        )
        ends.append(nn.utils.parameters_to_vector(state.method.parameters()).detach())
    assert not torch.equal(ends[0], nn.utils.parameters_to_vector(digit_method(**method).parameters()))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=2e-5)


def test_the_average_follows_its_formula(tmp_path):
    plan = replace(PLAN, num_steps=5, warmup_steps=0, peak_lr=0.1, min_lr=0.1)
    section = PLAIN.model_copy(update={"ema_decay": 0.9})
    state, weight = _train_quadratic(tmp_path, plan, section=section)
    expected_weight, expected_average = 2.0, 2.0
    for _ in range(5):
        expected_weight -= 0.1 * (expected_weight - 1.0)
        expected_average = 0.9 * expected_average + 0.1 * expected_weight
    assert weight.tolist() == pytest.approx([expected_weight] * 4, rel=1e-5)
    assert state.average.shadow["weight"].flatten().tolist() == pytest.approx([expected_average] * 4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_as_float32_does(tmp_path, precision):
    exact = train_digits(tmp_path / "off", logger=MemoryLogger())
    logger = MemoryLogger()
    mixed = train_digits(tmp_path / precision, plan=replace(PLAN, precision=precision), logger=logger)
    assert all(p.dtype == torch.float32 for p in mixed.method.parameters())
    a, b = (nn.utils.parameters_to_vector(s.method.parameters()) for s in (exact, mixed))
    assert not torch.equal(a, b)
    assert (a - b).norm() / a.norm() < 0.05
    scales = [value for _, name, value in logger.points if name == "train/loss_scale"]
    assert bool(scales) == (precision == "fp16")


def test_fp16_steps_over_an_overflow(tmp_path):
    plan = replace(PLAN, num_steps=3, warmup_steps=0, peak_lr=0.1, min_lr=0.1, precision="fp16")
    logger = MemoryLogger()
    section = PLAIN.model_copy(update={"log_every_steps": 1})
    # A finite loss whose gradient, times the loss scale of 65536, is more than float32 holds.
    batches = _numbers(plan, lambda step, micro: 1e34 if step == 0 else 1.0)

    class Linear(Quadratic):
        def losses(self, batch):
            return {"loss": (self.model.weight[:, 0] * batch.images.mean(dim=0).flatten()).sum()}

    method = Linear()
    train(
        method,
        batches,
        plan,
        optimiser=torch.optim.SGD(
            [{"params": list(method.parameters()), "lr_scale": 1.0, "decays": True}], lr=0.0
        ),
        section=section,
        ranks=Ranks(),
        states=StateFolder(tmp_path, "0123456789abcdef", print),
        logger=logger,
    )
    # Two of three steps were taken, each by 0.1.
    assert method.model.weight.flatten().tolist() == pytest.approx([1.8] * 4)
    scales = [value for _, name, value in logger.points if name == "train/loss_scale"]
    assert scales == [32768.0] * 3
    assert [s for s, name, _ in logger.points if name == "train/grad_norm"] == [2, 3]


def test_points_are_means_since_the_last_and_rates_follow_the_schedule(tmp_path):
    plan = replace(PLAN, num_steps=5, warmup_steps=2, peak_lr=0.1, min_lr=0.0)
    section = PLAIN.model_copy(update={"log_every_steps": 2})
    logger = MemoryLogger()
    _train_quadratic(tmp_path, plan, section=section, logger=logger)
    weight, losses, rates = 2.0, [], []
    for step in range(5):
        losses.append(4 * 0.5 * (weight - 1.0) ** 2)
        rates.append(learning_rate(step, plan, section.optim))
        weight -= rates[-1] * (weight - 1.0)
    points = {(step, name): value for step, name, value in logger.points}
    assert [step for step, name, _ in logger.points if name == "train/loss"] == [2, 4, 5]
    assert points[2, "train/loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    assert points[4, "train/loss"] == pytest.approx((losses[2] + losses[3]) / 2, rel=1e-5)
    assert points[5, "train/loss"] == pytest.approx(losses[4], rel=1e-5)
    assert [points[s, "train/learning_rate"] for s in (2, 4, 5)] == [rates[1], rates[3], rates[4]]
    assert points[2, "train/gap"] > points[4, "train/gap"] > 0
    assert points[5, "train/images_per_second"] > 0
    assert points[5, "train/memory_gib"] > 0
    assert logger.committed_step == 5


@pytest.mark.parametrize(("value", "what"), [(math.nan, "loss"), (math.inf, "loss"), (1e25, "loss")])
def test_divergence_saves_the_batch_and_leaves_the_weights(tmp_path, value, what):
    plan = replace(PLAN, num_steps=6, accumulation=2, micro_batch=4, warmup_steps=0)
    batches = _numbers(plan, lambda step, micro: value if (step, micro) == (3, 1) else 1.0)
    with pytest.raises(DivergenceError) as caught:
        _train_quadratic(tmp_path, plan, batches)
    assert f"the {what} is not finite in step 4" in str(caught.value)
    assert caught.value.exit_code == 1
    saved = torch.load(caught.value.where, weights_only=True)
    assert saved["moment"] == {"seed": 0, "step": 3, "num_steps": 6, "steps_per_epoch": 28}
    assert saved["indices"].tolist() == [4, 5, 6, 7]
    assert torch.equal(saved["views"][0], torch.full((4, 1, 2, 2), value)) or saved["views"][0].isnan().all()
    assert StateFolder(tmp_path, "0123456789abcdef", print).steps() == []


def test_a_gradient_that_is_not_finite_is_divergence_too(tmp_path):
    class Root(Quadratic):
        def losses(self, batch):
            return {"loss": (self.model.weight[:, 0] * 0.0).sqrt().sum()}  # infinity times zero

    method = Root()
    with pytest.raises(DivergenceError, match="the gradient is not finite in step 1"):
        train(
            method,
            _numbers(ONE_STEP),
            ONE_STEP,
            optimiser=torch.optim.SGD(
                [{"params": list(method.parameters()), "lr_scale": 1.0, "decays": True}], lr=0.0
            ),
            section=PLAIN,
            ranks=Ranks(),
            states=StateFolder(tmp_path, "0123456789abcdef", print),
            logger=MemoryLogger(),
        )
    assert method.model.weight.flatten().tolist() == [2.0] * 4


def test_a_state_of_another_network_is_refused(tmp_path):
    _train_quadratic(tmp_path / "state", ONE_STEP)
    with pytest.raises(CheckpointError, match="does not fit this network"):
        train_digits(tmp_path, logger=MemoryLogger())


def test_the_draws_of_a_step_do_not_depend_on_what_ran_before(tmp_path):
    drawn = {}

    class Drawing(Quadratic):
        def losses(self, batch):
            drawn.setdefault(batch.moment.step, []).append(torch.rand(2).tolist())
            torch.rand(batch.moment.step + 1)
            return super().losses(batch)

    for plan in (PLAN, replace(PLAN, num_steps=3)):
        method = Drawing()
        train(
            method,
            _numbers(plan),
            plan,
            optimiser=torch.optim.SGD(
                [{"params": list(method.parameters()), "lr_scale": 1.0, "decays": True}], lr=0.0
            ),
            section=PLAIN,
            ranks=Ranks(),
            states=StateFolder(tmp_path / str(plan.num_steps), "0123456789abcdef", print),
            logger=MemoryLogger(),
        )
    assert drawn[0][0] != drawn[1][0]
    assert all(values[0] == values[1] for step, values in drawn.items() if step < 3)


def test_batches_are_asked_for_from_the_step_that_comes_next(tmp_path):
    asked = []

    def batches(start):
        asked.append(start)
        return batches_of(PLAN, start)

    train_digits(tmp_path, plan=PLAN, batches=batches, logger=MemoryLogger())
    assert asked == [0]
