"""RevColV2 for detection and segmentation: all levels of the last top-down column as maps at several strides.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005: the last column has low-level detail at its low levels and semantics at its top. Which level
is used at which stride, and the layers in between, are our reading: those that plain transformers use, in
segmentation of BEiT (Hangbo Bao et al.; arXiv 2106.08254), in detection of ViTDet (Yanghao Li et al.; arXiv
2203.16527).

    level 0 > x4 (stride 4), level 1 > x2 (8), level 2 (16), level 3 > /2 (32); in detection also stride 64

Shapes: B images, C channels, maps (B, C, H, W). Parameter names: `backbone.*`, `norms.L`, `rescale.L`, in
detection `refine.L.{0,1,2,3}`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.network import DenseBackbone, Task
from vitpipe.models.rescale import doubled, rescaled
from vitpipe.models.revcol.revcol import ChannelNorm
from vitpipe.models.revcolv2.columns import NORM_EPS, NUM_LEVELS
from vitpipe.models.revcolv2.revcolv2 import RevColV2, RevColV2Network


class RevColV2Dense(RevColV2Network, DenseBackbone):
    """Backbone, one LayerNorm per level, neck.

    Image sides must be multiples of 16; give multiples of 32 (of 64 in detection) for maps whose sides are
    exactly those of the image over the stride: otherwise the last are rounded up.

    Args:
        backbone: with `window` for large images.
        task: `segment` gives 4 maps of the backbone's width, `detect` 5 of its shape's `neck_width`.
    """

    def __init__(self, backbone: RevColV2, task: Task) -> None:
        super().__init__(backbone)
        self.task = task
        channels, width = backbone.shape.width, backbone.shape.neck_width
        # The columns end without a norm (pre-norm blocks), and the levels differ in magnitude: one norm each.
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=NORM_EPS) for _ in range(NUM_LEVELS))
        self.refine: nn.ModuleList | None = None
        if task == "segment":
            self._widths: tuple[int, ...] = (channels,) * NUM_LEVELS
            self.rescale = _segment_rescale(channels)
        else:
            self._widths = (width,) * (NUM_LEVELS + 1)
            self.rescale = _detect_rescale(channels)
            # ViTDet's pyramid: upsampling by 2 halves the channels, by 4 quarters them; then 256 for all
            # maps.
            inputs = (channels // 4, channels // 2, channels, channels)
            self.refine = nn.ModuleList(_refine(channels, width) for channels in inputs)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return self._widths

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps at strides 4, 8, 16, 32, in detection also 64.

        Raises:
            InputError: when a side is no multiple of 16.
        """
        levels = self.backbone(images_BCHW)
        maps = [
            rescale(norm(level).permute(0, 3, 1, 2))
            for level, norm, rescale in zip(levels, self.norms, self.rescale, strict=True)
        ]
        if self.refine is None:
            return tuple(maps)
        maps = [refine(x_BCHW) for x_BCHW, refine in zip(maps, self.refine, strict=True)]
        # Stride 64 (P6) subsamples P5: a pooling window of 1, as in ViTDet and mmdet's FPN.
        return (*maps, F.max_pool2d(maps[-1], kernel_size=1, stride=2))


def _segment_rescale(width: int) -> nn.ModuleList:
    # BEiT's neck, which keeps the channels.
    return nn.ModuleList(rescaled(width, factor) for factor in (4, 2, 1, 0.5))


def _detect_rescale(width: int) -> nn.ModuleList:
    half = width // 2
    quadruple = nn.Sequential(doubled(width, half), ChannelNorm(half), nn.GELU(), doubled(half, width // 4))
    return nn.ModuleList([quadruple, doubled(width, half), nn.Identity(), rescaled(width, 0.5)])


def _refine(width: int, out_width: int) -> nn.Sequential:
    # As in ViTDet; without bias, because a norm follows each convolution.
    return nn.Sequential(
        nn.Conv2d(width, out_width, kernel_size=1, bias=False),
        ChannelNorm(out_width),
        nn.Conv2d(out_width, out_width, kernel_size=3, padding=1, bias=False),
        ChannelNorm(out_width),
    )
