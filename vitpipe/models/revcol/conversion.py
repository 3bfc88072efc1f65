"""Convert official RevCol checkpoints to our classifier.

Knows the networks released with Reversible Column Networks (Yuxuan Cai et al., arXiv 2212.11696), every size
in `SHAPES`, with one classifier or with intermediate supervision. Parameter names are the same but for the
head: of several classifiers along the columns the last becomes that of our network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.official import Conversion, Renamed
from vitpipe.models.revcol.family import HEAD_BIAS, shape_of
from vitpipe.models.revcol.heads import NUM_PARTS
from vitpipe.models.revcol.revcol import SHAPES, RevCol
from vitpipe.models.weights import KeyRow

_LAST_HEAD = f"cls_blocks.{NUM_PARTS - 1}."


def rename_revcol(official: Mapping[str, Tensor], where: str | Path) -> Renamed | None:
    """The state under our names; `None` when it is not of these networks.

    Args:
        official: name -> tensor, as released.
        where: the file, for messages.

    Raises:
        CheckpointError: when it is of another size.
    """
    # These two names exist in every size and in none of iTPN's networks.
    if "stem.0.weight" not in official or "subnet0.alpha0" not in official:
        return None
    shape = shape_of(official)
    if shape is None:
        columns = len({name.split(".")[0] for name in official if name.startswith("subnet")})
        raise CheckpointError(
            f"The checkpoint has {columns} columns, with widths and blocks of no known size",
            where=where,
            fix=f"give a checkpoint of one of the known sizes: {', '.join(SHAPES)}",
        )
    rows: list[KeyRow] = []
    state: dict[str, Tensor] = {}
    for name, tensor in official.items():
        ours, size = name, tuple(tensor.shape)
        # With intermediate supervision the fourth head reads the last column: it is the network's classifier.
        # The released fine-tuning drops all heads; the last is kept here, so that released accuracies can be
        # measured.
        if name.startswith(_LAST_HEAD):
            ours = "cls." + name.removeprefix(_LAST_HEAD)
            rows.append(KeyRow(name, ours, size, "renamed", "the classifier after the last column"))
        elif name.startswith(("cls_blocks.", "decoder_blocks.")):
            rows.append(KeyRow(name, "", size, "dropped", "intermediate supervision, for its training only"))
            continue
        else:
            rows.append(KeyRow(name, name, size, "matched"))
        state[ours] = tensor
    # Without a head (a backbone alone) one class stands in, and the comparison then reports the head as
    # missing.
    head = state.get(HEAD_BIAS)
    with torch.device("meta"):
        network = RevCol(shape, 1 if head is None else head.numel())
    return Renamed("revcol_classifier", shape.name, state, network, tuple(rows))


CONVERSION = Conversion(("revcol_classifier",), rename_revcol)
