"""MATLAB 5 files, as ImageNet's devkit, SVHN and Oxford Flowers come with."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

from vitpipe.contracts.errors import DatasetError

# The largest one, SVHN's train_32x32.mat, holds 225 MB.
MAX_MAT_BYTES = 2**30
_HEADER_BYTES = 128
_TAG_BYTES = 8
_COMPRESSED = 15
_CHUNK = 2**20


def read_mat(source: Path | bytes, names: Sequence[str], where: Path) -> dict[str, Any]:
    """Some variables of a MATLAB 5 file as numpy arrays.

    Args:
        source: the file or its content.
        names: variables that must be there.
        where: for messages.

    Raises:
        DatasetError: when the file is damaged, of another version, lacks a variable or inflates to more
            than a gigabyte.
    """
    from scipy.io import loadmat

    try:
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            _measure(file, where)
            file.seek(0)
            found = loadmat(file, variable_names=list(names))
    except DatasetError:
        raise
    except OSError as error:
        raise DatasetError(
            f"The file cannot be read ({error.strerror or error})",
            where=where,
            fix="check its place and its rights",
        ) from error
    except Exception as error:
        # scipy raises ValueError, TypeError, struct.error, zlib.error, MatReadError and others on bad bytes.
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise DatasetError(
            f"The MATLAB file is damaged ({reason})", where=where, fix="get it again"
        ) from error
    missing = [name for name in names if name not in found]
    if missing:
        raise DatasetError(f"The MATLAB file has no '{missing[0]}'", where=where, fix="get it again")
    return found


def _measure(file: BinaryIO, where: Path) -> None:
    """Refuse what is no MATLAB 5 file, is cut off, or is a bomb: a megabyte can hold a gigabyte of zeros."""
    header = file.read(_HEADER_BYTES)
    if header[126:128] not in (b"IM", b"MI"):
        raise DatasetError("This is no MATLAB 5 file", where=where, fix="get it again")
    order: Literal["little", "big"] = "little" if header[126:128] == b"IM" else "big"
    total = 0
    while tag := file.read(_TAG_BYTES):
        kind, left = (int.from_bytes(tag[start : start + 4], order) for start in (0, 4))
        inflater = zlib.decompressobj()
        while left:
            chunk = file.read(min(_CHUNK, left))
            if not chunk or len(tag) < _TAG_BYTES:
                raise DatasetError(
                    "The MATLAB file is damaged (it is cut off)", where=where, fix="get it again"
                )
            left -= len(chunk)
            if kind != _COMPRESSED:
                total += len(chunk)
            while kind == _COMPRESSED and chunk and total <= MAX_MAT_BYTES:
                total += len(inflater.decompress(chunk, _CHUNK))
                chunk = inflater.unconsumed_tail
            if total > MAX_MAT_BYTES:
                raise DatasetError(
                    f"The MATLAB file inflates to more than {MAX_MAT_BYTES} bytes",
                    where=where,
                    fix="get it again",
                )
