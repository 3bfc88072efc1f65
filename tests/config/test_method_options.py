"""The `method:` value of a recipe: by name or with options, laid over each other, wrong ones refused."""

from __future__ import annotations

import pytest

from vitpipe.config.digest import recipe_sections
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError

REVCOL = "revcol/supervised/tiny"  # whose networks can be built for either supervised method


def _method(*overrides: str, stage: str = "pretrain", profile: str = "full", recipe: str = "itpn/pixel_base"):
    return getattr(load_recipe(recipe, profile, overrides), stage).method


def test_options_are_those_of_the_named_method():
    assert (_method().name, _method().mask_ratio) == ("masked_pixels", 0.75)
    assert _method(profile="demo").mask_ratio == 0.5
    assert _method(stage="finetune").label_smoothing == 0.1
    assert _method(stage="intermediate", profile="demo").label_smoothing == 0.0


def test_later_options_add_up_for_the_same_method_and_replace_those_of_another():
    assert _method("pretrain.method.mask_ratio=0.6").mask_ratio == 0.6
    assert _method("pretrain.method=masked_pixels", profile="demo").mask_ratio == 0.5
    supervised = {"stage": "finetune", "recipe": REVCOL}
    assert _method("finetune.method.class_weight=0.2", **supervised).class_weight == 0.2
    to_classify = "finetune.method=classify"
    smooth = _method(to_classify, "finetune.method.label_smoothing=0.3", **supervised)
    assert (smooth.name, smooth.label_smoothing) == ("classify", 0.3)
    assert (
        _method("finetune.method.label_smoothing=0.3", to_classify, **supervised).label_smoothing
        == _method(to_classify, **supervised).label_smoothing
        == 0.1
    )
    same = "finetune.method={name: intermediate_supervision}"
    assert _method("finetune.method.label_smoothing=0.3", same, **supervised).label_smoothing == 0.3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.method=masked_pixel", "no method 'masked_pixel' (did you mean 'masked_pixels'?)"),
        ("pretrain.method.mask_ration=0.5", "no option 'mask_ration' (did you mean 'mask_ratio'?)"),
        ("pretrain.method.mask_ratio=1.5", "'pretrain.method.mask_ratio': Input should be less than 1"),
        (
            "finetune.method=masked_pixels",
            "'finetune.method': method 'masked_pixels' trains no classifier, as",
        ),
        (
            "intermediate.method={name: masked_pixels}",
            "(choose from: classify, drloc, intermediate_supervision)",
        ),
        ("pretrain.method=[1]", "'pretrain.method': give the name of a method"),
        ("finetune.method={name: classify, label_smoothing: x}", "'finetune.method.label_smoothing'"),
    ],
)
def test_wrong_methods_are_refused_by_name(override, message):
    with pytest.raises(RecipeError) as caught:
        _method(override)
    assert message in str(caught.value)


def test_options_are_part_of_the_identity():
    sections = [
        recipe_sections(load_recipe("itpn/pixel_base", "full", overrides), ["pretrain"])
        for overrides in ((), ("pretrain.method.mask_ratio=0.6",))
    ]
    method = sections[0]["pretrain"]["method"]
    assert (method["name"], method["mask_ratio"], method["target_norm"]) == ("masked_pixels", 0.75, "unit")
    assert sections[1]["pretrain"]["method"]["mask_ratio"] == 0.6
