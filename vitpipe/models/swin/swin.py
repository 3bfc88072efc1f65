"""timm's Swin Transformer as an encoder and as a classifier.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows; Ze Liu, Yutong Lin, Yue Cao, Han Hu,
Yixuan Wei, Zheng Zhang, Stephen Lin, Baining Guo; arXiv 2103.14030. The network is timm's, which gives the
released one's numbers; here are its drop path, layer ids and read-outs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import BranchDrop, init_weights
from vitpipe.models.network import Classifier, Encoder, Features, Network
from vitpipe.models.swin.shapes import PATCH, STRIDE, SwinShape, misfit_of_windows

if TYPE_CHECKING:
    from timm.models.swin_transformer import SwinTransformer

# End of the name of every table of relative positions.
TABLE = "relative_position_bias_table"


def build_swin(
    shape: SwinShape, *, image_size: int | None, window: int | None = None, drop_path: float = 0.0
) -> SwinTransformer:
    """timm's network without a head; on images it gives the mean of the last norm's tokens, (B, C).

    Args:
        shape: one of `SHAPES`.
        image_size: pixels per side; images of other sizes are refused. `None` for the network inside of
            `SwinMaps`, which takes any size: all windows have their full size, masks are made as needed.
        window: tokens per side of a window; the shape's own if not given.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.

    Raises:
        InputError: when the windows do not divide the grids of that image size.
    """
    # Here and not above: timm imports all its networks and torch's compiler, 3 s that a stage of another
    # family need not spend.
    from timm.layers import DropPath
    from timm.models.swin_transformer import SwinTransformer

    window = window or shape.window
    if image_size is not None and (wrong := misfit_of_windows(image_size, window)) is not None:
        raise InputError(wrong[0], where="model.image_size, model.window", fix=wrong[1])
    network = SwinTransformer(
        img_size=STRIDE * window if image_size is None else image_size,
        strict_img_size=image_size is not None,
        always_partition=image_size is None,
        patch_size=PATCH,
        num_classes=0,
        embed_dim=shape.width,
        depths=shape.depths,
        num_heads=shape.heads,
        window_size=window,
        drop_path_rate=drop_path,
    )
    # Without effect on sides that patches divide; others are padded, as in the released detectors.
    network.patch_embed.dynamic_img_pad = image_size is None
    if shape.init_gain is not None:
        init_weights(network, shape.init_gain)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, BranchDrop(child.drop_prob))
    return network


class SwinNetwork(Network):
    """Common to all: layers of the learning rate, and what does not decay.

    Args:
        shape: the size that the backbone has.
        backbone: of `build_swin`.
    """

    family = "swin"
    # As in the released supervised training. (MoBY decays them.)
    no_decay: tuple[str, ...] = (TABLE,)

    def __init__(self, shape: SwinShape, backbone: SwinTransformer) -> None:
        super().__init__()
        self.shape = shape
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: patch embedding, one per block, everything behind them."""
        return self.shape.num_blocks + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter.

        A merge has that of the block before it, as in SimMIM's released code, and so has a norm of a map.
        """
        depths = self.shape.depths
        if found := re.match(r"norms\.(\d+)\.", name):
            return sum(depths[: int(found[1]) + 1])
        found = re.match(r"backbone\.layers\.(\d+)\.(?:downsample|blocks\.(\d+))\.", name)
        if found is None:
            return 0 if name.startswith("backbone.patch_embed.") else self.num_layers - 1
        before = sum(depths[: int(found[1])])
        return before if found[2] is None else before + int(found[2]) + 1


class SwinEncoder(SwinNetwork, Encoder):
    """The network without a head; blocks are those of all stages, tokens and widths those of each."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the four stages; merges are not counted."""
        return self.shape.num_blocks

    @property
    def feature_width(self) -> int:
        """C of the last stage."""
        return self.shape.last_width

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Tokens of blocks at the stride and width of their stages; the mean of the last norm's tokens.

        Raises:
            InputError: no such block; attention is asked for (it is one of windows); images of another size
                than the network is built for.
        """
        self.refuse_attention(attention)
        wanted = self.chosen_blocks(blocks)
        self._check_size(images_BCHW)
        maps: dict[int, Tensor] = {}
        number = 0
        x_BRSC = self.backbone.patch_embed(images_BCHW)  # rows and columns of tokens, channels last
        for stage in self.backbone.layers:
            x_BRSC = stage.downsample(x_BRSC)
            for block in stage.blocks:
                x_BRSC = block(x_BRSC)
                if number in wanted:
                    maps[number] = x_BRSC
                number += 1
        return Features(
            tokens=tuple(maps[number].flatten(1, 2) for number in wanted),
            grids=tuple((maps[number].shape[1], maps[number].shape[2]) for number in wanted),
            pooled=self.backbone.norm(x_BRSC).mean(dim=(1, 2)),
        )

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The last norm, for tokens of the last stage; earlier stages have none, theirs stay as they are."""
        if tokens.shape[-1] != self.feature_width:
            return tokens
        normed: Tensor = self.backbone.norm(tokens)
        return normed

    def _check_size(self, images_BCHW: Tensor) -> None:
        built_for = tuple(self.backbone.patch_embed.img_size)
        given = tuple(images_BCHW.shape[-2:])
        if given != built_for:
            raise InputError(
                f"{self.shape.name} is built for images of {built_for[0]} x {built_for[1]} pixels and got "
                f"{given[0]} x {given[1]}",
                where="model.image_size",
                fix="resize or crop the images, or give model.image_size their size",
            )


class SwinClassifier(SwinEncoder, Classifier):
    """Mean of the last norm's tokens > Linear.

    Args:
        num_classes: K.
        head_init_std: of the head's weight.
    """

    def __init__(
        self, shape: SwinShape, backbone: SwinTransformer, num_classes: int, head_init_std: float = 0.02
    ) -> None:
        super().__init__(shape, backbone)
        self.head = nn.Linear(shape.last_width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=head_init_std)
        nn.init.zeros_(self.head.bias)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head on the mean."""
        return self.head(features.pooled)
