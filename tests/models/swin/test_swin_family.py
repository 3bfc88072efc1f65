"""Swin from a recipe: settings, sizes, drop path, layer ids, transfer of weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitpipe.config.model import entries, model_config
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import CheckpointError, InputError, RecipeError
from vitpipe.models.blocks import BranchDrop
from vitpipe.models.build import (
    as_stored,
    build_classifier,
    build_encoder,
    build_pretrainer,
    create_backbone,
)
from vitpipe.models.draws import image_draws
from vitpipe.models.families import family
from vitpipe.models.swin.shapes import SHAPES, misfit_of_windows, windows_fit
from vitpipe.models.swin.swin import build_swin
from vitpipe.models.transfer import describe, load_same, transfer_weights
from vitpipe.models.weights import load_state, save_weights
from vitpipe.optim.groups import parameter_groups

NANO = model_config({"name": "swin_nano"})
TABLE = "attn.relative_position_bias_table"


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("finetune") / "weights.safetensors"
    model = build_classifier(NANO, num_classes=10).eval()
    save_weights(model, path)
    return model, path


@torch.no_grad()
def test_features_are_those_of_timms_network():
    torch.manual_seed(0)
    encoder = build_encoder(NANO).eval()
    images = torch.randn(2, 3, 64, 64)
    found = encoder.features(images, blocks=range(encoder.num_blocks))
    assert found.grids == ((16, 16),) * 2 + ((8, 8),) * 2 + ((4, 4),) * 2 + ((2, 2),)
    assert [tokens.shape[2] for tokens in found.tokens] == [16, 16, 32, 32, 64, 64, 128]
    # timm's own forward pass, to the end and stage by stage.
    torch.testing.assert_close(found.pooled, encoder.backbone(images))
    _, maps = encoder.backbone.forward_intermediates(images, intermediates_only=False)
    for ours, theirs in zip((1, 3, 5, 6), maps, strict=True):
        torch.testing.assert_close(found.maps()[ours], theirs)
    normed = encoder.final_norm(found.tokens[-1])
    torch.testing.assert_close(normed.mean(dim=1), found.pooled)
    # Earlier stages have other widths and no norm behind them.
    assert torch.equal(encoder.final_norm(found.tokens[0]), found.tokens[0])
    again = encoder.features(images, blocks=(-1, 0, -1))
    assert torch.equal(again.tokens[1], found.tokens[0])
    assert torch.equal(again.tokens[0], again.tokens[2])


def test_windows_shift_at_the_size_of_the_demo():
    blocks = [block for stage in create_backbone("swin_nano").layers for block in stage.blocks]
    assert [block.window_size[0] for block in blocks] == [4] * 6 + [2]
    assert [block.shift_size[0] for block in blocks] == [0, 2, 0, 2, 0, 0, 0]


def test_the_recipes_settings_are_used():
    config = NANO.model_copy(update={"window": 8, "head_init_std": 0.5})
    model = build_classifier(config, num_classes=30, drop_path=0.6)
    assert model.head.weight.std().item() == pytest.approx(0.5, rel=0.1)
    assert model.backbone.layers[0].blocks[1].window_size == (8, 8)
    # The rates of timm, linear from the first block to the last, for both branches.
    timms = [block for stage in model.backbone.layers for block in stage.blocks]
    assert isinstance(timms[0].drop_path1, torch.nn.Identity)
    for branch in ("drop_path1", "drop_path2"):
        ratios = [getattr(block, branch).drop_ratio for block in timms[1:]]
        assert ratios == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_drop_path_does_not_depend_on_the_micro_batch():
    torch.manual_seed(0)
    model = build_classifier(NANO, num_classes=3, drop_path=0.9).train()
    assert sum(isinstance(module, BranchDrop) for module in model.modules()) == 12
    images, indices = torch.randn(6, 3, 64, 64), torch.tensor([4, 9, 1, 7, 3, 30])
    state = torch.get_rng_state()

    def logits(*parts):
        rows = []
        for part in parts:
            with image_draws(11, indices[part]):
                rows.append(model(images[part]))
        return torch.cat(rows)

    whole = logits(slice(0, 6))
    torch.testing.assert_close(logits(slice(0, 2), slice(2, 6)), whole)
    assert torch.equal(torch.get_rng_state(), state)
    # Branches are dropped: without drop path, and with other draws, the logits are others.
    with image_draws(12, indices):
        assert not torch.allclose(model(images), whole)
    assert not torch.allclose(model.eval()(images), whole)


def _layer_of_simmim(name, depths):
    """The rule of SimMIM's released fine-tuning, on the released names."""
    parts = name.split(".")
    if parts[0] == "patch_embed":
        return 0
    if parts[0] != "layers":
        return sum(depths) + 1
    if parts[3] in ("reduction", "norm"):
        return sum(depths[: int(parts[1]) + 1])
    return sum(depths[: int(parts[1])]) + int(parts[3]) + 1


