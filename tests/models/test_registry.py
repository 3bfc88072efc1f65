"""The list of networks: light to read, and it names the nearest for a misspelt one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vitpipe.errors import RecipeError
from vitpipe.models.registry import MODELS, create_backbone, find_model


def test_listing_needs_no_torch():
    code = "import sys, vitpipe.models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_and_entries_agree():
    from vitpipe.models.hivit import SHAPES

    assert list(MODELS) == list(SHAPES)
    for name, entry in MODELS.items():
        assert name == entry.name == entry.shape().name
        assert entry.num_blocks == sum(entry.shape().depths)


def test_a_misspelt_name_gets_its_neighbour():
    with pytest.raises(RecipeError, match="did you mean 'hivit_large'"):
        find_model("hivit_larg")
    with pytest.raises(RecipeError, match="hivit_nano, hivit_base"):
        create_backbone("something else")
