"""Short real trainings of nano networks on packed digits, through loader, method and loop.

Child processes and the script of the golden curves import this module.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from vitpipe.config.data import EmbeddedConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.config.train_sections import AugmentConfig, ClassifyConfig, OptimConfig, TrainConfig
from vitpipe.contracts.discovery import use_plugins
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.batches import train_batches
from vitpipe.data.manifest import ShardManifest, read_manifest
from vitpipe.data.shards import ShardSet
from vitpipe.datasets.embedded.write import write_embedded
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.methods.method import Method, method_class
from vitpipe.models.families import family_of
from vitpipe.models.hivit.config import DecoderConfig, HiViTConfig, PyramidConfig
from vitpipe.models.revcol.config import RevColConfig
from vitpipe.models.revcolv2.config import RevColV2Config
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.prepare.pack import PackOptions, Quarantine, pack
from vitpipe.stages.pretrain.config import PretrainConfig
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.ranks import Ranks, joined
from vitpipe.train.state import TrainState

NUM_IMAGES, GLOBAL_BATCH, IMAGE_SIZE, SEED = 96, 32, 64, 7
STEPS = 6  # of the comparisons
CLASSES = tuple(f"digit {number}" for number in range(10))
HIVIT = HiViTConfig(
    name="hivit_nano",
    image_size=IMAGE_SIZE,
    pyramid=PyramidConfig(width=32),
    decoder=DecoderConfig(width=64, depth=2, heads=4),
    head_init_std=0.02,
)
REVCOLV2 = RevColV2Config(name="revcolv2_nano", image_size=IMAGE_SIZE, head_init_std=0.02)
REVCOL = RevColConfig(name="revcol_nano", image_size=IMAGE_SIZE, head_init_std=0.02)
AUGMENT = AugmentConfig(crop_scale=(0.8, 1.0))


def packed_digits(folder: Path) -> ShardSet:
    """96 embedded digits of 64 pixels, packed as a training set."""
    sizes = EmbeddedConfig(image_size=IMAGE_SIZE, train_images=NUM_IMAGES, val_images=50)
    write_embedded(folder / "raw", ("imagenet",), sizes)
    source = read_class_folders(folder / "raw" / "imagenet", "imagenet")
    options, quarantine = PackOptions(1 << 24), Quarantine(0)
    pack(source, folder / "packed", options=options, quarantine=quarantine, scratch=folder / "scratch")
    return opened(folder)


def opened(folder: Path) -> ShardSet:
    """The set that `packed_digits` has made."""
    return ShardSet(folder / "packed", read_manifest(folder / "packed", ShardManifest), "train")


def section_of(kind: str, steps: int, **changes: Any) -> TrainConfig:
    """A section of masked pre-training (`pretrain`), or of fine-tuning with drop path (`finetune`)."""
    optim = {"base_lr": 1e-3, "lr_reference_batch": None, "warmup_epochs": 1, "clip_grad_norm": 1.0}
    common: dict[str, Any] = {
        "epochs": steps / (NUM_IMAGES // GLOBAL_BATCH),
        "global_batch": GLOBAL_BATCH,
        "optim": OptimConfig(**(optim | changes.pop("optim", {}))),
        "augment": AUGMENT,
        "log_every_steps": 1,
        "checkpoint_minutes": 1e6,
        **changes,
    }
    if kind == "pretrain":
        return PretrainConfig(**common)
    return ClassifyConfig(**common, drop_path=0.3)


def built(section: TrainConfig, model: ModelConfig = HIVIT) -> Method:
    """The section's method, always with the same random weights."""
    torch.manual_seed(5)
    config = section.method  # type: ignore[attr-defined]
    kind = method_class(config.name)
    return kind.build(config, family_of(model), model, section=section, classes=CLASSES)


