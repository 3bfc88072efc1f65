"""The comparison of two ways to propagate labels: both give the same labels. No times are tested."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from vitpipe.benchmarks.propagation_speed import measure_propagation, out_of_reach
from vitpipe.cli import app
from vitpipe.evaluate.propagate import PropagationSettings


def test_both_ways_give_the_same_labels():
    told: list[str] = []
    found = measure_propagation(
        (5, 7), 16, PropagationSettings(neighbourhood=2), 2, torch.device("cpu"), told.append
    )
    assert found.largest_difference < 1e-4
    assert min(found.strips_seconds, found.matrix_seconds) > 0
    assert told == ["9 frames, each in both ways"]


def test_reach_is_a_square_of_patches():
    far = out_of_reach((4, 5), 1)
    # From the corner: itself, right, below, and below to the right.
    assert torch.nonzero(~far[0]).flatten().tolist() == [0, 1, 5, 6]


def test_the_verb_prints_a_table_or_json():
    small = ["benchmark", "propagation", "--rows", "3", "--columns", "4", "--width", "8", "--rounds", "1"]
    done = CliRunner().invoke(app, [*small, "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "3 x 4 patches of 8 channels" in done.output
    assert "largest difference" in done.output
    found = json.loads(CliRunner().invoke(app, [*small, "--device", "cpu", "--json"]).stdout)
    assert found["times"]["largest_difference"] < 1e-4
