"""A plain vision transformer with iTPN's pyramid and as MAE has it: levels, leaks, layer ids, weights."""

from __future__ import annotations

import pytest
import torch

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.build import build_classifier, build_dense, build_encoder, build_pretrainer
from vitpipe.models.itpn_vit.unit_vit import SHAPES, UnitViT, layer_index
from vitpipe.models.masking import choose_units
from vitpipe.models.positions import sincos_table
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import load_state, save_weights

LEVELS = ("pyramid", "last")


def config(levels="pyramid", **more):
    values = {
        "name": "itpn_vit_nano",
        "image_size": 64,
        "levels": levels,
        "pyramid": {"width": 48, "depth": 2},
        "decoder": {"width": 64, "depth": 2, "heads": 4},
        "relative_position": levels == "pyramid",
        **more,
    }
    return model_config(values)


@pytest.fixture(scope="module", params=LEVELS)
def pretrained(request, tmp_path_factory):
    torch.manual_seed(0)
    model = build_pretrainer(config(request.param)).eval()
    path = tmp_path_factory.mktemp(request.param) / "weights.safetensors"
    save_weights(model, path)
    return request.param, model, path


def test_the_levels_are_the_4th_7th_and_last_of_12_blocks():
    shape = SHAPES["itpn_vit_base"]
    assert [block + 1 for block in shape.blocks] == [4, 7, 12]
    assert (shape.trunk.width, shape.trunk.num_heads, shape.lifted) == (768, 12, (128, 256))
    assert [block + 1 for block in SHAPES["itpn_vit_nano"].blocks] == [1, 2, 4]


@torch.no_grad()
def test_a_level_is_made_of_its_block_and_of_no_later_one():
    torch.manual_seed(1)
    trunk, images = UnitViT(SHAPES["itpn_vit_nano"], image_size=64, lifts=True), torch.randn(2, 3, 64, 64)
    stages = trunk.forward_stages(images)
    shapes = [(2, 16, 4, 4, 16), (2, 16, 2, 2, 32), (2, 16, 64)]
    assert [tuple(level.shape) for level in stages] == shapes
    for place, number in enumerate(trunk.level_blocks[:2]):
        changed = UnitViT(SHAPES["itpn_vit_nano"], image_size=64, lifts=True)
        changed.load_state_dict(trunk.state_dict())
        for block in changed.blocks[number + 1 :]:
            block.mlp.fc2.weight.add_(0.1)
        assert torch.equal(changed.forward_stages(images)[place], stages[place])
        changed.blocks[number].mlp.fc2.weight.add_(0.1)
        assert not torch.equal(changed.forward_stages(images)[place], stages[place])


@torch.no_grad()
def test_lifting_mixes_no_units():
    torch.manual_seed(2)
    trunk = UnitViT(SHAPES["itpn_vit_nano"], image_size=64, lifts=True)
    tokens = torch.randn(1, 16, 1, 1, 64)
    changed = tokens.clone()
    changed[:, 5] += 1.0
    for lift in (trunk.lift4, trunk.lift8):
        differs = (lift(tokens) != lift(changed)).flatten(2).any(-1)[0]
        assert differs.nonzero().flatten().tolist() == [5]


@torch.no_grad()
def test_hidden_pixels_reach_nothing(pretrained):
    _, model, _ = pretrained
    generator = torch.Generator().manual_seed(3)
    images, noise = torch.randn(2, 3, 64, 64, generator=generator), torch.rand(2, 16, generator=generator)
    first = model(images, noise)
    hidden = first.mask_BN.view(2, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden > 0, 100 * torch.randn(images.shape, generator=generator), images)
    assert torch.equal(first.pred_BND, model(changed, noise).pred_BND)
    for level, after in zip(
        model.encode(images, first.kept_BK), model.encode(changed, first.kept_BK), strict=True
    ):
        assert torch.equal(level, after)
    seen = torch.where(hidden > 0, images, images + 1.0)
    assert not torch.equal(first.pred_BND, model(seen, noise).pred_BND)


