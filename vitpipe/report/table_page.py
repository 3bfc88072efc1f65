"""A published table with our column beside it: for the terminal, as Markdown, CSV and one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitpipe import __version__
from vitpipe.contracts.errors import ArtifactError, disk_errors, some
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.units import counted
from vitpipe.report.compare import JUDGEMENTS
from vitpipe.report.page import TEMPLATES, signed, template_environment
from vitpipe.report.result_tables import ShownTable, markdown
from vitpipe.report.seed_results import SeedResults, plain_rows
from vitpipe.report.write_report import COLOURS

MARKDOWN, TABLE, PAGE = "table.md", "table.csv", "table.html"
# By which the files of an earlier table are recognised, see `_refuse_foreign_files`.
_MARKS = {
    MARKDOWN: "<!-- written by vitpipe table -->",
    TABLE: "method,variant,dataset,metric,published,unit,ours_mean,",
    PAGE: '<meta name="generator" content="vitpipe',
}
_COLUMNS = ("row", "metric", "published", "ours", "n", "difference", "verdict", "recipe")
_NUMERIC = (False, False, True, True, True, True, False, False)


@dataclass(frozen=True)
class TableReport:
    """What a finished table says.

    Attributes:
        source: the table in the paper's words.
        command: that makes the table, or goes on with it.
        runs: one row per stage of every run: recipe and seed, stage, time, folder.
        failures: one line per run that failed.
        discrepancies: of the recipes' sources, without repetitions.
    """

    name: str
    source: str
    title: str
    profile: str
    num_seeds: int
    command: str
    results: tuple[SeedResults, ...]
    runs: tuple[Mapping[str, str], ...]
    failures: tuple[str, ...]
    discrepancies: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the published table; one that several recipes claim has several results."""
        return len({id(item.row) for item in self.results})

    def reasons(self) -> list[tuple[str, int]]:
        """Each reason with its number of rows, in the order of the table; judged rows have none to state."""
        judged = {item.reason for item in self.results if item.verdict and item.verdict.delta is not None}
        found: dict[str, int] = {}
        for item in self.results:
            if item.reason not in judged:
                found[item.reason] = found.get(item.reason, 0) + 1
        return list(found.items())

    def counts(self) -> dict[str, int]:
        """Number of rows by verdict, and of those without a recipe."""
        judgements = [item.judgement for item in self.results]
        return {name: judgements.count(name) for name in (*JUDGEMENTS, "no recipe") if name in judgements}


def write_table_files(report: TableReport, folder: Path) -> dict[str, Path]:
    """Write `table.md`, `table.csv` and `table.html` into a folder; name -> path.

    Raises:
        ArtifactError: the folder holds files of these names that are not an earlier table.
        StorageError: when the disk refuses a write.
    """
    _refuse_foreign_files(folder)
    texts = {MARKDOWN: _markdown(report), TABLE: _csv(report), PAGE: _page(report)}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(folder / name, text)
    return {name: folder / name for name in texts}


def table_lines(report: TableReport, *, width: int, colour: bool = False) -> list[str]:
    """The table as lines of text, with the reasons below it.

    Args:
        width: columns of the terminal.
        colour: use ANSI escape sequences.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=colour, no_color=not colour, highlight=False)
    seeds = counted(report.num_seeds, "seed")
    table = Table(
        title=f"{report.name} ({report.source}), profile {report.profile}, {seeds}", title_justify="left"
    )
    for name, is_number in zip(_COLUMNS, _NUMERIC, strict=True):
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    for item, row in zip(report.results, _cells(report.results), strict=True):
        *front, judgement, recipe = row
        colour_name = COLOURS.get(judgement, "bright_black")  # type: ignore[call-overload]
        table.add_row(*map(Text, front), Text(judgement, style=colour_name), Text(item.recipe and recipe))
    console.print(table)
    for reason, count in report.reasons():
        console.print(f"{counted(count, 'row')}: {reason}", markup=False)
    for line in report.failures:
        console.print(f"Failed: {line}", markup=False)
    return screen.getvalue().rstrip("\n").split("\n")


def table_markdown(report: TableReport) -> str:
    """Only the table, in Markdown."""
    return markdown(ShownTable("table", "", _COLUMNS, _NUMERIC, tuple(_cells(report.results))))


def _cells(results: Sequence[SeedResults]) -> list[tuple[str, ...]]:
    return [
        (
            _row_name(item.row),
            f"{item.row['metric']}, {item.row['dataset']}",
            item.published,
            item.ours,
            str(len(item.values) or ""),
            signed(item.verdict.delta if item.verdict else None),
            item.judgement,
            item.recipe,
        )
        for item in results
    ]


def _row_name(row: Mapping[str, Any]) -> str:
    """Method and variant; one of them where it holds the other."""
    method, variant = str(row["method"]), str(row["variant"])
    return variant if method.lower() in variant.lower() else f"{method}, {variant}"


def _markdown(report: TableReport) -> str:
    lines = [
        _MARKS[MARKDOWN],
        f"# {report.name}: {report.source}",
        "",
        f"{report.title}. Profile {report.profile}, {counted(report.num_seeds, 'seed')}; "
        "mean ± sample standard deviation, n seeds.",
        "",
        table_markdown(report),
        "",
        *(f"* {counted(count, 'row')}: {reason}" for reason, count in report.reasons()),
        *(f"* Failed: {line}" for line in report.failures),
    ]
    if report.runs:
        columns = tuple(report.runs[0])
        rows = tuple(tuple(row.values()) for row in report.runs)
        lines += ["", "## Runs", ""]
        lines.append(markdown(ShownTable("runs", "", columns, (False,) * len(columns), rows)))
    if report.discrepancies:
        lines += ["", "## Known discrepancies", "", *(f"* {text}" for text in report.discrepancies)]
    lines += ["", f"Made by `{report.command}`.", ""]
    return "\n".join(lines)


def _csv(report: TableReport) -> str:
    rows, text = plain_rows(report.results), io.StringIO()
    # Unix line ends on every machine, as all our tables.
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _page(report: TableReport) -> str:
    text: str = template_environment(escaping=True).get_template("table.html.j2").render(
        report=report, row_name=_row_name, version=__version__,
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
    )  # fmt: skip
    return text


def _refuse_foreign_files(folder: Path) -> None:
    foreign = [name for name, mark in _MARKS.items() if not _is_absent_or_ours(folder / name, mark)]
    if foreign:
        raise ArtifactError(
            f"The table would replace files that are not an earlier table ({some(foreign)})",
            where=folder,
            fix="move them away; nothing was written",
        )


def _is_absent_or_ours(file: Path, mark: str) -> bool:
    if file.is_symlink():
        return False  # the target would be overwritten
    return not file.exists() or (
        file.is_file() and mark in file.read_text(encoding="utf-8", errors="replace")
    )
