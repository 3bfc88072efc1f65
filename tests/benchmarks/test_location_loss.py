"""`vitpipe benchmark drloc`: the times are those of the loss alone and of a step that learns without it."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from vitpipe.benchmarks.location_loss import measure_location_loss
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.methods.classify.method import Classify
from vitpipe.methods.drloc.method import Drloc
from vitpipe.verbs.benchmark import register

RECIPE = "drloc/swin_tiny/cifar10/drloc/scratch/100"
CPU = torch.device("cpu")


@pytest.mark.parametrize(("changes", "num_grids"), [((), 1), (("finetune.method.loss=all",), 7)])
def test_what_is_timed(changes, num_grids, monkeypatch):
    located, stepped = [], []
    loss, losses = Drloc.location_loss, Classify.losses
    monkeypatch.setattr(
        Drloc,
        "location_loss",
        lambda self, features, *rest: located.append(features) or loss(self, features, *rest),
    )
    monkeypatch.setattr(
        Classify, "losses", lambda self, batch: stepped.append(type(self)) or losses(self, batch)
    )
    found = measure_location_loss(load_recipe(RECIPE, "demo", changes), batch=2, rounds=3, device=CPU)
    # Two for warming up; the step that is compared with has no such loss.
    assert len(located) == len(stepped) == 5
    assert set(stepped) == {Classify}
    assert len(found.grids) == num_grids
    # It ends in the grids: the network's own backward pass is not timed.
    for features in located:
        assert len(features.tokens) == num_grids
        assert all(tokens.is_leaf and bool(tokens.grad.any()) for tokens in features.tokens)
    assert found.loss_seconds > 0
    assert found.plain_seconds > 0
    assert found.ratio_low <= found.ratio <= found.ratio_high


def test_recipes_without_the_loss_are_refused():
    recipe = load_recipe("drloc/swin_tiny/cifar10/baseline/scratch/100", "demo")
    with pytest.raises(RecipeError, match="trains by method drloc"):
        measure_location_loss(recipe, batch=2, rounds=1, device=CPU)


def test_the_verb_prints_a_table_or_json():
    app = typer.Typer()
    register(app)
    call = ["benchmark", "drloc", RECIPE, "--profile", "demo", "--batch", "2", "--rounds", "1"]
    threads = torch.get_num_threads()
    try:
        shown = CliRunner().invoke(app, call)
        printed = CliRunner().invoke(app, [*call, "--json"])
    finally:
        torch.set_num_threads(threads)
    assert shown.exit_code == printed.exit_code == 0, shown.output
    assert "loss / step" in shown.output
    found = json.loads(printed.stdout)
    assert found["grids"] == [[2, 2]]
    assert found["ratio"] == pytest.approx(found["loss_seconds"] / found["plain_seconds"])
