"""The Swin family: networks from a recipe, and which weights one takes from another.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows; Ze Liu et al.; arXiv 2103.14030.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitpipe.models.families import Family, WeightsInfo, WeightsKind, head_rule
from vitpipe.models.network import Network, Task
from vitpipe.models.positions import resize_relative_table
from vitpipe.models.swin.config import SwinConfig
from vitpipe.models.swin.shapes import NUM_STAGES, PATCH, SHAPES, SwinShape
from vitpipe.models.swin.swin import SwinClassifier, SwinEncoder, build_swin
from vitpipe.models.swin.swin_maps import SwinMaps
from vitpipe.models.weights import Rule

_TABLE = "attn.relative_position_bias_table"
# As the released code loads weights of another window, or of an image that has fewer tokens than a window.
_RESIZE = Rule("resized", rf"\.{re.escape(_TABLE)}$", "bicubic to the network's window")
_NEW_NORMS = Rule("missing", r"^norms\.", "a new norm behind every stage")
_LAST_NORM = Rule("unused", r"^backbone\.norm\.", "the norm of the classifier; maps have their own")


class SwinFamily(Family[SwinConfig]):
    """Builds Swin Transformers, and reads and transfers their weights."""

    name = "swin"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> nn.Module:
        """timm's network without a head; `options` are those of `build_swin`."""
        return build_swin(SHAPES[name], image_size=image_size, **options)

    def encoder(self, model: SwinConfig, *, drop_path: float) -> SwinEncoder:
        """The network without a head.

        Raises:
            InputError: as `build_swin`.
        """
        return SwinEncoder(SHAPES[model.name], _backbone(model, drop_path))

    def classifier(self, model: SwinConfig, *, num_classes: int, drop_path: float) -> SwinClassifier:
        """The network with a linear head.

        Raises:
            InputError: as `build_swin`.
        """
        backbone = _backbone(model, drop_path)
        return SwinClassifier(SHAPES[model.name], backbone, num_classes, model.head_init_std)

    def dense(self, model: SwinConfig, task: Task, *, image_size: int, drop_path: float) -> SwinMaps:
        """The four stages as maps; for both tasks the same, and for images of any size."""
        shape = SHAPES[model.name]
        return SwinMaps(shape, build_swin(shape, image_size=None, window=model.window, drop_path=drop_path))

    def as_stored(self, model: SwinConfig, info: WeightsInfo) -> SwinConfig:
        """With the window that the file's tables are made for."""
        # No table is for more tokens than the first stage has.
        window = min(model.window or SHAPES[model.name].window, model.image_size // PATCH)
        found = info.options.get("window", window)
        return model if found == window else model.model_copy(update={"window": found})

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by patch embedding and first table; `None` without them."""
        table = state.get(f"backbone.layers.0.blocks.0.{_TABLE}")
        if table is None or table.ndim != 2 or "backbone.patch_embed.proj.weight" not in state:
            return None
        shape, head = shape_of(state, "backbone."), state.get("head.weight")
        bare: WeightsKind = "pyramid" if "norms.0.weight" in state else "encoder"
        return WeightsInfo(
            family=self.name,
            kind=bare if head is None else "classifier",
            model="" if shape is None else shape.name,
            # The tables are those of a window: the same for several image sizes.
            image_size=0,
            num_classes=0 if head is None else head.shape[0],
            options={"window": side_of(table)},
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ: the windows, whose tables are resized, and the head.

        encoder > classifier: a new head. classifier > encoder: the head is not used. Between classifiers the
        head keeps its initial values when the number of classes differs. Maps take neither head nor last norm
        of the others, and begin with new norms.
        """
        if isinstance(network, SwinMaps) and info.kind != "pyramid":
            return (_RESIZE, head_rule(network, info), _LAST_NORM, _NEW_NORMS)
        return (_RESIZE, head_rule(network, info))

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """A table ((2w-1)^2, H), resized as in the released code."""
        return resize_relative_table(given, wanted.shape[0])


def shape_of(state: Mapping[str, Tensor], prefix: str = "") -> SwinShape | None:
    """The size in `SHAPES` that has these blocks, heads and widths; `None` when there is none.

    Args:
        state: with the names of timm or of the released code, which are the same inside blocks.
        prefix: of the names.
    """
    tables: list[dict[str, Tensor]] = []
    for stage in range(NUM_STAGES):
        inside = re.compile(rf"{re.escape(prefix)}layers\.{stage}\.blocks\.\d+\.{re.escape(_TABLE)}")
        tables.append({n: tensor for n, tensor in state.items() if inside.fullmatch(n) and tensor.ndim == 2})
    qkv = state.get(f"{prefix}layers.0.blocks.0.attn.qkv.weight")
    sizes = (
        tuple(len(found) for found in tables),
        tuple(next((table.shape[-1] for table in found.values()), 0) for found in tables),
        0 if qkv is None or qkv.ndim != 2 else qkv.shape[1],
    )
    return next((s for s in SHAPES.values() if (s.depths, s.heads, s.width) == sizes), None)


def side_of(table: Tensor) -> int:
    """Tokens per side w of the window that a table ((2w-1)^2, H) is made for."""
    return (math.isqrt(table.shape[0]) + 1) // 2


def _backbone(model: SwinConfig, drop_path: float) -> Any:
    return build_swin(
        SHAPES[model.name], image_size=model.image_size, window=model.window, drop_path=drop_path
    )


FAMILY = SwinFamily()
