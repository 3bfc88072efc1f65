"""From the frames of a video to its label maps: features batch by batch, labels frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitpipe.datasets.video_clips import Clip, first_labels, read_frame, read_labels, resized_labels
from vitpipe.evaluate.propagate import Propagation, PropagationSettings, hard_labels
from vitpipe.models.network import Encoder

# The released evaluation of DINO and SelfPatch divides red by 0.228; they pre-train with 0.229.
RED_STD = 0.228
_MEAN, _STD = (0.485, 0.456, 0.406), (RED_STD, 0.224, 0.225)
_READERS = 4  # threads: decoding and resizing leave Python's lock


class VideoMasks(NamedTuple):
    """The objects of a video, followed.

    Attributes:
        maps: label maps (H, W) of all frames at their own size; the first one is the annotation as it is.
        first_patches: patches of the first frame with each label, 0 ... 255. Objects without any are lost.
    """

    maps: tuple[NDArray[np.uint8], ...]
    first_patches: tuple[int, ...]


@torch.no_grad()
def propagated_masks(
    network: Encoder,
    clip: Clip,
    *,
    size: tuple[int, int],
    settings: PropagationSettings,
    batch: int,
    device: torch.device,
) -> VideoMasks:
    """Follow the objects of a video's first annotation through its frames.

    Args:
        network: in evaluation mode on the device.
        size: height and width of the network's input.
        batch: frames in one forward pass; changes speed and memory, not the numbers but for rounding.

    Raises:
        DatasetError: when a frame or the annotation cannot be read.
        InputError: when the network cannot take this size.
    """
    given = read_labels(clip.annotations[0])
    maps, propagation = [given], None
    patches = np.zeros(256, np.int64)
    for tokens_NC, grid in _tokens(network, clip, size, batch, device):
        if propagation is None:
            labels_RC = first_labels(given, grid)
            patches = np.bincount(labels_RC.ravel(), minlength=256)
            propagation = Propagation(tokens_NC, torch.tensor(labels_RC), settings)
        else:
            found = hard_labels(propagation.step(tokens_NC), size)
            maps.append(resized_labels(found, clip.size))
    return VideoMasks(tuple(maps), tuple(patches.tolist()))


def _tokens(
    network: Encoder, clip: Clip, size: tuple[int, int], batch: int, device: torch.device
) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Tokens (N, C) of the last block behind the final norm, and their grid, frame by frame."""
    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, len(clip), batch):
            pixels = list(
                readers.map(lambda path: read_frame(path, size), clip.frames[first : first + batch])
            )
            found = network.features(normalised(torch.from_numpy(np.stack(pixels)).to(device)))
            tokens_BNC, grid = network.final_norm(found.tokens[0]), found.grids[0]
            yield from ((tokens_NC, grid) for tokens_NC in tokens_BNC)


def normalised(pixels_BHW3: Tensor) -> Tensor:
    """8-bit RGB frames -> the network's input (B, 3, H, W)."""
    mean, std = (torch.tensor(values, device=pixels_BHW3.device) for values in (_MEAN, _STD))
    return ((pixels_BHW3.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
