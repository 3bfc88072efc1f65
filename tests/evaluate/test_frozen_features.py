"""Cached features and the linear classifiers on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.contracts.seeds import seed_of
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.evaluate.features import extract_features
from vitpipe.evaluate.linear import LinearSettings, train_linear
from vitpipe.optim.schedules import cosine
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


def test_the_probe_learns_digits_and_does_not_care_for_scale(digits):
    train, train_labels, val, val_labels = digits
    settings = LinearSettings(num_classes=10, epochs=30, batch=256, seed=0)
    accuracy = []
    # Some pixels are never inked: channels without spread must not become infinite.
    assert (train.std(dim=0) == 0).any()
    for scale, shift in ((1.0, 0.0), (100.0, -7.0)):
        probe = train_linear(train * scale + shift, train_labels, [0.1], settings)
        assert probe.logits(val * scale + shift).isfinite().all()
        accuracy += probe.top1(val * scale + shift, val_labels)
    assert accuracy[0] > 0.88
    assert accuracy[1] == pytest.approx(accuracy[0], abs=0.02)


def test_the_probe_is_a_function_of_its_seed(digits):
    train, labels = digits[0][:100], digits[1][:100]
    settings = LinearSettings(num_classes=10, epochs=2, batch=32, seed=1)
    first = train_linear(train, labels, [0.1], settings)
    torch.rand(3)
    again = train_linear(train, labels, [0.1], settings)
    other = train_linear(train, labels, [0.1], replace(settings, seed=2))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)


def test_a_batch_larger_than_the_set_is_the_set(digits):
    train, labels = digits[0][:50], digits[1][:50]
    probe = train_linear(train, labels, [1.0], LinearSettings(num_classes=10, epochs=50, batch=4096, seed=0))
    assert probe.top1(train, labels)[0] > 0.9


def _textbook(features, labels, base_lr, settings):
    """The same classifier by torch's layer, loss and optimiser, one at a time."""
    generator = torch.Generator().manual_seed(seed_of("linear probe", settings.seed))
    if settings.standardise:
        std, mean = torch.std_mean(features, dim=0, correction=0)
        features = (features - mean) / (std.square() + 1e-6).sqrt()
    layer = nn.Linear(features.shape[1], settings.num_classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * 0.01)
        layer.bias.zero_()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    steps = len(features) // settings.batch
    for epoch in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator)
        for step in range(steps):
            rows = order[step * settings.batch : (step + 1) * settings.batch]
            done = epoch * steps + (step if settings.schedule_unit == "step" else 0)
            lr = cosine(done / (settings.epochs * steps), base_lr * settings.batch / 256, 0.0)
            optimiser.param_groups[0]["lr"] = lr
            optimiser.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimiser.step()
    return layer


@pytest.mark.parametrize("unit", ["step", "epoch"])
@pytest.mark.parametrize("standardise", [True, False])
def test_one_rate_gives_the_bits_of_the_textbook_and_several_give_the_same_classifiers(
    digits, unit, standardise
):
    features, labels = digits[0][:700] / 16, digits[1][:700]
    settings = LinearSettings(10, epochs=4, batch=64, seed=5, standardise=standardise, schedule_unit=unit)
    expected = {rate: _textbook(features, labels, rate, settings) for rate in (0.02, 0.3, 2.0)}
    for rate, layer in expected.items():
        alone = train_linear(features, labels, [rate], settings)
        assert torch.equal(alone.weight[0], layer.weight)
        assert torch.equal(alone.bias[0], layer.bias)
    together = train_linear(features, labels, list(expected), settings)
    for place, layer in enumerate(expected.values()):
        torch.testing.assert_close(together.weight[place], layer.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.bias[place], layer.bias.detach(), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_rows_is_trained_on_as_if_it_were_the_set(digits):
    features, labels = digits[:2]
    rows = torch.arange(0, len(features), 3)
    settings = LinearSettings(num_classes=10, epochs=3, batch=50, seed=0)
    part = train_linear(features, labels, [0.1, 0.4], settings, rows=rows)
    whole = train_linear(features[rows], labels[rows], [0.1, 0.4], settings)
    assert torch.equal(part.weight, whole.weight)
    assert torch.equal(part.mean, whole.mean)


def test_accuracy_does_not_depend_on_how_the_images_are_cut(digits, monkeypatch):
    train, labels = digits[:2]
    probes = train_linear(train, labels, [0.01, 0.1], LinearSettings(10, epochs=2, batch=256, seed=0))
    predicted = probes.logits(train).argmax(dim=2)
    expected = [(predicted[:, place] == labels).double().mean().item() for place in range(2)]
    monkeypatch.setattr("vitpipe.evaluate.linear._ROWS", 77)
    assert probes.top1(train, labels) == expected


def test_epochs_are_shown_one_by_one_and_change_nothing(digits):
    features, labels = digits[:2]
    settings = LinearSettings(num_classes=10, epochs=3, batch=500, seed=0)
    seen = []
    shown = train_linear(
        features, labels, [0.1], settings, after_epoch=lambda probes: seen.append(probes.weight.clone())
    )
    assert len(seen) == 3
    assert torch.equal(seen[-1], shown.weight)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(shown.weight, train_linear(features, labels, [0.1], settings).weight)


@pytest.mark.parametrize(("rates", "images"), [([], 50), ([0.1], 0)])
def test_nothing_to_train_is_refused(digits, rates, images):
    with pytest.raises(InputError, match="at least one learning rate and one image"):
        train_linear(digits[0][:images], digits[1][:images], rates, LinearSettings(10, 1, 8, 0))
