"""The small tower's weights as every release has them: OpenAI's archive, OpenCLIP, Hugging Face, plain."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vitpipe.models.clip.tower import TOWERS, ClipTower

_OUTSIDE = {
    "class_token": "class_embedding",
    "positions": "positional_embedding",
    "projection": "proj",
    "patches.weight": "conv1.weight",
    "norm_before": "ln_pre",
    "norm_after": "ln_post",
}
_INSIDE = {
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def small_tower(grid_side: int = 4, seed: int = 11) -> ClipTower:
    """The tower that is small enough for tests, with random weights."""
    torch.manual_seed(seed)
    return ClipTower(TOWERS["random"], grid_side=grid_side).eval().requires_grad_(False)


def openai_state(tower: ClipTower, prefix: str = "visual.") -> dict[str, Tensor]:
    """Its weights under the released names."""
    found = {}
    for name, tensor in tower.state_dict().items():
        if name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            theirs = next(rest.replace(own, new) for own, new in _INSIDE.items() if rest.startswith(own))
            theirs = f"transformer.resblocks.{number}.{theirs}"
        else:
            theirs = next(name.replace(own, new) for own, new in _OUTSIDE.items() if name.startswith(own))
        found[prefix + theirs] = tensor.clone()
    return found


def text_state() -> dict[str, Tensor]:
    """Keys of a text tower beside it, as released."""
    return {
        "positional_embedding": torch.zeros(7, 8),
        "text_projection": torch.zeros(8, 32),
        "logit_scale": torch.tensor(4.6),
        "token_embedding.weight": torch.zeros(9, 8),
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
        "ln_final.weight": torch.ones(8),
    }


def hugging_face_state(tower: ClipTower) -> dict[str, Tensor]:
    """Its weights under the names of `CLIPModel`."""
    names = {
        "class_token": "embeddings.class_embedding",
        "positions": "embeddings.position_embedding.weight",
        "patches.weight": "embeddings.patch_embedding.weight",
        "norm_before": "pre_layrnorm",
        "norm_after": "post_layernorm",
    }
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in tower.state_dict().items():
        if name == "projection":
            found["visual_projection.weight"] = tensor.t().contiguous()
        elif name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            layer = f"vision_model.encoder.layers.{number}."
            if rest.startswith("attn.qkv."):
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"{layer}self_attn.{letter}_proj.{rest.rpartition('.')[2]}"] = part.clone()
                continue
            rest = rest.replace("attn.proj", "self_attn.out_proj").replace("norm", "layer_norm")
            found[layer + rest] = tensor.clone()
        else:
            theirs = next(name.replace(own, new) for own, new in names.items() if name.startswith(own))
            found[f"vision_model.{theirs}"] = tensor.clone()
    found["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    found["text_model.embeddings.token_embedding.weight"] = torch.zeros(9, 8)
    found["text_projection.weight"] = torch.zeros(32, 8)
    return found


def save_torchscript(state: dict[str, Tensor], path: Path) -> None:
    """A program whose modules hold these tensors in half precision, as OpenAI's archives do."""
    root = nn.Module()
    for name, tensor in state.items():
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if part not in place._modules:
                place.add_module(part, nn.Module())
            place = place._modules[part]  # type: ignore[assignment]
        place.register_parameter(last, nn.Parameter(tensor.half(), requires_grad=False))
    root.register_buffer("input_resolution", torch.tensor(64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises another format
        torch.jit.save(torch.jit.script(root), path)
