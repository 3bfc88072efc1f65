"""The verbs of the Kubeflow side: compile, local, submit. The command line mounts them."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
