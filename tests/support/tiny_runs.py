"""Small real trainings for the tests of the loop: a two-block HiViT on the scanned digits, every draw in use.

Child processes import this module, so what they need is here and not in a fixture.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from vitpipe.config.resolve import TrainPlan
from vitpipe.config.train_sections import AugmentConfig, ClassifyConfig, OptimConfig
from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.data.moment import Moment
from vitpipe.data.order import train_chunks
from vitpipe.methods.classify.method import Classify
from vitpipe.models.hivit.hivit import HiViT, HiViTShape
from vitpipe.models.hivit.hivit_classifier import HiViTClassifier
from vitpipe.optim.optimiser import build_adamw
from vitpipe.train import loop
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.ranks import Ranks, joined
from vitpipe.train.speedometer import Speedometer
from vitpipe.train.validation import Validation

SHAPE = HiViTShape("test", (1, 1, 1), (8, 16, 32), num_heads=2)
PLAN = TrainPlan(
    steps_per_epoch=28, num_steps=20, warmup_steps=4, peak_lr=2e-3, min_lr=1e-5, warmup_lr=0.0,
    global_batch=8, micro_batch=8, accumulation=1, num_ranks=1, precision="off", reasons=(),
)  # fmt: skip
SECTION = ClassifyConfig(
    epochs=1,
    global_batch=8,
    optim=OptimConfig(base_lr=1e-3, clip_grad_norm=1.0),
    ema_decay=0.9,
    log_every_steps=3,
    checkpoint_minutes=1e6,
)
SEED = 3
IDENTITY = "0123456789abcdef"
# The metrics that do not depend on time and must be identical in a resumed run.
EXACT = ("train/loss", "train/grad_norm", "train/learning_rate")


def shared_plan(num_ranks: int, micro_batch: int, **changes: object) -> TrainPlan:
    """The plan with the same global batch cut differently."""
    accumulation = PLAN.global_batch // (micro_batch * num_ranks)
    return replace(PLAN, num_ranks=num_ranks, micro_batch=micro_batch, accumulation=accumulation, **changes)  # type: ignore[arg-type]


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """224 scanned digits as (N, 3, 16, 16) in [-1, 1], and their labels."""
    scans = load_digits()
    images = torch.tensor(scans.images[:224], dtype=torch.float32).div(8).sub(1)
    images = nn.functional.interpolate(images[:, None], scale_factor=2).expand(-1, 3, -1, -1)
    return images.contiguous(), torch.tensor(scans.target[:224])


def batches_of(plan: TrainPlan, start_step: int, rank: int = 0) -> Iterator[Batch]:
    """Micro-batches in the project's own order."""
    images, labels = digits()
    for chunk in train_chunks(
        len(images),
        seed=0,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=rank,
        num_ranks=plan.num_ranks,
        start_step=start_step,
        num_steps=plan.num_steps,
    ):
        chosen = torch.tensor(chunk.indices)
        moment = Moment(SEED, chunk.step, plan.num_steps, plan.steps_per_epoch)
        yield Batch((images[chosen],), labels[chosen], chosen, moment)


def digit_method(drop_path: float = 0.3, mixup_alpha: float = 0.8) -> Classify:
    """A classifier that draws in every step: drop path per image, mixup per micro-batch."""
    torch.manual_seed(1)
    backbone = HiViT(SHAPE, image_size=16, drop_path=drop_path)
    mix = Mixup(AugmentConfig(mixup_alpha=mixup_alpha), num_classes=10, label_smoothing=0.1)
    return Classify(HiViTClassifier(backbone, 10), mix)


class JournalLogger(MemoryLogger):
    """Keeps points on disk as a tracker does: written at once, deleted by `rewind` when newer than its step."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def metrics(self, values, step):
        with self.path.open("a") as file:
            for name, value in values.items():
                file.write(json.dumps([step, name, value]) + "\n")

    def rewind(self, step):
        kept = [point for point in read_points(self.path) if point[0] <= step]
        self.path.write_text("".join(json.dumps(point) + "\n" for point in kept))


def read_points(path: Path) -> list[list]:
    """All points of a journal, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def exact_points(path: Path) -> list[tuple]:
    """The points that a repeated run must reproduce bit for bit."""
    return [tuple(point) for point in read_points(path) if point[1] in EXACT]


