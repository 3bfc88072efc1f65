"""dvc.yaml: in step with the graph, accepted by DVC, re-run only where something changed, and safe in a shell."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine_trials import ROOT, TINY
from recipe_samples import SAMPLED_RECIPES

from pipelines.dvc import place_dependencies, render_dvc, write_dvc
from vitpipe.config.params_file import load_params
from vitpipe.config.read import load_recipe, profile_names
from vitpipe.contracts.graph import graph_of
from vitpipe.contracts.provenance import UNTRACKED

BIN = Path(sys.executable).parent


def recipe_of_params():
    params = load_params(ROOT / "params.yaml")
    return load_recipe(params.recipe, params.profile, params.overrides)


def test_the_file_in_the_repository_is_the_graphs():
    found, expected = (ROOT / "dvc.yaml").read_text(encoding="utf-8"), graph_of(recipe_of_params().stages)
    assert found == render_dvc(expected), "run `vitpipe compile --dvc`"


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_commands_dependencies_and_outputs_agree(name, profile):
    recipe = load_recipe(name, profile)
    nodes = graph_of(recipe.stages, recipe.start_from)
    found = yaml.safe_load(render_dvc(nodes))["stages"]
    folder = "artifacts/${recipe}/${profile}"
    assert list(found) == ["identity", *(node.name for node in nodes)]
    assert found["identity"]["cmd"] == "vitpipe identity"
    # Persistent: DVC must not remove what tells whether the last run of the chain was complete.
    firsts = [f"{folder}/identity/{node.name}.json" for node in nodes if not node.inputs]
    assert found["identity"]["outs"] == [{path: {"cache": False, "persist": True}} for path in firsts]
    for node in nodes:
        stage = found[node.name]
        assert stage["cmd"] == f"vitpipe run {node.name}"
        feeders = [f"{folder}/{feeder}" for feeder in node.inputs.values()]
        if node.name == "report":  # all others lie in front of these
            feeders = [f"{folder}/{other.name}" for other in nodes[:-1] if _is_last(other, nodes)]
        assert stage["deps"][0] == f"{folder}/identity/{node.name}.json"
        assert sorted(stage["deps"][1:]) == sorted(feeders)
        out = f"{folder}/{node.name}"
        # The prepare stage takes unchanged sets from its earlier output.
        assert stage["outs"] == [{out: {"persist": True}} if node.name == "prepare" else out]


def _is_last(node, nodes):
    return not any(node.name in other.inputs.values() for other in nodes if other.name != "report")


@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_metrics_and_plots_are_files_of_the_stages(name):
    nodes = graph_of(load_recipe(name, "demo").stages)
    found = yaml.safe_load(render_dvc(nodes))
    folder = "artifacts/${recipe}/${profile}"
    assert found["params"] == ["params.yaml"]
    assert found["metrics"] == [
        f"{folder}/{node.name}/metrics.json" for node in nodes if node.name not in ("prepare", "report")
    ]
    drawn: dict[str, set[str]] = {}
    for plot in found.get("plots", ()):
        for values in plot.values():
            for file, column in values["y"].items():
                drawn.setdefault(file, set()).add(column)
    trained = {node.name for node in nodes} - {"prepare", "probe", "video", "evaluate", "explain", "report"}
    assert set(drawn) == {f"{folder}/{name}/curves.csv" for name in trained}
    assert all("train/loss" in columns for columns in drawn.values())
    assert all("val/top1" in columns for file, columns in drawn.items() if "finetune" in file)


def test_it_is_written_once(tmp_path):
    path = tmp_path / "dvc.yaml"
    assert write_dvc(graph_of(("prepare", "report")), path)
    assert not write_dvc(graph_of(("report", "prepare")), path)
    assert set(UNTRACKED) <= set((tmp_path / ".dvcignore").read_text(encoding="utf-8").splitlines())
    assert write_dvc(graph_of(("prepare", "finetune", "report")), path)


# Real identities, fast stages: `run` only makes the folder that DVC expects and notes that it ran. Its card has
# what marks a stage's output, and no list of files.
QUICK = """\
#!{python}
import json, os, sys, time, yaml
if sys.argv[1] == "identity":
    os.execv("{vitpipe}", ["vitpipe", *sys.argv[1:]])
