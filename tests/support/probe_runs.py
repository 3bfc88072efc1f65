"""Small runs of stage `probe` on noise, in this process or as one of several ranks.

Child processes import this module, so what they need is here and not in a fixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_shards import write_set

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import WEIGHTS, Artifact, Card
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.models.build import build_encoder
from vitpipe.models.weights import save_weights
from vitpipe.stages.context import StageContext
from vitpipe.stages.probe import stage
from vitpipe.train.ranks import Ranks, joined

SETTINGS = (
    "stages=[prepare, pretrain, probe]",
    "data.sets=auto",
    "data.workers=0",
    "model.image_size=32",
    "probe.epochs=4",
    "probe.batch=16",
)
# 40 images are 2 steps of 16 per epoch.
AUGMENTED = (
    "probe.linear={epochs: 3, global_batch: 16, log_every_steps: 1, "
    "optim: {name: sgd, base_lr: 3.0, weight_decay: 0.0, schedule_unit: epoch}}",
)


def make_inputs(root: Path) -> None:
    """Two small sets of noise and the weights of an untrained encoder."""
    write_set(root / "data", num_images=40)
    torch.manual_seed(9)
    (root / "weights").mkdir()
    recipe = load_recipe("itpn/pixel_base", "demo", SETTINGS)
    save_weights(build_encoder(recipe.model), root / "weights" / WEIGHTS)


def context(
    root: Path,
    name: str,
    settings: Sequence[str] = (),
    ranks: Ranks | None = None,
    logger: MemoryLogger | None = None,
) -> StageContext:
    """A run with the inputs below `root`; its output is in `root/NAME`."""
    words = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")
    about = {"recipe": "itpn/pixel_base", "profile": "demo", "parents": {}, "seed": 0, "libraries": {}}
    folders = {"data": "prepare", "weights": "pretrain"}
    inputs = {
        kind: Artifact(root / kind, Card(stage=of, **about, **words), {}) for kind, of in folders.items()
    }
    (root / name).mkdir(exist_ok=True)
    recipe = load_recipe("itpn/pixel_base", "demo", [*SETTINGS, *settings])
    state = root / f"{name}.state"
    return StageContext(
        "probe", recipe, inputs, root / name, state, logger or MemoryLogger(), ranks or Ranks()
    )


def rank_child(root: Path, settings: Sequence[str], rank: int, num_ranks: int, port: int) -> None:
    """One of several ranks, which writes its metrics to `root/rankN.json`."""
    torch.set_num_threads(1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names, RANK=str(rank), WORLD_SIZE=str(num_ranks))
    with joined(rank, num_ranks, "cpu") as ranks:
        metrics = stage.run(context(root, f"of{rank}", settings, ranks))
    (root / f"rank{rank}.json").write_text(json.dumps(metrics))
