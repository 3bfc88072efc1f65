"""The PaCa family: networks from a recipe, and whose weights they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.models.families import Family, WeightsInfo, head_rule
from vitpipe.models.network import Network, Task
from vitpipe.models.paca.config import PacaConfig
from vitpipe.models.paca.paca import PaCa
from vitpipe.models.paca.paca_classifier import PacaClassifier, PacaEncoder, PacaMaps
from vitpipe.models.paca.paca_shapes import NUM_STAGES, SHAPES, Four, PacaShape
from vitpipe.models.weights import Rule

# The last map of every clustering has a row for each cluster.
_LAST_MAP = r"(?:^backbone\.teacher\.to_clusters\.\d\.|\.clustering\.to_clusters\.)"
_OTHER_CLUSTERS = Rule("fresh", _LAST_MAP, "another number of clusters")


class PacaFamily(Family[PacaConfig]):
    """Builds PaCa networks, and reads and transfers their weights."""

    name = "paca"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> PaCa:
        """The network without a head; `options` are those of `PaCa`. Any image size works."""
        return PaCa(SHAPES[name], **options)

    def encoder(self, model: PacaConfig, *, drop_path: float) -> PacaEncoder:
        """The network without a head."""
        return PacaEncoder(_backbone(model, drop_path))

    def classifier(self, model: PacaConfig, *, num_classes: int, drop_path: float) -> PacaClassifier:
        """The network with a linear head."""
        return PacaClassifier(_backbone(model, drop_path), num_classes, model.head_init_std)

    def dense(self, model: PacaConfig, task: Task, *, image_size: int, drop_path: float) -> PacaMaps:
        """The four stages as maps, with the clusters of `dense_clusters` where they are given."""
        pretrained = model.clusters or SHAPES[model.name].clusters
        return PacaMaps(_backbone(model, drop_path, model.dense_clusters), pretrained)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by stem and first block; `None` without them."""
        if "backbone.stem.conv2.weight" not in state or "backbone.stages.0.0.attn.q.weight" not in state:
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
        """What may differ: the number of clusters, and the head.

        A clustering with another number of clusters keeps the initial values of its last map, as in the
        released code. Between classifiers the head does when the number of classes differs.
        """
        return (_OTHER_CLUSTERS, head_rule(network, info))


def shape_of(state: Mapping[str, Tensor], prefix: str = "backbone.") -> PacaShape | None:
    """The size in `SHAPES` that has these stages, and a teacher or none; `None` when there is none."""
    depths, widths = [], []
    for stage in range(NUM_STAGES):
        start = f"{prefix}stages.{stage}."
        depths.append(
            len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})
        )
        q = state.get(f"{start}0.attn.q.weight")
        widths.append(0 if q is None else q.shape[0])
    has_teacher = any(name.startswith(f"{prefix}teacher.") for name in state)
    sizes = (tuple(widths), tuple(depths), has_teacher)
    return next(
        (s for s in SHAPES.values() if (s.widths, s.depths, s.teacher_depths is not None) == sizes), None
    )


def _backbone(model: PacaConfig, drop_path: float, clusters: Four | None = None) -> PaCa:
    return PaCa(
        SHAPES[model.name],
        clusters=clusters or model.clusters,
        kind=model.clustering,
        by_block=model.assignment == "block",
        drop_ratio=drop_path,
    )


FAMILY = PacaFamily()
