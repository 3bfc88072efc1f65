"""Official checkpoints of plain vision transformers under our names.

Knows the training files and the bare trunks of SelfPatch (Yun et al., CVPR 2022), DINO (Caron et al., arXiv
2104.14294), EsViT (Li et al., arXiv 2106.09785), MoBY (Xie et al., arXiv 2105.04553) and MoCo-v3 (Chen et
al., arXiv 2104.02057), the trunks inside SelfPatch's detectors and segmentors, and DeiT's and timm's
classifiers, in the sizes of `SHAPES`; and the ViT-B/16 of drloc (Liu et al., NeurIPS 2021).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.network import Encoder
from vitpipe.models.official import LOCATION_MLP, Conversion, Renamed, misfit
from vitpipe.models.vit.vit import SHAPES
from vitpipe.models.weights import KeyRow

# What stands in front of the trunk's names, by the kind of the file. EsViT's training files, bare trunks and
# classifiers have nothing there.
_TRUNKS = {
    "backbone.": "vit_self_distilled",
    "encoder.": "vit_moby",
    "base_encoder.": "vit_mocov3",
    "": "vit",
}
_HEAD = "a projection head, which only pre-training has"
_SLOW = "the momentum network's copy"
# mmsegmentation's names inside the trunk of a segmentor -> those of everybody else.
_OF_MMSEG = (
    ("patch_embed.projection.", "patch_embed.proj."),
    ("backbone.layers.", "backbone.blocks."),
    (".ln1.", ".norm1."),
    (".ln2.", ".norm2."),
    (".attn.attn.in_proj_", ".attn.qkv."),
    (".attn.attn.out_proj.", ".attn.proj."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)
_DENSE = "part of the detector or segmentor"
# Parts of training files beside the trunk, and why they are not taken over.
_DROPPED = {
    "c_head.": _HEAD,
    "p_head.": _HEAD,
    "head_dense.": _HEAD,
    "head.mlp.": _HEAD,
    "head.last_layer.": _HEAD,
    "base_encoder.head.": _HEAD,
    "projector.": _HEAD,
    "predictor.": "the predictor, which only pre-training has",
    "projector_k.": _SLOW,
    "encoder_k.": _SLOW,
    "momentum_encoder.": _SLOW,
    "queue": "the queue of keys, which only pre-training has",
    "backbone.fpn": _DENSE,
    "neck.": _DENSE,
    "rpn_head.": _DENSE,
    "roi_head.": _DENSE,
    "decode_head.": _DENSE,
    "auxiliary_head.": _DENSE,
}
# Official name -> ours, inside the trunk. A trailing dot stands for a whole module.
_TRUNK_NAMES = {
    "cls_token": "backbone.class_token",
    "patch_embed.proj.": "backbone.patch_embed.",
    "blocks.": "backbone.blocks.",
    "norm.": "backbone.norm.",
}
_MODULE_NAMES = {
    "ca_head.cls_token": "aggregation.token",
    "ca_head.cls_blocks.": "aggregation.blocks.",
    "ca_head.norm.": "aggregation.norm.",
}
# drloc's names inside a block -> ours.
_DRLOC_KIND = "vit_drloc"
_DRLOC_BLOCK = {
    "0.norm": "norm1",
    "0.fn.to_qkv": "attn.qkv",
    "0.fn.to_out.0": "attn.proj",
    "1.norm": "norm2",
    "1.fn.net.0": "mlp.fc1",
    "1.fn.net.3": "mlp.fc2",
}
_DRLOC_NAMES = {
    "cls_token": "backbone.class_token",
    "to_patch_embedding.1.weight": "backbone.patch_embed.weight",
    "to_patch_embedding.1.bias": "backbone.patch_embed.bias",
    "mlp_head.0.weight": "backbone.norm.weight",
    "mlp_head.0.bias": "backbone.norm.bias",
    "mlp_head.1.weight": "head.weight",
    "mlp_head.1.bias": "head.bias",
}


def rename_vit(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when a name is not known.
    """
    if "backbone.patch_embed.projection.weight" in official:
        return _of_segmentor(official, where)
    if "transformer.layers.0.0.fn.to_qkv.weight" in official:
        return _of_drloc(official, where)
    prefix = next((p for p in _TRUNKS if f"{p}patch_embed.proj.weight" in official), None)
    if prefix is None or f"{prefix}blocks.0.attn.qkv.weight" not in official:
        return None
    inside = {name.removeprefix(prefix): t for name, t in official.items() if name.startswith(prefix)}
    stem = inside["patch_embed.proj.weight"]
    depth = len({name.split(".")[1] for name in inside if name.startswith("blocks.")})
    # Always with a bias: without one, files of these names are of no released network.
    sizes = (stem.shape[0], depth, True)
    name = next((s.name for s in SHAPES.values() if (s.width, s.depth, s.qkv_bias) == sizes), None)
    if name is None or "absolute_pos_embed" in inside or "decoder_pred.weight" in inside:
        return None
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for key, tensor in official.items():
        found = _placed(key, tensor, prefix)
        _enter(found, key, state, rows, unknown)
    if unknown:
        # Not dropped: an unknown tensor means another network, or code that has changed since.
        raise misfit(unknown, where)
    network = _network_like(state, name, stem.shape[2], is_fixed=prefix == "base_encoder.")
    return Renamed(_TRUNKS[prefix], name, state, network, tuple(rows))


def _enter(
    found: list[tuple[str, Tensor, str]] | None,
    key: str,
    state: dict[str, Tensor],
    rows: list[KeyRow],
    unknown: list[str],
) -> None:
    """Add what became of an official tensor to the state and its report."""
    if found is None:
        unknown.append(f"{key} is not known")
        return
    rows += [KeyRow(key, target, tuple(t.shape), "renamed", why) for target, t, why in found if target]
    rows += [KeyRow(key, "", tuple(t.shape), "dropped", why) for target, t, why in found if not target]
    state |= {target: t for target, t, _ in found if target}


