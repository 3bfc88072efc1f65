"""Official PaCa-ViT checkpoints under our names: classifiers, and what is inside detectors and segmentors.

Grainger et al., PaCa-ViT (CVPR 2023), the files of its release.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.official import Conversion, Renamed, misfit
from vitpipe.models.paca.family import shape_of
from vitpipe.models.paca.paca import PaCa
from vitpipe.models.paca.paca_classifier import PacaClassifier, PacaEncoder, PacaNetwork
from vitpipe.models.paca.paca_shapes import NUM_STAGES, SHAPES, Four, PacaShape
from vitpipe.models.weights import KeyRow

_DENSE = "backbone."
_BESIDE = ("neck.", "rpn_head.", "roi_head.", "decode_head.", "auxiliary_head.")
_OF_HEADS = "part of the detector or segmentor"
_FIRST = "patch_embed.proj.0.weight"
# Of a ConvLayer of the teacher.
_LAYER = {"0.fn.0": "depthwise", "0.fn.2": "norm1", "1": "pointwise", "3": "norm2"}
_CLUSTERING = {
    "conv": {"0": "depthwise", "2": "pointwise", "4": "to_clusters"},
    "mlp": {"0": "hidden", "2": "to_clusters"},
}


def rename_paca(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size, or a name is not known.
    """
    prefix = next((p for p in ("", _DENSE) if f"{p}{_FIRST}" in official), None)
    if prefix is None or f"{prefix}stage1.0.attn.q.weight" not in official:
        return None
    kind = "conv" if any(".clustering.clustering.4." in name for name in official) else "mlp"
    state: dict[str, Tensor] = {}
    rows: list[KeyRow] = []
    unknown: list[str] = []
    for name, tensor in official.items():
        size = tuple(tensor.shape)
        if prefix and name.startswith(_BESIDE):
            rows.append(KeyRow(name, "", size, "dropped", _OF_HEADS))
        elif name.startswith(prefix) and (ours := _our_name(name.removeprefix(prefix), kind)):
            rows.append(KeyRow(name, ours, size, "renamed"))
            state[ours] = tensor
        else:
            # Not dropped: an unknown tensor means another network, or code that has changed since.
            unknown.append(f"{name} is not known")
    if unknown:
        raise misfit(unknown, where)
    shape = shape_of(state)
    if shape is None:
        raise CheckpointError(
            "The checkpoint is of a PaCa network of no known size",
            where=where,
            fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
        )
    _require_branch(state, shape, where)
    network = _network_like(state, shape, kind)
    # The constant blur of the teacher; some files leave it out.
    for name, buffer in network.named_buffers():
        if not name.endswith(".blur"):
            continue
        constant = torch.outer(*[torch.tensor([1.0, 2.0, 1.0])] * 2).div(16).expand(buffer.shape).clone()
        given = state.setdefault(name, constant)
        # Not on the meta device, where tests compare names and shapes only.
        if (
            not given.is_meta
            and given.shape == constant.shape
            and not torch.allclose(given.float(), constant)
        ):
            raise CheckpointError(
                f"{name}, a constant, has other values than [1, 2, 1] x [1, 2, 1] / 16",
                where=where,
                fix="download or copy the checkpoint again",
            )
    found = "paca_dense" if prefix else "paca_classifier" if "head.weight" in state else "paca_encoder"
    return Renamed(found, shape.name, state, network, tuple(rows))


def _require_branch(state: Mapping[str, Tensor], shape: PacaShape, where: str | Path) -> None:
    """Refuse a teacher that assigns the patches of some stages only: no network is built so."""
    if shape.teacher_depths is None:
        return
    missing = [stage for stage in range(NUM_STAGES) if not _clusters_of(state, stage)]
    if missing:
        names = ", ".join(f"paca_teacher.to_clusters{stage + 1}" for stage in missing)
        raise CheckpointError(
            f"The teacher of {shape.name} lacks {names}",
            where=where,
            fix="give the whole checkpoint; every stage of a network with a teacher has its clusters",
        )


def _our_name(official: str, kind: str) -> str | None:
    """Our name of an official parameter inside the network; `None` for one that is not known."""
    if re.fullmatch(r"head\.(weight|bias)", official):
        return official
    ours = _of_stage(official, kind) or _of_teacher(official)
    return f"backbone.{ours}" if ours else None


