"""The trunk in detection and segmentation: behind the pre-trained pyramid, or as maps of four blocks.

iTPN: arXiv 2211.12735, supplement, section 3; what the heads read of the pyramid is as in the released code
for HiViT. Without pyramid: outputs of blocks 4, 6, 8 and 12 of 12 at strides 4 to 32, as in BEiT (Bao et
al., arXiv 2106.08254), whose segmentation MAE takes over; iTPN's table 13 counts a detector on such maps.

Shapes: B images, C channels, maps (B, C, H, W). Parameter names: `backbone.*`, `pyramid.*`, `rescale.L`.
"""

from __future__ import annotations

from torch import Tensor, nn

from vitpipe.models.hivit.pyramid import Pyramid, map_features, task_maps, task_widths
from vitpipe.models.itpn_vit.unit_vit import UnitViT, layer_index
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.network import DenseBackbone, Task
from vitpipe.models.rescale import rescaled

_STRIDES = (4, 8, 16, 32)
_SHARES = (1 / 3, 1 / 2, 2 / 3, 1.0)  # of the depth


class UnitMaps(DenseBackbone):
    """Trunk, and pyramid or rescaled maps.

    Layer ids are those of the trunk's blocks; everything behind them has the full learning rate. HiViT's
    quirk, a last block that learns faster than the heads, comes from its merges, which this trunk has not.

    Args:
        backbone: with lifts where there is a pyramid.
        pyramid: `None` for maps of four blocks.
    """

    family = "itpn_vit"

    def __init__(self, backbone: UnitViT, pyramid: Pyramid | None, task: Task) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.task = backbone, pyramid, task
        depth = len(backbone.blocks)
        self.map_blocks = tuple(max(0, round(depth * share) - 1) for share in _SHARES)
        width = backbone.widths[-1]
        factors = [UNIT_PIXELS / stride for stride in _STRIDES] if pyramid is None else []
        self.rescale = nn.ModuleList(rescaled(width, factor) for factor in factors)
        # As HiViT's: in segmentation the position table decays.
        self.no_decay = ("position",) if task == "detect" else ()

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        if self.pyramid is None:
            return (self.backbone.widths[-1],) * len(_STRIDES)
        return task_widths(self.pyramid.width, self.backbone.widths, self.task)

    @property
    def num_layers(self) -> int:
        """Number of layer ids: input, one per block, everything behind them."""
        return len(self.backbone.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `layer_index`."""
        return layer_index(name, len(self.backbone.blocks))

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> the maps of the task, finest first.

        Raises:
            InputError: when a side is no multiple of 16, or not that of the relative bias.
        """
        grid = self.backbone.grid_of(images_BCHW)
        if self.pyramid is not None:
            stages = self.backbone.forward_stages(images_BCHW)
            return task_maps(map_features(self.pyramid, stages, grid), self.task)
        outputs = self.backbone.outputs(images_BCHW, self.map_blocks)
        maps = [x_BNC.transpose(1, 2).unflatten(2, grid) for x_BNC in outputs]
        return tuple(rescale(x_BCHW) for rescale, x_BCHW in zip(self.rescale, maps, strict=True))
