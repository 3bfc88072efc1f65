"""Official iTPN checkpoints under our names.

Knows the networks released with Integrally Pre-Trained Transformer Pyramid Networks (Tian et al., arXiv
2211.12735), supervised by pixels and by CLIP: pre-training, classifier, and the backbones inside detectors
and segmentors; base, large, and any size in `SHAPES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.foreign import is_fast_itpn
from vitpipe.models.hivit.feature_pretrainer import FeatureHeads, FeaturePretrainer
from vitpipe.models.hivit.hivit import SHAPES, HiViT, HiViTShape
from vitpipe.models.hivit.hivit_classifier import HiViTClassifier
from vitpipe.models.hivit.itpn import MaskedPretrainer, PixelDecoder
from vitpipe.models.hivit.pyramid import Pyramid, PyramidBackbone
from vitpipe.models.masking import UNIT_PIXELS
from vitpipe.models.official import Conversion, Renamed, misfit
from vitpipe.models.weights import KeyRow

# Of the released decoder. The number of heads is in no tensor's shape, so it cannot be read from the file;
# for the comparison of names and shapes any divisor of the width would do.
_DECODER_HEADS = 16
_LAYER_SCALE = 0.1  # any number: the file's vectors take its place
_KINDS = tuple(
    f"itpn_{by}_{what}" for by in ("pixel", "clip") for what in ("pretrain", "classifier", "dense")
)

# Official name -> ours, outside the block list. A trailing dot stands for a whole module. The names are those
# of networks built by the released code (tests/golden/keys/itpn_*.json).
_RENAMED = {
    "absolute_pos_embed": "backbone.absolute_position",
    "patch_embed.": "backbone.stem.",
    "align_dim_16tofpn.": "pyramid.project16.",
    "split_16to8.norm.": "pyramid.split16to8.norm.",
    "split_16to8.reduction.": "pyramid.split16to8.linear.",
    "align_dim_16to8.": "pyramid.lateral8.",
    "block_16to8.": "pyramid.fuse8.",
    "split_8to4.norm.": "pyramid.split8to4.norm.",
    "split_8to4.reduction.": "pyramid.split8to4.linear.",
    "align_dim_8to4.": "pyramid.lateral4.",
    "block_8to4.": "pyramid.fuse4.",
    "fpn_modules.0.": "pyramid.refine16.",
    "fpn_modules.1.": "pyramid.refine8.",
    "fpn_modules.2.": "pyramid.refine4.",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.fixed_position",
    "decoder_embed.0.": "decoder.embed16.",
    "decoder_embed.1.": "decoder.embed8.",
    "decoder_embed.2.": "decoder.embed4.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
    "fc_norm.": "head_norm.",
    "head.": "head.",
}
# In CLIP-supervised pre-training, whose decoder is one Linear, some names mean other things.
_RENAMED_CLIP = {
    "mask_token": "predictor.mask_token",
    "decoder_embed.0.": "predictor.embed16.",
    "decoder_embed.1.": "predictor.embed8.",
    "decoder_embed.2.": "predictor.embed4.",
    "norm.": "predictor.norm.",
    "lm_head.": "predictor.pred.",
    "norm_cls.": "predictor.early_norm.",
    "lm_cls_head.": "predictor.early_pred.",
    "cls_pt_layers.": "predictor.early_blocks.",
}
# Inside of blocks with attention.
_TABLES = {
    "relative_position_bias_table": "relative_table",
    "rel_pos_h": "row_table",
    "rel_pos_w": "column_table",
}


def rename_itpn(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released; of a detector or segmentor with its heads.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size or of Fast-iTPN, or a name is not known.
    """
    rows: list[KeyRow] = []
    inside = _without_dense_heads(official, rows)
    kind = _kind_of(inside, where)
    if kind is None:
        return None
    shape = _shape_of(inside, where)
    state: dict[str, Tensor] = {}
    for name, tensor in inside.items():
        if name == "relative_position_index":
            # An integer buffer (196, 196) of the released networks, outside the blocks. It has no parameters
            # and would be wrong for another grid.
            why = "an index that the network computes for its own grid"
            rows.append(KeyRow(name, "", tuple(tensor.shape), "dropped", why))
            continue
        ours = our_name(name, shape.depths, is_clip="_clip_" in kind)
        if ours is None:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            raise misfit([f"{name} is not known"], where)
        state[ours] = tensor
        rows.append(KeyRow(name, ours, tuple(tensor.shape), "renamed"))
    return Renamed(kind, shape.name, state, _network_like(state, kind, shape), tuple(rows))


