"""The model card that goes with a registered model: what it is, what it was measured at, and its limits.

Sections as in Mitchell et al., Model Cards for Model Reporting (arXiv 1810.03993): details, training data,
metrics with how they were measured, caveats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.units import counted, format_count
from vitpipe.report.compare import Verdict, reasons_by_row
from vitpipe.report.page import signed
from vitpipe.report.result_tables import ShownTable, headline, in_unit, markdown, markdown_text, show

_UNJUDGED = "Not compared yet: the `report` stage writes the verdict here."
_NO_CLAIM = "The recipe claims no published row for this stage."


@dataclass(frozen=True)
class SetFacts:
    """A dataset that the model was trained or measured on; counts are images and classes."""

    name: str
    title: str
    licence: str
    num_train: int
    num_val: int
    num_classes: int
    digest: str


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Attributes:
        metrics: of the stage.
        protocol: rows of the stage's table `protocol`.
        sets: the stage's own dataset first.
        commit: of the code, empty when unknown.
        verdicts: of the stage's expectations; None before the report has judged them.
    """

    recipe: Recipe
    stage: str
    metrics: Mapping[str, float]
    protocol: Sequence[Mapping[str, str]]
    sets: Sequence[SetFacts]
    commit: str
    verdicts: Sequence[Verdict] | None = None


def model_card(facts: CardFacts) -> str:
    """The card as Markdown; every foreign text is escaped."""
    recipe = facts.recipe
    paper = markdown_text(f"{recipe.source.title} ({recipe.source.url or recipe.source.paper})")
    lines = [
        f"# {markdown_text(recipe.name)}: {facts.stage}",
        "",
        markdown_text(f"{recipe.summary}."),
        "",
        f"* network: {markdown_text(recipe.model.name)}, {recipe.model.image_size} pixels",
        f"* recipe: `{recipe.name}`, profile `{recipe.profile}`, seed {recipe.seed}, after {paper}",
        f"* code: vitpipe {f'at commit `{facts.commit}`' if facts.commit else 'of an unknown commit'}",
        "* weights: the trained ones, not an average over the steps",
        "",
        "## Verdict",
        "",
        *_verdict(facts),
        "",
        "## Metrics",
        "",
        *_metrics(facts),
        "",
        "## Data",
        "",
        *_data(facts.sets),
        "",
        "## Limits",
        "",
        *_limits(facts),
        "",
        "## Licence",
        "",
        *_licence(facts.sets),
    ]
    return "\n".join(lines) + "\n"


def _verdict(facts: CardFacts) -> list[str]:
    if not facts.verdicts:
        return [_UNJUDGED if facts.verdicts is None else _NO_CLAIM]
    columns = ("metric", "ours", "published", "difference", "tolerance", "verdict")
    numeric = (False, True, True, True, True, False)
    rows = tuple(
        (
            verdict.title,
            in_unit(verdict.ours, verdict.unit),
            in_unit(verdict.published, verdict.unit, verdict.decimals),
            signed(verdict.delta),
            f"{verdict.tolerance:g}",
            verdict.judgement,
        )
        for verdict in facts.verdicts
    )
    # Reasons are long and often the same for several rows: below the table, each once.
    reasons = [
        f"* not comparable, {markdown_text(metrics)}: {markdown_text(reason)}"
        for reason, metrics in reasons_by_row(facts.verdicts)
    ]
    return [markdown(ShownTable("verdict", "", columns, numeric, rows)), *(["", *reasons] if reasons else [])]


def _metrics(facts: CardFacts) -> list[str]:
    """The main metric first; then the ledger, each way of measuring once."""
    main = headline(facts.stage)
    names = sorted(facts.metrics, key=lambda name: (name != main, name.startswith("ema_")))
    rows = tuple((name, show(name, facts.metrics[name])) for name in names)
    ledger: dict[str, list[str]] = {}
    for name in names:
        settings = [f"{row['setting']} {row['value']}" for row in facts.protocol if row["metric"] == name]
        if settings:
            ledger.setdefault("; ".join(settings), []).append(name)
    measured = [f"* {', '.join(those)}: {markdown_text(how)}" for how, those in ledger.items()]
    return [markdown(ShownTable("metrics", "", ("metric", "value"), (False, True), rows)), "", *measured]


def _data(sets: Sequence[SetFacts]) -> list[str]:
    return [
        f"* {markdown_text(item.title)} (`{item.name}`, digest `{item.digest[:12]}`): "
        f"{format_count(item.num_train)} training and {counted(item.num_val, 'validation image')}, "
        f"{counted(item.num_classes, 'class', 'classes')}"
        for item in sets
    ] or ["* not known"]


def _limits(facts: CardFacts) -> list[str]:
    own = markdown_text(facts.sets[0].title if facts.sets else "its training set")
    limits = [
        f"* It knows the classes of {own} and no others.",
        "* The numbers are those of the validation set above. Pictures from elsewhere were not measured.",
    ]
    if facts.recipe.profile != "full":
        limits.append(
            f"* Profile `{facts.recipe.profile}` shows that the whole chain works, at a fraction of the "
            "paper's data and training: not a model for use."
        )
    return limits + [f"* {markdown_text(text)}" for text in facts.recipe.discrepancies]


def _licence(sets: Sequence[SetFacts]) -> list[str]:
    return [
        "The code is under Apache-2.0. The weights have learnt from data under these terms, which may limit "
        "what the weights can be used for:",
        "",
        *(f"* {markdown_text(item.title)}: {markdown_text(item.licence or 'none stated')}" for item in sets),
    ]
