"""The family of T2T-ViTs: networks from a recipe, and whose weights they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.models.families import Family, WeightsInfo, head_rule
from vitpipe.models.network import Network
from vitpipe.models.positions import resample_positions
from vitpipe.models.t2t.config import T2TConfig
from vitpipe.models.t2t.t2t import SHAPES, STRIDE, T2T, T2TClassifier, T2TEncoder, T2TShape
from vitpipe.models.weights import Rule

_RESIZE = Rule("resized", r"^backbone\.position$", "bicubic to the network's grid")


class T2TFamily(Family[T2TConfig]):
    """Builds T2T-ViTs, and reads and transfers their weights."""

    name = "t2t"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> T2T:
        """The network without a head; `options` are those of `T2T`."""
        return T2T(SHAPES[name], image_size=image_size, **options)

    def encoder(self, model: T2TConfig, *, drop_path: float) -> T2TEncoder:
        """The network without a head."""
        return T2TEncoder(_backbone(model, drop_path))

    def classifier(self, model: T2TConfig, *, num_classes: int, drop_path: float) -> T2TClassifier:
        """The network with a linear head on the class token."""
        return T2TClassifier(_backbone(model, drop_path), num_classes, head_init_std=model.head_init_std)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the front end and the positions; `None` without them."""
        front = state.get("backbone.patch_embed.attention1.random_features")
        position, head = state.get("backbone.position"), state.get("head.weight")
        if front is None or position is None or position.ndim != 3:
            return None
        shape = shape_of(state, "backbone.")
        return WeightsInfo(
            family=self.name,
            kind="encoder" if head is None else "classifier",
            model="" if shape is None else shape.name,
            image_size=math.isqrt(position.shape[1]) * STRIDE,
            num_classes=0 if head is None else head.shape[0],
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ: the grid of the positions, and the head."""
        return (_RESIZE, head_rule(network, info))

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Positions (1, N, C), as the network resizes its own."""
        side = math.isqrt(wanted.shape[1])
        return resample_positions(given, (side, side), has_offset=False)


def shape_of(state: Mapping[str, Tensor], prefix: str = "") -> T2TShape | None:
    """The size in `SHAPES` that has this many blocks of this width; `None` when there is none.

    Args:
        state: with our names or the released ones, which are the same inside blocks.
        prefix: of the names.
    """
    start, qkv = f"{prefix}blocks.", state.get(f"{prefix}blocks.0.attn.qkv.weight")
    depth = len({name.removeprefix(start).split(".")[0] for name in state if name.startswith(start)})
    width = 0 if qkv is None or qkv.ndim != 2 else qkv.shape[1]
    return next((s for s in SHAPES.values() if (s.width, s.depth) == (width, depth)), None)


def _backbone(model: T2TConfig, drop_path: float) -> T2T:
    return T2T(SHAPES[model.name], image_size=model.image_size, drop_path=drop_path)


FAMILY = T2TFamily()
