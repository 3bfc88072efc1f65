"""A package carries the recipe: its tasks run where the recipe's file is not, and read what was compiled."""

from __future__ import annotations

import json
import random
import string
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from recipe_samples import SAMPLED_RECIPES

from pipelines.compile import compile_pipeline
from pipelines.package import check_arguments
from vitpipe.config.carried import MAX_CHARACTERS, carried_recipe, recipe_from
from vitpipe.config.pipeline_parameters import parameter_of, section_of
from vitpipe.config.read import load_recipe, profile_names, recipe_files
from vitpipe.config.yaml_core import read_yaml, write_yaml
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.run import identity_of

RECIPE, PROFILE = "itpn/pixel_base", "demo"


def carried(name: str, profile: str, *overrides: str) -> dict[str, str]:
    """Stage -> what its task carries."""
    recipe = load_recipe(name, profile, overrides)
    nodes = graph_of(recipe.stages, recipe.start_from)
    return {node.name: carried_recipe(name, recipe, node, nodes) for node in nodes}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A recipe file of the user's in the working folder, with a value of its own."""
    monkeypatch.chdir(tmp_path)
    text = recipe_files()[RECIPE].read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("epochs: 1600", "epochs: 1234"), encoding="utf-8")
    return path


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", SAMPLED_RECIPES)
def test_every_task_reads_what_decides_it_here(name, profile):
    overrides = ("data.root=/data", "seed=3")
    recipe = load_recipe(name, profile, overrides)
    found = carried(name, profile, *overrides)
    for node in graph_of(recipe.stages, recipe.start_from):
        there = recipe_from(name, profile, found[node.name], overrides)
        assert identity_of(there, node.stage) == identity_of(recipe, node.stage)
    # 3,100 today; with everything that a recipe may say in addition it stays below Kubeflow's limit.
    assert max(map(len, found.values())) < 5_000 < MAX_CHARACTERS


def test_an_edit_of_one_stage_leaves_those_before_it_cached(own):
    before = carried("mine.yaml", "full")
    text = own.read_text(encoding="utf-8")
    own.write_text(text.replace("  epochs: 100\n", "  epochs: 50\n").replace("summary:", "summary: Mine,"))
    after = carried("mine.yaml", "full")
    assert {stage for stage in before if before[stage] != after[stage]} == {"finetune", "evaluate", "report"}


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_a_file_of_the_users_is_not_needed_where_the_task_runs(own, kind):
    name = "mine.yaml" if kind == "relative" else str(own)
    package = compile_pipeline(name, "full", ["data.root=/data"], own.parent / "package.yaml")
    recipe = load_recipe(name, "full", ["data.root=/data"])
    own.unlink()
    for task in package.tasks:
        there = recipe_from(name, "full", task.constants["recipe_values"], ["data.root=/data"])
        assert there.name == recipe.name == name
        if task.stage == "pretrain":
            assert there.pretrain == recipe.pretrain
            assert there.pretrain.epochs == 1234


