"""Load the weights of one stage's network into another's, or into the same network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.families import WeightsInfo, families, family
from vitpipe.models.network import Network
from vitpipe.models.weights import LoadReport, load_into, load_state


def describe(state: Mapping[str, Tensor], where: str | Path = "") -> WeightsInfo:
    """What these weights are, from names and shapes.

    Args:
        state: name -> tensor.
        where: the file, for messages.

    Raises:
        CheckpointError: when they are of none of our networks.
    """
    # From the keys and not from the file's metadata: files saved by others have none, and metadata can be
    # wrong.
    for known in families():
        info = known.describe(state)
        if info is not None:
            return info
    raise CheckpointError(
        f"The weights are of no vitpipe network (first keys: {', '.join(sorted(state)[:3])})",
        where=where,
        fix="give a stage's weights.safetensors, or an official checkpoint after `vitpipe convert`",
    )


def transfer_weights(network: Network, path: Path) -> LoadReport:
    """Load another stage's `weights.safetensors` into a network, by the rules of its family.

    Position tables are resized where the grid differs (never into pre-training).

    Raises:
        CheckpointError: when the file cannot be read, is another family's or does not fit; names the keys.
    """
    # `Family.transfer_rules` decides what may differ; every other difference is an error.
    state = load_state(path)
    info = describe(state, path)
    own = family(network.family)
    if info.family != network.family:
        raise CheckpointError(
            f"The file holds {info}, which is no {network.family} network",
            where=path,
            fix="give weights of the recipe's model, or change model.name",
        )
    rules = own.transfer_rules(network, info)
    resized = partial(own.resized, network)
    return load_into(network, state, rules=rules, resized=resized, where=path, about=str(info))


def load_same(network: Network, state: Mapping[str, Tensor], where: str | Path = "") -> LoadReport:
    """Copy weights into the same network; every name and shape must agree.

    Args:
        network: changed in place.
        state: name -> tensor.
        where: the file, for messages.

    Raises:
        CheckpointError: when one does not; says what the file holds.
    """
    return load_into(network, state, where=where, about=str(describe(state, where)))
