"""Pictures of detections and segmentations: which images, which boxes, which words; never a failed stage."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.image_grid import class_colours, note_of, optional_figure, rgb
from vitpipe.stages.detect import stage as detect
from vitpipe.stages.segment import stage as segment

pytestmark = pytest.mark.dense
NAMES = ("cat", "dog")


def thing(label, left, *, crowd=0):
    polygon = [left, 10.0, left + 20.0, 10.0, left + 20.0, 30.0, left, 30.0]
    return {
        "bbox": [left, 10.0, left + 20.0, 30.0], "bbox_label": label, "ignore_flag": crowd, "mask": [polygon],
    }  # fmt: skip


# The first image holds nothing, the third a crowd alone.
OBJECTS = [
    [],
    [thing(0, 5.0)],
    [thing(1, 5.0, crowd=1)],
    [thing(1, 30.0), thing(0, 5.0)],
    [],
    *[[thing(0, 8.0)]] * 4,
]


class ValSet:
    def __init__(self, folder):
        self.folder, self.read = folder, []
        self.metainfo, self.cat_ids = {"classes": NAMES}, [7, 9]
        for number in range(len(OBJECTS)):
            Image.new("RGB", (64, 48), (number, 90, 60)).save(folder / f"{number}.png")

    def __len__(self):
        return len(OBJECTS)

    def get_data_info(self, index):
        self.read.append(index)
        path = str(self.folder / f"{index}.png")
        return {
            "img_id": index + 100,
            "img_path": path,
            "height": 48,
            "width": 64,
            "instances": OBJECTS[index],
        }


def result(image_id, score, category=7):
    counts = [48 * 10, 48 * 20, 48 * 34]
    return {
        "image_id": image_id, "category_id": category, "bbox": [10.0, 0.0, 20.0, 48.0], "score": score,
        "segmentation": {"size": [48, 64], "counts": counts},
    }  # fmt: skip


@pytest.fixture
def context(tmp_path):
    return SimpleNamespace(
        folder=tmp_path, logger=MemoryLogger(), ranks=SimpleNamespace(num_ranks=1), is_main=True
    )


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of every grid that a stage writes."""
    found = []
    for module in (detect, segment):
        write = module.write_grid

        def spy(path, sections, write=write, **options):
            found.append((sections, options))
            write(path, sections, **options)

        monkeypatch.setattr(module, "write_grid", spy)
    return found


def test_detections_show_the_highest_scores_on_the_first_images_that_hold_objects(
    context, drawn, monkeypatch
):
    objects = []
    draw = detect.draw_objects
    monkeypatch.setattr(
        detect, "draw_objects", lambda image, own, *rest: objects.append(own) or draw(image, own, *rest)
    )
    val_set = ValSet(context.folder)
    results = [result(101, score) for score in (0.02, 0.2, 0.01, 0.12, 0.05, 0.04, 0.03)]
    results += [result(103, 0.9, category=9), *[result(105, 0.4)] * 2]
    detect._draw(context, val_set, results, 2, "predictions")
    ((section,), _), *more = drawn
    assert not more
    assert section.heads == ("annotated", "predicted: the 5 highest scores")
    assert [tile.caption for tile in section.tiles] == [
        "1 object", "5 boxes, scores 0.20 to 0.03", "2 objects", "1 box, score 0.90",
        "1 object", "2 boxes, scores 0.40 to 0.40", "1 object", "no box",
    ]  # fmt: skip
    assert [item.text for item in objects[1]] == ["cat 0.20", "cat 0.12", "cat 0.05", "cat 0.04", "cat 0.03"]
    assert objects[1][0].box == (10.0, 0.0, 30.0, 48.0)
    assert objects[1][0].mask.sum() == 20 * 48
    assert [item.text for item in objects[3]] == ["dog 0.90"]
    # No more of the set is read than is shown: the images 1, 3, 5 and 6.
    assert val_set.read == list(range(7))
    note = note_of(context.logger.figures["predictions"])
    assert "The first 4 validation images with objects" in note
    assert "however low the score is" in note
    first = context.logger.figures["predictions"].read_bytes()
    detect._draw(context, val_set, results, 2, "predictions")
    assert context.logger.figures["predictions"].read_bytes() == first


def test_a_set_without_objects_is_no_error(context, drawn):
    val_set = ValSet(context.folder)
    val_set.get_data_info = lambda index: {"instances": []}
    detect._draw(context, val_set, [], 2, "predictions")
    assert drawn[0][0][0].tiles == []


def test_a_prediction_that_cannot_be_drawn_costs_only_the_picture(context):
    broken = [{**result(101, 0.9), "category_id": 12345}]
    with optional_figure("predictions", context.logger.say):
        detect._draw(context, ValSet(context.folder), broken, 2, "predictions")
    assert "predictions was not drawn" in context.logger.lines[0]
    assert not context.logger.figures


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_segmentations_have_titles_and_name_the_colours_that_occur(context, drawn, num_ranks):
    context.ranks.num_ranks = num_ranks
    classes = ("sky", "sea", "sand", "rock")
    Image.new("RGB", (6, 4), (9, 9, 9)).save(context.folder / "image.png")
    truth, predicted = torch.zeros(1, 4, 6, dtype=torch.long), torch.zeros(1, 4, 6, dtype=torch.long)
    truth[0, 0], predicted[0, 3] = 255, 2
    sample = SimpleNamespace(
        img_path=str(context.folder / "image.png"),
        gt_sem_seg=SimpleNamespace(data=truth),
        pred_sem_seg=SimpleNamespace(data=predicted),
    )
    segment._draw(context, [sample, sample], classes, "predictions")
    (((section,), _),) = drawn
    assert section.heads == ("image", "annotated", "predicted")
    colours = class_colours(4)
    assert section.legend == [(rgb(colours[0]), "sky"), (rgb(colours[2]), "sand"), ((0, 0, 0), "ignored")]
    assert len(section.tiles) == 6
    note = note_of(context.logger.figures["predictions"])
    assert "The first 2 validation images" in note
    assert ("that rank 0 of 4 reads" in note) is (num_ranks == 4)
    with Image.open(context.logger.figures["predictions"]) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert all((pixels == colour).all(axis=1).any() for colour, _ in section.legend)
