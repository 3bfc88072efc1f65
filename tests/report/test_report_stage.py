"""Stage `report`: folders in, page out, summary to the tracker."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.config.recorded import recorded_values
from vitpipe.contracts.artifact import open_artifact, write_card, write_metrics
from vitpipe.contracts.errors import ArtifactError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.stages.context import StageContext
from vitpipe.stages.report.stage import report_of_folders, results_of_folder, run, verdicts_of_folders
from vitpipe.track.journal import JournalReader
from vitpipe.track.stage_run import stage_run


def _context(results, folder, logger):
    return StageContext(
        "report",
        results.recipe,
        dict(results.artifacts),
        folder,
        folder.parent / "state",
        logger,
    )


def test_the_stage_writes_the_page_and_tells_where_it_is(demo_run, tmp_path):
    folder, logger = tmp_path / ".report.partial", MemoryLogger()
    folder.mkdir()
    metrics = run(_context(demo_run, folder, logger))
    assert metrics["num_expected"] == 5
    assert {p.name for p in folder.iterdir()} == {
        "report.html",
        "report.md",
        "recipe.json",
        "verdict.md",
        "figures",
        "tables",
    }
    assert len(logger.tables["verdict"]) == 5
    assert "curves_pretrain" in logger.figures
    assert logger.lines[-1] == f"Report: {tmp_path / 'report' / 'report.html'}"
    assert any("not comparable" in line for line in logger.lines)


def test_the_command_that_shows_the_verdict_names_the_run(demo_run, tmp_path):
    """The folder of a local run is not what `vitpipe verdict` takes by itself."""
    run_place = next(iter(demo_run.artifacts.values())).path.parent
    for place, shown in ((run_place, f"`vitpipe verdict {run_place}` shows the table"), (tmp_path, "")):
        folder, logger = place / ".shown.partial", MemoryLogger()
        folder.mkdir()
        run(_context(demo_run, folder, logger))
        said = " ".join(logger.lines)
        # Where the stages lie in different folders, as in a pod, no command shows them.
        assert (shown in said) if shown else ("vitpipe verdict" not in said)


def test_the_pipeline_s_run_gets_the_summary(demo_run, tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_TRACKING", "off")
    folder, state = tmp_path / "out", tmp_path / ".out.state"
    folder.mkdir()
    with stage_run(stage="report", recipe=demo_run.recipe, folder=folder, state=state) as logger:
        run(_context(demo_run, folder, logger))
    ledger = JournalReader(state / "track" / "journal.jsonl").refresh()
    (summary,) = ledger.summaries
    assert summary.metrics["detect/box_AP"] == demo_run.artifacts["detect"].metrics["box_AP"]
    assert summary.metrics["pretrain/wall_seconds"] == pytest.approx(71.3)
    assert summary.tags["vitpipe.run.probe"] == "f" * 32
    assert "not comparable" in summary.tags["mlflow.note.content"]
    handed = {file.path for file in ledger.files if file.target == "pipeline"}
    pictures = {name for name in handed if name.startswith("figures/")}
    assert handed - pictures == {"tables/verdict.json", "tables/reference.json", "report.html", "report.md"}
    assert {"figures/curves_pretrain.png", "figures/times.png"} <= pictures


def test_folders_without_a_report_have_the_values_that_their_stages_recorded(make_run, demo_run, tmp_path):
    """Each stage knows its own; what belongs to none is told by the one that ran last."""
    made = make_run(tmp_path / "run", demo_run.recipe)
    # A head of its own: options of another one must not come back from the recipe's file.
    set_by_hand = {
        "pretrain": ("10:01", ["data.embedded.train_images=160", "pretrain.epochs=1.5", "finetune.epochs=9"]),
        "segment": ("10:02", ["segment.head={name: semantic_fpn, width: 16}"]),
        "finetune": ("10:03", ["data.embedded.val_images=60", "detect.head.width=32", "seed=4"]),
    }
    for name, artifact in made.artifacts.items():
        at, changes = set_by_hand.get(name, ("09:00", []))
        values = recorded_values(load_recipe("itpn/pixel_base", "demo", changes))
        record = artifact.run.model_copy(update={"started_at": f"2026-11-20T{at}:00+00:00", "values": values})
        write_card(artifact.path, artifact.card, record)
    recipe = results_of_folder(tmp_path / "run").recipe
    assert recipe.pretrain.epochs == 1.5
    assert recipe.segment.head.name == "semantic_fpn"
    assert recipe.finetune.epochs == demo_run.recipe.finetune.epochs
    assert recipe.detect.head.width == demo_run.recipe.detect.head.width
    assert (recipe.data.embedded.val_images, recipe.seed) == (60, 4)
    assert recipe.data.embedded.train_images == demo_run.recipe.data.embedded.train_images
    assert recipe.expect == demo_run.recipe.expect


def test_finished_folders_are_reported_with_the_recipe_that_the_stage_kept(seed_runs, tmp_path):
    results = seed_runs[2]
    root = results.artifacts["probe"].path.parent
    folder = root / "report"
    folder.mkdir()
    write_metrics(folder, run(_context(results, folder, MemoryLogger())))
    card = open_artifact(root / "probe", "probe").card
    write_card(folder, card.model_copy(update={"stage": "report"}))
    page = report_of_folders([root], tmp_path / "page")
    text = page.read_text(encoding="utf-8")
    assert "<dt>seed</dt><dd>2</dd>" in text
    assert "8 of 8" in text
    assert any("top-1 accuracy" in line for line in verdicts_of_folders([root]))


def test_folders_without_a_report_are_read_by_their_cards(demo_run, tmp_path):
    root = demo_run.artifacts["probe"].path.parent
    assert report_of_folders([root], tmp_path / "page").is_file()
    assert results_of_folder(root).recipe.pretrain.epochs == demo_run.recipe.pretrain.epochs
    with pytest.raises(ArtifactError, match="no finished stage"):
        report_of_folders([tmp_path], tmp_path / "page")
