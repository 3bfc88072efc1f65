"""Images masked by clusters and classified again: recorded numbers, masks, groups."""

from __future__ import annotations

import pytest
import torch
from paca_golden import ENTRIES, TOLERANCE, error, fill, filled_shapes, loaded, shapes_of

from vitpipe.config.model import model_config
from vitpipe.contracts.channel_statistics import IMAGENET_MEAN, IMAGENET_STD
from vitpipe.contracts.errors import InputError
from vitpipe.evaluate.cluster_pictures import cluster_masks, explain_by_clusters
from vitpipe.models.build import build_classifier

NORMALISATION = tuple(torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))


def test_masks_probabilities_and_groups_are_the_recorded_ones():
    entry = ENTRIES["cluster_visualisation_tiny_64"]
    shapes = shapes_of("pacavit_tiny_p2cconv_100_0")
    for part in ("weight", "bias"):
        shapes[f"head.{part}"][0] = entry["num_classes"]
    model = build_classifier(model_config({"name": "paca_tiny"}), num_classes=entry["num_classes"])
    loaded(model, filled_shapes(shapes)).eval()
    image = torch.sigmoid(fill.probe(tuple(entry["input"]["shape"]), entry["input"]["seed"]))[0]
    records = entry["records"]
    found = explain_by_clusters(model, image, records["label"], entry["stage"], NORMALISATION)
    assert found.probability == pytest.approx(records["p_original"], rel=1e-4)
    assert (
        error(found.masks[:, None], records["masks"]) < TOLERANCE * 10
    )  # a stretched share magnifies rounding
    by_number = sorted(found.clusters, key=lambda cluster: cluster.number)
    assert error(torch.tensor([c.probability for c in by_number]), records["probabilities"]) < TOLERANCE
    assert abs(len(found.positive) - records["positive_count"]) <= 1
    assert [c.number for c in found.positive[:5]] == records["positive_first5"]
    assert [c.number for c in found.negative[:5]] == records["negative_first5"]


def test_a_cluster_that_takes_all_patches_alike_masks_nothing():
    shares = torch.full((2, 6), 1 / 6)
    shares[1] = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0])
    soft = cluster_masks(shares, (2, 3), (4, 6))
    assert torch.equal(soft[0], torch.ones(4, 6))
    assert soft[1].min() == 0.0
    assert 0.9 < soft[1].max() <= 1.0  # enlarged: the largest value lies between pixels
    binary = cluster_masks(shares, (2, 3), (4, 6), kind="binary", threshold=0.7)
    assert torch.equal(binary[1], (soft[1] >= 0.7).float())


@pytest.mark.parametrize("batch", [1, 7])
def test_groups_are_ordered_and_the_batch_changes_nothing(batch):
    torch.manual_seed(4)
    model = build_classifier(
        model_config({"name": "paca_nano", "image_size": 64, "head_init_std": 1.0}), num_classes=3
    ).eval()
    image = torch.rand(3, 64, 64)
    for label in range(3):
        found = explain_by_clusters(model, image, label, 3, NORMALISATION, batch=batch)
        assert sorted(c.number for c in found.clusters) == list(range(8))
        for group in (found.positive, found.negative):
            shares = [c.probability for c in group]
            assert shares == sorted(shares, reverse=True)
        assert all((c.top_class == label) == c.is_positive for c in found.clusters)
    with pytest.raises(InputError, match="no clusters"):
        explain_by_clusters(model, image, 0, 4, NORMALISATION)
