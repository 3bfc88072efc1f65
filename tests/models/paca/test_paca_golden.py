"""PaCa networks agree with numbers of the released ones: activations, gradients, parameters, key lists."""

from __future__ import annotations

import pytest
import torch
from paca_golden import ENTRIES, GOLDEN, TOLERANCE, error, filled_shapes, loaded, official, probe, shapes_of
from torch.nn import functional as F

from vitpipe.benchmarks.model_cost import measure_cost
from vitpipe.config.model import model_config
from vitpipe.models.build import build_classifier, build_dense
from vitpipe.models.convert import convert_state
from vitpipe.models.paca.clustering import as_map
from vitpipe.models.paca.paca import PaCa
from vitpipe.models.paca.paca_shapes import SHAPES

# Official name -> our options.
CLASSIFIERS = {
    "pacavit_tiny_p2cconv_100_0": {"name": "paca_tiny"},
    "pacavit_small_p2cconv_100_0": {"name": "paca_small"},
    "pacavit_base_p2cconv_100_0": {"name": "paca_base"},
    "pacavit_small_p2cmlp_100_0": {"name": "paca_small", "clustering": "mlp"},
    "pacavit_small_p2cconv_2_0": {"name": "paca_small", "clusters": [2, 2, 2, 0]},
    "pacavit_small_p2cconv_49_0": {"name": "paca_small", "clusters": [49, 49, 49, 0]},
    "pacavit_small_p2cconv_49_100": {"name": "paca_small", "clusters": [49, 64, 81, 100]},
    "pacavit_small_p2cconv_100_49": {"name": "paca_small", "clusters": [100, 81, 64, 49]},
    "pacavit_small_p2cconv_100": {"name": "paca_small", "clusters": [100] * 4},
    "pacavit_small_p2cconv_100_blockwise": {
        "name": "paca_small",
        "clusters": [100] * 4,
        "assignment": "block",
    },
    "pacavit_convmixer_tiny_100": {"name": "paca_teacher_tiny"},
    "pacavit_convmixer_small_100": {"name": "paca_teacher_small"},
    "pacavit_convmixer_base_100": {"name": "paca_teacher_base"},
}
# Billions of multiply-adds by the operator counter, as measured of the released code.
GMACS = {
    "pacavit_tiny_p2cconv_100_0": 3.219,
    "pacavit_small_p2cconv_100_0": 5.501,
    "pacavit_base_p2cconv_100_0": 9.537,
    "pacavit_small_p2cmlp_100_0": 5.864,
    "pacavit_small_p2cconv_2_0": 4.640,
    "pacavit_small_p2cconv_49_0": 5.053,
    "pacavit_small_p2cconv_49_100": 5.273,
    "pacavit_small_p2cconv_100_49": 5.336,
    "pacavit_small_p2cconv_100": 5.568,
    "pacavit_small_p2cconv_100_blockwise": 6.103,
    "pacavit_convmixer_tiny_100": 3.424,
    "pacavit_convmixer_small_100": 5.482,
    "pacavit_convmixer_base_100": 9.771,
}


def classifier(name, num_classes=1000):
    return build_classifier(model_config(CLASSIFIERS[name]), num_classes=num_classes)


def check_stages(backbone, images, records):
    numbers, first = [], 0
    for depth in backbone.shape.depths:
        numbers += [first, first + depth - 1]
        first += depth
    found = backbone(images, numbers)
    stem, grid = backbone.stem(images)
    assert error(as_map(stem, grid), records["stem"]) < TOLERANCE
    for stage, output in enumerate(found.stages):
        key = f"stage{stage + 1}"
        for block, number in zip(("first", "last"), numbers[2 * stage : 2 * stage + 2], strict=True):
            assert error(found.tokens[number], records[f"{key}.{block}_block_tokens"]) < TOLERANCE
            if (assignment := records.get(f"{key}.{block}_block_assignment_times_N")) is not None:
                assert error(output.shares * output.shares.shape[-1], assignment) < TOLERANCE
        assert error(output.tokens, records[f"{key}.out_tokens"]) < TOLERANCE
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("tiny_p2cconv_100_0_224", "pacavit_tiny_p2cconv_100_0"),
        ("convmixer_small_100_224", "pacavit_convmixer_small_100"),
    ],
)
def test_classifiers(entry, name):
    recorded, network = ENTRIES[entry], loaded(classifier(name), official(name)).eval()
    images, records = probe(recorded), recorded["records"]
    check_stages(network.backbone, images, records)
    if network.backbone.teacher is not None:
        stem, grid = network.backbone.stem(images)
        taught = network.backbone.teacher(as_map(stem, grid))
        for i, (shares, side) in enumerate(zip(*taught, strict=True), start=1):
            assert error(shares * shares.shape[-1], records[f"teacher.assignment{i}_times_N"]) < TOLERANCE
            assert error(side, records[f"teacher.out{i}_tokens"]) < TOLERANCE
    logits = network(images)
    assert error(logits, records["logits"]) < TOLERANCE
    assert logits.argmax(1).tolist() == records["argmax"]
    assert sum(p.numel() for p in network.parameters()) == recorded["num_params"]
    assert measure_cost(lambda: classifier(name), 224).macs == recorded["macs_batch1"]


