"""The parameters that a run reads, and those that runs are compared by."""

from __future__ import annotations

from vitpipe.config.read import load_recipe
from vitpipe.config.run_name import sections_in_use
from vitpipe.track.run_values import compared_values


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
