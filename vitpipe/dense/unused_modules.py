"""Placeholders for modules that mmdet and mmengine import at their head and that nothing here uses.

They take half of the start of a process that detects or segments: Gaussian processes for tracking, imgaug for
images of lanes, matplotlib for drawing, PyTorch's sharded data parallelism for mmengine's own runner. While
the packages are imported, they get empty types from them, whose use says what they stand for. Others get the
modules themselves, and so does an import inside of a function, which comes later.
"""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from vitpipe.contracts.errors import RunError

_IMPORTERS = ("mmcv", "mmdet", "mmengine", "mmseg", "pycocotools")
# With everything below them.
_UNUSED = (
    "imgaug",
    "matplotlib",
    "sklearn",
    "timm",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
)


class _AnyName(type):
    """Types whose attributes are such types, too: `StateDictType.FULL` in the signature of a function."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(f"{cls.__module__}.{cls.__qualname__}", name)


def _placeholder(module: str, name: str) -> type:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RunError(
            f"{name} of {module} is used, but was left out when the dense libraries were imported",
            where=__name__,
            fix="remove its module from the list of this file",
        )

    return _AnyName(name, (), {"__module__": module, "__init__": refuse})


class _Placeholder(ModuleType):
    """A module in which every name is an empty type."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _placeholder(self.__name__, name)


@contextlib.contextmanager
def without_unused_modules() -> Iterator[None]:
    """Within the block, the dense libraries get placeholders for what they do not use."""
    real = builtins.__import__

    def importing(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        importer = str((globals or {}).get("__name__", "")).partition(".")[0]
        is_unused = any(name == unused or name.startswith(f"{unused}.") for unused in _UNUSED)
        if level or importer not in _IMPORTERS or not is_unused:
            return real(name, globals, locals, fromlist or (), level)
        # As Python's own: without names to take from it, the package at the head.
        return _Placeholder(name if fromlist else name.partition(".")[0])

    builtins.__import__ = importing
    try:
        yield
    finally:
        builtins.__import__ = real
