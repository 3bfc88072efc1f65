"""The family of plain vision transformers: networks from a recipe, and whose weights they take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.families import Family, WeightsInfo, head_rule
from vitpipe.models.network import Network, Task
from vitpipe.models.positions import resample_positions
from vitpipe.models.vit.config import ViTConfig
from vitpipe.models.vit.vit import SHAPES, ViT
from vitpipe.models.vit.vit_classifier import ViTClassifier, ViTEncoder
from vitpipe.models.vit.vit_maps import ViTMaps
from vitpipe.models.weights import Rule

# Why a key may be missing, unused or of another shape; the texts stand in the load report.
_RESIZE = Rule("resized", r"^backbone\.position$", "bicubic to the network's grid")
_LOST_MODULE = Rule("unused", r"^aggregation\.", "lost: this network has no aggregation module")
_NEW_MODULE = Rule("missing", r"^aggregation\.", "the file has none; the aggregation module is new")
_NEW_RESCALING = Rule("missing", r"^rescale\.", "new: what brings the maps to their strides")
_NO_RESCALING = Rule("unused", r"^rescale\.", "these maps need no rescaling")
_NO_POSITION = Rule(
    "unused", r"^backbone\.(class_)?position$", "this network has no position table of its own"
)
# Trunks with and without class token differ by three things that have no counterpart: nothing stands in for
# them, and the report names them.
_TOKEN, _NORM = r"^backbone\.class_(token|position)$", r"^backbone\.norm\."
_LOST_TOKEN = Rule("unused", _TOKEN, "lost: this trunk has no class token")
_NEW_TOKEN = Rule("missing", _TOKEN, "the file's trunk has no class token; it keeps its initial value")
_LOST_NORM = Rule("unused", _NORM, "lost: this trunk has no last norm")
_NEW_NORM = Rule("missing", _NORM, "the file's trunk has no last norm; it keeps its initial value")


class ViTFamily(Family[ViTConfig]):
    """Builds vision transformers, and reads and transfers their weights."""

    name = "vit"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> ViT:
        """The trunk; `options` are those of `ViT`."""
        return ViT(SHAPES[name], image_size=image_size, **options)

    def encoder(self, model: ViTConfig, *, drop_path: float) -> ViTEncoder:
        """The trunk, and the aggregation module where the section asks for it."""
        backbone = _trunk(model, drop_path)
        return ViTEncoder(backbone, _aggregation(model, backbone))

    def classifier(self, model: ViTConfig, *, num_classes: int, drop_path: float) -> ViTClassifier:
        """The encoder with a linear head on the image's vector."""
        backbone = _trunk(model, drop_path)
        return ViTClassifier(backbone, num_classes, _aggregation(model, backbone), model.head_init_std)

    def dense(self, model: ViTConfig, task: Task, *, image_size: int, drop_path: float) -> ViTMaps:
        """Maps of four blocks; in detection the position table stays that of pre-training.

        In segmentation it is made for `image_size`, and resized without the 0.1 of `resample_positions`, at
        loading and for images of other sizes: so do the released configurations.
        """
        if task == "detect":
            return ViTMaps(_trunk(model, drop_path, last_norm=False), task, is_pyramid=True)
        plain = model.model_copy(update={"image_size": image_size, "position_resize": "plain"})
        is_pyramid = model.segment_maps == "pyramid"
        return ViTMaps(_trunk(plain, drop_path, last_norm=False), task, is_pyramid=is_pyramid)

    def as_stored(self, model: ViTConfig, info: WeightsInfo) -> ViTConfig:
        """With the class token, or the aggregation module, that the file has."""
        has = info.options
        if not {"class_token", "last_norm"} <= set(has):
            return model
        # A bare trunk without the module is a network that has one, which then starts anew.
        pooling = "class_token" if has["class_token"] else "mean" if has["last_norm"] else "class_attention"
        return model.model_copy(update={"pooling": pooling})

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by patch embedding and first block; `None` without them."""
        stem, block = state.get("backbone.patch_embed.weight"), state.get("backbone.blocks.0.attn.qkv.weight")
        if stem is None or block is None or stem.ndim != 4:
            return None
        width, patch = stem.shape[0], stem.shape[2]
        depth = len({name.split(".")[2] for name in state if name.startswith("backbone.blocks.")})
        sizes = (width, depth, "backbone.blocks.0.attn.qkv.bias" in state)
        position, head = state.get("backbone.position"), state.get("head.weight")
        is_pyramid = any(name.startswith("rescale.") for name in state)
        return WeightsInfo(
            family=self.name,
            kind="classifier" if head is not None else "pyramid" if is_pyramid else "encoder",
            # Empty for a size of the user's own: such weights can still be loaded into the same network.
            model=next((s.name for s in SHAPES.values() if (s.width, s.depth, s.qkv_bias) == sizes), ""),
            image_size=0 if position is None else math.isqrt(position.shape[1]) * patch,
            num_classes=0 if head is None else head.shape[0],
            options={
                "class_token": "backbone.class_token" in state,
                "last_norm": "backbone.norm.weight" in state,
                "aggregation": "aggregation.token" in state,
                "patch_size": patch,
            },
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """What may differ: grid of positions, head, aggregation module, class token with its norm."""
        assert isinstance(network, ViTEncoder | ViTMaps)
        has, backbone = info.options, network.backbone
        aggregates = isinstance(network, ViTEncoder) and network.aggregation is not None
        rules = [_RESIZE]
        for in_file, in_network, lost, new in (
            (has["class_token"], backbone.class_token is not None, _LOST_TOKEN, _NEW_TOKEN),
            (has["last_norm"], not isinstance(backbone.norm, nn.Identity), _LOST_NORM, _NEW_NORM),
            (has["aggregation"], aggregates, _LOST_MODULE, _NEW_MODULE),
        ):
            if in_file != in_network:
                rules.append(lost if in_file else new)
        if backbone.position is None:
            rules.append(_NO_POSITION)
        if isinstance(network, ViTMaps):
            rules.append(_NEW_RESCALING if info.kind != "pyramid" else _NO_RESCALING)
        elif info.kind == "pyramid":
            rules.append(_NO_RESCALING)
        return (*rules, head_rule(network, info))

    def resized(self, network: Network, name: str, given: Tensor, wanted: Tensor) -> Tensor:
        """Position tables (1, N, C), as the network resizes its own."""
        assert isinstance(network, ViTEncoder | ViTMaps)
        side = math.isqrt(wanted.shape[1])
        return resample_positions(given, (side, side), has_offset=network.backbone.has_offset)


def _trunk(model: ViTConfig, drop_path: float, *, last_norm: bool = True) -> ViT:
    """The trunk; without `last_norm` it has none, whatever its pooling."""
    return ViT(
        SHAPES[model.name],
        image_size=model.image_size,
        patch_size=model.patch_size,
        class_token=model.pooling == "class_token",
        last_norm=last_norm and model.pooling != "class_attention",
        num_heads=model.heads,
        position=model.position,
        has_offset=model.position_resize == "offset",
        drop_path=drop_path,
    )


def _aggregation(model: ViTConfig, backbone: ViT) -> ClassAttention | None:
    if model.pooling != "class_attention":
        return None
    shape = backbone.shape
    return ClassAttention(shape.width, backbone.num_heads, init_gain=shape.init_gain)


FAMILY = ViTFamily()
