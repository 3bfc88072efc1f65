"""Peak memory of tensors in a computation: every new storage is followed from allocation to release.

Exact and repeatable on any device. Unlike saved-tensor hooks it includes what checkpoints keep in closures,
what a custom backward holds temporarily, and temporaries between two operators. It does not include workspace
memory inside a kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """A context that records allocation and release of all storages that operators create within it.

    Storages allocated before (parameters, inputs, buffers) do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        # Allocations and releases in order: number of the storage, bytes (negative for a release). A log and
        # not a running maximum, so that `peak_bytes` can leave out tensors that are known only at the end.
        self._events: list[tuple[int, int]] = []
        # Number of each live storage, by address of its C++ object.
        self._live: dict[int, int] = {}
        self._finalizers: list[weakref.finalize[..., UntypedStorage]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):
            # Allocated before this context, or a storage of this context that is known already. Followed with
            # 0 bytes, because after its release a new storage may get its address.
            self._follow(storage, 0)
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            self._follow(storage, storage.nbytes())
        return out

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        for finalizer in self._finalizers:
            finalizer.detach()

    def peak_bytes(self, *, without: Iterable[Tensor] = ()) -> int:
        """The largest total size of live storages at any time, in bytes.

        Args:
            without: tensors, live at the end, whose storages do not count, such as gradients of parameters.
        """
        left_out = {self._live.get(tensor.untyped_storage()._cdata) for tensor in without}
        now = peak = 0
        for number, num_bytes in self._events:
            if number not in left_out:
                now += num_bytes
                peak = max(peak, now)
        return peak

    def _follow(self, storage: UntypedStorage, num_bytes: int) -> None:
        number, address = len(self._finalizers), storage._cdata
        # Views share the storage of their base and are counted once.
        if address in self._live:
            return
        self._live[address] = number
        self._events.append((number, num_bytes))

        def release() -> None:
            self._events.append((number, -num_bytes))
            del self._live[address]

        # torch keeps one Python object per storage as long as the storage lives (PyObject preservation), so
        # this runs exactly when the memory is released.
        self._finalizers.append(weakref.finalize(storage, release))


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
