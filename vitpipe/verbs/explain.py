"""The verb `explain`: what a trained classifier looks at in the user's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.units import counted
from vitpipe.verbs.options import ProfileOption, SetOption
from vitpipe.verbs.show import print_progress


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="explain")(explain)


def explain(
    network: Annotated[
        Path, typer.Argument(help="folder of a run, artifacts/RECIPE/PROFILE, or a weights file")
    ],
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    out: Annotated[Path, typer.Option("--out", help="output folder, new or empty")],
    stage: Annotated[
        int | None, typer.Option(min=1, max=4, help="stage of the network whose clusters are shown")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="soft or binary")] = None,
    threshold: Annotated[float | None, typer.Option(help="of binary masks, below 1")] = None,
    columns: Annotated[int | None, typer.Option(min=1, help="masked images in a row")] = None,
    label: Annotated[
        str | None,
        typer.Option("--class", help="that all images are of  [default: what the network says of each]"),
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="of a weights file")] = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
) -> None:
    """Show what a trained classifier looks at: clusters of an image (PaCa), or attention.

    Options that are not given have the values of the recipe's section explain.
    """
    _check(network, recipe, profile, overrides)
    from vitpipe.stages.launch import share_the_cores

    share_the_cores()
    import torch

    from vitpipe.stages.explain.own_images import (
        classifier_of_run,
        classifier_of_weights,
        explain_own_images,
        image_files,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = image_files(images)
    if network.is_dir():
        trained = classifier_of_run(network, device)
    else:
        from vitpipe.config.read import load_recipe

        assert recipe is not None
        trained = classifier_of_weights(
            network, load_recipe(recipe, profile or "full", overrides or ()), device
        )
    given = {"stage": stage, "mask": mask, "threshold": threshold, "columns": columns}
    section = _section(trained.recipe, {name: value for name, value in given.items() if value is not None})
    metrics = explain_own_images(
        trained, files, out, section, label=label, say=lambda name: print_progress(f"wrote {name}")
    )
    print(f"{counted(len(files), 'image')} explained in {out}")
    for name, value in metrics.items():
        print(f"  {name} {value:.3f}")


def _check(network: Path, recipe: str | None, profile: str | None, overrides: list[str] | None) -> None:
    """Refuse options that would be ignored, and networks that are not there."""
    if network.is_dir() and (recipe or profile or overrides):
        raise InputError(
            "A run has its own recipe", where="--recipe, --profile, --set", fix="leave these options out"
        )
    if network.is_file() and recipe is None:
        raise InputError(
            "A weights file does not say which recipe's network it is",
            where=network,
            fix="name it by --recipe, for example --recipe paca/imagenet/small",
        )
    if not network.exists():
        raise InputError(
            "There is no such run or file", where=network, fix="give the folder of a run, or a weights file"
        )


def _section(recipe: Any, given: dict[str, Any]) -> Any:
    """The recipe's section explain with other values; the defaults where the recipe has none."""
    from pydantic import ValidationError

    from vitpipe.stages.explain.config import ExplainConfig

    own = getattr(recipe, "explain", None)
    values = {**(own.model_dump() if own is not None else {}), **given}
    try:
        return ExplainConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise InputError(
            f"--{name} {values.get(name)}: {first['msg']}",
            where=f"--{name}",
            fix="see vitpipe explain --help",
        ) from error
