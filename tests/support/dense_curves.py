"""Fifty steps of every dense head on a nano network: the runs whose losses are kept in golden/dense_curves.json."""

from __future__ import annotations

import importlib
from pathlib import Path

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Artifact, Card
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.stages.context import StageContext
from vitpipe.train.ranks import Ranks

NUM_STEPS = 50
_COMMON = ("model.pyramid.width=16", "data.workers=0")
_DETECT = (
    # Three steps per epoch (seven images have objects): warm-up, drop and several orders of the images lie within the run.
    "detect.global_batch=2", "detect.epochs=16.7", "detect.optim.warmup_steps=10", "detect.optim.drop_epochs=[10]",
    "detect.short_sides=[64]", "detect.long_side=96", "detect.test_size=[96,64]", "detect.drop_path=0.1",
    "detect.head.width=8", "detect.head.fc_width=16", "detect.head.proposals=16", "detect.log_every_steps=1",
)  # fmt: skip
_JITTER = (
    "detect.augment=large_scale_jitter", "detect.jitter_size=64", "detect.test_size=[64,64]",
    "detect.head.rpn_convs=2", "detect.head.norm=layer", "detect.head.box_loss=l1",
)  # fmt: skip
_SEGMENT = (
    "segment.global_batch=2", f"segment.steps={NUM_STEPS}", "segment.optim.warmup_steps=10",
    "segment.crop_size=64", "segment.scale=[256,64]", "segment.stride=43", "segment.drop_path=0.1",
    "segment.log_every_steps=1",
)  # fmt: skip
_QUERIES = (
    "segment.head=mask2former", "segment.head.queries=20", "segment.head.width=32", "segment.head.heads=2",
    "segment.head.feed_forward_width=32", "segment.head.encoder_layers=1", "segment.head.decoder_layers=1",
    "segment.head.points=64", "segment.inference=slide", "segment.optim.clip_grad_norm=0.01",
)  # fmt: skip
# The name of a head comes before its options: those of another one are dropped.
HEADS = {
    "mask_rcnn": ("detect", _DETECT),
    "cascade_mask_rcnn": ("detect", ("detect.head=cascade_mask_rcnn", *_DETECT, *_JITTER)),
    "upernet": ("segment", (*_SEGMENT, "segment.head.width=8", "segment.head.auxiliary_width=8")),
    "mask2former": ("segment", (*_SEGMENT, *_QUERIES)),
}


def losses_of(head: str, prepared: Path, folder: Path) -> list[float]:
    """The loss of every step.

    Args:
        prepared: what the prepare stage wrote, with coco/ and ade20k/ of eight images.
        folder: to work in.
    """
    stage, overrides = HEADS[head]
    recipe = load_recipe("itpn/pixel_base", "demo", (*_COMMON, *overrides))
    for place in ("out", "state"):
        (folder / place).mkdir(parents=True)
    card = Card(
        stage="prepare", recipe="tiny", profile="demo", recipe_digest="", data_digest="", code_digest="",
        image="train", identity="", parents={}, seed=0, libraries={},
    )  # fmt: skip
    logger = MemoryLogger()
    inputs = {"data": Artifact(prepared, card, {})}
    context = StageContext(stage, recipe, inputs, folder / "out", folder / "state", logger, Ranks())
    importlib.import_module(f"vitpipe.stages.{stage}.stage").run(context)
    return [value for _, name, value in logger.points if name == "train/loss"]
