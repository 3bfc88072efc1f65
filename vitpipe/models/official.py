"""Official checkpoint files: their tensors, without running what else is in them.

Torch's safe loader (`weights_only=True`) restores tensors, numbers, text and plain containers, and refuses
everything that only running code could restore. Some released files keep such a thing beside the weights.
Where it is known and harmless, its name is given a stand-in, so that not even then code of others runs.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.weights import KeyRow, load_state

Kind = Literal["itpn_pixel_pretrain", "itpn_pixel_classifier", "itpn_pixel_dense", "revcol_classifier"]

_ENTRIES = ("model", "module", "state_dict", "state_dict_ema")


@dataclass(frozen=True)
class Renamed:
    """An official state under our names.

    Attributes:
        model: name in the registry.
        network: ours of that kind and size, on the meta device.
        rows: one for every official name.
    """

    kind: Kind
    model: str
    state: Mapping[str, Tensor]
    network: nn.Module
    rows: tuple[KeyRow, ...]


class _StandIn:
    """Takes the place of an object that is not wanted, whatever it is called with."""

    def __init__(self, *_: object) -> None:
        pass


# iTPN's files keep the command line; RevCol's their settings and, by mistake, Python's function `input`.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (_StandIn, "builtins.input"),
]

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
        entry: the one that holds them; without it the first of `model`, `module`, `state_dict` and
            `state_dict_ema` (averaged weights) that there is, or else the file itself.

    Raises:
        CheckpointError: when the file is missing, truncated, holds code or holds no weights.
    """
    if path.suffix == ".safetensors":
        return load_state(path)
    if not path.is_file():
        raise CheckpointError("The checkpoint does not exist", where=path, fix="check the path")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        objects = f"{named[1]} and perhaps more" if named else "objects"
        raise CheckpointError(
            f"The checkpoint is damaged, or holds {objects} that only running code could restore",
            where=path,
            fix="download it again; if you trust its source, keep the tensors alone, where its authors' "
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
            return {name.removeprefix("module."): value for name, value in tensors.items()}
    raise CheckpointError(
        f"The checkpoint holds no weights{f' in its entry {entry}' if entry else ''}",
        where=path,
        fix=f"give a file with named tensors, plain or under one of {', '.join(_ENTRIES)}",
    )


def _is_state(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def misfit(problems: list[str], where: str | Path) -> CheckpointError:
    """What to raise when a checkpoint is not the network that it looks like."""
    more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
    return CheckpointError(
        f"The checkpoint is not what it looks like: {'; '.join(problems[:6])}{more}",
        where=where,
        fix="download it again; if it was made by changed code, it cannot be converted",
    )