def our_name(official: str, depths: tuple[int, int, int], *, is_clip: bool = False) -> str | None:
    """Our name of an official parameter; `None` for one that is not known.

    Args:
        official: for example `blocks.8.attn.qkv.weight`; the block list counts the merges.
        depths: blocks at strides 4, 8, 16.
        is_clip: of a network that CLIP has supervised.
    """
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", official)
    if block:
        where = _place_in_backbone(int(block[1]), depths)
        return where and f"backbone.{where}.{_inside_block(block[2], where)}"
    for theirs, ours in {**_RENAMED, **(_RENAMED_CLIP if is_clip else {})}.items():
        if official == theirs or (theirs.endswith(".") and official.startswith(theirs)):
            rest = official.removeprefix(theirs)
            # The pyramid's blocks have no attention and one norm only, which the released code calls norm2.
            return ours + (rest.replace("norm2.", "norm.") if ours.startswith("pyramid.") else _table(rest))
    return None


def _place_in_backbone(index: int, depths: tuple[int, int, int]) -> str | None:
    """`stage8.0`, `merge4to8` ... for an entry of the released block list; `None` beyond its end.

    The list counts merges: for base 0-2 stage4, 3 merge, 4-6 stage8, 7 merge, 8-31 stage16.
    """
    depth4, depth8, depth16 = depths
    for name, length in (
        ("stage4", depth4),
        ("merge4to8", 1),
        ("stage8", depth8),
        ("merge8to16", 1),
        ("stage16", depth16),
    ):
        if index < length:
            return f"{name}.{index}" if name.startswith("stage") else name
        index -= length
    return None


def _inside_block(rest: str, where: str) -> str:
    if where.startswith("merge"):
        return rest.replace("reduction.", "linear.")
    if where.startswith("stage16"):
        return _table(rest)
    return rest.replace("norm2.", "norm.")


def _table(rest: str) -> str:
    """A name inside a block with attention, whose position tables have other names here."""
    head, dot, last = rest.rpartition(".")
    return head + dot + _TABLES.get(last, last)


def _without_dense_heads(official: Mapping[str, Tensor], rows: list[KeyRow]) -> dict[str, Tensor]:
    """Of a detector or segmentor the backbone, without its prefix; appends to `rows` what is dropped."""
    if "backbone.patch_embed.proj.weight" not in official:
        return dict(official)
    for name, tensor in official.items():
        if not name.startswith("backbone."):
            why = "part of the detector's or segmentor's heads"
            rows.append(KeyRow(name, "", tuple(tensor.shape), "dropped", why))
    prefix = "backbone."
    return {name.removeprefix(prefix): t for name, t in official.items() if name.startswith(prefix)}


def _kind_of(state: Mapping[str, Tensor], where: str | Path) -> str | None:
    # By what only one kind has, pre-training first: it has a pyramid too. Two others have the same names for
    # patch embedding and head: `pos_embed` is a plain ViT's, and Swin has its blocks inside of layers.
    has_blocks = any(name.startswith("blocks.") for name in state)
    if "patch_embed.proj.weight" not in state or not has_blocks:
        return None
    if is_fast_itpn(state):
        raise CheckpointError(
            "The checkpoint is of Fast-iTPN, a later network with other blocks, which vitpipe does not have",
            where=where,
            fix=f"give a checkpoint of iTPN: {', '.join(_KINDS)}",
        )
    if "pos_embed" in state:
        return None
    # Layer scale (0.1) and a Linear to the teacher's width exist in CLIP-supervised networks only.
    is_clip = any(name.endswith(("gamma_1", "gamma_2")) or name.startswith("lm_head") for name in state)
    by = "clip" if is_clip else "pixel"
    if "decoder_pred.weight" in state or "lm_head.weight" in state:
        return f"itpn_{by}_pretrain"
    if "head.weight" in state:
        return f"itpn_{by}_classifier"
    return f"itpn_{by}_dense" if "align_dim_16to8.weight" in state else None


