"""Stage `report`: the page of this run, the verdict, and the summary in the pipeline's MLflow run."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vitpipe.config.read import run_folder
from vitpipe.config.recipe import Recipe
from vitpipe.config.run_name import run_title
from vitpipe.contracts.artifact import CARD
from vitpipe.contracts.errors import ArtifactError, RecipeError
from vitpipe.contracts.files import write_whole
from vitpipe.report.compare import verdict_rows, verdicts_of
from vitpipe.report.reference import comparison_of
from vitpipe.report.reference_table import reference_rows
from vitpipe.report.results import RunResults, open_results
from vitpipe.report.write_report import Report, build_report, verdict_lines
from vitpipe.stages.context import StageContext
from vitpipe.stages.offered_model import cards_with_verdicts
from vitpipe.stages.output_folders import check_result_folder
from vitpipe.stages.recorded_recipe import mismatches_of, recipe_of_cards
from vitpipe.track.summary import log_pipeline_summary

RECIPE_FILE, VERDICT_FILE = "recipe.json", "verdict.md"
_LOG_WIDTH = 110  # columns of the verdict table in a log, which has no width of its own


def run(ctx: StageContext) -> dict[str, float]:
    """Write `report.html`, `report.md`, `verdict.md`, `recipe.json`, `figures/` and the table `verdict`.

    Returns:
        `num_expected`, and how many verdicts there are of each kind: `num_reproduced`, ...; beside recorded
        results `num_reference`, `num_reference_reproduced`, ...

    Raises:
        RecipeError: when an expectation does not select exactly one published row.
        InputError: when the recorded results of a demo cannot be read.
    """
    artifacts = {artifact.card.stage: artifact for artifact in ctx.inputs.values()}
    results = _with_mismatches(RunResults(ctx.recipe, artifacts))
    (ctx.folder / RECIPE_FILE).write_text(ctx.recipe.model_dump_json(indent=2) + "\n", encoding="utf-8")
    report = build_report([results], ctx.folder)
    write_whole(ctx.folder / VERDICT_FILE, f"# {run_title(ctx.recipe)}\n\n{report.note}\n")
    rows, references = verdict_rows(report.verdicts), reference_rows(report.comparisons)
    ctx.logger.table("verdict", rows)
    ctx.logger.table("reference", references)
    for path in report.figures.values():
        ctx.logger.figure(path.stem, path)
    log_pipeline_summary(
        ctx.logger,
        results.artifacts,
        verdicts=rows,
        references=references,
        files={
            **{file.name: file for file in (report.html, report.markdown)},
            **{f"figures/{path.name}": path for path in report.figures.values()},
        },
        cards=cards_with_verdicts(results, report.verdicts),
        note=report.note,
    )
    _print_summary(ctx, report)
    return report.metrics


def report_of_folders(folders: Sequence[Path], out: Path) -> Path:
    """The page of one or many finished runs (`vitpipe report`).

    Args:
        folders: `artifacts/RECIPE/PROFILE` each.
        out: folder to write into.

    Returns:
        Path of the HTML page.

    Raises:
        ArtifactError: when a folder holds no finished stage.
        RecipeError: when the recipe of a run cannot be read any more.
    """
    real_out = check_result_folder("--out", out)
    return build_report([results_of_folder(folder) for folder in folders], real_out).html


def verdicts_of_folders(folders: Sequence[Path]) -> list[str]:
    """The verdict tables of finished runs as lines for the terminal (`vitpipe verdict`). Raises as above."""
    runs = [results_of_folder(folder) for folder in folders]
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else _LOG_WIDTH
    return verdict_lines(runs, width=width, colour=is_terminal)


def verdict_values_of_folders(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The verdicts of finished runs as plain values (`vitpipe verdict --json`). Raises as above."""
    runs = [results_of_folder(folder) for folder in folders]
    comparisons = [comparison_of(run) for run in runs]
    return [
        {
            "folder": str(folder),
            "recipe": run.recipe.name,
            "profile": run.recipe.profile,
            "seed": run.recipe.seed,
            "published": verdict_rows(verdicts_of(run)),
            # Nothing is recorded at this profile: no rows, and nothing is missing.
            "reference": reference_rows([found]),
            "reference_missing": found.missing if found else "",
        }
        for folder, run, found in zip(folders, runs, comparisons, strict=True)
    ]


def results_of_folder(folder: Path) -> RunResults:
    """A finished run with the recipe that its report stage kept, or else that its cards and records say.

    Raises:
        ArtifactError: when no stage is finished there.
        RecipeError: when the recipe of the run cannot be read any more.
    """
    kept = folder / "report" / RECIPE_FILE
    if kept.is_file():
        try:
            recipe = Recipe.model_validate_json(kept.read_bytes())
        except ValidationError as error:
            raise RecipeError(
                f"This version cannot read the recipe that the run kept ({error.errors()[0]['msg']})",
                where=kept,
                fix="run the stage report again (`dvc repro report`)",
            ) from error
        return _with_mismatches(open_results(recipe, folder))
    if (recorded := recipe_of_cards(folder)) is not None:
        return _with_mismatches(open_results(recorded, folder))
    if (folder / CARD).is_file():
        raise ArtifactError(
            "This is the output of one stage, not the folder of a run",
            where=folder,
            fix=f"give the folder above it: {folder.parent}",
        )
    raise ArtifactError(
        "There is no finished stage in this folder",
        where=folder,
        fix="give the folder of a run, for example artifacts/itpn/pixel_base/demo",
    )


def _with_mismatches(run: RunResults) -> RunResults:
    return dataclasses.replace(run, mismatches=mismatches_of(run))


def _print_summary(ctx: StageContext, report: Report) -> None:
    # The folder is renamed from `.report.partial` to `report` when the stage has finished.
    name = ctx.folder.name.removeprefix(".").removesuffix(".partial")
    ctx.logger.say(" ".join(filter(None, (report.summary, _where_table_is(ctx)))))
    for comparison in report.comparisons:
        if comparison is not None and comparison.missing:
            ctx.logger.say(comparison.missing)
    ctx.logger.say(f"Report: {ctx.folder.parent / name / report.html.name}")


def _where_table_is(ctx: StageContext) -> str:
    """The command that shows the verdict; empty where the stages' outputs lie in different folders."""
    run = ctx.folder.parent.resolve()
    if any(artifact.path.resolve().parent != run for artifact in ctx.inputs.values()):
        return ""
    is_usual = False
    with suppress(RecipeError):  # a recipe of a path that leads out of the folder of all runs
        is_usual = run == run_folder(ctx.recipe.name, ctx.recipe.profile).resolve()
    command = "`vitpipe verdict`" if is_usual else f"`vitpipe verdict {shlex.quote(str(run))}`"
    return f"{command} shows the table"
