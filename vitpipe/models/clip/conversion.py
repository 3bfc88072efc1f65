"""CLIP's image tower from the files in which people have it, under our names; every key is accounted for.

Layouts: OpenAI's archives and OpenCLIP's files (`visual.*` beside the text tower), the same without prefix,
Hugging Face's (`vision_model.*`), and our own. The text tower is left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.clip.tower import TOWERS, Activation, ClipTower, TowerShape
from vitpipe.models.official import Conversion, Renamed, misfit, open_checkpoint
from vitpipe.models.weights import KeyRow

_KIND = "clip_image_tower"
# Name of the file -> ours, in blocks and outside. A trailing dot stands for a whole module.
_OPENAI = {
    "class_embedding": "class_token",
    "positional_embedding": "positions",
    "proj": "projection",
    "conv1.weight": "patches.weight",
    "ln_pre.": "norm_before.",
    "ln_post.": "norm_after.",
}
_OPENAI_BLOCK = {
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_HUGGING_FACE = {
    "embeddings.class_embedding": "class_token",
    "embeddings.position_embedding.weight": "positions",
    "embeddings.patch_embedding.weight": "patches.weight",
    "pre_layrnorm.": "norm_before.",  # so spelt in the released files
    "post_layernorm.": "norm_after.",
}
_HUGGING_FACE_BLOCK = {
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "mlp.": "mlp.",
}
# Beside the image tower: the text tower, and what joins the two.
_TEXT = re.compile(
    r"(transformer\.resblocks|token_embedding|ln_final|text_model|text)\."
    r"|(positional_embedding|text_projection(\.weight)?|logit_scale|logit_bias|input_resolution"
    r"|context_length|vocab_size|attn_mask)$"
)


def rename_clip(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The image tower under our names; `None` when the state is no CLIP's.

    Args:
        official: name -> tensor.
        where: the file, for messages.

    Raises:
        CheckpointError: when it has the text tower only, is of no known size, or a name is not known.
    """
    if "visual.class_embedding" in official:
        state, rows = _openai(official, "visual.")
    elif "class_embedding" in official and "conv1.weight" in official:
        state, rows = _openai(official, "")
    elif "vision_model.embeddings.class_embedding" in official:
        state, rows = _hugging_face(official)
    elif "patches.weight" in official and "norm_before.weight" in official:
        state, rows = dict(official), [KeyRow(n, n, tuple(t.shape), "renamed") for n, t in official.items()]
    elif _is_text_tower(official):
        raise CheckpointError(
            "The file holds CLIP's text tower only",
            where=where,
            fix="give a file with the image tower, whose keys begin with visual. or vision_model.",
        )
    else:
        return None
    unknown = [row.source for row in rows if row.outcome == "unused"]
    if unknown:
        raise misfit([f"{name} is not known" for name in unknown], where)
    shape = shape_of(state, where)
    with torch.device("meta"):
        network = ClipTower(shape, grid_side=_grid_side(state))
    return Renamed(_KIND, shape.name, state, network, tuple(rows))


def shape_of(state: Mapping[str, Tensor], where: str | Path) -> TowerShape:
    """The entry of `TOWERS` with the sizes of a state under our names.

    Raises:
        CheckpointError: when there is none, or a tensor that tells them is missing.
    """
    needed = ("patches.weight", "projection", "positions")
    if missing := [name for name in needed if name not in state]:
        raise misfit([f"{name} is missing" for name in missing], where)
    weight, projection = state["patches.weight"], state["projection"]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    found = (weight.shape[-1], weight.shape[0], depth, projection.shape[-1])
    for shape in TOWERS.values():
        if (shape.patch, shape.width, shape.depth, shape.out_width) == found:
            return shape
    raise CheckpointError(
        f"The image tower has patches of {found[0]} pixels, {depth} blocks of {found[1]} channels and a "
        f"projection to {found[3]}, which is no known size",
        where=where,
        fix="give the file of one of: " + "; ".join(str(s) for n, s in TOWERS.items() if n != "random"),
    )


