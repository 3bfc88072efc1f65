"""Tiny COCO and ADE20K folders, packed as the prepare stage does, and the demo recipe shrunk to seconds."""

from __future__ import annotations

import pytest

from vitpipe.config.data import EmbeddedConfig
from vitpipe.config.digest import digest_of
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Artifact, Card
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.manifest import DataManifest, write_manifest
from vitpipe.datasets.embedded.write import write_embedded
from vitpipe.datasets.layouts import verified
from vitpipe.prepare.dense_sets import pack_dense
from vitpipe.stages.context import StageContext
from vitpipe.train.ranks import Ranks

TINY = (
    "model.pyramid.width=16",
    "detect.global_batch=2",
    "detect.epochs=1",
    "detect.optim.drop_epochs=[0.5]",
    "detect.short_sides=[64]",
    "detect.long_side=96",
    "detect.test_size=[96,64]",
    "detect.head.width=8",
    "detect.head.fc_width=16",
    "detect.head.proposals=16",
    "detect.optim.warmup_steps=1",
    "detect.drop_path=0.1",
    "detect.log_every_steps=2",
    "segment.global_batch=2",
    "segment.steps=4",
    "segment.crop_size=64",
    "segment.scale=[256,64]",
    "segment.stride=43",
    "segment.head.width=8",
    "segment.head.auxiliary_width=8",
    "segment.optim.warmup_steps=1",
    "segment.drop_path=0.1",
    "segment.log_every_steps=2",
)

_VITDET = (
    "detect.augment=large_scale_jitter",
    "detect.jitter_size=64",
    "detect.test_size=[64,64]",
    "detect.head.rpn_convs=2",
    "detect.head.norm=layer",
    "detect.head.box_loss=l1",
)
# What turns the tiny recipe into one with another head.
HEADS = {
    "semantic_fpn": (),
    "upernet": (),
    "mask_rcnn": _VITDET,
    # Another head begins with its own defaults: the sizes are said again.
    "cascade_mask_rcnn": (
        *(value for value in _VITDET if "head" not in value),
        "detect.head={name: cascade_mask_rcnn, width: 8, fc_width: 16, proposals: 16, rpn_convs: 2}",
        "detect.head={norm: layer, box_loss: l1}",
    ),
    "mask2former": (
        "segment.head=mask2former",
        "segment.head.queries=20",
        "segment.head.width=32",
        "segment.head.heads=2",
        "segment.head.feed_forward_width=32",
        "segment.head.encoder_layers=1",
        "segment.head.decoder_layers=1",
        "segment.head.points=64",
        "segment.inference=slide",
        "segment.optim.clip_grad_norm=0.01",
        "segment.optim.warmup_steps=0",
        "segment.steps=3",
    ),
}


def write_tiny(root):
    """A tiny coco/ and ade20k/ in their own layouts below `root`, which is returned."""
    sizes = EmbeddedConfig(scene_size=64, scene_train_images=8, scene_val_images=4)
    write_embedded(root, ("coco", "ade20k"), sizes)
    return root


def pack_tiny(root, out):
    """What the prepare stage makes of `write_tiny`; returns `out`."""
    sets = {
        name: pack_dense(verified(name, root / name, name), out / name).digest for name in ("coco", "ade20k")
    }
    write_manifest(out, DataManifest(source="embedded", sets=sets, data_digest=digest_of(sets)))
    return out


@pytest.fixture(scope="session")
def raw_sets(tmp_path_factory):
    """Root of a tiny coco/ and ade20k/ in their own layouts."""
    return write_tiny(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="session")
def prepared(raw_sets, tmp_path_factory):
    """What the prepare stage makes of them."""
    return pack_tiny(raw_sets, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def tiny_recipe():
    """Seconds per stage."""
    return load_recipe("itpn/pixel_base", "demo", TINY)


@pytest.fixture(scope="session")
def full_recipe():
    """The published sizes."""
    return load_recipe("itpn/pixel_base", "full", ("data.root=.",))


@pytest.fixture(scope="session")
def tiny_head():
    """(head, more overrides) -> the tiny recipe with another head: a key of `HEADS`."""

    def make(head, *overrides):
        return load_recipe("itpn/pixel_base", "demo", (*TINY, "data.workers=0", *HEADS[head], *overrides))

    return make


@pytest.fixture(scope="session")
def vitdet_recipe():
    """The published sizes of ViTDet's heads."""
    overrides = (
        "data.root=.",
        "detect.augment=large_scale_jitter",
        "detect.test_size=[1024,1024]",
        "detect.head.rpn_convs=2",
        "detect.head.norm=layer",
        "detect.head.box_loss=l1",
        "detect.epochs=50",
        "detect.optim.drop_epochs=[44.4444,48.1481]",
        "detect.global_batch=32",
        "detect.optim.base_lr=1.0e-4",
        "detect.optim.weight_decay=0.1",
        "detect.optim.warmup_steps=250",
    )
    return load_recipe("itpn/pixel_base", "full", overrides)


@pytest.fixture
def make_context(prepared, tiny_recipe, tmp_path):
    """(stage, name of the run, logger, recipe) -> a context whose folders are `tmp_path/NAME/{folder,state}`."""

    def make(stage, name="run", logger=None, recipe=None):
        folder, state = tmp_path / name / "folder", tmp_path / name / "state"
        folder.mkdir(parents=True, exist_ok=True)
        state.mkdir(exist_ok=True)
        data = Artifact(prepared, prepare_card(), {})
        chosen, log = recipe or tiny_recipe, logger or MemoryLogger()
        return StageContext(stage, chosen, {"data": data}, folder, state, log, Ranks())

    return make


def prepare_card():
    """The least that a card can say."""
    return Card(
        stage="prepare", recipe="tiny", profile="demo", recipe_digest="", data_digest="", code_digest="",
        image="train", identity="", parents={}, seed=0, libraries={},
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_overrides() -> tuple[str, ...]:
    """What makes the demo recipe tiny."""
    return tuple(TINY)
