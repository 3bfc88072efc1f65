"""Which datasets a recipe reads, what `data.sets: auto` stands for, and what is refused at reading."""

from __future__ import annotations

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.config.set_names import base_of, dataset_of, facts_files, sets_read
from vitpipe.contracts.errors import RecipeError
from vitpipe.datasets.subsets import views_among
from vitpipe.stages.resolved import training_steps

SHORT = ("stages=[prepare, finetune, evaluate, report]", "data.root=/data")


def full(*overrides: str) -> Recipe:
    return load_recipe("itpn/pixel_base", "full", overrides)


def test_each_stage_reads_the_set_of_its_section():
    recipe = full("finetune.dataset=cifar100")
    assert sets_read(recipe) == {
        "pretrain": "imagenet",
        "finetune": "cifar100",
        "probe": "imagenet",
        "detect": "coco",
        "segment": "ade20k",
        "evaluate": "cifar100",
    }
    assert recipe.data.sets == ("imagenet", "cifar100", "coco", "ade20k")
    assert dataset_of(recipe, "report") is None


def test_probe_and_evaluate_follow_their_weights():
    recipe = full("pretrain.dataset=cifar10", "start_from={probe: pretrain}")
    assert dataset_of(recipe, "probe") == "cifar10"
    assert dataset_of(recipe, "evaluate") == "imagenet"
    with_22k = load_recipe("revcolv2/base_22k", "full", ["stages=[prepare, intermediate, evaluate]"])
    assert dataset_of(with_22k, "evaluate") == "imagenet22k"


def test_auto_is_what_the_stages_read_and_no_more():
    assert full(*SHORT).data.sets == ("imagenet",)
    assert full(*SHORT, "finetune.dataset=flowers102").data.sets == ("flowers102",)
    # Prepared now for stages that run later.
    assert full("stages=[prepare]").data.sets == ("imagenet", "coco", "ade20k")
    # The section of a stage that the recipe does not write reads nothing, the one of a stage that it has does.
    with_video = full("stages=[prepare, pretrain, video]", "model.relative_position=false")
    assert with_video.data.sets == ("imagenet", "davis")
    # Resolved once: reading a written recipe again changes nothing.
    recipe = full(*SHORT, "finetune.dataset=imagenet100")
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_a_class_view_brings_the_whole_set():
    assert base_of("imagenet100") == base_of("imagenet10") == "imagenet"
    assert base_of("imagenet") is None
    assert base_of("birds") is None
    recipe = full(*SHORT, "finetune.dataset=imagenet100")
    assert recipe.data.sets == ("imagenet", "imagenet100")
    assert views_among(recipe.data.sets) == {"imagenet100": "imagenet"}
    # A list with the whole set is enough; a list without it has the classes packed by themselves.
    listed = full(*SHORT, "finetune.dataset=imagenet10", "data.sets=[imagenet]")
    assert listed.data.sets == ("imagenet", "imagenet10")
    alone = full(*SHORT, "finetune.dataset=imagenet10", "data.sets=[imagenet10]")
    assert views_among(alone.data.sets) == {}


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (
            ["finetune.dataset=cifar1000"],
            r"'finetune\.dataset'.*no dataset 'cifar1000'.*did you mean 'cifar100'",
        ),
        (["data.sets=[imagenet, cooc]"], r"no dataset 'cooc' \(did you mean 'coco'\?\)"),
        (["data.sets=[coco]"], r"'finetune' reads 'imagenet', which is not among data\.sets \(coco\)"),
        (["finetune.dataset=birds"], r"no dataset 'birds'.*data\.own_sets names yours"),
        (["data.own_sets={imagenet: classes}"], "'imagenet' is in the catalogue"),
        (["data.own_sets={my birds: classes}"], "'my birds' cannot name a set"),
        (["data.own_sets={birds: class}"], "no dataset 'class'"),
        (["data.source=embedded", "finetune.dataset=svhn"], r"no embedded 'svhn'.*data\.root"),
    ],
)
def test_mistakes_are_named_at_reading(overrides, what):
    with pytest.raises(RecipeError, match=what):
        full(*SHORT, *overrides)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        (
            "finetune.dataset=coco",
            r"'finetune' reads a set of images with classes, but 'coco' is a set in the",
        ),
        ("detect.dataset=ade20k", r"'detect' reads a set in the layout of coco, but 'ade20k'"),
        ("segment.dataset=cifar10", r"'segment'.*but 'cifar10' is a set of images with classes"),
    ],
)
def test_a_stage_with_a_set_of_another_kind_is_named_by_plan(override, what):
    with pytest.raises(RecipeError, match=what):
        training_steps(full(override), 1)


def test_own_sets_are_names_like_those_of_the_catalogue():
    recipe = full(*SHORT, "data.own_sets={birds: classes}", "finetune.dataset=birds")
    assert recipe.data.sets == ("birds",)
    assert dataset_of(recipe, "evaluate") == "birds"
    with pytest.raises(RecipeError, match="did you mean 'birds'"):
        full(*SHORT, "data.own_sets={birds: classes}", "finetune.dataset=bird")


def test_names_are_those_of_the_facts_files():
    assert list(facts_files()) == sorted(facts_files())
    assert all(path.name == f"{name}.yaml" for name, path in facts_files().items())