@pytest.mark.slow
def test_a_task_runs_without_the_file(own):
    """The command of the package, with Kubeflow's message in it, as a process."""
    sizes = ["train_images=20", "val_images=10", "intermediate_images=10"]
    overrides = [f"data.embedded.{size}" for size in sizes] + ["stages=[prepare]", "data.sets=[imagenet]"]
    package = compile_pipeline("mine.yaml", "demo", overrides, own.parent / "package.yaml")
    own.unlink()
    (task,) = package.tasks
    folder = own.parent / "task"
    message = {
        "inputs": {"parameterValues": {**task.constants, "overrides": package.parameters["overrides"]}},
        "outputs": {
            "artifacts": {
                name: {"artifacts": [{"name": name, "uri": str(folder / name)}]}
                for name in ("out", "metrics")
            },
            "outputFile": str(folder / "executor_output.json"),
        },
    }
    command = [sys.executable, "-m", *task.command]
    command[command.index("{{$}}")] = json.dumps(message)
    for name in ("recipe", "profile"):
        command[command.index(f"{{{{$.inputs.parameters['{name}']}}}}")] = task.constants[name]
    done = subprocess.run(command, cwd=own.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    artifact = open_artifact(folder / "out", "prepare")
    assert artifact.card.recipe == "mine.yaml"
    assert {row["dataset"] for row in artifact.tables()["splits"]} == {"imagenet"}


def test_datasets_of_all_stages_are_prepared():
    settings = ["data.source=folders", "data.sets=auto", "data.root=/data", "finetune.dataset=cifar100"]
    found = carried(RECIPE, PROFILE, *settings)
    there = recipe_from(RECIPE, PROFILE, found["prepare"], settings)
    assert "cifar100" in there.data.sets
    assert there.stages == ("prepare",)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages=[prepare]", r"'stages=\[prepare\]' changes the graph"),
        ("start_from.detect=finetune", "changes the graph"),
        ("finetune.dataset=cifar100", "names a dataset that the package does not prepare"),
        ("data.sets=[imagenet]", "names other datasets than those that the package prepares"),
        ("finetune.epoch=3", r"finetune\.epoch.*did you mean 'epochs'"),
        ("pretrain.method.mask_ratio=2", "less than 1"),
        ("profile=full", "is no value of a recipe"),
    ],
)
def test_a_run_is_refused_before_it_starts(package, override, said):
    parameter = parameter_of(section_of(override))
    with pytest.raises(RecipeError, match=said):
        check_arguments(package, {parameter if parameter in package.parameters else "overrides": [override]})
    check_arguments(package, {"finetune_overrides": ["finetune.epochs=5"], "overrides": ["seed=9"]})
    with pytest.raises(InputError, match="not a list of texts"):
        check_arguments(package, {"overrides": override})


def test_an_override_of_another_stage_changes_nothing():
    text = carried(RECIPE, PROFILE)["pretrain"]
    assert recipe_from(RECIPE, PROFILE, text, ["finetune.epochs=7"]) == recipe_from(RECIPE, PROFILE, text, [])


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[:-40], lambda t: "!" + t, lambda t: "AAAA", lambda t: "ä", lambda t: t[:50] + "A" + t[51:]],
)
def test_a_damaged_text(damage):
    text = carried(RECIPE, PROFILE)["probe"]
    with pytest.raises(InputError, match="is damaged"):
        recipe_from(RECIPE, PROFILE, damage(text), [])


def test_a_recipe_that_is_too_long_is_refused_when_it_is_compiled(own):
    noise = random.Random(0)
    words = ["".join(noise.choices(string.ascii_letters, k=60)) for _ in range(300)]
    with own.open("a", encoding="utf-8") as file:
        file.write("".join(f"  - {word}\n" for word in words))
    text = own.read_text(encoding="utf-8")
    assert text.rstrip().endswith(words[-1])
    with pytest.raises(RecipeError, match="Kubeflow allows 10,000 in a parameter"):
        compile_pipeline("mine.yaml", PROFILE, [], own.parent / "package.yaml")
    assert not (own.parent / "package.yaml").exists()


def test_a_password_in_the_file_is_not_carried(own):
    values = yaml.safe_load(own.read_text(encoding="utf-8"))
    values["data"]["pinned"] = {"repo": "https://me:hunter2@host/a.git", "revision": "main", "path": "a"}
    own.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(InputError, match="contains credentials") as caught:
        compile_pipeline("mine.yaml", "full", ["data.root=/data"], own.parent / "package.yaml")
    assert "hunter2" not in str(caught.value)


# No recipe may hold NUL or half a surrogate pair: `read_yaml` refuses them.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    TEXT,
    st.sampled_from(["off", "0o17", "1:40", "0123", "1e3", "~", "<<", "null"]),
)
WRITTEN = st.sampled_from(["0123456", "12e4567", "0x1F", "0o17", "-.5", "+7", "1e-3", ".nan", "12."])


@given(
    st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)),
    st.lists(WRITTEN),
)
def test_what_is_written_is_read_again(value, numbers):
    text = write_yaml([value, read_yaml(f"[{', '.join(numbers)}]")])
    again, read = read_yaml(text)
    assert again == value
    assert [number.written for number in read] == numbers
