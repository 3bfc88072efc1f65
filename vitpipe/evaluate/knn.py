"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978,
section 3.4: each of the k nearest neighbours votes for its class with exp(s / temperature), s its cosine
similarity.

The figures do not depend on how the search is cut into chunks, on the number of ranks or on the library of
matrix products: vectors of length 1 are rounded to multiples of 2^-24, so that products are multiples of
2^-48, sums of them stay below 2^5, and float64 holds every partial sum exactly, in any order. Of equally near
images those that come first in the training set are the neighbours.

Memory for ImageNet, 1.28 million features of 384 channels: 2.0 GB as float32 as they come in, the same again
for the vectors of length 1, and 0.3 GB for one chunk, whatever the number of queries. Half precision would
save 1 GB of the 2 and cost the exactness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vitpipe.contracts.errors import InputError
from vitpipe.train.ranks import Ranks

_STEPS = 2.0**24  # float32 holds all multiples of 2^-24 up to 1
_ROWS = 8192  # at a time in float64, fixed: where rows are cut could change the last bit of a length
_QUERY_CHUNK, _BANK_CHUNK = 1024, 16384  # 134 MB of similarities, 50 MB of features of 384 channels
_TOP = 5


@dataclass(frozen=True)
class KnnAccuracy:
    """Shares of the queries in [0, 1] whose class has the most votes, or is one of the five with the most."""

    top1: float
    top5: float


