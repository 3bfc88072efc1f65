"""The figure `videos`: annotated and propagated objects over the frames, as an animation."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vitpipe.contracts.units import counted
from vitpipe.data.animation import captioned, write_animation
from vitpipe.data.image_grid import Pixels, draw_masks, fit, optional_figure, rgb, side_by_side
from vitpipe.data.image_pixels import rgb_file
from vitpipe.datasets.davis_palette import davis_palette
from vitpipe.datasets.layouts.file_tree import evenly_spaced
from vitpipe.datasets.video_clips import Clip, read_labels
from vitpipe.stages.context import StageContext

FIGURE = "videos"
_SIDE, _NUM_FRAMES, _FRAME_MS = 256, 16, 250
_OPACITY = 0.55
Shown = tuple[Clip, Sequence[bytes], str]


def draw_videos(ctx: StageContext, shown: Sequence[Shown]) -> None:
    """Write and record `videos.gif`: a row for each video, annotated objects left, propagated ones right.

    Args:
        shown: videos with the PNG files of their masks and a caption.
    """
    if not shown:
        return
    path = ctx.folder / f"{FIGURE}.gif"
    with optional_figure(FIGURE, ctx.logger.say):
        note = (
            f"The first {counted(len(shown), 'validation video')}: left the annotated objects, right those "
            "propagated from the first frame; colours are those of DAVIS's palette. Of long videos "
            f"{_NUM_FRAMES} frames are shown."
        )
        rows = [_row(*video) for video in shown]
        length = max(map(len, rows))
        # A shorter video waits at its last frame.
        pages = [_stacked([row[min(time, len(row) - 1)] for row in rows]) for time in range(length)]
        write_animation(path, pages, frame_ms=_FRAME_MS, note=note)
        ctx.logger.figure(FIGURE, path)


def _row(clip: Clip, masks: Sequence[bytes], caption: str) -> list[Pixels]:
    """Frames of a video, evenly spaced: annotated and propagated objects side by side."""
    numbers = [int(text) for text in evenly_spaced([str(n) for n in range(len(clip))], _NUM_FRAMES)]
    pages = []
    for number in numbers:
        image = np.asarray(rgb_file(clip.frames[number]))
        found = np.asarray(Image.open(io.BytesIO(masks[number])))
        left = _overlay(image, read_labels(clip.annotations[number]))
        right = _overlay(image, found)
        texts = (f"{clip.name} {clip.frames[number].stem}, annotated", f"propagated, {caption}")
        pages.append(
            side_by_side([captioned(tile, text) for tile, text in zip((left, right), texts, strict=True)])
        )
    return pages


def _overlay(image: Pixels, labels: Pixels) -> Pixels:
    colours = np.array(davis_palette(), np.uint8).reshape(-1, 3)
    objects = [label for label in np.unique(labels).tolist() if label]
    masks = [labels == label for label in objects]
    return fit(draw_masks(image, masks, [rgb(colours[label]) for label in objects], _OPACITY), _SIDE)


def _stacked(rows: Sequence[Pixels]) -> Pixels:
    """Rows below each other, as wide as the widest."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)
