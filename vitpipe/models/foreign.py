"""Name checkpoints of networks that vitpipe does not have, by keys that only they use."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor


def foreign_network(state: Mapping[str, Tensor]) -> str:
    """What network a state is of, such as "a ViT of 12 blocks and 768 channels"; empty if it is not known.

    Args:
        state: name -> tensor, with any prefix.
    """
    names = {_inside(name): tensor for name, tensor in state.items()}
    if "cls_token" in names and (blocks := _count(names, r"blocks\.(\d+)\.")):
        width = names["cls_token"].shape[-1]
        patch = names.get("patch_embed.proj.weight")
        units = f", patches of {patch.shape[-1]} pixels" if patch is not None and patch.ndim == 4 else ""
        plural = "s" if blocks > 1 else ""
        return f"a ViT of {blocks} block{plural} and {width} channels{units} (MAE, DeiT, DINO, BEiT are such)"
    if "layer1.0.conv1.weight" in names:
        depths = "-".join(str(_count(names, rf"layer{stage}\.(\d+)\.")) for stage in range(1, 5))
        return f"a ResNet of {depths} blocks"
    if "downsample_layers.0.0.weight" in names:
        return "a ConvNeXt"
    return ""


def is_fast_itpn(state: Mapping[str, Tensor]) -> bool:
    """Whether a state is of Fast-iTPN: iTPN's names for stem and merges, with other blocks or positions.

    Args:
        state: name -> tensor, without prefix.
    """
    merges = [tensor for name, tensor in state.items() if re.match(r"blocks\.\d+\.reduction\.weight$", name)]
    other_blocks = r"blocks\.\d+\.(attn\.(q_proj|q_bias)|mlp\.(w\d|ffn_ln)\b)"
    has_other = "pos_embed" in state or any(re.match(other_blocks, name) for name in state)
    return bool(merges) and (has_other or merges[0].ndim == 4)


def _inside(name: str) -> str:
    """A name without the usual prefixes of whole models."""
    return re.sub(r"^(?:(?:model|module|backbone|encoder|student|teacher|visual)\.)+", "", name)


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in names if (found := re.match(pattern, name))})