def knn_accuracy(
    train_MC: Tensor,
    labels_M: Tensor,
    queries_NC: Tensor,
    true_N: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    ranks: Ranks,
) -> KnnAccuracy:
    """Accuracy of `true_class_ranks`; every rank of the run searches for its part of the queries.

    Args:
        train_MC: all features, on every rank, as the other tensors; see `true_class_ranks`.

    Raises:
        InputError: as `true_class_ranks`.
    """
    first, end = (len(queries_NC) * rank // ranks.num_ranks for rank in (ranks.rank, ranks.rank + 1))
    found = true_class_ranks(
        train_MC,
        labels_M,
        queries_NC[first:end],
        true_N[first:end],
        num_classes=num_classes,
        num_neighbours=num_neighbours,
        temperature=temperature,
    )
    # Counts: they add up exactly.
    hits1, hits5 = ranks.sum_numbers([int((found < places).sum()) for places in (1, _TOP)])
    num_queries = max(1, len(queries_NC))
    return KnnAccuracy(hits1 / num_queries, hits5 / num_queries)


def true_class_ranks(
    train_MC: Tensor,
    labels_M: Tensor,
    queries_NC: Tensor,
    true_N: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    query_chunk: int = _QUERY_CHUNK,
    bank_chunk: int = _BANK_CHUNK,
) -> Tensor:
    """Place of every query's own class in the order of votes, (N,) int64; 0 is the predicted class.

    Of classes with equal votes the lower number comes first. A class for which no neighbour votes is no
    answer: its place is `num_classes`. Runs on the device of the features.

    Args:
        train_MC: features of the M labelled images; need not be normalised.
        labels_M: their class numbers.
        queries_NC: features of the images to classify; need not be normalised.
        true_N: their class numbers.
        num_neighbours: k; all labelled images vote if there are fewer.
        temperature: of the votes; 0.07 in the paper and in DINO.
        query_chunk: queries at a time. With `bank_chunk` it bounds memory and changes no number.
        bank_chunk: labelled images at a time.

    Raises:
        InputError: when there are no neighbours to vote.
    """
    if num_neighbours < 1 or not len(train_MC):
        raise InputError(
            f"{num_neighbours} of {len(train_MC)} labelled images cannot vote",
            where="neighbours",
            fix="give at least one neighbour, and a training set with images",
        )
    bank_MC, unit_NC = unit_vectors(train_MC), unit_vectors(queries_NC)
    places = [torch.empty(0, dtype=torch.int64, device=queries_NC.device)]
    for queries_QC, true_Q in zip(unit_NC.split(query_chunk), true_N.split(query_chunk), strict=True):
        similarity_Qk, nearest_Qk = nearest(bank_MC, queries_QC, num_neighbours, bank_chunk)
        scores_QK = _votes(similarity_Qk, labels_M[nearest_Qk], num_classes, temperature)
        places.append(_places(scores_QK, true_Q))
    return torch.cat(places)


def unit_vectors(features_NC: Tensor) -> Tensor:
    """Rows (N, C) scaled to length 1 and rounded to multiples of 2^-24, float32; rows of zeros stay zeros."""
    unit_NC = torch.empty_like(features_NC, dtype=torch.float32)
    for rows, out in zip(features_NC.split(_ROWS), unit_NC.split(_ROWS), strict=True):
        wide = rows.double()
        length = wide.norm(dim=1, keepdim=True).clamp(min=1e-12)
        out.copy_((wide / length * _STEPS).round() / _STEPS)
    return unit_NC


def nearest(bank_MC: Tensor, queries_QC: Tensor, num_neighbours: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The nearest rows of a bank: their similarities (Q, k) float64, falling, and their numbers (Q, k).

    Args:
        bank_MC: as `unit_vectors` gives them.
        queries_QC: the same.
        chunk: rows of the bank at a time.
    """
    wide_QC = queries_QC.double()
    best = wide_QC.new_empty(len(wide_QC), 0)
    numbers = torch.empty(len(wide_QC), 0, dtype=torch.int64, device=best.device)
    for first in range(0, len(bank_MC), chunk):
        values, columns = _largest(wide_QC @ bank_MC[first : first + chunk].double().t(), num_neighbours)
        # Numbers rise from chunk to chunk, so a stable sort leaves the lower one of two equals in front.
        best, order = torch.cat([best, values], dim=1).sort(dim=1, descending=True, stable=True)
        numbers = torch.cat([numbers, columns + first], dim=1).gather(1, order)
        best, numbers = best[:, :num_neighbours], numbers[:, :num_neighbours]
    return best, numbers


def _largest(values_QM: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of every row, falling, and their columns; of equals the lower column first."""
    if count >= values_QM.shape[1]:
        values, columns = values_QM.sort(dim=1, descending=True, stable=True)
        return values, columns
    # One more than asked for: where it equals the last one, `topk` may have chosen any of the equals.
    values, columns = values_QM.topk(count + 1, dim=1)
    is_open = values[:, -2] == values[:, -1]
    columns, order = columns[:, :count].sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    if is_open.any():
        again, places = values_QM[is_open].sort(dim=1, descending=True, stable=True)
        values[is_open], columns[is_open] = again[:, :count], places[:, :count]
    return values, columns


def _votes(similarity_Qk: Tensor, classes_Qk: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Summed votes for each class, (Q, K) float64."""
    # Relative to the nearest neighbour's: the same order, and no overflow at low temperatures.
    votes_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp()
    # In float32's steps: an exponential may differ in its last bit by its place in the tensor, and equal
    # similarities have to be equal votes. None becomes 0, as it is a vote.
    votes_Qk = votes_Qk.float().clamp(min=torch.finfo(torch.float32).tiny).double()
    scores_QK = votes_Qk.new_zeros(len(votes_Qk), num_classes)
    # One neighbour after the other: all at once, a GPU adds them in any order.
    for votes_Q, classes_Q in zip(votes_Qk.unbind(dim=1), classes_Qk.unbind(dim=1), strict=True):
        scores_QK.scatter_add_(1, classes_Q[:, None], votes_Q[:, None])
    return scores_QK


def _places(scores_QK: Tensor, true_Q: Tensor) -> Tensor:
    own_Q1 = scores_QK.gather(1, true_Q[:, None])
    is_lower_QK = torch.arange(scores_QK.shape[1], device=true_Q.device) < true_Q[:, None]
    before_QK = (scores_QK > own_Q1) | ((scores_QK == own_Q1) & is_lower_QK)
    return torch.where(own_Q1[:, 0] > 0, before_QK.sum(dim=1), scores_QK.shape[1])
