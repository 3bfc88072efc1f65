"""Official Swin checkpoints under our names.

Knows, in every size of `SHAPES` and with any window: the classifiers and headless networks released with Swin
Transformer (Ze Liu et al., arXiv 2103.14030), the same in timm's layout, and what MoBY pre-trains
(Self-Supervised Learning with Swin Transformers; Zhenda Xie et al.; arXiv 2105.04553).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.official import LOCATION_MLP, Conversion, Renamed, misfit
from vitpipe.models.swin.family import shape_of, side_of
from vitpipe.models.swin.shapes import NUM_STAGES, SHAPES, STRIDE, SwinShape, windows_fit
from vitpipe.models.swin.swin import SwinClassifier, SwinEncoder, build_swin
from vitpipe.models.weights import KeyRow

_FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
_LAST_TABLE = f"layers.{NUM_STAGES - 1}.blocks.0.attn.relative_position_bias_table"
_ONLINE = "encoder."

# What a checkpoint holds beside the network that we keep, by the beginnings of the names.
_OF_MOBY = {
    "encoder_k.": "the target encoder, a moving average; MoBY's linear probe reads the online one",
    "projector.": "MoBY's projection head, for its loss only",
    "projector_k.": "MoBY's projection head of the target, for its loss only",
    "predictor.": "MoBY's prediction head, for its loss only",
    "queue": "keys of earlier images, which MoBY's loss compares with",
}
_BESIDE_A_CLASSIFIER = {"drloc.": LOCATION_MLP}
_BUFFERS = {
    "attn_mask": "a mask that the network computes for its own grid",
    "relative_position_index": "an index that the network computes for its own window",
}


def rename_swin(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released or as timm saves it.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size, or a name is not known.
    """
    if _FIRST_TABLE in official:
        kind = "swin_encoder"
        inside = {name: name for name in official}
        beside = _BESIDE_A_CLASSIFIER
    elif _ONLINE + _FIRST_TABLE in official and any(name.startswith(tuple(_OF_MOBY)) for name in official):
        kind = "moby_swin"
        inside = {name.removeprefix(_ONLINE): name for name in official if name.startswith(_ONLINE)}
        beside = _OF_MOBY
    else:
        return None
    known = {name: official[there] for name, there in inside.items()}
    shape = shape_of(known)
    if shape is None:
        raise _unknown_size(known, where)
    # The released code merges tokens at the end of a stage, timm at the beginning of the next one.
    merges_late = any(name.startswith("layers.0.downsample.") for name in known)
    ours_of = {there: _our_name(name, merges_late) for name, there in inside.items()}
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    for name, tensor in official.items():
        size = tuple(tensor.shape)
        if (why := _why_dropped(name, beside)) is not None:
            rows.append(KeyRow(name, "", size, "dropped", why))
        elif ours := ours_of.get(name):
            rows.append(KeyRow(name, ours, size, "renamed"))
            state[ours] = tensor
        else:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            raise misfit([f"{name} is not known"], where)
    if "head.weight" in state and kind == "swin_encoder":
        kind = "swin_classifier"
    tables = (known[_FIRST_TABLE], known[_LAST_TABLE])
    network = _network_like(tables, state.get("head.weight"), shape, where)
    return Renamed(kind, shape.name, state, network, tuple(rows))


def _our_name(official: str, merges_late: bool) -> str | None:
    """Our name of an official parameter; `None` for one that is not known."""
    if found := re.fullmatch(r"head\.(?:fc\.)?(weight|bias)", official):
        return f"head.{found[1]}"
    if found := re.fullmatch(r"layers\.(\d+)(\.downsample\..+)", official):
        return f"backbone.layers.{int(found[1]) + merges_late}{found[2]}"
    known = official.startswith(("patch_embed.", "layers.", "norm."))
    return f"backbone.{official}" if known else None


def _why_dropped(name: str, beside: Mapping[str, str]) -> str | None:
    for beginning, why in beside.items():
        if name.startswith(beginning):
            return why
    return _BUFFERS.get(name.rpartition(".")[2])


def _unknown_size(state: Mapping[str, Tensor], where: str | Path) -> CheckpointError:
    blocks = {
        found.groups() for name in state if (found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name))
    }
    counts = Counter(int(stage) for stage, _ in blocks)
    depths, patch = (
        "-".join(str(counts[stage]) for stage in sorted(counts)),
        state.get("patch_embed.proj.weight"),
    )
    width = "" if patch is None else f" and {len(patch)} channels"
    return CheckpointError(
        f"The checkpoint is of a Swin Transformer of {depths} blocks{width}, which is no known size",
        where=where,
        fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
    )


def _network_like(
    tables: tuple[Tensor, Tensor], head: Tensor | None, shape: SwinShape, where: str | Path
) -> SwinEncoder:
    """Our network on the meta device, with the windows of the first and last table and the head's classes."""
    window, last_window = map(side_of, tables)
    # A grid of fewer tokens than a window has one smaller window. Where the last stage has, that gives the
    # image size; else one window in the last stage stands for any size, whose tables are the same.
    image_size = last_window * STRIDE
    if not image_size or not windows_fit(image_size, window):
        raise misfit([f"tables of windows of {window} and {last_window} tokens fit no image"], where)
    with torch.device("meta"):
        backbone = build_swin(shape, image_size=image_size, window=window)
        if head is None:
            return SwinEncoder(shape, backbone)
        return SwinClassifier(shape, backbone, head.shape[0] if head.ndim else 1)


CONVERSION = Conversion(("moby_swin", "swin_classifier", "swin_encoder"), rename_swin)