def read_tower(path: Path, wanted: str, *, activation: Activation = "quick_gelu") -> ClipTower:
    """A tower with the weights of a file, in float32, in evaluation mode and without gradients.

    Args:
        path: OpenAI's archive (which is not run), a file of torch.save, or safetensors.
        wanted: name of the tower that the recipe has chosen.
        activation: as `ClipTower`; no file tells it.

    Raises:
        CheckpointError: when the file cannot be read, has no image tower, or another one than `wanted`.
    """
    from vitpipe.models.convert import convert_state  # which imports this module

    checkpoint = open_checkpoint(path)
    try:
        renamed = rename_clip(checkpoint.state, path)
    except RuntimeError as error:  # shapes that cannot be, of an altered file
        raise misfit([str(error).splitlines()[0]], path) from error
    if renamed is None:
        first = ", ".join(sorted(checkpoint.state)[:3])
        what = "The TorchScript archive" if checkpoint.is_torchscript else "The file"
        raise CheckpointError(
            f"{what} holds no image tower of CLIP (first keys: {first})",
            where=path,
            fix="give OpenAI's ViT-B-16.pt or ViT-L-14.pt, or the weights of the same model as OpenCLIP or "
            "Hugging Face have them",
        )
    if renamed.model != wanted:
        raise CheckpointError(
            f"The file holds {TOWERS[renamed.model]}, but the recipe's teacher is {TOWERS[wanted]}",
            where=path,
            fix=f"give the file of {wanted}, or set the teacher's name to {renamed.model}",
        )
    state = convert_state(checkpoint.state, kind=_KIND, where=path).state
    tower = ClipTower(TOWERS[wanted], grid_side=_grid_side(state), activation=activation)
    tower.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return tower.eval().requires_grad_(False)


def _grid_side(state: Mapping[str, Tensor]) -> int:
    return max(1, math.isqrt(max(0, state["positions"].shape[0] - 1)))


def _is_text_tower(official: Mapping[str, Tensor]) -> bool:
    has_tokens = {"token_embedding.weight", "text_model.embeddings.token_embedding.weight"} & set(official)
    return bool(has_tokens)


def _openai(official: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[KeyRow]]:
    state, rows = {}, []
    for name, tensor in official.items():
        ours = None
        if name.startswith(prefix):
            inner = name.removeprefix(prefix)
            block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", inner)
            ours = (
                f"blocks.{block[1]}.{found}"
                if block and (found := _renamed(block[2], _OPENAI_BLOCK))
                else None
            )
            ours = ours or (None if block else _renamed(inner, _OPENAI))
        rows.append(_row(name, ours, tensor))
        if ours is not None:
            state[ours] = tensor
    return state, rows


def _hugging_face(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[KeyRow]]:
    state: dict[str, Tensor] = {}
    rows = []
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in official.items():
        ours, inner = None, name.removeprefix("vision_model.")
        if name == "visual_projection.weight":
            ours, tensor = "projection", tensor.t()
        elif inner == "embeddings.position_ids":
            rows.append(KeyRow(name, "", tuple(tensor.shape), "dropped", "numbers of the positions"))
            continue
        elif inner != name:
            block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", inner)
            part = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", block[2]) if block else None
            if block and part:
                ours = f"blocks.{block[1]}.attn.qkv.{part[2]}"
                parts.setdefault(ours, {})[part[1]] = tensor
                rows.append(KeyRow(name, ours, tuple(tensor.shape), "renamed", "one of three joined"))
                continue
            found = _renamed(block[2], _HUGGING_FACE_BLOCK) if block else _renamed(inner, _HUGGING_FACE)
            ours = f"blocks.{block[1]}.{found}" if block and found else found
        rows.append(_row(name, ours, tensor))
        if ours is not None:
            state[ours] = tensor
    # One matrix in our blocks; a file that lacks a third is reported as incomplete by its shape or name.
    for name, found_parts in parts.items():
        state[name] = torch.cat([found_parts[key] for key in "qkv" if key in found_parts])
    return state, rows


def _row(name: str, ours: str | None, tensor: Tensor) -> KeyRow:
    shape = tuple(tensor.shape)
    if ours is not None:
        return KeyRow(name, ours, shape, "renamed")
    if _TEXT.match(name):
        return KeyRow(name, "", shape, "dropped", "of the text tower, or of what joins the two")
    return KeyRow(name, "", shape, "unused")


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    for theirs, ours in table.items():
        if name == theirs or (theirs[-1] in "._" and name.startswith(theirs)):
            return ours + name.removeprefix(theirs)
    return None


CONVERSION = Conversion((_KIND,), rename_clip)
