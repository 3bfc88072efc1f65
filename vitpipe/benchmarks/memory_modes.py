"""Memory, time and numerical error of the activation memory modes of reversible columns.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005. One step is the forward and backward pass of masked pre-training in float32, without the
optimiser. Four modes: those of `reversible.run_chain`, and `block`, the usual activation checkpointing.

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
from vitpipe.contracts.units import counted
from vitpipe.methods.masked_pixels.method import MaskedPixels
from vitpipe.models.memory_mode import MemoryPolicy, expected_error, num_inversions, resolve_mode
from vitpipe.models.revcolv2.columns import Block, RevColV2Shape
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Pretrainer
from vitpipe.models.reversible import Column, MemoryMode, smallest_scale

Mode = Literal["plain", "reversible", "column", "block"]
MODES: tuple[Mode, ...] = get_args(Mode)
EXPLAINED: Mapping[Mode, str] = {
    "plain": "autograd keeps all activations",
    "reversible": "keeps the last states of each chain and recomputes the others by inversion",
    "column": "keeps the inputs of each column and recomputes its activations",
    "block": "keeps the input of each transformer block and recomputes its activations",
}
# Inversion divides by the scale: from 1, where rounding is not amplified, to far below the guard's 0.2.
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
        num_rounds: timed steps of each mode.
        mask_ratio: share of masked units.

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
                f"{wrong[0]} columns cannot be split into equal numbers of bottom-up and top-down columns",
                where="--columns",
                fix="give even numbers of at least 2",
            )

    def describe(self, device: torch.device) -> str:
        """Settings and device in one line."""
        is_gpu = device.type == "cuda"
        place = torch.cuda.get_device_name(device) if is_gpu else f"CPU threads {torch.get_num_threads()}"
        return (
            f"RevColV2 pre-training step, width {self.width}, depth {self.depth}, {self.image_size} pixels, "
            f"batch {self.batch}, float32, rounds {self.num_rounds}, {place}"
        )


@dataclass(frozen=True)
class StepCost:
    """One memory mode at one number of columns.

    Attributes:
        columns: total number.
        way: the memory mode; `way` is the key of the JSON output.
        activation_mib: peak of live tensors without parameters, their gradients and the input.
        peak_mib: the same with gradients (none before the step); on CUDA as counted by the allocator.
        seconds: median of the rounds.
        seconds_min: the fastest round.
        time_ratio: to plain autograd in the same round, median of the rounds.
        gradient_error: difference of all gradients from plain autograd's, as a share of their norm.
        inverse_error: largest absolute error of a rebuilt state; `None` where nothing is rebuilt.
        auto: the mode that `memory_mode: auto` chooses for training.
    """

    columns: int
    way: Mode
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
    """Errors of inversion when all scales of all columns have one value. Errors as in `StepCost`.

    Attributes:
        scale: |scale|.
        expected_error: the gradient error predicted by `memory_mode.expected_error`.
        auto: the mode that `memory_mode: auto` chooses for training.
    """

    scale: float
    inverse_error: float
    gradient_error: float
    expected_error: float
    auto: MemoryMode


def find_device(name: str | None) -> torch.device:
    """The device of that name; without a name a GPU if there is one, else the CPU.

    Raises:
        InputError: when there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name not in known and not (name == "cuda" and torch.cuda.is_available()):
        raise InputError(
            f"This machine has no device '{name}'", where="--device", fix=f"choose one of {', '.join(known)}"
        )
    return torch.device(name)


