"""HiViT and iTPN compared with recorded outputs of the released code: the same weights and input."""

from __future__ import annotations

import pytest
import torch

from vitpipe.models.convert import convert_state
from vitpipe.models.hivit.hivit import SHAPES, HiViT
from vitpipe.models.hivit.hivit_classifier import HiViTClassifier
from vitpipe.models.hivit.itpn import MaskedPretrainer, PixelDecoder
from vitpipe.models.hivit.pyramid import Pyramid
from vitpipe.models.masking import choose_units, patchify
from vitpipe.models.positions import resample_positions, sincos_table
from vitpipe.models.weights import load_into

TOLERANCE = 1e-4
VARIANTS = pytest.mark.parametrize("variant", ["outputs", "outputs_post_fill"])


def _inputs(golden, entry):
    images = golden.fill.probe(tuple(entry["input"]["image"]["shape"]), entry["input"]["image"]["probe_seed"])
    noise = None
    if "noise" in entry["input"]:
        seed = entry["input"]["noise"]["uniform01_generator_seed"]
        noise = torch.rand(entry["input"]["noise"]["shape"], generator=torch.Generator().manual_seed(seed))
    return images, noise


def _loss(prediction, images):
    """Squared error to per-unit normalised pixels over the hidden units (iTPN's loss), spelt out."""
    target = patchify(images)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (prediction.pred_BND - target).square().mean(-1)
    return (error * prediction.mask_BN).sum() / prediction.mask_BN.sum()


@VARIANTS
@torch.no_grad()
def test_pretraining_gives_the_released_numbers(golden, variant):
    entry = golden.entry("pixel_base_pretrain")
    images, noise = _inputs(golden, entry)
    backbone = HiViT(SHAPES["hivit_base"], image_size=224)
    decoder = PixelDecoder(pyramid_width=256, width=512, depth=8, num_heads=16, grid_side=14)
    model = MaskedPretrainer(backbone, Pyramid(backbone.widths, 256, 2), decoder).eval()
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    converted = convert_state(golden.state("pixel_base_pretrain", variant == "outputs_post_fill"))
    load_into(model, converted.state)

    seen = {"stem": backbone.stem(images)}
    backbone.stage16[0].register_forward_hook(lambda m, i, out: seen.update(stage3_first_block=out))
    choice = choose_units(noise, 0.75)
    stages = backbone.forward_stages(images, choice.kept_BK)
    seen |= {"stage1": stages.level4_BNhhC, "stage2": stages.level8_BNhhC, "stage3": stages.level16_BNC}
    levels = model.pyramid(stages)
    seen |= {"pyramid_4": levels.o4, "pyramid_8": levels.o8, "pyramid_16": levels.o16}
    seen["decoder_input"] = decoder.join(levels, choice.restore_BN)
    prediction = model(images, noise)
    seen["pred"] = prediction.pred_BND

    recorded = entry[variant]
    assert prediction.kept_BK.tolist() == recorded["ids_keep"]
    assert prediction.mask_BN.sum(1).tolist() == recorded["masked_per_image"]
    assert _loss(prediction, images).item() == pytest.approx(recorded["loss"], rel=1e-5)
    compared = {name for name, value in recorded.items() if isinstance(value, dict)}
    assert set(seen) == compared
    errors = golden.errors(seen, recorded)
    print(variant, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@VARIANTS
@torch.no_grad()
def test_the_classifier_gives_the_released_numbers(golden, variant):
    entry = golden.entry("pixel_base_classifier")
    images, _ = _inputs(golden, entry)
    backbone = HiViT(SHAPES["hivit_base"], image_size=224, relative_position=True)
    model = HiViTClassifier(backbone, 1000).eval()
    assert sum(p.numel() for p in model.parameters()) == entry["params"]
    converted = convert_state(golden.state("pixel_base_classifier", variant == "outputs_post_fill"))
    load_into(model, converted.state)

    seen = {}
    backbone.stem.register_forward_hook(lambda m, i, out: seen.update(stem=out))
    backbone.stage16[0].register_forward_hook(lambda m, i, out: seen.update(stage3_first_block=out))
    backbone.merge4to8.register_forward_hook(lambda m, i, out: seen.update(stage1=i[0]))
    backbone.merge8to16.register_forward_hook(lambda m, i, out: seen.update(stage2=i[0]))
    backbone.stage16[-1].register_forward_hook(lambda m, i, out: seen.update(stage3=out))
    seen["logits"] = model(images)

    recorded = entry[variant]
    assert set(seen) == {name for name, value in recorded.items() if isinstance(value, dict)}
    errors = golden.errors(seen, recorded)
    print(variant, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("width", [512, 768])
def test_sine_cosine_tables(golden, width):
    recorded = golden.numbers["sincos_tables"][f"14x14x{width}"]
    table = sincos_table(14, width)[0]
    assert golden.errors({"digest": table}, recorded)["digest"] < 1e-6
    assert table[1, :4].tolist() == pytest.approx(recorded["row_1_first_4"], abs=1e-6)
    assert table[14, :4].tolist() == pytest.approx(recorded["row_14_first_4"], abs=1e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_position_interpolation(golden, case):
    recorded = golden.numbers["position_interpolation"][case]
    table = golden.fill.probe(tuple(recorded["table"]["shape"]), recorded["table"]["probe_seed"])
    ours = resample_positions(table, tuple(recorded["grid"]))
    assert golden.errors({"result": ours}, recorded)["result"] < 1e-5


def test_patchify(golden):
    recorded = golden.numbers["pixel_target"]
    target = patchify(golden.fill.probe((2, 3, 224, 224), recorded["image_probe_seed"]))
    assert golden.errors({"patchified": target}, recorded)["patchified"] < 1e-6
    normalised = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert golden.errors({"normalised": normalised}, recorded)["normalised"] < 1e-5
