"""`vitpipe doctor` on miniature datasets: it reports each defect, and nothing for intact data."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
from miniatures import (
    cifar10_files,
    mini_imagenet,
    write_cifar,
    write_class_tars,
    write_domain,
    write_flowers,
    write_kaggle,
    write_original,
    write_parquet,
    write_svhn,
)
from PIL import Image

from vitpipe.contracts.errors import DatasetError
from vitpipe.data.manifest import DataManifest, read_manifest, write_manifest
from vitpipe.datasets.catalogue import Archive, class_order, facts
from vitpipe.prepare import expectations
from vitpipe.prepare.dataset_doctor import SAMPLE, _Sample, examine
from vitpipe.prepare.expectations import compare_classes, compare_counts, expected_of, name_short_classes
from vitpipe.prepare.findings import DatasetReport, Finding

SETS = ["imagenet", "imagenet22k", "coco", "ade20k", "davis"]


def snapshot(root) -> dict:
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


def of_level(report, level) -> list[Finding]:
    return [finding for finding in report.findings if finding.level == level]


def only_error(root, name, **options) -> Finding:
    (report,) = examine(root, [name], **options)
    (error,) = of_level(report, "error")
    assert error.fix
    return error


def test_intact_miniatures_have_few_findings_and_are_not_changed(raw):
    before = snapshot(raw)
    reports = examine(raw, deep=True, checksums=True)
    assert {r.dataset: (r.num_train, r.num_val, r.num_classes) for r in reports} == {
        "imagenet": (30, 50, 10), "imagenet22k": (50, 50, 50), "coco": (6, 4, 10), "ade20k": (6, 4, 18),
        "davis": (3, 3, 0),
    }  # fmt: skip
    for report in reports:
        assert not of_level(report, "error"), report.findings
        assert len(of_level(report, "warning")) <= 4
        assert any("images were checked" in note.what for note in of_level(report, "note"))
    assert snapshot(raw) == before


FORMS = {
    "imagenet": {
        "the original tars and devkit": lambda folder: write_original(mini_imagenet(), folder),
        "Kaggle's layout": lambda folder: write_kaggle(mini_imagenet(), folder),
        "parquet": lambda folder: write_parquet(mini_imagenet(), folder),
    },
    "imagenet22k": {"one tar per wnid": lambda folder: write_class_tars(mini_imagenet(), folder)},
    "cifar10": {"cifar": lambda f: write_cifar(cifar10_files(), f, "cifar-10-batches-py", packed=True)},
    "svhn": {"MATLAB": write_svhn},
    "flowers102": {"": lambda folder: write_flowers(folder, packed=True)},
    "domainnet_clipart": {"clipart.zip": lambda folder: write_domain(folder, "clipart", packed=True)},
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in FORMS.items() for form in forms])
def test_every_form_is_examined_alike(tmp_path, name, form):
    (tmp_path / name).mkdir()
    FORMS[name][form](tmp_path / name)
    (report,) = examine(tmp_path, deep=True)
    assert not of_level(report, "error"), report.findings
    assert form in report.form
    assert report.num_train > 0
    assert report.num_val >= 0
    total = report.num_train + report.num_val
    assert of_level(report, "note")[-1].what == f"{total} of {total} images were checked"


def test_domains_that_share_a_folder(tmp_path):
    write_domain(tmp_path / "domainnet", "clipart", packed=False)
    write_domain(tmp_path / "domainnet", "sketch", packed=True)
    assert [report.dataset for report in examine(tmp_path)] == ["domainnet_clipart", "domainnet_sketch"]


def test_the_root_must_contain_datasets(raw, tmp_path):
    for root, names, word in [
        (tmp_path / "absent", None, "does not exist"),
        (raw / "coco", None, "contains no dataset"),
        (raw, ["mnist"], "no dataset 'mnist'"),
    ]:
        with pytest.raises(DatasetError, match=word) as caught:
            examine(root, names)
        assert caught.value.fix


def test_a_named_set_that_is_missing(raw):
    assert "cifar10" in only_error(raw, "cifar10").what


def test_a_flat_val_folder(raw_copy):
    val = raw_copy / "imagenet" / "val"
    for image in list(val.rglob("*.JPEG")):
        image.rename(val / image.name)
    for folder in list(val.iterdir()):
        if folder.is_dir():
            folder.rmdir()
    error = only_error(raw_copy, "imagenet")
    assert "50 images are directly" in error.what
    assert "ILSVRC2012_validation_ground_truth.txt" in error.fix


def test_corrupt_images(raw_copy):
    folder = raw_copy / "imagenet" / "train" / "n99900003"
    images = sorted(folder.iterdir())
    images[0].write_bytes(b"")
    images[1].write_bytes(images[1].read_bytes()[:200])
    Image.new("CMYK", (32, 32)).save(images[2], "JPEG")
    (report,) = examine(raw_copy, ["imagenet"], deep=True)
    (error,) = of_level(report, "error")
    assert error.what.startswith("2 images cannot be decoded: ")
    assert images[0].name in error.what
    assert "empty file" in error.what
    assert "data.max_corrupt_images" in error.fix
    assert any(note.what == "1 of the checked images: CMYK" for note in of_level(report, "note"))


def test_other_files_in_class_folders(raw_copy):
    (raw_copy / "imagenet" / "val" / "n99900003" / "Thumbs.db").write_bytes(b"x")
    (report,) = examine(raw_copy, ["imagenet"])
    assert not of_level(report, "error")
    named = next(found for found in of_level(report, "warning") if "no picture" in found.what)
    assert "1 file is no picture by its kind and is left out: val/n99900003/Thumbs.db" in named.what


def test_a_sample_is_checked_without_deep(raw_copy):
    folder = raw_copy / "imagenet" / "train" / "n99900003"
    source = next(folder.iterdir())
    for number in range(2 * SAMPLE):
        os.link(source, folder / f"copy_{number:04d}.JPEG")
    (few,), (all_of_them,) = (examine(raw_copy, ["imagenet"], deep=deep) for deep in (False, True))
    assert of_level(few, "note")[-1].what == "240 of 480 images were checked; --deep checks all"
    assert of_level(all_of_them, "note")[-1].what == "480 of 480 images were checked"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 15, 16, 17, 1000])
def test_a_sample_of_a_stream_is_spread(length):
    sample = _Sample(8)
    for number in range(length):
        sample.add(number)
    steps = {b - a for a, b in pairwise(sample.entries)}
    assert len(steps) <= 1
    assert min(length, 8) <= len(sample.entries) < 16
    assert sample.entries[:1] == list(range(length))[:1]


@pytest.mark.parametrize(
    ("classes", "level", "word"),
    [
        (lambda known: known, None, None),
        (lambda known: known[::-1], "warning", "another order: label 0"),
        (lambda known: sorted(map(str, range(1000))), "error", "sorted as text"),
        (lambda known: [f"{number:04d}" for number in range(1000)], "error", "not wnids"),
        (lambda known: ["n00000001", *known[1:]], "error", "missing are n01440764"),
        (lambda known: known[:900], "warning", "100 of the 1,000 classes are missing"),
        (lambda known: ["n00000001", "n00000002"], "warning", "None of the 2 classes"),
    ],
)
def test_class_order_of_imagenet(tmp_path, classes, level, word):
    report, known = DatasetReport("imagenet"), list(class_order("imagenet"))
    compare_classes(report, classes(known), known, tmp_path)
    assert [finding.level for finding in report.findings] == ([level] if level else [])
    for finding in report.findings:
        assert word in finding.what
        assert finding.fix


def test_class_folders_named_by_numbers(raw_copy):
    for split in ("train", "val"):
        for number, folder in enumerate(sorted((raw_copy / "imagenet" / split).iterdir())):
            folder.rename(folder.with_name(str(number + 1)))
    error = only_error(raw_copy, "imagenet")
    assert "named by numbers, sorted as text" in error.what
    assert "wnid" in error.fix


def test_classes_with_too_few_images(tmp_path):
    per_class = Counter(dict.fromkeys(class_order("imagenet"), 50))
    for split, number, span in (("val", 49, "50"), ("train", 600, "732 to 1300")):
        counts = Counter(dict.fromkeys(per_class, 50 if split == "val" else 1300)) | Counter()
        counts["n01440764"] = number
        report = DatasetReport("imagenet")
        name_short_classes(report, split, counts, facts("imagenet"), tmp_path)
        (finding,) = report.findings
        assert f"1 class of {split} without {span} images" in finding.what
        assert f"n01440764 ({number})" in finding.what


def test_counts_against_the_release():
    report = DatasetReport("imagenet", num_train=1_281_167, num_val=50_001, num_classes=1000)
    compare_counts(report, facts("imagenet"), "fix it")
    assert [f.what for f in report.findings] == [
        "val has 50,001 images, 1 more than the 50,000 of ImageNet-1K (ILSVRC 2012)"
    ]
    known, keys = expected_of("imagenet22k", 21_841)
    held_out = DatasetReport("imagenet22k", num_train=14_126_000, num_val=71_122, num_classes=21_841)
    compare_counts(held_out, known, "fix it")
    assert held_out.findings == []
    assert len(keys) == 21_841
    assert expected_of("imagenet22k", 19_167)[0].num_train_images == 13_153_500


def test_released_files(tmp_path, monkeypatch):
    folder = tmp_path / "svhn"
    folder.mkdir()
    content = b"not really a MATLAB file"
    (folder / "train_32x32.mat").write_bytes(content)
    (folder / "test_32x32.mat").write_bytes(content)
    (report,) = examine(tmp_path, checksums=False)
    sizes = [finding for finding in report.findings if "the released one 182,040,794" in finding.what]
    assert [finding.level for finding in sizes] == ["warning"]

    def released(checksum) -> Archive:
        return Archive("train_32x32.mat", "images", len(content), "md5", checksum, "a published place")

    for checksum, level in ((hashlib.md5(content).hexdigest(), "note"), ("0" * 32, "error"), (None, "note")):
        own = replace(facts("svhn"), archives=(released(checksum),), parts=())
        monkeypatch.setattr(expectations, "facts", lambda name, own=own: own)
        said = []
        report = DatasetReport("svhn")
        expectations.compare_archives(report, folder, checksums=True, say=said.append)
        assert [finding.level for finding in report.findings] == [level]
        assert len(said) == (checksum is not None)


def test_images_of_coco_and_ade20k_are_checked(raw_copy):
    victim = next((raw_copy / "coco" / "train2017").iterdir())
    with Image.open(victim) as picture:
        picture.resize((10, 10)).save(victim)
    assert victim.name in only_error(raw_copy, "coco").what
    (raw_copy / "ade20k" / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    assert "ADE_train_00000001.png" in only_error(raw_copy, "ade20k").what


def test_a_folder_that_vanishes(raw_copy, monkeypatch):
    def vanish(root, dataset, known):
        raise FileNotFoundError(2, "No such file or directory", str(root / "gone"))

    monkeypatch.setattr("vitpipe.prepare.dataset_doctor.find_source", vanish)
    error = only_error(raw_copy, "imagenet")
    assert "No such file" in error.what
    assert error.where.endswith("gone")


def test_a_prepared_folder(prepared):
    before = snapshot(prepared)
    reports = examine(prepared, checksums=True)
    assert [report.dataset for report in reports] == SETS
    assert [(report.num_train, report.num_val) for report in reports] == [
        (30, 50), (50, 50), (6, 4), (6, 4), (3, 3),
    ]  # fmt: skip
    assert not any(of_level(report, "error") for report in reports)
    assert all(any("match" in note.what for note in report.findings) for report in reports)
    assert snapshot(prepared) == before


def test_damage_in_a_prepared_folder(prepared_copy):
    shard = next((prepared_copy / "imagenet").glob("train-*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    assert shard.name in only_error(prepared_copy, "imagenet", checksums=True).what
    assert not of_level(examine(prepared_copy, ["imagenet"])[0], "error"), "sizes are right"
    shard.write_bytes(content[:-1])
    assert only_error(prepared_copy, "imagenet").where.endswith(shard.name)

    archive = prepared_copy / "davis" / "davis.tar"
    content = bytearray(archive.read_bytes())
    content[600] ^= 1
    archive.write_bytes(content)
    assert "checksum" in only_error(prepared_copy, "davis", checksums=True).what
    archive.unlink()
    assert "missing" in only_error(prepared_copy, "davis").what

    whole = read_manifest(prepared_copy, DataManifest)
    changed = whole.model_copy(update={"sets": {**whole.sets, "coco": "0" * 64}})
    write_manifest(prepared_copy, changed)
    assert "digests" in only_error(prepared_copy, "coco").what
    shutil.rmtree(prepared_copy / "ade20k")
    assert "'ade20k' is not in the prepared data" in only_error(prepared_copy, "ade20k").what


def test_a_folder_of_the_users_own(raw_copy):
    (raw_copy / "imagenet").rename(raw_copy / "birds")
    (report,) = examine(raw_copy, ["birds"])
    assert (report.num_train, report.num_val, report.num_classes) == (30, 50, 10)
    assert not of_level(report, "warning"), "nothing is published about it"
    with pytest.raises(DatasetError, match="no dataset 'birdz'"):
        examine(raw_copy, ["birdz"])


def test_a_name_that_no_terminal_can_show(raw_copy):
    """Half of a surrogate pair is valid JSON, and no encoding has it."""
    path = raw_copy / "coco" / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = "\ud800.jpg"
    path.write_text(json.dumps(content))
    command = [sys.executable, "-m", "vitpipe", "doctor", "--data", str(raw_copy), "--dataset", "coco"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "1 file is missing: \\ud800.jpg" in " ".join(done.stdout.split())
