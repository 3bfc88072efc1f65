"""Load untrusted pickles of plain values and byte arrays.

A pickle is a program. No function that it names is called, not even of numpy: the description of an array
is checked and the array is made here.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitpipe.contracts.errors import DatasetError, reason_of


class ByteArray:
    """Replacement for a numpy array of unsigned bytes.

    Attributes:
        numbers: the array, uint8, read-only.
    """

    numbers: NDArray[np.uint8]

    def __init__(self, *_: object) -> None:
        self.numbers = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        # The state of numpy.ndarray.__setstate__: version, shape, dtype, Fortran order, raw data.
        _, shape, kind, is_fortran, content = state
        # numpy's own `dtype.__setstate__` trusts flags of the pickle that can turn raw data into pointers.
        if not isinstance(kind, _ByteType) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("it has an array of something other than bytes")
        # `reshape` would also accept a size of -1.
        if len(content) != math.prod(shape):
            raise pickle.UnpicklingError(f"it has {len(content)} bytes for an array of {shape}")
        numbers = np.frombuffer(content, np.uint8)
        self.numbers = numbers.reshape(shape, order="F" if is_fortran else "C")


class _ByteType:
    """Replacement for numpy's dtype of unsigned bytes."""

    def __init__(self, code: object, *_: object) -> None:
        # Bytes in pickles of Python 2, text in those of Python 3.
        if code not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"it has an array of {code!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Ignored: byte order and alignment do not apply to single bytes."""


class _ArrayClass:
    """Replacement for numpy.ndarray, which is an argument of `_reconstruct` and not called."""


# numpy 2 renamed numpy.core to numpy._core; CIFAR's pickles have the old name.
_ALLOWED: dict[tuple[str, str], type] = {
    ("numpy.core.multiarray", "_reconstruct"): ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): ByteArray,
    ("numpy", "ndarray"): _ArrayClass,
    ("numpy", "dtype"): _ByteType,
}


class _Unpickler(pickle.Unpickler):
    """Refuses every global name except those of byte arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which a dataset does not need")
        # A new class for every pickle, because the BUILD opcode can set attributes of the objects it is
        # given.
        return type(name, (_ALLOWED[module, name],), {})


def load_pickle(content: bytes, where: Path) -> Any:
    """Load a pickle of lists, dictionaries, strings, numbers and byte arrays, without executing anything.

    Strings of Python 2 are returned as bytes, arrays as `ByteArray`.

    Raises:
        DatasetError: when it is damaged or refers to anything else.
    """
    try:
        # encoding="bytes": CIFAR was written by Python 2, whose `str` is bytes; decoding as ASCII would fail.
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle can raise nearly anything: EOFError, KeyError, TypeError, MemoryError, ...
        reason = reason_of(error, 160)
        raise DatasetError(
            f"The pickle is unsafe or damaged ({reason})",
            where=where,
            fix="download the archive again from the authors' page and compare its checksum",
        ) from error
