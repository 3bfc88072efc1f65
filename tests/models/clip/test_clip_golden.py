"""CLIP's image tower compared with recorded outputs of the released code: the same weights and images."""

from __future__ import annotations

import pytest
import torch

from vitpipe.models.clip.tower import CLIP_MEAN, CLIP_STD, TOWERS, ClipTower
from vitpipe.models.convert import convert_state
from vitpipe.models.weights import load_into

TOLERANCE = 1e-4


@pytest.mark.parametrize("images", ["unit_range_images", "official_rescaled_images"])
@torch.no_grad()
def test_the_teacher_gives_the_released_targets(golden, images):
    entry = golden.entry("teacher_b16")
    given = entry["input"]["image"]
    generator = torch.Generator().manual_seed(given["uniform01_generator_seed"])
    values = torch.rand(given["shape"], generator=generator)
    if images == "official_rescaled_images":
        values = (values + 1) / 2
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (CLIP_MEAN, CLIP_STD))
    tower = ClipTower(TOWERS["clip_b16"]).eval()
    assert sum(p.numel() for p in tower.parameters()) == entry["params"]
    # The recorded weights are a function of the names without prefix.
    empty = golden.empty_state("teacher_b16", "cpu")
    state = golden.fill.fill({name.removeprefix("visual."): tensor for name, tensor in empty.items()})
    converted = convert_state({f"visual.{name}": tensor for name, tensor in state.items()})
    assert (converted.kind, converted.model) == ("clip_image_tower", "clip_b16")
    load_into(tower, converted.state)
    recorded = entry["outputs"][images]
    errors = golden.errors({images: tower.targets((values - mean) / std)}, {images: recorded})
    print(images, errors)
    assert errors[images] < TOLERANCE
