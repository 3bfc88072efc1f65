"""Accuracy against its definition, whatever the batches, the ranks and the number of classes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.evaluate import accuracy
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.train.ranks import Ranks


class Lookup(nn.Module):
    """'Images' are row numbers into a table of logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, images):
        assert not self.training
        return self.logits[images[:, 0, 0, 0].long()]


def _batches(labels, sizes):
    first = 0
    for size in sizes:
        rows = torch.arange(first, min(first + size, len(labels)))
        first += size
        if len(rows):
            yield Batch((rows.view(-1, 1, 1, 1).float(),), labels[rows], rows, Moment(0, 0, 1, 1))


def _evaluate(logits, labels, size=4, ranks=None):
    sizes = [size] * (len(labels) // size + 1)
    return evaluate_classifier(
        Lookup(logits), _batches(labels, sizes), logits.shape[1], ranks=ranks or Ranks(), precision="off"
    )


@given(st.integers(1, 30), st.integers(2, 12), st.integers(1, 9))
def test_counts_every_image_once(num_images, num_classes, size):
    generator = torch.Generator().manual_seed(num_images * 1000 + num_classes * 10 + size)
    logits = torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    found = _evaluate(logits, labels, size)
    order = logits.argsort(dim=1, descending=True)
    assert found.num_images == num_images
    assert found.top1 == pytest.approx((order[:, 0] == labels).double().mean().item())
    assert found.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(1).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.metrics() == {"top1": found.top1, "top5": found.top5, "loss": found.loss}
    confusion = torch.zeros(num_classes, num_classes)
    for true, predicted in zip(labels.tolist(), order[:, 0].tolist(), strict=True):
        confusion[true, predicted] += 1
    assert torch.equal(found.confusion.float(), confusion)
    assert found.class_counts[:, 0].tolist() == confusion.sum(1).tolist()
    assert found.class_counts[:, 1].tolist() == confusion.diagonal().tolist()


LOGITS = torch.tensor([[9.0, 0, 1], [9.0, 0, 1], [0, 9.0, 1]])
LABELS = torch.tensor([0, 1, 1])


def test_tables():
    found = _evaluate(LOGITS, LABELS)
    assert found.class_rows(["cat", "dog", "cow"]) == [
        {"class": "cat", "images": 1, "top1": 1.0, "top5": 1.0},
        {"class": "dog", "images": 2, "top1": 0.5, "top5": 1.0},
        {"class": "cow", "images": 0, "top1": "", "top5": ""},
    ]
    assert found.confusion_rows(["cat", "dog", "cow"]) == [
        {"true": "cat", "predicted": "cat", "images": 1},
        {"true": "dog", "predicted": "cat", "images": 1},
        {"true": "dog", "predicted": "dog", "images": 1},
    ]


def test_shares_of_different_ranks_add_up(monkeypatch):
    """Rank 1's counts are what a real exchange would add; its share may be empty."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, 6, generator=generator)
    labels = torch.randint(6, (11,), generator=generator)
    whole = _evaluate(logits, labels)
    for cut in (4, 11):
        sent: list[torch.Tensor] = []
        monkeypatch.setattr(
            Ranks, "sum", lambda self, values, sent=sent: sent.append(values.clone()) or values
        )
        _evaluate(logits[cut:], labels[cut:])
        monkeypatch.setattr(Ranks, "sum", lambda self, values, sent=sent: values + sent.pop(0))
        found = _evaluate(logits[:cut], labels[:cut])
        assert found.metrics() == pytest.approx(whole.metrics())
        assert torch.equal(found.confusion, whole.confusion)


def test_no_matrix_for_very_many_classes(monkeypatch):
    monkeypatch.setattr(accuracy, "_MAX_CONFUSION_CLASSES", 2)
    found = _evaluate(LOGITS, LABELS)
    assert found.confusion is None
    assert found.confusion_rows(["a", "b", "c"]) == []
    assert found.top1 == pytest.approx(2 / 3)


def test_the_network_is_left_in_the_mode_it_was_in():
    for mode in (True, False):
        network = Lookup(LOGITS).train(mode)
        evaluate_classifier(network, _batches(LABELS, [3]), 3, ranks=Ranks(), precision="off")
        assert network.training is mode
