import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision import transforms

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.augment import CentreCrop, Normalise, eval_transform, random_box, train_transform
from vitpipe.data.resize import packed, unpacked


def picture(width=70, height=50) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(64, 64), (70, 50), (33, 90), (128, 127)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_gives_torchvisions_very_pixels(size, interpolation):
    augment = AugmentConfig(interpolation=interpolation)
    mode = transforms.InterpolationMode(interpolation)
    theirs = transforms.Compose([
        transforms.Resize(36, mode),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize(augment.mean, augment.std),
    ])  # fmt: skip
    ours = eval_transform(32, 32 / 36, augment)
    assert torch.equal(ours(picture(*size)), theirs(picture(*size)))


def test_training_without_strings_gives_timms_very_pixels():
    from timm.data import create_transform

    augment = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase_probability=0.5)
    theirs = create_transform(
        32, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, re_mode="pixel",
        interpolation="bicubic",
    )  # fmt: skip
    ours = train_transform(augment, 32)
    for number in range(20):
        seed_everything(number)
        expected = theirs(picture())
        seed_everything(number)
        assert torch.equal(ours(picture()), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crop_and_flip_are_torchvisions_pixels_at_full_size(interpolation):
    from timm.data.transforms import RandomResizedCropAndInterpolation

    augment = AugmentConfig(interpolation=interpolation)
    theirs = transforms.Compose([
        RandomResizedCropAndInterpolation(224, interpolation=interpolation),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(augment.mean, augment.std),
    ])  # fmt: skip
    ours, image = train_transform(augment, 224), picture(500, 375)
    for number in range(12):
        seed_everything(number)
        expected = theirs(image)
        seed_everything(number)
        assert torch.equal(ours(image), expected)


@given(
    st.integers(1, 700), st.integers(1, 700),
    st.tuples(st.floats(0.01, 1.5), st.floats(0.01, 1.5)), st.tuples(st.floats(0.1, 8.0), st.floats(0.1, 8.0)),
    st.integers(0, 2**31),
)  # fmt: skip
def test_boxes_are_timms_draw_for_draw(width, height, scale, ratio, seed):
    from timm.data.transforms import RandomResizedCropAndInterpolation

    scale, ratio = tuple(sorted(scale)), tuple(sorted(ratio))
    random.seed(seed)
    top, left, down, across = RandomResizedCropAndInterpolation.get_params(
        Image.new("1", (width, height)), scale, ratio
    )
    after = random.random()
    random.seed(seed)
    assert random_box(width, height, scale, ratio) == (left, top, left + across, top + down)
    assert random.random() == after


def test_crop_scale_flip_and_jitter_reach_the_transform():
    whole = AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=1.0)
    image = picture(32, 32)
    np.testing.assert_array_equal(
        train_transform(whole, 32)(image), Normalise(whole.mean, whole.std)(packed(ImageOps.mirror(image)))
    )
    jittered = train_transform(whole.model_copy(update={"color_jitter": 0.4}), 32)
    assert not torch.equal(jittered(image), train_transform(whole, 32)(image))


def test_normalisation_by_hand():
    values = Normalise((0.5, 0.25, 0.0), (0.5, 0.5, 1.0))(packed(Image.new("RGB", (3, 2), (255, 0, 51))))
    assert values.shape == (3, 2, 3)
    np.testing.assert_allclose(values[:, 0, 0], [1.0, -0.5, 0.2], rtol=1e-6)


def test_centre_crop_of_the_full_picture():
    assert unpacked(CentreCrop(50, 50)(picture(50, 50))).tobytes() == picture(50, 50).tobytes()


def test_posterising_to_no_bits_gives_black_not_an_error():
    # timm's increasing RandAugment asks for 0 bits now and then; Pillow 13 raises there.
    from timm.data.auto_augment import AugmentOp

    assert np.asarray(ImageOps.posterize(picture(), 0)).max() == 0
    operation = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=10)
    assert operation.level_fn(10, operation.hparams)[0] == 0
    assert operation(picture()).size == (70, 50)


def test_rand_augment_survives_a_thousand_images():
    random.seed(0)
    transform = train_transform(AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1"), 16)
    small = picture(16, 16)
    for number in range(1000):
        seed_everything(number)
        assert transform(small).shape == (3, 16, 16)


def test_a_string_that_timm_does_not_know_is_refused():
    with pytest.raises(RecipeError, match=r"'rand-x9'.*rand-m9-mstd0\.5-inc1"):
        train_transform(AugmentConfig().model_copy(update={"rand_augment": "rand-x9"}), 32)
