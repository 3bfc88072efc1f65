"""Checkpoints of ResNets under our names: torchvision's and timm's, and drloc's.

drloc (Efficient Training of Visual Transformers with Small Datasets, Yahui Liu et al., NeurIPS 2021) keeps
the same layers as a sequence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.models.official import LOCATION_MLP, Conversion, Renamed, misfit
from vitpipe.models.resnet.family import shape_of
from vitpipe.models.resnet.resnet import ResNetClassifier, ResNetEncoder, build_resnet
from vitpipe.models.weights import KeyRow

# Place in drloc's sequence -> name everywhere else.
_SEQUENCE = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_KNOWN = re.compile(r"(?:conv1|bn1|layer[1-4]\.\d+\.(?:conv[123]|bn[123]|downsample\.[01]))\.\w+")


def rename_resnet(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of one of our sizes.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when a name is not known.
    """
    usual = {_usual_name(name): name for name in official}
    shape = shape_of({name: official[there] for name, there in usual.items()})
    if shape is None or "conv1.weight" not in usual:
        return None
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for name, there in usual.items():
        tensor = official[there]
        size = tuple(tensor.shape)
        if name.startswith("drloc."):
            rows.append(KeyRow(there, "", size, "dropped", LOCATION_MLP))
        elif ours := _our_name(name):
            rows.append(KeyRow(there, ours, size, "renamed"))
            state[ours] = tensor
        else:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            unknown.append(f"{there} is not known")
    if unknown:
        raise misfit(unknown, where)
    head = state.get("head.weight")
    with torch.device("meta"):
        backbone = build_resnet(shape)
        network = ResNetEncoder(shape, backbone)
        if head is not None:
            network = ResNetClassifier(shape, backbone, len(head))
    kind = "resnet_encoder" if head is None else "resnet_classifier"
    return Renamed(kind, shape.name, state, network, tuple(rows))


def _usual_name(official: str) -> str:
    """torchvision's name of a parameter in drloc's sequence; others unchanged."""
    found = re.fullmatch(r"model\.(\d+)\.(.+)", official)
    return f"{_SEQUENCE[found[1]]}.{found[2]}" if found and found[1] in _SEQUENCE else official


def _our_name(usual: str) -> str | None:
    """Our name of a parameter with torchvision's; `None` for one that is not known."""
    if found := re.fullmatch(r"fc\.(weight|bias)", usual):
        return f"head.{found[1]}"
    return f"backbone.{usual}" if _KNOWN.fullmatch(usual) else None


CONVERSION = Conversion(("resnet_classifier", "resnet_encoder"), rename_resnet)
