"""The graph: how the stages of a recipe are connected."""

from __future__ import annotations

import pytest

from vitpipe.contracts.graph import graph_of


@pytest.mark.parametrize(
    ("start_from", "expected"), [({}, "pretrain"), ({"segment": "finetune"}, "finetune")]
)
def test_a_recipe_may_choose_whose_weights_a_stage_takes(start_from: dict[str, str], expected: str) -> None:
    nodes = {node.name: node for node in graph_of(("prepare", "pretrain", "finetune", "segment"), start_from)}
    assert nodes["segment"].inputs == {"data": "prepare", "weights": expected}
    assert nodes["finetune"].inputs["weights"] == "pretrain"
