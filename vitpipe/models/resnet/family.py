"""The ResNet family: networks from a recipe, and whose weights they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitpipe.models.families import Family, WeightsInfo, head_rule
from vitpipe.models.network import Network
from vitpipe.models.resnet.config import ResNetConfig
from vitpipe.models.resnet.resnet import (
    NUM_STAGES,
    SHAPES,
    ResNetClassifier,
    ResNetEncoder,
    ResNetShape,
    build_resnet,
)
from vitpipe.models.weights import Rule


class ResNetFamily(Family[ResNetConfig]):
    """Builds ResNets, and reads and transfers their weights."""

    name = "resnet"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> nn.Module:
        """timm's network without a head; `options` are those of `build_resnet`. Any image size works."""
        return build_resnet(SHAPES[name], **options)

    def encoder(self, model: ResNetConfig, *, drop_path: float) -> ResNetEncoder:
        """The network without a head."""
        shape = SHAPES[model.name]
        return ResNetEncoder(shape, build_resnet(shape, drop_path=drop_path))

    def classifier(self, model: ResNetConfig, *, num_classes: int, drop_path: float) -> ResNetClassifier:
        """The network with a linear head."""
        shape = SHAPES[model.name]
        return ResNetClassifier(shape, build_resnet(shape, drop_path=drop_path), num_classes)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by stem and first block; `None` without them."""
        if "backbone.conv1.weight" not in state or "backbone.layer1.0.conv1.weight" not in state:
            return None
        shape, head = shape_of(state, "backbone."), state.get("head.weight")
        return WeightsInfo(
            family=self.name,
            kind="encoder" if head is None else "classifier",
            model="" if shape is None else shape.name,
            image_size=0,  # any
            num_classes=0 if head is None else head.shape[0],
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ: the head."""
        return (head_rule(network, info),)


def shape_of(state: Mapping[str, Tensor], prefix: str = "") -> ResNetShape | None:
    """The size in `SHAPES` that has these blocks and widths; `None` when there is none.

    Args:
        state: with timm's or torchvision's names.
        prefix: of the names.
    """
    depths, widths = [], []
    for stage in range(1, NUM_STAGES + 1):
        start = f"{prefix}layer{stage}."
        depths.append(len({n.removeprefix(start).split(".")[0] for n in state if n.startswith(start)}))
        middle = state.get(f"{start}0.conv3.weight")  # only bottleneck blocks have it
        widths.append(0 if middle is None or middle.ndim != 4 else middle.shape[1])
    sizes = (tuple(depths), tuple(widths))
    return next((shape for shape in SHAPES.values() if (shape.depths, shape.widths) == sizes), None)


FAMILY = ResNetFamily()
