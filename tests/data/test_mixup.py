import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.data.mixup import Mixup

WHERE = {"key": 3}


def batch(num=6):
    images = torch.arange(num).float()[:, None, None, None].expand(num, 3, 16, 12).clone()
    return images, torch.arange(num) % 4


def test_targets_are_timms_smoothed_targets():
    images, labels = batch()
    mixed, targets = Mixup(AugmentConfig(), 4, 0.1)(images, labels, **WHERE)
    assert mixed is images
    expected = torch.full((6, 4), 0.1 / 4)
    expected[torch.arange(6), labels] += 0.9
    torch.testing.assert_close(targets, expected)
    torch.testing.assert_close(targets, mixup_target(labels, 4, 1.0, 0.1))


@pytest.mark.parametrize("step", range(8))
def test_mixup_blends_images_and_targets_by_the_same_share(step):
    images, labels = batch()
    mixed, targets = Mixup(AugmentConfig(mixup_alpha=0.8), 4, 0.1)(images, labels, key=step)
    # Image k holds the value k, its partner 5 - k.
    share = float((mixed[0, 0, 0, 0] - 5.0) / (0.0 - 5.0))
    assert 0.0 <= share <= 1.0
    torch.testing.assert_close(mixed, images * share + images.flip(0) * (1 - share))
    torch.testing.assert_close(targets, mixup_target(labels, 4, share, 0.1))


@pytest.mark.parametrize("step", range(8))
def test_cutmix_pastes_a_box_and_corrects_the_share(step):
    images, labels = batch()
    mixed, targets = Mixup(AugmentConfig(cutmix_alpha=1.0), 4, 0.0)(images, labels, key=step)
    pasted = mixed[0, 0] == 5.0
    assert torch.equal(mixed[0, 0] == 0.0, ~pasted)
    rows, columns = pasted.any(1), pasted.any(0)
    assert pasted.sum() == rows.sum() * columns.sum()
    share = 1.0 - float(pasted.float().mean())
    torch.testing.assert_close(targets, mixup_target(labels, 4, share, 0.0))
    assert images[0].max() == 0.0, "the loader's batch must not be changed"


def test_both_are_chosen_about_as_often_as_asked_for():
    images, labels = batch()
    mix = Mixup(AugmentConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mix_switch_probability=0.25), 4, 0.0)
    blended = 0
    for step in range(400):
        mixed, _ = mix(images, labels, key=step)
        blended += not set(mixed.unique().tolist()) <= set(range(6))
    assert 0.68 < blended / 400 < 0.82


def test_mix_probability_leaves_batches_alone():
    images, labels = batch()
    mix = Mixup(AugmentConfig(mixup_alpha=1.0, mix_probability=0.5), 4, 0.0)
    unchanged = sum(torch.equal(mix(images, labels, key=step)[0], images) for step in range(200))
    assert 75 < unchanged < 125


def test_mixing_is_a_function_of_its_arguments_alone():
    images, labels = batch(5)  # an odd batch: the middle image is its own partner
    mix = Mixup(AugmentConfig(mixup_alpha=0.8, cutmix_alpha=1.0), 4, 0.1)
    first = mix(images, labels, **WHERE)
    np.random.seed(7), torch.manual_seed(7)
    again = mix(images, labels, **WHERE)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], mix(images, labels, key=9)[1])
