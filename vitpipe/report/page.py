"""The report as one self-contained HTML file, and in Markdown."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from vitpipe import __version__
from vitpipe.contracts.errors import reason_of
from vitpipe.contracts.units import format_duration
from vitpipe.report import figures
from vitpipe.report.compare import Verdict, verdicts_of
from vitpipe.report.data_lineage import (
    duplicate_pictures,
    lineage_facts,
    lineage_notes,
    lineage_table,
    terms_table,
)
from vitpipe.report.graph_drawing import NodeText, draw_graph
from vitpipe.report.reference import ReferenceComparison, comparison_of
from vitpipe.report.reference_table import notes_of, provenance, reference_cells, reference_markdown
from vitpipe.report.result_tables import (
    ShownTable,
    coco_table,
    headline,
    in_unit,
    markdown,
    markdown_text,
    metric_label,
    metric_table,
    show,
    shown_table,
    side_by_side,
    stage_tables,
)
from vitpipe.report.results import RunResults, curves, labels
from vitpipe.report.verdict_summary import summary_of

TEMPLATES = Path(__file__).parent / "templates"
DATA_FILES = ("report/templates/*",)  # for the identity of stages
_MAX_PNG_BYTES = 900_000  # base64 adds a third; photographs are several times smaller as JPEG
_DIGEST_DIGITS = 12


@dataclass(frozen=True)
class StageView:
    """One stage as the templates show it; pictures are data URIs, figures SVG elements."""

    name: str
    time: str
    metrics: ShownTable | None
    coco: ShownTable | None
    tables: list[ShownTable]
    pictures: list[tuple[str, str]]
    confusion: str
    card: Any


@dataclass(frozen=True)
class RunView:
    """One run as the templates show it."""

    anchor: str
    label: str
    run: RunResults
    verdicts: list[Verdict]
    reference: ReferenceComparison | None
    graph: str
    times: str
    total_time: str
    headlines: list[tuple[str, str, str, str]]
    stages: list[StageView]
    data: StageView | None
    splits: ShownTable | None
    lineage: ShownTable | None
    lineage_facts: list[tuple[str, str]]
    lineage_notes: list[str]
    terms: ShownTable | None
    libraries: list[tuple[str, str]]
    hardware: list[tuple[str, str]]
    mixed: list[str]


def write_page(runs: Sequence[RunResults], path: Path) -> Path:
    """Write the HTML page of one or many runs; it needs no other file and no network."""
    views = _views(runs)
    curve_figures = _curve_figures(runs)
    html = template_environment(escaping=True).get_template("page.html.j2").render(
        title=" and ".join(dict.fromkeys(run.recipe.name for run in runs)),
        runs=views, curves=curve_figures, side_by_side=side_by_side(runs), summary=_summary(views),
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
    views = _views(runs, with_figures=False)
    text = template_environment(escaping=False).get_template("report.md.j2").render(
        title=" and ".join(dict.fromkeys(run.recipe.name for run in runs)),
        runs=views, side_by_side=side_by_side(runs), summary=_summary(views),
        pictures={name: file.relative_to(path.parent).as_posix() for name, file in pictures.items()},
        verdict_table=verdict_markdown, reference_table=reference_markdown, undrawn=undrawn,
    )  # fmt: skip
    path.write_text(text, encoding="utf-8")
    return path


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


def data_uri(picture: Path) -> str:
    """A PNG as a data URI (RFC 2397); one of more than 0.9 MB is converted to JPEG."""
    content, kind = picture.read_bytes(), "png"
    if len(content) > _MAX_PNG_BYTES:
        from PIL import Image

        buffer = io.BytesIO()
        with Image.open(picture) as image:
            image.convert("RGB").save(buffer, "JPEG", quality=88, optimize=True)
        content, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


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
    environment.globals |= {"rows_of": rows_of, "reference_cells": reference_cells}
    environment.filters |= {
        "in_unit": in_unit, "signed": signed, "gauge": gauge, "markdown": markdown, "text": markdown_text,
        "duration": format_duration, "provenance": provenance, "notes_of": notes_of,
        "metric_label": metric_label,
        "digest": lambda text: str(text)[:_DIGEST_DIGITS], "kind": lambda text: str(text).replace(" ", "-"),
    }  # fmt: skip
    return environment


def _summary(views: Sequence[RunView]) -> str:
    return summary_of([v for view in views for v in view.verdicts], [view.reference for view in views])


def _views(runs: Sequence[RunResults], *, with_figures: bool = True) -> list[RunView]:
    return [
        _run_view(f"run{i}", label, run, with_figures)
        for i, (label, run) in enumerate(zip(labels(runs), runs, strict=True))
    ]


def _run_view(anchor: str, label: str, run: RunResults, with_figures: bool) -> RunView:
    stages = [_stage_view(run, name, anchor if with_figures else "") for name, _ in run.stages()]
    data = next((stage for stage in stages if stage.name == "prepare"), None)
    splits = run.artifacts["prepare"].tables().get("splits") if data else None
    verdicts = verdicts_of(run)
    libraries, mixed = _shared([artifact.libraries for _, artifact in run.stages()])
    hardware, mixed_hardware = _shared([artifact.run.hardware for _, artifact in run.stages()])
    return RunView(
        anchor=anchor,
        label=label,
        run=run,
        verdicts=verdicts,
        reference=comparison_of(run),
        graph=_graph(run, anchor) if with_figures else "",
        times=_times(run, anchor) if with_figures else "",
        total_time=_duration(run.wall_seconds),
        headlines=_headlines(run, verdicts),
        stages=[stage for stage in stages if stage.name not in ("prepare", "report")],
        data=data,
        splits=shown_table("splits", splits) if splits else None,
        lineage=lineage_table(run),
        lineage_facts=lineage_facts(run),
        lineage_notes=lineage_notes(run),
        terms=terms_table(run),
        libraries=libraries,
        hardware=hardware,
        mixed=mixed + mixed_hardware,
    )


def _stage_view(run: RunResults, name: str, anchor: str) -> StageView:
    """One stage; without an anchor, for Markdown, without pictures and figures."""
    # The table `classes` of prepare is the one that lists the keys: there they must stay.
    artifact, class_names = run.artifacts[name], run.class_names() if name != "prepare" else {}
    pictures, confusion = [], ""
    if anchor:
        files = sorted(artifact.path.glob("*.png"))
        pictures = [(file.stem.replace("_", " "), data_uri(file)) for file in files]
        pictures += [(title, data_uri(file)) for title, file in duplicate_pictures(artifact)]
        rows = artifact.tables().get("confusion", [])
        confusion = _svg(
            lambda: figures.draw_confusion(rows, figures.THEMED, class_names),
            f"{name} confusion matrix",
            f"{anchor} {name} confusion",
        )
    return StageView(
        name, _duration(artifact.run.wall_seconds), metric_table(artifact),
        coco_table(artifact.metrics), stage_tables(artifact, class_names), pictures, confusion, artifact.card,
    )  # fmt: skip


def rows_of(views: Sequence[RunView]) -> list[tuple[Verdict, list[tuple[RunView, Verdict]]]]:
    """The published rows of several runs, each with the verdict of every run that expects it."""
    found: dict[str, tuple[Verdict, list[tuple[RunView, Verdict]]]] = {}
    for view in views:
        for verdict in view.verdicts:
            # A row has no id: it is identified by all of its values, which a mapping cannot be hashed by.
            key = repr(sorted(verdict.row.items(), key=str))
            found.setdefault(key, (verdict, []))[1].append((view, verdict))
    return list(found.values())


def _headlines(run: RunResults, verdicts: Sequence[Verdict]) -> list[tuple[str, str, str, str]]:
    """(stage, metric, our value, published value) for each stage that has a main metric."""
    published = {(v.stage, v.metric): in_unit(v.published, v.unit, v.decimals) for v in verdicts}
    found = []
    for name, artifact in run.stages():
        metric = headline(name)
        # A pre-training loss is no result that papers publish.
        if metric in artifact.metrics and metric != "loss":
            value = show(metric, artifact.metrics[metric])
            found.append((name, metric_label(metric), value, published.get((name, metric), "")))
    return found


def _graph(run: RunResults, anchor: str) -> str:
    total = sum(run.known_seconds().values()) or 1.0  # not zero: the shares are divided by it
    texts = {}
    for node in run.nodes():
        artifact, metric = run.artifacts.get(node.name), node.stage.headline
        if artifact is None:
            # A report that the stage writes is made before the stage has a card.
            this_page = node.name == "report"
            texts[node.name] = NodeText("", "this page" if this_page else "did not run", 0.0, this_page)
            continue
        seconds = artifact.run.wall_seconds
        value = artifact.metrics.get(metric)
        result = "" if value is None else f"{metric_label(metric)} {show(metric, value)}"
        if node.name == "prepare":
            result = f"data {artifact.card.data_digest[:8]}"
        link = "" if node.name == "report" else f"{anchor}-{node.name}"
        texts[node.name] = NodeText(_duration(seconds), result, seconds / total, True, link)
    return draw_graph(run.nodes(), texts)


def _duration(seconds: float) -> str:
    """A wall time; of a stage whose folder comes from DVC it is not known."""
    return format_duration(seconds) if seconds else "—"


def _times(run: RunResults, anchor: str) -> str:
    seconds = run.known_seconds()
    if not seconds:
        return ""
    texts = {name: format_duration(value) for name, value in seconds.items()}
    return _svg(
        lambda: figures.draw_times(seconds, texts, figures.THEMED),
        f"{run.title}: time per stage",
        f"{anchor} times",
    )


def _svg(draw: Callable[[], Any], label: str, key: str = "") -> str:
    """A figure as SVG, nothing if there is none to draw, or the reason why it cannot be drawn."""
    try:
        drawn = draw()
        return "" if drawn is None else figures.inline_svg(drawn, label, key)
    except Exception as error:  # no figure is worth the page with all results
        said = f"{label}: not drawn ({type(error).__name__}: {reason_of(error)})"
        return f'<p class="muted">{escape(said)}</p>'


def _curve_figures(runs: Sequence[RunResults]) -> dict[str, list[tuple[str, str, str]]]:
    """Main and collapsed panels, each (stage, title, SVG)."""
    found: dict[str, list[tuple[str, str, str]]] = {"main": [], "aside": []}
    for stage, of_stage in stage_panels(runs).items():
        for panel in of_stage:
            svg = _svg(partial(figures.draw_panel, panel, figures.THEMED), f"{stage} {panel.title}")
            found["aside" if panel.is_aside else "main"].append((stage, panel.title, svg))
    return found


def stage_panels(runs: Sequence[RunResults]) -> dict[str, list[figures.Panel]]:
    """Stage -> its panels of learning curves, all runs in the same axes."""
    names = dict.fromkeys(name for run in runs for name, _ in run.stages())
    found = {}
    for stage in names:
        per_run = {
            label: curves(run.artifacts[stage])
            for label, run in zip(labels(runs), runs, strict=True)
            if stage in run.artifacts
        }
        of_stage = figures.panels(per_run)
        if of_stage:
            found[stage] = of_stage
    return found


def _shared(of_stages: Iterable[Mapping[str, Any]]) -> tuple[list[tuple[str, str]], list[str]]:
    """Entries of all stages together, and the names whose value differs between stages."""
    # Stages may have run on different machines, or before and after an update of a library. An inner dict is
    # an ordered set.
    values: dict[str, dict[str, None]] = {}
    for of_stage in of_stages:
        for name, value in of_stage.items():
            values.setdefault(name, {})[str(value)] = None
    mixed = [name for name, several in values.items() if len(several) > 1]
    return [(metric_label(name), ", ".join(several)) for name, several in values.items()], mixed
