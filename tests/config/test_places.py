"""Mistakes in a recipe's values: where they stand, in words, and never a whole file in a message."""

from pathlib import Path

import pytest

from vitpipe.config.params_file import choose
from vitpipe.config.read import load_recipe, read_mapping
from vitpipe.contracts.errors import InputError, RecipeError, VitpipeError, shortened, with_short_values

LONG = "x" * 20_000
CHOICE = "recipe: itpn/pixel_base\nprofile: demo\n"


@pytest.fixture
def refused(tmp_path):
    """The error for a params file with these lines and these --set options."""

    def read(lines: str, *overrides: str) -> RecipeError:
        path = tmp_path / "params.yaml"
        path.write_text(CHOICE + lines)
        try:
            chosen = choose(None, None, overrides, path, default_profile="demo")
            load_recipe(chosen.recipe, chosen.profile, chosen.overrides)
        except RecipeError as error:
            return error
        raise AssertionError("was accepted")

    return read


@pytest.mark.parametrize(
    "lines",
    ["finetune: {epoch: 3}", "finetune: {epochs: -1}", "stages: [report, report]", "overrides: ['finetune.epoch=3']",
     "finetune: 3", "overrides: ['finetune.epochs']", "stages: [prepare, film, detect]", "finetune: {optim: {x: {y: 1}}}"],
)  # fmt: skip
def test_a_wrong_key_of_params_yaml_is_named_there(refused, tmp_path, lines):
    error = refused(lines)
    assert error.where == str(tmp_path / "params.yaml")
    assert "recipe itpn/pixel_base, profile" not in error.where


def test_the_place_of_every_mistake(refused, tmp_path):
    params = tmp_path / "params.yaml"
    error = refused("finetune: {epoch: 3, epochs: 5}", "pretrain.epochs=-1", "finetune.epochs=-1")
    assert error.where.split("; ") == ["--set", str(params)]
    assert f"'finetune.epoch' is not a known key (did you mean 'epochs'?) ({params})" in error.what
    assert "'finetune.epochs': Input should be greater than 0 (given: -1) (--set)" in error.what


def test_a_mistake_of_the_recipe_itself_stands_there(tmp_path):
    path = tmp_path / "mine.yaml"
    text = Path("vitpipe/recipes/itpn/pixel_base.yaml").read_text(encoding="utf-8")
    path.write_text(text + "\nsedd: 3\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(path), "demo", ["finetune.epochs=3"])
    assert error.value.where == "recipe mine.yaml, profile demo"


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("finetune: 3", "'finetune': keys and values are expected (given: 3)"),
        ("pretrain: []", "'pretrain': keys and values are expected"),
        ("finetune: {optim: 3}", "'finetune.optim': keys and values are expected"),
        ("expect: [3]", "'expect.0': keys and values are expected"),
        ("start_from: [3]", "'start_from': keys and values are expected"),
        ("stages: 3", "'stages': a list is expected"),
        ("summary: [3]", "'summary': a text is expected"),
    ],
)
def test_what_is_expected_is_said_in_words(refused, lines, words):
    error = refused(lines)
    assert words in error.what
    assert "instance of" not in str(error)
    assert "Config" not in str(error)


@pytest.mark.parametrize(
    ("lines", "key"), [("stages: [report, report]", "stages"), ("data: {sets: [coco, coco]}", "sets")]
)
def test_a_name_that_stands_twice(refused, lines, key):
    assert f"'{key}' names '" in refused(lines).what
    assert "twice" in refused(lines).what


@pytest.mark.parametrize(
    "lines",
    [f"seed: {LONG}", f"seed: {'3 ' * 9000}", f"model: {{name: {LONG}}}", f"pretrain: {{method: {LONG}}}",
     f"finetune: {{dataset: {LONG}}}", f"overrides: ['{LONG}']", f"overrides: ['{LONG}=3']", f"overrides: ['name={LONG}']",
     f"overrides: ['seed=[{LONG}']", f"overrides: ['finetune.{LONG}=3']", f"stages: [{LONG}]", f"expect: [{LONG}]",
     f"finetune: {{optim: {{layer_decay: [{'1,' * 9000}]}}}}", f"start_from: {{{LONG[:900]}: report}}",
     f"finetune: {{{LONG[:900]}: 3}}", f"{LONG[:900]}: 3", f"pretrain: {{method: {{name: classify, {LONG[:900]}: 3}}}}"],
    ids=lambda lines: lines[:24],
)  # fmt: skip
def test_no_message_shows_a_long_value_whole(refused, lines):
    error = refused(lines)
    assert "x" * 120 not in str(error)
    assert "3 " * 60 not in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: \0\n", 2), ("\0", 1), ("a: 1\n\nb: x\0y\n", 3)])
def test_a_character_that_yaml_does_not_allow(tmp_path, text, line):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_mapping(tmp_path / "r.yaml")
    assert error.value.where == f"{tmp_path / 'r.yaml'}, line {line}"
    assert "U+0000 (NUL)" in error.value.what


def test_short_values():
    assert shortened("short") == "short"
    assert shortened("two\nlines") == "two\\nlines"
    assert shortened(LONG) == "x" * 80 + "..."
    assert shortened("https://me:secret@host/" + LONG).startswith("https://me:***@host/xx")
    quoted = f"there is no method '{LONG}' (known: a); the recipe's own 'b' isn't it"
    assert (
        with_short_values(quoted)
        == f"there is no method '{'x' * 80}...' (known: a); the recipe's own 'b' isn't it"
    )
    prose = "the recipe's words " + "and words " * 30 + "of the stage's"
    assert with_short_values(prose) == prose
    path = f"the folder '/{'deep/' * 60}' is a file"
    assert with_short_values(path) == path
    assert len(str(InputError(f"'{LONG}' is wrong"))) < 120
    assert issubclass(InputError, VitpipeError)
