"""Write the graph of a recipe as `dvc.yaml`, for `dvc repro` on one machine.

Every stage depends on a small identity file instead of on the recipe and the source tree. Recipe, profile and
overrides are in `params.yaml` only, which `vitpipe` reads itself.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from vitpipe.config.read import run_folder
from vitpipe.contracts.artifact import CURVES, METRICS
from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.files import write_whole
from vitpipe.contracts.graph import Node
from vitpipe.contracts.provenance import UNTRACKED
from vitpipe.stages.identity import dvc_dependencies, folders_of, identity_file

# DVC fills ${...} from params.yaml in paths of `deps` and `outs`.
_RUN = run_folder("${recipe}", "${profile}")
_HEAD = """\
# The graph of the recipe that params.yaml names. `dvc repro` runs what has changed, `dvc dag` draws it.
# Written by `vitpipe compile --dvc` from the stages' entries (vitpipe/stages/*/config.py).
"""
_IGNORED = "# Times, run ids and modification stamps of vitpipe: the same inputs give the same hashes."
_IDENTITY = "what decides each stage, that is its recipe sections, code and libraries"


def render_dvc(nodes: Sequence[Node]) -> str:
    """The text of `dvc.yaml` for a recipe's graph."""
    watched = dvc_dependencies(nodes)
    stages = [_HEAD + "stages:", _identity(nodes), *(_stage(node, watched) for node in nodes)]
    return "\n".join([*stages, _shown(nodes)])


def write_dvc(nodes: Sequence[Node], path: Path) -> bool:
    """Write `dvc.yaml`; False when the file already has this content.

    Also adds what DVC shall not hash to the `.dvcignore` beside it.

    Raises:
        InputError: when `path` is a file that vitpipe did not write.
        StorageError: when the disk refuses the write.
    """
    text = render_dvc(nodes)
    if path.exists() and not path.is_file():
        raise InputError("dvc.yaml is not a file", where=path, fix="move it away")
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before == text:
        _ignore_untracked(path.with_name(".dvcignore"))
        return False
    # The head names the command that wrote it. An empty file, as `touch` leaves it, may be filled.
    if before.strip() and "vitpipe compile --dvc" not in before:
        raise InputError(
            "The file was not written by vitpipe, so it is not overwritten",
            where=path,
            fix="move your own stages to the dvc.yaml of another folder (DVC reads all of them)",
        )
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")
    _ignore_untracked(path.with_name(".dvcignore"))
    return True


def place_dependencies(nodes: Iterable[Node], run: Path) -> None:
    """Make what the stages depend on where it is not there: empty folders and files.

    DVC 3.67 hashes every dependency in `dvc repro --dry` and `dvc exp run --dry`, and ends at the first one
    that does not exist, which on a fresh clone is the first of all. A real run replaces them.

    Args:
        run: the run's folder, see `vitpipe.config.read.run_folder`.
    """
    for node in nodes:
        folder, identity = folders_of(node, run).out, identity_file(node, run)
        # A folder or file of the user's in its place is refused by the stage itself, with a reason.
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            identity.parent.mkdir(parents=True, exist_ok=True)
            # Only a missing one: a new time of modification would make DVC hash the file again.
            identity.open("x").close()


def _ignore_untracked(path: Path) -> None:
    """Add the names of volatile files; lines of the user's stay as they are."""
    with disk_errors(path):
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        missing = [name for name in UNTRACKED if name not in text.splitlines()]
        if missing:
            # Otherwise a stage that ran again with the same result would re-run all stages behind it.
            text += "" if text.endswith("\n") or not text else "\n"
            write_whole(path, text + "\n".join((_IGNORED, *missing)) + "\n")


def _identity(nodes: Iterable[Node]) -> str:
    # Runs every time (always_changed) and rewrites the identity files. DVC compares their checksums, so a
    # file with the same content re-runs nothing. Those of the first stages are its outputs, so that it runs
    # before them and so before all; with the others `dvc dag` would draw an edge to every stage.
    lines = [
        "  identity:",
        f"    desc: {_IDENTITY}",
        "    cmd: vitpipe identity",
        "    always_changed: true",
        "    outs:",
        # Small text that is written anew each time: not worth a copy in DVC's cache.
        # Persistent: the last run of the chain is judged by them, and DVC would remove them before that.
        *(
            f"      - {identity_file(node, _RUN)}: {{cache: false, persist: true}}"
            for node in nodes
            if not node.inputs
        ),
    ]
    return "\n".join(lines) + "\n"


def _shown(nodes: Iterable[Node]) -> str:
    """What `dvc metrics`, `dvc plots`, `dvc params` and `dvc exp show` read, at the top level.

    As outputs of their stages they would lie inside another output, the stage's folder, which DVC refuses.
    """
    nodes = list(nodes)
    lines = ["params:", "  - params.yaml"]
    # Those that measure a result: counts of images and of verdicts would be most of a table's columns.
    measured = [f"  - {folders_of(node, _RUN).out}/{METRICS}" for node in nodes if node.stage.headline]
    if measured:  # DVC refuses an empty list
        lines += ["", "metrics:", *measured]
    drawn = [(node, column) for node in nodes for column in node.stage.curves]
    if drawn:
        lines += ["", "plots:"]
    for node, column in drawn:
        lines += [
            f"  - {_scalar(f'{node.name} {column}')}:",
            "      x: step",
            "      y:",
            f"        {folders_of(node, _RUN).out}/{CURVES}: {_scalar(column)}",
        ]
    return "\n".join(lines) + "\n"


def _scalar(text: str) -> str:
    return yaml.safe_dump(text, width=math.inf, allow_unicode=True).splitlines()[0]


def _stage(node: Node, watched: Mapping[str, Collection[str]]) -> str:
    folders = folders_of(node, _RUN)
    lines = [
        f"  {node.name}:",
        # As YAML writes it: a plugin's summary may hold a colon.
        f"    desc: {_scalar(node.stage.summary)}",
        # No folder, recipe or override in the command: DVC passes it to a shell with the values of
        # params.yaml unquoted, so a recipe named "; touch x" would run touch. No quoting is safe for every
        # value.
        f"    cmd: vitpipe run {node.name}",
        "    deps:",
        f"      - {identity_file(node, _RUN)}",
        *(f"      - {folder}" for name, folder in folders.inputs.items() if name in watched[node.name]),
        "    outs:",
        # DVC deletes an output before it runs the stage, unless it is persistent.
        f"      - {folders.out}" + (": {persist: true}" if node.stage.keeps_output else ""),
    ]
    return "\n".join(lines) + "\n"
