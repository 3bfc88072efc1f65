"""dvc.yaml: in step with the graph, accepted by DVC, and re-run only where something changed."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine_trials import ROOT

from pipelines.dvc import render_dvc, write_dvc
from vitpipe.config.read import load_params, load_recipe, profile_names, recipe_names
from vitpipe.stages.graph import graph_of

BIN = Path(sys.executable).parent


def recipe_of_params():
    params = load_params(ROOT / "params.yaml")
    return load_recipe(params.recipe, params.profile, params.overrides)


def test_the_file_in_the_repository_is_the_graphs():
    expected = render_dvc(graph_of(recipe_of_params().stages))
    assert (ROOT / "dvc.yaml").read_text(encoding="utf-8") == expected, "run `vitpipe compile --dvc`"


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", recipe_names())
def test_commands_dependencies_and_outputs_agree(name, profile):
    recipe = load_recipe(name, profile)
    nodes = graph_of(recipe.stages, recipe.start_from)
    found = yaml.safe_load(render_dvc(nodes))["stages"]
    folder = "artifacts/${recipe}/${profile}"
    assert list(found) == ["identity", *(node.name for node in nodes)]
    assert [next(iter(out)) for out in found["identity"]["outs"]] == [
        f"{folder}/identity/{node.name}.json" for node in nodes
    ]
    for node in nodes:
        stage = found[node.name]
        words = stage["cmd"].split()
        assert words[:3] == ["vitpipe", "run", node.name]
        given = dict(word.split("=", 1) for option, word in itertools.pairwise(words) if option == "--in")
        assert given == {key: f"{folder}/{feeder}" for key, feeder in node.inputs.items()}
        assert stage["deps"] == [f"{folder}/identity/{node.name}.json", *given.values()]
        out = f"{folder}/{node.name}"
        assert words[words.index("--out") + 1 :] == [out]
        # The prepare stage takes unchanged sets from its earlier output.
        assert stage["outs"] == [{out: {"persist": True}} if node.name == "prepare" else out]


def test_it_is_written_once(tmp_path):
    path = tmp_path / "dvc.yaml"
    assert write_dvc(graph_of(("prepare", "report")), path)
    assert not write_dvc(graph_of(("report", "prepare")), path)
    assert write_dvc(graph_of(("prepare", "finetune", "report")), path)


# Real identities, fast stages: `run` only makes its folder and notes that it ran.
QUICK = """\
#!/bin/sh
[ "$1" = identity ] && exec {bin}/vitpipe "$@"
stage=$2
for word; do out=$word; done
mkdir -p "$out"
date +%s%N > "$out/card.json"
echo "$stage" >> ran.txt
"""


def repro(folder: Path) -> list[str]:
    (folder / "ran.txt").unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [BIN / "dvc", "repro"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = folder / "ran.txt"
    return ran.read_text(encoding="utf-8").split() if ran.exists() else []


@pytest.mark.slow
def test_a_changed_value_re_runs_the_stages_that_read_it_and_those_behind_them(tmp_path):
    (tmp_path / "dvc.yaml").write_text(render_dvc(graph_of(recipe_of_params().stages)), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vitpipe").write_text(QUICK.format(bin=BIN), encoding="utf-8")
    (tmp_path / "bin" / "vitpipe").chmod(0o755)

    def choose(*overrides: str) -> None:
        values = {"recipe": "itpn/pixel_base", "profile": "demo", "overrides": list(overrides)}
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")

    choose()
    subprocess.run([BIN / "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    nodes = graph_of(load_recipe("itpn/pixel_base", "demo").stages)
    assert sorted(repro(tmp_path)) == sorted(node.name for node in nodes)
    assert repro(tmp_path) == []
    choose("finetune.epochs=1")
    assert repro(tmp_path) == ["finetune", "evaluate", "report"]
    choose("finetune.epochs=1", "report.sample_images=4", "pretrain.checkpoint_minutes=1")
    assert repro(tmp_path) == ["report"]
