"""`vitpipe models` and `cost`: every number with its unit, the same figure written the same way."""

import dataclasses
import json

import pytest
import typer
from typer.testing import CliRunner

from vitpipe.config.model import entries
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import format_billions, format_millions
from vitpipe.report.result_tables import show as shown_in_report
from vitpipe.verbs import models, show


@pytest.fixture
def run():
    app = typer.Typer()
    models.register(app)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize("width", [80, 160])
def test_the_list_is_the_same_on_narrow_and_wide_terminals(run, monkeypatch, width):
    monkeypatch.setattr(show, "_PIPE_WIDTH", width)
    output = run("models").output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    rows = {row[0]: row for row in cells if row[0]}
    assert rows.keys() == entries().keys()
    for name, entry in entries().items():
        stated = "" if entry.published_params is None else f"{entry.published_params:,g} M"
        params, macs = format_millions(entry.classifier_params), format_billions(entry.classifier_macs)
        assert rows[name][1:5] == [params, stated, macs, f"{entry.image_size} px"]
        assert entry.paper.split(" (")[0] in output
    assert "…" not in output


def test_json_is_complete(run):
    assert json.loads(run("models", "--json").output) == [
        dataclasses.asdict(entry) for entry in entries().values()
    ]


def test_the_same_figures_in_list_cost_and_report(run):
    entry = entries()["hivit_nano"]
    listed = next(line for line in run("models").output.splitlines() if "│ hivit_nano" in line)
    output = run("cost", "hivit_nano").output
    assert "one image of 64 x 64 pixels" in output
    for text in (format_millions(entry.classifier_params), format_billions(entry.classifier_macs)):
        assert f" {text} " in listed
        assert f" {text} " in output
    assert shown_in_report("params", entry.classifier_params) == "0.29 M"
    assert shown_in_report("gmacs", entry.classifier_macs / 1e9) == "0.00459 G"
    rows = {row["name"]: row["value"] for row in json.loads(run("cost", "hivit_nano", "--json").output)}
    assert rows["params"] == entry.classifier_params
    assert rows["macs"] == entry.classifier_macs


@pytest.mark.dense
def test_a_recipe_s_detector_or_segmentor_has_a_cost_too(run):
    output = run("cost", "paca/coco/tiny", "--stage", "detect", "--image-size", "160x128").output
    assert "paca/coco/tiny, one image of 160 x 128 pixels" in output
    assert "31.97 M" in output
    assert "80 classes; counted: backbone, neck, RPN head, box head on 1,000 boxes" in " ".join(
        output.split()
    )
    cell = ("cost", "paca/ade20k/tiny/paca", "--stage", "segment", "--image-size", "64", "--json")
    rows = {row["name"]: row["value"] for row in json.loads(run(*cell, "--classes", "7").output)}
    fewer = {row["name"]: row["value"] for row in json.loads(run(*cell, "--classes", "6").output)}
    # Classes are clusters of PaCa's head, too: two maps of 256 channels with a bias lose a row each.
    assert rows["params"] - fewer["params"] == 2 * 257


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hivit_nano", "--image-size", "448x224"), "takes square images only"),
        (("paca_tiny", "--image-size", "0x10"), "no image size"),
        (("paca/coco/tiny", "--stage", "finetune"), "no stage whose network can be counted"),
    ],
)
def test_wrong_sizes_and_stages_are_refused(run, words, said):
    with pytest.raises(InputError, match=said):
        run("cost", *words)


def test_an_image_need_not_be_square(run):
    square, wide = (
        json.loads(run("cost", "paca_nano", "--image-size", size, "--json").output)
        for size in ("64", "128x64")
    )
    macs = [next(row["value"] for row in found if row["name"] == "macs") for found in (square, wide)]
    assert 1.9 < macs[1] / macs[0] < 2.1
