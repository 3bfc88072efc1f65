"""A tiny embedded dataset: its raw layouts, and the prepared folder made from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vitpipe.config.data import DataConfig, EmbeddedConfig
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.datasets.embedded.write import write_embedded
from vitpipe.stages.context import StageContext

SETS = ("imagenet", "imagenet22k", "coco", "ade20k", "davis")
TINY = EmbeddedConfig(
    image_size=32,
    train_images=30,
    val_images=50,
    intermediate_images=50,
    scene_size=64,
    scene_train_images=6,
    scene_val_images=4,
    video_frames=3,
    videos=1,
)


def _context(folder: Path, data: DataConfig) -> StageContext:
    out, state = folder / "out", folder / "state"
    out.mkdir(parents=True)
    state.mkdir()
    recipe = Recipe.model_construct(data=data, seed=0, report=Recipe.model_fields["report"].default)
    return StageContext("prepare", recipe, {}, out, state, MemoryLogger())


@pytest.fixture(scope="session")
def tiny() -> EmbeddedConfig:
    """The sizes of the tiny dataset."""
    return TINY


@pytest.fixture
def make_context(tmp_path) -> Callable[..., StageContext]:
    """Makes a context of the prepare stage, without an engine around it, from fields of `data`."""

    def make(**fields) -> StageContext:
        fields = {"sets": SETS, "embedded": TINY, **fields}
        return _context(tmp_path / "run", DataConfig(**fields))

    return make


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Path:
    """The embedded sets as folders of images; read only."""
    root = tmp_path_factory.mktemp("raw")
    write_embedded(root, SETS, TINY)
    return root


@pytest.fixture
def raw_copy(raw, tmp_path) -> Path:
    """The same, free to be damaged."""
    return Path(shutil.copytree(raw, tmp_path / "raw"))


def prepare_sets(folder: Path, data: DataConfig) -> Path:
    """The output of the prepare stage, below a folder."""
    from vitpipe.stages.prepare import stage as prepare

    ctx = _context(folder, data)
    prepare.run(ctx)
    return ctx.folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """The output of the prepare stage on the embedded sets; read only."""
    data = DataConfig(source="embedded", sets=SETS, embedded=TINY)
    return prepare_sets(tmp_path_factory.mktemp("prepared"), data)


@pytest.fixture
def prepared_copy(prepared, tmp_path) -> Path:
    """The same, free to be damaged."""
    return Path(shutil.copytree(prepared, tmp_path / "prepared"))