@pytest.mark.parametrize("name", SHAPES)
def test_layers_and_decay(name):
    config, depths = model_config({"name": name}), SHAPES[name].depths
    with torch.device("meta"):
        model = build_classifier(config, num_classes=3)
    for ours, _ in model.named_parameters():
        parts = ours.removeprefix("backbone.").split(".")
        if "downsample" in parts:  # the released code has it one stage earlier
            parts[1] = str(int(parts[1]) - 1)
            parts[2:] = ["downsample", *parts[3:]]
        assert model.layer_of(ours) == _layer_of_simmim(".".join(parts), depths), ours
    groups = parameter_groups(model.named_parameters(), weight_decay=0.05, no_decay=model.no_decay)
    kept = {n for group in groups if not group["decays"] for n in group["names"]}
    shapes = {n: parameter.ndim for n, parameter in model.named_parameters()}
    assert kept == {n for n, ndim in shapes.items() if ndim == 1 or n.endswith(TABLE)}


@pytest.mark.parametrize("window", [4, 7, 8, 12])
def test_sizes_fit_where_timm_would_not_pad(window):
    for image_size in range(32, 449, 32):
        with torch.device("meta"):
            from timm.models.swin_transformer import SwinTransformer

            padding = SwinTransformer(img_size=image_size, embed_dim=8, depths=(1, 1, 1, 1),
                                      num_heads=(1, 1, 1, 1), window_size=window)  # fmt: skip
        blocks = [block for stage in padding.layers for block in stage.blocks]
        whole = all(block.input_resolution[0] % block.window_size[0] == 0 for block in blocks)
        assert windows_fit(image_size, window) == whole, image_size
        assert (misfit_of_windows(image_size, window) is None) == whole
    assert not windows_fit(100, window)


def test_a_size_that_windows_do_not_divide_is_refused_with_those_that_they_do():
    swin = ["model.pyramid=null", "model.decoder=null", "model.relative_position=null"]
    swin = ["stages=[prepare, finetune]", "pretrain=null", "model.name=swin_tiny", *swin]
    with pytest.raises(RecipeError, match=r"64-32-16-8 tokens.*windows of 7") as caught:
        load_recipe("itpn/pixel_base", "full", [*swin, "model.image_size=256"])
    assert "use 224 or 448 pixels, or a window of 4 or 8 or 16" in str(caught.value)
    for wish in (["model.image_size=448"], ["model.image_size=256", "model.window=8"]):
        assert load_recipe("itpn/pixel_base", "full", [*swin, *wish]).model.name == "swin_tiny"
    with pytest.raises(RecipeError, match="multiple of 32 pixels"):
        load_recipe("itpn/pixel_base", "full", [*swin, "model.image_size=100"])
    # Past the section's check, as a user of the library.
    with pytest.raises(InputError, match=r"windows of 4 do not divide.*use 128 or 256 pixels"):
        create_backbone("swin_nano", image_size=224)
    with pytest.raises(InputError, match="cannot be merged down to stride 32"):
        build_swin(SHAPES["swin_tiny"], image_size=100)
    model = build_classifier(NANO, num_classes=2)
    assert not NANO.takes_any_size
    with pytest.raises(InputError, match=r"built for images of 64 x 64 pixels and got 64 x 96"):
        model(torch.zeros(1, 3, 64, 96))


def test_without_a_size_each_network_has_its_own():
    assert {name: model_config({"name": name}).image_size for name in SHAPES} == {
        name: entries()[name].image_size for name in SHAPES
    }
    assert model_config({"name": "swin_nano", "image_size": 128}).image_size == 128


def test_what_there_is_not_is_refused():
    with pytest.raises(RecipeError, match="swin_nano has no masked"):
        build_pretrainer(NANO)
    encoder = build_encoder(NANO)
    with pytest.raises(InputError, match="cannot give its attention"):
        encoder.features(torch.zeros(1, 3, 64, 64), attention=True)
    with pytest.raises(InputError, match="no block 7"):
        encoder.features(torch.zeros(1, 3, 64, 64), blocks=(7,))


