"""Read the tensors of official checkpoint files without running code in them.

torch's safe loader (`weights_only=True`) restores tensors, numbers, text and plain containers, and refuses
everything that only running code could restore. Some released files hold such objects beside the weights.
Those that are known and harmless are replaced by placeholders, so that their code does not run either.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.weights import MAX_NAMED, KeyRow, load_state

# Where released files keep their weights: `model` (MAE, iTPN, RevCol), `module` (second choice of iTPN's
# tools), `state_dict` (detectors and segmentors of mmdet and mmseg), `state_dict_ema` (RevCol; may be None).
_ENTRIES = ("model", "module", "state_dict", "state_dict_ema")


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


class _Placeholder:
    """Created in place of an object that is not needed, with any arguments."""

    def __init__(self, *_: object) -> None:
        pass


# iTPN's files hold the command line (`args`); RevCol's their settings (a dict subclass of yacs, restored as a
# dict without importing yacs) and, by mistake, Python's function `input`. A file may also *call* what it
# names: calling the placeholder does nothing, calling `input` would ask the user.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_Placeholder, "builtins.input"),
]

# What torch and pickle raise for truncated files and altered bytes; tests alter random bytes to find others.
# Not `Exception`: that would hide defects of this program.
_FROM_DAMAGED_FILES = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_checkpoint(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """The named tensors of a checkpoint file.

    Args:
        path: .pth, or .safetensors, which has no entries.
        entry: the one that holds them; without it the first of `model`, `module`, `state_dict` and
            `state_dict_ema` (averaged weights) with tensors, or else the file's top level.

    Raises:
        CheckpointError: when the file is missing, truncated, holds code or holds no weights.
    """
    # safetensors holds tensors and text only, so it needs no precautions.
    if path.suffix == ".safetensors":
        return load_state(path)
    if not path.is_file():
        raise CheckpointError("The checkpoint does not exist", where=path, fix="correct the path")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch names the first object that it refuses ("Unsupported global: GLOBAL a.b ..."). Its own advice,
        # several lines long, is not passed on: it includes weights_only=False for the whole file.
        named = re.search(r"GLOBAL (\S+)", str(error))
        objects = f"{named[1]} and perhaps more" if named else "objects"
        raise CheckpointError(
            f"The checkpoint is damaged, or holds {objects} that only running code could restore",
            where=path,
            fix="download it again; if you trust its source, save only the tensors, where its authors' "
            "code is installed, and convert those: python -c \"import torch; c = torch.load('FILE', 'cpu', "
            "weights_only=False); torch.save({'model': c['model']}, 'tensors.pth')\"",
        ) from error
    except _FROM_DAMAGED_FILES as error:
        raise CheckpointError(
            f"The checkpoint is truncated or is no torch file ({type(error).__name__})",
            where=path,
            fix="download or copy it again and compare its size",
        ) from error
    return _tensors_of(content, path, entry)


def _tensors_of(content: Any, path: Path, entry: str | None) -> dict[str, Tensor]:
    if isinstance(content, dict):
        found = (content[name] for name in ([entry] if entry else _ENTRIES) if _is_state(content.get(name)))
        inner = next(found, {} if entry else content)
        tensors = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
        if tensors:
            # Files saved from inside DistributedDataParallel or DataParallel have this prefix on every name.
            return {name.removeprefix("module."): value for name, value in tensors.items()}
    raise CheckpointError(
        f"The checkpoint holds no weights{f' in its entry {entry}' if entry else ''}",
        where=path,
        fix=f"give a file with named tensors, plain or under one of {', '.join(_ENTRIES)}",
    )


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def misfit(problems: list[str], where: str | Path) -> CheckpointError:
    """The error for a checkpoint whose keys or shapes are not those of the network it was recognised as."""
    more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
    return CheckpointError(
        "The checkpoint's keys or shapes differ from those of the network it was recognised as: "
        f"{'; '.join(problems[:MAX_NAMED])}{more}",
        where=where,
        fix="download it again; a checkpoint of changed code cannot be converted",
    )
