"""What the templates show of one run or of many: formatted tables, pictures and figures by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from typing import Any

from vitpipe.config.run_name import overridden
from vitpipe.config.telling_values import value_text
from vitpipe.contracts.errors import reason_of
from vitpipe.contracts.protocol import WARNINGS
from vitpipe.contracts.units import format_duration
from vitpipe.report import figures
from vitpipe.report.compare import Verdict, verdicts_of
from vitpipe.report.data_lineage import lineage_facts, lineage_notes, lineage_table, terms_table
from vitpipe.report.graph_drawing import DrawnGraph, NodeText, draw_graph
from vitpipe.report.pictures import Picture, pictures_of
from vitpipe.report.reference import ReferenceComparison, comparison_of
from vitpipe.report.result_tables import (
    ShownTable,
    coco_table,
    headline,
    metric_label,
    metric_table,
    show,
    shown_table,
    stage_tables,
)
from vitpipe.report.results import REPORT, RunResults, curves, stages_by_interest
from vitpipe.report.run_labels import labels


@dataclass(frozen=True)
class StageView:
    """One stage of one run as the templates show it; figures are SVG elements."""

    anchor: str
    name: str
    time: str
    metrics: ShownTable | None
    coco: ShownTable | None
    tables: list[ShownTable]
    pictures: list[Picture]
    confusion: str
    card: Any
    warnings: list[str]

    @property
    def is_wide(self) -> bool:
        """Whether it has something to look at, which needs room."""
        return bool(self.pictures or self.confusion)


@dataclass(frozen=True)
class RunView:
    """One run as the templates show it."""

    anchor: str
    label: str
    run: RunResults
    overrides: list[str]
    verdicts: list[Verdict]
    reference: ReferenceComparison | None
    graph: DrawnGraph
    total_time: str
    headlines: list[tuple[str, str, str]]
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


@dataclass(frozen=True)
class StageGroup:
    """One stage of all runs: each run's label beside what it has there.

    Attributes:
        tables: (labels of the runs that have it, table).
        owners: data URI of a picture -> labels of the runs that have it.
    """

    name: str
    stages: list[tuple[str, StageView]]
    tables: list[tuple[str, ShownTable]]
    owners: Mapping[str, str]

    @property
    def is_wide(self) -> bool:
        """Whether any run has something to look at there."""
        return any(stage.is_wide for _, stage in self.stages)


def run_views(runs: Sequence[RunResults], *, with_figures: bool = True) -> list[RunView]:
    """The runs as the templates show them; without figures, for Markdown, also without pictures."""
    return [
        _run_view(f"run{i}", label, run, with_figures)
        for i, (label, run) in enumerate(zip(labels(runs), runs, strict=True))
    ]


def stage_groups(views: Sequence[RunView]) -> list[StageGroup]:
    """The results by stage, in the order of interest.

    A table, a picture or its note that a stage shares with an earlier one of the list, or with another run,
    is shown once. Of several runs the metrics are left out: the page shows them side by side.
    """
    names = stages_by_interest([view.run for view in views])
    found: dict[str, list[tuple[str, StageView]]] = {}
    for view in views:
        for stage in view.stages:
            found.setdefault(stage.name, []).append((view.label, stage))
    seen: set[Any] = set()
    return [_stage_group(name, found[name], seen, len(views) > 1) for name in names]


def grouped(views: Iterable[RunView], key: Callable[[RunView], Any]) -> list[tuple[str, RunView]]:
    """(labels, first view) of the runs for which `key` is the same, in the order of the runs."""
    found: list[tuple[list[str], Any, RunView]] = []
    for view in views:
        own = key(view)
        same = next((names for names, other, _ in found if other == own), None)
        if same is None:
            found.append(([view.label], own, view))
        else:
            same.append(view.label)
    return [(", ".join(names), view) for names, _, view in found]


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


def curve_figures(runs: Sequence[RunResults]) -> dict[str, list[tuple[str, str, str]]]:
    """Main and collapsed panels, each (stage, title, SVG)."""
    found: dict[str, list[tuple[str, str, str]]] = {"main": [], "aside": []}
    for stage, of_stage in stage_panels(runs).items():
        for panel in of_stage:
            svg = svg_of(partial(figures.draw_panel, panel, figures.THEMED), f"{stage} {panel.title}")
            found["aside" if panel.is_aside else "main"].append((stage, panel.title, svg))
    return found


def svg_of(draw: Callable[[], Any], label: str, key: str = "") -> str:
    """A figure as SVG, nothing if there is none to draw, or the reason why it cannot be drawn."""
    try:
        drawn = draw()
        return "" if drawn is None else figures.inline_svg(drawn, label, key)
    except Exception as error:  # no figure is worth the page with all results
        said = f"{label}: not drawn ({type(error).__name__}: {reason_of(error)})"
        return f'<p class="small">{escape(said)}</p>'


def _run_view(anchor: str, label: str, run: RunResults, with_figures: bool) -> RunView:
    stages = [_stage_view(run, name, anchor, with_figures) for name, _ in run.stages()]
    data = next((stage for stage in stages if stage.name == "prepare"), None)
    splits = run.artifacts["prepare"].tables().get("splits") if data else None
    verdicts, reference = verdicts_of(run), comparison_of(run)
    libraries, mixed = _shared([artifact.libraries for _, artifact in run.stages()])
    hardware, mixed_hardware = _shared([artifact.run.hardware for _, artifact in run.stages()])
    return RunView(
        anchor=anchor,
        label=label,
        run=run,
        overrides=[f"{key}={value_text(value)}" for key, value in overridden(run.recipe).items()],
        verdicts=verdicts,
        reference=reference,
        graph=_graph(run, anchor),
        total_time=_duration(run.total_seconds),
        headlines=_headlines(run, verdicts, reference),
        stages=stages,
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


def _stage_view(run: RunResults, name: str, run_anchor: str, with_figures: bool) -> StageView:
    # The table `classes` of prepare is the one that lists the keys: there they must stay.
    artifact, class_names = run.artifacts[name], run.class_names(name) if name != "prepare" else {}
    anchor = f"{run_anchor}-{name}"
    confusion = ""
    if with_figures:
        rows = artifact.tables().get("confusion", [])
        draw = partial(figures.draw_confusion, rows, figures.THEMED, class_names)
        confusion = svg_of(draw, f"{name} confusion matrix", f"{run_anchor} {name} confusion")
    return StageView(
        anchor=anchor,
        name=name,
        time=_duration(artifact.run.wall_seconds),
        metrics=metric_table(artifact),
        coco=coco_table(artifact.metrics),
        tables=stage_tables(artifact, class_names),
        pictures=pictures_of(artifact, anchor) if with_figures else [],
        confusion=confusion,
        card=artifact.card,
        warnings=[row["warning"] for row in artifact.tables().get(WARNINGS, [])],
    )


def _stage_group(
    name: str, stages: Sequence[tuple[str, StageView]], seen: set[Any], several: bool
) -> StageGroup:
    """Adds to `seen` what is shown: tables, pictures and their notes."""
    owners: dict[Any, list[str]] = {}
    tables: dict[Any, ShownTable] = {}
    for label, stage in stages:
        for table in stage.tables:
            key = (table.name, table.columns, table.rows)
            tables.setdefault(key, table)
            owners.setdefault(key, []).append(label)
        for picture in stage.pictures:
            owners.setdefault(picture.uri, []).append(label)
    every = ", ".join(label for label, _ in stages)
    names = {key: ", ".join(own) for key, own in owners.items()}
    names = {key: "all runs" if own == every and len(stages) > 1 else own for key, own in names.items()}
    # The same table of all runs together, not all tables of one run after those of another.
    order = list(dict.fromkeys(table.name for table in tables.values()))
    shown = sorted(
        ((names[key], table) for key, table in tables.items() if key not in seen),
        key=lambda item: order.index(item[1].name),
    )
    seen |= set(tables)
    views = []
    for label, stage in stages:
        pictures = []
        for picture in stage.pictures:
            if picture.uri not in seen:
                pictures.append(replace(picture, note="") if picture.note in seen else picture)
                seen |= {picture.uri, picture.note}
        view = replace(stage, pictures=pictures)
        views.append((label, replace(view, metrics=None, coco=None) if several else view))
    of_pictures = {picture.uri: names[picture.uri] for _, stage in stages for picture in stage.pictures}
    return StageGroup(name, views, shown, of_pictures)


def _headlines(
    run: RunResults, verdicts: Sequence[Verdict], reference: ReferenceComparison | None
) -> list[tuple[str, str, str]]:
    """(stage, metric, value) of the main metrics that the verdict table does not have."""
    judged = {(verdict.stage, verdict.metric) for verdict in verdicts}
    if reference and reference.reference:
        judged |= {(item.stage, item.metric) for item in reference.verdicts}
    found = []
    for name, artifact in run.stages():
        metric = headline(name)
        if metric in artifact.metrics and (name, metric) not in judged:
            found.append((name, metric_label(metric), show(metric, artifact.metrics[metric])))
    return found


def _graph(run: RunResults, anchor: str) -> DrawnGraph:
    known = run.stage_seconds()
    total = sum(known.values()) or 1.0  # not zero: the shares are divided by it
    texts = {}
    for node in run.nodes():
        artifact = run.artifacts.get(node.name)
        if artifact is None:
            # A report that the stage writes is made before the stage has a card.
            this_page = node.name == REPORT
            texts[node.name] = NodeText("", 0.0, this_page, "this page" if this_page else "did not run")
            continue
        seconds = artifact.run.wall_seconds
        link = "" if node.name == REPORT else f"{anchor}-{node.name}"
        share = known.get(node.name, 0.0) / total
        texts[node.name] = NodeText(_duration(seconds), share, True, link=link)
    return draw_graph(run.nodes(), texts)


def _duration(seconds: float) -> str:
    """A wall time; of a stage whose folder comes from DVC it is not known."""
    return format_duration(seconds) if seconds else "—"


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
