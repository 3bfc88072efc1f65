"""What holds for T2T-ViTs besides the recorded numbers: fixed parts, precision, sizes, groups, transfer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.build import build_classifier, build_dense, build_encoder
from vitpipe.models.draws import image_draws
from vitpipe.models.t2t.performer import Performer
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import save_weights
from vitpipe.optim.groups import parameter_groups

NANO = model_config({"name": "t2t_nano", "image_size": 64})
PERFORMERS = ("backbone.patch_embed.attention1", "backbone.patch_embed.attention2")
FIXED = {"backbone.position", "backbone.class_position", *(f"{p}.random_features" for p in PERFORMERS)}


def seeded(kind=build_classifier, model=NANO, **options):
    torch.manual_seed(0)
    return kind(model, **options)


def test_random_features_and_positions_are_stored_and_never_trained():
    network = seeded(num_classes=3).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert set(before) > FIXED
    assert not FIXED & {name for name, _ in network.named_parameters()}
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    network(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    same = {name for name, tensor in network.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == FIXED


def test_random_features_are_orthogonal_rows_of_the_length_of_a_normal_draw():
    for width, inner, num in ((27, 64, 32), (9, 8, 8)):
        rows = Performer(width, inner, num).random_features
        torch.testing.assert_close(rows @ rows.t(), num * torch.eye(num), rtol=0, atol=1e-4)


def test_positions_are_sines_and_cosines_of_the_place_in_the_sequence():
    backbone = build_encoder(model_config({"name": "t2t_nano", "image_size": 96})).backbone
    table = torch.cat([backbone.class_position, backbone.position], dim=1)[0]
    assert table.shape == (37, 64)
    for place, channel in ((0, 0), (0, 1), (1, 0), (1, 7), (36, 62), (20, 31)):
        angle = place / 10000 ** (2 * (channel // 2) / 64)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        assert table[place, channel].item() == pytest.approx(expected, abs=1e-7)


@torch.no_grad()
def test_features_are_float32_under_autocast():
    layer = seeded(Performer, 48, inner_width=16, num_features=8).eval()
    x = 3 * torch.randn(2, 50, 48)
    exact = layer._attended(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.kqv(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32  # the values keep their precision through the shortcuts
        for ours, expected in zip(layer._attended(x), exact, strict=True):
            assert torch.equal(ours, expected)
        network = seeded(num_classes=3).eval()
        assert network(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_performers_drop_in_training_by_image():
    network = seeded(num_classes=3)
    images, numbers = torch.randn(4, 3, 64, 64), torch.tensor([7, 3, 9, 1])

    def logits(*parts):
        rows = []
        for part in parts:
            with image_draws(5, numbers[part]):
                rows.append(network(images[part]))
        return torch.cat(rows)

    network.train()
    whole = logits(slice(0, 4))
    torch.testing.assert_close(logits(slice(0, 1), slice(1, 4)), whole)
    network.eval()
    assert not torch.allclose(network(images), whole, atol=1e-3)
    assert torch.equal(network(images), network(images))


def test_another_image_size_resizes_the_grid_and_keeps_the_class_tokens_place(tmp_path):
    small = seeded(build_encoder).eval()
    images = torch.randn(1, 3, 96, 64)
    found = small.features(images)
    assert found.grids == ((6, 4),)
    assert small.location_grid(found).shape == (1, 64, 6, 4)
    square = small.backbone.position.mT.unflatten(2, (4, 4))
    expected = F.interpolate(square, size=(6, 4), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(small.backbone.positions_for((6, 4)), expected)
    assert small.backbone.positions_for((4, 4)) is small.backbone.position
    # The same when weights move to a network that is built for another size.
    save_weights(small, tmp_path / "w.safetensors")
    large = seeded(build_encoder, NANO.model_copy(update={"image_size": 96}))
    report = transfer_weights(large, tmp_path / "w.safetensors")
    assert [row.target for row in report.rows if row.outcome == "resized"] == ["backbone.position"]
    torch.testing.assert_close(large.backbone.position, small.backbone.positions_for((6, 6)))
    assert torch.equal(large.backbone.class_position, small.backbone.class_position)
    with pytest.raises(InputError, match="multiples of 16"):
        small.features(torch.zeros(1, 3, 64, 72))
    with pytest.raises(ValueError, match="multiple of 16"):
        model_config({"name": "t2t_nano", "image_size": 72})


def test_the_vector_is_the_class_tokens_and_its_attention_a_share_of_the_grid():
    network = seeded(build_encoder).eval()
    images = torch.randn(2, 3, 64, 64)
    found = network.features(images, (-1,), attention=True)
    torch.testing.assert_close(found.pooled, network.final_norm(found.class_tokens[0]))
    assert found.attention[0].shape == (2, 4, 17, 17)
    look = network.image_attention(images)
    assert look.shape == (2, 4, 4)
    torch.testing.assert_close(look.flatten(1), found.attention[0][:, :, 0, 1:].mean(1))
    assert network.frozen_features(images, 4).shape == (2, 256)
    assert (NANO.num_frozen_blocks, NANO.shows_attention) == (4, True)


def test_layers_and_decay():
    """drloc's optimiser: everything of more than one dimension decays, the class token too."""
    network = seeded(num_classes=3)
    groups = parameter_groups(network.named_parameters(), weight_decay=0.05, no_decay=network.no_decay)
    kept = {n for group in groups if not group["decays"] for n in group["names"]}
    assert kept == {n for n, parameter in network.named_parameters() if parameter.ndim == 1}
    assert network.layer_of("backbone.class_token") == 0
    assert network.layer_of("backbone.patch_embed.attention2.norm1.weight") == 0
    assert network.layer_of("backbone.blocks.3.norm1.weight") == 4
    assert network.layer_of("backbone.norm.weight") == network.layer_of("head.bias") == 5
    assert NANO.num_layers == network.num_layers == 6


