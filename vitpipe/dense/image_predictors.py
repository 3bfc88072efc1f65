"""Trained detectors and segmentors for single images, from a weights file and its recipe.

image > the test pipeline of the stage > mmdet's or mmseg's network > boxes and masks, or a label map
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitpipe.config.dense_sections import DetectConfig, SegmentConfig
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import CheckpointError
from vitpipe.dense.mm_import import open_detection, open_segmentation
from vitpipe.models.weights import load_state

# Steps that read files; the image is at hand, and there are no annotations.
_FILES = {"LoadImageFromFile", "LoadAnnotations"}


class ImageDetector:
    """Boxes and masks of a `detect` stage's network, in the pixels of the image.

    Args:
        weights: safetensors file of the stage.
        recipe: of the run.
        stage: the stage of the recipe that wrote the file.
        num_classes: of the set that it was trained on.
        device: where the network runs.

    Raises:
        CheckpointError: the weights do not fit.
        RunError: mmdet is not installed, or has no operators for the device.
    """

    def __init__(
        self, weights: Path, recipe: Recipe, stage: str, num_classes: int, device: str = "cpu"
    ) -> None:
        # First: the modules below import mmengine, whose absence should be reported as a RunError.
        open_detection(device)
        from vitpipe.dense.coco_dataset import eval_pipeline
        from vitpipe.dense.detector import build_detector, detector_config

        section: DetectConfig = getattr(recipe, stage)
        config = detector_config(section, recipe.model, num_classes=num_classes, norm="BN")
        self.network = _loaded(build_detector(config, section), weights, device)
        self.pipeline = _without_files(eval_pipeline(section))

    def __call__(self, images: Sequence[Image.Image]) -> Iterator[Any]:
        """RGB images -> for each mmdet's instances as arrays: `bboxes` (N, 4) as corners, `scores` (N,),
        `labels` (N,), `masks` (N, H, W); the highest score first."""
        for sample in _samples(self.network, self.pipeline, images):
            yield sample.pred_instances.cpu().numpy()


class ImageSegmentor:
    """Label maps of a `segment` stage's network. Arguments and errors as `ImageDetector`."""

    def __init__(
        self, weights: Path, recipe: Recipe, stage: str, num_classes: int, device: str = "cpu"
    ) -> None:
        from vitpipe.dense.head import segmentation_head

        section: SegmentConfig = getattr(recipe, stage)
        open_segmentation(segmentation_head(section.head).packages)
        from vitpipe.dense.segmentor import build_segmentor, eval_pipeline, segmentor_config

        config = segmentor_config(section, recipe.model, num_classes=num_classes, norm="BN")
        self.network = _loaded(build_segmentor(config, section), weights, device)
        self.pipeline = _without_files(eval_pipeline(section))

    def __call__(self, images: Sequence[Image.Image]) -> Iterator[Any]:
        """RGB images -> for each a label map (H, W), int64: the number of the class of every pixel."""
        for sample in _samples(self.network, self.pipeline, images):
            yield sample.pred_sem_seg.data[0].cpu().numpy()


def _loaded(network: Any, weights: Path, device: str) -> Any:
    """The network with the weights, on its device, ready to predict."""
    state = load_state(weights)
    missing, unexpected = network.load_state_dict(state, strict=False)
    if missing or unexpected:
        keys = ", ".join(sorted({*missing, *unexpected})[:3])
        raise CheckpointError(
            f"The weights do not fit the network of the recipe ({keys} and others differ)",
            where=weights,
            fix="give weights and recipe of the same run",
        )
    return network.to(torch.device(device)).eval()


def _without_files(pipeline: list[dict[str, Any]]) -> Any:
    from mmengine.dataset import Compose

    # A copy: the transforms are built from these dictionaries in place.
    return Compose([copy.deepcopy(step) for step in pipeline if step["type"] not in _FILES])


def _samples(network: Any, pipeline: Any, images: Sequence[Image.Image]) -> Iterator[Any]:
    """One image per batch, as the published numbers are made: padding would take part in attention."""
    from mmengine.dataset import pseudo_collate

    for image in images:
        # mm's pipelines take OpenCV's order of channels.
        pixels = np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
        sides = pixels.shape[:2]
        loaded = {"img": pixels, "img_shape": sides, "ori_shape": sides, "img_path": "", "img_id": 0}
        with torch.inference_mode():
            yield from network.test_step(pseudo_collate([pipeline(loaded)]))