def _of_drloc(official: Mapping[str, Tensor], where: str | Path) -> Renamed:
    """drloc's classifier, another implementation of ViT-B/16."""
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for key, tensor in official.items():
        _enter(_placed_of_drloc(key, tensor), key, state, rows, unknown)
    position, stem = state.get("backbone.position"), state.get("backbone.patch_embed.weight")
    if position is None or stem is None:
        unknown.append("pos_embedding or to_patch_embedding.1.weight is missing or of another size")
    if unknown:
        raise misfit(unknown, where)
    assert position is not None
    assert stem is not None
    name = next(shape.name for shape in SHAPES.values() if not shape.qkv_bias)
    network = _network_like(state, name, stem.shape[2], is_fixed=False)
    return Renamed(_DRLOC_KIND, name, state, network, tuple(rows))


def _placed_of_drloc(key: str, tensor: Tensor) -> list[tuple[str, Tensor, str]] | None:
    """As `_placed`."""
    if key.startswith("drloc."):
        return [("", tensor, LOCATION_MLP)]
    if key == "pos_embedding":
        return _positions(tensor, is_fixed=False) if tensor.ndim == 3 else None
    if key == "to_patch_embedding.1.weight":
        side = math.isqrt(tensor.shape[1] // 3) if tensor.ndim == 2 else 0
        if not side or side * side * 3 != tensor.shape[1]:
            return None
        # A linear layer on patches flattened by row, column, channel: a convolution in another order.
        kernel_OCRS = tensor.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2).contiguous()
        return [(_DRLOC_NAMES[key], kernel_OCRS, "as the kernel of a convolution")]
    if key in _DRLOC_NAMES:
        return [(_DRLOC_NAMES[key], tensor, "")]
    found = re.fullmatch(r"transformer\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    if found is None or found[2] not in _DRLOC_BLOCK:
        return None
    return [(f"backbone.blocks.{found[1]}.{_DRLOC_BLOCK[found[2]]}.{found[3]}", tensor, "")]


def _of_segmentor(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The trunk inside mmsegmentation's segmentor."""
    usual: dict[str, str] = {}
    for name in official:
        known = name
        if name.startswith("backbone."):
            for theirs, everybodys in _OF_MMSEG:
                known = known.replace(theirs, everybodys)
        usual[known] = name
    found = rename_vit({known: official[name] for known, name in usual.items()}, where)
    if found is None:
        return None
    rows = tuple(replace(row, source=usual[row.source]) for row in found.rows)
    return replace(found, rows=rows)


def _placed(key: str, tensor: Tensor, prefix: str) -> list[tuple[str, Tensor, str]] | None:
    """Our names, parts and remarks for an official tensor; an empty name drops it; `None`: not known."""
    if key in (f"{prefix}head.weight", f"{prefix}head.bias") and prefix in ("", "base_encoder."):
        return [(key.removeprefix(prefix), tensor, "")]
    if why := next((why for part, why in _DROPPED.items() if key.startswith(part)), ""):
        return [("", tensor, why)]
    for theirs, ours in _MODULE_NAMES.items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            # The released blocks have their three linear layers inside a module `attn`.
            return [(ours + key.removeprefix(theirs).replace("attn.", ""), tensor, "")]
    if not key.startswith(prefix):
        return None
    inner = key.removeprefix(prefix)
    if inner == "pos_embed":
        return _positions(tensor, is_fixed=prefix == "base_encoder.")
    for theirs, ours in _TRUNK_NAMES.items():
        if inner == theirs or (theirs.endswith(".") and inner.startswith(theirs)):
            return [(ours + inner.removeprefix(theirs), tensor, "")]
    return None


def _positions(table_1MC: Tensor, *, is_fixed: bool) -> list[tuple[str, Tensor, str]]:
    """The released table is one: the class token's entry, where there is one, before those of the patches."""
    num_entries = table_1MC.shape[1]
    side = int(num_entries**0.5)
    if side * side == num_entries:
        return [("backbone.position", table_1MC, "")]
    patches = ("backbone.position", table_1MC[:, 1:], "entries of the patches")
    if is_fixed:
        return [patches, ("", table_1MC[:, :1], "the class token's entry, which is zero in the fixed table")]
    return [patches, ("backbone.class_position", table_1MC[:, :1], "entry of the class token")]


def _network_like(state: Mapping[str, Tensor], name: str, patch_size: int, *, is_fixed: bool) -> Encoder:
    """Our network on the meta device, with the sizes and parts that the state shows."""
    position = state.get("backbone.position")
    side = 14 if position is None else int(position.shape[1] ** 0.5)
    has_module = any(key.startswith("aggregation.") for key in state)
    is_bare = "backbone.class_token" not in state and "backbone.norm.weight" not in state
    pooling = "class_token" if "backbone.class_token" in state else "class_attention" if is_bare else "mean"
    model = model_config(
        {
            "name": name,
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "pooling": pooling,
            "position": "none" if position is None else "sincos" if is_fixed else "learned",
        }
    )
    head = state.get("head.weight")
    with torch.device("meta"):
        network = build_encoder(model) if head is None else build_classifier(model, num_classes=head.shape[0])
    if is_bare and not has_module:
        # A bare trunk: complete without the module, which a network that wants one starts anew.
        network.aggregation = None  # type: ignore[assignment]
    return network


CONVERSION = Conversion((*_TRUNKS.values(), _DRLOC_KIND), rename_vit)