def measure_steps(
    setting: Setting, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> list[StepCost]:
    """Measure every mode at every number of columns.

    Args:
        say: receives what is being measured.

    Raises:
        InputError: when the network cannot be built.
        RunError: when a step does not fit into the GPU.
    """
    costs: list[StepCost] = []
    for count in setting.columns:
        say(counted(count, "column"))
        trial = _Trial(setting, count, device)
        try:
            costs += trial.costs()
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"A step with {counted(count, 'column')} does not fit into the memory of {device}",
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
    """Measure the errors of 2 + 2 columns for every |scale|."""
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


class _ForcedMode(MemoryPolicy):
    """A policy without the guard that refuses inversion where it is inaccurate: that is measured here."""

    def __init__(self, mode: MemoryMode) -> None:
        super().__init__(mode)
        self._mode = mode

    def prepare(
        self, columns: Sequence[Column], device: torch.device, *, training: bool, complete: bool = True
    ) -> MemoryMode:
        return self._mode


@contextmanager
def forced_mode(backbone: RevColV2, way: Mode) -> Iterator[None]:
    """Within it, the backbone runs in this memory mode."""
    policy = backbone.memory
    backbone.memory = _ForcedMode("plain" if way == "block" else way)
    blocks = [part for part in backbone.modules() if isinstance(part, Block)] if way == "block" else []
    # Set on the instance, so that it shadows the method of the class and can be removed again; wrapping the
    # module instead would rename the parameters.
    for block in blocks:
        vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        backbone.memory = policy
        for block in blocks:
            del vars(block)["forward"]


def relative_difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """L2 norm of the difference of all gradients over the norm of `theirs`; infinite if not finite."""
    # In float64: differences of 1e-7 of the norm are measured, float32's own precision.
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    off = sum(float((a - b).square().sum()) for a, b in pairs)
    ratio = math.sqrt(off / sum(float(b.square().sum()) for _, b in pairs))
    return ratio if math.isfinite(ratio) else math.inf


class _Trial:
    """One network and one batch, on which steps are run."""

    def __init__(self, setting: Setting, num_columns: int, device: torch.device) -> None:
        # The same weights, batch and mask for every mode of a trial.
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

    def step(self, way: Mode) -> None:
        """Forward and backward pass; gradients of earlier steps are discarded."""
        self.model.zero_grad()
        with forced_mode(self.backbone, way):
            self.method.loss_of(self.images_BCHW, self.noise_BN).backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the last step by parameter name."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def fill_scales(self, value: float) -> None:
        """Set every scale of every column to this value."""
        with torch.no_grad():
            for column in self.backbone.columns:
                for scale in column.scales():
                    scale.fill_(value)

    def auto(self) -> MemoryMode:
        """The mode that the network chooses itself for the top-down chain, which has more inversions."""
        return resolve_mode(
            "auto",
            under_autocast=False,
            smallest_scale=smallest_scale(self.top_down),
            num_inversions=num_inversions(self.top_down),
        ).mode

    def peak_bytes(self, way: Mode) -> tuple[int, int]:
        """Peak memory of one step in bytes, without and with the gradients of parameters."""
        self.model.zero_grad()
        with LiveMemory() as memory:
            self.step(way)
        of_activations = memory.peak_bytes(without=self.gradients().values())
        # On CUDA a second step without following tensors, as the allocator also sees workspaces of kernels.
        if self.device.type != "cuda":
            return of_activations, memory.peak_bytes()
        self.model.zero_grad()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self.step(way)
        return of_activations, torch.cuda.max_memory_allocated(self.device) - before

    def costs(self) -> list[StepCost]:
        """Memory, time and errors of every mode."""
        # Memory first: it needs one step of every mode, which is the warm-up of the timed ones.
        peaks: dict[Mode, tuple[int, int]] = {}
        off: dict[Mode, float] = {}
        plain: dict[str, Tensor] = {}
        for way in MODES:
            peaks[way] = self.peak_bytes(way)
            plain = plain or self.gradients()
            off[way] = relative_difference(self.gradients(), plain)
        # All modes take turns within a round, so that the load of a shared machine affects all alike;
        # `time_ratio` compares within a round.
        seconds: dict[Mode, list[float]] = {way: [] for way in MODES}
        for _ in range(self.num_rounds):
            for way in MODES:
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
            for way in MODES
        ]
