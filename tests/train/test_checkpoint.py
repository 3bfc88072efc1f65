"""States on disk: complete or absent, the last two kept, a full disk leaves older ones untouched."""

from __future__ import annotations

import hashlib
import random

import pytest
import torch
from tiny_runs import PLAN, SECTION, EveryFewSteps, train_digits

from vitpipe.contracts.errors import CheckpointError, StorageError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.train import checkpoint, loop
from vitpipe.train.checkpoint import StateFolder

CONTENT = {"step": 3, "weights": torch.arange(1000.0), "nested": {"list": [1, 2.5, "text", None]}}


def _folder(path, identity="a" * 64):
    lines: list[str] = []
    return StateFolder(path, identity, lines.append), lines


def _seal(path):
    """Give a file the checksum that states end with."""
    content = path.read_bytes()
    path.write_bytes(content + b"vitpipe-sha256:" + hashlib.sha256(content).hexdigest().encode())


def test_what_was_saved_is_read(tmp_path):
    states, lines = _folder(tmp_path / "new" / "folder")
    assert states.newest() is None
    states.save(CONTENT, 3)
    found = states.newest()
    assert torch.equal(found.pop("weights"), CONTENT["weights"])
    assert found == {"step": 3, "nested": CONTENT["nested"], "identity": "a" * 64}
    assert lines == []


def test_the_last_two_are_kept(tmp_path):
    states, _ = _folder(tmp_path)
    for step in (1, 2, 10, 9, 100):
        states.save(CONTENT, step)
    assert states.steps() == [10, 100]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: b"not a state at all",
    ],
    ids=["half", "last byte", "empty", "other"],
)
def test_a_damaged_newest_state_is_reported_and_skipped(tmp_path, damage):
    states, lines = _folder(tmp_path)
    states.save({**CONTENT, "step": 1}, 1)
    states.save({**CONTENT, "step": 2}, 2)
    states.path_of(2).write_bytes(damage(states.path_of(2).read_bytes()))
    assert states.newest()["step"] == 1
    assert len(lines) == 1
    assert states.path_of(2).name in lines[0]
    assert "older state" in lines[0]


def test_without_an_older_state_nothing_is_promised(tmp_path):
    states, lines = _folder(tmp_path)
    states.save({**CONTENT, "step": 1}, 1)
    states.path_of(1).write_bytes(b"x")
    assert states.newest() is None
    assert "There is no older state: training starts from the beginning." in lines[0]
    assert "remove" not in lines[0]


def test_a_damaged_state_is_not_one_of_the_two_kept(tmp_path):
    states, _ = _folder(tmp_path)
    for step in (1, 2):
        states.save({**CONTENT, "step": step}, step)
    states.path_of(2).write_bytes(b"x")
    assert states.newest()["step"] == 1
    states.save({**CONTENT, "step": 3}, 3)
    assert states.steps() == [1, 2, 3]  # 1 is the only other sound one
    states.save({**CONTENT, "step": 4}, 4)
    assert states.steps() == [3, 4]


def test_flipped_bits_are_never_loaded(tmp_path):
    """torch.load alone accepts three quarters of such files."""
    states, lines = _folder(tmp_path)
    states.save({**CONTENT, "step": 1}, 1)
    states.save({**CONTENT, "step": 2}, 2)
    path = states.path_of(2)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 40))):
            damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(damaged))
        found = states.newest()
        assert found["step"] == 1
        assert torch.equal(found["weights"], CONTENT["weights"])
    assert len(lines) == 300
    assert all(path.name in line and "checksum" in line for line in lines)


def test_missing_permission_is_not_reported_as_damage(tmp_path, monkeypatch):
    states, _ = _folder(tmp_path)
    states.save({**CONTENT, "step": 1}, 1)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "_check", refuse)
    with pytest.raises(CheckpointError, match="cannot be opened") as caught:
        states.newest()
    assert "read permission" in str(caught.value)


def test_a_missing_state_names_the_fix(tmp_path):
    states, _ = _folder(tmp_path)
    with pytest.raises(CheckpointError, match="that all of them see"):
        states.read(7)


def test_code_inside_a_state_is_not_run(tmp_path):
    states, lines = _folder(tmp_path)
    torch.save({"identity": "a" * 64, "step": 1, "thing": print}, states.path_of(1))
    _seal(states.path_of(1))
    assert states.newest() is None
    assert len(lines) == 1
    assert "checksum" not in lines[0]


def test_a_state_without_a_checksum_is_not_trusted(tmp_path):
    states, lines = _folder(tmp_path)
    torch.save({**CONTENT, "identity": "a" * 64}, states.path_of(1))
    assert states.newest() is None
    assert "checksum" in lines[0]
    assert states.path_of(1).is_file()


def test_states_of_other_work_are_reported_and_never_read(tmp_path):
    ours, lines = _folder(tmp_path)
    other, _ = _folder(tmp_path, "b" * 64)
    other.save(CONTENT, 500)
    assert ours.newest() is None
    assert "not resumed" in lines[0]
    assert other.path_of(500).name in lines[0]
    ours.save(CONTENT, 1)
    assert other.steps() == [500]
    # Equal first digits do not help either.
    torch.save({**CONTENT, "identity": "a" * 12 + "c" * 52}, ours.path_of(9))
    _seal(ours.path_of(9))
    assert ours.newest()["identity"] == "a" * 64


def test_a_full_disk_keeps_the_old_state(tmp_path):
    states, _ = _folder(tmp_path)
    states.save({**CONTENT, "step": 1}, 1)
    # The kernel's own full disk: whatever is written through this name is refused.
    (tmp_path / "saving.partial").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left") as caught:
        states.save({**CONTENT, "step": 2}, 2)
    assert caught.value.exit_code == 1
    assert "free some space" in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [states.path_of(1).name]
    assert states.newest()["step"] == 1


def test_a_run_stopped_by_a_full_disk_resumes_when_there_is_space(tmp_path, monkeypatch):
    whole = train_digits(tmp_path / "whole", logger=MemoryLogger())
    monkeypatch.setattr(loop, "Speedometer", EveryFewSteps)
    save = StateFolder.save

    def full_at_8(self, content, step):
        if step == 8:
            (self.folder / "saving.partial").symlink_to("/dev/full")
        save(self, content, step)

    monkeypatch.setattr(StateFolder, "save", full_at_8)
    with pytest.raises(StorageError):
        train_digits(tmp_path / "full", logger=MemoryLogger())
    monkeypatch.setattr(StateFolder, "save", save)
    logger = MemoryLogger()
    rest = train_digits(tmp_path / "full", logger=logger, section=SECTION)
    assert logger.lines == ["Resuming after step 4"]
    assert rest.step == PLAN.num_steps
    for a, b in zip(whole.method.parameters(), rest.method.parameters(), strict=True):
        assert torch.equal(a, b)
