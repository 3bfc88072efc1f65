"""Networks are timed in turn, and a ratio is of passes of the same round. No times are tested."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from vitpipe.benchmarks import network_speed
from vitpipe.benchmarks.network_speed import measure_networks
from vitpipe.cli import app
from vitpipe.contracts.errors import InputError, RecipeError

CPU = torch.device("cpu")


def test_ratios_are_of_pairs_of_one_round(monkeypatch):
    """Seconds are given: the first network takes 2, 4, 6 s where the second takes 1, 8, 3 s."""
    order, given = (
        [],
        {"vit_nano": [9.0, 9.0, 9.0, 2.0, 4.0, 6.0], "hivit_nano": [9.0, 9.0, 9.0, 1.0, 8.0, 3.0]},
    )

    def timed(network, images, precision):
        name = "vit_nano" if type(network).__name__ == "ViTClassifier" else "hivit_nano"
        assert not network.training
        assert images.shape == (4, 3, 64, 64)
        order.append(name)
        return given[name].pop(0)

    monkeypatch.setattr(network_speed, "_pass_seconds", timed)
    first, second = measure_networks(
        ["vit_nano", "hivit_nano"], image_size=64, batch=4, rounds=3, device=CPU
    )  # fmt: skip
    assert (first.ratio, first.ratio_low, first.ratio_high) == (1, 1, 1)
    assert first.images_per_second == 1.0
    # 2 / 1, 4 / 8, 6 / 3.
    assert (second.ratio, second.ratio_low, second.ratio_high) == (2.0, 1.25, 2.0)
    assert second.images_per_second == 4 / 3
    assert order[:4] == ["vit_nano", "hivit_nano", "hivit_nano", "vit_nano"]
    assert len(order) == 2 * 6


def test_a_pass_runs_the_network():
    speeds = measure_networks(["vit_nano", "hivit_nano"], image_size=64, batch=1, rounds=1, device=CPU)
    assert [speed.model for speed in speeds] == ["vit_nano", "hivit_nano"]
    assert all(speed.images_per_second > 0 for speed in speeds)


@pytest.mark.parametrize("names", [["vit_nano"], ["vit_nano", "vit_nano"]])
def test_one_network_alone_is_refused(names):
    with pytest.raises(InputError, match="two or more different"):
        measure_networks(names, image_size=64, batch=1, rounds=1, device=CPU)


def test_the_verb_prints_a_table_or_json():
    small = ["benchmark", "throughput", "vit_nano", "hivit_nano", "--image-size", "64", "--batch", "1"]
    done = CliRunner().invoke(app, [*small, "--rounds", "2", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "to vit_nano" in done.output
    found = json.loads(CliRunner().invoke(app, [*small, "--rounds", "2", "--device", "cpu", "--json"]).stdout)
    assert [row["model"] for row in found["networks"]] == ["vit_nano", "hivit_nano"]


@pytest.mark.parametrize(
    ("more", "error", "part"),
    [
        (["--precision", "int8"], InputError, "off, bf16, fp16"),
        (["vit_nono"], RecipeError, "vit_nano"),
        (["--image-size", "50"], InputError, "50 is no multiple"),
    ],
)  # fmt: skip
def test_a_mistake_is_refused(more, error, part):
    done = CliRunner().invoke(app, ["benchmark", "throughput", "vit_nano", "hivit_nano", *more])
    assert isinstance(done.exception, error)
    assert part in str(done.exception)
