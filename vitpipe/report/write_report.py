"""Write the report of one or many runs: `report.html`, `report.md`, `figures/*.png`, `tables/verdict.csv`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitpipe.contracts.artifact import TABLES, is_being_written, is_marked, write_table
from vitpipe.contracts.errors import ArtifactError, disk_errors, some
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.contracts.units import format_duration
from vitpipe.data.image_grid import optional_figure
from vitpipe.report import figures
from vitpipe.report.compare import (
    Judgement,
    Verdict,
    counts_of,
    reasons_by_row,
    verdict_rows,
    verdicts_of,
)
from vitpipe.report.page import signed, verdict_markdown, write_markdown, write_page
from vitpipe.report.reference import ReferenceComparison, comparison_of, counts_by_reference
from vitpipe.report.reference_table import (
    COLUMNS,
    NUMERIC,
    notes_of,
    provenance,
    reference_cells,
    reference_markdown,
    reference_rows,
)
from vitpipe.report.result_tables import in_unit
from vitpipe.report.results import TOTAL_TIME, RunResults
from vitpipe.report.run_labels import labels
from vitpipe.report.run_views import stage_panels
from vitpipe.report.verdict_summary import summaries_of

PAGE, TEXT, FIGURES = "report.html", "report.md", "figures"
_CSV_TABLES = (f"{TABLES}/verdict.csv", f"{TABLES}/reference.csv")
# By which the files of an earlier report are recognised; the tables by their columns, see `verdict_rows` and
# `reference_rows`.
_MARKS = {
    PAGE: '<meta name="generator" content="vitpipe',
    TEXT: "<!-- written by vitpipe report -->",
    "verdict.csv": "stage,metric,published_as,ours,published,",
    "reference.csv": "recipe,stage,metric,ours,unit,reference_mean,",
}
# No red: `above` and `below` do not mean good and bad.
COLOURS: dict[Judgement, str] = {
    "reproduced": "green",
    "within noise": "cyan",
    "above": "blue",
    "below": "yellow",
    "not comparable": "bright_black",
}


@dataclass(frozen=True)
class Report:
    """The written files and a summary.

    Attributes:
        figures: title -> PNG.
        comparisons: of each run with its recorded results; None at profiles that have none.
        metrics: `num_expected`, `num_reproduced`, ..., `num_reference_reproduced`, ... over all runs.
        note: the verdict tables in Markdown.
        summary: all verdicts in one sentence.
    """

    html: Path
    markdown: Path
    figures: dict[str, Path]
    verdicts: list[Verdict]
    comparisons: list[ReferenceComparison | None]
    metrics: dict[str, float]
    note: str
    summary: str


def build_report(runs: Sequence[RunResults], out: Path) -> Report:
    """Write the report into `out`.

    Args:
        runs: one run, or several (recipes, seeds) to compare.

    Raises:
        ArtifactError: when `runs` is empty, or `out` contains files of these names that are not a report.
        RecipeError: when an expectation does not select exactly one published row.
        InputError: when the recorded results of a demo cannot be read.
        StorageError: when the disk refuses a write.
    """
    if not runs:
        raise ArtifactError(
            "There is no run to report on", where=out, fix="give the folder of at least one run"
        )
    _refuse_foreign_files(out)
    every = [verdict for run in runs for verdict in verdicts_of(run)]
    comparisons = [comparison_of(run) for run in runs]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        undrawn: list[str] = []
        pictures = _write_figures(runs, out / FIGURES, undrawn.append)
        html = write_page(runs, out / PAGE)
        text = write_markdown(runs, out / TEXT, pictures, undrawn)
        names = labels(runs) if len(runs) > 1 else None
        write_table(out, "verdict", _named([verdict_rows(verdicts_of(run)) for run in runs], names))
        write_table(out, "reference", _named([reference_rows([found]) for found in comparisons], names))
    counts = counts_of(every) | counts_by_reference(comparisons)
    notes = [reference_markdown(found) for found in comparisons if found is not None]
    said = " ".join(_sentences(runs))
    note = "\n\n".join([said, *notes, verdict_markdown(every)])
    return Report(html, text, pictures, every, comparisons, counts, note, said)


def _named(
    rows_of_runs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The rows of all runs; of several runs, each with the name of its run."""
    if names is None:
        return [dict(row) for rows in rows_of_runs for row in rows]
    # Last, because a report's tables are recognised by their first columns.
    return [{**row, "run": name} for name, rows in zip(names, rows_of_runs, strict=True) for row in rows]


def _refuse_foreign_files(out: Path) -> None:
    """Overwrite nothing but an earlier report: no output of a stage, no other files of these names."""
    if is_being_written(out):  # the partial folder of the stage `report`
        return
    foreign = [name for name in (PAGE, TEXT, *_CSV_TABLES) if not _is_absent_or_ours(out / name)]
    if (out / FIGURES).exists() or (out / FIGURES).is_symlink():
        foreign += _foreign_figures(out / FIGURES)
    if out.is_file() or is_marked(out) or foreign:
        raise ArtifactError(
            "The report would replace files that are not an earlier report"
            + (f" ({some(foreign)})" if foreign else ""),
            where=out,
            fix="choose another --out folder; nothing was written",
        )


