"""Time of one training step of a recipe's stage, by part, on random images and labels.

The steps are those of `train.loop.train` itself: nothing of a step is written again here. `step_watch` tells
their parts apart.

    section > method > random batches > train under the watch > medians
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpipe.benchmarks.step_watch import PARTS, NoStates, StepEnds, Watch, WatchedRanks
from vitpipe.config.method import MethodConfig
from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import TrainPlan, train_plan
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.errors import DivergenceError, InputError, RecipeError, RunError, StoppedError
from vitpipe.contracts.graph import PICTURES, all_stages
from vitpipe.contracts.seeds import seed_of
from vitpipe.contracts.spelling import did_you_mean
from vitpipe.contracts.units import format_millions
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.datasets.set_sizes import sized_facts
from vitpipe.methods.method import Method, method_class
from vitpipe.models.families import family_of
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.train.loop import train

# The first step creates the optimiser's state, the second (`FOLLOWED`) has its tensors followed one by one.
_NUM_WARM_UP = 3
# The last step of a run is always logged and saved: not what a step usually does.
_NUM_LAST = 1
_PHOTOGRAPH = (375, 500)  # height, width: the most frequent size in ImageNet
_MIB = 2**20


@dataclass(frozen=True)
class PartTime:
    """The time of one part of a step, or of the whole.

    Attributes:
        part: a key of `PARTS`, or `whole`.
        seconds: median of the rounds.
        seconds_min: the fastest round.
        share: `seconds` as a share of those of the whole.
    """

    part: str
    seconds: float
    seconds_min: float
    share: float


@dataclass(frozen=True)
class StepTimes:
    """What a step of a stage takes.

    Attributes:
        image_size: pixels per side of the recipe's model.
        num_classes: of the labels.
        batch: images per step, in one micro-batch.
        num_params: parameters that learn.
        threads: of torch on the CPU.
        rounds: number of timed steps.
        parts: those that the stage has, in the order of `PARTS`.
        whole: from the batch to the end of the step, without loading images and logging.
        images_per_second: by the median.
        activation_mib: peak of live tensors in forward and backward pass, without parameters, their gradients
            and the images.
    """

    recipe: str
    profile: str
    stage: str
    method: str
    model: str
    image_size: int
    num_classes: int
    batch: int
    precision: str
    num_params: int
    device: str
    threads: int
    rounds: int
    parts: tuple[PartTime, ...]
    whole: PartTime
    images_per_second: float
    activation_mib: float

    def describe(self) -> str:
        """Settings and device in one line."""
        place = f"CPU threads {self.threads}" if self.device == "cpu" else self.device
        precision = "float32" if self.precision == "off" else self.precision
        return (
            f"Step of {self.stage} ({self.method}) of {self.recipe}, profile {self.profile}: {self.model}, "
            f"{format_millions(self.num_params)} parameters, {self.image_size} pixels, batch {self.batch}, "
            f"{precision}, rounds {self.rounds}, {place}"
        )

    def rows(self) -> list[dict[str, str]]:
        """One row per part and one for the whole, rounded for display."""
        return [
            {
                "part": found.part.replace("_", " "),
                "median, ms": f"{found.seconds * 1e3:.2f}",
                "fastest, ms": f"{found.seconds_min * 1e3:.2f}",
                "share": f"{found.share:.1%}",
                "what": PARTS.get(found.part, "from the batch to the end of the step"),
            }
            for found in (*self.parts, self.whole)
        ]

    def notes(self) -> list[str]:
        """Speed and memory, one sentence each."""
        return [
            f"{self.images_per_second:.2f} images per second by the median.",
            f"Peak of activations {self.activation_mib:.1f} MiB: live tensors without parameters, their "
            "gradients and the images.",
        ]


def measure_step(
    recipe: Recipe,
    stage: str | None,
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    num_classes: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> StepTimes:
    """Train a few steps from random weights, and measure all but the first ones.

    Args:
        stage: one that trains by a method; the recipe's first one if not given.
        batch: B, instead of the recipe's global batch.
        rounds: timed steps.
        num_classes: of the labels; those of the stage's dataset if not given.
        say: receives what is being measured.

    Raises:
        RecipeError: when the recipe has no such stage, or as `train_plan`.
        InputError: when the number of classes is unknown, or the network cannot be built.
        RunError: when a step does not fit into the GPU, or its loss is not finite.
    """
    name, section = _section(recipe, stage)
    classes = num_classes or _num_classes(recipe, name, section)
    section = section.model_copy(update={"global_batch": batch, "micro_batch": batch})
    say(f"{_NUM_WARM_UP} + {rounds} steps of {name}")
    watch = Watch(device)
    ranks = WatchedRanks(device=device, watch=watch)
    # An epoch is one step, so that what methods do in the first epoch only is not what is measured.
    plan = train_plan(section, path=name, num_images=batch, num_ranks=1, accelerator=ranks.accelerator)
    plan = replace(plan, num_steps=_NUM_WARM_UP + rounds + _NUM_LAST)
    method = _build(recipe, name, section, classes).to(device)
    num_params = sum(p.numel() for p in method.parameters() if p.requires_grad)
    _train(method, _batches(recipe, method, section, plan, classes), plan, section, ranks, name)
    parts, whole = _times(watch.rounds[_NUM_WARM_UP:-_NUM_LAST])
    is_gpu = device.type == "cuda"
    return StepTimes(
        recipe=recipe.name,
        profile=recipe.profile,
        stage=name,
        method=section.method.name,  # type: ignore[attr-defined]
        model=recipe.model.name,
        image_size=recipe.model.image_size,
        num_classes=classes,
        batch=batch,
        precision=plan.precision,
        num_params=num_params,
        device=torch.cuda.get_device_name(device) if is_gpu else "cpu",
        threads=torch.get_num_threads(),
        rounds=rounds,
        parts=parts,
        whole=whole,
        images_per_second=batch / whole.seconds,
        activation_mib=watch.peak_bytes / _MIB,
    )


def _section(recipe: Recipe, stage: str | None) -> tuple[str, TrainConfig]:
    """Name and section of a stage of the recipe that trains by a method.

    Raises:
        RecipeError: when there is none.
    """
    sections = {name: getattr(recipe, name, None) for name in recipe.stages}
    found = {
        name: section
        for name, section in sections.items()
        # Dense stages need annotated pictures, and the probe trains on features.
        if isinstance(section, TrainConfig) and isinstance(getattr(section, "method", None), MethodConfig)
    }
    where, title = "--stage", f"The recipe {recipe.name} at profile {recipe.profile}"
    choices = f"choose one of: {', '.join(found)}"
    if not found:
        raise RecipeError(f"{title} has no stage that trains by a method", where=where, fix="use another")
    if stage is None:
        return next(iter(found.items()))
    if stage in found:
        return stage, found[stage]
    if stage not in all_stages():
        raise RecipeError(
            f"There is no stage '{stage}'{did_you_mean(stage, found)}", where=where, fix=choices
        )
    lacks = "does not train by a method" if stage in sections else "is not in it"
    raise RecipeError(
        f"{title} cannot be measured in stage '{stage}', which {lacks}", where=where, fix=choices
    )


def _num_classes(recipe: Recipe, stage: str, section: TrainConfig) -> int:
    found = sized_facts(section.dataset, recipe.data)
    # As pre-training reads them: pictures without classes, all of label 0.
    if not found.has_classes and all_stages()[stage].reads == PICTURES:
        return 0
    known = found.num_classes
    if not known:
        raise InputError(
            f"The number of classes of '{section.dataset}' is unknown",
            where=f"{stage}.dataset",
            fix="give --classes",
        )
    return known


def _build(recipe: Recipe, stage: str, section: Any, num_classes: int) -> Method:
    """The section's method with the random weights that the stage would start from."""
    torch.manual_seed(seed_of("model", recipe.seed, stage))
    return method_class(section.method.name).build(
        section.method,
        family_of(recipe.model),
        recipe.model,
        section=section,
        classes=tuple(str(number) for number in range(num_classes)),
    )


