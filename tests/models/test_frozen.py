"""Frozen features of one block and of several, and the linear classifier on them."""

from __future__ import annotations

import pytest
import torch
from token_encoder import TokenEncoder
from torch import nn

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError
from vitpipe.models.build import build_encoder
from vitpipe.models.frozen import FrozenProbe


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return TokenEncoder(width=6, depth=3)


IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_one_block_is_the_vector_of_the_image(encoder):
    assert torch.equal(encoder.frozen_features(IMAGES), encoder.features(IMAGES).pooled)
    assert encoder.feature_width == 6


@pytest.mark.parametrize("last_blocks", [2, 3])
def test_class_tokens_of_the_last_blocks_are_normed_one_by_one_and_joined_in_order(encoder, last_blocks):
    with torch.no_grad():
        encoder.norm.weight.uniform_(0.5, 2.0)
        encoder.norm.bias.uniform_(-1.0, 1.0)
    found = encoder.frozen_features(IMAGES, last_blocks)
    tokens = encoder.features(IMAGES, range(3)).class_tokens[-last_blocks:]
    assert found.shape == (4, 6 * last_blocks)
    for place, token in enumerate(tokens):
        own = found[:, 6 * place : 6 * (place + 1)]
        expected = nn.functional.layer_norm(token, (6,), encoder.norm.weight, encoder.norm.bias)
        torch.testing.assert_close(own, expected)
    assert torch.equal(found[:, -6:], encoder.frozen_features(IMAGES))
    assert encoder.frozen_reading(last_blocks) == (
        f"class tokens of the last {last_blocks} blocks, each behind the final norm"
    )


@pytest.mark.parametrize("last_blocks", [0, -1, 4])
def test_blocks_that_there_are_not_are_refused(encoder, last_blocks):
    with pytest.raises(InputError, match="give a number from 1 to 3"):
        encoder.frozen_features(IMAGES, last_blocks)


def test_a_network_without_class_tokens_is_refused():
    encoder = build_encoder(model_config({"name": "hivit_nano", "image_size": 32}))
    images = torch.zeros(1, 3, 32, 32)
    assert encoder.frozen_features(images).shape == (1, encoder.feature_width)
    with pytest.raises(InputError, match=r"hivit network has no class tokens .* set it to 1"):
        encoder.frozen_features(images, 2)


@pytest.mark.parametrize("standardise", [True, False])
def test_the_linear_layer_reads_all_blocks(encoder, standardise):
    probe = FrozenProbe(encoder, 5, last_blocks=3, standardise=standardise).eval()
    features = encoder.frozen_features(IMAGES, 3)
    if standardise:
        probe.norm.running_mean.copy_(features.mean(dim=0))
        features = (features - features.mean(dim=0)) / (1.0 + 1e-6) ** 0.5
    torch.testing.assert_close(probe(IMAGES), probe.fc(features))
    assert {name.split(".")[0] for name in probe.head()} == ({"norm", "fc"} if standardise else {"fc"})
    assert probe.fc.weight.shape == (5, 18)