@torch.no_grad()
def test_a_convolution_on_the_whole_map_would_leak():
    """What the per-token lifting avoids: the same check fails where patches overlap."""
    torch.manual_seed(4)
    model = build_pretrainer(config()).eval()
    model.backbone.patch_embed = torch.nn.Conv2d(3, 64, kernel_size=18, stride=16, padding=1)
    images, noise = torch.randn(1, 3, 64, 64), torch.rand(1, 16)
    first = model(images, noise)
    hidden = first.mask_BN.view(1, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(hidden > 0, 100 * torch.randn(images.shape), images)
    assert not torch.equal(first.pred_BND, model(changed, noise).pred_BND)


@torch.no_grad()
def test_mae_fills_in_one_mask_token_and_reads_the_last_block_alone():
    torch.manual_seed(5)
    model = build_pretrainer(config("last")).eval()
    images, choice = torch.randn(1, 3, 64, 64), choose_units(torch.rand(1, 16), 0.75)
    (seen_BKC,) = model.encode(images, choice.kept_BK)
    expected = model.backbone.outputs(images, (3,), choice.kept_BK)[0]
    assert torch.equal(seen_BKC, expected)
    inputs = []
    model.decoder.blocks[0].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model.decoder(seen_BKC, choice.restore_BN)
    for unit in choice.mask_BN[0].nonzero().flatten().tolist():
        hidden = model.decoder.mask_token[0, 0] + model.decoder.fixed_position[0, unit]
        torch.testing.assert_close(inputs[0][0, unit], hidden)
    embedded = model.decoder.embed(seen_BKC)[0, 0] + model.decoder.fixed_position[0, choice.kept_BK[0, 0]]
    torch.testing.assert_close(inputs[0][0, choice.kept_BK[0, 0]], embedded)


def test_positions_start_as_sine_and_cosine_and_are_fixed_in_mae_alone(pretrained):
    levels, model, _ = pretrained
    assert torch.equal(model.backbone.absolute_position, sincos_table(4, 64))
    assert model.backbone.absolute_position.requires_grad == (levels == "pyramid")
    assert not [name for name, _ in model.named_parameters() if name.endswith("fixed_position")]
    # In fine-tuning both train it.
    assert build_classifier(config(levels), num_classes=3).backbone.absolute_position.requires_grad


@pytest.mark.parametrize("levels", LEVELS)
def test_maps_of_both_tasks_on_an_image_that_is_not_square(levels):
    model = config(levels)
    images = torch.randn(1, 3, 64, 128)
    maps = build_dense(model, "detect", image_size=64).eval()(images)
    widths = (48,) * 5 if levels == "pyramid" else (64,) * 4
    assert [tuple(x.shape[1:]) for x in maps] == [
        (width, 64 // stride, 128 // stride)
        for width, stride in zip(widths, (4, 8, 16, 32, 64), strict=False)
    ]
    segmentor = build_dense(model, "segment", image_size=128).eval()
    found = segmentor(torch.randn(1, 3, 128, 128))
    widths = (48 + 16, 48 + 32, 48 + 64, 48 + 64) if levels == "pyramid" else (64,) * 4
    assert segmentor.widths == widths == tuple(x.shape[1] for x in found)
    assert model.num_detection_maps == len(maps)
    if levels == "pyramid":
        with pytest.raises(InputError, match="relative position bias is built for 128 x 128"):
            segmentor(torch.randn(1, 3, 64, 128))


def test_layer_ids_of_base():
    assert layer_index("net.backbone.patch_embed.0.weight", 12) == layer_index("backbone.position", 12) == 0
    assert layer_index("backbone.network.blocks.11.mlp.fc1.weight", 12) == 12
    for name in (
        "backbone.lift4.0.linear.weight",
        "pyramid.fuse8.0.norm.weight",
        "head.weight",
        "rescale.0.weight",
    ):
        assert layer_index(name, 12) == 13
    with torch.device("meta"):
        model = model_config({"name": "itpn_vit_base"})
        tuned = build_classifier(model, num_classes=10)
        detector = build_dense(model, "detect", image_size=224)
    # The decay is stated for a network of 12 blocks: here it is the factor per layer.
    assert tuned.layer_scales(0.5)[tuned.layer_of("backbone.position")] == pytest.approx(0.5**13)
    assert detector.layer_scales(0.9)[1] == pytest.approx(0.9**12)
    assert detector.layer_scales(0.9)[detector.head_layer] == 1.0


def _outcomes(report):
    found = {}
    for row in report.rows:
        place = (row.target or row.source).split(".")
        found.setdefault(row.outcome, set()).add(".".join(place[:2]) if place[0] == "backbone" else place[0])
    return found


def test_what_fine_tuning_takes_of_pre_training(pretrained):
    levels, model, path = pretrained
    tuned = build_classifier(config(levels), num_classes=10)
    found = _outcomes(transfer_weights(tuned, path))
    assert torch.equal(tuned.backbone.blocks[2].mlp.fc1.weight, model.backbone.blocks[2].mlp.fc1.weight)
    assert {"decoder"} < found["unused"] if levels == "pyramid" else found["unused"] == {"decoder"}
    relative = {"backbone.blocks"} if levels == "pyramid" else set()
    assert found["missing"] == {"head", "head_norm"} | relative
    with torch.no_grad():
        images = torch.randn(2, 3, 64, 64)
        # Tables of relative positions start at zero: the features are those of pre-training.
        whole = model.backbone.outputs(images, (3,))[0].mean(1)
        torch.testing.assert_close(tuned.features(images).pooled, whole)


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_what_dense_tasks_take_of_pre_training(pretrained, task):
    levels, model, path = pretrained
    maps = build_dense(config(levels), task, image_size=64)
    found = _outcomes(transfer_weights(maps, path))
    assert found["unused"] == {"decoder"}
    if levels == "last":
        assert found["missing"] == {"rescale"}
    else:
        assert found.get("missing", set()) == ({"backbone.blocks"} if task == "segment" else set())
        assert torch.equal(maps.backbone.lift4[1].linear.weight, model.backbone.lift4[1].linear.weight)
        assert torch.equal(maps.pyramid.fuse4[1].mlp.fc1.weight, model.pyramid.fuse4[1].mlp.fc1.weight)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_pyramid_of_another_depth_takes_the_common_blocks(tmp_path, depth):
    save_weights(build_pretrainer(config()), tmp_path / "w.safetensors")
    other = config(pyramid={"width": 48, "depth": 2, "dense_depth": depth})
    found = _outcomes(
        transfer_weights(build_dense(other, "detect", image_size=64), tmp_path / "w.safetensors")
    )
    assert ("pyramid" in found["unused"]) == (depth == 1)
    assert found.get("missing", set()) == ({"pyramid"} if depth == 3 else set())


def test_a_damaged_pyramid_is_refused(pretrained, tmp_path):
    levels, _, path = pretrained
    state = load_state(path)
    name = "pyramid.lateral4.weight" if levels == "pyramid" else "backbone.blocks.1.norm1.weight"
    del state[name]
    save_weights(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=name):
        transfer_weights(build_dense(config(levels), "detect", image_size=64), tmp_path / "w.safetensors")


@pytest.mark.parametrize("levels", LEVELS)
def test_every_kind_is_recognised_and_loads_into_its_like(tmp_path, levels):
    model = config(levels)
    networks = {
        "encoder": lambda: build_encoder(model),
        "classifier": lambda: build_classifier(model, num_classes=7),
        "pyramid": lambda: build_dense(model, "detect", image_size=64),
    }
    for kind, build in networks.items():
        path = tmp_path / f"{kind}.safetensors"
        save_weights(build(), path)
        info = describe(load_state(path), path)
        assert (info.family, info.kind, info.model, info.image_size) == (
            "itpn_vit",
            kind,
            "itpn_vit_nano",
            64,
        )
        assert info.num_classes == (7 if kind == "classifier" else 0)
        for target in networks.values():
            report = transfer_weights(target(), path)
            assert all(row.why for row in report.rows if row.outcome != "matched")
    other = build_classifier(model, num_classes=4)
    fresh = [
        r.target
        for r in transfer_weights(other, tmp_path / "classifier.safetensors").rows
        if r.outcome == "fresh"
    ]
    assert sorted(fresh) == ["head.bias", "head.weight"]


def test_weights_of_the_family_vit_are_others(tmp_path):
    vit = model_config({"name": "vit_nano", "image_size": 64, "patch_size": 16, "pooling": "mean"})
    save_weights(build_encoder(vit), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="no itpn_vit network"):
        transfer_weights(build_encoder(config()), tmp_path / "w.safetensors")


def test_tables_are_resized_to_another_image_size(tmp_path):
    tuned = build_classifier(config(), num_classes=7)
    with torch.no_grad():
        for block in tuned.backbone.blocks:
            block.attn.relative_table.normal_()
    save_weights(tuned, tmp_path / "w.safetensors")
    larger = build_classifier(config(image_size=96), num_classes=7)
    report = transfer_weights(larger, tmp_path / "w.safetensors")
    resized = [row.target for row in report.rows if row.outcome == "resized"]
    assert len(resized) == 1 + len(larger.backbone.blocks)
    assert larger.backbone.blocks[0].attn.relative_table.std() > 0.3
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 7)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="decoder's width of 72"):
        build_pretrainer(config(decoder={"width": 72, "depth": 1, "heads": 4}))
    with pytest.raises(InputError, match="all or none of the 16 units"):
        build_pretrainer(config("last"), mask_ratio=0.99)
    with pytest.raises(InputError, match="built for 64 x 64"):
        build_pretrainer(config())(torch.zeros(1, 3, 96, 96), torch.rand(1, 36))
    with pytest.raises(ValueError, match="multiple of 16"):
        config(image_size=72)
