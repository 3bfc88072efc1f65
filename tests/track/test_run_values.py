"""Titles that tell runs apart, and the parameters that a run reads."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.track.run_values import compared_values, overridden, run_title, sections_in_use


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        ((), "itpn/pixel_base (demo, seed 0)"),
        (("seed=3",), "itpn/pixel_base (demo, seed 3)"),
        (("finetune.epochs=5", "data.workers=0"), "itpn/pixel_base (demo, seed 0, finetune.epochs=5)"),
        (("stages=[prepare, pretrain, report]", "pretrain.epochs=2"), "itpn/pixel_base (demo, seed 0, pretrain.epochs=2)"),
        (("finetune.epochs=16",), "itpn/pixel_base (demo, seed 0)"),  # the recipe's own value
        (("finetune.optim.layer_decay=0.5",), "itpn/pixel_base (demo, seed 0, finetune.optim.layer_decay=0.5)"),
        (("data.embedded.seed=1",), "itpn/pixel_base (demo, seed 0, data.embedded.seed=1)"),
    ],
)  # fmt: skip
def test_a_title_says_what_was_overridden(overrides, title):
    assert run_title(load_recipe("itpn/pixel_base", "demo", overrides)) == title


def test_a_title_stays_short():
    changes = [f"{stage}.log_every_steps=3" for stage in ("pretrain", "intermediate", "finetune", "detect")]
    assert run_title(load_recipe("itpn/pixel_base", "demo", changes)).endswith(", 1 more)")


def test_a_recipe_whose_file_is_not_here_has_no_overrides():
    recipe = load_recipe("itpn/pixel_base", "demo").model_copy(update={"name": "mine/elsewhere"})
    assert overridden(recipe) == {}


def test_parameters_that_the_run_does_not_read_are_left_out():
    few = sections_in_use(load_recipe("itpn/pixel_base", "demo", ("stages=[prepare, pretrain, report]",)))
    assert {"pretrain", "model", "data", "seed"} <= set(few)
    assert not {"finetune", "detect", "expect", "summary"} & set(few)
    assert "embedded" in few["data"]
    full = sections_in_use(load_recipe("itpn/pixel_base", "full", ("data.root=/data",)))
    assert "embedded" not in full["data"]
    assert full["data"]["root"] == "/data"


def test_runs_are_compared_by_what_decides_their_weights():
    values = compared_values(load_recipe("itpn/pixel_base", "demo", ("seed=3",)))
    assert [key for key in values if key.startswith("data.")] == ["data.source"]
    assert values["seed"] == "3"
    assert values["finetune.optim.base_lr"]
    assert values["name"] == "itpn/pixel_base"
    assert not [
        key for key in values if key.endswith(("checkpoint_minutes", "register_model", "validate_epochs"))
    ]