class EveryFewSteps(Speedometer):
    """Counts steps instead of minutes, so that a test knows when states are saved."""

    every = 4

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.calls = 0

    def minutes_since_save(self) -> float:
        self.calls += 1
        return float("inf") if self.calls % self.every == 0 else 0.0


class Signalling(JournalLogger):
    """Sends a signal to its own process when a step is done."""

    def __init__(self, path: Path, at_step: int | None, number: int) -> None:
        super().__init__(path)
        self.at_step, self.number = at_step, number

    def progress(self, step, num_steps, values):
        if step == self.at_step:
            os.kill(os.getpid(), self.number)


def train_digits(
    folder: Path,
    *,
    plan: TrainPlan = PLAN,
    section: ClassifyConfig = SECTION,
    method: Classify | None = None,
    ranks: Ranks | None = None,
    logger: MemoryLogger | None = None,
    batches=None,
    identity: str = IDENTITY,
    validated_every: int | None = None,
):
    """Run the loop on the digits; states and journal in `folder`.

    Args:
        validated_every: steps between validations, which draw random numbers and leave evaluation mode on.
    """
    method = method or digit_method()

    def measure():
        method.eval()
        torch.rand(3)
        return {"weight": float(next(method.parameters()).detach().sum())}

    validation = Validation(validated_every, measure) if validated_every else None
    ranks = ranks or Ranks()
    logger = logger or JournalLogger(folder / "points.jsonl")
    return loop.train(
        method,
        batches or (lambda start: batches_of(plan, start, ranks.rank)),
        plan,
        optimiser=build_adamw(method.groups(section.optim), section.optim),
        section=section,
        ranks=ranks,
        states=StateFolder(folder / "state", identity, logger.say),
        logger=logger,
        validation=validation,
    )


def child(folder: Path, at_step: int | None, number: int, place: str = "progress") -> None:
    """One process that trains and receives a signal: between steps, in a batch, or while saving."""
    torch.set_num_threads(1)
    loop.Speedometer = EveryFewSteps  # type: ignore[misc]
    logger = Signalling(folder / "points.jsonl", at_step if place == "progress" else None, number)
    stream = None
    if place == "batch":

        def stream(start):
            for batch in batches_of(PLAN, start):
                if batch.moment.step == at_step:
                    os.kill(os.getpid(), number)
                yield batch

    if place == "saving":
        replaced = Path.replace

        def replace_or_die(self, target):
            if at_step is not None and Path(target).stem.endswith(f"{at_step:09d}"):
                os.kill(os.getpid(), number)
            return replaced(self, target)

        Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
    try:
        train_digits(folder, logger=logger, batches=stream, validated_every=5)
    except VitpipeError as error:
        (folder / "error.txt").write_text(str(error))
        sys.exit(error.exit_code)


def rank_child(folder: Path, rank: int, num_ranks: int, port: int, stop_rank: int | None) -> None:
    """One of several ranks; `stop_rank` gets a SIGTERM after step 7."""
    torch.set_num_threads(1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names, RANK=str(rank), WORLD_SIZE=str(num_ranks))
    logger = Signalling(folder / f"points{rank}.jsonl", 7 if rank == stop_rank else None, signal.SIGTERM)
    try:
        with joined(rank, num_ranks, "cpu") as ranks:
            state = train_digits(folder, plan=shared_plan(num_ranks, 2), ranks=ranks, logger=logger)
            torch.save(state.method.state_dict(), folder / f"weights{rank}.pt")
    except VitpipeError as error:
        sys.exit(error.exit_code)


_SERVER = multiprocessing.get_context("forkserver")
# Heavy imports happen once; the server does not see the path of this module itself.
_SERVER.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "vitpipe.train.loop"])


def run_processes(target, *argument_lists: tuple) -> list[int]:
    """Run the target in processes of their own, at the same time; their exit codes (-9 for SIGKILL)."""
    processes = [_SERVER.Process(target=target, args=arguments) for arguments in argument_lists]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
