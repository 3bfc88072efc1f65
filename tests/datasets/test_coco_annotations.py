"""Odd COCO annotations: what has one reading is repaired to the plain file, the rest is refused with counts."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.layouts import layout_of, verified
from vitpipe.datasets.layouts.coco_annotations import read_annotations
from vitpipe.datasets.layouts.coco_outlines import area_of, mask_of, outline_of
from vitpipe.datasets.layouts.file_tree import FolderTree

SIDE = 96
BOXES = ([10, 20, 30, 25], [50, 40, 20, 40])


def corners_of(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def runs_of(box):
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y : y + height, x : x + width] = True
    ends = [0, *np.flatnonzero(np.diff(mask.ravel("F"), prepend=False)).tolist(), mask.size]
    return {
        "counts": [last - first for first, last in pairwise(ends)],
        "size": [SIDE, SIDE],
    }


def plain(split):
    """Three pictures with two objects each, as the release has them."""
    first = {"train": 1, "val": 101}[split]
    images = [
        {"id": n, "file_name": f"{n:012d}.jpg", "width": SIDE, "height": SIDE}
        for n in range(first, first + 3)
    ]
    annotations = [
        {
            "id": image["id"] * 10 + number,
            "image_id": image["id"],
            "category_id": (1, 18)[number],
            "bbox": list(box),
            "area": float(box[2] * box[3]),
            "iscrowd": 0,
            "segmentation": [corners_of(box)],
        }
        for image in images
        for number, box in enumerate(BOXES)
    ]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        content = plain(split)
        for image in content["images"]:
            Image.new("RGB", (SIDE, SIDE), "grey").save(root / f"{split}2017" / image["file_name"])
        write(root, split, content)
    return root


def write(root, split, content):
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def read(root, split="train"):
    return read_annotations(FolderTree(root), split, outlines=True)


def each(change):
    def changed(content):
        for annotation in content["annotations"]:
            change(annotation)

    return changed


def one(change):
    return lambda content: change(content["annotations"][1])


def images(change):
    def changed(content):
        for image in content["images"]:
            change(image)

    return changed


def test_a_plain_file_is_used_as_it_is(root):
    found = read(root)
    assert (found.content, found.remarks, found.is_repaired) == (plain("train"), (), False)
    # Without outlines, as a set is verified: everything else is the same.
    for annotation in found.content["annotations"]:
        del annotation["segmentation"]
    assert read_annotations(FolderTree(root), "train").content == found.content


REPAIRED = {
    "no iscrowd": (each(lambda a: a.pop("iscrowd")), "no 'iscrowd', taken as 0 (6)"),
    "no area": (each(lambda a: a.pop("area")), "no 'area', computed from the outline (6)"),
    "one without area": (one(lambda a: a.pop("area")), "no 'area', computed from the outline (1)"),
    "floats": (
        images(lambda image: image.update(width=96.0, id=float(image["id"]))),
        "a whole number with a decimal point as 'id' of images (3)",
    ),
    "float references": (
        each(lambda a: a.update(image_id=float(a["image_id"]))),
        "a whole number with a decimal point as 'image_id' of annotations (6)",
    ),
    "category order": (
        lambda content: content["categories"].reverse(),
        "categories that are not in the order of their ids, sorted",
    ),
    "folder in the name": (
        images(lambda image: image.update(file_name=f"train2017/{image['file_name']}")),
        "a file name with its folder, which is left out (3)",
    ),
    "polygon without its list": (
        each(lambda a: a.update(segmentation=a["segmentation"][0])),
        "one polygon instead of a list of polygons, which was mended (6)",
    ),
    "a polygon too much": (
        one(lambda a: a["segmentation"].append([1, 2, 3, 4])),
        "polygons with fewer than 3 points or an odd number of values, which was mended (1)",
    ),
}


@pytest.mark.parametrize("name", REPAIRED)
def test_what_has_one_reading_becomes_the_plain_file(root, name):
    change, said = REPAIRED[name]
    content = plain("train")
    change(content)
    write(root, "train", content)
    found = read(root)
    assert found.is_repaired
    assert any(said in remark.what for remark in found.remarks), found.remarks
    assert found.content == plain("train")


@pytest.mark.parametrize(
    "change", [lambda a: a.pop("id"), lambda a: a.update(id=7), lambda a: a.update(id=a["id"] - 10)]
)
def test_ids_of_objects_that_evaluation_would_misread_are_given_anew(root, change):
    content = plain("train")
    each(change)(content)
    write(root, "train", content)
    found = read(root)
    assert [annotation["id"] for annotation in found.content["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert "numbered from 1" in found.remarks[0].what


def test_a_byte_order_mark_is_removed(root):
    path = root / "annotations" / "instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    found = read(root)
    assert found.is_repaired
    assert found.content == plain("train")


@pytest.mark.parametrize(
    "outline",
    [None, [], [[]], 3, "x", [[10**400] * 6], [{"a": 1}], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, 6, 7]], "absent"],
)
def test_objects_without_an_outline_are_left_out_with_their_count(root, outline):
    content = plain("train")
    if outline == "absent":
        del content["annotations"][1]["segmentation"]
    else:
        content["annotations"][1]["segmentation"] = outline
    write(root, "train", content)
    found = read(root)
    assert found.content["annotations"] == [a for a in plain("train")["annotations"] if a["id"] != 11]
    assert "left out (1), for example id 11" in found.remarks[0].what
    each(lambda a: a.update(segmentation=[]))(content)
    write(root, "train", content)
    with pytest.raises(DatasetError, match=r"train has no object to detect .*no outline, left out \(6\)"):
        read(root)


REFUSED = {
    "no box": (each(lambda a: a.pop("bbox")), r"'bbox' is not four finite numbers \(6\)"),
    "a number beyond floats": (
        one(lambda a: a.update(bbox=[1, 2, 10**400, 4])),
        r"'bbox' is not four finite numbers \(1\)",
    ),
    "an area beyond floats": (one(lambda a: a.update(area=10**400)), "'area' is not a number"),
    "three numbers": (one(lambda a: a.update(bbox=[1, 2, 3])), r"'bbox' is not four finite numbers \(1\)"),
    "not a number": (one(lambda a: a.update(bbox=[1, 2, float("nan"), 4])), "'bbox' is not four finite"),
    "text": (one(lambda a: a.update(bbox=["1", 2, 3, 4])), "'bbox' is not four finite numbers"),
    "corners": (
        each(lambda a: a.update(bbox=[a["bbox"][0], a["bbox"][1], 95, 90])),
        "leaves its picture, while all boxes fit as corners",
    ),
    "crowds": (each(lambda a: a.update(iscrowd=1, segmentation=runs_of(a["bbox"]))), "6 are crowds"),
    "crowd as text": (one(lambda a: a.update(iscrowd="yes")), "'iscrowd' is neither 0 nor 1"),
    "no area in boxes": (each(lambda a: a.update(bbox=[*a["bbox"][:2], 0, 0])), "which training skips"),
    "outside": (each(lambda a: a.update(bbox=[200, 200, 9, 9])), "outside of its picture"),
    "area 0": (each(lambda a: a.update(area=0)), "train has no object to detect"),
    "nothing": (lambda content: content.update(annotations=[]), "it has no annotations"),
    "image twice": (lambda content: content["images"][1].update(id=1), r"'id' of images occurs again \(1\)"),
    "file twice": (
        lambda content: content["images"][1].update(file_name=content["images"][0]["file_name"]),
        "'file_name' of images occurs again",
    ),
    "category twice": (
        lambda content: content["categories"].append({"id": 1, "name": "cat"}),
        r"'id' of categories occurs again \(1\), for example 1",
    ),
    "name twice": (
        lambda content: content["categories"].append({"id": 19, "name": "dog"}),
        r"'name' of categories occurs again \(1\), for example dog",
    ),
    "number as text": (
        images(lambda image: image.update(id=str(image["id"]))),
        "'id' of images is not a whole",
    ),
    "half a pixel": (
        images(lambda image: image.update(width=95.5)),
        "'width' of images is not a whole number",
    ),
    "no pixel": (images(lambda image: image.update(height=0)), "height is not positive"),
    "runs too short": (
        one(lambda a: a.update(segmentation={"counts": [5, 5], "size": [SIDE, SIDE]})),
        "run lengths that do not fill their size",
    ),
    "runs of another picture": (
        one(lambda a: a.update(segmentation={"counts": [5, 5], "size": [2, 5]})),
        "run lengths of another size than the picture",
    ),
    "runs beyond integers": (
        one(lambda a: a.update(segmentation={"counts": [10**30], "size": [SIDE, SIDE]})),
        "run lengths that do not fill their size",
    ),
    "runs of nothing": (
        one(lambda a: a.update(segmentation={"counts": None, "size": [SIDE, SIDE]})),
        "run lengths that do not fill their size",
    ),
    "damaged runs": (
        one(lambda a: a.update(segmentation={"counts": "\x00é", "size": [SIDE, SIDE]})),
        "run lengths that do not fill their size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_with_its_count(root, name):
    change, said = REFUSED[name]
    content = plain("train")
    change(content)
    write(root, "train", content)
    with pytest.raises(DatasetError, match=said) as refused:
        verified("coco", root, "coco")
    assert refused.value.where.endswith("instances_train2017.json")
    assert refused.value.fix


def test_all_kinds_are_named_at_once_with_two_examples_each(root):
    content = plain("train")
    each(lambda a: a.update(bbox=[1]))(content)
    one(lambda a: a.update(iscrowd=7))(content)
    write(root, "train", content)
    with pytest.raises(DatasetError) as refused:
        read(root)
    assert "'bbox' is not four finite numbers (6), for example id 10" in refused.value.what
    assert "; id 11" in refused.value.what
    assert "id 20" not in refused.value.what
    assert "'iscrowd' is neither 0 nor 1 (1)" in refused.value.what


def test_boxes_over_the_border_and_pictures_without_objects_are_remarks(root):
    content = plain("train")
    content["annotations"] = content["annotations"][:3]
    content["annotations"][0]["bbox"] = [-20, 60, 200, 200]
    write(root, "train", content)
    found = read(root)
    assert not found.is_repaired  # the file itself is read: AP is that of the annotations as they are
    assert [remark.what.partition(" (")[0] for remark in found.remarks] == [
        "a box that leaves its picture by more than 2 pixels, cut in training",
        "images without objects, which are not used for training",
    ]


@pytest.mark.parametrize("coding", ["runs", "compressed"])
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_run_lengths_in_both_codings_are_outlines(root, coding, iscrowd):
    from faster_coco_eval import mask as coding_of_coco

    content = plain("train")
    for annotation in content["annotations"][:2]:
        runs = runs_of(annotation["bbox"])
        if coding == "compressed":
            runs["counts"] = coding_of_coco.frPyObjects(runs, SIDE, SIDE)["counts"].decode()
        annotation.update(segmentation=runs, iscrowd=iscrowd)
    write(root, "train", content)
    found = read(root)
    assert (found.content, found.remarks) == (content, ())
    for annotation in found.content["annotations"][:2]:
        x, y, width, height = annotation["bbox"]
        mask = mask_of(annotation["segmentation"], SIDE, SIDE)
        assert mask.sum() == mask[y : y + height, x : x + width].sum() == width * height
        assert area_of(outline_of(annotation["segmentation"])) == width * height


def test_cut_and_foreign_pictures_are_found_before_they_are_packed(root):
    first, second = sorted((root / "train2017").iterdir())[:2]
    first.write_bytes(first.read_bytes()[:-200])
    second.write_bytes(b"<html>gone</html>")
    broken = layout_of("coco").look_into(verified("coco", root, "coco"), None).problems[0].what
    assert "2 images cannot be decoded" in broken
    assert first.name in broken
    assert second.name in broken


def test_classes_have_one_order_in_both_splits(root):
    content = copy.deepcopy(plain("val"))
    content["categories"].reverse()
    write(root, "val", content)
    assert verified("coco", root, "coco").classes == ("person", "dog")
    for category, number in zip(content["categories"], (1, 18), strict=True):
        category["id"] = number  # now the same names have other ids: labels would be exchanged
    write(root, "val", content)
    with pytest.raises(DatasetError, match="different categories, or other ids"):
        verified("coco", root, "coco")


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 1.0, 96, "1", "person"]),
    lambda part: st.lists(part, max_size=6) | st.dictionaries(st.sampled_from(["counts", "size", "a"]), part),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["images", "annotations", "categories"]),
            st.integers(0, 1),
            st.sampled_from(sorted({key for part in plain("train").values() for key in part[0]})),
            ODD,
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_used_or_refused_in_one_paragraph(tmp_path_factory, changes):
    root = tmp_path_factory.getbasetemp() / "any"
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    content = plain("train")
    for listing, place, key, value in changes:
        content[listing][place][key] = value
    write(root, "train", content)
    try:
        found = read(root)
    except DatasetError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.fix
        assert "\n" not in str(refused)
        return
    # What is used has what mmdet and the evaluation read.
    for annotation in found.content["annotations"]:
        assert isinstance(annotation["segmentation"], list | dict)
        assert len(annotation["bbox"]) == 4
        assert annotation["iscrowd"] in (0, 1)
    numbers = [annotation["id"] for annotation in found.content["annotations"]]
    assert len(set(numbers)) == len(numbers)
