"""Masked pre-training on a frozen teacher's features: loss, guesses beside it, the teacher, its identity."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from clip_files import openai_state, save_torchscript, small_tower
from pydantic import ValidationError
from safetensors.torch import save_file
from self_supervised_runs import FEATURES, build, section
from torch.nn import functional as F

from vitpipe.config.own_files import own_files
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import ArtifactError, CheckpointError, RecipeError
from vitpipe.contracts.graph import all_stages
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.masked_features import frozen_teacher
from vitpipe.models.clip.tower import CLIP_MEAN, CLIP_STD, TOWERS
from vitpipe.stages.identity import forecast
from vitpipe.stages.output_folders import check_output_folders
from vitpipe.stages.weights_identity import weights_identity
from vitpipe.train.ranks import Ranks

DEMO = "itpn/clip_base/300/decay_50"


def _batch(num_images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    shown = torch.randn(num_images, 3, 32, 32, generator=generator)
    mask = torch.zeros(num_images, 4).index_fill(1, torch.tensor([2]), 1.0)
    where = torch.arange(num_images)
    return Batch((images, shown, mask), torch.zeros_like(where), where, Moment(0, 0, 60, 6))


def test_the_loss_is_smooth_l1_of_both_heads_over_all_units():
    method, batch = build(FEATURES).eval(), _batch()
    target = method.teacher.targets(batch.views[1])
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 4), atol=1e-5, rtol=0.0)
    main, early = method.model(batch.images, batch.views[2])
    found = method.losses(batch)
    assert found["main_loss"] == pytest.approx(F.smooth_l1_loss(main, target).item(), rel=1e-5)
    assert found["early_loss"] == pytest.approx(F.smooth_l1_loss(early, target).item(), rel=1e-5)
    torch.testing.assert_close(found["loss"], found["main_loss"] + found["early_loss"])


def test_the_teacher_is_in_no_state_and_in_no_optimiser_group():
    method = build(FEATURES)
    assert not [name for name in method.resume_state() if name.startswith("teacher.")]
    names = [name for group in method.groups(section(FEATURES).optim) for name in group["names"]]
    assert names
    assert not [name for name in names if name.startswith("teacher.")]
    decays = {n: group["decays"] for group in method.groups(section(FEATURES).optim) for n in group["names"]}
    assert not decays["model.backbone.absolute_position"]
    assert decays["model.predictor.mask_token"]
    assert decays["model.backbone.stage16.0.attn.relative_table"]


def test_a_random_teacher_is_drawn_again_from_the_seed():
    first, second = build(FEATURES), build(FEATURES)
    assert torch.equal(first.teacher.tower.projection, second.teacher.tower.projection)


def test_guesses_beside_the_loss_and_the_random_teacher_is_named():
    method, batch = build(FEATURES), _batch(6)
    shown = Batch((batch.images,), batch.labels_B, batch.indices_B, batch.moment)
    judged = method.judge(lambda _: iter([shown]), Ranks(), "off")
    target = method.teacher.targets(method.teacher.seen(batch.images))
    mean = target.mean(0, keepdim=True).expand_as(target)
    assert judged.metrics["trivial_loss"] == pytest.approx(F.smooth_l1_loss(mean, target).item(), rel=1e-4)
    assert all(math.isfinite(value) for value in judged.metrics.values())
    # One vector of each image's own is known to the second guess.
    assert judged.metrics["shifted_trivial_loss"] < judged.metrics["trivial_loss"]
    (said,) = judged.warnings
    # In the log of the training, too, once.
    assert method.warnings({}, batch.moment) == [said]
    assert not method.warnings({}, batch.moment)
    assert "a teacher with random weights, not of CLIP" in said
    assert {"what": "teacher", "value": "random weights, no CLIP"} in judged.tables["teacher"]


def _with_small_towers(monkeypatch):
    """CLIP-B at the size of the random tower, so that a file of it is small."""
    small = dataclasses.replace(TOWERS["random"], name="clip_b16")
    monkeypatch.setitem(TOWERS, "clip_b16", small)
    monkeypatch.delitem(TOWERS, "random")


def test_a_teacher_from_a_file(tmp_path, monkeypatch):
    tower = small_tower(grid_side=7)
    _with_small_towers(monkeypatch)
    save_torchscript(openai_state(tower), tmp_path / "clip.pt")
    given = section(FEATURES, method={"teacher": {"name": "clip_b16", "file": str(tmp_path / "clip.pt")}})
    method, batch = build(FEATURES, given), _batch()
    method.begin()
    found = method.teacher.targets(batch.views[1])
    torch.testing.assert_close(found, tower.targets(batch.views[1]), atol=2e-2, rtol=2e-2)
    shown = Batch((batch.images,), batch.labels_B, batch.indices_B, batch.moment)
    judged = method.judge(lambda _: iter([shown]), Ranks(), "off")
    assert not judged.warnings
    rows = {row["what"]: row["value"] for row in judged.tables["teacher"]}
    assert rows["file"] == "clip.pt"
    assert len(rows["sha256"]) == 64
    (tmp_path / "clip.pt").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        build(FEATURES, given).begin()


@pytest.mark.parametrize("pixels", ["unit", "released"])
def test_the_teachers_pixels(pixels):
    given = section(FEATURES, method={"teacher": {"pixels": pixels}})
    teacher = build(FEATURES, given).teacher
    values = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    expected = ((values if pixels == "unit" else (values + 1) / 2) - mean) / std
    augment = section(FEATURES).augment
    own_mean, own_std = (torch.tensor(v).view(3, 1, 1) for v in (augment.mean, augment.std))
    torch.testing.assert_close(teacher.seen((values - own_mean) / own_std), expected, atol=1e-4, rtol=1e-4)
    # White is 1 under both mappings.
    table = torch.from_numpy(teacher.normalise.table[:, 255]).view(3, 1, 1)
    torch.testing.assert_close(table, (1 - mean) / std, atol=1e-5, rtol=1e-5)


def test_the_patches_are_the_networks_units():
    for name, size in (("clip_b16", 224), ("clip_l14", 196)):
        config = section(FEATURES, method={"teacher": {"name": name, "file": "a.pt"}}).method.teacher
        with torch.device("meta"):
            teacher = frozen_teacher.Teacher(config, grid_side=14, augment=section(FEATURES).augment)
        assert teacher.image_size == size


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"teacher": {"name": "clip_b16"}}, "teacher 'clip_b16' needs its weights"),
        ({"teacher": {"name": "random", "file": "a.pt"}}, "teacher 'random' reads no file"),
        ({"teacher": {"name": "clip_b32", "file": "a.pt"}}, "clip_b16"),
    ],
)
def test_a_wrong_teacher_is_a_mistake_of_the_recipe(method, words):
    with pytest.raises(ValidationError, match=words):
        section(FEATURES, method=method)


def test_masks_that_hide_everything_are_refused():
    with pytest.raises(RecipeError, match="masked_units is 16, but an image has 16 units"):
        load_recipe(DEMO, "demo", ["pretrain.method.masked_units=16"])


def _recipe(path):
    teacher = f"pretrain.method.teacher={{name: clip_b16, file: {path}}}"
    return load_recipe(DEMO, "demo", [teacher])


def test_the_file_is_part_of_a_trainings_identity_by_its_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(openai_state(small_tower(seed=1)), tmp_path / "one.safetensors")
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "one.safetensors").read_bytes())
    save_file(openai_state(small_tower(seed=2)), tmp_path / "two.safetensors")
    stage = all_stages()["pretrain"]
    relative, absolute, copy, other = (
        weights_identity(stage, _recipe(path), {})
        for path in ("one.safetensors", tmp_path / "one.safetensors", "copy.safetensors", "two.safetensors")
    )
    assert relative == absolute == copy
    differing = {key for key in relative if relative[key] != other[key]}
    assert differing == {"method.teacher.file"}
    assert own_files(_recipe("one.safetensors"), "pretrain").keys() == {"method.teacher.file"}
    assert "method.teacher.file" not in weights_identity(stage, load_recipe(DEMO, "demo"), {})


def test_no_output_replaces_the_file(tmp_path):
    save_file(openai_state(small_tower()), tmp_path / "clip.safetensors")
    recipe = _recipe(tmp_path / "clip.safetensors")
    with pytest.raises(ArtifactError, match=r"contains .* the file method.teacher.file of pretrain"):
        check_output_folders("pretrain", recipe, {}, tmp_path, None)


def test_a_missing_file_is_said_before_anything_runs(tmp_path):
    found = {item.stage: item for item in forecast(_recipe("nowhere/clip.pt"), tmp_path)}
    assert found["pretrain"].missing == "pretrain.method.teacher.file does not exist: nowhere/clip.pt"
