"""Label propagation: the recorded numbers of the released code, and the whole affinity matrix written out."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selfpatch_golden import ENTRIES, TOLERANCE, error, filled, keys
from selfpatch_golden import fill as golden_fill

from vitpipe.benchmarks.propagation_speed import MatrixPropagation
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError
from vitpipe.evaluate.propagate import Propagation, PropagationSettings, hard_labels
from vitpipe.models.build import build_encoder
from vitpipe.models.convert import convert_state


def settings_of(entry) -> PropagationSettings:
    setting = entry["setting"]
    return PropagationSettings(
        setting["n_last_frames"], setting["size_mask_neighborhood"], setting["topk"], setting["temperature"]
    )


@pytest.fixture(params=[Propagation, MatrixPropagation], ids=["strips", "matrix"])
def way(request):
    """Ours, and the form that ours is compared with."""
    return request.param


def check(way, entry, features_TNC, size):
    labels = torch.tensor(entry["input"]["first_frame_labels"])
    propagation = way(features_TNC[0], labels, settings_of(entry))
    for number, recorded in enumerate(entry["record"], start=1):
        assert recorded["frame"] == number
        soft = propagation.step(features_TNC[number])
        assert error(soft[None], recorded["soft"]) < TOLERANCE
        mask = hard_labels(soft, size)
        assert zlib.crc32(mask.tobytes()) == recorded["mask"]["crc32_uint8"]


def test_features_of_the_record(way):
    probe = golden_fill.probe
    frames = [probe((48, 16), 700) + 0.5 * probe((48, 16), 701 + time) for time in range(11)]
    check(way, ENTRIES["propagation_6x8"], frames, (96, 128))


@torch.no_grad()
def test_a_clip_through_the_network_of_the_record(way):
    converted = convert_state(filled(keys("selfpatch_vit_tiny_16_coco")["backbone_only"]))
    network = build_encoder(model_config({"name": "vit_tiny", "pooling": "class_attention"})).eval()
    network.load_state_dict(converted.state, strict=False)
    probe = golden_fill.probe
    frames = [probe((3, 64, 96), 740) + 0.3 * probe((3, 64, 96), 741 + time) for time in range(4)]
    features = network.features(torch.stack(frames))
    assert features.grids[0] == (4, 6)
    check(way, ENTRIES["propagation_clip_vit_tiny"], network.final_norm(features.tokens[0]), (64, 96))


@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 11)),
    reach=st.integers(0, 5),
    context=st.integers(0, 3),
    top_k=st.integers(1, 9),
    # Few kinds of features: patches that are equally like a patch are common.
    kinds=st.integers(2, 40),
    seed=st.integers(0, 1000),
)
def test_the_result_is_that_of_the_whole_affinity_matrix(grid, reach, context, top_k, kinds, seed):
    generator = torch.Generator().manual_seed(seed)
    num_patches = grid[0] * grid[1]
    # Of 16 channels of the same size: length and products are exact, in any order.
    table = torch.randn(kinds, 16, generator=generator).sign()
    features = table[torch.randint(kinds, (6, num_patches), generator=generator)]
    labels = torch.randint(3, grid, generator=generator)
    settings = PropagationSettings(context, reach, top_k, 0.1)
    ours, written_out = (way(features[0], labels, settings) for way in (Propagation, MatrixPropagation))
    for frame in features[1:]:
        torch.testing.assert_close(ours.step(frame), written_out.step(frame), atol=1e-4, rtol=0)


def test_all_patches_that_are_equally_like_the_last_one_count():
    # Four equal context patches, two of each label, and room for three.
    features, labels = torch.ones(4, 2), torch.tensor([[0, 0, 1, 1]])
    propagation = Propagation(features, labels, PropagationSettings(top_k=3))
    torch.testing.assert_close(propagation.step(features), torch.full((2, 1, 4), 0.5))


def test_low_temperatures_do_not_overflow():
    features = torch.eye(4)
    labels = torch.tensor([[0, 1], [1, 0]])
    propagation = Propagation(features, labels, PropagationSettings(temperature=1e-3))
    assert propagation.step(features).argmax(dim=0).tolist() == labels.tolist()


def test_soft_labels_are_shares():
    torch.manual_seed(0)
    propagation = Propagation(torch.randn(30, 8), torch.randint(4, (5, 6)), PropagationSettings())
    for _ in range(12):
        soft = propagation.step(torch.randn(30, 8))
        torch.testing.assert_close(soft.sum(dim=0), torch.ones(5, 6))


def test_another_grid_is_refused():
    with pytest.raises(InputError, match="7 patch features for a grid of 2 x 3"):
        Propagation(torch.ones(7, 4), torch.zeros(2, 3), PropagationSettings())


def test_an_object_that_covers_the_frame_is_found_everywhere():
    soft = torch.stack([torch.zeros(3, 4), torch.full((3, 4), 0.9999999)])
    assert (hard_labels(soft, (48, 64)) == 1).all()
    assert (hard_labels(soft[:1] + 1, (48, 64)) == 0).all()


def test_weak_labels_are_spread_before_they_compete():
    soft = torch.tensor([[[0.9, 0.6]], [[0.1, 0.4]]])
    # Raw, the background would be the larger one in both.
    found = hard_labels(soft, (16, 32))
    assert (found[:, :8] == 0).all()
    assert (found[:, -8:] == 1).all()
    assert found.dtype == np.uint8
