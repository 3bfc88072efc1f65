"""Recipes are read strictly, merged in the stated order, and every mistake is reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.params_file import load_params
from vitpipe.config.read import (
    NAME,
    load_recipe,
    merge,
    parse_override,
    profile_names,
    read_mapping,
    recipe_names,
    run_folder,
)
from vitpipe.contracts.errors import RecipeError

ROOT = Path(__file__).parents[2]
INVALID = sorted((ROOT / "tests" / "invalid").glob("*.yaml"))
TREES = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=8,
).filter(lambda value: isinstance(value, dict))


@pytest.mark.parametrize("path", INVALID, ids=lambda p: p.stem)
def test_invalid_recipe_is_refused_with_its_message(path: Path, tmp_path: Path):
    good = yaml.safe_load((ROOT / "vitpipe/recipes/itpn/pixel_base.yaml").read_text())
    text = path.read_text()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(merge(good, yaml.safe_load(text))))
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe), "full")
    expected = [
        line.removeprefix("# expect: ") for line in text.splitlines() if line.startswith("# expect: ")
    ]
    assert expected
    for part in expected:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.fix


# They end in pre-training or in a linear classifier, for which no table has a row of this length.
WITHOUT_ROWS = ("selfpatch/coco", "selfpatch/dino")


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_at_every_profile(name: str, profile: str):
    recipe = load_recipe(name, profile)
    assert (recipe.name, recipe.profile) == (name, profile)
    assert recipe.expect or name.startswith(WITHOUT_ROWS)
    assert recipe.source.tables


def test_precedence_is_recipe_then_profile_then_family_profile_then_override():
    full, demo = load_recipe("itpn/pixel_base", "full"), load_recipe("itpn/pixel_base", "demo")
    assert full.model.name == "hivit_base"
    assert demo.model.name == "hivit_nano"
    assert demo.data.source == "embedded"
    assert demo.pretrain.optim.betas == full.pretrain.optim.betas
    changed = load_recipe("itpn/pixel_base", "demo", ["pretrain.epochs=3", "pretrain.epochs=4", "seed=7"])
    assert (changed.pretrain.epochs, changed.seed) == (4, 7)
    assert changed.finetune == demo.finetune


def test_a_recipe_cannot_be_changed_once_read():
    recipe = load_recipe("itpn/pixel_base", "demo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3


@pytest.mark.parametrize(
    ("name", "profile", "part"),
    [
        ("itpn/pixel_bas", "demo", "did you mean 'itpn/pixel_base'?"),
        ("itpn/pixel_base", "dmo", "did you mean 'demo'?"),
        ("nowhere.yaml", "demo", "does not exist"),
        ("a" * 300 + ".yaml", "demo", "does not exist"),
        ("a; b", "demo", "a name has letters, digits and _ - . / only"),
        ("../itpn/pixel_base", "demo", "There is no recipe"),
        ("/itpn/pixel_base", "demo", "There is no recipe"),
        ("", "demo", "There is no recipe ''"),
        ("a\nb.yaml", "demo", "The recipe 'a\\\\nb.yaml' holds a line break"),
        ("a\u202eb", "demo", "does not print"),
        ("https://me:secret@host/a.yaml", "demo", "'https://me:\\*\\*\\*@host/a.yaml' is an address"),
        ("itpn/pixel_base", "de\nmo", "The profile 'de\\\\nmo' holds a line break"),
        ("itpn/pixel_base", "../demo", "There is no profile '../demo'"),
    ],
)
def test_unknown_names_are_refused(name: str, profile: str, part: str):
    with pytest.raises(RecipeError, match=part.replace("?", r"\?")) as caught:
        load_recipe(name, profile)
    assert str(caught.value).isprintable()
    assert "secret" not in str(caught.value)


def test_our_own_names_have_the_stated_letters():
    assert all(NAME.fullmatch(name) for name in (*recipe_names(), *profile_names()))


def test_the_folder_of_a_run():
    assert run_folder("itpn/pixel_base", "demo") == Path("artifacts/itpn/pixel_base/demo")
    assert run_folder("my recipes/a.yaml", "full", Path("x")) == Path("x/my recipes/a.yaml/full")
    assert run_folder("/abs/a.yaml", "full") == Path("artifacts/abs/a.yaml/full")
    for recipe in ("../a.yaml", "a/../../b.yaml", "a\\${b}.yaml"):
        with pytest.raises(RecipeError, match=r"can have no folder below artifacts.*--out"):
            run_folder(recipe, "demo")


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "a: [1\n", "- 1\n"])
def test_bad_yaml_names_the_file(text: str, tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path), "demo")
    assert "broken.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["seed", "=3", "a..b=3", "a=[1"])
def test_malformed_overrides_are_refused(text: str):
    with pytest.raises(RecipeError):
        parse_override(text)


@given(TREES, TREES, TREES)
def test_merging_is_associative_and_idempotent(a, b, c):
    assert merge(merge(a, b), b) == merge(a, b)
    assert merge(a, {}) == a
    assert merge(merge(a, b), c).keys() == merge(a, merge(b, c)).keys()


def test_params_file_of_the_repository_is_valid():
    params = load_params(ROOT / "params.yaml")
    assert load_recipe(params.recipe, params.profile, params.overrides)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("recipe: a\nprofil: demo\n", "did you mean 'profile'?"),
        ("recipe: 3\nprofile: demo\n", "'recipe' is missing or not a text"),
        ("recipe: a\nprofile: demo\noverrides: {a: 1}\n", "'overrides' must be a list"),
        ("recipe: a\nprofile: demo\n", "There is no recipe 'a'. Where: 'recipe' in "),
        ("recipe: no such.yaml\nprofile: demo\n", "The recipe file 'no such.yaml' does not exist"),
        ('recipe: itpn/pixel_base\nprofile: "$(touch x)"\n', "There is no profile '$(touch x)'"),
        ('recipe: "a\\nb"\nprofile: demo\n', "The recipe 'a\\nb' holds a line break"),
    ],
)
def test_params_file_mistakes(text: str, part: str, tmp_path: Path):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_params(path)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("seed: 3", ["seed=3"]),
        ("seed: null\nfinetune: {epochs: null, optim: {base_lr: null}}", []),
        ("finetune:\n  epochs: 5\n  optim: {base_lr: 1e-4}", ["finetune.epochs=5", "finetune.optim.base_lr=1e-4"]),
        ("stages: [prepare, report]", ['stages=["prepare", "report"]']),
        ("pretrain: {method: {mask_ratio: 0.5}}", ["pretrain.method.mask_ratio=0.5"]),
        ("data: {root: '~/data', pinned: {revision: '0123'}}", ["data.root=~/data", 'data.pinned.revision="0123"']),
        ("finetune: {precision: off}", ["finetune.precision=off"]),
        ("summary: 'null'", ['summary="null"']),
        ("seed: 1\noverrides: [seed=2, probe.weights=null]", ["seed=1", "seed=2", "probe.weights=null"]),
        ("finetune: {}", ["finetune={}"]),  # which changes nothing
    ],
)  # fmt: skip
def test_keys_of_the_recipe_in_the_params_file(text, overrides, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(f"recipe: itpn/pixel_base\nprofile: demo\n{text}\n")
    assert list(load_params(path).overrides) == overrides


VALUES = st.recursive(
    # NUL and half surrogate pairs are refused.
    st.integers()
    | st.floats(allow_nan=False)
    | st.booleans()
    | st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(["seed", "model", "finetune"]), VALUES, max_size=3))
def test_values_of_the_params_file_are_read_as_they_were_written(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(yaml.safe_dump({"recipe": "itpn/pixel_base", "profile": "demo", **values}), "utf-8")
    written = read_mapping(path)
    for text in load_params(path).overrides:
        ((key, value),) = parse_override(text).items()
        assert value == written.pop(key)
    assert set(written) == {"recipe", "profile"}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("finetun: {epochs: 3}", "'finetun' is not a key of params.yaml (did you mean 'finetune'?)"),
        ("finetune.epochs: 3", "write `finetune: {epochs: ...}`"),
        ("finetune: {optim.base_lr: 3}", "the key 'optim.base_lr' below 'finetune' holds . or ="),
        ("name: x", "'name' is not a key of params.yaml"),
        ("seed: " + "[" * 5000, "nested too deeply"),
    ],
)
def test_wrong_keys_in_the_params_file(line, part, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(f"recipe: itpn/pixel_base\nprofile: demo\n{line}\n")
    with pytest.raises(RecipeError) as caught:
        load_params(path)
    assert part in str(caught.value)


def test_an_empty_mapping_is_no_number(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("recipe: itpn/pixel_base\nprofile: demo\nfinetune: {}\nseed: {}\n")
    chosen = load_params(path)
    with pytest.raises(RecipeError, match="'seed': Input should be a valid integer"):
        load_recipe(chosen.recipe, chosen.profile, chosen.overrides)


def test_a_key_that_stands_in_a_section_below_is_found():
    with pytest.raises(RecipeError, match=r"did you mean 'optim\.drop_epochs'"):
        load_recipe("itpn/pixel_base", "demo", ("detect.lr_drop_epochs=[1]",))
    with pytest.raises(RecipeError, match=r"'pretrain\.base_lr' .*did you mean 'optim\.base_lr'"):
        load_recipe("itpn/pixel_base", "demo", ("pretrain.base_lr=1",))
