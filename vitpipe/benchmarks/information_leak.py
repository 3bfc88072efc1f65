"""Does the content of hidden units reach what a masked network computes? Found by replacing that content.

Integrally Pre-Trained Transformer Pyramid Networks; Yunjie Tian et al.; arXiv 2211.12735; supplement, section
2. A masked network must not read what it has to predict. Over the levels of a hierarchical network it can, in
two ways: where masks of two levels are not aligned, a token that is hidden in one is seen in the other
(inter-layer leak); where a convolution or a window crosses units, a visible token holds some of its hidden
neighbours (intra-layer leak). `misaligned` and `with_crossing_convolution` make either mistake on purpose.

    images, and the same with noise in hidden units > network, twice > where any of its features differ

Shapes: B images, N units (row-major), K visible units.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.hivit.feature_pretrainer import FeaturePretrainer
from vitpipe.models.hivit.hivit import StageFeatures
from vitpipe.models.hivit.itpn import MaskedPretrainer
from vitpipe.models.hivit.pyramid import PyramidLevels
from vitpipe.models.masking import UNIT_PIXELS

MaskedNetwork = MaskedPretrainer | FeaturePretrainer
# Images are normalised, so ten times their spread is content that no rounding could hide.
_NOISE_SCALE = 10.0
# Nothing reads these where a unit is hidden, unless the pyramid does, which is watched itself.
_OF_VISIBLE_UNITS = ("stage 4", "stage 8")


@dataclass(frozen=True)
class Change:
    """How much one of the features changes when hidden pixels do.

    Attributes:
        feature: which, for example `pyramid 8`; numbers are strides.
        size_BN: largest absolute change of a value in each unit; 0 in units that the network drops.
        leak_BN: where it changes and must not.
    """

    feature: str
    size_BN: Tensor  # noqa: N815
    leak_BN: Tensor  # noqa: N815

    @property
    def num_leaks(self) -> int:
        """Units that change and must not."""
        return int(self.leak_BN.sum())


@torch.no_grad()
def find_leaks(
    network: MaskedNetwork, images_BCHW: Tensor, mask_BN: Tensor, *, seed: int = 0
) -> list[Change]:
    """Replace the pixels of hidden units by noise, and compare every level of stages and pyramid, and the
    input of what predicts.

    Nothing may change, but in a network that processes hidden units too: these at strides 4 and 8.

    Args:
        network: of pixels or of a teacher's features; runs in evaluation mode and is left in its mode.
        images_BCHW: normalised, of the network's size.
        mask_BN: 1 where a unit is hidden.
        seed: of the noise.

    Raises:
        InputError: when the network cannot hide these units.
    """
    drawn = torch.randn(images_BCHW.shape, generator=torch.Generator().manual_seed(seed))
    changed = torch.where(hidden_pixels(mask_BN), _NOISE_SCALE * drawn.to(images_BCHW), images_BCHW)
    was_training = network.training
    network.eval()
    try:
        first, second = (_features(network, images, mask_BN) for images in (images_BCHW, changed))
    finally:
        network.train(was_training)
    changes = []
    for name, before in first.items():
        size_BN = (before - second[name]).abs().flatten(2).amax(-1)
        may_change = mask_BN.bool() if name in _OF_VISIBLE_UNITS else torch.zeros_like(mask_BN).bool()
        changes.append(Change(name, size_BN, (size_BN > 0) & ~may_change))
    return changes


def hidden_pixels(mask_BN: Tensor) -> Tensor:
    """(B, N), square grids -> (B, 1, H, W), true where a pixel is hidden."""
    side = round(mask_BN.shape[1] ** 0.5)
    grid = mask_BN.view(-1, 1, side, side)
    return grid.repeat_interleave(UNIT_PIXELS, 2).repeat_interleave(UNIT_PIXELS, 3).bool()


def misaligned(network: MaskedNetwork) -> MaskedNetwork:
    """A copy whose masks at strides 4 and 8 are those of stride 16 moved by one unit."""
    wrong = copy.deepcopy(network)
    if isinstance(wrong, MaskedPretrainer):
        return _MisalignedPixels(wrong.backbone, wrong.pyramid, wrong.decoder, mask_ratio=wrong.mask_ratio)
    wrong.pyramid = _MisalignedPyramid(wrong.pyramid)  # type: ignore[assignment]
    return wrong


def with_crossing_convolution(network: MaskedNetwork) -> MaskedNetwork:
    """A copy whose stem has overlapping patches: 7 x 7 pixels with stride 4, so that they cross units."""
    wrong = copy.deepcopy(network)
    own = wrong.backbone.stem.proj
    wrong.backbone.stem.proj = nn.Conv2d(3, own.out_channels, kernel_size=7, stride=4, padding=3)
    return wrong


class _MisalignedPixels(MaskedPretrainer):
    """Keeps the right units at stride 16, and their right neighbours at strides 4 and 8."""

    def encode(self, images_BCHW: Tensor, kept_BK: Tensor) -> PyramidLevels:
        """As `MaskedPretrainer.encode`."""
        finer = self.backbone.forward_stages(images_BCHW, (kept_BK + 1) % self.num_units)
        right = self.backbone.forward_stages(images_BCHW, kept_BK)
        levels: PyramidLevels = self.pyramid(finer._replace(level16_BNC=right.level16_BNC))
        return levels


class _MisalignedPyramid(nn.Module):
    """Hides at strides 4 and 8 the right neighbours of the units that are hidden at stride 16."""

    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        self.pyramid = pyramid

    def forward(self, stages: StageFeatures, seen_BN: Tensor) -> PyramidLevels:
        """As `Pyramid.forward`."""
        levels: PyramidLevels = self.pyramid(stages, seen_BN.roll(1, dims=1))
        return levels


def _features(network: MaskedNetwork, images_BCHW: Tensor, mask_BN: Tensor) -> dict[str, Tensor]:
    """Name -> (B, N, ...) in image order, of one forward pass."""
    with _watched(network) as found:
        prediction = network(images_BCHW, mask_BN)
    if isinstance(network, FeaturePretrainer):
        return found
    # Visible units have the least noise, so the mask is a noise that hides what it says if the numbers agree.
    if not torch.equal(prediction.mask_BN, mask_BN):
        raise InputError(
            f"The network hides {int(prediction.mask_BN[0].sum())} units of an image, the mask "
            f"{int(mask_BN[0].sum())}",
            where="find_leaks",
            fix="make the mask by choose_units with the network's mask_ratio",
        )
    return {
        name: x if x.shape[1] == network.num_units else _in_image_order(x, prediction.kept_BK, mask_BN)
        for name, x in found.items()
    }


def _in_image_order(x: Tensor, kept_BK: Tensor, mask_BN: Tensor) -> Tensor:
    """(B, K, ...) -> (B, N, D), 0 where a unit is hidden."""
    flat_BKD = x.flatten(2)
    whole_BND = flat_BKD.new_zeros(*mask_BN.shape, flat_BKD.shape[-1])
    return whole_BND.scatter(1, kept_BK.unsqueeze(-1).expand_as(flat_BKD), flat_BKD)


@contextmanager
def _watched(network: MaskedNetwork) -> Iterator[dict[str, Tensor]]:
    """Features by name while the network runs, from its own modules, so that the path of training is seen."""
    found: dict[str, Tensor] = {}

    def keep_stages(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        stages: StageFeatures = inputs[0]
        for stride, x in zip((4, 8, 16), stages, strict=True):
            found[f"stage {stride}"] = x

    def keep_levels(module: nn.Module, inputs: tuple[Any, ...], levels: PyramidLevels) -> None:
        for stride, x in zip((4, 8, 16), levels, strict=True):
            found[f"pyramid {stride}"] = x

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[name] = inputs[0]

        return keep

    handles = [
        network.pyramid.register_forward_pre_hook(keep_stages),
        network.pyramid.register_forward_hook(keep_levels),
    ]
    if isinstance(network, MaskedPretrainer):
        ends = {"decoder input": network.decoder.blocks[0]}
    else:
        heads = network.predictor
        ends = {"head input": heads.norm, "early head input": heads.early_blocks[0]}
    handles += [module.register_forward_pre_hook(keep_input(name)) for name, module in ends.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
