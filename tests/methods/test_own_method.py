"""A method that joins by a plugin's two files: teacher, views, heads, hooks, saved states, judgement."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from short_runs import STEPS, TOY, TOY_CLIP, packed_digits, toy_child
from tiny_runs import run_processes

from vitpipe.optim.schedules import cosine

pytestmark = pytest.mark.slow
PER_EPOCH = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("toy")
    packed_digits(place)
    return place


def _read(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run in micro-batches of 16."""
    assert run_processes(toy_child, (folder, "whole", 16)) == [0]
    return _read(folder, "whole")


def test_all_parts_learn_except_what_is_frozen(whole):
    moved = {name: not torch.equal(whole["start"][name], end) for name, end in whole["end"].items()}
    assert moved["head.0.weight"]
    assert moved["head.2.weight"]
    assert moved["model.head.weight"]
    assert moved["centre"]
    assert not moved["pixels.weight"]
    # The teacher follows: it has moved, less far than the student.
    for name in ("model.head.weight", "head.0.weight"):
        teacher = f"teacher.{'0.head.weight' if name.startswith('model') else '1.0.weight'}"
        far, less = ((whole["end"][n] - whole["start"][name]).norm() for n in (name, teacher))
        assert 0 < less < far


def test_hooks_clip_every_tensor_and_freeze_the_last_layer_in_the_first_epoch(whole):
    assert len(whole["grads"]) == STEPS
    for step, norms in enumerate(whole["grads"]):
        assert max(norms.values()) <= TOY_CLIP * 1.001
        assert ("head.2.weight" in norms) == (step >= PER_EPOCH)
        assert not any(name.startswith(("teacher", "pixels")) for name in norms)
    # Clipped by themselves: many tensors have the largest norm at once.
    assert sum(norm > 0.99 * TOY_CLIP for norm in whole["grads"][-1].values()) > 3


def test_weight_decay_follows_its_schedule(whole):
    assert whole["decays"] == pytest.approx([0.0, cosine((STEPS - 1) / STEPS, 0.04, 0.4)])


def test_a_state_keeps_the_moving_teacher_and_leaves_the_frozen_one_out(whole):
    parts = {name.split(".")[0] for name in whole["saved"]}
    assert parts == {"model", "head", "teacher", "centre"}


@pytest.mark.parametrize("at_step", [2, 4])
def test_a_killed_run_ends_with_the_same_weights(folder, whole, at_step):
    name = f"killed{at_step}"
    assert run_processes(toy_child, (folder, name, 16, at_step)) == [-signal.SIGKILL]
    assert run_processes(toy_child, (folder, name, 16)) == [0]
    again = _read(folder, name)
    assert again["pid"] != whole["pid"]
    assert len(again["losses"]) == STEPS - at_step + 1
    assert all(torch.equal(again["end"][key], value) for key, value in whole["end"].items())


def test_views_teacher_and_centre_do_not_depend_on_the_micro_batch(folder, whole):
    assert run_processes(toy_child, (folder, "small", 8)) == [0]
    small = _read(folder, "small")
    assert small["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    torch.testing.assert_close(small["end"]["centre"], whole["end"]["centre"], rtol=1e-4, atol=1e-6)


STAGE = """
import sys
from pathlib import Path
from vitpipe.contracts.discovery import use_plugins
use_plugins([Path(sys.argv[1])])
from test_training_stages import Chain
chain = Chain(Path(sys.argv[2]))
chain.run("prepare")
views = "{local_size: 16, global_size: 32, num_local: 1}"
metrics, logger, folder = chain.run(
    "pretrain", {"data": "prepare"}, ["pretrain.method=two_views", f"pretrain.method.crops={views}"]
)
print(sorted(path.name for path in folder.glob("*.safetensors")), metrics["spread"] > 0,
      logger.tables["shape"])
chain.run("finetune", {"data": "prepare", "weights": "pretrain"})
"""


def test_the_pretraining_stage_runs_it_and_fine_tuning_starts_from_it(tmp_path):
    tests = Path(__file__).parent.parent
    program = f"import sys; sys.path[:0] = [{str(tests / 'stages')!r}]\n{STAGE}"
    done = subprocess.run(
        [sys.executable, "-c", program, str(TOY), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "['heads.safetensors', 'student.safetensors', 'weights.safetensors'] True "
        "[{'images': 50, 'outputs': 16}]"
    )
