"""Seeds as pure functions of what they are for, so that no draw depends on a worker, a rank or a restart."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed from any numbers and words; equal parts give equal seeds, on every machine."""
    # Type names keep 1 and "1" apart; the separator keeps ("ab", "c") and ("a", "bc") apart. Python's hash()
    # is salted per process and would not do.
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def generator_of(*parts: int | str) -> np.random.Generator:
    """A NumPy generator of its own, seeded by `seed_of`."""
    return np.random.Generator(np.random.PCG64(seed_of(*parts)))


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of `random`, NumPy and torch (CPU), which timm and torchvision draw from."""
    seed_generators(seed_of(*parts), gpus=False)  # augmentation draws on the CPU only


def seed_generators(seed: int, *, gpus: bool) -> None:
    """Seed the global generators of `random`, NumPy and torch.

    Args:
        seed: 64 bits, for example `seed_of`.
        gpus: seed those of the GPUs in use, too.
    """
    import torch  # here, because most of what needs a seed needs no torch

    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # the legacy generator takes 32 bits
    # Not torch.manual_seed: where CUDA is not initialised, it keeps the seed for later together with the text
    # of the call stack, which took 5 ms of every step on a CPU.
    torch.default_generator.manual_seed(seed)
    if gpus and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the global generators of `random`, NumPy and torch (CPU) afterwards.

    Without it, a loader inside the training process would move the draws of dropout and drop path.
    """
    import torch

    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
