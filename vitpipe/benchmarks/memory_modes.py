"""What the ways of remembering activations cost, and how exact they are: memory, time, errors.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005. One step is the forward and backward pass of masked pre-training in float32, without an
optimiser. Four ways: those of `reversible.run_chain`, and `block`, checkpointing as most people do it.

Shapes: B images, N units.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vitpipe.benchmarks.tensor_memory import LiveMemory
from vitpipe.contracts.errors import InputError, RunError
from vitpipe.methods.masked_pixels import MaskedPixels
from vitpipe.models.memory_mode import MemoryPolicy, expected_error, num_inversions, resolve_mode
from vitpipe.models.revcolv2.columns import Block, RevColV2Shape
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer
from vitpipe.models.reversible import Column, MemoryMode, smallest_scale

Way = Literal["plain", "reversible", "column", "block"]
WAYS: tuple[Way, ...] = get_args(Way)
EXPLAINED: Mapping[Way, str] = {
    "plain": "autograd keeps everything",
    "reversible": "keeps the last states of each chain and rebuilds the others",
    "column": "keeps the inputs of each column and computes its inside again",
    "block": "keeps the input of each transformer block and computes its inside again",
}
SCALES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.1, 0.07, 0.05, 0.035, 0.02, 0.01)
NUM_SWEEP_COLUMNS = 4
_CHANNELS_PER_HEAD = 64
_MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Args:
        columns: total numbers of columns, one half bottom-up, the other top-down.
        width: channels of every level; one attention head per 64.
        depth: blocks per level.
        image_size: pixels per side.
        batch: images per step.
        num_rounds: timed steps of each way.

    Raises:
        InputError: when columns cannot be split into halves.
    """

    columns: tuple[int, ...] = (2, 4, 8, 16)
    width: int = 192
    depth: int = 1
    image_size: int = 224
    batch: int = 4
    num_rounds: int = 5
    mask_ratio: float = 0.75
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [count for count in self.columns if count < 2 or count % 2]
        if wrong:
            raise InputError(
                f"{wrong[0]} columns cannot be split into as many bottom-up as top-down ones",
                where="--columns",
                fix="give even numbers from 2 on",
            )

    def describe(self, device: torch.device) -> str:
        """What was measured where, in a line."""
        is_gpu = device.type == "cuda"
        place = torch.cuda.get_device_name(device) if is_gpu else f"CPU threads {torch.get_num_threads()}"
        return (
            f"RevColV2 pre-training step, width {self.width}, depth {self.depth}, {self.image_size} pixels, "
            f"batch {self.batch}, float32, rounds {self.num_rounds}, {place}"
        )


@dataclass(frozen=True)
class StepCost:
    """One way of remembering at one number of columns.

    Attributes:
        activation_mib: peak of everything alive but parameters, their gradients and the input.
        peak_mib: the same with gradients (none before the step); on CUDA as the allocator counts.
        seconds: median of the rounds.
        seconds_min: the fastest round.
        time_ratio: to plain autograd in the same round, median of the rounds.
        gradient_error: difference of all gradients from plain autograd's, as a share of their norm.
        inverse_error: largest absolute error of a rebuilt state; `None` where nothing is rebuilt.
        auto: the way that training takes when left to choose.
    """

    columns: int
    way: Way
    activation_mib: float
    peak_mib: float
    seconds: float
    seconds_min: float
    time_ratio: float
    gradient_error: float
    inverse_error: float | None
    auto: MemoryMode


@dataclass(frozen=True)
class ScaleErrors:
    """What |scale| does to the inverse; all scales of all columns are the same. Errors as in `StepCost`.

    Attributes:
        expected_error: the gradient error that `memory_mode.expected_error` expects.
    """

    scale: float
    inverse_error: float
    gradient_error: float
    expected_error: float
    auto: MemoryMode


def find_device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one.

    Raises:
        InputError: when there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known and not (name == "cuda" and torch.cuda.is_available()):
        raise InputError(
            f"This machine has no device '{name}'", where="--device", fix=f"choose from {', '.join(known)}"
        )
    return torch.device(name)


def measure_steps(
    setting: Setting, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> list[StepCost]:
    """Every way at every number of columns. `say` is told what is being measured.

    Raises:
        InputError: when the network cannot be built.
        RunError: when a step does not fit into the GPU.
    """
    costs: list[StepCost] = []
    for count in setting.columns:
        say(f"{count} columns")
        trial = _Trial(setting, count, device)
        try:
            costs += trial.costs()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"A step with {count} columns does not fit into the memory of {device}",
                where="benchmark reversible",
                fix="give a smaller --batch or --width",
            ) from error
    return costs


