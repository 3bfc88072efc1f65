"""A RevCol classifier and its heads as one state under the released names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from vitpipe.models.revcol.heads import NUM_PARTS, RevColHeads
from vitpipe.models.revcol.revcol import RevCol

_OURS, _RELEASED = "cls.", f"cls_blocks.{NUM_PARTS - 1}."


def official_state(model: RevCol, heads: RevColHeads) -> dict[str, Tensor]:
    """The state of the released network with intermediate supervision: its last classifier is ours."""
    state = {_released(name): tensor for name, tensor in model.state_dict().items()}
    return state | heads.state_dict()


def load_official(model: RevCol, heads: RevColHeads, state: Mapping[str, Tensor]) -> None:
    """Load a state with the released names into both."""
    model.load_state_dict({name: state[_released(name)] for name in model.state_dict()})
    heads.load_state_dict({name: state[name] for name in heads.state_dict()})


def _released(name: str) -> str:
    return _RELEASED + name.removeprefix(_OURS) if name.startswith(_OURS) else name
