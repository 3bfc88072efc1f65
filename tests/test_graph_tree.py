"""The graph as text: every stage once, narrow, and with its feeders."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe, recipe_names
from vitpipe.contracts.graph import graph_of
from vitpipe.verbs.graph_tree import graph_tree


def test_the_tree_of_a_whole_chain():
    recipe = load_recipe("itpn/pixel_base", "demo")
    assert graph_tree(graph_of(recipe.stages, recipe.start_from)) == [
        "prepare",
        "└─ pretrain",
        "   ├─ intermediate",
        "   │  └─ finetune",
        "   │     └─ evaluate",
        "   ├─ probe",
        "   ├─ detect",
        "   └─ segment",
        "report (reads every stage)",
    ]


@pytest.mark.parametrize("name", recipe_names())
def test_every_stage_is_drawn_once_within_100_columns(name):
    recipe = load_recipe(name, "full")
    lines = graph_tree(graph_of(recipe.stages, recipe.start_from))
    assert sorted(line.strip(" │├└─").split(" ")[0] for line in lines) == sorted(recipe.stages)
    assert max(map(len, lines)) <= 100
