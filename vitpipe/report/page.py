"""The report as one self-contained HTML file, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitpipe import __version__
from vitpipe.contracts.units import format_duration
from vitpipe.report.compare import Verdict
from vitpipe.report.reference_table import notes_of, provenance, reference_markdown
from vitpipe.report.result_tables import ShownTable, in_unit, markdown, markdown_text, metric_label
from vitpipe.report.results import TOTAL_TIME, RunResults
from vitpipe.report.run_differences import difference_tables
from vitpipe.report.run_views import RunView, curve_figures, grouped, run_views, stage_groups
from vitpipe.report.verdict_summary import summaries_of
from vitpipe.report.verdict_table import Judged, facts_by_rows, ledgers_of, verdict_table

TEMPLATES = Path(__file__).parent / "templates"
DATA_FILES = ("report/templates/*",)  # for the identity of stages
_DIGEST_DIGITS = 12


# What runs have in common is shown once: by these, views are grouped.
_KEYS: dict[str, Callable[[RunView], Any]] = {
    "summary_key": lambda view: view.run.recipe.name,
    "reference_key": lambda view: view.reference and view.reference.reference,
    "facts_key": lambda view: facts_by_rows(view.verdicts),
    "graph_key": lambda view: [(node.name, node.inputs) for node in view.run.nodes()],
    "sources_key": lambda view: (view.run.recipe.discrepancies, view.run.recipe.source.tables),
    "machine_key": lambda view: (view.hardware, view.libraries),
}


def write_page(runs: Sequence[RunResults], path: Path) -> Path:
    """Write the HTML page of one or many runs; it needs no other file and no network."""
    views = run_views(runs)
    html = template_environment(escaping=True).get_template("page.html.j2").render(
        title=_title(runs), runs=views, groups=stage_groups(views), curves=curve_figures(runs),
        differences=difference_tables(runs), summaries=summaries_of(_judged(views)),
        verdict_table=verdict_table(_judged(views)), ledgers=ledgers_of(_judged(views)),
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"), version=__version__,
    )  # fmt: skip
    path.write_text(html, encoding="utf-8")
    return path


def write_markdown(
    runs: Sequence[RunResults], path: Path, pictures: Mapping[str, Path], undrawn: Sequence[str] = ()
) -> Path:
    """Write the Markdown report.

    Args:
        pictures: title -> PNG beside or below the report.
        undrawn: what is said of figures that could not be drawn.
    """
    views = run_views(runs, with_figures=False)
    text = template_environment(escaping=False).get_template("report.md.j2").render(
        title=_title(runs), runs=views, groups=stage_groups(views), differences=difference_tables(runs),
        summaries=summaries_of(_judged(views)), ledgers=ledgers_of(_judged(views)),
        pictures={name: file.relative_to(path.parent).as_posix() for name, file in pictures.items()},
        verdict_markdown=verdict_markdown, reference_table=reference_markdown, undrawn=undrawn,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return path


def _title(runs: Sequence[RunResults]) -> str:
    return " and ".join(dict.fromkeys(run.recipe.name for run in runs))


def _judged(views: Sequence[RunView]) -> list[Judged]:
    return [(view.label, view.verdicts, view.reference) for view in views]


def verdict_markdown(verdicts: Sequence[Verdict]) -> str:
    """The verdict table in Markdown."""
    rows = tuple(
        (
            v.title,
            in_unit(v.ours, v.unit),
            in_unit(v.published, v.unit, v.decimals),
            signed(v.delta),
            f"{v.tolerance:g}",
            f"**{v.judgement}**: {markdown_text(v.reason)}",
            v.row["source"],
        )
        for v in verdicts
    )
    columns = ("metric", "ours", "published", "difference", "tolerance", "verdict", "source")
    numeric = (False, True, True, True, True, False, False)
    return markdown(ShownTable("verdict", "", columns, numeric, rows), has_markup=True)


def signed(value: float | None) -> str:
    """`+0.3`, `−1.25`, with a typographic minus; an em dash for None."""
    if value is None:
        return "—"
    text = f"{abs(value):.2f}".rstrip("0").rstrip(".")
    return f"{'+' if value > 0 else '−' if value < 0 else '±'}{text}"


def gauge(verdict: Verdict) -> str:
    """A small SVG: the published value in the middle, the tolerance as a band, our result as a dot."""
    if verdict.delta is None:
        return ""
    # The axis is 108 wide around 60 and ends at three tolerances, so the band of one tolerance is 42 to 78.
    # Larger differences are drawn at the end of the axis.
    reach = 3.0 * verdict.tolerance
    at = 60 + 54 * max(-1.0, min(1.0, verdict.delta / reach))
    return (
        '<svg class="gauge" viewBox="0 0 120 16" aria-hidden="true"><path class="axis" d="M4 8H116"/>'
        '<rect class="band" x="42" y="3" width="36" height="10" rx="3"/><path class="tick" d="M60 2V14"/>'
        f'<circle class="dot" cx="{at:.1f}" cy="8" r="4"/></svg>'
    )


def template_environment(*, escaping: bool) -> Any:
    """jinja2's environment of our templates with their filters.

    Args:
        escaping: for HTML.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # StrictUndefined: a misspelt name in a template is an error, not an empty text. HTML is escaped, because
    # names of files, classes and processors are foreign text; in Markdown the escapes would be shown.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=escaping, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.globals |= {
        "facts_by_rows": facts_by_rows,
        "grouped": grouped,
        "notes_of": notes_of,
        "TOTAL_TIME": TOTAL_TIME,
        **_KEYS,
    }
    environment.filters |= {
        "in_unit": in_unit, "signed": signed, "gauge": gauge, "markdown": markdown, "text": markdown_text,
        "duration": format_duration, "provenance": provenance,
        "metric_label": metric_label,
        "digest": lambda text: str(text)[:_DIGEST_DIGITS], "kind": lambda text: str(text).replace(" ", "-"),
    }  # fmt: skip
    return environment
