"""The registry: read without torch, in agreement with the networks, with suggestions for misspelt names."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitpipe.config.recipe import ColumnsConfig, ModelConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.models.build import build_classifier, create_backbone
from vitpipe.models.registry import MODELS, find_model


def test_listing_needs_no_torch():
    code = "import sys, vitpipe.models.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", MODELS)
def test_entries_agree_with_the_networks(name):
    # `num_layers` and `decay_stated_for` are stated in both places, because the registry is read without torch.
    entry = MODELS[name]
    with torch.device("meta"):
        model = build_classifier(ModelConfig(name=name, image_size=entry.image_size), num_classes=2)
    assert (entry.name, entry.family) == (name, model.family)
    assert (entry.num_layers, entry.decay_stated_for) == (model.num_layers, model.decay_stated_for)
    layers = {model.layer_of(parameter) for parameter, _ in model.named_parameters()}
    assert {0, entry.num_layers - 1} <= layers <= set(range(entry.num_layers))


def test_another_familys_setting_is_refused():
    with pytest.raises(RecipeError, match="hivit_nano has no columns"):
        build_classifier(ModelConfig(name="hivit_nano", columns=ColumnsConfig()), num_classes=2)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'hivit_large'"):
        find_model("hivit_larg")
    with pytest.raises(RecipeError, match="give one of hivit_nano, hivit_base"):
        create_backbone("something else")