def test_transfer_between_encoders_and_classifiers(tmp_path):
    classifier = seeded(num_classes=3)
    save_weights(classifier, tmp_path / "c.safetensors")
    assert str(describe(classifier.state_dict())) == "a classifier network of t2t_nano for 64 pixels"
    report = transfer_weights(build_encoder(NANO), tmp_path / "c.safetensors")
    assert {row.source for row in report.rows if row.outcome == "unused"} == {"head.weight", "head.bias"}
    report = transfer_weights(build_classifier(NANO, num_classes=4), tmp_path / "c.safetensors")
    assert {row.target for row in report.rows if row.outcome == "fresh"} == {"head.weight", "head.bias"}
    encoder = seeded(build_encoder)
    save_weights(encoder, tmp_path / "e.safetensors")
    assert str(describe(encoder.state_dict())) == "an encoder network of t2t_nano for 64 pixels"
    assert transfer_weights(classifier, tmp_path / "e.safetensors").count("missing") == 2
    damaged = {name: t for name, t in encoder.state_dict().items() if not name.endswith("random_features")}
    save_weights(damaged, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError):
        transfer_weights(encoder, tmp_path / "d.safetensors")
    with pytest.raises(RecipeError, match="neither detection nor segmentation"):
        build_dense(NANO, "detect", image_size=64)


def test_the_heads_initial_values_are_the_recipes():
    wide = NANO.model_copy(update={"head_init_std": 0.5})
    assert build_classifier(wide, num_classes=50).head.weight.std().item() == pytest.approx(0.5, rel=0.1)
    full = build_encoder(model_config({"name": "t2t_vit_14"})).backbone
    assert full.blocks[3].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert full.patch_embed.attention1.kqv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert full.class_token.std().item() == pytest.approx(0.02, rel=0.15)
    assert full.blocks[0].attn.qkv.bias is None
