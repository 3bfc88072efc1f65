"""The report's data section: one row per set with form, counts, odd images, encoding, digest, revision."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from vitpipe.config.data import DataConfig
from vitpipe.contracts.artifact import open_artifact, write_card, write_metrics, write_table
from vitpipe.report.data_lineage import lineage_facts, lineage_notes, lineage_table, terms_table
from vitpipe.report.results import RunResults
from vitpipe.report.write_report import build_report

DIGEST = "ab12" * 16


def split_row(dataset, split, num_images, size_bytes, num_classes):
    return {
        "dataset": dataset, "split": split, "num_images": num_images, "num_annotations": num_images,
        "num_classes": num_classes, "num_files": 2, "size_bytes": size_bytes, "digest": DIGEST,
    }  # fmt: skip


def source_row(dataset, form, encoding="as in the source", notes="", **revision):
    return {
        "dataset": dataset, "form": form, "encoding": encoding, "kept_in": "the prepared folder",
        "notes": notes, "digest": DIGEST, **revision,
    }  # fmt: skip


SPLITS = [
    split_row("imagenet", "train", 1_281_167, 147_000_000_000, 1000),
    split_row("imagenet", "val", 50_000, 6_700_000_000, 1000),
    split_row("coco", "train", 118_287, 20_000_000_000, 80),
    split_row("coco", "val", 5_000, 20_000_000_000, 80),
]
SOURCES = [
    source_row("imagenet", "the original tars and devkit", "short side at most 256 (bicubic), jpeg 95",
               "class order of the devkit | sorted", dvc_revision="v2", git_commit="0123abcd"),
    source_row("coco", "folders", dvc_revision="v2", git_commit="0123abcd"),
]  # fmt: skip
FINDINGS = (
    "split,file,finding,treatment\n"
    "train,a.JPEG,CMYK,kept\ntrain,b.JPEG,CMYK,kept\ntrain,c.JPEG,palette,kept\n"
    'val,d.JPEG,"image file is truncated, 3 bytes",left out\nval,e.png,more than 8 bits per value,converted\n'
)


@pytest.fixture
def make_run(full_run, tmp_path):
    """Makes a run of a prepare stage alone, with the tables given."""

    def make(recipe=full_run.recipe, findings=FINDINGS, **tables):
        folder = tmp_path / "prepare"
        (folder / "imagenet").mkdir(parents=True)
        for name, rows in tables.items():
            write_table(folder, name, rows)
        if findings:
            (folder / "imagenet" / "findings.csv").write_text(findings, encoding="utf-8")
        write_metrics(folder, {"num_bytes": 1.0})
        finished = full_run.artifacts["prepare"]
        write_card(folder, finished.card, finished.run)
        return RunResults(recipe, {"prepare": open_artifact(folder, "prepare")})

    return make


def as_rows(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_one_row_per_set(make_run):
    imagenet, coco = as_rows(lineage_table(make_run(splits=SPLITS, sources=SOURCES)))
    assert imagenet == {
        "dataset": "imagenet", "source format": "the original tars and devkit", "train": "1,281,167", "val": "50,000",
        "classes": "1,000", "size": "153.7 GB",
        "irregular images": "1 left out; 1 converted (1 more than 8 bits per value); 3 kept (2 CMYK, 1 palette)",
        "encoding": "short side at most 256 (bicubic), jpeg 95", "stored in": "the prepared folder", "digest": DIGEST[:12],
    }  # fmt: skip
    assert coco["size"] == "20.0 GB", "the one folder of a dense set is not counted twice"
    assert coco["irregular images"] == "—"


def test_without_odd_images(make_run):
    table = lineage_table(make_run(splits=SPLITS, sources=SOURCES, findings="split,file,finding,treatment\n"))
    assert as_rows(table)[0]["irregular images"] == "none"


def test_the_shorter_table_serves_where_the_list_is_not_there(make_run):
    rows = [
        {"dataset": "imagenet", "split": "val", "file": "x", "finding": "empty file", "treatment": "left out"}
    ]
    run = make_run(splits=SPLITS, sources=SOURCES, findings="")
    write_table(run.artifacts["prepare"].path, "findings", rows)
    assert as_rows(lineage_table(run))[0]["irregular images"] == "1 left out"


def test_older_runs_without_sources_still_have_a_table(make_run):
    splits = [{"dataset": "imagenet", "split": "train", "num_images": 2000, "num_bytes": 9_000_000}]
    table = lineage_table(make_run(splits=splits, findings=""))
    assert as_rows(table) == [
        {"dataset": "imagenet", "train": "2,000", "size": "9.0 MB", "irregular images": "none"}
    ]


def test_facts_name_source_digest_and_revisions(make_run):
    run = make_run(splits=SPLITS, sources=SOURCES)
    found = dict(lineage_facts(run))
    assert found["source"] == "folders"
    assert found["digest"] == "da" * 6
    assert found["dvc revision"] == "v2"
    assert found["git commit"] == "0123abcd"
    assert found["code"] == "git 0123456789ab with uncommitted changes"
    assert lineage_notes(run) == ["imagenet: class order of the devkit | sorted"]


def test_a_pinned_revision_is_named(make_run, full_run):
    pinned = {"repo": "git@host:data.git", "revision": "v3.1", "path": "prepared/imagenet"}
    recipe = full_run.recipe.model_copy(update={"data": DataConfig(source="pinned", pinned=pinned)})
    found = dict(lineage_facts(make_run(recipe, splits=SPLITS)))
    assert found["pinned revision"] == "prepared/imagenet at v3.1 of git@host:data.git"
    assert found["source"] == "pinned"


def test_terms_of_real_sets_only(make_run, demo_run):
    rows = as_rows(terms_table(make_run(splits=SPLITS)))
    assert rows[0]["dataset"] == "ImageNet-1K (ILSVRC 2012)"
    assert "non-commercial" in rows[0]["licence"]
    assert rows[1]["citation"].endswith("ECCV, 2014")
    assert terms_table(demo_run) is None


def test_without_a_prepare_stage_there_is_nothing(full_run):
    empty = RunResults(full_run.recipe, {"probe": full_run.artifacts["probe"]})
    assert lineage_table(empty) is None
    assert lineage_facts(empty) == []
    assert lineage_notes(empty) == []
    assert terms_table(empty) is None


def test_page_and_markdown_show_it(make_run, tmp_path):
    run = make_run(splits=SPLITS, sources=SOURCES)
    Image.new("RGB", (40, 20), "red").save(run.artifacts["prepare"].path / "imagenet" / "near_duplicates.png")
    report = build_report([run], tmp_path / "out")
    page, text = report.html.read_text(encoding="utf-8"), report.markdown.read_text(encoding="utf-8")
    for part in (
        "the original tars and devkit",
        "2 CMYK, 1 palette",
        "short side at most 256",
        DIGEST[:12],
        "dvc revision",
    ):
        assert part in page
        assert part in text
    assert "near duplicates of imagenet: validation (left), training (right)" in page
    assert page.count("data:image/png") == 1
    assert f'<code title="{"da" * 32}">{"da" * 6}</code>' in page
    section = text.split("## Data")[1].split("## Protocol")[0]
    assert "\n\n\n" not in section
    assert re.search(r"^\| imagenet \| the original tars and devkit \|", section, re.MULTILINE)
    assert "Learning" not in section


def test_markup_in_forms_is_escaped(make_run, tmp_path):
    sources = [source_row("imagenet", "<b>folders</b>"), source_row("coco", "folders")]
    page = build_report([make_run(splits=SPLITS, sources=sources)], tmp_path / "out").html.read_text(
        encoding="utf-8"
    )
    assert "<b>folders</b>" not in page
    assert "&lt;b&gt;folders" in page
