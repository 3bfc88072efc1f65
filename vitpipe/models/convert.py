"""Convert official checkpoints to our names, with a report on every key.

Each family's rules are in its `conversion.py`, where it has official checkpoints. Files are read in
`official.py`, without running code in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from vitpipe.config.model import FAMILIES, family_names
from vitpipe.contracts.discovery import part_of, source_of
from vitpipe.contracts.errors import CheckpointError, disk_errors, some
from vitpipe.contracts.units import counted
from vitpipe.models.foreign import foreign_network
from vitpipe.models.official import Conversion, Renamed, misfit, open_checkpoint
from vitpipe.models.official import read_checkpoint as read_checkpoint
from vitpipe.models.weights import KeyRow, LoadReport, is_safetensors, save_weights

# Parts of a larger model that a network may be, in any nesting: a wrapper's, DINO's, a detector's.
_PARTS = (
    "model.", "backbone.", "encoder.", "network.", "net.", "teacher.", "student.", "module.", "_orig_mod.",
)  # fmt: skip


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
    checkpoint = open_checkpoint(path, entry)
    converted = convert_state(checkpoint.state, kind=kind, where=path)
    # Of the whole file as released, so that it can be compared with what the authors publish.
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    metadata = {
        "kind": converted.kind,
        "model": converted.model,
        "source": path.name,
        "source_sha256": digest,
    }
    if checkpoint.entry:
        metadata["entry"] = checkpoint.entry
    # Only now: a refused checkpoint leaves no empty folder behind.
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        save_weights(converted.state, out, metadata)
    return replace(converted.report, note=checkpoint.choice)


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
    # `clip` is no family: its networks are teachers only.
    having = (
        name for name in sorted({*family_names(), "clip"}) if source_of(f"{FAMILIES}.{name}.conversion")
    )
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
    kinds = ", ".join(kind for each in known for kind in each.kinds)
    _refuse_no_parameters(official, where)
    renamed = _renamed(official, known, where)
    if renamed is None and (foreign := foreign_network(official)):
        raise CheckpointError(
            f"The checkpoint is of {foreign}, which vitpipe does not have",
            where=where,
            fix=f"give a checkpoint of one of the known kinds: {kinds}",
        )
    if renamed is None:
        raise CheckpointError(
            f"The checkpoint is of no known kind (first keys: {', '.join(sorted(official)[:3])})",
            where=where,
            fix=f"give a checkpoint of one of the known kinds: {kinds}",
        )
    _refuse_not_finite(official, where)
    if kind not in ("auto", renamed.kind):
        raise CheckpointError(
            f"The checkpoint is of kind {renamed.kind}, not {kind}",
            where=where,
            fix="pass kind='auto', or give another checkpoint",
        )
    _check(renamed.state, renamed.network, where)
    report = LoadReport(str(where), renamed.rows)
    return Converted(dict(renamed.state), renamed.kind, renamed.model, report)


def _renamed(
    official: Mapping[str, Tensor], known: Sequence[Conversion], where: str | Path
) -> Renamed | None:
    """The state under our names, also where the network is one part of a larger model."""
    for each in known:
        if (found := each.rename(official, where)) is not None:
            return found
    for prefix in _PARTS:
        full = {name.removeprefix(prefix): name for name in official if name.startswith(prefix)}
        if full and prefix == "backbone.":  # mmpretrain's classifiers have their head beside it
            head = "head.fc."
            full |= {f"head.{name.removeprefix(head)}": name for name in official if name.startswith(head)}
        inside = {name: official[there] for name, there in full.items()}
        if not inside or (found := _renamed(inside, known, where)) is None:
            continue
        rows = [replace(row, source=full.get(row.source, row.source)) for row in found.rows]
        rows += [
            KeyRow(name, "", tuple(tensor.shape), "dropped", f"outside of {prefix}*")
            for name, tensor in official.items()
            if name not in full.values()
        ]
        return replace(found, rows=tuple(rows))
    return None


def _refuse_no_parameters(official: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights and biases that are single numbers, empty, or whole numbers: no network has such."""
    # Before any family reads sizes: an index into the shape of a number would end in a traceback.
    odd = [
        f"{name} {tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in official.items()
        if name.endswith((".weight", ".bias"))
        and (tensor.ndim == 0 or tensor.numel() == 0 or not tensor.is_floating_point())
    ]
    if odd:
        raise CheckpointError(
            f"{len(odd)} of {counted(len(official), 'tensor')} cannot be parameters: {some(odd, 2)}",
            where=where,
            fix="download or copy the checkpoint again; whole numbers must be converted back to floats first",
        )


def _refuse_not_finite(official: Mapping[str, Tensor], where: str | Path) -> None:
    """Refuse weights of a training that has diverged: whatever starts from them gives NaN."""
    wrong = [
        name for name, tensor in official.items() if not tensor.is_meta and not bool(tensor.isfinite().all())
    ]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} of {counted(len(official), 'tensor')} with values that are not finite: "
            f"{some(wrong, 2)}",
            where=where,
            fix="give a checkpoint from before the training diverged",
        )


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
