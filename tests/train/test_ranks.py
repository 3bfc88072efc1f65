"""Two gloo processes against one: the same samples, the same draws, the same run up to rounding."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import (
    exact_points,
    free_port,
    rank_child,
    read_points,
    run_processes,
    shared_plan,
    train_digits,
)

from vitpipe.config.resolve import Accelerator
from vitpipe.train.ranks import Ranks, joined

pytestmark = pytest.mark.slow


def _run_ranks(folder, num_ranks=2, stop_rank=None):
    port = free_port()
    return run_processes(rank_child, *[(folder, r, num_ranks, port, stop_rank) for r in range(num_ranks)])


def test_two_ranks_train_as_one_does(tmp_path):
    """Drop path and mixup are on: their draws belong to the micro-batch, not to the rank."""
    (tmp_path / "two").mkdir()
    assert _run_ranks(tmp_path / "two") == [0, 0]
    alone = train_digits(tmp_path / "one", plan=shared_plan(1, 2)).method.state_dict()
    both = [torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in alone.items():
        assert torch.equal(both[0][name], both[1][name]), name
        torch.testing.assert_close(both[0][name], value, rtol=0, atol=1e-4)
    points = exact_points(tmp_path / "two" / "points0.jsonl")
    expected = exact_points(tmp_path / "one" / "points.jsonl")
    assert [point[:2] for point in points] == [point[:2] for point in expected]
    assert [p[2] for p in points] == pytest.approx([p[2] for p in expected], rel=1e-3)


@pytest.mark.parametrize("stop_rank", [0, 1])
def test_a_sigterm_to_one_rank_stops_all_at_one_step_and_the_run_resumes(tmp_path, stop_rank):
    (tmp_path / "stopped").mkdir()
    assert _run_ranks(tmp_path / "stopped", stop_rank=stop_rank) == [143, 143]
    assert [file.name for file in (tmp_path / "stopped" / "state").iterdir()] == [
        "state-0123456789ab-000000008.pt"
    ]
    assert _run_ranks(tmp_path / "stopped") == [0, 0]
    (tmp_path / "whole").mkdir()
    assert _run_ranks(tmp_path / "whole") == [0, 0]
    a, b = (torch.load(tmp_path / f / "weights1.pt", weights_only=True) for f in ("stopped", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    found, expected = (read_points(tmp_path / f / "points0.jsonl") for f in ("stopped", "whole"))
    assert [point[:2] for point in found] == [point[:2] for point in expected]


def test_alone_nothing_is_initialised():
    with joined(0, 1, "cpu") as ranks:
        assert not torch.distributed.is_initialized()
        module = torch.nn.Linear(1, 1)
        assert ranks.wrap(module) is module
        assert ranks.is_main
        assert ranks.sum_numbers([1.5, 2.0]) == [1.5, 2.0]
        assert ranks.from_main("text") == "text"
        assert ranks.accelerator == Accelerator()
    assert not Ranks(rank=1, num_ranks=2).is_main
