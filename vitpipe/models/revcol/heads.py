"""RevCol's heads for intermediate supervision: classifiers and decoders along the columns.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696, section 3 (intermediate supervision): the
pixel losses make early columns keep low-level detail, the class losses give late ones semantics. The losses:
`methods/intermediate_supervision`.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.network import Classifier, IntermediateHeads, IntermediateOutputs
from vitpipe.models.revcol.revcol import (
    ChannelNorm,
    ClassifierHead,
    ConvBlock,
    RevCol,
    RevColShape,
    init_weights,
)

# All numbers here are the released code's, and checked against it
# (tests/models/revcol/test_revcol_golden.py).
NUM_PARTS = 4
# Above this (ImageNet-22K) the released code has a decoder of a single layer.
_MANY_CLASSES = 1000


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


class RevColHeads(IntermediateHeads):
    """A classifier and a decoder after each of the first three quarters of the columns.

    The fourth classifier is the network's own.

    Args:
        shape: of the network.
        num_classes: K of every classifier.
        head_init_std: of their weights.

    Raises:
        InputError: with fewer than four columns.
    """

    def __init__(self, shape: RevColShape, num_classes: int, *, head_init_std: float = 0.02) -> None:
        super().__init__()
        if shape.num_columns < NUM_PARTS:
            raise InputError(
                f"Intermediate supervision needs {NUM_PARTS} columns, but {shape.name} has "
                f"{shape.num_columns}",
                where="model.name",
                fix="use a model with more columns, or the method classify",
            )
        decoder = Decoder if num_classes <= _MANY_CLASSES else PlainDecoder
        part = shape.num_columns // NUM_PARTS
        # Numbers of columns, the last one all of them.
        self.ends = [*(part * number for number in range(1, NUM_PARTS)), shape.num_columns]
        self.cls_blocks = nn.ModuleList(
            ClassifierHead(shape.widths[-1], num_classes) for _ in range(NUM_PARTS - 1)
        )
        self.decoder_blocks = nn.ModuleList(decoder(shape) for _ in range(NUM_PARTS - 1))
        init_weights(self, head_init_std)

    def forward(self, model: Classifier, images_BCHW: Tensor) -> IntermediateOutputs:
        """See `IntermediateHeads`; one pass through the columns serves all heads."""
        assert isinstance(model, RevCol)
        *tops, last = (states[-1] for states in model.run_columns(images_BCHW, self.ends))
        logits = (head(top) for head, top in zip(self.cls_blocks, tops, strict=True))
        images = (decode(top) for decode, top in zip(self.decoder_blocks, tops, strict=True))
        return IntermediateOutputs((*logits, model.cls(last)), tuple(images))
