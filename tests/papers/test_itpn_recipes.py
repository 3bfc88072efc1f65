"""The recipes of iTPN against what its supplement states, and every published number against the recipes."""

from __future__ import annotations

from typing import Any

import pytest

from vitpipe.config.read import load_recipe, recipe_files, variant_names
from vitpipe.config.recipe import Recipe
from vitpipe.papers.published import find_row, rows

PAPER = "itpn"
KEY = "finetune.optim.layer_decay"
FILES = sorted(name for name in recipe_files() if name.startswith("itpn/"))


def recipe(name: str) -> Recipe:
    return load_recipe(f"itpn/{name}", "full", ["data.root=."])


@pytest.fixture(scope="module")
def claims() -> list[tuple[str, Any, dict[str, Any]]]:
    """Recipe, expectation and row of every claim."""
    return [
        (name, item, find_row(PAPER, item.where))
        for file in FILES
        for name in variant_names(file)
        for item in load_recipe(name, "full", ["data.root=."]).expect
    ]


# Other authors' rows of the main tables, printed beside iTPN's for comparison; MAE's on ViT-B are claimed.
OTHERS = {"BEiT", "CAE", "PeCo", "MaskFeat", "SimMIM", "data2vec", "ConvMAE", "HiViT", "MVP", "BEiT-v2"} | {
    "MoCo-v3",
    "DINO",
    "iBoT",
}


def needs_no_recipe(row: dict[str, Any]) -> str:
    """Why a published row is no result of a training here; empty for one that has to be claimed."""
    if row["metric"].startswith("hyperparameter: "):
        return "a setting: of the recipes, whose results stand in the main tables"
    if row["table"] == "12":
        return "throughput: vitpipe benchmark throughput vit_base hivit_base"
    if row["metric"] == "FLOPs":
        return "vitpipe cost RECIPE --stage detect --image-size 640"
    if row["method"] == "MAE-L" or (row["method"], row["variant"]) == ("MAE", "ViT-L"):
        return "another paper's network, for comparison; its parameters: docs/itpn-costs.md"
    if row["table"].startswith("repository-") and row["method"] in OTHERS:
        return "another paper's result, for comparison"
    return ""


def test_every_number_is_claimed_or_needs_no_recipe(claims):
    found = [row for _, _, row in claims]
    wanted = [row for row in rows(PAPER) if not needs_no_recipe(row)]
    assert [row for row in wanted if row not in found] == []
    assert [row for row in found if needs_no_recipe(row)] == []
    by_table: dict[str, int] = {}
    for row in wanted:
        by_table[row["table"]] = by_table.get(row["table"], 0) + 1
    # 11: three methods x three tasks; 13: box AP and parameters of three detectors.
    assert by_table == {"11": 9, "13": 6, "repository-1": 20, "repository-2": 23, "repository-news": 1}


def test_a_row_is_claimed_twice_only_by_searched_values(claims):
    for row in rows(PAPER):
        own = [(name, item) for name, item, claimed in claims if claimed == row]
        if row["metric"] != "top-1 accuracy":
            # Detection and segmentation do not depend on fine-tuning: variants that share them claim one run.
            continue
        if len(own) > 1:
            assert {item.searched for _, item in own} == {KEY}, row
            decays = [
                load_recipe(name, "full", ["data.root=."]).finetune.optim.layer_decay for name, _ in own
            ]
            assert len(set(decays)) == len(decays) == 3, row


def settings(table: str) -> dict[tuple[str, str], Any]:
    """(column, name of the setting) -> its printed value."""
    return {
        (row["variant"], row["metric"].removeprefix("hyperparameter: ")): row["value"]
        for row in rows(PAPER)
        if row["table"] == table
    }


