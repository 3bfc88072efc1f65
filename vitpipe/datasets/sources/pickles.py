"""Pickles from strangers. A pickle is a program; this reads the few words of it that a dataset needs.

Neither numpy's nor anybody's functions are called: what a pickle says about an array is checked and the
array is made here. (numpy's own `dtype.__setstate__` trusts flags that can turn bytes into pointers.)
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpipe.contracts.errors import DatasetError


class ByteArray:
    """Stands for a numpy array of unsigned bytes.

    Attributes:
        numbers: the array, uint8, read only.
    """

    numbers: NDArray[np.uint8]

    def __init__(self, *_: object) -> None:
        self.numbers = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, _ByteType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it has an array of something else than bytes")
        if len(content) != math.prod(shape):
            raise pickle.UnpicklingError(f"it has {len(content)} bytes for an array of {shape}")
        numbers = np.frombuffer(content, np.uint8)
        self.numbers = numbers.reshape(shape, order="F" if is_fortran else "C")


class _ByteType:
    """Stands for numpy's dtype of unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, of which bytes have none."""


class _ArrayClass:
    """Stands for numpy.ndarray where it is named, not called."""


_KNOWN: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _ByteType,
}


class _Unpickler(pickle.Unpickler):
    """Refuses every name but those of byte arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dataset does not need")
        # A class of its own for every pickle: a pickle can set attributes of what it is given.
        return type(name, (_KNOWN[module, name],), {})


def load_pickle(content: bytes, where: Path) -> Any:
    """Load a pickle of lists, dictionaries, texts, numbers and byte arrays; nothing in it is run.

    Texts of Python 2 come as bytes, arrays as `ByteArray`.

    Raises:
        DatasetError: when it is damaged or asks for anything else.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle can raise nearly anything: EOFError, KeyError, TypeError, MemoryError, ...
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DatasetError(
            f"The pickle cannot be trusted or is damaged ({reason})",
            where=where,
            fix="get the archive again from the authors' page and compare its checksum",
        ) from error
