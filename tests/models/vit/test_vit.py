"""Vision transformers: sizes, pooling, attention, what they refuse."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError
from vitpipe.models.build import build_classifier, build_encoder, create_backbone
from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.neighbours import nearest_neighbours

NANO = {"name": "vit_nano", "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize("pooling", ["class_token", "class_attention", "mean"])
@torch.no_grad()
def test_features_of_any_block_and_size(pooling):
    torch.manual_seed(0)
    network = build_encoder(model_config({**NANO, "pooling": pooling})).eval()
    images = torch.randn(2, 3, 24, 40)
    found = network.features(images, (0, -1), attention=True)
    assert found.grids == ((3, 5),) * 2
    assert [tuple(t.shape) for t in found.tokens] == [(2, 15, 64)] * 2
    assert found.pooled.shape == (2, 64)
    has_token = pooling == "class_token"
    assert len(found.class_tokens) == 2 * has_token
    assert found.attention[0].shape == (2, 4, 15 + has_token, 15 + has_token)
    torch.testing.assert_close(found.attention[1].sum(-1), torch.ones(2, 4, 15 + has_token))
    looks = network.image_attention(images)
    if pooling == "mean":
        assert looks is None
    else:
        assert looks.shape == (2, 3, 5)
        assert float(looks.sum((1, 2)).max()) <= 1.0
    if pooling == "mean":
        with pytest.raises(InputError, match="no class tokens"):
            network.frozen_features(images, 3)
    else:
        assert network.frozen_features(images, 3).shape == (2, 192)
        assert "last 3 blocks" in network.frozen_reading(3)
    with pytest.raises(InputError):
        network.frozen_features(images, 5)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValidationError, match="no multiple of patch_size 12"):
        model_config({**NANO, "patch_size": 12})
    network = build_encoder(model_config(NANO))
    with pytest.raises(InputError, match="cannot take an image of 30 x 32 pixels"):
        network.features(torch.zeros(1, 3, 30, 32))
    with pytest.raises(InputError, match="cannot take an image of 4 x 32 pixels"):
        network.features(torch.zeros(1, 3, 4, 32))
    with pytest.raises(InputError, match="heads"):
        build_encoder(model_config({**NANO, "heads": 5}))


def test_without_positions_patches_are_a_set():
    torch.manual_seed(0)
    network = build_encoder(model_config({**NANO, "position": "none", "pooling": "mean"})).eval()
    image = torch.randn(1, 3, 32, 32)
    # Both halves exchanged: other places, the same patches.
    turned = torch.cat([image[..., 16:], image[..., :16]], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(network.features(image).pooled, network.features(turned).pooled)
    assert not any("position" in name for name in network.state_dict())


@torch.no_grad()
def test_many_class_tokens_at_once_are_what_each_would_be_alone():
    torch.manual_seed(0)
    module, tokens = ClassAttention(32, 4), torch.randn(2, 12, 32)
    chosen = nearest_neighbours(tokens, (3, 4), 3)
    found = module.around(tokens, chosen)
    for image in range(2):
        for patch in range(12):
            alone = module(tokens[image, chosen[image, patch]].unsqueeze(0))
            torch.testing.assert_close(found[image, patch], alone[0])


def test_library_use():
    assert create_backbone("vit_tiny").patch_embed.weight.shape == (192, 3, 16, 16)
    assert build_classifier(model_config(NANO), num_classes=3)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