def _of_stage(official: str, kind: str) -> str | None:
    if found := re.fullmatch(r"patch_embed\.(?:proj\.([01])|norm)\.(\w+)", official):
        part = "norm" if found[1] is None else f"conv{int(found[1]) + 1}"
        return f"stem.{part}.{found[2]}"
    if found := re.fullmatch(r"norm([1-4])\.(\w+)", official):
        return f"norms.{int(found[1]) - 1}.{found[2]}"
    if found := re.fullmatch(r"transition([1-3])\.(proj|norm)\.(\w+)", official):
        part = "conv" if found[2] == "proj" else "norm"
        return f"transitions.{int(found[1]) - 1}.{part}.{found[3]}"
    found = re.fullmatch(r"stage([1-4])\.(\d+)\.(.+)\.(\w+)", official)
    if found is None:
        return None
    inner = found[3]
    if clustering := re.fullmatch(r"attn\.clustering\.clustering\.(\d)", inner):
        part = _CLUSTERING[kind].get(clustering[1], "")
        inner = f"attn.clustering.{part}" if part else ""
    else:
        known = {"norm1_before": "norm1", "norm2_before": "norm2", "mlp.dwconv.dwconv": "mlp.depthwise"}
        same = {f"attn.{part}" for part in ("q", "k", "v", "proj", "cluster_norm")} | {"mlp.fc1", "mlp.fc2"}
        inner = known.get(inner, inner if inner in same else "")
    return f"stages.{int(found[1]) - 1}.{found[2]}.{inner}.{found[4]}" if inner else None


def _of_teacher(official: str) -> str | None:
    start = "paca_teacher."
    if not official.startswith(start):
        return None
    inner = official.removeprefix(start)
    if found := re.fullmatch(r"block([1-4])\.(\d+)\.(0\.fn\.[02]|[13])\.(\w+)", inner):
        return f"teacher.stages.{int(found[1]) - 1}.{found[2]}.{_LAYER[found[3]]}.{found[4]}"
    if found := re.fullmatch(r"fpn([1-3])\.(0\.fn\.[02]|[13])\.(\w+)", inner):
        return f"teacher.fused.{int(found[1]) - 1}.{_LAYER[found[2]]}.{found[3]}"
    if found := re.fullmatch(r"transition([1-3])\.(0\.conv|2)\.(\w+)", inner):
        part = "conv" if found[2] == "0.conv" else "norm"
        return f"teacher.downs.{int(found[1]) - 1}.{part}.{found[3]}"
    if found := re.fullmatch(r"transition([1-3])\.0\.blur_filter", inner):
        return f"teacher.downs.{int(found[1]) - 1}.blur"
    if found := re.fullmatch(r"lateral([1-3])\.([02])\.(\w+)", inner):
        part = "conv" if found[2] == "0" else "norm"
        return f"teacher.laterals.{int(found[1]) - 1}.{part}.{found[3]}"
    if found := re.fullmatch(r"to_clusters([1-4])\.(\w+)", inner):
        return f"teacher.to_clusters.{int(found[1]) - 1}.{found[2]}"
    return None


def _network_like(state: Mapping[str, Tensor], shape: PacaShape, kind: str) -> PacaNetwork:
    """Our network on the meta device, with the clusters, the sharing and the classes that the state shows."""
    numbers = [_clusters_of(state, stage) for stage in range(NUM_STAGES)]
    clusters: Four = (numbers[0], numbers[1], numbers[2], numbers[3])
    by_block = any(re.search(r"stages\.\d\.[1-9]\d*\.attn\.clustering\.", name) for name in state)
    head = state.get("head.weight")
    with torch.device("meta"):
        clustering = "mlp" if kind == "mlp" and shape.teacher_depths is None else "conv"
        backbone = PaCa(shape, clusters=clusters, kind=clustering, by_block=by_block)  # type: ignore[arg-type]
        return PacaEncoder(backbone) if head is None else PacaClassifier(backbone, head.shape[0])


def _clusters_of(state: Mapping[str, Tensor], stage: int) -> int:
    own = f"backbone.stages.{stage}.0.attn.clustering.to_clusters.weight"
    found = state.get(own, state.get(f"backbone.teacher.to_clusters.{stage}.weight"))
    return 0 if found is None else found.shape[0]


CONVERSION = Conversion(("paca_classifier", "paca_encoder", "paca_dense"), rename_paca)
