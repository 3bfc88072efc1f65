"""Identity changes exactly with what a stage reads."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config import digest
from vitpipe.config.libraries import installed, recorded_libraries
from vitpipe.config.read import load_recipe
from vitpipe.contracts.git import ask_git
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.run import identity_of


def _identities(*overrides: str) -> dict[str, str]:
    recipe = load_recipe("itpn/pixel_base", "demo", overrides)
    return {n.name: identity_of(recipe, n.stage)["identity"] for n in graph_of(recipe.stages)}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("pretrain.epochs=3", {"pretrain"}),
        ("finetune.drop_path=0.3", {"finetune"}),
        ("detect.optim.base_lr=0.5", {"detect"}),
        ("report.sample_images=3", {"report"}),
        ("data.embedded.seed=3", {"prepare"}),
        (
            "model.decoder.depth=1",
            {"pretrain", "intermediate", "finetune", "probe", "detect", "segment", "evaluate"},
        ),
        ("data.workers=2", set()),
        ("pretrain.checkpoint_minutes=3", set()),
        ("data.max_corrupt_images=9", set()),
    ],
)
def test_a_value_reaches_only_the_stages_that_read_it(override: str, changed: set[str]):
    before, after = _identities(), _identities(override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_the_seed_reaches_every_stage_but_the_report():
    before, after = _identities(), _identities("seed=5")
    assert {name for name in before if before[name] == after[name]} == {"report"}


@given(
    st.dictionaries(
        st.text(max_size=4), st.integers() | st.floats(allow_nan=False) | st.text(max_size=4), max_size=5
    )
)
def test_digest_ignores_key_order(values):
    assert digest.digest_of(values) == digest.digest_of(dict(reversed(values.items())))


def test_asking_git_does_not_write_its_index(tmp_path):
    """`git status` does by itself, under a lock that somebody's commit would meet."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    index = tmp_path / ".git" / "index"
    before = index.read_bytes()
    # Same content, other time: git would refresh its record of the file.
    os.utime(tmp_path / "file", (1, 1))
    assert ask_git(tmp_path, "status", "--porcelain") == ""
    assert index.read_bytes() == before
    (index.parent / "index.lock").touch()
    (tmp_path / "file").write_text("2")
    assert ask_git(tmp_path, "status", "--porcelain") == "M file"


def test_git_is_told():
    assert digest.git_commit()
    assert recorded_libraries()["torch"] == installed("torch") != "absent"
