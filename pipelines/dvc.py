"""The same graph for the laptop: write `dvc.yaml`.

DVC depends on one small identity file per stage instead of on the recipe and the source tree. The first stage
writes these files on every run; a file whose content did not change re-runs nothing. Recipe, profile and
overrides stand in `params.yaml` only, which `vitpipe` reads itself.

DVC puts values of `params.yaml` into paths, and hands commands to a shell. So no command names a folder: a
value may hold anything that a shell would run, and no quoting holds for every value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vitpipe.config.read import run_folder
from vitpipe.contracts.errors import InputError, disk_errors
from vitpipe.contracts.graph import Node
from vitpipe.stages.identity import folders_of, identity_file

_RUN = run_folder("${recipe}", "${profile}")
_HEAD = """\
# The graph of the recipe that params.yaml names. `dvc repro` runs what has changed, `dvc dag` draws it.
# Written by `vitpipe compile --dvc` from vitpipe/contracts/graph.py.
"""
_ABOUT = {
    "identity": "what decides each stage, that is its recipe sections, code and libraries",
    "prepare": "raw images to verified shards",
    "pretrain": "pre-training without labels",
    "intermediate": "fine-tuning on the larger label set",
    "finetune": "fine-tuning on the target classes",
    "probe": "frozen features by nearest neighbours and a linear classifier",
    "detect": "detection and instance segmentation on COCO",
    "segment": "semantic segmentation on ADE20K",
    "evaluate": "accuracy, cost and throughput of the result",
    "report": "every result beside the published row",
}


def render_dvc(nodes: Sequence[Node]) -> str:
    """The text of `dvc.yaml` for a recipe's graph."""
    return "\n".join([_HEAD + "stages:", _identity(nodes), *(_stage(node) for node in nodes)])


def write_dvc(nodes: Sequence[Node], path: Path) -> bool:
    """Write `dvc.yaml`; False when it was so already.

    Raises:
        InputError: when `path` is somebody's own file.
        StorageError: when the disk refuses the write.
    """
    text = render_dvc(nodes)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if before == text:
        return False
    if before.strip() and "vitpipe compile --dvc" not in before:
        raise InputError(
            "The file was not written by vitpipe; nothing was touched",
            where=path,
            fix="move your own stages to the dvc.yaml of another folder (DVC reads all of them)",
        )
    with disk_errors(path):
        path.write_text(text, encoding="utf-8")
    return True


def _identity(nodes: Iterable[Node]) -> str:
    lines = [
        "  identity:",
        f"    desc: {_ABOUT['identity']}",
        "    cmd: vitpipe identity",
        "    always_changed: true",
        "    outs:",
        *(f"      - {identity_file(node, _RUN)}: {{cache: false}}" for node in nodes),
    ]
    return "\n".join(lines) + "\n"


def _stage(node: Node) -> str:
    folders = folders_of(node, _RUN)
    lines = [
        f"  {node.name}:",
        f"    desc: {_ABOUT[node.name]}",
        f"    cmd: vitpipe run {node.name}",
        "    deps:",
        f"      - {identity_file(node, _RUN)}",
        *(f"      - {folder}" for folder in folders.inputs.values()),
        "    outs:",
        # Kept until the new one is complete: sets that have not changed are taken from it, not packed again.
        f"      - {folders.out}" + (": {persist: true}" if node.name == "prepare" else ""),
    ]
    return "\n".join(lines) + "\n"
