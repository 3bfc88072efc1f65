"""Small runs of stage `video` on embedded clips, in this process or as one of several ranks.

Child processes import this module, so what they need is here and not in a fixture.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from embedded_sets import prepare_sets

from vitpipe.config.data import DataConfig, EmbeddedConfig
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import WEIGHTS, Artifact, Card
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.models.build import build_encoder
from vitpipe.models.weights import save_weights
from vitpipe.stages.context import StageContext
from vitpipe.stages.video import stage
from vitpipe.train.ranks import Ranks, joined

CLIPS = EmbeddedConfig(scene_size=96, video_frames=6, videos=3)
# The recipe's own network is a hivit.
NOT_HIVIT = (
    "model.pyramid=null",
    "model.decoder=null",
    "model.relative_position=null",
    "model.image_size=64",
)
VIT = (*NOT_HIVIT, "model.name=vit_nano", "model.patch_size=8", "video.size_multiple=8")
REVCOL = (*NOT_HIVIT, "model.name=revcol_micro", "video.size_multiple=32", "video.short_side=256")
HIVIT = ("model.relative_position=false", "model.image_size=64", "video.size_multiple=16")
SETTINGS = ("stages=[prepare, finetune, video]", "data.workers=0", "video.short_side=64", "video.batch=4")


def recipe_of(settings: Sequence[str] = VIT):
    """The demo recipe with these settings on top."""
    return load_recipe("itpn/pixel_base", "demo", [*SETTINGS, *settings])


def make_inputs(root: Path, settings: Sequence[str] = VIT) -> None:
    """Prepared clips, if they are not there yet, and the weights of an untrained encoder."""
    if not (root / "data").is_dir():
        data = DataConfig(source="embedded", sets=("davis",), embedded=CLIPS)
        prepare_sets(root / "prepare", data).rename(root / "data")
    torch.manual_seed(9)
    (root / "weights").mkdir(exist_ok=True)
    save_weights(build_encoder(recipe_of(settings).model), root / "weights" / WEIGHTS)


def context(
    root: Path,
    name: str,
    settings: Sequence[str] = VIT,
    ranks: Ranks | None = None,
    logger: MemoryLogger | None = None,
) -> StageContext:
    """A run with the inputs below `root`; its output is in `root/NAME`."""
    words = dict.fromkeys(("recipe_digest", "data_digest", "code_digest", "image", "identity"), "")
    about = {"recipe": "itpn/pixel_base", "profile": "demo", "parents": {}, "seed": 0, "libraries": {}}
    folders = {"data": "prepare", "weights": "finetune"}
    inputs = {
        kind: Artifact(root / kind, Card(stage=of, **about, **words), {}) for kind, of in folders.items()
    }
    (root / name).mkdir(exist_ok=True)
    return StageContext(
        "video",
        recipe_of(settings),
        inputs,
        root / name,
        root / "state",
        logger or MemoryLogger(),
        ranks or Ranks(),
    )


def rank_child(root: Path, rank: int, num_ranks: int, port: int) -> None:
    """One of several ranks, which writes its metrics to `root/rankN.json`, and its output to `root/ofN`."""
    torch.set_num_threads(1)
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names, RANK=str(rank), WORLD_SIZE=str(num_ranks))
    with joined(rank, num_ranks, "cpu") as ranks:
        metrics = stage.run(context(root, f"of{rank}", ranks=ranks))
    (root / f"rank{rank}.json").write_text(json.dumps(metrics))
