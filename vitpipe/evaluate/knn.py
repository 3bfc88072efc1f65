"""Weighted k-nearest-neighbour classification on frozen features.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, arXiv 1805.01978,
section 3.4: each of the k nearest neighbours votes for its class with exp(s / temperature), s its cosine
similarity.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_predict(
    train_MC: Tensor,
    labels_M: Tensor,
    queries_NC: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
    chunk: int = 256,
) -> Tensor:
    """Predicted class of every query, (N,) int64. Runs on the device of the features.

    Args:
        train_MC: features of the M labelled images; need not be normalised.
        labels_M: their class numbers.
        queries_NC: features of the images to classify; need not be normalised.
        num_neighbours: k; all labelled images vote if there are fewer.
        temperature: of the votes; 0.07 in the paper and in DINO.
        chunk: queries at a time, which bounds memory at chunk * M similarities.
    """
    k = min(num_neighbours, len(train_MC))
    bank_CM = F.normalize(train_MC, dim=1).t()
    predicted = []
    for queries in F.normalize(queries_NC, dim=1).split(chunk):
        similarity, nearest = (queries @ bank_CM).topk(k, dim=1)
        # Votes relative to the nearest neighbour's: the same maximum, and no overflow at low temperatures
        # (exp(1 / 0.01) exceeds float32).
        votes = ((similarity - similarity[:, :1]) / temperature).exp()
        scores = votes.new_zeros(len(queries), num_classes).scatter_add_(1, labels_M[nearest], votes)
        predicted.append(scores.argmax(dim=1))
    return torch.cat(predicted) if predicted else torch.empty(0, dtype=torch.int64)