def _is_absent_or_ours(file: Path) -> bool:
    """Each file by itself: somebody may have moved one page of ours into a folder of their own."""
    if file.is_symlink() or file.parent.is_symlink():
        return False  # the target would be overwritten
    if not file.exists():
        return True
    return file.is_file() and _MARKS[file.name] in file.read_text(encoding="utf-8", errors="replace")


def _foreign_figures(folder: Path) -> list[str]:
    if folder.is_symlink() or not folder.is_dir():
        return [FIGURES]
    return [f"{FIGURES}/{file.name}" for file in sorted(folder.iterdir()) if not figures.is_own_png(file)]


def verdict_lines(runs: Sequence[RunResults], *, width: int = 110, colour: bool = False) -> list[str]:
    """The verdict tables as lines of text.

    Args:
        width: columns of the terminal.
        colour: use ANSI escape sequences.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Rendered into text, because a stage writes the lines to its logger and a verb to the terminal.
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    for sentence in _sentences(runs):
        console.print(sentence, markup=False)
    for label, run in zip(labels(runs), runs, strict=True):
        if (found := comparison_of(run)) is not None:
            if found.reference is not None:
                console.print(_reference_table(label, found))
            for note in notes_of(found):
                console.print(with_typed_commands(note), markup=False)
        time = f", {TOTAL_TIME}: {format_duration(run.total_seconds)}" if run.total_seconds else ""
        table = Table(
            title=f"{label}: {run.recipe.profile}{time}",
            title_justify="left",
        )
        table.add_column("metric")
        for heading in ("ours", "published", "difference", "tolerance"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
        verdicts = verdicts_of(run)
        for verdict in verdicts:
            table.add_row(
                verdict.title,
                in_unit(verdict.ours, verdict.unit),
                in_unit(verdict.published, verdict.unit, verdict.decimals),
                signed(verdict.delta),
                f"{verdict.tolerance:g}",
                Text(verdict.judgement, style=COLOURS[verdict.judgement]),
            )
        console.print(table)
        for reason, titles in reasons_by_row(verdicts):
            console.print(f"Not comparable ({titles}): {reason}.", markup=False)
    return screen.getvalue().rstrip("\n").split("\n")


def _sentences(runs: Sequence[RunResults]) -> list[str]:
    """The verdict in a sentence; of several runs one each, with their labels."""
    judged = [
        (label, verdicts_of(run), comparison_of(run)) for label, run in zip(labels(runs), runs, strict=True)
    ]
    return [f"{label}: {said}" if label else said for label, said in summaries_of(judged)]


def _reference_table(label: str, found: ReferenceComparison) -> Any:
    from rich.table import Table
    from rich.text import Text

    assert found.reference is not None
    table = Table(title=Text(f"{label}: our own reference"), title_justify="left", caption_justify="left")
    table.caption = Text(provenance(found.reference))
    for name, is_number in zip(COLUMNS, NUMERIC, strict=True):
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    for item in found.verdicts:
        *cells, judgement = reference_cells(item)
        table.add_row(*map(Text, cells), Text(judgement, style=COLOURS[item.judgement]))
    return table


def _write_figures(runs: Sequence[RunResults], folder: Path, say: Callable[[str], None]) -> dict[str, Path]:
    found: dict[str, Path] = {}

    def write(title: str, name: str, draw: Callable[[], Any]) -> None:
        with optional_figure(name, say):
            if (drawn := draw()) is not None:
                found[title] = figures.save_png(drawn, folder / f"{name}.png")

    for stage, panels in stage_panels(runs).items():
        main = [panel for panel in panels if not panel.is_aside][:3]  # one row that fits into a page
        if main:
            draw = partial(figures.draw_stage_curves, main, figures.PAPER)
            write(f"Learning curves of {stage}", f"curves_{stage}", draw)
    suffixes = _file_suffixes(labels(runs))
    for label, run in zip(labels(runs), runs, strict=True):
        suffix = "" if len(runs) == 1 else suffixes[label]
        where = "" if len(runs) == 1 else f" ({label})"
        for stage, artifact in run.stages():
            rows = artifact.tables().get("confusion", [])
            draw = partial(figures.draw_confusion, rows, figures.PAPER, run.class_names(stage))
            write(f"Confusion matrix of {stage}{where}", f"confusion_{stage}{suffix}", draw)
        seconds = run.stage_seconds()
        if seconds:
            texts = {name: format_duration(value) for name, value in seconds.items()}
            draw = partial(figures.draw_times, seconds, texts, figures.PAPER)
            write(f"Time per stage{where}", f"times{suffix}", draw)
    return found


def _file_suffixes(names: Sequence[str]) -> dict[str, str]:
    """Label -> a part of a file name, another for each; a label may hold what names and links cannot."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9]+", "_", name)
        number = sum(re.sub(r"[^A-Za-z0-9]+", "_", other) == plain for other in found)
        found[name] = f"_{plain}" + (f"_{number + 1}" if number else "")
    return found
