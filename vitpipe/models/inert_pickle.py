"""A pickle module for `torch.load` that restores tensors, arrays, plain containers, and runs nothing else.

Checkpoints of the field hold command lines, settings, loss histories and paths beside their weights. Every
class or function that is not in a short list becomes an inert stand-in: no code of the file is run.
"""

from __future__ import annotations

import collections
import pickle
from functools import cache
from typing import Any

import numpy as np
import torch

# What tensors and numpy's arrays are rebuilt by. Each of them only makes a value from its arguments.
_REBUILT: dict[tuple[str, str], Any] = {
    **{
        ("torch._utils", name): getattr(torch._utils, name)
        for name in (
            "_rebuild_tensor",
            "_rebuild_tensor_v2",
            "_rebuild_tensor_v3",
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        )
    },
    **{
        ("torch", str(kind).removeprefix("torch.")): kind
        for kind in set(torch.storage._dtype_to_storage_type_map())
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch", "Tensor"): torch.Tensor,
    ("torch.nn.parameter", "Parameter"): torch.nn.Parameter,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): __import__("_codecs").encode,  # bytes in pickle's protocol 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
# numpy 1 and 2 call their modules differently; files of both are about.
for _module in ("numpy._core", "numpy.core"):
    _REBUILT[f"{_module}.numeric", "_frombuffer"] = np._core.numeric._frombuffer  # type: ignore[attr-defined]
    _REBUILT[f"{_module}.multiarray", "_reconstruct"] = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    _REBUILT[f"{_module}.multiarray", "scalar"] = np._core.multiarray.scalar  # type: ignore[attr-defined]


class StandIn(dict[Any, Any]):
    """In place of an object whose class is not restored; takes any arguments, state, items.

    A dict, because settings (yacs, mmengine) are subclasses of dict: their entries are kept.

    Attributes:
        stands_for: the full name of the class or function.
    """

    stands_for = ""
    # By identity: an object may be the key of a dict.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __call__(self, *_: object, **__: object) -> StandIn:
        """What a stand-in of a method gives."""
        return StandIn()

    def __setstate__(self, state: object) -> None:
        """Forget the attributes."""

    def append(self, item: object) -> None:
        """As pickle fills subclasses of list."""

    def extend(self, items: object) -> None:
        """As pickle fills subclasses of list."""

    def add(self, item: object) -> None:
        """As pickle fills subclasses of set."""


@cache
def _stand_in(module: str, name: str) -> type[StandIn]:
    return type("StandIn", (StandIn,), {"stands_for": f"{module}.{name}"})


class Unpickler(pickle.Unpickler):
    """Restores what is in the list above, and stand-ins for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of this name, if it is harmless; else a stand-in."""
        # torch's loader recognises storages by their names before this is asked.
        return _REBUILT.get((module, name)) or _stand_in(module, name)


def load(file: Any, **options: Any) -> Any:
    """`pickle.load`, by the `Unpickler` of this module; `torch.load` calls it for old files."""
    return Unpickler(file, **options).load()
