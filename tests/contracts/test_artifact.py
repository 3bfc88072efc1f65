"""Output folders appear whole or not at all, and bad ones are refused with the fix."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.contracts.artifact import (
    Card,
    open_artifact,
    refuse_added_files,
    refuse_foreign,
    write_card,
    write_metrics,
    write_table,
    writing,
)
from vitpipe.contracts.errors import ArtifactError, StorageError, VitpipeError, disk_errors

CARD = Card(
    stage="prepare", recipe="r", profile="demo", recipe_digest="a", data_digest="b", code_digest="c", image="train",
    identity="d", parents={}, seed=0, libraries={},
)  # fmt: skip


def _make(out, number=1.0):
    with writing(out) as folder:
        write_metrics(folder, {"x": number})
        write_table(folder, "rows", [{"a": 1, "b": "two"}])
        write_card(folder, CARD)


def test_written_and_read_again(tmp_path):
    _make(tmp_path / "out")
    artifact = open_artifact(tmp_path / "out", "prepare")
    assert artifact.card.model_copy(update={"files": {}}) == CARD
    assert set(artifact.card.files) == {"metrics.json", "tables/rows.csv"}
    assert artifact.metrics == {"x": 1.0}
    assert artifact.tables() == {"rows": [{"a": "1", "b": "two"}]}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path):
    _make(tmp_path / "out", 1.0)

    def fail():
        with writing(tmp_path / "out") as folder:
            write_metrics(folder, {"x": 2.0})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert open_artifact(tmp_path / "out").metrics == {"x": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    _make(tmp_path / "out", 3.0)
    assert open_artifact(tmp_path / "out").metrics == {"x": 3.0}


def test_a_full_disk_is_told_in_one_paragraph(tmp_path):
    with pytest.raises(StorageError, match="No space left") as caught, writing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.exit_code == 1
    assert not list(tmp_path.iterdir())


def test_torch_s_way_of_saying_full_disk_is_understood(tmp_path):
    with pytest.raises(StorageError), disk_errors(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    with pytest.raises(RuntimeError, match="shape"), disk_errors(tmp_path):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize("damage", ["missing", "no card", "broken card", "broken metrics", "other stage"])
def test_bad_folders_are_refused(damage, tmp_path):
    out = tmp_path / "out"
    if damage != "missing":
        _make(out)
    if damage == "no card":
        (out / "card.json").unlink()
    if damage == "broken card":
        (out / "card.json").write_text('{"stage": 3}')
    if damage == "broken metrics":
        (out / "metrics.json").write_text("{")
    with pytest.raises(ArtifactError) as caught:
        open_artifact(out, "pretrain" if damage == "other stage" else None)
    assert str(out) in str(caught.value)
    assert caught.value.fix
    assert caught.value.exit_code == 2


def test_weights_that_are_not_there_are_named(tmp_path):
    _make(tmp_path / "out")
    with pytest.raises(ArtifactError, match="holds no weights"):
        _ = open_artifact(tmp_path / "out").weights


@given(st.text(max_size=20), st.text(max_size=20), st.text(max_size=20))
def test_errors_are_one_sentence_after_another(what, where, fix):
    text = str(VitpipeError(what, where=where, fix=fix))
    assert (("Where:" in text) == bool(where)) or "Where:" in what + fix
    assert what.rstrip(".") in text


def test_an_edited_output_is_moved_aside_instead_of_replaced(tmp_path):
    out = tmp_path / "out"
    _make(out, 1.0)
    with (out / "tables" / "rows.csv").open("a") as table:
        table.write("a note of mine\n")
    _make(out, 2.0)
    assert open_artifact(out).metrics == {"x": 2.0}
    aside = [path for path in tmp_path.iterdir() if path != out]
    assert [path.name.partition("-")[0] for path in aside] == ["out.aside"]
    assert aside[0].name.endswith("changed-since-written")
    assert "a note of mine" in (aside[0] / "tables" / "rows.csv").read_text()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_empty_folders_and_links_that_were_added_are_named(tmp_path, kind):
    _make(tmp_path / "out")
    added = tmp_path / "out" / "tables" / "mine"
    added.mkdir() if kind == "folder" else added.symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="tables/mine"):
        refuse_added_files(tmp_path / "out")


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_card_is_named_where_the_output_is_read_and_where_it_would_be_replaced(tmp_path, damage):
    out = tmp_path / "out"
    _make(out)
    card = out / "card.json"
    content = {"missing": None, "cut": card.read_bytes()[:50], "empty": b""}[damage]
    card.unlink() if content is None else card.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"card\.json.*move it away and run its stage again"):
        open_artifact(out)
    with pytest.raises(ArtifactError, match=r"card\.json is missing or damaged.*move this folder away"):
        refuse_foreign(out)


def test_a_damaged_file_is_named(tmp_path):
    _make(tmp_path / "out")
    (tmp_path / "out" / "metrics.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"metrics\.json is damaged"):
        open_artifact(tmp_path / "out")


def test_a_full_disk_behind_another_error_is_found(tmp_path):
    """torch.save: the archive's close fails in turn and hides the first error."""

    def save():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 3082752 vs 3082644")

    with pytest.raises(StorageError, match=r"No space left.*free some space"), disk_errors(tmp_path):
        save()


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.EROFS, "read-only"), (errno.EACCES, "right to write"), (errno.EDQUOT, "quota")]
)
def test_each_refusal_of_a_disk_has_its_own_fix(tmp_path, number, fix):
    with pytest.raises(StorageError, match=f"Fix: .*{fix}"), disk_errors(tmp_path):
        raise OSError(number, "refused")