def _batches(
    recipe: Recipe, method: Method, section: TrainConfig, plan: TrainPlan, num_classes: int
) -> Callable[[int], Iterator[Batch]]:
    """The same random images and labels for every step, as many views as the method makes of an image."""
    noise = np.random.default_rng(0).integers(0, 256, (*_PHOTOGRAPH, 3), dtype=np.uint8)
    found = method.views(section.augment, recipe.model.image_size)(Image.fromarray(noise))
    views: Sequence[Tensor] = [found] if isinstance(found, Tensor) else found
    generator = torch.Generator().manual_seed(0)
    batch = plan.micro_batch
    images = tuple(torch.randn(batch, *view.shape, generator=generator) for view in views)
    labels = torch.randint(max(1, num_classes), (batch,), generator=generator)

    def batches(start_step: int) -> Iterator[Batch]:
        for step in range(start_step, plan.num_steps):
            moment = Moment(recipe.seed, step, plan.num_steps, plan.steps_per_epoch)
            yield Batch(images, labels, torch.arange(batch), moment)

    return batches


def _train(
    method: Method,
    batches: Callable[[int], Iterator[Batch]],
    plan: TrainPlan,
    section: TrainConfig,
    ranks: WatchedRanks,
    stage: str,
) -> None:
    """Run the loop to the end of the plan under the watch of `ranks`; saves nothing."""
    watch = ranks.watch

    def begun(start_step: int) -> Iterator[Batch]:
        for batch in batches(start_step):
            watch.begin()
            yield batch

    watch.follow(method)
    try:
        with tempfile.TemporaryDirectory(prefix="vitpipe-benchmark-") as folder, watch.following_averages():
            train(
                method,
                begun,
                plan,
                optimiser=build_optimiser(method.groups(section.optim), section.optim),
                section=section,
                ranks=ranks,
                states=NoStates(Path(folder), "benchmark", lambda text: None),
                logger=StepEnds(watch),
            )
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"A step of {plan.micro_batch} images does not fit into the memory of {ranks.device}",
            where="benchmark step",
            fix="give a smaller --batch",
        ) from error
    # The loop's own messages name saved files, which there are not.
    except DivergenceError as error:
        raise RunError(
            "Loss or gradient of random images is not finite",
            where=f"benchmark step, stage {stage}",
            fix=f"lower the learning rate with --set {stage}.optim.base_lr=...",
        ) from error
    except StoppedError as error:
        by = error.exit_code - 128
        raise StoppedError("Stopped before all steps were measured", by=by) from error


def _times(rounds: Sequence[Mapping[str, float]]) -> tuple[tuple[PartTime, ...], PartTime]:
    """Every part, and the whole, over the timed steps."""
    wholes = [sum(parts.values()) for parts in rounds]
    median = statistics.median(wholes)
    found = []
    for name in PARTS:
        seconds = [parts.get(name, 0.0) for parts in rounds]
        if any(seconds):
            part = statistics.median(seconds)
            found.append(PartTime(name, part, min(seconds), part / median))
    return tuple(found), PartTime("whole", median, min(wholes), 1.0)
