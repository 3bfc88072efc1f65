"""Options of the verbs `compile`, `local` and `submit`, and how their texts are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from vitpipe.contracts.errors import InputError
from vitpipe.verbs.options import chosen_recipe

ImageOption = Annotated[
    list[str] | None,
    typer.Option("--image", help="train=REFERENCE or dense=REFERENCE, preferably with a digest"),
]
PlacementOption = Annotated[
    Path | None, typer.Option("--placement", help="YAML with a cluster's node labels, tolerations, volumes")
]
PackageOption = Annotated[
    Path | None, typer.Option("--package", help="a compiled package  [default: compile one now]")
]
ArgumentOption = Annotated[
    list[str] | None, typer.Option("--argument", help="pipeline parameter NAME=VALUE, the value in YAML")
]
# At an endpoint. The variables are kfp's own where it has one; secrets in arguments are seen by others.
ExperimentOption = Annotated[str, typer.Option(help="created when it does not exist")]
NamespaceOption = Annotated[str | None, typer.Option(help="Kubernetes namespace, for a multi-user endpoint")]
ServiceAccountOption = Annotated[
    str | None, typer.Option(help="Kubernetes service account of the run's pods")
]
TokenOption = Annotated[str | None, typer.Option(envvar="KFP_TOKEN", help="bearer token")]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(envvar="KF_PIPELINES_SA_TOKEN_PATH", help="file with a service account's token"),
]
ClientIdOption = Annotated[
    str | None,
    typer.Option(
        envvar="KF_PIPELINES_IAP_OAUTH2_CLIENT_ID", help="OAuth client ID of Google's Identity-Aware Proxy"
    ),
]
CookiesOption = Annotated[
    str | None, typer.Option(envvar="KFP_COOKIES", help="cookies of a browser session (Dex)")
]
CaFileOption = Annotated[
    Path | None, typer.Option(envvar="KFP_CA_FILE", help="PEM file of the certificate's authority")
]


def chosen(
    recipe: str | None, profile: str | None, overrides: list[str] | None, params: Path
) -> tuple[str, str, tuple[str, ...]]:
    """Recipe, profile and overrides from the command line, else from params.yaml."""
    found = chosen_recipe(recipe, profile, overrides, params)
    return found.recipe, found.profile, found.overrides


def arguments_of(texts: list[str] | None) -> dict[str, Any]:
    """Pipeline parameters of the texts of --argument.

    Raises:
        InputError: as `pairs`, or a value is not YAML.
    """
    import yaml

    from vitpipe.config.yaml_core import plain, read_yaml

    # YAML, because a pipeline parameter is typed: a list must arrive as a list, not as its text.
    arguments = {}
    for name, value in pairs(texts, "--argument").items():
        try:
            arguments[name] = plain(read_yaml(value))
        except yaml.YAMLError as error:
            raise InputError(
                f"The value of '{name}' is not YAML",
                where="--argument",
                fix="quote text that contains special characters, for example overrides=['data.root=/a?b']",
            ) from error
    return arguments


def pairs(texts: list[str] | None, option: str, known: tuple[str, ...] = ()) -> dict[Any, str]:
    """Parse `NAME=VALUE` texts into a mapping.

    Args:
        known: allowed names; all when empty.

    Raises:
        InputError: when a text is not of that form, or its name is not allowed or stands twice.
    """
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name or not value or (known and name not in known):
            names = f" with NAME one of {', '.join(known)}" if known else ""
            raise InputError(
                f"'{text}' is not of the form NAME=VALUE{names}",
                where=option,
                fix=f"write {option} NAME=VALUE",
            )
        if name in found:
            raise InputError(f"'{name}' is given twice", where=option, fix="give it once")
        found[name] = value
    return found


def refuse_beside(option: str, fix: str, given: Mapping[str, object]) -> None:
    """Refuse options that would be ignored beside another one.

    Args:
        option: the one that makes them pointless.
        given: option -> its value; empty when it was not given.

    Raises:
        InputError: names all that were given.
    """
    if ignored := [name for name, value in given.items() if value]:
        raise InputError(
            f"{option} is given together with {', '.join(ignored)}, which would be ignored",
            where=option,
            fix=fix,
        )
