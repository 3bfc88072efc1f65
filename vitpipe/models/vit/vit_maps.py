"""Plain vision transformers for detection and segmentation: outputs of four blocks, at one stride or several.

Blocks and strides of SelfPatch's released configurations (Yun et al., CVPR 2022), which follow XCiT's (arXiv
2106.09681) in detection and mmsegmentation's in segmentation. No norm stands behind the blocks, and a class
token is left out of the maps.

    detect:  blocks 4, 6, 8, 12 of 12 > x4 (stride 4), x2 (8), as they are (16), /2 (32), for an FPN
    segment: blocks 3, 6, 9, 12 of 12, all at stride 16, or made into the same pyramid

Shapes: B images, C channels, maps (B, C, H, W). Parameter names: `backbone.*`, `rescale.L`.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.network import DenseBackbone, Task
from vitpipe.models.rescale import rescaled
from vitpipe.models.vit.vit import ViT

# Of the depth: where the blocks lie whose outputs are the maps.
_SHARES = {"detect": (1 / 3, 1 / 2, 2 / 3, 1.0), "segment": (1 / 4, 1 / 2, 3 / 4, 1.0)}
_STRIDES = (4, 8, 16, 32)
_BLOCK_NORMS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")


class ViTMaps(DenseBackbone):
    """Trunk without last norm, and what brings its maps to their strides.

    Args:
        backbone: with or without class token.
        task: which blocks.
        is_pyramid: maps at strides 4, 8, 16 and 32, otherwise all at the side of a patch.

    Raises:
        InputError: a pyramid from patches whose side is no power of two.
    """

    family = "vit"

    def __init__(self, backbone: ViT, task: Task, *, is_pyramid: bool) -> None:
        super().__init__()
        self.backbone = backbone
        depth, patch = len(backbone.blocks), backbone.patch_size
        self.blocks = tuple(max(0, round(depth * share) - 1) for share in _SHARES[task])
        if is_pyramid and patch & (patch - 1):
            raise InputError(
                f"No maps at strides 4 to 32 can be made of patches of {patch} pixels",
                where="model.patch_size",
                fix="use 4, 8, 16 or 32",
            )
        factors = [patch / stride for stride in _STRIDES] if is_pyramid else [1.0] * len(_STRIDES)
        self.rescale = nn.ModuleList(rescaled(backbone.shape.width, factor) for factor in factors)
        # The released configurations exempt by parts of names: in detection the norms of the blocks, which
        # have other names in segmentation and decay there (`DetectOptimConfig.decay_vectors`).
        tables = () if backbone.shape.tokens_decay else ("position", "class_token")
        self.no_decay = (*tables, *_BLOCK_NORMS) if task == "detect" else tables

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map."""
        return (self.backbone.shape.width,) * len(_STRIDES)

    @property
    def num_layers(self) -> int:
        """Number of layer ids: input, one per block, everything behind them."""
        return len(self.backbone.blocks) + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter: patches, positions and class token 0, block k its 1-based number."""
        if found := re.match(r"backbone\.blocks\.(\d+)\.", name):
            return int(found[1]) + 1
        return 0 if name.startswith("backbone.") else self.num_layers - 1

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> four maps.

        Raises:
            InputError: when a side is no multiple of the patch.
        """
        grid = self.backbone.grid_of(images_BCHW)
        found = self.backbone(images_BCHW, self.blocks)
        maps = [patches.transpose(1, 2).unflatten(2, grid) for patches in found.patches]
        return tuple(rescale(x_BCHW) for rescale, x_BCHW in zip(self.rescale, maps, strict=True))