def _shape_of(state: Mapping[str, Tensor], where: str | Path) -> HiViTShape:
    """The entry of `SHAPES` with these depths and widths; the merges show where the stages end."""
    blocks = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    merges = sorted(i for i in blocks if f"blocks.{i}.reduction.weight" in state)
    width = state["patch_embed.proj.weight"].shape[0]
    if len(merges) == 2:
        depths = (merges[0], merges[1] - merges[0] - 1, max(blocks) - merges[1])
        # The width at stride 4 is enough: those at 8 and 16 are its double and its fourfold.
        for shape in SHAPES.values():
            if (shape.depths, shape.widths[0]) == (depths, width):
                return shape
    raise CheckpointError(
        f"The checkpoint has {len(blocks)} blocks and {width} channels at stride 4, which is no known size",
        where=where,
        fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
    )


def _network_like(state: Mapping[str, Tensor], kind: str, shape: HiViTShape) -> nn.Module:
    """Our network of that kind on the meta device, with the sizes that the state's tensors have."""
    with torch.device("meta"):
        backbone = _backbone_like(state, shape, layer_scale="_clip_" in kind)
        if kind.endswith("_classifier"):
            return HiViTClassifier(backbone, state["head.weight"].shape[0])
        width = state["pyramid.lateral8.weight"].shape[0]
        pyramid = Pyramid(shape.widths, width, _num_in(state, "pyramid.fuse8."))
        if kind.endswith("_dense"):
            # Released detectors have no table of relative positions for both axes, segmentors have one.
            is_segmentor = backbone.relative_index_NN is not None
            return PyramidBackbone(backbone, pyramid, "segment" if is_segmentor else "detect")
        if kind == "itpn_clip_pretrain":
            heads = FeatureHeads(
                backbone,
                pyramid_width=width,
                target_width=state["predictor.pred.weight"].shape[0],
                layer_scale=_LAYER_SCALE,
            )
            return FeaturePretrainer(backbone, pyramid, heads)
        decoder = PixelDecoder(
            pyramid_width=width,
            width=state["decoder.pred.weight"].shape[1],
            depth=_num_in(state, "decoder.blocks."),
            num_heads=_DECODER_HEADS,
            grid_side=backbone.grid_side,
        )
        return MaskedPretrainer(backbone, pyramid, decoder)


def _backbone_like(state: Mapping[str, Tensor], shape: HiViTShape, *, layer_scale: bool) -> HiViT:
    """The backbone for the grids of a state's position tables."""
    position = state.get("backbone.absolute_position")
    table = state.get("backbone.stage16.0.attn.relative_table")
    axis = state.get("backbone.stage16.0.attn.row_table")
    # 14 x 14 units (224 pixels) stand in for a missing table, which the comparison then reports by name.
    position_size = 14 * UNIT_PIXELS if position is None else math.isqrt(position.shape[1]) * UNIT_PIXELS
    # A relative table has (2S - 1)^2 rows for S units per side. The two grids differ in segmentors, whose
    # relative tables are made for 512 pixels and whose absolute table stays at 224.
    image_size = position_size if table is None else (math.isqrt(table.shape[0]) + 1) // 2 * UNIT_PIXELS
    backbone = HiViT(
        shape,
        image_size=image_size,
        relative_position=table is not None,
        layer_scale=_LAYER_SCALE if layer_scale else None,
        position_image_size=position_size,
    )
    if axis is not None:
        backbone.use_axis_positions((len(axis) + 1) // 2)
    return backbone


def _num_in(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks of a list."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})


CONVERSION = Conversion(_KINDS, rename_itpn)
