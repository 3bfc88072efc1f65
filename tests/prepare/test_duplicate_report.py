"""Planted copies appear in the table and the figure of the prepare stage."""

import io

import pytest
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.prepare.duplicate_report import report_duplicates
from vitpipe.stages.prepare import stage as prepare


def plant(raw):
    """Copies of two training images in val, smaller and encoded anew, one under another class."""
    train = sorted((raw / "imagenet" / "train").rglob("*.JPEG"))
    for source, wnid in ((train[0], "n99900000"), (train[8], "n99900009")):
        with Image.open(source) as image:
            buffer = io.BytesIO()
            image.resize((30, 30)).save(buffer, "JPEG", quality=85)
        (raw / "imagenet" / "val" / wnid / f"copy_of_{source.name}").write_bytes(buffer.getvalue())
    return [train[0].stem, train[8].stem]


def test_planted_copies_are_found_listed_and_drawn(raw_copy, make_context):
    originals = plant(raw_copy)
    ctx = make_context(source="folders", root=raw_copy, sets=("imagenet",), near_duplicates=True)
    prepare.run(ctx)
    rows = ctx.logger.tables["near_duplicates_imagenet"]
    planted = [row for row in rows if "copy_of" in row["val_image"]]
    assert {row["train_image"].partition("-")[2] for row in planted} >= set(originals)
    by_class = {row["train_image"].partition("-")[2]: row["same_class"] for row in planted}
    assert [by_class[name] for name in originals] == ["yes", "no"]
    assert any("have near duplicates" in line for line in ctx.logger.lines)
    with Image.open(ctx.logger.figures["near_duplicates_imagenet"]) as sheet:
        assert sheet.width > 200
    assert (ctx.folder / "imagenet" / "train.hashes").stat().st_size == 30 * 8


def test_a_set_packed_without_hashes_says_what_to_set(prepared):
    with pytest.raises(DatasetError, match=r"without perceptual hashes.*data\.near_duplicates=true"):
        report_duplicates(prepared, "imagenet", MemoryLogger())
