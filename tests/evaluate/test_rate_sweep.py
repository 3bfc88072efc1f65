"""The learning rate is chosen by held-out training images; the classifier of it has seen all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.errors import InputError
from vitpipe.evaluate.linear import LinearSettings, train_linear
from vitpipe.evaluate.rate_sweep import held_out, linear_accuracy

SETTINGS = LinearSettings(num_classes=4, epochs=6, batch=32, seed=2)
RATES = (1e-6, 0.3, 0.05, 30.0)


def _blobs(num_images, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images,), generator=generator)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(7))
    return centres[labels] + spread * torch.randn(num_images, 12, generator=generator), labels


TRAIN, VAL = _blobs(400, 0), _blobs(150, 1)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 5))
def test_a_tenth_of_every_class_is_held_out(labels, seed):
    labels = torch.tensor(labels)
    counts = labels.bincount().tolist()
    if max(counts) < 2:
        with pytest.raises(InputError, match="give one learning rate, or more training images"):
            held_out(labels, seed)
        return
    chosen = held_out(labels, seed)
    for number, count in enumerate(counts):
        expected = max(1, round(count / 10)) if count > 1 else 0
        assert int(chosen[labels == number].sum()) == expected
    assert torch.equal(chosen, held_out(labels, seed))


def test_another_seed_holds_out_others():
    assert not torch.equal(held_out(TRAIN[1], 0), held_out(TRAIN[1], 1))


def test_the_chosen_rate_is_the_best_on_the_held_out_images_and_is_trained_on_all():
    found = linear_accuracy(TRAIN, VAL, RATES, SETTINGS)
    chosen = held_out(TRAIN[1], SETTINGS.seed)
    rows = (~chosen).nonzero()[:, 0]
    for rate, result in zip(RATES, found.sweep, strict=True):
        alone = train_linear(*TRAIN, [rate], SETTINGS, rows=rows)
        assert result.base_lr == rate
        assert [result.held_out_top1] == alone.top1(TRAIN[0][chosen], TRAIN[1][chosen])
        assert [result.val_top1] == alone.top1(*VAL)
    shares = [result.held_out_top1 for result in found.sweep]
    best = max(shares)
    assert shares[RATES.index(1e-6)] < best
    assert found.base_lr == min(rate for rate, share in zip(RATES, shares, strict=True) if share == best)
    alone = linear_accuracy(TRAIN, VAL, [found.base_lr], SETTINGS)
    assert alone.sweep == ()
    assert (alone.top1, alone.base_lr) == (found.top1, found.base_lr)


def test_a_rate_that_diverges_is_not_chosen_and_alone_is_refused():
    found = linear_accuracy(TRAIN, VAL, (8e38, 0.05), SETTINGS)
    assert found.base_lr == 0.05
    assert found.sweep[0].held_out_top1 == 0.0
    for rates in ([8e38], [8e38, 9e38]):
        with pytest.raises(InputError, match="has diverged at a learning rate of 8e\\+38"):
            linear_accuracy(TRAIN, VAL, rates, SETTINGS)


def test_validation_labels_do_not_choose():
    wrong = (VAL[0], (VAL[1] + 1) % 4)
    honest, misled = (linear_accuracy(TRAIN, val, RATES, SETTINGS) for val in (VAL, wrong))
    assert honest.base_lr == misled.base_lr
    assert [r.held_out_top1 for r in honest.sweep] == [r.held_out_top1 for r in misled.sweep]


@pytest.mark.parametrize("rates", [(0.5,), RATES])
def test_best_and_last_epoch_are_told_apart(rates):
    found = linear_accuracy(TRAIN, VAL, rates, SETTINGS, measure_epochs=True)
    by_epoch = []
    train_linear(
        *TRAIN, [found.base_lr], SETTINGS, after_epoch=lambda probes: by_epoch.extend(probes.top1(*VAL))
    )
    assert found.top1 == by_epoch[-1]
    assert found.best_epoch_top1 == max(by_epoch)
    assert found.best_epoch == by_epoch.index(max(by_epoch)) + 1
    without = linear_accuracy(TRAIN, VAL, rates, SETTINGS)
    assert (without.top1, without.best_epoch_top1, without.best_epoch) == (found.top1, None, None)


def test_the_table_has_every_rate_and_the_whole_sets_figures_at_the_chosen_one():
    found = linear_accuracy(TRAIN, VAL, RATES, SETTINGS, measure_epochs=True)
    rows = found.rows(weights="trained")
    assert [row["base_lr"] for row in rows] == list(RATES)
    assert {row["weights"] for row in rows} == {"trained"}
    chosen = [row for row in rows if row["chosen"]]
    assert [row["base_lr"] for row in chosen] == [found.base_lr]
    assert chosen[0]["val_top1_all_images"] == found.top1
    assert chosen[0]["best_epoch_val_top1_all_images"] == found.best_epoch_top1
    assert all(row["val_top1_all_images"] == "" for row in rows if not row["chosen"])
    assert len({tuple(row) for row in rows}) == 1, "all rows have the same columns"
    assert "best_epoch" not in linear_accuracy(TRAIN, VAL, RATES, SETTINGS).rows()[0]


def test_no_rate_is_refused():
    with pytest.raises(InputError, match="at least one learning rate"):
        linear_accuracy(TRAIN, VAL, [], SETTINGS)
