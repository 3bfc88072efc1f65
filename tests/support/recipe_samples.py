"""Recipes for tests of what does not depend on the values that variants differ in."""

from __future__ import annotations

from vitpipe.config.read import recipe_files, variant_names

# Of a file with many variants the first and the last one.
SAMPLED_RECIPES = tuple(
    name
    for file in recipe_files()
    for name in dict.fromkeys([variant_names(file)[0], variant_names(file)[-1]])
)