def measure_scales(
    setting: Setting,
    device: torch.device,
    scales: Sequence[float] = SCALES,
    say: Callable[[str], None] = lambda text: None,
) -> list[ScaleErrors]:
    """The errors of 2 + 2 columns for every |scale|."""
    trial = _Trial(setting, NUM_SWEEP_COLUMNS, device)
    found: list[ScaleErrors] = []
    for scale in scales:
        say(f"scale {scale:g}")
        trial.fill_scales(scale)
        trial.step("plain")
        plain = trial.gradients()
        trial.step("reversible")
        found.append(
            ScaleErrors(
                scale=scale,
                inverse_error=trial.backbone.inverse_error(trial.images_BCHW),
                gradient_error=relative_difference(trial.gradients(), plain),
                expected_error=expected_error(num_inversions(trial.top_down), scale),
                auto=trial.auto(),
            )
        )
    return found


class _Unguarded(MemoryPolicy):
    """Remembers as asked, also where the network would not: what that costs is the question here."""

    def __init__(self, mode: MemoryMode) -> None:
        super().__init__(mode)
        self._mode = mode

    def prepare(
        self, columns: Sequence[Column], device: torch.device, *, training: bool, complete: bool = True
    ) -> MemoryMode:
        return self._mode


@contextmanager
def remembering(backbone: RevColV2, way: Way) -> Iterator[None]:
    """Within it, the backbone remembers in this way."""
    policy = backbone.memory
    backbone.memory = _Unguarded("plain" if way == "block" else way)
    blocks = [part for part in backbone.modules() if isinstance(part, Block)] if way == "block" else []
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        backbone.memory = policy
        for block in blocks:
            del vars(block)["forward"]


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of theirs; infinite if a number is not finite."""
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    ratio = math.sqrt(off / sum(float(b.square().sum()) for _, b in pairs))
    return ratio if math.isfinite(ratio) else math.inf


class _Trial:
    """One network, one batch, and steps with them."""

    def __init__(self, setting: Setting, num_columns: int, device: torch.device) -> None:
        torch.manual_seed(setting.seed)
        shape = RevColV2Shape(
            "benchmark",
            width=setting.width,
            num_heads=max(1, setting.width // _CHANNELS_PER_HEAD),
            depth=setting.depth,
            num_bottom_up=num_columns // 2,
            num_top_down=num_columns // 2,
        )
        model = RevColV2Pretrainer(RevColV2(shape, image_size=setting.image_size), setting.mask_ratio)
        self.model = model.to(device)
        self.backbone, self.method = model.backbone, MaskedPixels(model)
        self.top_down = self.backbone.columns[shape.num_bottom_up :]
        self.device, self.num_rounds = device, setting.num_rounds
        side = setting.image_size
        self.images_BCHW = torch.randn(setting.batch, 3, side, side).to(device)
        self.noise_BN = torch.rand(setting.batch, model.num_units).to(device)

    def step(self, way: Way) -> None:
        """Forward and backward; gradients start anew."""
        self.model.zero_grad()
        with remembering(self.backbone, way):
            self.method.loss_of(self.images_BCHW, self.noise_BN).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradients(self) -> dict[str, Tensor]:
        """By parameter, of the last step."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def fill_scales(self, value: float) -> None:
        """Give every scale of every column this value."""
        with torch.no_grad():
            for column in self.backbone.columns:
                for scale in column.scales():
                    scale.fill_(value)

    def auto(self) -> MemoryMode:
        """What the network itself would choose for the top-down chain, the longer one to invert."""
        return resolve_mode(
            "auto",
            under_autocast=False,
            smallest_scale=smallest_scale(self.top_down),
            num_inversions=num_inversions(self.top_down),
        ).mode

    def peak_bytes(self, way: Way) -> tuple[int, int]:
        """Peaks of one step, without the gradients of parameters and with them."""
        self.model.zero_grad()
        with LiveMemory() as memory:
            self.step(way)
        of_activations = memory.peak_bytes(without=self.gradients().values())
        if self.device.type != "cuda":
            return of_activations, memory.peak_bytes()
        self.model.zero_grad()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step(way)
        return of_activations, torch.cuda.max_memory_allocated(self.device) - before

    def costs(self) -> list[StepCost]:
        """Memory first, which warms up; then rounds with all ways, so that noise hits all alike."""
        peaks: dict[Way, tuple[int, int]] = {}
        off: dict[Way, float] = {}
        plain: dict[str, Tensor] = {}
        for way in WAYS:
            peaks[way] = self.peak_bytes(way)
            plain = plain or self.gradients()
            off[way] = relative_difference(self.gradients(), plain)
        seconds: dict[Way, list[float]] = {way: [] for way in WAYS}
        for _ in range(self.num_rounds):
            for way in WAYS:
                start = time.perf_counter()
                self.step(way)
                seconds[way].append(time.perf_counter() - start)
        return [
            StepCost(
                columns=self.backbone.shape.num_columns,
                way=way,
                activation_mib=peaks[way][0] / _MIB,
                peak_mib=peaks[way][1] / _MIB,
                seconds=statistics.median(seconds[way]),
                seconds_min=min(seconds[way]),
                time_ratio=statistics.median(
                    ours / theirs for ours, theirs in zip(seconds[way], seconds["plain"], strict=True)
                ),
                gradient_error=off[way],
                inverse_error=self.backbone.inverse_error(self.images_BCHW) if way == "reversible" else None,
                auto=self.auto(),
            )
            for way in WAYS
        ]
