"""drloc's checkpoints of CvT under our names (Yahui Liu et al., NeurIPS 2021).

Those of CvT's authors are of another network and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.cvt.cvt import SHAPES, CvT
from vitpipe.models.cvt.cvt_classifier import CvtClassifier, CvtEncoder
from vitpipe.models.cvt.family import shape_of
from vitpipe.models.official import LOCATION_MLP, Conversion, Renamed, misfit
from vitpipe.models.weights import KeyRow

_FIRST = "layers.0.2.layers.0.0.fn.to_q.net.0.weight"
# Official name inside a block -> ours.
_BLOCK = {
    "0.norm": "norm1",
    **{
        f"0.fn.to_{part}.net.{layer}": f"attn.to_{part}.{layer}" for part in ("q", "kv") for layer in range(3)
    },
    "0.fn.to_out.0": "attn.to_out",
    "1.norm": "norm2",
    "1.fn.net.0": "fc1",
    "1.fn.net.3": "fc2",
}


def rename_cvt(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size, or a name is not known.
    """
    if _FIRST not in official:
        return None
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for name, tensor in official.items():
        size = tuple(tensor.shape)
        if name.startswith("drloc."):
            rows.append(KeyRow(name, "", size, "dropped", LOCATION_MLP))
        elif ours := _our_name(name):
            rows.append(KeyRow(name, ours, size, "renamed"))
            state[ours] = tensor
        else:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            unknown.append(f"{name} is not known")
    if unknown:
        raise misfit(unknown, where)
    shape, head = shape_of(state), state.get("head.weight")
    if shape is None:
        raise CheckpointError(
            "The checkpoint is of a CvT of no known size",
            where=where,
            fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
        )
    with torch.device("meta"):
        backbone = CvT(shape)
        network = CvtEncoder(backbone) if head is None else CvtClassifier(backbone, len(head))
    kind = "cvt_encoder" if head is None else "cvt_classifier"
    return Renamed(kind, shape.name, state, network, tuple(rows))


def _our_name(official: str) -> str | None:
    """Our name of an official parameter; `None` for one that is not known."""
    if official in ("head.weight", "head.bias"):
        return official
    if found := re.fullmatch(r"layers\.(\d+)\.([01])\.(\w+)", official):
        return f"backbone.stages.{found[1]}.{('embed', 'norm')[int(found[2])]}.{found[3]}"
    found = re.fullmatch(r"layers\.(\d+)\.2\.layers\.(\d+)\.(.+)\.(\w+)", official)
    if found is None or found[3] not in _BLOCK:
        return None
    return f"backbone.stages.{found[1]}.blocks.{found[2]}.{_BLOCK[found[3]]}.{found[4]}"


CONVERSION = Conversion(("cvt_classifier", "cvt_encoder"), rename_cvt)
