"""Short pre-trainings of nano networks without labels: DINO, SelfPatch, EsViT, MoBY, MoBY + SelfPatch, and on
the features of a frozen teacher.

Child processes import this module.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from short_runs import AUGMENT, SEED, opened

from vitpipe.config.model import model_config
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.config.train_sections import OptimConfig
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.batches import train_batches
from vitpipe.methods.method import method_class
from vitpipe.models.families import family_of
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.stages.pretrain.config import PretrainConfig
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.ranks import Ranks, joined

NAMES = ("dino", "selfpatch", "esvit", "moby", "moby_selfpatch")
FEATURES = "masked_features"  # its teacher is frozen and no copy of the student
SMALL = {
    "dino": {"prototypes": 32, "head_hidden": 16, "head_width": 8},
    "moby": {"queue": 64, "head_hidden": 16, "head_width": 8},
}
CROPS = {"global_size": 32, "local_size": 24, "num_local": 2}


def section(name: str, *, global_batch: int = 16, epochs: float = 1, **changes) -> PretrainConfig:
    if name == FEATURES:
        settings = {"masked_units": 1, "smallest_block": 1, "drop_path": 0.2}
    else:
        settings = dict(SMALL["moby" if name.startswith("moby") else "dino"])
        settings["crops"] = {**CROPS, "num_local": 0} if name.startswith("moby") else CROPS
    if "selfpatch" in name:
        settings["patch_prototypes"] = 24
    optim = OptimConfig(
        base_lr=2e-3,
        lr_reference_batch=None,
        clip_grad_norm=3.0,
        clip_each_tensor=not name.startswith("moby") and name != FEATURES,
    )
    return PretrainConfig(
        epochs=epochs,
        global_batch=global_batch,
        optim=optim,
        augment=AUGMENT,
        method={"name": name, **settings, **changes.pop("method", {})},
        log_every_steps=1,
        **changes,
    )


def model(name: str, **options):
    if name == FEATURES:
        return model_config(
            {"name": "hivit_nano", "image_size": 32, "layer_scale": 0.1, "pyramid": {"width": 32}, **options}
        )
    pooling = "class_attention" if "selfpatch" in name else "class_token"
    return model_config(
        {"name": "vit_nano", "image_size": 32, "patch_size": 8, "pooling": pooling, **options}
    )


def build(name: str, given: PretrainConfig | None = None, **options):
    torch.manual_seed(3)
    given, network = given or section(name), model(name, **options)
    kind = method_class(name)
    return kind.build(given.method, family_of(network), network, section=given, classes=("a",))


def run(shards, states, name, *, micro_batch="auto", ranks=None, kill_at=None, epochs=1.0, method=None):
    """Train, saving after every step; the method, and its losses step by step. At `kill_at` the process dies.

    Args:
        method: options of its own. What the run says is in `said` of the result.
    """
    given = section(
        name, micro_batch=micro_batch, epochs=epochs, checkpoint_minutes=1e-9, method=method or {}
    )
    ranks, method, logger = ranks or Ranks(), build(name, given), MemoryLogger()
    plan = train_plan(
        given, path="short", num_images=len(shards), num_ranks=ranks.num_ranks, accelerator=Accelerator()
    )

    def batches(start):
        made = train_batches(
            shards, method.views(given.augment, 32), seed=SEED, global_batch=plan.global_batch,
            micro_batch=plan.micro_batch, rank=ranks.rank, num_ranks=ranks.num_ranks, start_step=start,
            num_steps=plan.num_steps, workers=0,
        )  # fmt: skip
        for batch in made:
            if batch.moment.step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    folder = StateFolder(states, "0" * 64, lambda line: None)
    optimiser = build_optimiser(method.groups(given.optim), given.optim)
    train(
        method, batches, plan, optimiser=optimiser, section=given, ranks=ranks, states=folder, logger=logger
    )
    method.said = logger.lines
    return method, [value for _, name, value in logger.points if name == "train/loss"]


def child(
    folder: Path, name: str, at_step: int | None, rank: int = 0, num_ranks: int = 1, port: int = 0
) -> None:
    """Train in a process of its own, killed at a step; saves after every step, leaves its state and losses."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(num_ranks)
    )
    micro_batch = 16 // num_ranks
    with joined(rank, num_ranks, "cpu") as ranks:
        method, losses = run(
            opened(folder),
            folder / f"{name}-states",
            name,
            micro_batch=micro_batch,
            ranks=ranks,
            kill_at=at_step,
        )
        torch.save({"state": method.resume_state(), "losses": losses}, folder / f"{name}-{rank}.pt")
