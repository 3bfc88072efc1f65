"""The verbs `models` and `cost`: the networks, and what one of them costs at any image size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from vitpipe.contracts.units import format_billions, format_millions
from vitpipe.verbs.completion import complete_model
from vitpipe.verbs.options import JsonOption
from vitpipe.verbs.show import print_rows

if TYPE_CHECKING:
    from vitpipe.config.model import ModelEntry


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (models, cost):
        app.command(name=verb.__name__)(verb)


def models(
    as_json: JsonOption = False,
) -> None:
    """List the networks: size and cost of their classifiers with 1000 classes, and their papers."""
    from vitpipe.config.model import entries

    found = list(entries().values())
    if as_json:
        print_rows([dataclasses.asdict(entry) for entry in found], True)
        return
    rows = [
        {
            "name": entry.name,
            "params": format_millions(entry.classifier_params),
            "stated": "" if entry.published_params is None else f"{entry.published_params:,g} M",
            "MACs": format_billions(entry.classifier_macs),
            "image": f"{entry.image_size} px",
            "summary": entry.summary,
        }
        for entry in found
    ]
    print_rows(rows, False, right=("params", "stated", "MACs", "image"), unbroken=("name",))
    print("\n".join(_legend(found)))


def _legend(found: Iterable[ModelEntry]) -> list[str]:
    papers: dict[str, list[str]] = {}
    for entry in found:
        papers.setdefault(entry.paper, []).append(entry.name)
    return [
        "params: parameters of the classifier with 1000 classes; stated: as the paper has them",
        "MACs: multiply-adds of that classifier for one image of image x image pixels",
        *(f"{', '.join(names)}: {paper}" for paper, names in papers.items()),
    ]


def cost(
    model: Annotated[str, typer.Argument(help="for example hivit_base", autocompletion=complete_model)],
    image_size: Annotated[
        int | None, typer.Option(min=16, help="pixels; the network's own if not given")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters, multiply-adds and stored activations of a network at any image size."""
    from vitpipe.benchmarks.model_cost import cost_of

    found = cost_of(model, image_size=image_size)
    if as_json:
        print_rows(found.table(), True)
        return
    height, width = found.image_size
    title = f"{model}, one image of {height} x {width} pixels"
    print_rows(found.shown_rows(), False, title, right=("value",))
