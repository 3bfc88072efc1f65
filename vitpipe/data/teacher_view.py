"""One random crop of an image rendered twice, for a network and for its teacher, and a mask of units.

As iTPN's released CLIP pre-training: colour jitter, flip, then one crop, bicubic for the network and Lanczos
for the teacher, whose size and normalisation are its own.
"""

from __future__ import annotations

import random

import torch
from PIL import Image
from torch import Tensor

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.data.augment import RESAMPLING, Normalise, random_box
from vitpipe.data.block_mask import block_mask
from vitpipe.data.resize import packed, resized_crop


class TeacherView:
    """RGB image -> image of the network (3, S, S), of the teacher (3, T, T), mask (N,).

    Args:
        augment: crop, flip, colour jitter, and the network's interpolation and normalisation.
        image_size: S.
        teacher_size: T.
        teacher_normalise: mean and std of the teacher.
        grid_side: units per side, N the square of it.
        masked_units, smallest_block: as `block_mask`.
    """

    def __init__(
        self,
        augment: AugmentConfig,
        image_size: int,
        *,
        teacher_size: int,
        teacher_normalise: Normalise,
        grid_side: int,
        masked_units: int,
        smallest_block: int,
    ) -> None:
        self.augment, self.image_size, self.teacher_size = augment, image_size, teacher_size
        self.normalise, self.teacher_normalise = Normalise(augment.mean, augment.std), teacher_normalise
        self.mask = (grid_side, masked_units, smallest_block)
        self.jitter = None
        if augment.color_jitter > 0.0:
            from torchvision import transforms

            # Brightness, contrast and saturation, as everywhere here.
            self.jitter = transforms.ColorJitter(*[augment.color_jitter] * 3)

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """RGB image -> the three views; draws from the global generators."""
        augment, size = self.augment, (self.image_size, self.image_size)
        if self.jitter is not None:
            image = self.jitter(image)
        if torch.rand(1) < augment.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = random_box(image.width, image.height, augment.crop_scale, augment.crop_ratio)
        own = resized_crop(image, box, size, RESAMPLING[augment.interpolation])
        # By Pillow: the compiled loops have no Lanczos filter.
        shown = image.crop(box).resize((self.teacher_size,) * 2, Image.Resampling.LANCZOS)
        mask_N = block_mask(*self.mask, draws=random)
        return [self.normalise(own), self.teacher_normalise(packed(shown)), mask_N]
