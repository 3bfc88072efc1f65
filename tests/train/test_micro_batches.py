"""A step is the same, to rounding, however its images are divided into micro-batches and ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from short_runs import HIVIT, REVCOL, REVCOLV2, STEPS, packed_digits, rank_child, run, section_of, weights_of
from tiny_runs import free_port, run_processes

CURVES = json.loads((Path(__file__).parent.parent / "golden" / "curves.json").read_text())

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the packed digits."""
    place = tmp_path_factory.mktemp("digits")
    packed_digits(place)
    return place


@pytest.fixture(scope="module")
def shards(folder):
    from short_runs import opened

    return opened(folder)


def _trained(shards, kind, states, micro_batch, model, **changes):
    torch.set_num_threads(1)
    section = section_of(kind, STEPS, micro_batch=micro_batch, **changes)
    state, losses, _ = run(shards, section, states, model=model)
    return losses, weights_of(state)


@pytest.mark.parametrize(
    ("model", "kind", "changes"),
    [
        *((model, kind, {}) for model in (HIVIT, REVCOLV2) for kind in ("pretrain", "finetune")),
        (REVCOL, "finetune", {"method": "intermediate_supervision"}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_micro_batches_of_32_16_and_8_agree(shards, tmp_path, model, kind, changes):
    (losses, weights), *others = (
        _trained(shards, kind, tmp_path / str(m), m, model, **changes) for m in (32, 16, 8)
    )
    assert losses[0] != losses[-1]
    for other_losses, other_weights in others:
        # Sums of 32 numbers in another order: float32 keeps 7 digits.
        assert other_losses == pytest.approx(losses, rel=2e-6)
        assert (other_weights - weights).norm() / weights.norm() < 1e-5


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_two_ranks_agree_with_one(shards, folder, tmp_path, kind):
    losses, weights = _trained(shards, kind, tmp_path, 32, HIVIT)
    port = free_port()
    assert run_processes(rank_child, *((folder, kind, rank, 2, port, 8) for rank in range(2))) == [0, 0]
    together = torch.load(folder / f"{kind}.pt", weights_only=True)
    assert together["losses"] == pytest.approx(losses, rel=2e-6)
    assert (together["weights"] - weights).norm() / weights.norm() < 1e-5


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_the_recorded_curves_come_out_again(shards, tmp_path, kind):
    torch.set_num_threads(1)
    section = section_of(kind, CURVES["steps"], micro_batch=CURVES["micro_batch"])
    _, losses, _ = run(shards, section, tmp_path)
    # Other processors round otherwise; another mask or dropped branch changes the third digit.
    assert losses == pytest.approx(CURVES["curves"][kind], rel=2e-5)
    assert losses != pytest.approx(CURVES["before"][kind], rel=2e-5)
