"""Features, neighbours and the linear probe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.knn import knn_predict
from vitpipe.evaluate.linear import train_linear
from vitpipe.train.ranks import Ranks


@pytest.fixture(scope="module")
def digits():
    scans = load_digits()
    features = torch.tensor(scans.data, dtype=torch.float32)
    labels = torch.tensor(scans.target)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def test_features_are_in_the_order_of_the_set_whatever_the_batches():
    images = torch.arange(7.0).view(7, 1, 1, 1)
    labels = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    chosen = [torch.tensor([5, 1]), torch.tensor([0, 6, 3]), torch.tensor([2, 4])]
    batches = (Batch((images[rows],), labels[rows], rows, Moment(0, 0, 1, 1)) for rows in chosen)
    features, found = extract_features(
        lambda x: torch.cat([x, x * 10], dim=1).flatten(1), batches, num_images=7, width=2, ranks=Ranks()
    )
    assert features.tolist() == [[i, 10 * i] for i in range(7)]
    assert torch.equal(found, labels)


def test_neighbours_agree_with_scikit_learn(digits):
    train, train_labels, val, _ = digits
    temperature = 0.07
    reference = KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance.astype(np.float64)) / temperature),
    ).fit(train, train_labels)
    found = knn_predict(
        train, train_labels, val, num_classes=10, num_neighbours=20, temperature=temperature, chunk=100
    )
    assert (found.numpy() == reference.predict(val)).mean() > 0.998


@given(st.integers(1, 12), st.integers(1, 30), st.floats(0.01, 10.0))
def test_a_query_that_is_in_the_bank_finds_itself_when_cold(num_images, num_neighbours, scale):
    generator = torch.Generator().manual_seed(num_images)
    bank = torch.randn(num_images, 8, generator=generator)
    labels = torch.arange(num_images)
    found = knn_predict(
        bank * scale, labels, bank, num_classes=num_images, num_neighbours=num_neighbours, temperature=1e-3
    )
    assert torch.equal(found, labels)


def test_no_queries_give_no_predictions():
    nothing = knn_predict(
        torch.randn(3, 2),
        torch.zeros(3).long(),
        torch.empty(0, 2),
        num_classes=2,
        num_neighbours=1,
        temperature=1.0,
    )
    assert len(nothing) == 0


def test_the_probe_learns_digits_and_does_not_care_for_scale(digits):
    train, train_labels, val, val_labels = digits
    settings = {"num_classes": 10, "epochs": 30, "batch": 256, "base_lr": 0.1, "seed": 0}
    accuracy = []
    # Some pixels are never inked: channels without spread must not become infinite.
    assert (train.std(dim=0) == 0).any()
    for scale, shift in ((1.0, 0.0), (100.0, -7.0)):
        probe = train_linear(train * scale + shift, train_labels, **settings)
        logits = probe.logits(val * scale + shift)
        assert logits.isfinite().all()
        accuracy.append((logits.argmax(1) == val_labels).float().mean().item())
    assert accuracy[0] > 0.88
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.02)


def test_the_probe_is_a_function_of_its_seed(digits):
    train, labels = digits[0][:100], digits[1][:100]
    settings = {"num_classes": 10, "epochs": 2, "batch": 32, "base_lr": 0.1}
    first = train_linear(train, labels, seed=1, **settings)
    torch.rand(3)
    again = train_linear(train, labels, seed=1, **settings)
    other = train_linear(train, labels, seed=2, **settings)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_batch_larger_than_the_set_is_the_set(digits):
    train, labels = digits[0][:50], digits[1][:50]
    probe = train_linear(train, labels, num_classes=10, epochs=50, batch=4096, base_lr=1.0, seed=0)
    assert (probe.logits(train).argmax(1) == labels).float().mean() > 0.9
