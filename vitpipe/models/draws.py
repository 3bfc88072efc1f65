"""Random numbers that belong to an image: functions of a seed and of the image's number in its set.

A generator that is called once per batch gives an image other numbers in another batch. Here every number is
a hash, so that any division of a step into micro-batches and ranks draws the same, on every device:

    noise = uniform(seed_of("mask", seed, step), indices_B, num_units)         # (B, num_units)

A network draws as it runs (drop path, dropout), without arguments for it. The training loop opens a context,
in which `keep` and `keep_elements` number their draws in the order of the calls:

    with image_draws(seed_of("network", seed, step), indices_B):
        network(images)

A recomputation must draw the same again: `place`, `go_to`, `kept` and `Recomputed` do for these draws what
`get_rng_state` and `set_rng_state` do for torch's generators. Outside the context torch's generator is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

# The increment and the multipliers of splitmix64 (Steele, Lea, Flood, OOPSLA 2014; constants of Stafford's
# variant 13, as in Java's SplittableRandom), as the signed numbers that torch has.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# A float32 in [0, 1) has 24 bits.
_BITS = 24
# Numbers are computed for so many calls at a time: 20 integer operations for 64 calls and not for each.
_BLOCK = 64


def uniform(key: int, indices_B: Tensor, num: int, first: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), (B, num) float32, on the device of the indices; equal on every device.

    Args:
        key: 64 bits, for example `contracts.seeds.seed_of(what, seed, step)`; other keys give other numbers.
        indices_B: numbers of the images in their set, int64.
        num: numbers per image.
        first: how many numbers of every image to skip.
    """
    return _shifted(_hashes(key, indices_B, num, first), 64 - _BITS).float() * 2.0**-_BITS


def _hashes(key: int, indices_B: Tensor, num: int, first: int) -> Tensor:
    """64 bits for every number of `uniform`: (B, num), int64."""
    # One splitmix64 sequence per image, whose start is itself a hash: consecutive starts would give
    # sequences that are copies of each other, shifted.
    start_B = _mixed(_mixed(indices_B.long() * _INCREMENT + _signed(key)))
    return _sequence(start_B, num, first)


def _sequence(start_B: Tensor, num: int, first: int = 0) -> Tensor:
    """The numbers `first` ... `first + num - 1` of splitmix64 sequences: (B, num), int64."""
    counter = torch.arange(first + 1, first + num + 1, device=start_B.device)
    return _mixed(start_B.unsqueeze(1) + counter * _INCREMENT)


class _Draws:
    """The numbers of the images of one micro-batch, by the order of the calls."""

    def __init__(self, key: int, indices_B: Tensor) -> None:
        self.key, self.indices_B = key, indices_B
        self.table = torch.empty(0, len(indices_B))

    def numbers(self, first: int, num: int, device: torch.device) -> Tensor:
        """Numbers `first` ... `first + num - 1` of every image: (num, B)."""
        if self.table.device != device:
            self.indices_B, self.table = self.indices_B.to(device), self.table.to(device)
        if first + num > len(self.table):
            known = len(self.table)
            more = max(_BLOCK, first + num - known)
            new = uniform(self.key, self.indices_B, more, known).t().contiguous()
            self.table = torch.cat([self.table, new])
        return self.table[first : first + num]

    def hashes(self, first: int, num: int, device: torch.device) -> Tensor:
        """64 bits for each of the same numbers: (num, B), int64."""
        return _hashes(self.key, self.indices_B.to(device), num, first).t()


class Place(NamedTuple):
    """Where a network is in its draws: which ones, and how many have been made."""

    draws: _Draws | None
    position: int


# Of a thread: autograd recomputes in threads of its own, to which `go_to` brings the place.
_PLACE: ContextVar[Place | None] = ContextVar("place of the draws", default=None)


def image_draws(key: int, indices_B: Tensor) -> AbstractContextManager[None]:
    """A context in which networks draw for these images; each of them counts from 0.

    Args:
        key: 64 bits, see `uniform`.
        indices_B: numbers of the images in their set. A network may be called with V * B images: V views of
            all images, one view after the other.
    """
    return _at(Place(_Draws(key, indices_B), 0))


def keep(num_rows: int, keep_ratio: float, like: Tensor) -> Tensor:
    """Which rows of a batch keep something, 1 or 0 each: (num_rows,) of the type and device of `like`.

    Args:
        num_rows: B images, or V * B, see `image_draws`.
        keep_ratio: probability of a 1.

    Raises:
        ValueError: inside `image_draws`, when the rows are not a multiple of its images.
    """
    draws, position, num_views = _moved_on(num_rows)
    if draws is None:
        return like.new_empty(num_rows).bernoulli_(keep_ratio)
    return (draws.numbers(position, num_views, like.device) < keep_ratio).flatten().to(like.dtype)


def keep_elements(like: Tensor, keep_ratio: float) -> Tensor:
    """Which elements of a batch are kept, 1 or 0 each: a tensor as `like`, for dropout.

    Args:
        like: (B, ...) or (V * B, ...), see `image_draws`.
        keep_ratio: probability of a 1, to 1 / 65536.

    Raises:
        ValueError: as `keep`.
    """
    draws, position, num_views = _moved_on(len(like))
    if draws is None:
        return torch.empty_like(like).bernoulli_(keep_ratio)
    # Four elements share a hash, 16 bits each: twenty integer operations for each of them would cost as much
    # as the layer that is dropped from.
    num = like[0].numel()
    start_R = draws.hashes(position, num_views, like.device).flatten()
    bits_RE = _sequence(start_R, -(-num // 4)).view(torch.int16)[:, :num]
    bound = min(round(keep_ratio * 2**16), 2**16 - 1) - 2**15
    return (bits_RE < bound).view(like.shape).to(like.dtype)


def _moved_on(num_rows: int) -> tuple[_Draws | None, int, int]:
    """The draws, the position of the next one, and how many each image makes now: one for every view."""
    draws, position = place()
    if draws is None:
        return None, 0, 0
    num_views, rest = divmod(num_rows, len(draws.indices_B))
    if rest:
        raise ValueError(
            f"a network got {num_rows} rows for {len(draws.indices_B)} images; open `image_draws` with the "
            "numbers of the images that it gets"
        )
    _PLACE.set(Place(draws, position + num_views))
    return draws, position, num_views


def place() -> Place:
    """The current place, for `go_to`."""
    return _PLACE.get() or Place(None, 0)


def go_to(there: Place) -> None:
    """Draw from this place on."""
    _PLACE.set(there)


def kept() -> AbstractContextManager[None]:
    """A context after which the place is what it was before it."""
    return _at(place())


class Recomputed:
    """The context for a second run of what follows now: it draws the same. May be entered several times."""

    def __init__(self) -> None:
        self._there = place()
        self._before: list[Place] = []

    def __enter__(self) -> None:
        self._before.append(place())
        go_to(self._there)

    def __exit__(self, *error: object) -> None:
        go_to(self._before.pop())


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of first run and recomputation, the `context_fn` of `torch.utils.checkpoint.checkpoint`."""
    return nullcontext(), Recomputed()


@contextmanager
def _at(there: Place) -> Iterator[None]:
    before = place()
    go_to(there)
    try:
        yield
    finally:
        go_to(before)


def _signed(key: int) -> int:
    """64 bits as torch's int64."""
    key &= 2**64 - 1
    return key - 2**64 if key >= 2**63 else key


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own repeats the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mixed(x: Tensor) -> Tensor:
    """The output function of splitmix64: every bit of the result depends on every bit of x."""
    # int64 products wrap around in torch, on CPUs and GPUs.
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)
