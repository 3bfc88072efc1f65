"""Names that tell runs apart: the most telling values first, and never one name for two sets of values."""

from __future__ import annotations

import itertools
import re

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.config.run_name import overridden, run_title


def named(*overrides: str) -> str:
    return run_title(load_recipe("itpn/pixel_base", "demo", overrides))


@pytest.mark.parametrize(
    ("overrides", "title"),
    [
        ((), "(demo, seed 0)"),
        (("seed=3",), "(demo, seed 3)"),
        (("finetune.epochs=16",), "(demo, seed 0)"),  # the recipe's own value
        (("data.workers=0", "finetune.epochs=5"), "(demo, seed 0, finetune.epochs=5, data.workers=0)"),
        (("finetune.epochs=5.5",), "(demo, seed 0, finetune.epochs=5.5)"),
        (("finetune.optim.layer_decay=0.5",), "(demo, seed 0, finetune.optim.layer_decay=0.5)"),
        (("data.embedded.seed=1",), "(demo, seed 0, data.embedded.seed=1)"),
        (("detect.optim.layer_decay=null",), "(demo, seed 0, detect.optim.layer_decay=null)"),
        (("finetune.register_model=false",), "(demo, seed 0, finetune.register_model=false)"),
    ],
)
def test_a_name_says_what_was_overridden(overrides, title):
    assert named(*overrides) == f"itpn/pixel_base {title}"


def test_what_tells_most_comes_first_whatever_the_order_of_the_overrides():
    changes = (
        "finetune.log_every_steps=3", "finetune.optim.weight_decay=0.1", "data.embedded.seed=4",
        "model.decoder.depth=1", "finetune.optim.base_lr=0.01", "finetune.epochs=5",
    )  # fmt: skip
    names = {named(*order) for order in itertools.islice(itertools.permutations(changes), 0, 720, 90)}
    (name,) = names
    assert re.fullmatch(
        r"itpn/pixel_base \(demo, seed 0, finetune\.epochs=5, finetune\.optim\.base_lr=0\.01, "
        r"model\.decoder\.depth=1, 3 more #[0-9a-f]{8}\)",
        name,
    )
    keys = list(overridden(load_recipe("itpn/pixel_base", "demo", changes)))
    assert keys[3:] == ["data.embedded.seed", "finetune.optim.weight_decay", "finetune.log_every_steps"]


SHOWN = ("pretrain.epochs=1", "intermediate.epochs=1", "finetune.epochs=1")


def test_values_that_a_name_leaves_out_give_another_name():
    hidden = ("detect.optim.weight_decay=0.1", "detect.optim.weight_decay=0.2", "detect.optim.weight_decay=0.10000001",
              "data.workers=3", "stages=[prepare, pretrain, intermediate, finetune, detect, report]",
              "stages=[prepare, pretrain, intermediate, finetune, report]")  # fmt: skip
    names = [named(*SHOWN), *(named(*SHOWN, change) for change in hidden)]
    assert len(set(names)) == len(names)
    assert all(len(name) < 160 for name in names)


def test_long_values_that_begin_alike_give_other_names():
    lists = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10.5], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10.25])
    names = {named(f"finetune.optim.drop_epochs={values}") for values in lists}
    assert len(names) == 2
    assert all(len(name) < 110 for name in names)


def test_a_text_and_a_number_of_one_look_give_other_names():
    base = load_recipe("itpn/pixel_base", "demo")
    changed = [
        base.model_copy(update={"data": base.data.model_copy(update={"store": store})})
        for store in ("5", "5.0", "null", "", "x, data.workers=3")
    ]
    names = {run_title(recipe) for recipe in (base, *changed)}
    assert len(names) == 6


def test_a_recipe_whose_file_is_not_here_is_named_by_a_digest_of_its_values():
    first, second = (
        load_recipe("itpn/pixel_base", "demo", changes).model_copy(update={"name": "mine/elsewhere"})
        for changes in ((), ("finetune.epochs=5",))
    )
    assert overridden(second) == {}
    assert re.fullmatch(r"mine/elsewhere \(demo, seed 0, values #[0-9a-f]{8}\)", run_title(first))
    assert run_title(first) != run_title(second)
    assert run_title(first) == run_title(first.model_copy())


def test_what_a_run_does_not_read_is_not_in_its_name():
    few = "stages=[prepare, pretrain, report]"
    assert named(few, "pretrain.epochs=2", "finetune.epochs=9") == named(few, "pretrain.epochs=2")
    full = run_title(load_recipe("itpn/pixel_base", "demo", ("data.source=folders", "data.root=/data")))
    assert "data.source=folders" in full
    assert "embedded" not in full
