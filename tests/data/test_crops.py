import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from vitpipe.config.multi_crop import CropsConfig
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.crops import MultiCrop, RandomBlur, RandomSolarise, pillow_steps

SMALL = CropsConfig(global_size=64, local_size=32, num_local=3)


def picture(width=120, height=90):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_view(config, kind):
    """The same view made of timm's and torchvision's classes on Pillow's images."""
    local = kind == 2
    return transforms.Compose([
        RandomResizedCropAndInterpolation(
            config.local_size if local else config.global_size,
            scale=config.local_scale if local else config.global_scale,
            interpolation=config.interpolation,
        ),
        transforms.RandomHorizontalFlip(config.flip_probability),
        *pillow_steps(config, kind),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip


def test_views_are_those_of_the_libraries_to_the_last_bit():
    ours = MultiCrop(SMALL)
    theirs = [reference_view(SMALL, kind) for kind in (0, 1, 2, 2, 2)]
    for seed in range(5):
        seed_everything(seed)
        expected = [view(picture()) for view in theirs]
        seed_everything(seed)
        views = ours(picture())
        assert [tuple(view.shape) for view in views] == [(3, 64, 64)] * 2 + [(3, 32, 32)] * 3
        assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))


def test_views_differ_and_seeds_decide():
    crops = MultiCrop(SMALL)
    seed_everything(0)
    first = crops(picture())
    seed_everything(0)
    again = crops(picture())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[2], first[3])


def test_only_the_second_global_view_is_solarised():
    kinds = [[type(step) for step in pillow_steps(CropsConfig(), kind)] for kind in range(3)]
    assert [RandomSolarise in steps for steps in kinds] == [False, True, False]


def test_solarising_and_blurring():
    image = Image.new("RGB", (4, 4), (10, 127, 200))
    assert RandomSolarise(1.0)(image).getpixel((0, 0)) == (10, 127, 55)
    assert RandomSolarise(0.0)(image) is image
    dot = Image.new("RGB", (9, 9))
    dot.putpixel((4, 4), (255, 255, 255))
    assert RandomBlur(1.0, (1.0, 1.0))(dot).getpixel((3, 4))[0] > 0
    assert RandomBlur(0.0, (1.0, 1.0))(dot) is dot


@pytest.mark.parametrize("num_local", [0, 8])
def test_the_number_of_local_views(num_local):
    config = SMALL.model_copy(update={"num_local": num_local})
    assert len(MultiCrop(config)(picture())) == 2 + num_local


def test_views_travel_to_loader_processes():
    crops = MultiCrop(SMALL)
    seed_everything(3)
    expected = crops(picture())
    seed_everything(3)
    assert torch.equal(pickle.loads(pickle.dumps(crops))(picture())[4], expected[4])