run, stage = sys.argv[1:]
chosen = yaml.safe_load(open("params.yaml"))
out = "artifacts/" + chosen["recipe"] + "/" + chosen["profile"] + "/" + stage
os.makedirs(out, exist_ok=True)
card = {{"schema_version": 1, "stage": stage, "recipe": chosen["recipe"], "version": time.time_ns()}}
json.dump(card, open(out + "/card.json", "w"))
open("ran.txt", "a").write(stage + "\\n")
"""


@pytest.fixture
def project(tmp_path):
    """A folder with dvc.yaml, DVC and the fast `vitpipe`."""
    write_dvc(graph_of(recipe_of_params().stages), tmp_path / "dvc.yaml")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "vitpipe"
    command.write_text(QUICK.format(python=sys.executable, vitpipe=BIN / "vitpipe"), encoding="utf-8")
    command.chmod(0o755)
    subprocess.run([BIN / "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True)
    return tmp_path


def place_own_recipe(folder: Path, recipe: str) -> None:
    """A recipe of the user's; its graph is short, and dvc.yaml has it."""
    (folder / recipe).parent.mkdir()
    shutil.copy(ROOT / "vitpipe/recipes/itpn/pixel_base.yaml", folder / recipe)
    (folder / "dvc.yaml").write_text(render_dvc(graph_of(("prepare", "report"))), encoding="utf-8")


