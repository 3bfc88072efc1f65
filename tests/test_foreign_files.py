"""Verbs that write files at a place that people name: what is there already and is not ours stays."""

from __future__ import annotations

import pytest

from pipelines.compile import compile_pipeline
from pipelines.dvc import write_dvc
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Card, write_card, write_metrics, writing
from vitpipe.contracts.errors import VitpipeError
from vitpipe.contracts.graph import graph_of
from vitpipe.models.convert import convert
from vitpipe.prepare.examine_parallel import PackOptions
from vitpipe.prepare.pack import _open_scratch
from vitpipe.report.figures import save_png
from vitpipe.report.write_report import build_report
from vitpipe.stages.identity import write_identities
from vitpipe.verbs.benchmark_networks import check_figure

RECIPE = "itpn/pixel_base"


def card():
    """Any card."""
    return Card(
        stage="report", recipe="r", profile="demo", recipe_digest="a", data_digest="b", code_digest="c", image="train",
        identity="d", parents={}, seed=0, libraries={},
    )  # fmt: skip


def report(folder):
    """Write a report; whether there is a run is looked at first, so the runs are a stand-in."""
    build_report([object()], folder)


def writes_dvc(path):
    write_dvc(graph_of(load_recipe(RECIPE, "demo").stages), path)


def compiles(path):
    compile_pipeline(RECIPE, "demo", (), path)


def identities(path):
    write_identities(load_recipe(RECIPE, "demo"), path.parent)


def converts(path):
    convert(path.parent / "source.pth", path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (writes_dvc, "dvc.yaml"),
        (compiles, "params.yaml"),
        (identities, "prepare.json"),
        (converts, "source.pth"),
        (converts, "other.pth"),
        (lambda path: report(path.parent), "report.html"),
        (lambda path: report(path.parent), "report.md"),
        (lambda path: report(path.parent), "figures"),
    ],
    ids=["dvc", "compile", "identity", "convert-source", "convert-other", "page", "markdown", "figures"],
)
def test_what_is_not_ours_stays(tmp_path, write, name):
    (tmp_path / "source.pth").write_bytes(b"weights")
    (tmp_path / name).write_text("stages: {mine: {cmd: echo}}\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(VitpipeError) as caught:
        write(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_convert_knows_its_source_under_another_name(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"weights")
    for link in ("soft", "hard"):
        path = tmp_path / f"{link}.safetensors"
        path.symlink_to(tmp_path / "a.pth") if link == "soft" else path.hardlink_to(tmp_path / "a.pth")
        with pytest.raises(VitpipeError, match="replace their source"):
            convert(tmp_path / "a.pth", path)
    assert (tmp_path / "a.pth").read_bytes() == b"weights"


def test_a_report_is_not_written_into_a_finished_output(tmp_path):
    with writing(tmp_path / "report") as folder:
        write_metrics(folder, {})
        write_card(folder, card())
    with pytest.raises(VitpipeError, match="would replace"):
        report(tmp_path / "report")


def test_our_own_are_written_again(tmp_path):
    for _ in range(2):
        writes_dvc(tmp_path / "dvc.yaml")
        identities(tmp_path / "prepare.json")
    (tmp_path / "dvc.yaml").write_text(
        "# Written by `vitpipe compile --dvc` of an earlier version\nstages: {}\n"
    )
    writes_dvc(tmp_path / "dvc.yaml")


@pytest.mark.parametrize("mark", [None, "of other options"])
def test_half_packed_shards_are_moved_aside(tmp_path, mark):
    scratch = tmp_path / "pack"
    scratch.mkdir()
    (scratch / "train-000000.tar").write_bytes(b"hours of work")
    if mark:
        (scratch / "options").write_text(mark)
    _open_scratch(scratch, PackOptions(1000))
    (aside,) = tmp_path.glob("pack.aside-*")
    assert (aside / "train-000000.tar").read_bytes() == b"hours of work"
    assert [path.name for path in scratch.iterdir()] == ["options"]
    _open_scratch(scratch, PackOptions(1000))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["report.md", "tables/verdict.csv", "figures/times.png"])
def test_one_page_of_ours_does_not_make_the_others_ours(tmp_path, name):
    (tmp_path / "report.html").write_text('<meta name="generator" content="vitpipe 0.1">')
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(VitpipeError, match=name):
        report(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_report_writes_through_no_link(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "figures").symlink_to(tmp_path / "mine")
    with pytest.raises(VitpipeError, match="figures"):
        report(tmp_path / "out")
    assert not any((tmp_path / "mine").iterdir())


def test_a_figure_replaces_figures_of_ours_only(tmp_path):
    from matplotlib.figure import Figure

    ours, mine = tmp_path / "ours.png", tmp_path / "mine.png"
    save_png(Figure(), ours)
    Figure().savefig(mine)
    check_figure(ours)
    check_figure(tmp_path / "new.png")
    (tmp_path / "text.png").write_text("mine")
    for path in (mine, tmp_path / "text.png"):
        with pytest.raises(VitpipeError, match="no figure of vitpipe"):
            check_figure(path)
