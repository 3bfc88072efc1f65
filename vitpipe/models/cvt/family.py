"""The CvT family: networks from a recipe, and whose weights they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.models.cvt.config import CvtConfig
from vitpipe.models.cvt.cvt import NUM_STAGES, SHAPES, CvT, CvtShape
from vitpipe.models.cvt.cvt_classifier import CvtClassifier, CvtEncoder
from vitpipe.models.families import Family, WeightsInfo, head_rule
from vitpipe.models.network import Network
from vitpipe.models.weights import Rule


class CvtFamily(Family[CvtConfig]):
    """Builds CvTs, and reads and transfers their weights."""

    name = "cvt"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> CvT:
        """The network without a head; `options` are those of `CvT`. Any image size works."""
        return CvT(SHAPES[name], **options)

    def encoder(self, model: CvtConfig, *, drop_path: float) -> CvtEncoder:
        """The network without a head."""
        return CvtEncoder(CvT(SHAPES[model.name], drop_path=drop_path))

    def classifier(self, model: CvtConfig, *, num_classes: int, drop_path: float) -> CvtClassifier:
        """The network with a linear head."""
        return CvtClassifier(CvT(SHAPES[model.name], drop_path=drop_path), num_classes)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the first embedding and block; `None` without them."""
        start = "backbone.stages.0."
        if f"{start}embed.weight" not in state or f"{start}blocks.0.attn.to_q.0.weight" not in state:
            return None
        shape, head = shape_of(state), state.get("head.weight")
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


def shape_of(state: Mapping[str, Tensor]) -> CvtShape | None:
    """The size in `SHAPES` that has these stages; `None` when there is none."""
    depths, widths = [], []
    for stage in range(NUM_STAGES):
        start = f"backbone.stages.{stage}."
        inside = [
            name.removeprefix(f"{start}blocks.") for name in state if name.startswith(f"{start}blocks.")
        ]
        depths.append(len({name.split(".")[0] for name in inside}))
        embed = state.get(f"{start}embed.weight")
        widths.append(0 if embed is None else len(embed))
    sizes = (tuple(widths), tuple(depths))
    return next((shape for shape in SHAPES.values() if (shape.widths, shape.depths) == sizes), None)


FAMILY = CvtFamily()
