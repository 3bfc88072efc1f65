"""One parent in MLflow per run of the chain: when a new key begins, and when an unfinished run keeps its own."""

from __future__ import annotations

import json

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.chain_run import begin_chain, chain_key, end_chain
from vitpipe.stages.identity import identity_file, write_identities

CHAIN = ("stages=[prepare, finetune, report]",)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder, and stages that are done where a file says so, with the identity that was asked."""
    done = {}

    def why(node, folders, asked, raw_data):
        return "" if done.get(node.name) == asked["identity"] else "it has not run yet"

    monkeypatch.setattr("vitpipe.stages.chain_run.why_it_runs", why)
    folder = tmp_path / "artifacts" / "demo"

    class Run:
        def __init__(self):
            self.done = done

        def repro(self, *overrides, stops_before=None, ends=False):
            """What `dvc repro` does: identities, then the stages; returns the key that they see."""
            recipe = load_recipe("itpn/pixel_base", "demo", (*CHAIN, *overrides))
            begin_chain(recipe, folder)
            write_identities(recipe, folder / "identity")
            for node in graph_of(recipe.stages):
                if node.name == stops_before:
                    break
                done[node.name] = json.loads(identity_file(node, folder).read_text())["identity"]
            if ends:
                end_chain(recipe, "report", folder / "report")
            return chain_key(recipe, folder / "finetune")

    return Run()


def test_a_complete_run_is_followed_by_another_one(run):
    first = run.repro()
    assert first.startswith("itpn/pixel_base demo ")
    assert run.repro("finetune.epochs=1") != first


def test_an_unfinished_run_keeps_its_key_whatever_is_corrected(run):
    first = run.repro(stops_before="finetune")
    assert run.repro("finetune.epochs=1", stops_before="report") == first
    assert run.repro("finetune.epochs=1", "report.sample_images=4") == first
    assert run.repro("finetune.epochs=1", "report.sample_images=4") != first


def test_a_complete_run_stays_complete_when_other_outputs_take_its_place(run):
    first = run.repro(ends=True)
    run.done.clear()  # `dvc checkout` of an earlier commit, `dvc exp apply`
    assert run.repro("finetune.epochs=1") != first


def test_another_seed_is_another_run(run):
    assert run.repro("seed=1", stops_before="report") != run.repro("seed=2", stops_before="report")


def test_stages_by_hand_share_a_run_by_their_folder(tmp_path):
    recipe = load_recipe("itpn/pixel_base", "demo")
    longer = load_recipe("itpn/pixel_base", "demo", ("finetune.epochs=3",))
    one = chain_key(recipe, tmp_path / "one" / "pretrain")
    assert one == chain_key(longer, tmp_path / "one" / "finetune")
    assert one != chain_key(recipe, tmp_path / "two" / "pretrain")


def test_a_stage_whose_folder_is_a_link_to_another_disk_shares_the_run(tmp_path):
    recipe = load_recipe("itpn/pixel_base", "demo")
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pretrain").symlink_to(tmp_path / "disk")
    one = chain_key(recipe, tmp_path / "run" / "pretrain")
    assert one == chain_key(recipe, tmp_path / "run" / "finetune")


def test_the_key_of_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_PIPELINE", "mine")
    assert chain_key(load_recipe("itpn/pixel_base", "demo"), tmp_path / "pretrain") == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"key": ""}', '{"key": 5}'])
def test_a_damaged_file_costs_a_new_key_only(tmp_path, text):
    recipe = load_recipe("itpn/pixel_base", "demo")
    (tmp_path / ".chain.json").write_text(text)
    begin_chain(recipe, tmp_path)
    assert json.loads((tmp_path / ".chain.json").read_text())["key"]
