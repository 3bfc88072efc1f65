"""Read the tensors of checkpoint files as people have them, without running code in them."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models import inert_pickle
from vitpipe.models.inert_pickle import StandIn
from vitpipe.models.torchscript import is_torchscript, read_torchscript
from vitpipe.models.weights import MAX_NAMED, KeyRow, load_state

# Where files keep their weights, in the order of preference: `model` (MAE, iTPN, RevCol), `module` (iTPN's
# tools), `state_dict` (OpenMMLab), averaged weights under several names, DINO's teacher and student.
_ENTRIES = (
    "model", "module", "state_dict", "state_dict_ema", "model_ema", "ema", "teacher", "student",
)  # fmt: skip
_MAX_ITEM = 8  # bytes of a number: numpy's longer floats have no type in torch
# Wrappers whose names say nothing about the network: DistributedDataParallel, torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
# Why no network takes what drloc has beside its classifiers.
LOCATION_MLP = "the localisation MLP of drloc, for its loss only"


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file.

    Attributes:
        state: name -> tensor, without the prefixes of wrappers.
        entry: where in the file they are; empty for its top level.
        others: entries of the file that hold weights, too.
        is_torchscript: whether the file is a program with its weights; the program was not run.
    """

    state: dict[str, Tensor]
    entry: str = ""
    others: tuple[str, ...] = ()
    is_torchscript: bool = False

    @property
    def choice(self) -> str:
        """What was chosen, where there was a choice; empty else."""
        if not self.others:
            return ""
        return f"Took the entry '{self.entry}'; --entry chooses another: {', '.join(self.others)}"


@dataclass(frozen=True)
class Renamed:
    """An official state under our names.

    Attributes:
        kind: which network it is of, one of the family's `Conversion.kinds`.
        model: name in the registry.
        state: our name -> tensor.
        network: ours of that kind and size, on the meta device.
        rows: one for every official name.
    """

    kind: str
    model: str
    state: Mapping[str, Tensor]
    network: nn.Module
    rows: tuple[KeyRow, ...]


@dataclass(frozen=True)
class Conversion:
    """How a family renames official checkpoints; `CONVERSION` in its conversion.py, where there are any.

    Attributes:
        kinds: names of the networks that were released.
        rename: official state and file (for messages) -> the state under our names; `None` when it is not of
            this family.
    """

    kinds: tuple[str, ...]
    rename: Callable[[Mapping[str, Tensor], str | Path], Renamed | None]


# What torch and pickle raise for truncated files and altered bytes; tests alter random bytes to find others.
# Not `Exception`: that would hide defects of this program.
_FROM_DAMAGED_FILES = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    OverflowError,
    pickle.PickleError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
)


def read_checkpoint(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file, see `open_checkpoint`."""
    return open_checkpoint(path, entry).state


def open_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """Read a checkpoint file; no code in it is run.

    Args:
        path: of `torch.save` in any version, of `torch.jit.save`, a pickle of numpy arrays, or .safetensors;
            the second and the last have no entries.
        entry: the one that holds them; without it the first of `model`, `module`, `state_dict`, averaged
            weights, `teacher`, `student` with tensors, or else the file's top level or its only entry.

    Raises:
        CheckpointError: when the file is missing, truncated or holds no weights.
    """
    # safetensors holds tensors and text only, so it needs no precautions.
    if path.suffix == ".safetensors":
        return Checkpoint(_unwrapped(load_state(path)))
    if not path.is_file():
        raise CheckpointError("The checkpoint does not exist", where=path, fix="correct the path")
    try:
        if is_torchscript(path):
            _compare_checksums(path)
            return Checkpoint(_unwrapped(_tensors(read_torchscript(path))), is_torchscript=True)
        content = _content_of(path)
    except _FROM_DAMAGED_FILES as error:
        raise CheckpointError(
            f"The checkpoint is truncated, damaged or no torch file ({_reason(error)})",
            where=path,
            fix="download or copy it again and compare its size",
        ) from error
    return _weights_of(content, path, entry)


def _reason(error: Exception) -> str:
    # Only the checksum's own message says more than its type.
    return str(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__


def _content_of(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        _compare_checksums(path)
    try:
        # Not torch's own safe loader, which refuses a file for one object beside the weights: here such an
        # object becomes a stand-in.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert_pickle)
    except _FROM_DAMAGED_FILES:
        if is_zip:
            raise
        with path.open("rb") as file:  # a pickle without torch's frame, as Detectron2's
            return inert_pickle.load(file, encoding="latin1")


def _compare_checksums(path: Path) -> None:
    # torch does not: a flipped bit would become a wrong weight without a word.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} does not have its checksum")


def _weights_of(content: Any, path: Path, entry: str | None) -> Checkpoint:
    if isinstance(content, StandIn) and not _is_state(content):
        raise CheckpointError(
            f"The checkpoint is a whole object ({content.stands_for}), which only its own code could restore",
            where=path,
            fix="save the named tensors where the code is installed: torch.save(network.state_dict(), FILE)",
        )
    if isinstance(content, dict):
        states = [name for name, value in content.items() if isinstance(name, str) and _is_state(value)]
        known = [name for name in _ENTRIES if name in states]
        ordered = known + [name for name in states if name not in known]
        # The tensors themselves at the top level: its entries that are states are something else.
        if entry is None and _is_state(content) and not known:
            return Checkpoint(_unwrapped(_tensors(content)))
        chosen = next(iter(ordered), None) if entry is None else entry
        if chosen in states:
            others = tuple(name for name in ordered if name != chosen)
            return Checkpoint(_unwrapped(_tensors(content[chosen])), str(chosen), others)
        if states:
            raise CheckpointError(
                f"The checkpoint holds no weights in its entry {entry}",
                where=path,
                fix=f"give one of --entry {', '.join(ordered)}",
            )
    raise CheckpointError(
        f"The checkpoint holds no weights{f' in its entry {entry}' if entry else ''}",
        where=path,
        fix=f"give a file with named tensors, plain or under one of {', '.join(_ENTRIES)}",
    )


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, Tensor | np.ndarray) for item in value.values())


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The plain tensors of a state; numpy's arrays as tensors.

    Sparse, quantised and complex ones, and those without memory, are no weights of our networks: one that
    needs the name is then reported as incomplete.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        is_array = isinstance(value, np.ndarray)
        if is_array and value.dtype.kind in "biuf" and value.dtype.itemsize <= _MAX_ITEM:
            native = value.astype(value.dtype.newbyteorder("="), copy=False)
            found[str(name)] = torch.from_numpy(np.ascontiguousarray(native))
        elif (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and not (value.is_quantized or value.is_complex() or value.is_meta)
        ):
            found[str(name)] = value.detach()
    return found


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefixes of wrappers, in any nesting."""

    def plain(name: str) -> str:
        while prefix := next((each for each in _WRAPPERS if name.startswith(each)), ""):
            name = name.removeprefix(prefix)
        return name

    # Of different wrappers, two names could become one: then nothing is taken off.
    names = [plain(name) for name in state]
    return dict(zip(names if len(set(names)) == len(names) else state, state.values(), strict=True))


def misfit(problems: list[str], where: str | Path) -> CheckpointError:
    """The error for a checkpoint whose keys or shapes are not those of the network it was recognised as."""
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    return CheckpointError(
        "The checkpoint's keys or shapes differ from those of the network it was recognised as: "
        f"{'; '.join(problems[:MAX_NAMED])}{more}",
        where=where,
        fix="download it again; a checkpoint of changed code cannot be converted",
    )