@pytest.mark.parametrize(
    ("table", "column", "names"),
    [
        (
            "8",
            "pixel, base",
            ["layer_decay/base/400/decay_45", "pixel_base", "layer_decay/base/1600/decay_55"],
        ),
        (
            "8",
            "pixel, large",
            ["layer_decay/large/1600/decay_50", "pixel_large", "layer_decay/large/400/decay_60"],
        ),
        ("8", "pixel, base", [f"vit_base/itpn/400/decay_{value}" for value in (45, 50, 55)]),
        ("10", "CLIP, base", [f"clip_base/300/decay_{value}" for value in (45, 50, 55)]),
        ("10", "CLIP, large", [f"clip_large/clip_l16/decay_{value}" for value in (50, 55, 60)]),
    ],
)
def test_fine_tuning_has_the_printed_values(table, column, names):
    printed = {name: value for (where, name), value in settings(table).items() if where == column}
    assert [recipe(name).finetune.optim.layer_decay for name in names] == printed["layer decay"]
    for name in names:
        section = recipe(name).finetune
        optim, augment = section.optim, section.augment
        assert (section.epochs, optim.base_lr) == (printed["training epochs"], printed["base learning rate"])
        assert list(optim.betas) == printed["betas"]
        assert (optim.weight_decay, section.global_batch) == (printed["weight decay"], printed["batch size"])
        assert (optim.warmup_epochs, section.drop_path) == (
            printed["warmup epochs"],
            printed["stochastic depth"],
        )
        assert section.method.label_smoothing == printed["label smoothing"]
        assert (augment.mixup_alpha, augment.cutmix_alpha) == (printed["mixup"], printed["cutmix"])
        assert (augment.rand_augment, printed["augmentation"]) == ("rand-m9-mstd0.5-inc1", "RandAug (9, 0.5)")
        assert recipe(name).model.relative_position == printed["relative positional embedding"]
        assert recipe(name).model.image_size == printed["input resolution"]
        if table == "10":
            assert optim.min_lr == printed["minimal learning rate"]
            assert (augment.erase_probability, optim.clip_grad_norm) == (printed["erasing probability"], None)


@pytest.mark.parametrize(
    ("own", "whole"),
    [
        ("layer_decay/base/1600/decay_45", "pixel_base"),
        ("layer_decay/large/1600/decay_60", "pixel_large"),
        ("layer_decay/base/400/decay_50", "pixel_base"),
        ("layer_decay/large/400/decay_55", "pixel_large"),
    ],
)
def test_the_sweep_changes_layer_decay_and_epochs_only(own, whole):
    ours, theirs = recipe(own), recipe(whole)
    assert ours.model == theirs.model
    decay = {"layer_decay": theirs.finetune.optim.layer_decay}
    optim = ours.finetune.optim.model_copy(update=decay)
    assert ours.finetune.model_copy(update={"optim": optim}) == theirs.finetune
    assert ours.pretrain.model_copy(update={"epochs": 1600}) == theirs.pretrain
    assert ours.pretrain.epochs == (400 if "/400/" in own else 1600)


def test_mae_and_itpn_of_table_11_differ_in_what_the_ledger_says():
    ours, mae = recipe("vit_base/itpn/400/decay_50"), recipe("vit_base/mae/400/decay_65")
    assert (ours.pretrain, ours.segment) == (mae.pretrain, mae.segment)
    assert recipe("vit_base/mae/1600/decay_65").pretrain.epochs == 1600
    changed = {"levels": "last", "relative_position": False}
    assert ours.model.model_copy(update=changed) == mae.model
    neck = ours.detect.head.model_copy(update={"neck": "fpn"})
    assert ours.detect.model_copy(update={"head": neck}) == mae.detect
    # The command of MAE's authors.
    assert (mae.finetune.optim.layer_decay, mae.finetune.drop_path, mae.finetune.optim.min_lr) == (
        0.65,
        0.1,
        1e-6,
    )


def test_a_plain_network_is_pre_trained_as_hivit_is():
    plain, base = recipe("vit_base/itpn/400/decay_50"), recipe("pixel_base")
    assert plain.pretrain == base.pretrain.model_copy(update={"epochs": 400})
    assert (plain.finetune, plain.detect, plain.segment) == (base.finetune, base.detect, base.segment)
    assert (plain.model.pyramid, plain.model.decoder) == (base.model.pyramid, base.model.decoder)


@pytest.mark.parametrize("table", ["11", "13", "repository-2"])
def test_a_published_table_can_be_planned(table):
    from vitpipe.tables.table_plan import plan_table

    plan = plan_table(PAPER, table, "demo")
    own = [row for row in plan.rows if not needs_no_recipe(row.published)]
    assert own
    assert all(row.claims for row in own)


def test_the_ledger_names_the_cascade_that_cannot_be_built():
    (text,) = [text for text in recipe("coco_clip/cascade_3x").discrepancies if "cannot be built" in text]
    assert "single-stage head" in text
