"""Which learning rate a linear classifier should have, without asking the images that are reported.

Classifiers of all rates are trained together on nine tenths of the training images and measured on the
held-out tenth; that of the best rate is trained again on all of them. Papers that sweep (DINO, MAE) choose by
the reported images, and DINO reports the best epoch on them; both can be read beside our own figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import generator_of
from vitpipe.evaluate.linear import LinearProbes, LinearSettings, train_linear

HELD_OUT = 0.1  # of every class


@dataclass(frozen=True)
class RateResult:
    """One learning rate of a sweep; shares in [0, 1].

    Attributes:
        held_out_top1: by it the rate is chosen.
        val_top1: of the same classifier, which has not seen the held-out images.
    """

    base_lr: float
    held_out_top1: float
    val_top1: float


@dataclass(frozen=True)
class LinearResult:
    """A linear classifier that was trained on all training images, on the validation images.

    Attributes:
        base_lr: its learning rate.
        top1: after the last epoch.
        best_epoch_top1: of the epoch with the highest one, and `best_epoch` its number from 1, the earliest
            of equals; `None` when the epochs were not measured.
        sweep: all rates, in the order of the recipe; empty when there was nothing to choose.
    """

    base_lr: float
    top1: float
    best_epoch_top1: float | None
    best_epoch: int | None
    sweep: tuple[RateResult, ...]

    def rows(self, **first: str) -> list[dict[str, Any]]:
        """The table `linear_sweep`; what was trained on all images stands in the chosen rate's row.

        Args:
            first: further columns in front.
        """
        whole: dict[str, Any] = {"val_top1_all_images": self.top1}
        if self.best_epoch is not None:
            whole |= {"best_epoch_val_top1_all_images": self.best_epoch_top1, "best_epoch": self.best_epoch}
        return [
            {
                **first,
                "base_lr": result.base_lr,
                "held_out_top1": result.held_out_top1,
                "val_top1": result.val_top1,
                "chosen": "yes" if result.base_lr == self.base_lr else "",
                **(whole if result.base_lr == self.base_lr else dict.fromkeys(whole, "")),
            }
            for result in self.sweep
        ]


def linear_accuracy(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    rates: Sequence[float],
    settings: LinearSettings,
    *,
    measure_epochs: bool = False,
) -> LinearResult:
    """Choose the learning rate where there are several, train on all training images, and measure.

    Args:
        train: features (M, C) and labels (M,).
        val: features (N, C) and labels (N,).
        measure_epochs: measure the validation images after every epoch, not the last one only.

    Raises:
        InputError: without rates, when there are several and no class has two images, or when the weights of
            the chosen rate are not finite.
    """
    # None at all are refused there, too.
    sweep = _sweep(train, val, rates, settings) if len(rates) != 1 else ()
    # Of equals the lower rate; equal shares of few images are common.
    chosen = (
        min(sweep, key=lambda found: (-found.held_out_top1, found.base_lr)).base_lr if sweep else rates[0]
    )
    by_epoch: list[float] = []

    def measured(probes: LinearProbes) -> None:
        by_epoch.extend(probes.top1(*val))

    probes = train_linear(*train, [chosen], settings, after_epoch=measured if measure_epochs else None)
    if not probes.weight.isfinite().all():
        raise InputError(
            f"The linear classifier has diverged at a learning rate of {chosen:g}",
            where="base_lr",
            fix="give lower rates",
        )
    highest = max(by_epoch, default=None)
    return LinearResult(
        base_lr=chosen,
        top1=probes.top1(*val)[0],
        best_epoch_top1=highest,
        best_epoch=None if highest is None else by_epoch.index(highest) + 1,
        sweep=sweep,
    )


def _sweep(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    rates: Sequence[float],
    settings: LinearSettings,
) -> tuple[RateResult, ...]:
    features_MC, labels_M = train
    held_M = held_out(labels_M.cpu(), settings.seed).to(labels_M.device)
    kept = (~held_M).nonzero()[:, 0]
    probes = train_linear(features_MC, labels_M, rates, settings, rows=kept)
    on_held_out = probes.top1(features_MC[held_M], labels_M[held_M])
    # A classifier that has diverged gives every image the same class, which is right for some.
    sound_L = probes.weight.isfinite().flatten(1).all(dim=1).tolist()
    shares = [share if sound else 0.0 for share, sound in zip(on_held_out, sound_L, strict=True)]
    return tuple(map(RateResult, rates, shares, probes.top1(*val)))


def held_out(labels_M: Tensor, seed: int) -> Tensor:
    """Which training images are held out, (M,) bool: a tenth of every class, drawn by the seed.

    Rounded, but at least one image of a class that has two.

    Raises:
        InputError: when no class has two images.
    """
    is_held_M = torch.zeros(len(labels_M), dtype=torch.bool)
    order_M = torch.from_numpy(generator_of("held out", seed).permutation(len(labels_M)))
    # Class after class, each in the drawn order.
    order_M = order_M[labels_M[order_M].argsort(stable=True)]
    counts = torch.unique(labels_M, return_counts=True)[1].tolist()
    for own_M in order_M.split(counts):
        is_held_M[own_M[: max(int(len(own_M) > 1), round(len(own_M) * HELD_OUT))]] = True
    if not is_held_M.any():
        raise InputError(
            f"None of the {len(counts)} classes has a second image: no rate can be chosen by held-out images",
            where="base_lr, which lists several learning rates",
            fix="give one learning rate, or more training images",
        )
    return is_held_M
