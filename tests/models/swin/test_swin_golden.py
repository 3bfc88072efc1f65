"""Swin-T compared with recorded outputs of released code, from checkpoints under its names."""

from __future__ import annotations

import json

import pytest
import torch

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.methods.drloc.localisation import LocationMLP, Pairs, location_loss, pair_embeddings
from vitpipe.models.build import build_classifier, build_encoder, create_backbone
from vitpipe.models.convert import convert_state
from vitpipe.models.weights import load_into

TINY = model_config({"name": "swin_tiny"})
ENDS = (1, 3, 9, 11)  # the last block of each stage
TOLERANCE = 1e-4


def _filled(golden, shapes):
    """Tensors that are functions of their names; the indices among them stay 0 and are not used."""
    indices = {key: torch.int64 for key in shapes if key.endswith("_index")}
    return golden.fill.fill({key: torch.zeros(shapes[key], dtype=indices.get(key)) for key in shapes})


@pytest.fixture(scope="module")
def of_moby(golden):
    numbers = json.loads((golden.folder / "selfpatch.json").read_text())
    return next(entry for entry in numbers["entries"] if entry["name"] == "moby_swin_tiny_224")


@pytest.fixture(scope="module")
def of_drloc(golden):
    numbers = json.loads((golden.folder / "drloc.json").read_text())
    return next(entry for entry in numbers["models"] if entry["model"] == "swin_tiny")


@torch.no_grad()
def test_mobys_encoder_as_recorded(golden, of_moby):
    shapes = json.loads((golden.folder / "keys" / "moby_swin_tiny.json").read_text())["keys"]
    # Filled by the names that the encoder has by itself, and then put into the checkpoint.
    own = {key.removeprefix("encoder."): shape for key, shape in shapes.items() if key.startswith("encoder.")}
    filled = _filled(golden, own)
    others = {key: torch.ones(shape) for key, shape in shapes.items() if not key.startswith("encoder.")}
    model = build_encoder(TINY).eval()
    load_into(model, convert_state({**others, **{f"encoder.{k}": filled[k] for k in filled}}).state)
    # These numbers were recorded with filled masks, too; below are others with the real ones.
    for key in [key for key in filled if key.endswith("attn_mask")]:
        block = model.backbone.get_submodule(key.removesuffix(".attn_mask"))
        assert block.attn_mask.shape == filled[key].shape
        block.attn_mask = filled[key]
    found = model.features(golden.fill.probe((1, 3, 224, 224)), blocks=ENDS)
    assert found.grids == ((56, 56), (28, 28), (14, 14), (7, 7))
    # timm merges at the beginning of the next stage, the released code at the end of this one.
    ours = {
        f"stage_{stage}_output_after_merging": model.backbone.layers[stage]
        .downsample(found.maps()[stage - 1].permute(0, 2, 3, 1))
        .flatten(1, 2)
        for stage in (1, 2, 3)
    }
    ours["stage_4_output_after_merging"] = found.tokens[-1]
    ours["last_stage_tokens_after_norm"] = model.final_norm(found.tokens[-1])
    ours["pooled"] = found.pooled
    assert set(ours) == set(of_moby["record"])
    errors = golden.errors(ours, of_moby["record"])
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors


@torch.no_grad()
def test_the_classifier_as_recorded(golden, of_drloc):
    shapes = json.loads((golden.folder / "keys" / "drloc_swin_tiny.json").read_text())["keys"]
    filled = _filled(golden, {key: shape for key, shape in shapes.items() if not key.endswith("attn_mask")})
    model = build_classifier(TINY, num_classes=1000).eval()
    load_into(model, convert_state(filled).state)
    images = golden.fill.probe((2, 3, 224, 224))
    found = model.features(images, blocks=ENDS)
    recorded = of_drloc["recorded"]
    ours = {f"stage{stage}_before_merging": map_BCHW for stage, map_BCHW in enumerate(found.maps())}
    ours["grid_7x7_before_norm"] = found.maps()[-1]
    normed_BNC = model.final_norm(found.tokens[-1])
    ours["grid_7x7_after_norm"] = normed_BNC.transpose(1, 2).unflatten(2, (7, 7))
    ours["logits"] = model.logits(found)
    assert set(ours) == {name for name in recorded if not name.startswith("drloc_on")}
    errors = golden.errors(ours, recorded)
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < TOLERANCE, errors
    assert torch.equal(model.location_grid(found), found.maps()[-1])
    mlp = LocationMLP(768, 512, trunc_normal=True)
    beginning = "drloc.0."
    mlp.load_state_dict({k.removeprefix(beginning): t for k, t in filled.items() if k.startswith(beginning)})
    torch.manual_seed(0)
    pairs = Pairs(torch.randint(7, (2, 64, 2)), torch.randint(7, (2, 64, 2)))
    for place in ("before", "after"):
        outputs = mlp(pair_embeddings(ours[f"grid_7x7_{place}_norm"], pairs))
        for kind, name in (("drloc", "drloc_mean"), ("signed", "drloc_star_mean")):
            loss = location_loss(kind, outputs, pairs.offsets_BM2, (7, 7)).item()
            assert loss == pytest.approx(recorded[f"drloc_on_grid_{place}_norm"][name], rel=1e-4)


def test_parameters_and_cost_as_recorded(of_moby, of_drloc):
    cost = measure_cost(lambda: create_backbone("swin_tiny"), 224)
    assert (cost.params, cost.macs) == (of_moby["params"], of_moby["flops"]["macs"])
    assert (cost.params, round(cost.gmacs, 3)) == (27_519_354, 4.490)
    cost = measure_cost(lambda: build_classifier(TINY, num_classes=1000), 224)
    counted = of_drloc["macs_batch1_without_drloc"]["torch_flop_counter_macs"]
    assert (cost.params, cost.macs) == (of_drloc["parameters"]["without_drloc"], counted)