@torch.no_grad()
@pytest.mark.parametrize(
    "entry", ["tiny_p2cconv_100_0_backbone_192x256", "tiny_p2cconv_200_backbone_100x135"]
)
def test_dense_features_at_any_size(entry):
    recorded = ENTRIES[entry]
    clusters = recorded.get("downstream_cluster_num") or [100, 100, 100, 0]
    shapes = {n: s for n, s in shapes_of("pacavit_tiny_p2cconv_100_0").items() if not n.startswith("head.")}
    for stage, number in enumerate(clusters[:3], start=1):
        shapes[f"stage{stage}.0.attn.clustering.clustering.4.weight"][0] = number
    model = model_config({"name": "paca_tiny", "dense_clusters": clusters})
    network = loaded(build_dense(model, "segment", image_size=512), filled_shapes(shapes)).eval()
    images, records = probe(recorded), recorded["records"]
    check_stages(network.backbone, images, records)
    for i, found in enumerate(network(images), start=1):
        assert error(found, records[f"feature{i}"]) < TOLERANCE
    assert sum(p.numel() for p in network.parameters()) == recorded["num_params"]


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("tiny_p2cconv_100_0_train_64", "pacavit_tiny_p2cconv_100_0"),
        ("convmixer_small_100_train_64", "pacavit_convmixer_small_100"),
    ],
)
def test_a_training_step(entry, name):
    recorded = ENTRIES[entry]
    shapes = shapes_of(name)
    for part in ("weight", "bias"):
        shapes[f"head.{part}"][0] = recorded["num_classes"]
    state = filled_shapes(shapes)
    network = loaded(classifier(name, recorded["num_classes"]), state).train()
    ours = {row.source: row.target for row in convert_state(state).report.rows}
    loss = F.cross_entropy(network(probe(recorded)), torch.tensor(recorded["labels"]))
    loss.backward()
    records, parameters = recorded["records"], dict(network.named_parameters())
    assert loss.item() == pytest.approx(records["loss"], rel=1e-5)
    total = torch.stack([p.grad.norm() for p in parameters.values()]).norm()
    assert total.item() == pytest.approx(records["grad_norm_total"], rel=1e-3)
    for key, norm in records["grad_norms"].items():
        assert parameters[ours[key]].grad.norm().item() == pytest.approx(norm, rel=1e-3), key
    for key, digest in records["batchnorm_after"].items():
        assert error(network.state_dict()[ours[key]], digest) < TOLERANCE
    assert sum(p.numel() for p in parameters.values()) == recorded["num_params"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_released_classifier_converts_and_has_its_parameters(name):
    state = official(name)
    converted = convert_state(state)
    with torch.device("meta"):
        network = classifier(name)
    assert {row.outcome for row in converted.report.rows} == {"renamed"}
    assert converted.model == CLASSIFIERS[name]["name"]
    assert {n: t.shape for n, t in converted.state.items()} == {
        n: t.shape for n, t in network.state_dict().items()
    }
    recorded = shapes_of(name)
    assert len(recorded) == len(converted.report.rows)
    assert measure_cost(lambda: classifier(name), 224).gmacs == pytest.approx(GMACS[name], abs=6e-4)


DENSE = sorted(
    path.stem
    for kind in ("mask_rcnn", "pacahead", "upernet")
    for path in (GOLDEN / "keys").glob(f"{kind}_paca*.json")
)


@pytest.mark.parametrize("name", DENSE)
def test_networks_inside_detectors_and_segmentors_convert(name):
    converted = convert_state(official(name))
    dropped = [row for row in converted.report.rows if row.outcome == "dropped"]
    assert {row.why for row in dropped} == {"part of the detector or segmentor"}
    assert not any(row.source.startswith("backbone.") for row in dropped)
    clusters = (100, 100, 100, 0) if name.startswith("mask_rcnn") else (200, 200, 200, 0)
    with torch.device("meta"):
        expected = PaCa(SHAPES[converted.model], clusters=clusters).state_dict()
    assert {n.removeprefix("backbone."): t.shape for n, t in converted.state.items()} == {
        n: t.shape for n, t in expected.items()
    }
