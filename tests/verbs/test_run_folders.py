"""Verbs in an empty folder, and where something else stands at the place of the runs."""

import subprocess
import sys

import pytest

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
