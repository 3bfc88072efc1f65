"""Verbs in an empty folder, and where something else stands at the place of the runs."""

import subprocess
import sys

import pytest

from pipelines.dvc import place_dependencies
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Card, open_artifact, write_card, write_metrics, writing
from vitpipe.contracts.errors import ArtifactError
from vitpipe.contracts.graph import graph_of
from vitpipe.report.results import open_results

PARAMS = "recipe: itpn/pixel_base\nprofile: demo\n"
VERBS = [["verdict"], ["report"], ["sync"], ["clean"], ["clean", "--remove"]]


def vitpipe(*arguments, cwd):
    command = [sys.executable, "-m", "vitpipe", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_without_a_run_a_verb_says_how_to_get_one(verb, tmp_path):
    done = vitpipe(*verb, cwd=tmp_path)
    assert done.returncode == 2
    assert "`make demo` or" in done.stderr
    assert "dvc repro`" in done.stderr
    assert str(tmp_path) in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb", [["plan"], ["recipe"], ["compile"], ["run", "prepare"], ["repro"]], ids=" ".join
)
def test_without_params_a_verb_says_what_names_a_recipe(verb, tmp_path):
    done = vitpipe(*verb, cwd=tmp_path)
    assert done.returncode == 2
    if verb != ["recipe"]:  # the recipe is its argument
        assert "There is no 'params.yaml' here" in done.stderr
        assert "--recipe" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link"])
@pytest.mark.parametrize(
    "verb", [["plan"], ["compile"], ["compile", "--dvc"], ["identity"], ["run", "prepare"], ["repro"], *VERBS],
    ids=" ".join,
)  # fmt: skip
def test_something_else_at_the_place_of_the_runs(verb, kind, tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    place = tmp_path / "artifacts"
    place.touch() if kind == "file" else place.symlink_to(tmp_path / "gone")
    done = vitpipe(*verb, cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    said = (
        f"'artifacts' is a link to {tmp_path / 'gone'}, which does not exist"
        if kind == "link"
        else "is a file"
    )
    assert said in done.stderr
    assert str(place) in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", "params.yaml"]


def test_a_file_deeper_in_the_path_and_a_link_that_leads_somewhere(tmp_path):
    (tmp_path / "params.yaml").write_text(PARAMS)
    (tmp_path / "disk").mkdir()
    (tmp_path / "artifacts").symlink_to(tmp_path / "disk")
    assert vitpipe("plan", cwd=tmp_path).returncode == 0
    (tmp_path / "disk" / "itpn").touch()
    done = vitpipe("plan", cwd=tmp_path)
    assert done.returncode == 2
    assert "'artifacts/itpn' is a file" in done.stderr


@pytest.fixture
def only_prepared(tmp_path):
    """A project whose prepare stage has run, with DVC's placeholders for the others; the run's folder."""
    recipe = load_recipe("itpn/pixel_base", "demo")
    nodes, run = graph_of(recipe.stages), tmp_path / "artifacts" / "itpn" / "pixel_base" / "demo"
    card = Card(
        stage="prepare", recipe="itpn/pixel_base", profile="demo", recipe_digest="a", data_digest="b",
        code_digest="c", image="train", identity="d", parents={}, seed=0, libraries={},
    )  # fmt: skip
    with writing(run / "prepare") as folder:
        write_metrics(folder, {"images": 1.0})
        write_card(folder, card)
    place_dependencies(nodes, run)
    (tmp_path / "params.yaml").write_text("recipe: itpn/pixel_base\nprofile: demo\n")
    return run


def test_a_verdict_where_only_prepare_has_run_says_which_stages_have_not(only_prepared):
    project = only_prepared.parents[3]
    assert (only_prepared / "finetune").is_dir()
    for run in ((), (str(only_prepared),)):
        done = vitpipe("verdict", *run, cwd=project)
        assert done.returncode == 0, done.stderr
        assert "stage finetune did not run" in " ".join(done.stdout.split())
        assert "Report:" not in done.stdout
    assert list(open_results(load_recipe("itpn/pixel_base", "demo"), only_prepared).artifacts) == ["prepare"]


def test_a_stage_behind_one_that_has_not_run_says_so(only_prepared):
    done = vitpipe("run", "intermediate", cwd=only_prepared.parents[3])
    assert done.returncode == 2
    assert "The stage 'pretrain' has not run yet: its folder is empty" in done.stderr
    assert "move it away" not in done.stderr


def test_a_folder_with_something_foreign_in_it_is_still_refused(only_prepared):
    (only_prepared / "finetune" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not a finished stage output"):
        open_results(load_recipe("itpn/pixel_base", "demo"), only_prepared)
    with pytest.raises(ArtifactError, match="'probe' has not run yet: its folder is empty"):
        open_artifact(only_prepared / "probe", "probe")
