"""Read the tensors of a TorchScript archive (`torch.jit.save`) without loading or running its code.

The archive is a zip file: `NAME/data.pkl` pickles the tree of modules as objects of generated classes whose
attributes are tensors and further modules, `NAME/data/KEY` has the bytes of each storage, `NAME/code/` the
program, which is not looked at.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitpipe.models.inert_pickle import StandIn, Unpickler

_TREE, _CONSTANTS = "/data.pkl", "/constants.pkl"
_DTYPES = {kind: dtype for dtype, kind in torch.storage._dtype_to_storage_type_map().items()}


class ScriptModule(StandIn):
    """A module of the archive: its attributes by name, and none of its code."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        """Keep the attributes, which torch pickles as a dict."""
        self.attributes = state if isinstance(state, dict) else {}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; only those have a pickle of the program's constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    folders = {name.removesuffix(_CONSTANTS) for name in names if name.endswith(_CONSTANTS)}
    return any("/" not in folder and folder + _TREE in names for folder in folders)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Every tensor of the tree by its dotted name, as in the `state_dict` of the network that was saved.

    Raises what zipfile and pickle raise for a damaged file; `official.open_checkpoint` turns that into one
    message.
    """
    with zipfile.ZipFile(path) as archive:
        # The archive's one folder; `is_torchscript` has found it.
        name = next(iter(archive.namelist())).partition("/")[0]
        found = _Archive(archive, name).load()
    return dict(_tensors(found, ""))


class _Archive(Unpickler):
    """Unpickles the tree; storages are read from the archive, each once."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        super().__init__(io.BytesIO(archive.read(name + _TREE)))
        self.archive, self.name = archive, name
        self.storages: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Types of storages, modules without their code, else as the base class."""
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module.partition(".")[0] == "__torch__":
            return ScriptModule
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        """A storage: (`storage`, type, key, device, number of values); always on the CPU."""
        what, dtype, key, *_ = pid
        if what != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"unknown reference {what}")
        if key not in self.storages:
            # zipfile compares the checksum; a bytearray, because torch warns of memory it may not write.
            content = bytearray(self.archive.read(f"{self.name}/data/{key}"))
            untyped = (
                torch.frombuffer(content, dtype=torch.uint8).untyped_storage()
                if content
                else torch.UntypedStorage(0)
            )
            self.storages[key] = torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
        return self.storages[key]


def _tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value.detach()
    elif isinstance(value, ScriptModule):
        for name, attribute in value.attributes.items():
            yield from _tensors(attribute, f"{prefix}.{name}" if prefix else str(name))
