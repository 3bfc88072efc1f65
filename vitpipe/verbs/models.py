"""The verbs `models` and `cost`: the networks, and what one of them costs at any image size."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import format_billions, format_millions
from vitpipe.verbs.completion import complete_model
from vitpipe.verbs.options import JsonOption, SetOption
from vitpipe.verbs.show import print_rows

if TYPE_CHECKING:
    from vitpipe.benchmarks.model_cost import Cost
    from vitpipe.config.model import ModelEntry

_IMAGENET = 1000
_DENSE_CLASSES = {"detect": 80, "segment": 150}  # COCO, ADE20K
_DETECTION_SIZE = (800, 1280)  # height and width at which papers count detectors


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
    name: Annotated[
        str,
        typer.Argument(
            help="a model, for example hivit_base; with --stage a recipe, for example paca/coco/tiny",
            autocompletion=complete_model,
        ),
    ],
    image_size: Annotated[
        str | None,
        typer.Option(
            help="pixels, one side or WIDTHxHEIGHT  [default: the network's own; 1280x800 for detect, "
            "the crop of segment]"
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="detect or segment: the whole network of this stage of a recipe")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="of the heads  [default: 1000; 80 for detect, 150 for segment]")
    ] = None,
    profile: Annotated[str, typer.Option(help="of the recipe")] = "full",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Parameters, multiply-adds and stored activations of a network at any image size."""
    size = None if image_size is None else _size(image_size)
    if stage is None:
        from vitpipe.benchmarks.model_cost import cost_of

        found, note = cost_of(name, image_size=size, num_classes=classes or _IMAGENET), ""
    else:
        found, note = _dense_cost(name, stage, size, classes, profile, overrides or [])
    if as_json:
        print_rows(found.table(), True)
        return
    height, width = found.image_size
    title = f"{name}, one image of {width} x {height} pixels"
    print_rows(found.shown_rows(), False, title, right=("value",))
    if note:
        print(note)


def _dense_cost(
    name: str,
    stage: str,
    size: tuple[int, int] | None,
    classes: int | None,
    profile: str,
    overrides: list[str],
) -> tuple[Cost, str]:
    """The cost of a recipe's detector or segmentor, and what is counted."""
    from vitpipe.benchmarks.dense_cost import DENSE_CONVENTIONS, dense_cost
    from vitpipe.config.read import load_recipe

    if stage not in DENSE_CONVENTIONS:
        known = " or ".join(DENSE_CONVENTIONS)
        raise InputError(
            f"'{stage}' is no stage whose network can be counted", where="--stage", fix=f"name {known}"
        )
    # The place of the data does not matter here, and a recipe at full size has none.
    recipe = load_recipe(name, profile, ["data.root=.", *overrides])
    if size is None and recipe.segment is not None and stage == "segment":
        size = (recipe.segment.crop_size, recipe.segment.crop_size)
    number = classes or _DENSE_CLASSES[stage]
    found = dense_cost(recipe, stage, size or _DETECTION_SIZE, number)  # type: ignore[arg-type]
    return found, f"{number} classes; counted: {DENSE_CONVENTIONS[stage]}"


def _size(text: str) -> tuple[int, int]:
    """`224` or `1280x800` (width x height) as (height, width).

    Raises:
        InputError: when it is neither.
    """
    found = re.fullmatch(r"([1-9]\d{1,4})(?:x([1-9]\d{1,4}))?", text)
    if found is None:
        raise InputError(
            f"'{text}' is no image size",
            where="--image-size",
            fix="write a side in pixels, for example 224, or 1280x800 (width x height)",
        )
    return int(found[2] or found[1]), int(found[1])
