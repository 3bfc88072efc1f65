"""The journal loses and repeats no final point, whenever the process is killed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.errors import StorageError
from vitpipe.track.journal import Journal, JournalReader, UsedDataset

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("points"), st.sampled_from(["loss", "lr"]), st.integers(0, 8)),
        st.tuples(st.just("commit"), st.one_of(st.none(), st.integers(0, 8))),
        st.tuples(st.just("rewind"), st.integers(0, 8)),
        st.tuples(st.just("kill"), st.integers(0, 30)),
    ),
    max_size=40,
)


class Expected:
    """Reference implementation of the rules on plain dictionaries."""

    def __init__(self):
        self.final, self.pending = {}, {}

    def points(self, name, step, value):
        if (name, step) not in self.final:
            self.pending[name, step] = value

    def commit(self, last):
        ready = {k: v for k, v in self.pending.items() if last is None or k[1] <= last}
        self.final |= ready
        self.pending = {k: v for k, v in self.pending.items() if k not in ready}

    def rewind(self, last):
        self.pending = {k: v for k, v in self.pending.items() if k[1] <= last}


@given(OPERATIONS)
def test_any_sequence_with_kills_keeps_each_final_point_once(operations):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        journal, expected, reader = Journal(path), Expected(), JournalReader(path)
        for i, (kind, *arguments) in enumerate(operations):
            if kind == "points":
                journal.points({arguments[0]: float(i)}, arguments[1])
                expected.points(*arguments, float(i))
            elif kind == "kill":
                journal.close()
                torn = b'{"time": 1, "step": 3, "values": {"loss"'[: arguments[0]]
                with path.open("ab") as handle:
                    handle.write(torn)
                if i % 2:
                    reader.refresh()  # the uploader may read at this moment
                journal = Journal(path)
            else:
                getattr(journal, kind)(*arguments)
                getattr(expected, kind)(*arguments)
        journal.close()
        for contents in (journal.contents, reader.refresh(), JournalReader(path).refresh()):
            assert {(p.name, p.step): p.value for p in contents.final} == expected.final
            assert len(contents.final) == len(expected.final)
            assert {k: p.value for k, p in contents.pending.items()} == expected.pending


@given(
    st.integers(1, 30),
    st.integers(1, 7),
    st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=4),
)
def test_a_training_run_killed_anywhere_has_every_step_once(num_steps, save_every, kills):
    """A loop that saves, then commits; each kill hits before a given step, perhaps between save and commit."""
    with tempfile.TemporaryDirectory() as folder:
        path, saved = Path(folder) / "journal.jsonl", 0
        for kill_at, after_save in [*kills, (10**9, False)]:
            journal = Journal(path)
            journal.rewind(saved)
            for step in range(saved + 1, num_steps + 1):
                if step == kill_at and not after_save:
                    break
                journal.points({"train/loss": step / 10}, step)
                if step % save_every == 0 or step == num_steps:
                    saved = step
                    if step >= kill_at:
                        break
                    journal.commit(step)
            else:
                journal.commit()
            journal.close()
        final = JournalReader(path).refresh().final
        assert sorted((p.step, p.value) for p in final) == [(s, s / 10) for s in range(1, num_steps + 1)]


def test_a_value_recorded_again_replaces_a_pending_one_but_not_a_final_one(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.points({"loss": 1.0}, 1)
    journal.points({"loss": 2.0}, 1)
    journal.commit(1)
    journal.points({"loss": 3.0}, 1)
    journal.points({"top1": 0.5}, 1)
    journal.commit()
    assert [(p.name, p.value) for p in journal.contents.final] == [("loss", 2.0), ("top1", 0.5)]


def test_a_dataset_recorded_again_after_a_resume_is_kept_once(tmp_path):
    train = UsedDataset("imagenet train", "a" * 64, "s3://bucket/x", "training", {"num_images": 3})
    val = UsedDataset("imagenet val", "a" * 64, "s3://bucket/x", "validation", {"num_images": 2})
    for _ in range(2):
        journal = Journal(tmp_path / "j")
        journal.dataset(train)
        journal.dataset(val)
        journal.close()
    assert JournalReader(tmp_path / "j").refresh().datasets == journal.contents.datasets == [train, val]


def test_nan_and_infinity_are_kept(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.points({"a": float("nan"), "b": float("inf")}, 1)
    journal.commit()
    journal.close()
    values = [p.value for p in JournalReader(tmp_path / "j").refresh().final]
    assert values[0] != values[0]
    assert values[1] == float("inf")


def test_damaged_lines_are_skipped(tmp_path):
    (tmp_path / "j").write_bytes(b'\x00\x00\x00\n[1]\n{"time": 1, "step": 1, "values": {"a": 1.0}}\n')
    assert ("a", 1) in JournalReader(tmp_path / "j").refresh().pending


def test_a_full_disk_is_a_storage_error_and_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j")
    journal.points({"a": 1.0}, 1)
    before = (tmp_path / "j").read_bytes()
    real_write = __import__("os").write

    def write_half(descriptor, data):
        if len(data) > 10:
            return real_write(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vitpipe.track.journal.os.write", write_half)
    with pytest.raises(StorageError, match="No space left"):
        journal.points({"b": 1.0}, 1)
    assert (tmp_path / "j").read_bytes() == before
