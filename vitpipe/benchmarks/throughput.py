"""Inference speed in images per second, median of rounds."""

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
    """Images per second, median over `rounds` forward passes of one batch after one warm-up pass.

    Args:
        model: (B, 3, H, W) -> any; runs in evaluation mode and is left in the mode that it had.
        image_size: H = W in pixels.
        batch: B.
        precision: of the forward pass; weights stay float32.
    """
    was_training = model.training
    model.eval()
    images = torch.randn(batch, 3, image_size, image_size, device=device)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with autocast(device, precision):
            model(images)
        # CUDA kernels run asynchronously: without this only their launch would be timed.
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    model.train(was_training)
    # The first pass allocates memory and lets cuDNN choose kernels. Median, not mean: other processes on a
    # shared machine slow single rounds down.
    return batch / statistics.median(seconds[1:])
