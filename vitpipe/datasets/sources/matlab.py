"""Load untrusted MATLAB 5 files: ImageNet's devkit, SVHN, Oxford Flowers-102."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vitpipe.contracts.errors import DatasetError, reason_of

# The largest one, SVHN's train_32x32.mat, holds 225 MB: 73,257 x 32 x 32 x 3 bytes.
MAX_MAT_BYTES = 2**30
# "MAT-File Format" (MathWorks): a header of 128 bytes, then data elements, each with a tag of type and
# length (4 bytes each); type 15 is miCOMPRESSED, a zlib stream.
_HEADER_BYTES = 128
_TAG_BYTES = 8
_COMPRESSED = 15
_CHUNK = 2**20


def read_mat(source: Path | bytes, names: Sequence[str], where: Path) -> dict[str, Any]:
    """Load variables of a MATLAB 5 file as numpy arrays.

    Args:
        source: the file or its content.
        names: the required variables.
        where: file name for messages.

    Raises:
        DatasetError: when the file is damaged, of another version, lacks a variable or inflates to more
            than `MAX_MAT_BYTES`.
    """
    from scipy.io import loadmat

    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            # scipy decompresses without a limit, so the sizes are checked before.
            _check_size(file, where)
            file.seek(0)
            found = loadmat(file, variable_names=list(names))
    except DatasetError:
        raise
    except OSError as error:
        raise DatasetError(
            f"The file cannot be read ({error.strerror or error})",
            where=where,
            fix="check its path and permissions",
        ) from error
    except Exception as error:
        # scipy raises ValueError, TypeError, struct.error, zlib.error, MatReadError and others on bad bytes.
        reason = reason_of(error)
        raise DatasetError(
            f"The MATLAB file is damaged ({reason})", where=where, fix="download it again"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DatasetError(
            f"The MATLAB file has no variable '{missing[0]}'", where=where, fix="download it again"
        )
    return found


def _check_size(file: BinaryIO, where: Path) -> None:
    """Refuse files that are not MATLAB 5, truncated, or decompression bombs (zlib: up to 1,032 to 1)."""
    header = file.read(_HEADER_BYTES)
    # Endian indicator: the characters "MI" as a 16-bit number. Version 7.3 files are HDF5, which scipy
    # does not read.
    if header[126:128] not in (b"IM", b"MI"):
        raise DatasetError("The file is not a MATLAB 5 file", where=where, fix="download it again")
    order: Literal["little", "big"] = "little" if header[126:128] == b"IM" else "big"
    total = 0
    while tag := file.read(_TAG_BYTES):
        kind, left = (int.from_bytes(tag[start : start + 4], order) for start in (0, 4))
        inflater = zlib.decompressobj()
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk or len(tag) < _TAG_BYTES:
                raise DatasetError(
                    "The MATLAB file is damaged (it is truncated)", where=where, fix="download it again"
                )
            left -= len(chunk)
            if kind != _COMPRESSED:
                total += len(chunk)
            # In pieces of at most a megabyte, so that the bomb itself is never in memory.
            while kind == _COMPRESSED and chunk and total <= MAX_MAT_BYTES:
                total += len(inflater.decompress(chunk, _CHUNK))
                chunk = inflater.unconsumed_tail
            if total > MAX_MAT_BYTES:
                raise DatasetError(
                    f"The MATLAB file inflates to more than {MAX_MAT_BYTES} bytes",
                    where=where,
                    fix="download it again",
                )
