"""J and F of video object segmentation, by the rules of the official DAVIS evaluation.

Perazzi et al., A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation, CVPR 2016, for
the two measures; Pont-Tuset et al., The 2017 DAVIS Challenge, arXiv 1704.00675, for several objects.

J is the intersection over union of the regions. F compares boundaries: a boundary pixel is right when the
other boundary has a pixel within a tolerance of 0.8 % of the frame's diagonal. Objects are 1 ... M, M the
largest label of the first annotation; whatever else later annotations hold is background, as is label 255.
The first frame of a video, whose labels are given, and the last one are not scored.

Shapes: T scored frames, M objects, label maps (H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import find_objects
from scipy.spatial import cKDTree

from vitpipe.contracts.errors import InputError

UNLABELLED = 255
_TOLERANCE_RATIO = 0.008  # of the diagonal
_HIT = 0.5  # recall: the share of frames above it
_NUM_PARTS = 4  # decay: the first quarter less the last one
LabelMap = NDArray[np.integer[Any]]
Mask = NDArray[np.bool_]
Points = NDArray[np.int64]


@dataclass(frozen=True)
class FrameStatistics:
    """One measure of one object over the frames: mean, share of frames above 0.5, loss over time."""

    mean: float
    recall: float
    decay: float


@dataclass(frozen=True)
class VideoScores:
    """J (`region`) and F (`boundary`) of every object and scored frame of a video: (M, T) float64 each."""

    name: str
    region: NDArray[np.float64]
    boundary: NDArray[np.float64]

    @property
    def num_frames(self) -> int:
        """Scored ones; none for videos of fewer than three frames."""
        return self.region.shape[1]

    def statistics(self) -> list[dict[str, float]]:
        """`J_mean`, `J_recall`, `J_decay`, the same of F, object by object; none without a scored frame."""
        if not self.num_frames:
            return []
        pairs = zip(self.region, self.boundary, strict=True)
        return [_named("J", region_T) | _named("F", boundary_T) for region_T, boundary_T in pairs]


def mean_scores(objects: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over objects, and `JF_mean`, the mean of `J_mean` and `F_mean`; all of one video or of a set.

    Args:
        objects: as `VideoScores.statistics` gives them, at least one.
    """
    means = {name: math.fsum(found[name] for found in objects) / len(objects) for name in objects[0]}
    return {"JF_mean": (means["J_mean"] + means["F_mean"]) / 2, **means}


def score_video(name: str, truth: Sequence[LabelMap], result: Sequence[LabelMap]) -> VideoScores:
    """J and F of a video.

    Args:
        name: of the video.
        truth: annotations of all frames.
        result: label maps of all frames; those of the first and the last one are not looked at.

    Raises:
        InputError: when the maps do not pair, or a result has a label that is no object.
    """
    if len(truth) != len(result):
        raise InputError(
            f"The video '{name}' has {len(truth)} annotations and {len(result)} result maps",
            where="masks",
            fix="give one result map for every frame",
        )
    num_objects = int(without_unlabelled(truth[0]).max(initial=0)) if truth else 0
    region_MT = np.zeros((num_objects, max(0, len(truth) - 2)))
    boundary_MT = np.zeros_like(region_MT)
    for time, (true_HW, found_HW) in enumerate(zip(truth[1:-1], result[1:-1], strict=True)):
        where = f"frame {time + 1} of '{name}'"
        region_MT[:, time], boundary_MT[:, time] = score_frame(true_HW, found_HW, num_objects, where)
    return VideoScores(name, region_MT, boundary_MT)


