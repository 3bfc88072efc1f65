"""Weighted nearest neighbours: the votes of the paper, and figures that no chunk and no rank changes."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from tiny_runs import free_port, run_processes

from vitpipe.contracts.errors import InputError
from vitpipe.evaluate.knn import knn_accuracy, nearest, true_class_ranks, unit_vectors
from vitpipe.train.ranks import Ranks, joined


def _digits():
    scans = load_digits()
    features = torch.tensor(scans.data, dtype=torch.float32)
    labels = torch.tensor(scans.target)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def _plain_order(bank, queries):
    """All neighbours in order, by whole numbers: exact, and of equals the lower number first."""
    whole = [(unit_vectors(rows).double() * 2**24).long() for rows in (queries, bank)]
    similarity = whole[0] @ whole[1].T
    return similarity, np.argsort(-similarity.numpy(), axis=1, kind="stable")


@st.composite
def crowded(draw):
    """Few directions among many images, so that equal similarities are the rule and not the exception."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    num_images, num_queries = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    directions = torch.randn(draw(st.integers(1, 8)), draw(st.integers(1, 40)), generator=generator)
    if draw(st.booleans()):
        directions[0] = 0.0
    bank, queries = (
        directions[torch.randint(len(directions), (count,), generator=generator)]
        for count in (num_images, num_queries)
    )
    # The same direction at another length; a power of two leaves the bits of the direction.
    bank = bank * 2.0 ** torch.randint(-3, 4, (num_images, 1), generator=generator)
    labels, true = (torch.randint(5, (count,), generator=generator) for count in (num_images, num_queries))
    return bank, labels, queries, true


def test_neighbours_agree_with_scikit_learn():
    train, train_labels, val, _ = _digits()
    temperature = 0.07
    reference = KNeighborsClassifier(
        20,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((1 - distance.astype(np.float64)) / temperature),
    ).fit(train, train_labels)
    settings = {"num_classes": 10, "num_neighbours": 20, "temperature": temperature}
    shares = reference.predict_proba(val)
    predicted = torch.tensor(reference.predict(val))
    assert (true_class_ranks(train, train_labels, val, predicted, **settings) == 0).double().mean() > 0.998
    # The place of every class that has votes, not of the first one only.
    for place in range(1, 4):
        chosen = np.argsort(-shares, axis=1)[:, place]
        has_votes = np.take_along_axis(shares, chosen[:, None], axis=1)[:, 0] > 1e-6
        found = true_class_ranks(train, train_labels, val, torch.tensor(chosen), **settings).numpy()
        assert (found[has_votes] == place).mean() > 0.99
        assert (found[shares[np.arange(len(val)), chosen] == 0] == 10).all()


@settings(deadline=None)
@given(crowded(), st.integers(1, 70), st.integers(1, 70), st.integers(1, 25))
def test_neighbours_are_exact_and_of_equals_the_first_whatever_the_chunks(data, count, chunk, query_chunk):
    bank, labels, queries, true = data
    exact, order = _plain_order(bank, queries)
    count = min(count, len(bank))
    similarity, numbers = nearest(unit_vectors(bank), unit_vectors(queries), count, chunk)
    assert numbers.tolist() == order[:, :count].tolist()
    assert torch.equal((similarity * 2.0**48).long(), exact.gather(1, numbers))
    arguments = {"num_classes": 5, "num_neighbours": count, "temperature": 0.07}
    whole = true_class_ranks(bank, labels, queries, true, **arguments)
    cut = true_class_ranks(
        bank, labels, queries, true, **arguments, query_chunk=query_chunk, bank_chunk=chunk
    )
    assert torch.equal(whole, cut)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 600), st.integers(0, 1000))
def test_similarities_have_the_same_bits_for_any_chunk(chunk, width, seed):
    generator = torch.Generator().manual_seed(seed)
    bank, queries = (unit_vectors(torch.randn(n, width, generator=generator)) for n in (300, 7))
    whole, numbers = nearest(bank, queries, 20, 300)
    cut, again = nearest(bank, queries, 20, chunk)
    one, alone = nearest(bank, queries[3:4], 20, chunk)
    assert torch.equal(whole, cut)
    assert torch.equal(numbers, again)
    assert torch.equal(whole[3:4], one)
    assert torch.equal(numbers[3:4], alone)


