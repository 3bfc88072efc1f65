"""The networks by name: listed without torch, in agreement with what is built, mistakes named with the others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitpipe.config.model import ModelConfig, entries, find_model, model_config
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.models.build import build_classifier, create_backbone
from vitpipe.stages.resolved import resolved_rows

# Options that change the number of layer ids, and one of each family that does not.
VARIANTS = {
    "revcolv2_nano": {"columns": {"bottom_up": 3, "top_down": 1}},
    "revcolv2_base": {"columns": {"bottom_up": 1, "top_down": 4}},
    "revcol_micro": {"columns": {"memory_mode": "plain"}},
    "hivit_nano": {"pyramid": {"dense_depth": 1}},
}


def test_listing_and_resolving_need_no_torch():
    code = (
        "import sys; from vitpipe.config.model import entries; from vitpipe.config.read import load_recipe; "
        "from vitpipe.stages.resolved import resolved_rows; "
        "entries(); resolved_rows(load_recipe('itpn/pixel_base', 'full'), 8); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in entries()), *VARIANTS.items()], ids=str
)
def test_what_is_stated_agrees_with_the_networks(name, options):
    # `num_layers` and `decay_stated_for` are stated in both places, because recipes are resolved without torch.
    entry = entries()[name]
    config = model_config({"name": name, "image_size": entry.image_size, **options})
    with torch.device("meta"):
        model = build_classifier(config, num_classes=2)
    assert (entry.name, entry.family) == (name, model.family)
    assert (config.num_layers, entry.decay_stated_for) == (model.num_layers, model.decay_stated_for)
    layers = {model.layer_of(parameter) for parameter, _ in model.named_parameters()}
    assert {0, config.num_layers - 1} <= layers <= set(range(config.num_layers))


def test_the_table_of_layer_decay_follows_the_recipes_columns():
    more = load_recipe("revcolv2/base", "full", ["model.columns.bottom_up=4"])
    with torch.device("meta"):
        model = build_classifier(more.model, num_classes=2)
    rows = [row for row in resolved_rows(more, 8) if row.path.startswith("finetune.layer_lr.")]
    assert len(rows) == model.num_layers == 19
    peak = next(row.value for row in resolved_rows(more, 8) if row.path == "finetune.peak_lr")
    scales = model.layer_scales(more.finetune.optim.layer_decay)
    assert [row.value for row in rows] == pytest.approx([peak * scale for scale in scales])


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(RecipeError, match="did you mean 'hivit_large'"):
        find_model("hivit_larg")
    with pytest.raises(RecipeError, match=r"give one of .*hivit_nano, hivit_base"):
        create_backbone("something else")


def test_a_misspelt_name_is_one_of_the_recipes_mistakes():
    with pytest.raises(RecipeError, match="2 mistakes") as caught:
        load_recipe("itpn/pixel_base", "full", ["model.name=hivit_larg", "finetune.epochs=-1"])
    said = str(caught.value)
    assert "'model.name': There is no model 'hivit_larg' (did you mean 'hivit_large'?) (give one of" in said
    assert "'finetune.epochs': Input should be greater than 0" in said
    # A text is the scalar as written: 3 is a name, which no network has.
    with pytest.raises(RecipeError, match=r"'model\.name': There is no model '3'"):
        load_recipe("itpn/pixel_base", "full", ["model.name=3"])
    for wrong in ("model.name=null", "model.name=[hivit_base]"):
        with pytest.raises(RecipeError, match=r"'model\.name': a text is expected"):
            load_recipe("itpn/pixel_base", "full", [wrong])
    with pytest.raises(RecipeError, match="'model': keys and values are expected"):
        load_recipe("itpn/pixel_base", "full", ["model=hivit_base"])


def test_options_are_those_of_the_networks_family():
    with pytest.raises(RecipeError, match=r"'model\.columns' is not a known key(;|\.)"):
        load_recipe("itpn/pixel_base", "full", ["model.columns={}"])
    with pytest.raises(
        RecipeError, match=r"'model\.pyramid\.widht' is not a known key \(did you mean 'width'"
    ):
        load_recipe("itpn/pixel_base", "full", ["model.pyramid.widht=3"])
    with pytest.raises(RecipeError, match=r"'model\.head_init_st' is not.*did you mean 'head_init_std'"):
        load_recipe("itpn/pixel_base", "full", ["model.head_init_st=3"])


def test_what_another_network_leaves_behind_is_named_with_the_way_to_take_it_out():
    with pytest.raises(RecipeError, match=r"take out .*: model\.pyramid=null, model\.decoder=null; "):
        load_recipe("itpn/pixel_base", "full", ["model.name=revcolv2_base"])


def test_null_takes_out_the_options_of_another_family_only():
    other = ["model.name=revcolv2_base", "model.pyramid=null", "model.decoder=null"]
    recipe = load_recipe("itpn/pixel_base", "full", other)
    assert recipe.model == model_config({"name": "revcolv2_base"})
    assert "pyramid" not in recipe.model_dump()["model"]
    with pytest.raises(RecipeError, match=r"'model\.pyramit' is not a known key"):
        load_recipe("itpn/pixel_base", "full", ["model.pyramit=null"])


def test_all_options_are_written_and_read_again():
    for name in entries():
        config = model_config({"name": name})
        assert model_config(config.model_dump(mode="json")) == config
    written = load_recipe("itpn/pixel_base", "demo").model_dump(mode="json")["model"]
    assert written["pyramid"] == {"width": 32, "depth": 2, "dense_depth": 2}
    assert written["relative_position"] is True


def test_a_section_without_its_familys_options_is_refused():
    with pytest.raises(RecipeError, match="build the section by"):
        build_classifier(ModelConfig(name="hivit_nano"), num_classes=2)