def choose(folder: Path, *overrides: str, recipe: str = "itpn/pixel_base", profile: str = "demo") -> None:
    values = {"recipe": recipe, "profile": profile, "overrides": list(overrides)}
    (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


def call_dvc(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        [BIN / "dvc", *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def repro(folder: Path) -> list[str]:
    (folder / "ran.txt").unlink(missing_ok=True)
    done = call_dvc(folder, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    ran = folder / "ran.txt"
    return ran.read_text(encoding="utf-8").split() if ran.exists() else []


@pytest.mark.slow
def test_a_changed_value_re_runs_the_stages_that_read_it_and_those_behind_them(project):
    choose(project)
    nodes = graph_of(load_recipe("itpn/pixel_base", "demo").stages)
    assert sorted(repro(project)) == sorted(node.name for node in nodes)
    assert repro(project) == []
    choose(project, "finetune.epochs=1")
    assert repro(project) == ["finetune", "evaluate", "report"]
    choose(project, "finetune.epochs=1", "report.sample_images=4", "pretrain.checkpoint_minutes=1")
    assert repro(project) == ["report"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"recipe": "a; touch x; echo "}, "There is no recipe 'a; touch x; echo '"),
        ({"profile": "$(touch x)"}, "There is no profile '$(touch x)'"),
        ({"recipe": "a'; touch x; echo '.yaml"}, "The recipe file 'a'; touch x; echo '.yaml' does not exist"),
        ({"recipe": "a\ntouch x\n.yaml"}, r"The recipe 'a\ntouch x\n.yaml' holds a line break"),
    ],
    ids=["semicolon", "substitution", "quote", "newline"],
)
def test_no_value_of_params_reaches_a_shell(project, values, named):
    choose(project, **values)
    done = call_dvc(project, "repro")
    assert done.returncode != 0
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(project.rglob("x"))
    assert not (project / "ran.txt").exists()


@pytest.mark.slow
def test_the_path_of_a_recipe_may_hold_spaces_and_what_a_shell_would_run(project):
    for recipe in ("my recipes/own.yaml", "a'; $(touch x) #{b} \"${profile}/own.yaml"):
        place_own_recipe(project, recipe)
        choose(project, "stages=[prepare, report]", recipe=recipe)
        assert repro(project) == ["prepare", "report"]
        assert repro(project) == []
        assert (project / "artifacts" / recipe / "demo" / "report").is_dir()
    assert not list(project.rglob("x"))


@pytest.mark.slow
def test_the_real_stages_write_where_dvc_expects_it(project):
    recipe = "my recipes/own.yaml"
    place_own_recipe(project, recipe)
    sizes = [text for text in TINY if text.startswith("data.")]
    choose(project, "stages=[prepare, report]", "data.sets=[imagenet]", *sizes, recipe=recipe)
    (project / "bin" / "vitpipe").unlink()
    (project / "bin" / "vitpipe").symlink_to(BIN / "vitpipe")
    done = call_dvc(project, "repro", "prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    card = json.loads((project / "artifacts" / recipe / "demo/prepare/card.json").read_text(encoding="utf-8"))
    assert card["recipe"] == recipe
    command = [BIN / "vitpipe", "plan", "--json"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    runs = {row["stage"]: row["runs"] for row in json.loads(done.stdout)["stages"]}
    assert runs == {"prepare": "cached", "report": "runs"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "there", ["notes.txt", "a file", "a folder of photos", "a link to a disk that is away"]
)
def test_what_is_not_ours_is_refused_before_dvc_removes_it(project, there):
    """DVC empties the output of a stage that it is going to run before the stage could look."""
    choose(project)
    repro(project)
    out = project / "artifacts/itpn/pixel_base/demo/finetune"
    mine = {"a file": out, "notes.txt": out / "notes.txt"}.get(there, out / "photos" / "one.jpg")
    shutil.rmtree(out)
    if "link" in there:
        out.symlink_to(project / "disk" / "finetune")
    else:
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine", encoding="utf-8")
    (project / "ran.txt").unlink()
    done = call_dvc(project, "repro")
    assert done.returncode != 0
    assert str(out) in done.stderr
    assert "Traceback" not in done.stderr
    assert out.is_symlink() if "link" in there else mine.read_text(encoding="utf-8") == "mine"
    assert not (project / "ran.txt").exists(), "a stage ran"
    shown = subprocess.run(
        [BIN / "vitpipe", "plan", "--json"], cwd=project, capture_output=True, text=True, check=True
    )
    assert (
        next(row for row in json.loads(shown.stdout)["stages"] if row["stage"] == "finetune")["runs"]
        == "cannot run"
    )


@pytest.mark.slow
def test_files_added_to_an_output_are_refused_before_dvc_removes_them(project):
    recipe = "own/own.yaml"
    place_own_recipe(project, recipe)
    sizes = [text for text in TINY if text.startswith("data.")]
    choose(project, "stages=[prepare, report]", "data.sets=[imagenet]", *sizes, recipe=recipe)
    (project / "bin" / "vitpipe").unlink()
    (project / "bin" / "vitpipe").symlink_to(BIN / "vitpipe")
    assert call_dvc(project, "repro").returncode == 0
    run = project / "artifacts" / recipe / "demo"
    first = json.loads((run / ".chain.json").read_text(encoding="utf-8"))
    added = run / "report" / "my thoughts.md"
    added.write_text("mine", encoding="utf-8")
    choose(
        project,
        "stages=[prepare, report]",
        "data.sets=[imagenet]",
        "report.sample_images=1",
        *sizes,
        recipe=recipe,
    )
    done = call_dvc(project, "repro")
    assert done.returncode != 0
    assert "my thoughts.md" in done.stderr
    assert added.read_text(encoding="utf-8") == "mine"

    # Once it is out of the way, this is a second run of the chain: DVC has left the first one's identities.
    added.unlink()
    done = call_dvc(project, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((run / ".chain.json").read_text(encoding="utf-8"))["key"] != first["key"]


def test_commands_of_an_earlier_version_are_refused(tmp_path):
    from vitpipe.contracts.errors import RecipeError
    from vitpipe.stages.identity import check_dvc_file

    recipe = load_recipe("itpn/pixel_base", "demo")
    text = render_dvc(graph_of(recipe.stages, recipe.start_from))
    old = text.replace("cmd: vitpipe identity\n", "cmd: vitpipe identity --out artifacts/${recipe}\n")
    for written, is_refused in ((text, False), (old, True)):
        (tmp_path / "dvc.yaml").write_text(written, encoding="utf-8")
        if is_refused:
            with pytest.raises(RecipeError, match=r"which a shell would run \(identity\).*compile --dvc"):
                check_dvc_file(recipe, tmp_path / "dvc.yaml")
        else:
            check_dvc_file(recipe, tmp_path / "dvc.yaml")


def test_lines_of_the_users_dvcignore_stay(tmp_path):
    (tmp_path / ".dvcignore").write_text("/mine\nrun.json", encoding="utf-8")
    write_dvc(graph_of(("prepare", "report")), tmp_path / "dvc.yaml")
    lines = (tmp_path / ".dvcignore").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["/mine", "run.json"]
    assert lines.count("run.json") == 1


def test_empty_places_are_made_beside_what_is_there(tmp_path):
    nodes, run = graph_of(("prepare", "finetune", "report")), tmp_path / "run"
    (run / "finetune").mkdir(parents=True)
    (run / "finetune" / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "report").write_text("a file", encoding="utf-8")
    (run / "identity").mkdir()
    (run / "identity" / "prepare.json").write_text("{}", encoding="utf-8")
    place_dependencies(nodes, run)
    place_dependencies(nodes, run)
    assert (run / "prepare").is_dir()
    assert (run / "finetune" / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (run / "report").read_text(encoding="utf-8") == "a file"
    assert (run / "identity" / "prepare.json").read_text(encoding="utf-8") == "{}"
    assert (run / "identity" / "finetune.json").read_bytes() == b""


# Stages that write what `dvc` shows of them; `finetune` depends on the seed and the epochs of params.yaml.
SHOWN = (
    QUICK
    + """\
seed, epochs = chosen.get("seed") or 0, (chosen.get("finetune") or {{}}).get("epochs") or 1
os.makedirs(out + "/tables", exist_ok=True)
card["version"] = stage + str(seed) + str(epochs)
json.dump(card, open(out + "/card.json", "w"))
json.dump({{"top1": seed + epochs / 10}}, open(out + "/metrics.json", "w"))
open(out + "/curves.csv", "w").write("step,train/loss\\n1,2.0\\n2,1.0\\n")
"""
)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with the shipped params.yaml, the fast stages, and a folder beside it as DVC remote."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "a")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "a@b.c")
    folder = tmp_path / "one"
    (folder / "bin").mkdir(parents=True)
    command = folder / "bin" / "vitpipe"
    command.write_text(SHOWN.format(python=sys.executable, vitpipe=BIN / "vitpipe"), encoding="utf-8")
    command.chmod(0o755)
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / ".gitignore").write_text("/artifacts/\n/ran.txt\n", encoding="utf-8")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    subprocess.run([BIN / "dvc", "init", "--quiet"], cwd=folder, check=True)
    # `compile --dvc` as the command line does it.
    subprocess.run([BIN / "vitpipe", "compile", "--dvc"], cwd=folder, check=True, capture_output=True)
    for words in (
        ("remote", "add", "-d", "shared", str(tmp_path / "shared")),
        ("config", "core.analytics", "false"),
    ):
        assert call_dvc(folder, *words).returncode == 0
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    subprocess.run(["git", "add", "--all"], cwd=folder, check=True)
    subprocess.run(["git", "commit", "--quiet", "--message", "x"], cwd=folder, check=True)


@pytest.mark.slow
def test_what_a_dvc_user_types(repository):
    dry = call_dvc(repository, "repro", "--dry")
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.count("Running stage") == 10
    assert not (repository / "ran.txt").exists()
    assert max(map(len, call_dvc(repository, "dag").stdout.splitlines())) < 240
    assert len(repro(repository)) == 9
    commit(repository)
    shown = json.loads(call_dvc(repository, "metrics", "show", "--json").stdout)
    files = shown[""]["data"] if "data" in shown[""] else shown["workspace"]["data"]
    assert files["artifacts/itpn/pixel_base/demo/finetune/metrics.json"]["data"] == {"top1": 0.1}
    plots = call_dvc(repository, "plots", "show", "--json").stdout
    assert "finetune train/loss" in plots
    assert "2.0" in plots

    done = call_dvc(repository, "exp", "run", "-S", "seed=3", "-S", "finetune.epochs=5")
    assert done.returncode == 0, done.stdout + done.stderr
    changes = json.loads(call_dvc(repository, "params", "diff", "--json").stdout)["params.yaml"]
    assert changes == {"seed": {"old": None, "new": 3}, "finetune.epochs": {"old": None, "new": 5}}
    difference = json.loads(call_dvc(repository, "metrics", "diff", "--json").stdout)
    assert difference["artifacts/itpn/pixel_base/demo/finetune/metrics.json"]["top1"]["new"] == 3.5
    table = call_dvc(repository, "exp", "show", "--csv").stdout.splitlines()
    assert "finetune.epochs" in table[0]
    assert "top1" in table[0]


@pytest.mark.slow
def test_a_colleague_gets_everything_and_runs_nothing(repository, tmp_path):
    repro(repository)
    commit(repository)
    assert call_dvc(repository, "push").returncode == 0
    other = tmp_path / "elsewhere" / "two"
    subprocess.run(["git", "clone", "--quiet", str(repository), str(other)], check=True)
    pulled = call_dvc(other, "repro", "--pull")
    assert pulled.returncode == 0, pulled.stdout + pulled.stderr
    assert not (other / "ran.txt").exists(), "stages ran that were pushed"
    for name in ("finetune/metrics.json", "report/card.json"):
        path = f"artifacts/itpn/pixel_base/demo/{name}"
        assert (other / path).read_bytes() == (repository / path).read_bytes()
