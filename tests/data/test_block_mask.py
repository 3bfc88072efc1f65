"""Masks in blocks: as many units as the released generator hides, and the crop that is rendered twice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.augment import Normalise
from vitpipe.data.block_mask import block_mask
from vitpipe.data.teacher_view import TeacherView

GOLDEN = Path(__file__).parent.parent / "golden" / "itpn.json"


def test_statistics_of_the_released_generator():
    recorded = json.loads(GOLDEN.read_text())["block_mask_statistics"]
    draws = random.Random(3)
    counts = [int(block_mask(14, 75, 16, draws).sum()) for _ in range(1000)]
    assert max(counts) == recorded["masked_max"] == 75
    assert min(counts) >= recorded["masked_min"] - 3
    assert np.mean(counts) == pytest.approx(recorded["masked_mean"], abs=0.15)
    assert np.mean(np.array(counts) == 75) == pytest.approx(recorded["share_of_draws_with_all_75"], abs=0.05)


@pytest.mark.parametrize(("side", "masked", "smallest"), [(4, 6, 2), (16, 75, 16), (2, 1, 1), (3, 8, 9)])
def test_any_grid(side, masked, smallest):
    for seed in range(20):
        mask = block_mask(side, masked, smallest, random.Random(seed))
        assert mask.shape == (side * side,)
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert mask.sum() <= masked


def _view(**changes):
    augment = AugmentConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), **changes)
    normalise = Normalise((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return TeacherView(
        augment,
        64,
        teacher_size=56,
        teacher_normalise=normalise,
        grid_side=4,
        masked_units=6,
        smallest_block=2,
    )


def test_both_images_are_the_same_crop():
    x, y = np.meshgrid(np.linspace(0, 255, 150), np.linspace(0, 255, 90))
    image = Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))
    view = _view(color_jitter=0.4)
    for seed in range(5):
        seed_everything("sample", seed)
        own, shown, mask = view(image)
        assert (own.shape, shown.shape, mask.shape) == ((3, 64, 64), (3, 56, 56), (16,))
        resized = torch.nn.functional.interpolate(
            (own * 0.5 + 0.5)[None], size=(56, 56), mode="bicubic", antialias=True
        )[0]
        assert (resized - shown).abs().max() < 0.03
        seed_everything("sample", seed)
        again = view(image)
        assert all(torch.equal(a, b) for a, b in zip((own, shown, mask), again, strict=True))
    assert not torch.equal(own, _view()(image)[0])


def test_the_teacher_sees_lanczos():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8))
    _, shown, _ = _view(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0)(image)
    expected = np.asarray(image.resize((56, 56), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    assert np.abs(shown.permute(1, 2, 0).numpy() - expected).max() < 1e-6
