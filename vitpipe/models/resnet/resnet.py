"""timm's ResNet as an encoder and as a classifier.

Deep Residual Learning for Image Recognition; Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun; arXiv
1512.03385. The network is timm's, which gives torchvision's numbers; here are its drop path, layer ids and
read-outs. Initial values are torchvision's: the last batch norm of a block begins at 1 and not at 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import BranchDrop
from vitpipe.models.network import Classifier, Encoder, Features

if TYPE_CHECKING:
    from timm.models.resnet import ResNet

STRIDE = 32  # pixels of a token of the last stage
NUM_STAGES = 4
EXPANSION = 4
"""Channels that a block puts out over those in its middle."""
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class ResNetShape:
    """One size, of bottleneck blocks.

    Attributes:
        depths: blocks of the four stages.
        widths: channels in the middle of the blocks of each stage.
    """

    name: str
    depths: Four
    widths: Four = (64, 128, 256, 512)

    @property
    def num_blocks(self) -> int:
        """Of all stages."""
        return sum(self.depths)


SHAPES: dict[str, ResNetShape] = {
    shape.name: shape
    for shape in (
        ResNetShape("resnet_nano", (1, 1, 1, 1), (16, 24, 32, 64)),
        ResNetShape("resnet50", (3, 4, 6, 3)),
    )
}


def build_resnet(shape: ResNetShape, *, drop_path: float = 0.0) -> ResNet:
    """timm's network without a head; on images it gives the mean of the last map, (B, C).

    Args:
        shape: one of `SHAPES`.
        drop_path: drop ratio of the last block; it rises linearly from 0 in the first.
    """
    # Here and not above: timm imports all its networks and torch's compiler, 3 s that a stage of another
    # family need not spend.
    from timm.layers import DropPath
    from timm.models.resnet import Bottleneck, ResNet

    network = ResNet(
        Bottleneck,
        shape.depths,
        num_classes=0,
        channels=shape.widths,
        drop_path_rate=drop_path,
        zero_init_last=False,
    )
    for block in network.modules():
        if isinstance(block, Bottleneck) and isinstance(block.drop_path, DropPath):
            block.drop_path = BranchDrop(block.drop_path.drop_prob)
    return network


class ResNetEncoder(Encoder):
    """The network without a head; its blocks are the residual ones of all stages, its tokens their pixels.

    Args:
        shape: the size that the backbone has.
        backbone: of `build_resnet`.
    """

    family = "resnet"

    def __init__(self, shape: ResNetShape, backbone: ResNet) -> None:
        super().__init__()
        self.shape = shape
        self.backbone = backbone

    @property
    def num_layers(self) -> int:
        """Number of layer ids: stem, one per block, head."""
        return self.shape.num_blocks + 2

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter."""
        if found := re.match(r"backbone\.layer(\d)\.(\d+)\.", name):
            return sum(self.shape.depths[: int(found[1]) - 1]) + int(found[2]) + 1
        return 0 if name.startswith("backbone.") else self.num_layers - 1

    @property
    def num_blocks(self) -> int:
        """Residual blocks of the four stages."""
        return self.shape.num_blocks

    @property
    def feature_width(self) -> int:
        """C of the last stage."""
        return EXPANSION * self.shape.widths[-1]

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Maps of blocks behind their last ReLU as tokens, and the mean of the last map.

        Raises:
            InputError: no such block; attention is asked for, which there is not; a side below 32 pixels.
        """
        self.refuse_attention(attention)
        wanted = self.chosen_blocks(blocks)
        if min(images_BCHW.shape[-2:]) < STRIDE:
            height, width = images_BCHW.shape[-2:]
            raise InputError(
                f"{self.shape.name} cannot take an image of {height} x {width} pixels",
                where="image_size, and sizes of crops",
                fix=f"use sides of at least {STRIDE} pixels",
            )
        net = self.backbone
        maps: dict[int, Tensor] = {}
        number = 0
        x_BCRS = net.maxpool(net.act1(net.bn1(net.conv1(images_BCHW))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in stage:
                x_BCRS = block(x_BCRS)
                if number in wanted:
                    maps[number] = x_BCRS
                number += 1
        return Features(
            tokens=tuple(maps[number].flatten(2).transpose(1, 2) for number in wanted),
            grids=tuple((maps[number].shape[2], maps[number].shape[3]) for number in wanted),
            pooled=net.global_pool(x_BCRS),
        )


class ResNetClassifier(ResNetEncoder, Classifier):
    """Mean of the last map > Linear, with torch's initial values.

    Args:
        num_classes: K.
    """

    def __init__(self, shape: ResNetShape, backbone: ResNet, num_classes: int) -> None:
        super().__init__(shape, backbone)
        self.head = nn.Linear(self.feature_width, num_classes)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.head.out_features

    def logits(self, features: Features) -> Tensor:
        """Head on the mean."""
        logits_BK: Tensor = self.head(features.pooled)
        return logits_BK
