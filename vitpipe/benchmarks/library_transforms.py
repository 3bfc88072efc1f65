"""Reference transforms for the data benchmark, made of timm's and torchvision's own classes.

The same draws and pixels as those of `vitpipe.data`, on Pillow images, at the libraries' speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from vitpipe.config.multi_crop import CropsConfig
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.data.crops import pillow_steps

Transform = Callable[[Image.Image], Any]


def library_training(augment: AugmentConfig, size: int) -> Transform:
    """The reference for `train_transform`: crop, flip, RandAugment, normalise, random erasing."""
    # Imported in functions: timm takes 2 s, which `vitpipe benchmark --help` need not wait for.
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    steps: list[Any] = [
        RandomResizedCropAndInterpolation(size, augment.crop_scale, augment.crop_ratio, "bicubic"),
        transforms.RandomHorizontalFlip(augment.flip_probability),
    ]
    if augment.rand_augment:
        # Written out, not imported from `vitpipe.data.augment`: a reference must not share its code.
        parameters = {
            "translate_const": int(size * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in augment.mean),
            "interpolation": Image.Resampling.BICUBIC,
        }
        steps.append(rand_augment_transform(augment.rand_augment, parameters))
    steps += [transforms.ToTensor(), transforms.Normalize(augment.mean, augment.std)]
    if augment.erase_probability:
        steps.append(RandomErasing(augment.erase_probability, mode="pixel", device="cpu"))
    composed: Transform = transforms.Compose(steps)
    return composed


def library_crops(config: CropsConfig) -> Transform:
    """The reference for `MultiCrop`."""
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision import transforms

    def view(kind: int) -> Transform:
        local = kind == 2
        crop = RandomResizedCropAndInterpolation(
            config.local_size if local else config.global_size,
            scale=config.local_scale if local else config.global_scale,
            interpolation="bicubic",
        )
        # Between flip and normalisation both sides run the same classes of torchvision and Pillow.
        steps = [crop, transforms.RandomHorizontalFlip(), *pillow_steps(config, kind)]
        composed: Transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        )
        return composed

    views = [view(0), view(1), *[view(2)] * config.num_local]
    return lambda image: [made(image) for made in views]


def library_evaluation(size: int, crop_ratio: float, augment: AugmentConfig) -> Transform:
    """The reference for `eval_transform`: resize, centre crop, normalise."""
    from torchvision import transforms

    composed: Transform = transforms.Compose(
        [
            transforms.Resize(int(size / crop_ratio), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(augment.mean, augment.std),
        ]
    )
    return composed
