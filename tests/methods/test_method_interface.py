"""What every method inherits: parameter groups with heads, saved states without frozen parts, results."""

from __future__ import annotations

import pytest
import torch
from short_runs import HIVIT
from torch import nn

from vitpipe.config.train_sections import OptimConfig
from vitpipe.methods.method import Judgement, Method
from vitpipe.models.build import build_classifier


class WithHead(Method):
    """A network, a head that learns, and a part that never changes."""

    frozen = ("fixed",)

    def __init__(self):
        super().__init__()
        self.model = build_classifier(HIVIT, num_classes=4)
        self.head = nn.Linear(4, 4)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    @classmethod
    def build(cls, config, family, model, *, section, classes):
        return cls()

    def losses(self, batch):
        return {"loss": self.head(self.model(batch.images)).square().mean()}

    def judge(self, batches, ranks, precision):
        return Judgement({})


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_heads_learn_at_the_full_rate(layer_decay):
    method = WithHead()
    groups = method.groups(OptimConfig(base_lr=1.0, layer_decay=layer_decay, weight_decay=0.1))
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert set(scales) == {name for name, p in method.named_parameters() if p.requires_grad}
    assert scales["head.weight"] == scales["head.bias"] == scales["model.head.weight"] == 1.0
    first = scales["model.backbone.absolute_position"]
    assert first < 0.5 if layer_decay else first == 1.0
    decays = {name: group["decays"] for group in groups for name in group["names"]}
    assert decays["head.weight"]
    assert not decays["head.bias"]
    assert {group["weight_decay"] for group in groups if group["decays"]} == {0.1}


def test_a_state_without_the_frozen_part_fits_and_another_does_not():
    first, second = WithHead(), WithHead()
    saved = first.resume_state()
    assert not any(name.startswith("fixed") for name in saved)
    kept = second.fixed.weight.clone()
    second.load_resume_state(saved)
    assert torch.equal(second.head.weight, first.head.weight)
    assert torch.equal(second.fixed.weight, kept)
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_resume_state({name: t for name, t in saved.items() if name != "head.weight"})


def test_the_network_is_the_result_unless_a_method_says_otherwise():
    method = WithHead()
    assert method.results() == {"weights": method.model}
