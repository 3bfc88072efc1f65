"""`vitpipe clean` removes what vitpipe has written and nothing else, whatever its name."""

from __future__ import annotations

import json

import pytest

from vitpipe.contracts.files import move_aside
from vitpipe.stages.leftovers import clear, leftovers
from vitpipe.stages.resume import FINISHED, MARK, claim_state

DECIDES = {"stage": "pretrain", "recipe": "a", "data": "b", "weights": "c"}


@pytest.fixture
def state(tmp_path):
    folder = tmp_path / ".pretrain.state"
    claim_state(folder, DECIDES, {"code_digest": "1" * 64, "libraries": {}}, tmp_path / "pretrain")
    return folder


def finished(state):
    (state / "state-0123456789ab-000000004.pt").write_bytes(b"four")
    (state / FINISHED).write_text(json.dumps({"card": "d" * 64, "stage": "pretrain"}))
    return state


def removed(root):
    return [item.path for item in clear(leftovers(root), root)]


def test_a_last_state_and_one_moved_aside_are_removed(tmp_path, state):
    aside = move_aside(finished(state), "other-recipe-values")
    assert removed(tmp_path) == [aside]
    assert not aside.exists()


@pytest.mark.parametrize(
    "name",
    [".notes.state.aside-20260101-000000-x", ".n4.state.aside-mine", "thesis.aside-20260101-000000-other-data",
     ".n3.state", ".n5.unsent.partial"],
)  # fmt: skip
@pytest.mark.parametrize("mark", [None, "{}", "[]", '"short"'])
def test_a_name_alone_makes_nothing_ours(tmp_path, name, mark):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    if mark is not None:
        (folder / MARK).write_text(mark)
        (folder / FINISHED).write_text("t")
    assert removed(tmp_path) == []
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_file_that_was_added_to_a_state_keeps_it_and_is_named(tmp_path, state):
    (finished(state) / "thesis.txt").write_text("mine")
    (item,) = leftovers(tmp_path)
    assert item.is_needed
    assert "thesis.txt" in item.reason
    assert removed(tmp_path) == []
    assert removed(state) == [state]  # named itself
    assert not state.exists()


def test_links_are_not_followed_and_not_removed(tmp_path, state):
    link = tmp_path / ".l.state.aside-20260101-000000-other-data"
    link.symlink_to(finished(state))
    assert removed(tmp_path) == [state]
    assert link.is_symlink()


def test_an_edited_output_that_was_moved_aside_is_listed_and_kept(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "notes.txt").write_text("mine")
    aside = move_aside(tmp_path / "evaluate", "changed-since-written")
    (item,) = leftovers(tmp_path)
    assert (item.path, item.is_needed) == (aside, True)
    assert removed(tmp_path) == []
