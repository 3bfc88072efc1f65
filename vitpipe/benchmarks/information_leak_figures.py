"""Table and figure of `vitpipe benchmark leak`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitpipe.benchmarks.information_leak import (
    Change,
    MaskedNetwork,
    find_leaks,
    hidden_pixels,
    misaligned,
    with_crossing_convolution,
)
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.datasets.bundled import bundled_file
from vitpipe.report.figures import Palette

AS_BUILT = "as built"
RELEASED = "strides 4 and 8 not masked (released code)"
_WRONG = {
    "masks of strides 4 and 8 moved by one unit": misaligned,
    "stem of 7 x 7 pixels, which cross units": with_crossing_convolution,
}
_PHOTOGRAPH = "astronaut.png"


def measure_forms(
    network: MaskedNetwork, released: MaskedNetwork | None, images_BCHW: Tensor, mask_BN: Tensor
) -> dict[str, list[Change]]:
    """What changes in a network, in its released form where that is another one, and in two wrong ones."""
    forms = {AS_BUILT: network}
    if released is not None:
        forms[RELEASED] = released
    forms.update({name: spoil(network) for name, spoil in _WRONG.items()})
    return {name: find_leaks(form, images_BCHW, mask_BN) for name, form in forms.items()}


def photograph(size: int) -> Tensor:
    """A photograph that is installed with scikit-image, normalised: (1, 3, size, size)."""
    with Image.open(bundled_file("skimage", f"data/{_PHOTOGRAPH}")) as opened:
        pixels = np.array(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    image_CHW = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return ((image_CHW - mean) / std)[None]


def leak_rows(found: Mapping[str, Sequence[Change]]) -> list[dict[str, str]]:
    """One row per form: in how many units each feature changes although it must not."""
    return [
        {"form": form, **{change.feature: str(change.num_leaks) for change in changes}}
        for form, changes in found.items()
    ]


def draw_leaks(
    found: Mapping[str, Sequence[Change]], images_BCHW: Tensor, mask_BN: Tensor, palette: Palette
) -> Any:
    """One row per form: what the network sees, then each feature as a grid of units by what changes."""
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure

    rows, columns = len(found), 1 + len(next(iter(found.values())))
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows + 0.45), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    side = round(mask_BN.shape[1] ** 0.5)
    hidden = mask_BN[0].view(side, side).bool().numpy()
    seen_colour, hidden_colour, leak_colour = (
        np.array(to_rgb(colour)) for colour in (palette.series[0], palette.grid, palette.series[1])
    )
    for axes_row, (form, changes) in zip(grid, found.items(), strict=True):
        axes_row[0].imshow(_seen(images_BCHW, mask_BN))
        axes_row[0].set_title(form, fontsize=8, color=palette.ink, loc="left")
        for axes, change in zip(axes_row[1:], changes, strict=True):
            cells = np.where(hidden[..., None], hidden_colour, seen_colour)
            leaks = change.leak_BN[0].view(side, side).numpy()
            axes.imshow(np.where(leaks[..., None], leak_colour, cells))
            axes.set_xlabel(change.feature, fontsize=7, color=palette.muted)
        for axes in axes_row:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
    return figure


def _seen(images_BCHW: Tensor, mask_BN: Tensor) -> Any:
    """The first image with its hidden units in white, (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    image_CHW = (images_BCHW[0] * std + mean).clamp(0, 1)
    return torch.where(hidden_pixels(mask_BN[:1])[0], 1.0, image_CHW).permute(1, 2, 0).numpy()
