"""Official iTPN checkpoints under our names.

Knows the pixel-supervised networks released with Integrally Pre-Trained Transformer Pyramid Networks
(Tian et al., arXiv 2211.12735): pre-training, classifier, and the backbones inside detectors and segmentors;
base, large, and any size in `SHAPES`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vitpipe.contracts.errors import CheckpointError
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


def rename_itpn(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released; of a detector or segmentor with its heads.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size or CLIP-supervised, or a name is not known.
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
        ours = our_name(name, shape.depths)
        if ours is None:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            raise misfit([f"{name} is not known"], where)
        state[ours] = tensor
        rows.append(KeyRow(name, ours, tuple(tensor.shape), "renamed"))
    return Renamed(kind, shape.name, state, _network_like(state, kind, shape), tuple(rows))


def our_name(official: str, depths: tuple[int, int, int]) -> str | None:
    """Our name of an official parameter; `None` for one that is not known.

    Args:
        official: for example `blocks.8.attn.qkv.weight`; the block list counts the merges.
        depths: blocks at strides 4, 8, 16.
    """
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", official)
    if block:
        where = _place_in_backbone(int(block[1]), depths)
        return where and f"backbone.{where}.{_inside_block(block[2], where)}"
    for theirs, ours in _RENAMED.items():
        if official == theirs or (theirs.endswith(".") and official.startswith(theirs)):
            rest = official.removeprefix(theirs)
            # The pyramid's blocks have no attention and one norm only, which the released code calls norm2.
            return ours + (rest.replace("norm2.", "norm.") if ours.startswith("pyramid.") else rest)
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
        return rest.replace("relative_position_bias_table", "relative_table")
    return rest.replace("norm2.", "norm.")


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
    # Layer scale (0.1) and a Linear to the teacher's width exist in CLIP-supervised networks only.
    if any(name.endswith(("gamma_1", "gamma_2")) or name.startswith("lm_head") for name in state):
        raise CheckpointError(
            "The checkpoint is CLIP-supervised (it has layer-scale vectors or a CLIP head)",
            where=where,
            fix="give a pixel-supervised checkpoint; only those can be converted",
        )
    # By what only one kind has, pre-training first: it has a pyramid too. `pos_embed` is a plain ViT's.
    if "patch_embed.proj.weight" in state and "pos_embed" not in state:
        if "decoder_pred.weight" in state:
            return "itpn_pixel_pretrain"
        if "head.weight" in state:
            return "itpn_pixel_classifier"
        if "align_dim_16to8.weight" in state:
            return "itpn_pixel_dense"
    return None


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
    position = state.get("backbone.absolute_position")
    table = state.get("backbone.stage16.0.attn.relative_table")
    # 14 x 14 units (224 pixels) stand in for a missing table, which the comparison then reports by name.
    position_size = 14 * UNIT_PIXELS if position is None else math.isqrt(position.shape[1]) * UNIT_PIXELS
    # A relative table has (2S - 1)^2 rows for S units per side. The two grids differ in segmentors, whose
    # relative tables are made for 512 pixels and whose absolute table stays at 224.
    image_size = position_size if table is None else (math.isqrt(table.shape[0]) + 1) // 2 * UNIT_PIXELS
    with torch.device("meta"):
        backbone = HiViT(
            shape,
            image_size=image_size,
            relative_position=table is not None,
            position_image_size=position_size,
        )
        if kind == "itpn_pixel_classifier":
            return HiViTClassifier(backbone, state["head.weight"].shape[0])
        width = state["pyramid.lateral8.weight"].shape[0]
        depth = len({name.split(".")[2] for name in state if name.startswith("pyramid.fuse8.")})
        pyramid = Pyramid(shape.widths, width, depth)
        if kind == "itpn_pixel_dense":
            # Released pixel-supervised detectors have no relative positions, segmentors have them.
            return PyramidBackbone(backbone, pyramid, "detect" if table is None else "segment")
        decoder = PixelDecoder(
            pyramid_width=width,
            width=state["decoder.pred.weight"].shape[1],
            depth=len({name.split(".")[2] for name in state if name.startswith("decoder.blocks.")}),
            num_heads=_DECODER_HEADS,
            grid_side=backbone.grid_side,
        )
        return MaskedPretrainer(backbone, pyramid, decoder)


CONVERSION = Conversion(("itpn_pixel_pretrain", "itpn_pixel_classifier", "itpn_pixel_dense"), rename_itpn)
