"""What every method must keep, those of plugins included: VITPIPE_PLUGINS=my_methods pytest THIS_FILE."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from pydantic import ValidationError
from short_runs import AUGMENT, HIVIT, REVCOL, SEED, built, packed_digits, section_of

from vitpipe.config.method import METHODS
from vitpipe.config.model import ModelConfig
from vitpipe.config.named import settings_of
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.discovery import names_in
from vitpipe.contracts.errors import RecipeError
from vitpipe.data.batches import Batch, train_batches
from vitpipe.methods.method import Method
from vitpipe.models.draws import image_draws
from vitpipe.models.families import family_of
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.train.ranks import Ranks

# 224 pixels, because methods' own defaults, such as the sizes of crops, are those of papers.
MODELS: list[ModelConfig] = [model.model_copy(update={"image_size": 224}) for model in (HIVIT, REVCOL)]
STEPS = 3
# Heads of the papers' size have up to 17 million parameters each, which tells nothing more here.
SMALLER = {
    "prototypes": 64, "patch_prototypes": 32, "head_hidden": 32, "head_width": 16, "queue": 64,
    "patch_hidden": 32, "patch_width": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_digits(tmp_path_factory.mktemp("digits"))


def trainable(name: str) -> tuple[TrainConfig, ModelConfig]:
    """The first model and stage that can be trained by it, the latter's section with its default settings."""
    for model, stage in itertools.product(MODELS, ("pretrain", "finetune")):
        # A section refuses a method of the other kind itself, a method the networks that it cannot train.
        try:
            smaller = {
                key: SMALLER[key] for key in type(settings_of(METHODS, name)).model_fields if key in SMALLER
            }
            found = section_of(stage, STEPS, method={"name": name, **smaller})
            if found.method.misfit(model, found.global_batch):
                continue
            built(found, model)
        except (ValidationError, RecipeError):
            continue
        return found, model
    raise AssertionError(f"no stage can train {name}")


@pytest.fixture(scope="module", params=names_in(METHODS))
def trained(request) -> tuple[TrainConfig, ModelConfig]:
    return trainable(request.param)


@pytest.fixture
def chosen(trained) -> TrainConfig:
    return trained[0]


@pytest.fixture
def method(trained) -> Method:
    method = built(*trained)
    method.begin()
    return method.train()


def batch_of(method: Method, shards, step: int) -> Batch:
    [batch] = train_batches(
        shards, method.views(AUGMENT, 224), seed=SEED, global_batch=8, micro_batch=8, rank=0, num_ranks=1,
        start_step=step, num_steps=step + 1, workers=0,
    )  # fmt: skip
    return batch


def losses(method: Method, batch: Batch) -> dict[str, torch.Tensor]:
    with image_draws(batch.moment.key("network"), batch.indices_B):
        return method(batch)


def update(method: Method, optimiser: torch.optim.Optimizer, batch: Batch) -> None:
    """One step as the loop makes it."""
    optimiser.zero_grad()
    losses(method, batch)["loss"].backward()
    method.before_update(batch.moment)
    optimiser.step()
    method.after_step(batch.moment, Ranks())


def test_groups_hold_everything_that_learns_and_the_loss_reaches_it(method, chosen, shards):
    names = [name for group in method.groups(chosen.optim) for name in group["names"]]
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert sorted(names) == sorted(learning)
    found = losses(method, batch_of(method, shards, 0))
    assert found["loss"].shape == ()
    assert all(bool(torch.isfinite(value)) for value in found.values())
    found["loss"].backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in method.model.parameters())
    # What is frozen exists.
    assert all(any(n.startswith(f"{part}.") for n, _ in method.named_parameters()) for part in method.frozen)


def test_draws_are_functions_of_the_moment(method, shards):
    batch = batch_of(method, shards, 1)
    torch.manual_seed(1)
    first = losses(method, batch)["loss"]
    torch.manual_seed(2)
    assert torch.equal(losses(method, batch)["loss"], first)


def test_a_saved_state_is_complete(method, trained, chosen, shards):
    torch.set_num_threads(1)
    optimiser = build_optimiser(method.groups(chosen.optim), chosen.optim)
    for step in range(2):
        update(method, optimiser, batch_of(method, shards, step))
    again = built(*trained)
    again.begin()
    again.load_resume_state({name: tensor.clone() for name, tensor in method.resume_state().items()})
    batch = batch_of(method, shards, 2)
    assert torch.equal(losses(again.train(), batch)["loss"], losses(method, batch)["loss"])


def test_later_stages_can_start_from_its_weights(method, trained):
    results = method.results()
    assert "weights" in results
    assert family_of(trained[1]).describe(results["weights"].state_dict()) is not None


def test_it_is_judged_the_same_every_time(method, shards):
    batch = batch_of(method, shards, 0)
    shown = Batch((batch.images,), batch.labels_B, batch.indices_B, batch.moment)
    first, second = (method.judge(lambda _: iter([shown]), Ranks(), "off") for _ in range(2))
    assert first.metrics
    assert first.metrics == second.metrics
    assert all(math.isfinite(value) for value in first.metrics.values())
