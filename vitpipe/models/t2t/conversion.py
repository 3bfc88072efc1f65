"""Official checkpoints of T2T-ViT under our names: those of its authors, and drloc's.

Tokens-to-Token ViT (Li Yuan et al., arXiv 2101.11986) with performers; Efficient Training of Visual
Transformers with Small Datasets (Yahui Liu et al., NeurIPS 2021), which trains the same network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.official import LOCATION_MLP, Conversion, Renamed, misfit
from vitpipe.models.t2t.family import shape_of
from vitpipe.models.t2t.t2t import SHAPES, STRIDE, T2T, T2TClassifier, T2TEncoder
from vitpipe.models.weights import KeyRow

_FIRST = "tokens_to_token.attention1.w"
_FRONT = "tokens_to_token."
# Of a performer.
_PERFORMER = {".w": ".random_features", ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2."}


def rename_t2t(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size, or a name is not known.
    """
    if _FIRST not in official:
        return None
    shape = shape_of(official)
    if shape is None:
        raise CheckpointError(
            "The checkpoint is of a T2T-ViT of no known size",
            where=where,
            fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
        )
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for name, tensor in official.items():
        size = tuple(tensor.shape)
        if name.startswith("drloc."):
            rows.append(KeyRow(name, "", size, "dropped", LOCATION_MLP))
        elif name == "pos_embed" and tensor.ndim == 3:
            # One table, the class token's entry first.
            parts = {"backbone.class_position": tensor[:, :1], "backbone.position": tensor[:, 1:]}
            rows += [KeyRow(name, target, tuple(part.shape), "renamed") for target, part in parts.items()]
            state |= {target: part.clone() for target, part in parts.items()}
        elif ours := _our_name(name):
            rows.append(KeyRow(name, ours, size, "renamed"))
            state[ours] = tensor
        else:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            unknown.append(f"{name} is not known")
    if unknown:
        raise misfit(unknown, where)
    position, head = state.get("backbone.position"), state.get("head.weight")
    side = 14 if position is None else int(position.shape[1] ** 0.5)
    with torch.device("meta"):
        backbone = T2T(shape, image_size=max(1, side) * STRIDE)
        network = T2TEncoder(backbone) if head is None else T2TClassifier(backbone, len(head))
    kind = "t2t_encoder" if head is None else "t2t_classifier"
    return Renamed(kind, shape.name, state, network, tuple(rows))


def _our_name(official: str) -> str | None:
    """Our name of an official parameter; `None` for one that is not known."""
    if official in ("head.weight", "head.bias"):
        return official
    if official == "cls_token":
        return "backbone.class_token"
    if official.startswith(("blocks.", "norm.")):
        return f"backbone.{official}"
    if not official.startswith(_FRONT):
        return None
    inner = official.removeprefix(_FRONT)
    for theirs, ours in _PERFORMER.items():
        if inner.endswith(theirs) or (theirs.endswith(".") and theirs in inner):
            inner = inner.replace(theirs, ours)
    return f"backbone.patch_embed.{inner}"


CONVERSION = Conversion(("t2t_classifier", "t2t_encoder"), rename_t2t)
