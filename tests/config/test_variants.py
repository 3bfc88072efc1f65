"""One recipe file with variants: names, holes, what a choice changes, and the rows that a variant claims."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from vitpipe.config.read import NAME, load_recipe, recipe_names, run_folder, variant_names
from vitpipe.contracts.errors import RecipeError
from vitpipe.papers.published import find_row

ROOT = Path(__file__).parents[2]
BASE = yaml.safe_load((ROOT / "vitpipe/recipes/itpn/pixel_base.yaml").read_text(encoding="utf-8"))
ROW = {"stage": "finetune", "metric": "top1", "tolerance": 0.3}
VARIANTS = {
    "backbone": {
        "base": {"label": "iTPN-B"},
        "large": {"label": "iTPN-L", "model": {"name": "hivit_large"}},
    },
    "length": {
        "short": {"finetune": {"epochs": 7}},
        "long": {"label": ", long", "finetune": {"epochs": 70, "global_batch": 512}},
    },
    "except": [{"backbone": "large", "length": "long"}],
}
EXPECT = [
    {
        **ROW,
        "where": {"variant": "${backbone}${length}", "network": "${model.name}", "n": "${finetune.epochs}"},
    },
    {**ROW, "where": {"variant": "only long"}, "when": {"length": "long"}},
]
NAMES = ("cells/grid/base/short", "cells/grid/base/long", "cells/grid/large/short")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a recipe file with variants into a plugin folder: recipe `cells/grid`."""
    (tmp_path / "plugin/recipes/cells").mkdir(parents=True)
    monkeypatch.setenv("VITPIPE_PLUGINS", str(tmp_path / "plugin"))

    def written(**changes) -> Path:
        path = tmp_path / "plugin/recipes/cells/grid.yaml"
        values = {
            **BASE,
            "variants": VARIANTS,
            "expect": EXPECT,
            "summary": "${backbone} for a table",
            **changes,
        }
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return path

    return written


def test_every_combination_that_is_left_has_a_name_of_its_own(write):
    write()
    assert variant_names("cells/grid") == NAMES
    assert set(NAMES) < set(recipe_names())
    assert "cells/grid" not in recipe_names()
    for name in NAMES:
        assert NAME.fullmatch(name)
        assert str(run_folder(name, "demo")) == f"artifacts/{name}/demo"
        assert load_recipe(name, "full").name == name


def test_a_choice_lays_its_values_over_the_file(write):
    write()
    long, large = load_recipe(NAMES[1], "full"), load_recipe(NAMES[2], "full")
    assert (long.model.name, long.finetune.epochs, long.finetune.global_batch) == ("hivit_base", 70, 512)
    assert (large.model.name, large.finetune.epochs) == ("hivit_large", 7)
    # What no choice names stays as in the file.
    assert long.finetune.optim == large.finetune.optim
    assert long.pretrain == load_recipe("itpn/pixel_base", "full").pretrain


def test_later_axes_profiles_and_overrides_win(write):
    variants = {
        "one": {"a": {"finetune": {"epochs": 3, "drop_path": 0.3}}},
        "two": {"b": {"finetune": {"epochs": 4}}},
    }
    path = write(variants=variants, expect=[], summary="plain")
    own = path.parent / "profiles/grid.demo.yaml"
    own.parent.mkdir()
    own.write_text("finetune: {epochs: 5}\n")
    section = load_recipe("cells/grid/a/b", "full").finetune
    assert (section.epochs, section.drop_path) == (4, 0.3)
    assert load_recipe("cells/grid/a/b", "demo").finetune.epochs == 5
    assert load_recipe("cells/grid/a/b", "demo", ["finetune.epochs=6"]).finetune.epochs == 6


@pytest.mark.parametrize("profile", ["full", "demo"])
def test_references_name_the_row_of_the_variant_at_any_profile(write, profile):
    write()
    # By hand: labels one after the other, and values as the file and the choices have them.
    wanted = [
        [{"variant": "iTPN-Bshort", "network": "hivit_base", "n": 7}],
        [{"variant": "iTPN-B, long", "network": "hivit_base", "n": 70}, {"variant": "only long"}],
        [{"variant": "iTPN-Lshort", "network": "hivit_large", "n": 7}],
    ]
    for name, rows in zip(NAMES, wanted, strict=True):
        loaded = load_recipe(name, profile, ["finetune.epochs=1"])
        assert [item.where for item in loaded.expect] == rows
        # A number stays one: published rows are compared by equality.
        assert isinstance(loaded.expect[0].where["n"], int)
    assert load_recipe(NAMES[2], profile).summary == "iTPN-L for a table"


