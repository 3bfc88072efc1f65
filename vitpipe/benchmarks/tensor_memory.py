"""Peak memory of a computation by tensors: every storage born inside, from its birth to its death.

Exact and repeatable on any device, and it sees what saved-tensor hooks cannot: what checkpoints keep in
closures, what a custom backward holds for a moment, temporaries between two operators. It does not see
scratch memory inside a kernel.
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
    """Within this context, follows the storages that operators make.

    Storages that were there before (parameters, inputs, buffers) do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        # Births and deaths in order: the number of the storage, bytes (negative at its death).
        self._events: list[tuple[int, int]] = []
        # Number of each storage that is alive, by address.
        self._alive: dict[int, int] = {}
        self._deaths: list[weakref.finalize[..., UntypedStorage]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for storage in _storages((args, kwargs)):
            # From before this context; followed all the same, as its address may be used again.
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
        for death in self._deaths:
            death.detach()

    def peak_bytes(self, *, without: Iterable[Tensor] = ()) -> int:
        """The largest sum of bytes alive at one time.

        Args:
            without: tensors alive at the end that are not to count, such as the gradients of parameters.
        """
        left_out = {self._alive.get(tensor.untyped_storage()._cdata) for tensor in without}
        now = peak = 0
        for number, num_bytes in self._events:
            if number not in left_out:
                now += num_bytes
                peak = max(peak, now)
        return peak

    def _follow(self, storage: UntypedStorage, num_bytes: int) -> None:
        number, address = len(self._deaths), storage._cdata
        if address in self._alive:
            return
        self._alive[address] = number
        self._events.append((number, num_bytes))

        def end() -> None:
            self._events.append((number, -num_bytes))
            del self._alive[address]

        self._deaths.append(weakref.finalize(storage, end))


def _storages(tree: Any) -> list[UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
