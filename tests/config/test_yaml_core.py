"""YAML 1.2 in files and overrides, texts as written, no true for a number; values that cannot be are refused."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vitpipe.config.params_file import load_params
from vitpipe.config.read import load_recipe, parse_override
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.config.yaml_core import plain, read_yaml
from vitpipe.contracts.errors import RecipeError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("off", "off"), ("yes", "yes"), ("on", "on"), ("no", "no"), ("y", "y"), ("0100", 100), ("1:40", "1:40"),
        ("1_000", "1_000"), ("1e-4", 1e-4), ("2026-01-01", "2026-01-01"), ("0x1F", 31), ("0o17", 15), ("~", None),
        ("", None), ("TRUE", True), ("-.5", -0.5), ("+3", 3), ("1.", 1.0), ("'12'", "12"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_the_core_schema(text, value):
    found = plain(read_yaml(text))
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000 + "]" * 5000,
        "{" * 5000,
        "? [a]\n: 1",
        "{[1, 2]: 3}",
        "a: 1\na: 2",
        "9" * 5000,
        "!!python/object:os.system x",
        "a: *b",
        "a: &x {b: *x}",
        "a: &x [1, {b: [*x]}]",
        "\t- x",
    ],
)
def test_what_is_no_recipe_is_one_kind_of_error(text, tmp_path):
    with pytest.raises(yaml.YAMLError):
        read_yaml(text)
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"not valid YAML|hold keys and values"):
        load_params(file)
    with pytest.raises(RecipeError, match="is not YAML"):
        parse_override(f"pretrain.epochs={text}")


def test_a_merge_key_brings_keys_that_those_beside_it_replace(tmp_path):
    assert plain(read_yaml("a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}")) == {
        "a": {"b": 1, "c": 2},
        "d": {"b": 3, "c": 2},
    }
    assert plain(read_yaml("a: &x {b: 1}\nc: &y {d: 2}\ne:\n  <<: [*x, *y]\n  f: 3"))["e"] == {
        "b": 1,
        "d": 2,
        "f": 3,
    }
    # The same anchor twice is no cycle.
    assert plain(read_yaml("a: &x [1]\nb: [*x, *x]"))["b"] == [[1], [1]]
    file = tmp_path / "params.yaml"
    file.write_text(
        "recipe: itpn/pixel_base\nprofile: demo\nfinetune: &stage {epochs: 3}\ndetect: {<<: *stage}\n"
    )
    assert {"finetune.epochs=3", "detect.epochs=3"} <= set(load_params(file).overrides)


# JSON writes others as pairs of surrogates, which YAML does not know; no text of ours holds NUL.
TEXT = st.text(st.characters(min_codepoint=1, max_codepoint=0xD7FF))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
        lambda part: st.lists(part) | st.dictionaries(TEXT, part),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_what_json_says_is_read_as_json_means_it(value):
    import json

    if "Infinity" not in (text := json.dumps(value)):
        assert plain(read_yaml(text)) == value


def overridden(*texts):
    return load_recipe("itpn/pixel_base", "demo", texts)


@pytest.mark.parametrize("written", ["0123456", "12e4567", "1_000", "7", "1.50", "0x10"])
def test_a_text_is_the_scalar_as_written(written):
    recipe = overridden(
        "data.source=pinned",
        "data.pinned={repo: ., path: p, revision: r}",
        f"data.pinned.revision={written}",
        f"data.root={written}",
    )
    assert recipe.data.pinned.revision == written
    assert str(recipe.data.root) == written


def test_off_is_a_precision():
    assert overridden("pretrain.precision=off").pretrain.precision == "off"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pretrain.epochs=yes", "'pretrain.epochs': Input should be a valid number"),
        ("pretrain.epochs=1:40", "'pretrain.epochs': Input should be a valid number"),
        ("pretrain.epochs=true", "'pretrain.epochs': true is no number"),
        ("model.image_size=false", "'model.image_size': false is no number"),
        ("detect.short_sides=[true]", "'detect.short_sides': true is no number"),
        ("pretrain.optim.betas=[0.9, true]", "true is no number"),
        ("pretrain.epochs=1e308", "'pretrain.epochs': a number beyond 1e36 is a mistake"),
        ("model.image_size=" + "9" * 400, "'model.image_size': a number beyond 1e36"),
        ("segment.resize_range=[0.5, 1e200]", "'segment.resize_range': a number beyond 1e36"),
        ("pretrain.epochs=.inf", "'pretrain.epochs'.*finite"),
        ("pretrain.optim.base_lr=.inf", "'pretrain.optim.base_lr'.*finite"),
        ("pretrain.optim.weight_decay=.nan", "'pretrain.optim.weight_decay'"),
        ("finetune.augment.color_jitter=.inf", "'finetune.augment.color_jitter'"),
        ("pretrain.augment.crop_scale=[0.9, 0.1]", "the lower end 0.9 is above the upper end 0.1"),
        ("segment.resize_range=[2, 0.5]", "the lower end 2 is above the upper end 0.5"),
        ("detect.jitter_range=[2, 0.1]", "the lower end 2 is above"),
        ("detect.short_sides=[]", "'detect.short_sides'"),
        ("detect.optim.drop_epochs=[9, 3]", "the epochs of the drops must rise"),
        ("model.image_size=65", "'model.image_size': the network needs a multiple of 16 pixels"),
        ("segment.crop_size=100", "segment.crop_size is 100, 'hivit_nano' needs a multiple of 16"),
        ("finetune.augment.rand_augment=banana", "not a policy in timm's notation"),
        ("finetune.augment.rand_augment=rand-m", "not a policy in timm's notation"),
        ("model.name=hivit_giga", "There is no model 'hivit_giga'"),
        ("data.sets=[coco]", "reads 'imagenet', which is not among data.sets"),
    ],
)
def test_values_that_no_run_could_use_are_refused_when_they_are_read(override, said):
    with pytest.raises(RecipeError, match=said):
        overridden(override)


@pytest.mark.parametrize("name", ["hivit_nano", "revcolv2_nano", "revcol_nano"])
def test_the_stated_multiple_is_the_one_that_the_network_needs(name):
    import torch

    from vitpipe.config.model import config_class, find_model
    from vitpipe.contracts.errors import InputError
    from vitpipe.models.build import build_classifier

    kind = config_class(find_model(name).family)
    fits = kind(name=name, image_size=2 * kind.stride + 32 // kind.stride * kind.stride)
    build_classifier(fits, num_classes=3)(torch.zeros(1, 3, fits.image_size, fits.image_size))
    # Past the section's own check, as a network of its own would be built.
    odd = kind.model_construct(**{**dict(fits), "image_size": fits.image_size + kind.stride // 2})
    with pytest.raises(InputError, match="multiple"):
        build_classifier(odd, num_classes=3)(torch.zeros(1, 3, odd.image_size, odd.image_size))


PART = st.one_of(
    st.integers(0, 10).map("m{}".format),
    st.floats(0, 3).map("mstd{:.2f}".format),
    st.integers(1, 10).map("mmax{}".format),
    st.integers(1, 4).map("n{}".format),
    st.floats(0, 1).map("p{:.2f}".format),
    st.sampled_from(["inc0", "inc1", "tweights", "t3aw", "t3a"]),
)


@given(st.lists(PART, max_size=6))
@settings(max_examples=80, deadline=None)
def test_every_policy_that_the_grammar_takes_is_one_of_timm(parts):
    from timm.data.auto_augment import rand_augment_transform

    text = "-".join(["rand", *parts])
    assert AugmentConfig(rand_augment=text).rand_augment == text
    rand_augment_transform(text, {})


@pytest.mark.parametrize(
    "text", ["augmix-m3", "rand-m9.5", "rand-x3", "rand--m9", "rand-mstd", "rand-m9-", "", "rand-w0"]
)
def test_no_other_policy_passes(text):
    with pytest.raises(ValueError, match="not a policy"):
        AugmentConfig(rand_augment=text)


def test_the_home_folder_is_filled_in(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(overridden("data.root=~/data").data.root) == "/somewhere/data"
    assert str(overridden("data.store=~/store").data.store) == "/somewhere/store"
    pinned = overridden("data.source=pinned", "data.pinned={repo: ~/made, revision: v1, path: x}").data.pinned
    assert pinned is not None
    assert str(pinned.repo) == "/somewhere/made"
    assert math.isfinite(overridden("pretrain.epochs=1e1").pretrain.epochs)
