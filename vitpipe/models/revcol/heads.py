"""RevCol's intermediate supervision: classifiers and decoders along the columns, and their loss.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696, section 3 (intermediate supervision): the
pixel losses make early columns keep low-level detail, the class losses give late ones semantics.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.revcol.revcol import ChannelNorm, ClassifierHead, ConvBlock, RevCol, RevColShape

# All numbers here are the released code's, and checked against it
# (tests/models/revcol/test_revcol_golden.py).
NUM_PARTS = 4
_PIXEL_FACTOR = 3.0
_CLASS_FACTOR = 0.7
# Above this (ImageNet-22K) the released code has a decoder of a single layer.
_MANY_CLASSES = 1000
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


class Supervised(NamedTuple):
    """Outputs of the heads, first to last.

    Attributes:
        logits: four times (B, num_classes).
        images: three times (B, 3, H, W), logits of pixel values in 0 ... 1.
    """

    logits: tuple[Tensor, ...]
    images: tuple[Tensor, ...]


class Decoder(nn.Module):
    """Level 3 to pixels: three times project, upsample by 2 and mix, then each position to 4 x 4 pixels."""

    def __init__(self, shape: RevColShape) -> None:
        super().__init__()
        widths = shape.widths[::-1]
        self.proj_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, narrow, kernel_size=1), ChannelNorm(narrow), nn.GELU())
            for wide, narrow in pairwise(widths)
        )
        # Hidden width = width: these blocks do not expand by 4 as those of the columns do.
        self.normal_layers = nn.ModuleList(nn.Sequential(ConvBlock(width, width)) for width in widths[1:])
        self.projback = nn.Sequential(nn.Conv2d(widths[-1], 3 * 4 * 4, kernel_size=1), nn.PixelShuffle(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C3, H, W) -> (B, 3, 32 * H, 32 * W)."""
        for project, mix in zip(self.proj_layers, self.normal_layers, strict=True):
            # Aligned corners, unlike everywhere else here: so does the released decoder.
            x_BCHW = F.interpolate(project(x_BCHW), scale_factor=2, mode="bilinear", align_corners=True)
            x_BCHW = mix(x_BCHW)
        return self.projback(x_BCHW)


class PlainDecoder(nn.Module):
    """Level 3 to pixels in one step: the released decoder for more than 1000 classes."""

    def __init__(self, shape: RevColShape) -> None:
        super().__init__()
        width = shape.widths[-1]
        self.projback = nn.Sequential(
            ChannelNorm(width), nn.Conv2d(width, 3 * 32 * 32, kernel_size=1), nn.PixelShuffle(32)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C3, H, W) -> (B, 3, 32 * H, 32 * W)."""
        return self.projback(x_BCHW)


class SupervisedRevCol(RevCol):
    """RevCol with a classifier after every quarter of its columns and a decoder after all but the last.

    Raises:
        InputError: with fewer than four columns.
    """

    def _make_heads(self, num_classes: int) -> None:
        if self.shape.num_columns < NUM_PARTS:
            raise InputError(
                f"Intermediate supervision needs {NUM_PARTS} columns, but {self.shape.name} has "
                f"{self.shape.num_columns}",
                where="model.name",
                fix="use a shape with more columns, or the class RevCol",
            )
        decoder = Decoder if num_classes <= _MANY_CLASSES else PlainDecoder
        self.cls_blocks = nn.ModuleList(
            ClassifierHead(self.shape.widths[-1], num_classes) for _ in range(NUM_PARTS)
        )
        self.decoder_blocks = nn.ModuleList(decoder(self.shape) for _ in range(NUM_PARTS - 1))

    def forward_supervised(self, images_BCHW: Tensor) -> Supervised:
        """(B, 3, H, W) -> the outputs of all heads."""
        part = self.shape.num_columns // NUM_PARTS
        ends = [part * (index + 1) for index in range(NUM_PARTS)]
        tops = [states[-1] for states in self.run_columns(images_BCHW, ends)]
        return Supervised(
            tuple(head(top) for head, top in zip(self.cls_blocks, tops, strict=True)),
            tuple(decode(top) for decode, top in zip(self.decoder_blocks, tops[:-1], strict=True)),
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> the last classifier's logits (B, num_classes)."""
        return self.cls_blocks[-1].classifier(self.frozen_features(images_BCHW))  # type: ignore[operator]


def compound_loss(outputs: Supervised, images_BCHW: Tensor, target: Tensor) -> Tensor:
    """The parts of the loss, first head to last, (4,); their sum is the loss.

    Head i of the first three: `3 * (1 - i/3)` times the cross entropy of its image with the pixels, plus
    `0.7 * (i + 1) / 4` times that of its logits with the target. The last: the latter alone, unweighted.

    Args:
        outputs: of `forward_supervised`.
        images_BCHW: the input, normalised by ImageNet's mean and std.
        target: class indices (B,), or class probabilities (B, num_classes).
    """
    # Back to pixel values in 0 ... 1, the targets of the cross entropy; clamped, because at exactly 0 or 1 it
    # would drive the logits to infinity.
    mean = images_BCHW.new_tensor(_IMAGENET_MEAN).view(3, 1, 1)
    std = images_BCHW.new_tensor(_IMAGENET_STD).view(3, 1, 1)
    pixels = (images_BCHW * std + mean).clamp(0.01, 0.99)
    num_decoders = len(outputs.images)
    # The pixel weight falls along the columns (3, 2, 1), the class weight rises (0.7 / 4, 1.4 / 4, 2.1 / 4).
    parts = [
        _PIXEL_FACTOR * (1 - i / num_decoders) * F.binary_cross_entropy_with_logits(image, pixels)
        + _CLASS_FACTOR * (i + 1) / len(outputs.logits) * F.cross_entropy(outputs.logits[i], target)
        for i, image in enumerate(outputs.images)
    ]
    return torch.stack([*parts, F.cross_entropy(outputs.logits[-1], target)])