def score_frame(
    true_HW: LabelMap, found_HW: LabelMap, num_objects: int, where: str = "masks"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """J and F of the objects 1 ... M of one frame, (M,) each.

    Args:
        where: named by errors.

    Raises:
        InputError: when the maps differ in size, or the result has a label above M.
    """
    if true_HW.shape != found_HW.shape:
        raise InputError(
            f"The result map has {found_HW.shape} rows and columns, its annotation {true_HW.shape}",
            where=where,
            fix="give result maps at the size of the annotations",
        )
    if (highest := int(found_HW.max(initial=0))) > num_objects:
        raise InputError(
            f"The result map has the label {highest}, but the video has {num_objects} objects",
            where=where,
            fix="use 0 for the background and the labels of the first annotation",
        )
    true_HW = without_unlabelled(true_HW)
    true_HW = np.where(true_HW > num_objects, 0, true_HW)
    tolerance = tolerance_of(*true_HW.shape)
    pairs = zip(boundary_points(true_HW, num_objects), boundary_points(found_HW, num_objects), strict=True)
    scores = [boundary_measure(true_P2, found_P2, tolerance) for true_P2, found_P2 in pairs]
    return _regions(true_HW, found_HW, num_objects), np.array(scores, np.float64)


def without_unlabelled(labels_HW: LabelMap) -> LabelMap:
    """A label map with background in place of label 255."""
    return np.where(labels_HW == UNLABELLED, 0, labels_HW)


def tolerance_of(height: int, width: int) -> int:
    """Pixels by which a boundary pixel may be off: 8 for 480 x 854."""
    return math.ceil(_TOLERANCE_RATIO * math.hypot(height, width))


def boundary_map(mask_HW: Mask) -> Mask:
    """Pixels of a mask that differ from the pixel to the right, below, or below to the right.

    A pixel of the last row has only a right one, of the last column only one below: the frame's own border is
    no boundary.
    """
    edge_HW = np.zeros_like(mask_HW)
    edge_HW[:, :-1] = mask_HW[:, :-1] != mask_HW[:, 1:]
    edge_HW[:-1] |= mask_HW[:-1] != mask_HW[1:]
    edge_HW[:-1, :-1] |= mask_HW[:-1, :-1] != mask_HW[1:, 1:]
    return edge_HW


def boundary_points(labels_HW: LabelMap, num_objects: int) -> list[Points]:
    """Rows and columns (P, 2) of the boundary pixels of the objects 1 ... M."""
    found: list[Points] = []
    for number, box in enumerate(find_objects(labels_HW, num_objects), start=1) if num_objects else ():
        if box is None:
            found.append(np.zeros((0, 2), np.int64))
            continue
        # The object with one pixel around it: its boundary lies inside, and where the frame ends there the
        # rule for the last row and column is the frame's.
        top, left = (max(0, side.start - 1) for side in box)
        crop = labels_HW[top : box[0].stop + 1, left : box[1].stop + 1] == number
        found.append(np.argwhere(boundary_map(crop)) + np.array([top, left]))
    return found


def boundary_measure(true_P2: Points, found_P2: Points, tolerance: int) -> float:
    """F of two boundaries, given as rows and columns of their pixels.

    Args:
        tolerance: pixels; the distance of two pixels is Euclidean.
    """
    if not len(true_P2) or not len(found_P2):
        # Both empty are equal. Of one empty boundary precision or recall is 0, and so is F.
        return float(len(true_P2) == len(found_P2))
    precision, recall = (
        # A pixel inside the other boundary dilated by a disc is one that is near enough to it.
        float(np.isfinite(cKDTree(other).query(own, distance_upper_bound=tolerance + _NEXT)[0]).mean())
        for own, other in ((found_P2, true_P2), (true_P2, found_P2))
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


# `distance_upper_bound` is exclusive. The next distance on the pixel grid is at least sqrt(r^2 + 1), which is
# r + 1e-6 or more for all r below 500,000.
_NEXT = 1e-6


def _regions(true_HW: LabelMap, found_HW: LabelMap, num_objects: int) -> NDArray[np.float64]:
    """Intersection over union of the objects 1 ... M, (M,); 1 where both are empty."""
    kinds = num_objects + 1
    joint = np.bincount((true_HW.astype(np.int64) * kinds + found_HW).ravel(), minlength=kinds * kinds)
    joint = joint.reshape(kinds, kinds)
    both = np.diag(joint)
    union = joint.sum(axis=0) + joint.sum(axis=1) - both
    return np.where(union > 0, both / np.maximum(union, 1), 1.0)[1:]


def frame_statistics(values_T: NDArray[np.float64]) -> FrameStatistics:
    """Mean, recall and decay of one measure over at least one frame."""
    # Halves round up, as in the official code; numpy alone would round them to the even neighbour. Quarters
    # include both ends, so that neighbours share a frame.
    cuts = np.round(np.linspace(1, len(values_T), _NUM_PARTS + 1) + 1e-10).astype(int) - 1
    first, last = values_T[cuts[0] : cuts[1] + 1], values_T[cuts[-2] : cuts[-1] + 1]
    return FrameStatistics(
        float(values_T.mean()), float((values_T > _HIT).mean()), float(first.mean() - last.mean())
    )


def _named(measure: str, values_T: NDArray[np.float64]) -> dict[str, float]:
    found = frame_statistics(values_T)
    return {
        f"{measure}_mean": found.mean,
        f"{measure}_recall": found.recall,
        f"{measure}_decay": found.decay,
    }
