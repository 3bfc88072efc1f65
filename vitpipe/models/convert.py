"""Convert official checkpoints to our names, with a report on every key.

Each family's rules are in its `conversion.py`, where it has official checkpoints. Files are read in
`official.py`, without running code in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from vitpipe.config.model import FAMILIES, family_names
from vitpipe.contracts.discovery import part_of, source_of
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.official import Conversion, misfit
from vitpipe.models.official import read_checkpoint as read_checkpoint
from vitpipe.models.weights import LoadReport, is_safetensors, save_weights


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint.

    Attributes:
        state: weights under our names.
        kind: which network they are of.
        model: name in the registry.
        report: one row per official name.
    """

    state: dict[str, Tensor]
    kind: str
    model: str
    report: LoadReport


def convert(path: Path, out: Path, *, kind: str = "auto", entry: str | None = None) -> LoadReport:
    """Convert an official checkpoint file to a safetensors file that `transfer_weights` reads.

    Args:
        path: the .pth (or .safetensors) file.
        out: the file to write; its metadata name the source, its SHA-256, the kind and the model.
        kind: what the file must be; `auto` takes what its keys show.
        entry: of the .pth file, for example `state_dict_ema`; see `read_checkpoint`.

    Raises:
        CheckpointError: when the file cannot be read, is of another kind or size, or a key is missing, has
            another shape or is not known; when `out` is the checkpoint itself or another file that is no
            safetensors file.
        StorageError: when `out` cannot be written.
    """
    # First: reading a large checkpoint takes long, and a wrong --out can be reported at once.
    _check_target(path, out)
    converted = convert_state(read_checkpoint(path, entry), kind=kind, where=path)
    # Of the whole file as released, so that it can be compared with what the authors publish.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {
        "kind": converted.kind,
        "model": converted.model,
        "source": path.name,
        "source_sha256": digest,
    }
    save_weights(converted.state, out, metadata)
    return converted.report


def _check_target(path: Path, out: Path) -> None:
    """Check that `out` is new or a safetensors file, and not the source under any name."""
    if not out.exists():
        return
    # By inode, not by path: a link or another spelling of the path is the same file.
    is_source = path.exists() and out.samefile(path)
    if is_source or not out.is_file() or not is_safetensors(out):
        raise CheckpointError(
            "The converted weights would replace their source"
            if is_source
            else "The output file exists and is no safetensors file",
            where=out,
            fix="give another --out, ending in .safetensors",
        )


def conversions() -> list[Conversion]:
    """The conversions of all families that have official checkpoints, in alphabetical order.

    Raises:
        InputError: when a plugin's cannot be imported.
    """
    having = (name for name in family_names() if source_of(f"{FAMILIES}.{name}.conversion"))
    return [part_of(FAMILIES, name, "conversion", "CONVERSION", Conversion) for name in having]


def convert_state(official: Mapping[str, Tensor], *, kind: str = "auto", where: str | Path = "") -> Converted:
    """Rename the tensors of an official state and compare names and shapes with our network's.

    Args:
        official: name -> tensor, as released.
        kind: as for `convert`.
        where: the file, for messages.

    Raises:
        CheckpointError: as `convert`.
    """
    known = conversions()
    renamed = next((found for each in known if (found := each.rename(official, where)) is not None), None)
    if renamed is None:
        kinds = ", ".join(kind for each in known for kind in each.kinds)
        raise CheckpointError(
            f"The checkpoint is of no known kind (first keys: {', '.join(sorted(official)[:3])})",
            where=where,
            fix=f"give a checkpoint of one of the known kinds: {kinds}",
        )
    if kind not in ("auto", renamed.kind):
        raise CheckpointError(
            f"The checkpoint is of kind {renamed.kind}, not {kind}",
            where=where,
            fix="pass kind='auto', or give another checkpoint",
        )
    _check(renamed.state, renamed.network, where)
    report = LoadReport(str(where), renamed.rows)
    return Converted(dict(renamed.state), renamed.kind, renamed.model, report)


def _check(state: Mapping[str, Tensor], network: nn.Module, where: str | Path) -> None:
    """Check that a state has every name of the network, with its shape, and nothing else."""
    # Strict, and with all problems in one error: `load_state_dict(strict=False)` would drop a misspelt key
    # and leave random weights in its place.
    needed = network.state_dict()
    problems = [f"{name} is missing" for name in needed if name not in state]
    problems += [f"{name} is not in the network" for name in state if name not in needed]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, not {tuple(needed[name].shape)}"
        for name, tensor in state.items()
        if name in needed and tensor.shape != needed[name].shape
    ]
    if problems:
        raise misfit(problems, where)