def run(
    shards: ShardSet,
    section: TrainConfig,
    states: Path,
    *,
    model: ModelConfig = HIVIT,
    ranks: Ranks | None = None,
    method: Method | None = None,
    logger: MemoryLogger | None = None,
) -> tuple[TrainState, list[float], float]:
    """Train; returns the last state, the loss of every step, and seconds per step."""
    ranks, method, logger = ranks or Ranks(), method or built(section, model), logger or MemoryLogger()
    plan = train_plan(
        section,
        path="short",
        num_images=len(shards),
        num_ranks=ranks.num_ranks,
        accelerator=Accelerator(),
    )

    def batches(start: int):
        return train_batches(
            shards,
            method.views(section.augment, IMAGE_SIZE),
            seed=SEED,
            global_batch=plan.global_batch,
            micro_batch=plan.micro_batch,
            rank=ranks.rank,
            num_ranks=ranks.num_ranks,
            start_step=start,
            num_steps=plan.num_steps,
            workers=0,
        )

    begun = time.perf_counter()
    state = train(
        method,
        batches,
        plan,
        optimiser=build_optimiser(method.groups(section.optim), section.optim),
        section=section,
        ranks=ranks,
        states=StateFolder(states, "0123456789abcdef", logger.say),
        logger=logger,
    )
    seconds = (time.perf_counter() - begun) / plan.num_steps
    return state, [value for _, name, value in logger.points if name == "train/loss"], seconds


def rank_child(folder: Path, kind: str, rank: int, num_ranks: int, port: int, micro_batch: int) -> None:
    """One of several ranks of a run on the set in `folder`; rank 0 leaves losses and weights there."""
    torch.set_num_threads(1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names, RANK=str(rank), WORLD_SIZE=str(num_ranks))
    section = section_of(kind, STEPS, micro_batch=micro_batch)
    with joined(rank, num_ranks, "cpu") as ranks:
        state, losses, _ = run(opened(folder), section, folder / f"{kind}-ranks", ranks=ranks)
        if rank == 0:
            torch.save({"losses": losses, "weights": weights_of(state)}, folder / f"{kind}.pt")


def weights_of(state: TrainState) -> torch.Tensor:
    """All weights as one vector."""
    return torch.nn.utils.parameters_to_vector(state.method.parameters()).detach()


class Killing(MemoryLogger):
    """Kills its own process when a step is done."""

    def __init__(self, at_step: int | None) -> None:
        super().__init__()
        self.at_step = at_step

    def progress(self, step, num_steps, values):
        if step == self.at_step:
            os.kill(os.getpid(), signal.SIGKILL)


TOY = Path(__file__).parent / "toy_plugin"
TOY_CLIP = 1e-3  # smaller than most gradients of the toy
TOY_METHOD = {
    "name": "two_views",
    "crops": {"local_size": 32, "global_size": IMAGE_SIZE, "num_local": 1},
    "clip_each": TOY_CLIP,
}


def toy_child(folder: Path, name: str, micro_batch: int, at_step: int | None = None) -> None:
    """Train the plugin's method on the set in `folder`, saving after every step; leaves what it found there."""
    torch.set_num_threads(1)
    use_plugins([TOY])
    optim = {"weight_decay": 0.04, "final_weight_decay": 0.4, "clip_grad_norm": None}
    section = section_of(
        "pretrain", STEPS, micro_batch=micro_batch, method=TOY_METHOD, checkpoint_minutes=1e-9, optim=optim
    )
    method = built(section)
    start = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    grads: list[dict[str, float]] = []
    before = method.before_update

    def recorded(moment):
        before(moment)
        norms = {n: float(p.grad.norm()) for n, p in method.named_parameters() if p.grad is not None}
        grads.append(norms)

    method.before_update = recorded  # type: ignore[method-assign]
    state, losses, _ = run(
        opened(folder), section, folder / f"{name}-states", method=method, logger=Killing(at_step)
    )
    decays = sorted({group["weight_decay"] for group in state.optimiser.param_groups})
    saved = StateFolder(folder / f"{name}-states", "0123456789abcdef", print).read(STEPS)["method"]
    torch.save(
        {"start": start, "end": method.state_dict(), "losses": losses, "decays": decays, "grads": grads,
         "saved": sorted(saved), "pid": os.getpid()},
        folder / f"{name}.pt",
    )  # fmt: skip
