import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from vitpipe.data import resize

FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


def noise(width, height, seed=0):
    """Uniform noise with black and white blocks: rounding, and overshoot of the bicubic filter."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    values[: height // 3, : width // 3] = 255
    values[height // 2 :, width // 2 :: 2] = 0
    return Image.fromarray(values)


def same(image, box, size, resampling):
    ours = np.asarray(resize.unpacked(resize.resized_crop(image, box, size, resampling)))
    return np.array_equal(ours, np.asarray(image.crop(box).resize(size, resampling)))


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 160), st.integers(1, 160), st.integers(1, 96), st.integers(1, 96),
    st.sampled_from(FILTERS), st.integers(0, 9),
)  # fmt: skip
def test_every_size_is_pillows_to_the_last_bit(width, height, out_width, out_height, resampling, seed):
    image = noise(width, height, seed)
    assert same(image, (0, 0, width, height), (out_width, out_height), resampling)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_crops_do_not_see_beyond_their_border(data):
    image = noise(130, 90)
    left, upper = data.draw(st.integers(0, 120)), data.draw(st.integers(0, 80))
    box = (left, upper, data.draw(st.integers(left + 1, 130)), data.draw(st.integers(upper + 1, 90)))
    assert same(image, box, (48, 48), data.draw(st.sampled_from(FILTERS)))


@pytest.mark.parametrize("size", [(224, 224), (341, 256), (96, 96), (512, 384), (500, 224), (224, 375)])
@pytest.mark.parametrize("resampling", FILTERS)
def test_sizes_of_real_images(size, resampling):
    assert same(noise(500, 375), (0, 0, 500, 375), size, resampling)


def test_packing_is_lossless_and_takes_turned_arrays():
    image = noise(33, 17)
    pixels = resize.packed(image)
    assert np.array_equal(np.asarray(resize.unpacked(pixels)), np.asarray(image))
    mirrored = np.asarray(resize.unpacked(pixels[:, ::-1]))
    assert np.array_equal(mirrored, np.asarray(image)[:, ::-1])


@pytest.mark.parametrize("mirrored", [False, True])
def test_normalised_values_are_torchvisions(mirrored):
    image, mean, std = noise(64, 48), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = functional.normalize(functional.to_tensor(image), mean, std)
    pixels = resize.packed(image)
    ours = resize.normalised(pixels[:, ::-1] if mirrored else pixels, resize.normalising_table(mean, std))
    assert torch.equal(torch.from_numpy(ours), reference.flip(-1) if mirrored else reference)