def test_a_recipe_without_variants_may_refer_to_its_values(write):
    path = write(expect=[{**ROW, "where": {"network": "${model.name}"}}], summary="plain")
    values = yaml.safe_load(path.read_text())
    del values["variants"]
    path.write_text(yaml.safe_dump(values))
    assert load_recipe("cells/grid", "demo").expect[0].where == {"network": "hivit_base"}
    with pytest.raises(RecipeError, match="has no variants, so 'base' means nothing"):
        load_recipe("cells/grid/base", "demo")


def test_a_file_of_ones_own_is_chosen_by_its_path(write):
    path = write()
    loaded = load_recipe(f"{path}/large/short", "full")
    assert loaded.model.name == "hivit_large"
    with pytest.raises(RecipeError, match="one choice per axis"):
        load_recipe(str(path), "full")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (
            "cells/grid",
            ["one choice per axis", "backbone: base, large", "cells/grid/base/short", "vitpipe recipes"],
        ),
        ("cells/grid/base", ["one choice per axis"]),
        ("cells/grid/bse/short", ["'bse' is not a choice of backbone", "did you mean 'base'?"]),
        ("cells/grid/large/long", ["leave this combination out"]),
        ("cells/grid/base/short/x", ["one choice per axis"]),
        ("cells/gird/base/short", ["There is no recipe"]),
    ],
)
def test_a_wrong_name_says_what_there_is(write, name, parts):
    write()
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, "demo")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": None}, "at least one axis"),
        ({"variants": {"data": {"a": None}}}, "'data' cannot be the name of an axis"),
        ({"variants": {"loss": {"a/b": None}}}, "'a/b' of axis 'loss'"),
        ({"variants": {"loss": {True: None}}}, "'True' of axis 'loss'"),
        ({"variants": {"loss": ["a", "b"]}}, "no named choices"),
        ({"variants": {"loss": {"a": {"label": None}}}}, "the label of choice 'a' of axis 'loss' is no text"),
        ({"summary": "${model.name"}, "'summary': a reference has no end"),
        ({"variants": {"loss": {"a": 3}}}, "does not hold keys and values"),
        ({"variants": {**VARIANTS, "only": [{"backbon": "base"}]}}, "did you mean 'backbone'?"),
        ({"variants": {**VARIANTS, "only": [{"backbone": "bas"}]}}, "did you mean 'base'?"),
        ({"variants": {**VARIANTS, "only": []}}, "leave no combination"),
        ({"expect": [{**ROW, "where": {"a": "${modl.name}"}}]}, "did you mean 'model.name'?"),
        ({"expect": [{**ROW, "where": {"a": "${model}"}}]}, "'${model}' names no value"),
        ({"expect": [{**ROW, "where": {"a": "b"}, "when": {"lenth": "long"}}]}, "did you mean 'length'?"),
        ({"expect": [{**ROW, "where": {"a": "b"}, "when": {"length": "lon"}}]}, "did you mean 'long'?"),
        ({"summary": "${nothing}"}, "'summary': '${nothing}' names no value"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_of_the_recipe(write, changes, message):
    write(**changes)
    with pytest.raises(RecipeError) as caught:
        load_recipe("cells/grid/base/short", "demo")
    assert message in str(caught.value)


def test_all_mistakes_are_named_at_once(write):
    write(variants={"loss": {"a": 3, "b c": None}, "except": [{"los": "a"}]})
    with pytest.raises(RecipeError) as caught:
        variant_names("cells/grid")
    assert all(part in str(caught.value) for part in ("'a' of axis", "'b c' of axis", "'los' is not an axis"))


def test_the_example_of_the_docs_claims_published_rows(write):
    text = (ROOT / "docs/published-tables.md").read_text(encoding="utf-8")
    write(**yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0]))
    claimed = {
        name.removeprefix("cells/grid/"): [
            find_row("itpn", item.where)["value"] for item in load_recipe(name, "demo").expect
        ]
        for name in variant_names("cells/grid")
    }
    # The official repository's first table: top-1 accuracy, and millions of parameters where they are claimed.
    assert claimed == {"base/short": [85.1], "base/long": [85.5, 79], "large/long": [86.7, 288]}


def test_the_listing_counts_the_variants_of_a_file_and_lists_those_of_one(write):
    write()
    from typer.testing import CliRunner

    from vitpipe.cli import app

    rows = {row["recipe"]: row for row in json.loads(CliRunner().invoke(app, ["recipes", "--json"]).stdout)}
    assert rows["cells/grid"]["variants"] == 3
    assert rows["itpn/pixel_base"]["variants"] == ""
    listed = json.loads(CliRunner().invoke(app, ["recipes", "cells/grid", "--json"]).stdout)
    assert [(row["recipe"], row["model"]) for row in listed] == [
        (NAMES[0], "hivit_base"),
        (NAMES[1], "hivit_base"),
        (NAMES[2], "hivit_large"),
    ]
