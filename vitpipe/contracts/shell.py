"""Commands in messages, written so that they can be copied and run as printed.

`make setup` puts the programs into `.venv/bin`, which is on no path until somebody activates the environment.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

# Programs of the environment that our messages name.
_PROGRAMS = ("vitpipe", "dvc", "mlflow", "kfp")
_IN_CODE = re.compile(rf"`({'|'.join(_PROGRAMS)})(?=[ `])")


def typed(program: str) -> str:
    """`program` with as much of its path as a shell beside this process needs.

    `make demo` puts the environment on the path of what it starts, so the path says nothing about the shell
    where a printed command will be typed; an activated environment names itself there.
    """
    activated = (os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX"))
    own = Path(sys.prefix)
    if sys.prefix == sys.base_prefix or any(folder and Path(folder) == own for folder in activated):
        return program
    folder, here = own / "bin", Path.cwd()
    inside = folder.is_relative_to(here)
    shown = str(folder.relative_to(here)) if inside else str(folder)
    if program == "dvc":  # it starts `vitpipe` by name, so a path to dvc alone is not enough
        return f"PATH={'$PWD/' if inside else ''}{shlex.quote(shown)}:$PATH dvc"
    return shlex.quote(f"{shown}/{program}")


def with_typed_commands(text: str) -> str:
    """A message whose commands in code spans (`vitpipe plan`) can be typed."""
    return _IN_CODE.sub(lambda found: f"`{typed(found[1])}", text)
