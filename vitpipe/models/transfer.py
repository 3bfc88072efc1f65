"""Weights from one stage's network into another's, and into the very same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.families import WeightsInfo, families, family
from vitpipe.models.network import Network
from vitpipe.models.weights import LoadReport, load_into, load_state


def describe(state: Mapping[str, Tensor], where: str | Path = "") -> WeightsInfo:
    """Say what these weights are.

    Raises:
        CheckpointError: when they are not from one of our networks.
    """
    for known in families():
        info = known.describe(state)
        if info is not None:
            return info
    raise CheckpointError(
        f"The weights are not from a vitpipe network (first keys: {', '.join(sorted(state)[:3])})",
        where=where,
        fix="give a stage's weights.safetensors, or an official checkpoint after `vitpipe convert`",
    )


def transfer_weights(network: Network, path: Path) -> LoadReport:
    """Start a network from another stage's `weights.safetensors`, by the rules of its family.

    Position tables are resized where the grid differs (never into pre-training).

    Raises:
        CheckpointError: when the file cannot be read, is another family's or does not fit; names the keys.
    """
    state = load_state(path)
    info = describe(state, path)
    own = family(network.family)
    if info.family != network.family:
        raise CheckpointError(
            f"The file holds {info}, which is no {network.family} network",
            where=path,
            fix="give weights of the recipe's own model, or change model.name",
        )
    rules = own.transfer_rules(network, info)
    return load_into(network, state, rules=rules, resized=own.resized, where=path, about=str(info))


def load_same(network: Network, state: Mapping[str, Tensor], where: str | Path = "") -> LoadReport:
    """Copy weights into the very same network; every name and shape must agree.

    Raises:
        CheckpointError: when one does not; says what the file holds.
    """
    return load_into(network, state, where=where, about=str(describe(state, where)))
