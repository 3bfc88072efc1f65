"""Addresses in a recipe: dumped without credentials, deciding nothing by them, refused where a path stands."""

from __future__ import annotations

import json

import pytest

from vitpipe.config.digest import digest_of, recipe_sections
from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.errors import RecipeError

PINNED = ["data.source=pinned", "data.pinned.revision=v1", "data.pinned.path=prepared"]


def recipe_with(password: str) -> Recipe:
    repo = f"https://me:{password}@host/a.git"
    url = f"https://paper/?token={password}"
    return load_recipe("itpn/pixel_base", "full", [*PINNED, f"data.pinned.repo={repo}", f"source.url={url}"])


def test_a_dumped_recipe_holds_no_password_and_the_loaded_one_does():
    recipe = recipe_with("hunter2")
    assert recipe.data.pinned.repo.secret == "https://me:hunter2@host/a.git"
    for text in (recipe.model_dump_json(), json.dumps(recipe.model_dump(mode="json")), repr(recipe)):
        assert "hunter2" not in text
        assert "https://me:***@host/a.git" in text
    again = Recipe.model_validate_json(recipe.model_dump_json())
    assert again.data.pinned.repo.secret == "https://me:***@host/a.git"


def test_the_password_decides_nothing():
    one, other = recipe_with("hunter2"), recipe_with("hunter3")
    assert digest_of(one) == digest_of(other)
    assert digest_of(recipe_sections(one, ["data"])) == digest_of(recipe_sections(other, ["data"]))
    moved = one.data.pinned.model_copy(update={"repo": type(one.data.pinned.repo)("https://elsewhere/a.git")})
    assert digest_of(moved) != digest_of(one.data.pinned)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.store=s3://key:hunter2@bucket/x", "must be s3://bucket/prefix or an absolute path"),
        ("data.store=s3://key:hun/ter2@bucket/x", "must be s3://bucket/prefix or an absolute path"),
        ("data.store=s3://bucket/x?token=hunter2", "AWS_SECRET_ACCESS_KEY"),
        ("data.root=https://me:hunter2@host/x", "'https://me:***@host/x' is an address"),
        ("pretrain.weights=https://me:hunter2@host/x", "'https://me:***@host/x' is an address"),
        ("data.pinned={repo: a, revision: b, path: c, remote: 'https://me:hunter2@h'}", "is an address"),
        (
            "data.pinned={repo: ['https://me:hunter2@host/x'], revision: b, path: c}",
            "'data.pinned.repo': a text is expected",
        ),
        ("data.pinned=https://me:hunter2@host/x", "data.pinned"),
        ("https://me:hunter2@host/x", "section.key=value"),
    ],
)
def test_where_no_address_can_stand_it_is_refused_without_its_password(override, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe("itpn/pixel_base", "full", [override])
    assert words in str(caught.value)
    for part in ("hunter2", "ter2"):
        assert part not in str(caught.value)
