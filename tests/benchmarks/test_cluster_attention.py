"""The plainly written form of PaCa is the same function as ours, and the measurement measures both."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from torch.nn import functional as F
from typer.testing import CliRunner

from vitpipe.benchmarks.cluster_attention import batch_of, measure_clusters, plain_logits
from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError
from vitpipe.models.paca.family import FAMILY
from vitpipe.verbs import benchmark

NANO = model_config({"name": "paca_nano", "image_size": 64})


def network():
    torch.manual_seed(3)
    return FAMILY.classifier(NANO, num_classes=5, drop_path=0.0).double()


@pytest.mark.parametrize("size", [(64, 64), (96, 40)])
def test_both_forms_are_one_function_with_the_same_gradients(size):
    model = network()
    images, labels = torch.randn(2, 3, *size, dtype=torch.float64), torch.tensor([0, 3])
    found = {}
    for name, logits in (("ours", model(images)), ("plain", plain_logits(model, images))):
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
        found[name] = [logits.detach(), *(p.grad.clone() for p in model.parameters())]
    for ours, plain in zip(found["ours"], found["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


def test_both_forms_are_measured_at_every_size():
    found = measure_clusters(
        NANO, {32: 2, 64: 1}, rounds=1, device=torch.device("cpu"), say=lambda text: None
    )
    assert [(cost.image_size, cost.form) for cost in found] == [
        (32, "vitpipe"), (32, "plain"), (64, "vitpipe"), (64, "plain"),
    ]  # fmt: skip
    assert [cost.patches for cost in found[::2]] == [128, 256]
    assert all(cost.seconds > 0 and cost.peak_bytes > 0 for cost in found)


def test_all_sizes_have_the_largest_one_s_patches():
    assert [batch_of(size, 896, 2) for size in (224, 448, 896)] == [32, 8, 2]


def call(*words):
    app = typer.Typer()
    benchmark.register(app)
    return CliRunner().invoke(app, ["benchmark", "clusters", *words], catch_exceptions=False)


def test_the_verb_says_ratios_and_refuses_other_networks():
    words = ("paca_nano", "--image-size", "32", "--image-size", "64", "--rounds", "1")
    text = call(*words).output
    assert "of the plain form's time" in text
    assert "memory per patch: the largest is" in text
    values = json.loads(call(*words, "--json").stdout)
    assert [step["batch"] for step in values["steps"]] == [4, 4, 1, 1]
    for other in ("hivit_nano", "paca_teacher_tiny"):
        with pytest.raises(InputError, match="no PaCa network without a teacher"):
            call(other)
