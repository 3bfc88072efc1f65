"""Recipe files of the user's: what they may not claim is refused before anything runs, and names are text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.compile import compile_pipeline
from vitpipe.config.read import load_recipe, recipe_files
from vitpipe.contracts.errors import RecipeError

RECIPE = "itpn/pixel_base"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a copy of our recipe with changes into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, first_line: str = "", **replaced: str) -> str:
        text = recipe_files()[RECIPE].read_text(encoding="utf-8")
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / name).write_text(f"{first_line}\n{text}", encoding="utf-8")
        return name

    return write


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitpipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("name: itpn/pixel_base", "'name' is 'itpn/pixel_base', which is another recipe"),
        ("name: revcol/supervised/tiny", "which is another recipe"),
        ("profile: full", "'profile' is 'full', and the run's is 'demo'"),
    ],
)
def test_a_file_does_not_pass_for_another_recipe(own, line, said):
    with pytest.raises(RecipeError, match=f"{said}.*take that line out"):
        load_recipe(own("mine.yaml", line), "demo")


def test_a_file_may_have_a_name_and_the_profile_of_the_run(own):
    assert (
        load_recipe(own("mine.yaml", "name: longer schedule\nprofile: demo"), "demo").name
        == "longer schedule"
    )


@pytest.mark.parametrize(
    "verb", [("plan",), ("identity",), ("compile", "--out", "p.yaml"), ("compile", "--dvc")]
)
def test_a_row_that_is_not_there_is_refused_before_the_training(own, tmp_path, verb):
    """By every verb that comes before it, not by the report."""
    name = own("mine.yaml", **{"method: iTPN,": "method: iTPNxx,"})
    done = call(*verb, "--recipe", name)
    assert done.returncode == 2
    assert "No published row of itpn matches" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_brackets_in_names_are_text(own):
    """rich would read them as markup: hide them, or raise."""
    for name, line, title in (("q[x].yaml", "", "q[x].yaml"), ("a.yaml", 'name: "x[/b]y"', "x[/b]y")):
        done = call("plan", "--recipe", own(name, line), "--set", "stages=[prepare]")
        assert done.returncode == 0, done.stderr
        assert f"{title}, profile demo" in done.stdout


@pytest.mark.parametrize("key", ["[bold]", "x[/b]", "finetune.[red]"])
def test_a_key_with_brackets_is_named(key):
    with pytest.raises(RecipeError) as caught:
        load_recipe(RECIPE, "demo", [f"{key}=1"])
    assert f"'{key}' is not a known key" in str(caught.value)


def test_a_folder_and_an_empty_graph(tmp_path):
    (tmp_path / "a.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(str(tmp_path / "a.yaml"), "demo")
    with pytest.raises(RecipeError, match="'stages' names no stage"):
        compile_pipeline(RECIPE, "demo", ["stages=[]"], tmp_path / "p.yaml")


def test_a_file_that_is_no_text_is_not_called_a_matter_of_rights(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_bytes(b"\x89PNG\r\n\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"not text in UTF-8 \(byte 0\).*give a YAML file"):
        load_recipe(str(file), "demo")