@pytest.mark.parametrize("name", SHAPES)
def test_every_size_is_recognised(name):
    with torch.device("meta"):
        state = build_classifier(model_config({"name": name}), num_classes=5).state_dict()
    info = describe(state)
    assert (info.family, info.kind, info.model, info.num_classes) == ("swin", "classifier", name, 5)
    assert info.options == {"window": SHAPES[name].window}
    bare = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    assert str(describe(bare)) == f"an encoder network of {name}"
    shallow = {key: tensor for key, tensor in state.items() if ".layers.2.blocks.1." not in key}
    assert describe(shallow).model == ""


@pytest.mark.parametrize(("num_classes", "num_fresh"), [(10, 0), (7, 2)])
def test_classifier_to_classifier(classified, num_classes, num_fresh):
    source, path = classified
    model = build_classifier(NANO, num_classes=num_classes)
    before = model.head.weight.clone()
    report = transfer_weights(model, path)
    assert sorted(row.target for row in report.rows) == sorted(model.state_dict())
    assert report.count("fresh") == num_fresh
    assert report.count("matched") == len(report.rows) - num_fresh
    assert torch.equal(model.head.weight, before) == bool(num_fresh)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval().frozen_features(images), source.frozen_features(images))


def test_an_encoder_takes_weights_and_gives_them(classified, tmp_path):
    _, path = classified
    encoder = build_encoder(NANO)
    report = transfer_weights(encoder, path)
    assert {row.source for row in report.rows if row.outcome == "unused"} == {"head.weight", "head.bias"}
    save_weights(encoder, tmp_path / "encoder.safetensors")
    report = transfer_weights(build_classifier(NANO, num_classes=3), tmp_path / "encoder.safetensors")
    assert {row.target for row in report.rows if row.outcome == "missing"} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "changed_stages"), [({"image_size": 128}, {"3"}), ({"window": 8}, {"0", "1"})]
)
def test_tables_of_other_windows_are_resized_as_released(classified, change, changed_stages):
    """A larger image has a larger window where it was cut to the grid; a larger window where the grid allows."""
    source, path = classified
    model = build_encoder(NANO.model_copy(update=change))
    report = transfer_weights(model, path)
    resized = [row for row in report.rows if row.outcome == "resized"]
    assert {row.target.split(".")[2] for row in resized} == changed_stages
    assert all(row.target.endswith(TABLE) and "bicubic" in row.why for row in resized)
    given, ours = source.state_dict(), model.state_dict()
    for row in resized:
        old, new = given[row.target], ours[row.target]
        side, new_side = round(len(old) ** 0.5), round(len(new) ** 0.5)
        square = old.permute(1, 0).view(1, old.shape[1], side, side)
        expected = F.interpolate(square, size=(new_side, new_side), mode="bicubic").view(old.shape[1], -1).t()
        torch.testing.assert_close(new, expected)
    matched = [row for row in report.rows if row.outcome == "matched"]
    assert len(matched) + len(resized) == len(ours)


def test_a_stored_network_has_the_window_of_its_tables(tmp_path):
    wide = NANO.model_copy(update={"window": 8})
    save_weights(build_classifier(wide, num_classes=4), tmp_path / "w.safetensors")
    state = load_state(tmp_path / "w.safetensors")
    assert as_stored(NANO, describe(state)) == wide
    load_same(build_classifier(as_stored(NANO, describe(state)), num_classes=4), state)
    # A window beyond the first grid is that grid: the section stays as it is.
    beyond = NANO.model_copy(update={"window": 99})
    with torch.device("meta"):
        state = build_classifier(beyond, num_classes=4).state_dict()
    assert as_stored(beyond, describe(state)) is beyond
    assert describe(state).options == {"window": 16}


def test_weights_that_do_not_fit_are_refused(classified, tmp_path):
    source, path = classified
    other = build_classifier(model_config({"name": "revcol_micro", "image_size": 64}), num_classes=10)
    with pytest.raises(CheckpointError, match="a classifier network of swin_nano, which is no revcol"):
        transfer_weights(other, path)
    with torch.device("meta"):
        tiny = build_classifier(model_config({"name": "swin_tiny"}), num_classes=10)
    with pytest.raises(CheckpointError, match="the file holds a classifier network of swin_nano"):
        transfer_weights(tiny, path)
    headless = {key: tensor for key, tensor in source.state_dict().items() if key != "head.bias"}
    save_weights(headless, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias is not in the file"):
        transfer_weights(build_classifier(NANO, num_classes=10), tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(10, 128\)"):
        load_same(build_classifier(NANO, num_classes=7), source.state_dict())
    assert family("swin").describe({"head.weight": torch.zeros(3, 2)}) is None
