"""ResNets in a recipe: the sizes that there are; imports no torch.

Deep Residual Learning for Image Recognition; Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun; CVPR 2016,
arXiv 1512.03385.
"""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.contracts.graph import NetworkKind

_RESNET = "Deep Residual Learning for Image Recognition (He et al., CVPR 2016, arXiv 1512.03385)"


class ResNetConfig(ModelConfig):
    """A ResNet, with strides in the 3 x 3 convolutions as in torchvision ("v1.5")."""

    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder", "classifier")
    stride: ClassVar[int] = 32


CONFIG = ResNetConfig

# tests/models/test_every_model.py measures parameters and multiply-adds of every entry again, and compares
# with `published_params` within 2 %.
ENTRIES = (
    ModelEntry(
        name="resnet_nano",
        summary="blocks 1-1-1-1, channels 64 to 256: our own, for a laptop and the demo",
        paper="ours, after " + _RESNET,
        published_params=None,
        classifier_params=411_528,
        classifier_macs=13_350_912,
        image_size=64,
        num_layers=6,  # input, 4 blocks, head
    ),
    ModelEntry(
        name="resnet50",
        summary="blocks 3-4-6-3, channels 256 to 2048",
        paper=_RESNET,
        published_params=None,  # drloc rounds it to 25 million
        classifier_params=25_557_032,
        classifier_macs=4_089_184_256,
        image_size=224,
        num_layers=18,
    ),
)
