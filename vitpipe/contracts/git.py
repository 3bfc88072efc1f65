"""Ask git about a folder without changing anything in it."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from vitpipe.contracts.address import hidden

_SECONDS = 20


def ask_git(folder: Path, *arguments: str, seconds: float = _SECONDS) -> str:
    """What a git command prints, without the white space around it.

    Raises:
        OSError: there is no git.
        subprocess.SubprocessError: git refused or took too long.
    """
    # `git status` rewrites the index where it can; two of them, or the user's own commit, would meet at its
    # lock, and one that is killed leaves the lock behind.
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=seconds
    )
    return done.stdout.strip()


def git_links(folder: Path) -> dict[str, str]:
    """`git_branch` and `git_remote` of a checkout, as far as there are any; for showing."""
    found = {}
    for name, question in (
        ("git_branch", ("rev-parse", "--abbrev-ref", "HEAD")),
        ("git_remote", ("remote", "get-url", "origin")),
    ):
        with suppress(OSError, subprocess.SubprocessError):
            found[name] = hidden(ask_git(folder, *question))
    return found
