"""PaCa's segmentation head agrees with numbers of the released one; parameters, groups and learning rates."""

from __future__ import annotations

import pytest
import torch
from paca_golden import ENTRIES, TOLERANCE, error, filled_shapes, probe, shapes_of
from torch import nn

from vitpipe.config.read import load_recipe
from vitpipe.dense.backbone import NET_PREFIX
from vitpipe.dense.method import DenseMethod
from vitpipe.dense.mm_import import open_segmentation
from vitpipe.dense.segmentor import build_segmentor, segmentor_config
from vitpipe.models.convert import convert_state

pytestmark = pytest.mark.dense
OFFICIAL = "pacahead_pacavit_tiny_p2cconv_100_0"
# Ours inside the head -> theirs.
_NAMES = {
    "q.": "q.0.",
    "k.linear.": "k.0.",
    "k.norm.": "k.2.",
    "v.linear.": "v.0.",
    "v.norm.": "v.2.",
}


def recipe(*overrides, name="paca/ade20k/tiny/paca"):
    return load_recipe(name, "full", ("data.root=.", *overrides))


def segmentor(chosen):
    open_segmentation()
    config = segmentor_config(chosen.segment, chosen.model, num_classes=150, norm="BN")
    return build_segmentor(config, chosen.segment)


def in_head(name):
    inner = name.removeprefix("decode_head.")
    start = next((ours for ours in _NAMES if inner.startswith(ours)), None)
    return name if start is None else f"decode_head.{_NAMES[start]}{inner.removeprefix(start)}"


def filled_segmentor():
    """The network with the filled weights of the official one, and official name -> parameter."""
    network, state = segmentor(recipe("segment.drop_path=0.0")), filled_shapes(shapes_of(OFFICIAL))
    converted = convert_state(state)
    network.backbone.net.load_state_dict(converted.state)
    head = {
        n: state[in_head(f"decode_head.{n}")] for n in network.decode_head.state_dict() if "tracked" not in n
    }
    network.decode_head.load_state_dict(head, strict=False)
    ours = {row.source: f"{NET_PREFIX}{row.target}" for row in converted.report.rows if row.target}
    ours |= {in_head(f"decode_head.{n}"): f"decode_head.{n}" for n in head}
    # Every official tensor has a place.
    assert {name for name in state if "tracked" not in name} == set(ours)
    return network, ours


def test_logits_clusters_losses_and_gradients():
    entry = ENTRIES["paca_head_tiny_128x160"]
    network, ours = filled_segmentor()
    assert sum(p.numel() for p in network.parameters()) == entry["num_params"]
    network.eval()
    images, records = probe(entry), entry["records"]
    with torch.no_grad():
        logits, scores = network.decode_head.both(network.backbone(images))
        assert error(logits, records["head_logits"]) < TOLERANCE
        assert error(scores, records["cluster_logits"]) < TOLERANCE
        large = nn.functional.interpolate(logits, size=(128, 160), mode="bilinear", align_corners=False)
        assert error(large, records["logits_at_input_size"]) < TOLERANCE
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    training = entry["training"]
    b, y, x = torch.meshgrid(torch.arange(2), torch.arange(128), torch.arange(160), indexing="ij")
    labels = (7 * y + 3 * x + 11 * b) % 151
    labels[labels == 150] = 255
    samples = []
    for one in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=one[None])
        samples.append(sample)
    # In double precision: the gradient of the keys is what remains of terms that cancel, and in float32 the
    # fused kernel and the written-out formula differ by 2e-3 there.
    network.double().train()
    network.decode_head.dropout.p = 0.0
    losses = network.loss(images.double(), samples)
    recorded = training["losses"]
    assert losses["decode.loss_ce"].item() == pytest.approx(recorded["decode.loss_ce"], rel=1e-5)
    assert losses["decode.clusters_loss_ce"].item() == pytest.approx(recorded["paca.loss_ce"], rel=1e-5)
    assert losses["decode.acc_seg"].item() == pytest.approx(recorded["decode.acc_seg"], rel=1e-5)
    assert losses["decode.clusters_acc_seg"].item() == pytest.approx(recorded["paca.acc_seg"], rel=1e-5)
    total = sum(value for name, value in losses.items() if "loss" in name)
    assert total.item() == pytest.approx(training["total"], rel=1e-5)
    total.backward()
    parameters = dict(network.named_parameters())
    for name, norm in training["grad_norms"].items():
        assert parameters[ours[name]].grad.norm().item() == pytest.approx(norm, rel=1e-3), name


def test_groups_are_those_of_the_supplement():
    """Heads and the last maps of clusterings learn at ten times the rate; no norm decays."""
    chosen = recipe()
    groups = DenseMethod(segmentor(chosen)).groups(chosen.segment.optim)
    found = {(g["lr_scale"], g["weight_decay"]): len(g["params"]) for g in groups}
    assert found == {(1.0, 0.01): 162, (1.0, 0.0): 72, (10.0, 0.01): 18, (10.0, 0.0): 18}


@pytest.mark.parametrize(
    ("clusters", "restarted"),
    [
        (None, []),
        ("[100, 100, 100, 0]", []),
        ("[100, 200, 100, 0]", ["stages.1.0"]),
        ("[200, 200, 200, 0]", ["stages.0.0", "stages.1.0", "stages.2.0"]),
    ],
)
def test_only_maps_of_changed_stages_begin_anew(clusters, restarted):
    chosen = recipe("model.dense_clusters=" + (clusters or "null"))
    groups = DenseMethod(segmentor(chosen)).groups(chosen.segment.optim)
    fast = [n for g in groups if g["lr_scale"] == 10.0 for n in g["names"] if n.startswith(NET_PREFIX)]
    assert fast == [f"{NET_PREFIX}backbone.{stage}.attn.clustering.to_clusters.weight" for stage in restarted]
