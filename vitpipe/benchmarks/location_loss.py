"""Time of drloc's loss in a training step, beside the same step without it.

Whole steps with and without the loss scatter by more than the loss takes. So the loss alone is timed, the
forward and backward pass of pooling, MLP and loss on the network's grid, in turn with a plain training step:

    recipe > method > [plain step, loss alone] x rounds > median of the ratios of all pairs

On a CPU it is the process's own time, which other programs on the machine change little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitpipe.config.recipe import Recipe
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.seeds import seed_of
from vitpipe.contracts.units import counted
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.datasets.set_sizes import sized_facts
from vitpipe.methods.classify.method import Classify
from vitpipe.methods.drloc.config import DrlocConfig
from vitpipe.methods.drloc.method import Drloc, features_of
from vitpipe.models.families import family_of
from vitpipe.models.network import Features
from vitpipe.optim.clipping import clip_gradients
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.train.trainable import draws_of

_NUM_WARM_UP = 2  # the first step creates the optimiser's state


@dataclass(frozen=True)
class LocationLossTimes:
    """What the loss takes.

    Attributes:
        grids: rows and columns that the loss reads, of one block or of all.
        pairs: per image and grid.
        batch: images.
        plain_seconds: median of a step without the loss: forward, backward, clipping, optimiser.
        loss_seconds: median of the loss alone, forward and backward.
        ratio: median over the rounds of the loss over the plain step timed right before it.
        ratio_low: lower quartile of the same.
        ratio_high: upper quartile.
    """

    recipe: str
    model: str
    loss: str
    grids: tuple[tuple[int, int], ...]
    pairs: int
    batch: int
    rounds: int
    threads: int
    device: str
    plain_seconds: float
    loss_seconds: float
    ratio: float
    ratio_low: float
    ratio_high: float

    def describe(self) -> str:
        """Settings in one line."""
        grids = ", ".join(f"{rows} x {columns}" for rows, columns in dict.fromkeys(self.grids))
        return (
            f"Loss {self.loss} of {self.recipe}: {self.model}, {self.pairs} pairs of {grids} cells, "
            f"batch {self.batch}, rounds {self.rounds}, {self.device}, threads {self.threads}"
        )


def measure_location_loss(
    recipe: Recipe,
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> LocationLossTimes:
    """Time the loss of a recipe with method drloc, and a step of the same network without it.

    Args:
        batch: B.
        rounds: timed pairs.
        say: told what is measured.

    Raises:
        RecipeError: when no stage of the recipe trains by this method.
        InputError: when the number of classes of its dataset is unknown.
    """
    section, method = _built(recipe)
    method = method.to(device).train()
    plain = Classify(method.model, method.mix, method.classes)
    optimiser = build_optimiser(plain.groups(section.optim), section.optim)
    images = _images(recipe, method, batch).to(device)
    say(f"{counted(rounds, 'pair')} of a plain step and the loss alone")
    steps, losses = [], []
    for step in range(_NUM_WARM_UP + rounds):
        now = images._replace(moment=images.moment._replace(step=step))
        begun = _now(device)
        _plain_step(plain, optimiser, section, now)
        steps.append(_now(device) - begun)
        features = _grids(method, now)
        begun = _now(device)
        method.location_loss(features, now, "locations").backward()
        losses.append(_now(device) - begun)
        method.zero_grad()
    steps, losses = steps[_NUM_WARM_UP:], losses[_NUM_WARM_UP:]
    ratios = [loss / step for loss, step in zip(losses, steps, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
    return LocationLossTimes(
        recipe=recipe.name,
        model=recipe.model.name,
        loss=method.config.loss,
        grids=method.grids,
        pairs=method.config.pairs,
        batch=batch,
        rounds=rounds,
        threads=torch.get_num_threads(),
        device=str(device),
        plain_seconds=statistics.median(steps),
        loss_seconds=statistics.median(losses),
        ratio=statistics.median(ratios),
        ratio_low=low,
        ratio_high=high,
    )


def _built(recipe: Recipe) -> tuple[ClassifyConfig, Drloc]:
    """Section and method of the recipe's last stage that trains by drloc."""
    sections = [getattr(recipe, stage, None) for stage in recipe.stages]
    found = [s for s in sections if isinstance(s, ClassifyConfig) and isinstance(s.method, DrlocConfig)]
    if not found:
        raise RecipeError(
            f"No stage of the recipe {recipe.name} trains by method drloc",
            where="RECIPE",
            fix="give one that does, for example drloc/swin_tiny/cifar100/drloc/scratch/100",
        )
    num_classes = sized_facts(found[-1].dataset, recipe.data).num_classes
    if not num_classes:
        raise InputError(
            f"The number of classes of '{found[-1].dataset}' is unknown",
            where="finetune.dataset",
            fix="name a set of the catalogue with --set finetune.dataset=cifar100",
        )
    torch.manual_seed(seed_of("model", recipe.seed, "finetune"))
    classes = tuple(str(number) for number in range(num_classes))
    family = family_of(recipe.model)
    return found[-1], Drloc.build(found[-1].method, family, recipe.model, section=found[-1], classes=classes)


def _images(recipe: Recipe, method: Drloc, batch: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    side = recipe.model.image_size
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(len(method.classes), (batch,), generator=generator)
    return Batch((images,), labels, torch.arange(batch), Moment(recipe.seed, 0, 1, 1))


def _plain_step(
    plain: Classify, optimiser: torch.optim.Optimizer, section: ClassifyConfig, batch: Batch
) -> None:
    """A step of the loop without the loss."""
    optimiser.zero_grad()
    with draws_of(batch):
        plain(batch)["loss"].backward()
    parameters: list[nn.Parameter] = [p for group in optimiser.param_groups for p in group["params"]]
    optim: Any = section.optim
    clip_gradients(parameters, optim.clip_grad_norm, each=optim.clip_each_tensor, measured=False)
    optimiser.step()


def _grids(method: Drloc, batch: Batch) -> Features:
    """What the loss reads of the images, as leaves: its backward pass ends there."""
    with torch.no_grad(), draws_of(batch):
        found = features_of(method.model, batch.images, method.config)
    return replace(found, tokens=tuple(tokens.detach().requires_grad_() for tokens in found.tokens))


def _now(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the clock on a GPU, behind all that has been started there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
