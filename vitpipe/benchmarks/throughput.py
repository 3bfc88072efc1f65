"""Inference speed: images per second, median of rounds."""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from vitpipe.config.resolve import Precision
from vitpipe.train.precision import autocast


@torch.inference_mode()
def images_per_second(
    model: nn.Module,
    *,
    image_size: int,
    batch: int,
    rounds: int,
    device: torch.device,
    precision: Precision = "off",
) -> float:
    """Median over `rounds` forward passes of one batch, after one that is not counted.

    The median, because on a shared machine single rounds are slow for reasons of their own.
    """
    was_training = model.training
    model.eval()
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with autocast(device, precision):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    model.train(was_training)
    return batch / statistics.median(seconds[1:])