def test_unit_vectors_have_length_one_and_the_direction():
    rows = (
        torch.randn(50, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    )
    unit = unit_vectors(torch.cat([rows, torch.zeros(1, 384)]))
    torch.testing.assert_close(unit[:50], torch.nn.functional.normalize(rows, dim=1), rtol=0, atol=1e-7)
    assert (unit[50] == 0).all()
    assert torch.equal((unit * 2.0**24).round(), unit * 2.0**24)


@given(st.integers(1, 12), st.integers(1, 30), st.floats(0.01, 10.0))
def test_a_query_that_is_in_the_bank_finds_itself_when_cold(num_images, num_neighbours, scale):
    generator = torch.Generator().manual_seed(num_images)
    bank = torch.randn(num_images, 8, generator=generator)
    labels = torch.arange(num_images)
    found = true_class_ranks(
        bank * scale,
        labels,
        bank,
        labels,
        num_classes=num_images,
        num_neighbours=num_neighbours,
        temperature=1e-3,
    )
    assert (found == 0).all()


def test_of_equal_votes_the_lower_class_is_the_answer_and_no_vote_is_no_answer():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([2, 1, 0, 0])
    queries = torch.tensor([[2.0, 0.0]]).repeat(4, 1)
    found = true_class_ranks(
        bank, labels, queries, torch.arange(4), num_classes=4, num_neighbours=2, temperature=0.07
    )
    assert found.tolist() == [4, 0, 1, 4]
    # However cold: all four vote, and class 0 comes last.
    found = true_class_ranks(
        bank, labels, queries, torch.arange(4), num_classes=4, num_neighbours=9, temperature=1e-4
    )
    assert found.tolist() == [2, 0, 1, 4]


def test_no_queries_give_no_places():
    nothing = true_class_ranks(
        torch.randn(3, 2),
        torch.zeros(3).long(),
        torch.empty(0, 2),
        torch.empty(0).long(),
        num_classes=2,
        num_neighbours=1,
        temperature=1.0,
    )
    assert len(nothing) == 0


@pytest.mark.parametrize(("num_images", "num_neighbours"), [(3, 0), (3, -1), (0, 5)])
def test_nobody_to_vote_is_refused(num_images, num_neighbours):
    bank, labels = torch.ones(num_images, 2), torch.zeros(num_images).long()
    with pytest.raises(InputError, match="cannot vote"):
        true_class_ranks(
            bank,
            labels,
            torch.ones(1, 2),
            torch.zeros(1).long(),
            num_classes=2,
            num_neighbours=num_neighbours,
            temperature=1.0,
        )


def _accuracy(ranks):
    found = knn_accuracy(*_digits(), num_classes=10, num_neighbours=20, temperature=0.07, ranks=ranks)
    return [found.top1, found.top5]


def test_accuracy_counts_the_places():
    places = true_class_ranks(*_digits(), num_classes=10, num_neighbours=20, temperature=0.07)
    expected = [(places < count).double().mean().item() for count in (1, 5)]
    assert _accuracy(Ranks()) == expected
    assert 0.9 < expected[0] < expected[1] <= 1.0


def rank_child(folder, rank, num_ranks, port):
    """One of several ranks, which writes the accuracy that it gets."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(num_ranks)
    )
    with joined(rank, num_ranks, "cpu") as ranks:
        (folder / f"{rank}.json").write_text(json.dumps(_accuracy(ranks)))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_the_queries_and_get_the_figures_of_one(tmp_path, num_ranks):
    port = free_port()
    codes = run_processes(rank_child, *[(tmp_path, rank, num_ranks, port) for rank in range(num_ranks)])
    assert codes == [0] * num_ranks
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    assert found == [_accuracy(Ranks())] * num_ranks
