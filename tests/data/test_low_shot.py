"""A share of a training set has every class, exactly the size that is asked for, and depends on the seed only."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.data.low_shot import LowShot


def shards_of(labels):
    def decode_many(positions):
        return [(f"image {position}", int(labels[position])) for position in positions]

    labels = np.asarray(labels, np.uint32)
    classes = tuple(map(str, range(int(labels.max()) + 1)))
    return SimpleNamespace(labels=labels, classes=classes, class_names=(), decode_many=decode_many)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data(), st.integers(0, 3))
def test_every_class_has_its_part(labels, data, seed):
    num_images = data.draw(st.integers(1, len(labels)))
    chosen = LowShot(shards_of(labels), num_images, seed)
    assert len(chosen) == num_images
    assert list(chosen.positions) == sorted(set(chosen.positions.tolist()))
    counts = np.bincount(np.asarray(labels)[chosen.positions], minlength=5)
    whole = np.bincount(labels, minlength=5)
    # Within one image of the exact part.
    assert (np.abs(counts - whole * num_images / len(labels)) <= 1.0).all()
    assert np.array_equal(chosen.positions, LowShot(shards_of(labels), num_images, seed).positions)


def test_another_seed_chooses_others_and_positions_are_its_own():
    labels = np.repeat(np.arange(10), 20)
    first, second = (LowShot(shards_of(labels), 50, seed) for seed in (0, 1))
    assert not np.array_equal(first.positions, second.positions)
    assert np.bincount(labels[first.positions]).tolist() == [5] * 10
    images = first.decode_many([0, 49])
    assert [image for image, _ in images] == [f"image {first.positions[place]}" for place in (0, 49)]
