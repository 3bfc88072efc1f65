"""Objects followed through DAVIS 2017 by frozen features: label propagation, and J and F of its masks.

data + weights > tokens of every frame > labels of the first frame, propagated > masks > J, F > tables, figure
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vitpipe.contracts.errors import DatasetError, InputError, disk_errors, some
from vitpipe.contracts.protocol import PROTOCOL, protocol_rows
from vitpipe.contracts.units import counted
from vitpipe.datasets.dense_folder import open_dense
from vitpipe.datasets.video_clips import Clip, clips_of, indexed_png, network_size, read_labels
from vitpipe.evaluate.propagate import PropagationSettings
from vitpipe.evaluate.video_masks import RED_STD, propagated_masks
from vitpipe.evaluate.video_metrics import VideoScores, mean_scores, score_video
from vitpipe.models.build import as_stored, build_encoder
from vitpipe.models.network import Encoder
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state
from vitpipe.stages.context import StageContext
from vitpipe.stages.training import measured_weights, seed_model
from vitpipe.stages.used_datasets import record_datasets
from vitpipe.stages.video.config import STAGE, VideoConfig
from vitpipe.stages.video.figure import draw_videos

RESULTS = "results"
# What is measured of random weights, too.
_BASELINE = ("JF_mean", "J_mean", "F_mean")


@dataclass(frozen=True)
class _Followed:
    """One video's masks, a PNG for every frame, and what they are worth.

    Attributes:
        first_patches: patches of the first frame with each label.
        absent: labels below the largest one that no annotation has.
    """

    clip: Clip
    masks: tuple[bytes, ...]
    first_patches: tuple[int, ...]
    absent: tuple[int, ...]
    scores: VideoScores


def run(ctx: StageContext) -> dict[str, float]:
    """Propagate the first annotation of every validation video through the features of the `weights` input.

    Writes the masks as `results/<video>/<frame>.png`, the folder that DAVIS's own tools read, the tables
    `video_objects`, `video_sequences`, `weights_account` and `protocol`, and the figure `videos`.

    Returns:
        `JF_mean`, `J_mean`, `J_recall`, `J_decay`, `F_mean`, `F_recall`, `F_decay`, means over all objects of
        all videos, ratios; `random_JF_mean`, `random_J_mean`, `random_F_mean`, the same of random weights.

    Raises:
        DatasetError: DAVIS is missing or damaged, or no video has a frame to score.
        InputError: the network cannot take frames of this size.
        CheckpointError: the weights do not fit.
    """
    section: VideoConfig = ctx.section
    folder = open_dense(ctx.inputs["data"].path, section.dataset, ctx.state / "data", STAGE.reads)
    record_datasets(ctx, section.dataset, ("val",))
    # Every rank looks at all videos: a mistake in one is met by all of them, before the work.
    clips = clips_of(folder.root)
    _require_scored(clips)
    network, random = _frozen_networks(ctx, clips)
    ordered = _followed(ctx, network, clips)
    scores = [found.scores for found in ordered]
    metrics = _means(ordered)
    baseline = _means(_followed(ctx, random, clips, " (random weights)"))
    ctx.logger.table("video_objects", _object_rows(ordered))
    ctx.logger.table("video_sequences", [_sequence_row(found) for found in ordered])
    ctx.logger.table(PROTOCOL, protocol_rows(metrics, _protocol(ctx, network, scores)))
    _say_what_is_missing(ctx, ordered)
    if ctx.is_main:
        _write_masks(ctx, ordered)
        shown = ordered[: section.sample_videos]
        draw_videos(ctx, [(found.clip, found.masks, _caption(found.scores)) for found in shown])
    return metrics | {f"random_{name}": baseline[name] for name in _BASELINE}


def _followed(ctx: StageContext, network: Encoder, clips: list[Clip], what: str = "") -> list[_Followed]:
    """All videos, in their order, each followed by one of the ranks.

    Args:
        what: behind the number of the video in messages.
    """
    share = clips[ctx.ranks.rank :: ctx.ranks.num_ranks]
    of = f" of {len(share)}" + (" on rank 0" if ctx.ranks.num_ranks > 1 else "") + what
    found = [_follow(ctx, network, clip, f"Video {i}{of}") for i, clip in enumerate(share, start=1)]
    by_name = {each.clip.name: each for each in ctx.ranks.gather_rows(found)}
    return [by_name[clip.name] for clip in clips]


def _means(followed: list[_Followed]) -> dict[str, float]:
    return mean_scores([row for found in followed for row in found.scores.statistics()])


def _require_scored(clips: list[Clip]) -> None:
    if not any(len(clip) > 2 for clip in clips):
        raise DatasetError(
            f"No video has a frame to score: of {some([clip.name for clip in clips])} the first and the last "
            "frame are all that there is",
            where=clips[0].frames[0].parent.parent,
            fix="use videos of at least three frames",
        )


def _frozen_networks(ctx: StageContext, clips: list[Clip]) -> tuple[Encoder, Encoder]:
    """With the `weights` input, every key accounted for, and with random weights; known to fit the frames."""
    path = measured_weights(ctx)
    model = as_stored(ctx.recipe.model, describe(load_state(path), path))
    side = model.image_size
    for clip in clips if not model.takes_any_size else ():
        size = _network_size(ctx.section, clip)
        if size != (side, side):
            raise InputError(
                f"Frames of '{clip.name}' become {size[0]} x {size[1]} pixels, but '{model.name}' of these "
                f"weights takes images of {side} x {side} pixels only",
                where="video",
                fix="use a network that takes any size: vit, revcol, or hivit pre-trained with "
                "model.relative_position=false",
            )
    seed_model(ctx)
    random = build_encoder(model)
    network = build_encoder(model)
    ctx.logger.table("weights_account", transfer_weights(network, path).table())
    device = ctx.ranks.device
    return network.to(device).eval(), random.to(device).eval()


def _network_size(section: VideoConfig, clip: Clip) -> tuple[int, int]:
    return network_size(*clip.size, section.short_side, section.size_multiple)


def _settings(section: VideoConfig) -> PropagationSettings:
    return PropagationSettings(
        section.num_context_frames, section.neighbourhood, section.top_k, section.temperature
    )


def _follow(ctx: StageContext, network: Encoder, clip: Clip, counted_as: str) -> _Followed:
    section: VideoConfig = ctx.section
    found = propagated_masks(
        network,
        clip,
        size=_network_size(section, clip),
        settings=_settings(section),
        batch=section.batch,
        device=ctx.ranks.device,
    )
    truths = [read_labels(path) for path in clip.annotations]
    scores = score_video(clip.name, truths, found.maps)
    shown = {int(label) for labels_HW in truths for label in np.unique(labels_HW)}
    absent = tuple(number for number in range(1, 1 + len(scores.region)) if number not in shown)
    ctx.logger.say(f"{counted_as}: {clip.name}, {len(clip)} frames, {_caption(scores)}")
    masks = tuple(indexed_png(labels_HW) for labels_HW in found.maps)
    return _Followed(clip, masks, found.first_patches, absent, scores)


def _caption(scores: VideoScores) -> str:
    if not scores.num_frames:
        return "no frame to score"
    return f"J&F {100 * mean_scores(scores.statistics())['JF_mean']:.1f} %"


def _object_rows(followed: list[_Followed]) -> list[dict[str, Any]]:
    """Patches in the first frame and numbers of every object, cells empty where no frame is scored."""
    known = [found.scores.statistics() for found in followed]
    empty: dict[str, Any] = dict.fromkeys(next(rows[0] for rows in known if rows), "")
    return [
        {
            "video": found.clip.name,
            "object": number,
            "first_patches": found.first_patches[number],
            **(rows[number - 1] if rows else empty),
        }
        for found, rows in zip(followed, known, strict=True)
        for number in range(1, 1 + len(found.scores.region))
    ]


def _sequence_row(found: _Followed) -> dict[str, Any]:
    scores = found.scores
    means = mean_scores(scores.statistics()) if scores.num_frames else {}
    shown = {name: means.get(name, "") for name in ("JF_mean", "J_mean", "F_mean")}
    counts = {"objects": len(scores.region), "frames": len(found.clip), "scored": scores.num_frames}
    return {"video": scores.name, **counts, **shown}


def _protocol(ctx: StageContext, network: Encoder, scores: list[VideoScores]) -> dict[str, object]:
    section: VideoConfig = ctx.section
    scored = [found for found in scores if found.num_frames]
    reach = section.neighbourhood
    return {
        "frame size": f"short side {section.short_side}, long side down to a multiple of "
        f"{section.size_multiple}",
        "interpolation": "bilinear (OpenCV) on 8-bit pixels",
        "normalisation": f"ImageNet, deviation of red {RED_STD}",
        "features": f"tokens of block {network.num_blocks} behind the final norm, if the network has one",
        "context": f"first frame and the last {section.num_context_frames}",
        "neighbourhood": f"{reach} rows and columns" if reach else "whole frame",
        "top-k": section.top_k,
        "temperature": section.temperature,
        "frames scored": "all but the first and the last of a video",
        "mean": "over all objects of all videos",
        "videos": len(scored),
        "objects": sum(len(found.region) for found in scored),
    }


def _say_what_is_missing(ctx: StageContext, followed: list[_Followed]) -> None:
    unscored = [found.clip.name for found in followed if not found.scores.num_frames]
    if unscored:
        what = counted(len(unscored), "video has", "videos have")
        ctx.logger.say(f"{what} fewer than three frames and count in no mean: {some(unscored)}")
    absent = [f"{number} of {found.clip.name}" for found in followed for number in found.absent]
    if absent:
        what = counted(len(absent), "object number is", "object numbers are")
        ctx.logger.say(
            f"{what} in no annotation, but below the largest one of the video ({some(absent)}): by the "
            "official rules each counts as followed without a fault. Number the objects without gaps"
        )
    lost = [
        name
        for row in _object_rows(followed)
        if not row["first_patches"] and (name := f"{row['object']} of {row['video']}") not in absent
    ]
    if lost:
        what = counted(len(lost), "object has", "objects have")
        ctx.logger.say(f"{what} no patch in the first frame, and cannot be followed: {some(lost)}")


def _write_masks(ctx: StageContext, followed: list[_Followed]) -> None:
    """Masks in the folders of an official submission: `results/<video>/<frame>.png`."""
    for found in followed:
        folder = ctx.folder / RESULTS / found.clip.name
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for frame, mask in zip(found.clip.frames, found.masks, strict=True):
                (folder / f"{frame.stem}.png").write_bytes(mask)
