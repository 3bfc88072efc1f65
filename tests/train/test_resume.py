"""Killed and stopped runs, and runs with a damaged state, end with the same weights and points, bit for bit."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from tiny_runs import (
    PLAN,
    SECTION,
    JournalLogger,
    child,
    exact_points,
    read_points,
    run_processes,
    train_digits,
)

from vitpipe.contracts.logger import MemoryLogger
from vitpipe.train.checkpoint import StateFolder

pytestmark = pytest.mark.slow

PLACES = ("progress", "batch", "saving")
_DRAWN = random.Random(20).sample(range(1, PLAN.num_steps), 7)
# Kills while a state is being saved, which `EveryFewSteps` does after every fourth step, besides random ones.
KILLS = [(step, PLACES[i % 2]) for i, step in enumerate(_DRAWN)] + [
    (8, "saving"),
    (16, "saving"),
    (4, "saving"),
]


def _weights(folder, step=PLAN.num_steps):
    saved = StateFolder(folder / "state", "0123456789abcdef", print).read(step)
    return {**saved["method"], **{f"ema.{k}": v for k, v in saved["average"].items()}}, saved["optimiser"]


def _assert_same_end(folder, reference):
    (weights, optimiser), (expected, expected_optimiser) = _weights(folder), _weights(reference)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for index, moments in expected_optimiser["state"].items():
        assert all(torch.equal(optimiser["state"][index][k], v) for k, v in moments.items())
    points = exact_points(folder / "points.jsonl")
    assert points == exact_points(reference / "points.jsonl")
    assert len(points) == len({(step, name) for step, name, _ in points})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of an uninterrupted run, in a process of its own."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_processes(child, (folder, None, signal.SIGKILL)) == [0]
    return folder


@pytest.mark.parametrize(("step", "place"), KILLS)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, uninterrupted, step, place):
    assert run_processes(child, (tmp_path, step, signal.SIGKILL, place)) == [-signal.SIGKILL]
    assert run_processes(child, (tmp_path, None, signal.SIGKILL)) == [0]
    _assert_same_end(tmp_path, uninterrupted)


def test_several_kills_in_one_run(tmp_path, uninterrupted):
    for step in (5, 6, 11, 12, 19):
        assert run_processes(child, (tmp_path, step, signal.SIGKILL)) == [-signal.SIGKILL]
    assert run_processes(child, (tmp_path, None, signal.SIGKILL)) == [0]
    _assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_its_state(tmp_path, uninterrupted, number):
    assert run_processes(child, (tmp_path, 7, number)) == [128 + number]
    assert StateFolder(tmp_path / "state", "0123456789abcdef", print).steps()[-1] == 8
    message = (tmp_path / "error.txt").read_text()
    assert f"{number.name} after step 8 of 20" in message
    assert "same command" in message
    assert run_processes(child, (tmp_path, None, signal.SIGKILL)) == [0]
    _assert_same_end(tmp_path, uninterrupted)


def test_a_truncated_state_is_skipped(tmp_path, uninterrupted):
    assert run_processes(child, (tmp_path, 14, signal.SIGKILL)) == [-signal.SIGKILL]
    states = StateFolder(tmp_path / "state", "0123456789abcdef", print)
    assert states.steps() == [8, 12]
    newest = states.path_of(12)
    newest.write_bytes(newest.read_bytes()[:-1000])
    logger = JournalLogger(tmp_path / "points.jsonl")
    train_digits(tmp_path, logger=logger)
    assert any("cannot be read" in line and newest.name in line for line in logger.lines)
    assert "Resuming after step 8" in logger.lines
    _assert_same_end(tmp_path, uninterrupted)


def test_a_finished_run_is_not_run_again(tmp_path):
    train_digits(tmp_path)
    points = read_points(tmp_path / "points.jsonl")
    state = train_digits(tmp_path)
    assert state.step == PLAN.num_steps
    assert read_points(tmp_path / "points.jsonl") == points


def test_a_state_of_other_work_is_reported_and_left_alone(tmp_path):
    train_digits(tmp_path)
    logger = MemoryLogger()
    train_digits(tmp_path, logger=logger, identity="fedcba9876543210")
    assert any("are not resumed" in line and "state-0123456789ab" in line for line in logger.lines)
    assert not any("Resuming" in line for line in logger.lines)
    assert StateFolder(tmp_path / "state", "0123456789abcdef", print).steps() == [PLAN.num_steps]


def test_logging_less_often_changes_no_weight(tmp_path):
    first = train_digits(tmp_path / "a", section=SECTION, logger=MemoryLogger())
    rare = SECTION.model_copy(update={"log_every_steps": 7})
    second = train_digits(tmp_path / "b", section=rare, logger=MemoryLogger())
    for a, b in zip(first.method.parameters(), second.method.parameters(), strict=True):
        assert torch.equal(a, b)
