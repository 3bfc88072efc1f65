"""Swin Transformers for detection and segmentation: the four stages as maps, images of any size.

The network of the detectors and segmentors of Swin Transformer (Ze Liu et al., arXiv 2103.14030), which
mmdetection's and mmsegmentation's `SwinTransformer` is, too. It differs from the classifier: each stage has a
new norm of its own behind it, grids are padded to whole windows, and windows shift in every second block of
the last stage, too, also where its grid is no larger than a window.

Shapes: B images, R rows and S columns of tokens, C channels, maps (B, C, H, W). Parameter names: `backbone.*`
as in the classifier, `norms.STAGE.*`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.network import DenseBackbone
from vitpipe.models.swin.shapes import NUM_STAGES, SwinShape
from vitpipe.models.swin.swin import TABLE, SwinNetwork

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer


class SwinMaps(SwinNetwork, DenseBackbone):
    """Outputs of the last blocks of the stages, each behind its own norm; strides 4 to 32, sides rounded up.

    Args:
        shape: the size that the backbone has.
        backbone: of `build_swin` for any image size.
    """

    # Not mmdetection's own module: it needs mmcv's registry (this package is plain torch), merges tokens in
    # another order, so that weights of a classifier would have to be permuted, draws dropped branches from
    # torch's generator and has other names. timm's modules take a classifier's weights as they are; a test
    # compares outputs and gradients with mmdetection's.
    def __init__(self, shape: SwinShape, backbone: SwinTransformer) -> None:
        super().__init__(shape, backbone)
        backbone.norm = nn.Identity()  # the classifier's; has no parameters here
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.widths)
        # As in the released configurations: whatever has "norm" in its name, which the batch norms of heads
        # have not.
        norms = (name for name, _ in self.named_parameters() if "norm" in name)
        self.no_decay = (TABLE, *norms)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return tuple(self.shape.width * 2**stage for stage in range(NUM_STAGES))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> maps (B, C, H/s, W/s)."""
        maps = []
        x_BRSC = self.backbone.patch_embed(images_BCHW)
        for stage, norm in zip(self.backbone.layers, self.norms, strict=True):
            x_BRSC = stage.downsample(x_BRSC)
            for block in stage.blocks:
                x_BRSC = x_BRSC + block.drop_path1(_window_attention(block, block.norm1(x_BRSC)))
                x_BRSC = x_BRSC + block.drop_path2(block.mlp(block.norm2(x_BRSC)))
            maps.append(norm(x_BRSC).permute(0, 3, 1, 2).contiguous())
        return tuple(maps)


def _window_attention(block: Any, x_BRSC: Tensor) -> Tensor:
    """Attention in the windows of timm's block, on a grid that is padded to whole ones."""
    # Before timm's own shift. timm alone shifts first and pads then: the padding would lie between the last
    # rows and those that come round from the top, and its masks in another place than either.
    rows, columns = x_BRSC.shape[1:3]
    height, width = block.window_size
    whole = F.pad(x_BRSC, (0, 0, 0, -columns % width, 0, -rows % height))
    attended: Tensor = block._attn(whole)[:, :rows, :columns]
    return attended
