"""DINO, SelfPatch, EsViT, MoBY, MoBY + SelfPatch: what each step does, resumption, ranks, collapse."""

from __future__ import annotations

import math

import pytest
import torch
from short_runs import AUGMENT, SEED, packed_digits
from torch.nn import functional as F

from vitpipe.config.distillation_section import num_neighbours
from vitpipe.config.method import METHODS
from vitpipe.config.model import model_config
from vitpipe.config.named import settings_of
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.config.train_sections import OptimConfig
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import eval_batches, train_batches
from vitpipe.data.moment import Moment
from vitpipe.methods.collapse import CollapseWatch, effective_rank
from vitpipe.methods.distillation import Centre, cross_entropy
from vitpipe.methods.method import method_class
from vitpipe.models.families import family_of
from vitpipe.models.neighbours import nearest_neighbours, neighbour_table
from vitpipe.optim.optimiser import build_optimiser
from vitpipe.stages.pretrain.config import PretrainConfig
from vitpipe.train.checkpoint import StateFolder
from vitpipe.train.loop import train
from vitpipe.train.ranks import Ranks

NAMES = ("dino", "selfpatch", "esvit", "moby", "moby_selfpatch")
SMALL = {
    "dino": {"prototypes": 32, "head_hidden": 16, "head_width": 8},
    "moby": {"queue": 64, "head_hidden": 16, "head_width": 8},
}
CROPS = {"global_size": 32, "local_size": 24, "num_local": 2}


def section(name: str, *, global_batch: int = 16, epochs: float = 1, **changes) -> PretrainConfig:
    settings = dict(SMALL["moby" if name.startswith("moby") else "dino"])
    settings["crops"] = {**CROPS, "num_local": 0} if name.startswith("moby") else CROPS
    if "selfpatch" in name:
        settings["patch_prototypes"] = 24
    optim = OptimConfig(
        base_lr=2e-3,
        lr_reference_batch=None,
        clip_grad_norm=3.0,
        clip_each_tensor=not name.startswith("moby"),
    )
    return PretrainConfig(
        epochs=epochs,
        global_batch=global_batch,
        optim=optim,
        augment=AUGMENT,
        method={"name": name, **settings, **changes.pop("method", {})},
        log_every_steps=1,
        checkpoint_minutes=1e6,
        **changes,
    )


def model(name: str, **options):
    pooling = "class_attention" if "selfpatch" in name else "class_token"
    return model_config(
        {"name": "vit_nano", "image_size": 32, "patch_size": 8, "pooling": pooling, **options}
    )


def build(name: str, given: PretrainConfig | None = None, **options):
    torch.manual_seed(3)
    given, network = given or section(name), model(name, **options)
    kind = method_class(name)
    return kind.build(given.method, family_of(network), network, section=given, classes=("a",))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_digits(tmp_path_factory.mktemp("shards"))


def run(shards, states, name, *, micro_batch="auto", ranks=None, until=None, epochs=1.0):
    """Train; the method, and its losses step by step."""
    given = section(name, micro_batch=micro_batch, epochs=epochs)
    ranks, method, logger = ranks or Ranks(), build(name, given), MemoryLogger()
    plan = train_plan(
        given, path="short", num_images=len(shards), num_ranks=ranks.num_ranks, accelerator=Accelerator()
    )

    def batches(start):
        made = train_batches(
            shards, method.views(given.augment, 32), seed=SEED, global_batch=plan.global_batch,
            micro_batch=plan.micro_batch, rank=ranks.rank, num_ranks=ranks.num_ranks, start_step=start,
            num_steps=plan.num_steps, workers=0,
        )  # fmt: skip
        for batch in made:
            if until is not None and batch.moment.step == until:
                raise KeyboardInterrupt
            yield batch

    folder = StateFolder(states, "0" * 64, lambda line: None)
    optimiser = build_optimiser(method.groups(given.optim), given.optim)
    train(
        method, batches, plan, optimiser=optimiser, section=given, ranks=ranks, states=folder, logger=logger
    )
    return method, [value for _, name, value in logger.points if name == "train/loss"]


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_without_labels_and_the_result_is_complete(name, shards, tmp_path):
    method, losses = run(shards, tmp_path, name, epochs=3)
    assert all(map(math.isfinite, losses))
    results = method.results()
    assert {"weights", "heads"} <= set(results)
    kept = set(results["heads"].state_dict())
    assert any(key.startswith("teacher.") for key in kept)
    assert any("centre" in key or "queues" in key for key in kept)
    # Student and teacher have gone apart, and the teacher is what it should be: an average.
    fast, slow = method.model.state_dict(), method.teacher.model.state_dict()
    assert any(not torch.equal(fast[key], slow[key]) for key in fast)
    judged = method.judge(
        lambda split: eval_batches(shards, eval_transform(32, 1.0, AUGMENT), batch=20, rank=0, num_ranks=1, workers=0),
        Ranks(), "off",
    )  # fmt: skip
    assert math.isfinite(judged.metrics["loss"])
    assert judged.metrics["trivial_loss"] > 0
    assert 1.0 <= judged.metrics["feature_rank"] <= 64
    assert judged.tables["health"]


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_follows_and_never_learns(name, shards):
    method = build(name)
    method.begin()
    for key, tensor in method.teacher.model.state_dict().items():
        assert torch.equal(tensor, method.model.state_dict()[key])
    assert not any(p.requires_grad for p in method.teacher.parameters())
    names = [n for group in method.groups(section(name).optim) for n in group["names"]]
    assert names
    assert not any(n.startswith("teacher.") for n in names)


def test_prototypes_rest_in_the_first_epoch():
    method = build("dino")
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.before_update(Moment(0, 5, 60, 6))
    assert method.heads["image"].last_layer.weight_v.grad is None
    method.heads["image"].last_layer.weight_v.grad = torch.ones(32, 8)
    method.before_update(Moment(0, 6, 60, 6))
    assert method.heads["image"].last_layer.weight_v.grad is not None


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_cross_entropy_and_its_gradient(temperature):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 11, generator=generator, dtype=torch.float32).requires_grad_()
    target = 2.0 * torch.randn(7, 11, generator=generator).softmax(-1)
    expected = -(target * F.log_softmax(student / temperature, -1)).sum(-1)
    weights = torch.arange(7.0)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    found = cross_entropy(student, target, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), student)[0], gradient)


@pytest.mark.parametrize("grid", [(3, 3), (2, 5), (1, 4), (2, 2), (7, 3)])
def test_neighbours_on_small_grids(grid):
    rows, columns = grid
    table = neighbour_table(grid)
    assert table.shape == (rows * columns, num_neighbours(grid))
    for patch, found in enumerate(table.tolist()):
        row, column = divmod(patch, columns)
        expected = {
            ((row + down) % rows) * columns + (column + right) % columns
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        } - {patch}
        assert set(found) == expected
        assert len(found) == len(expected)
    tokens = torch.randn(2, rows * columns, 5, generator=torch.Generator().manual_seed(1))
    most = num_neighbours(grid)
    chosen = nearest_neighbours(tokens, grid, most)
    assert torch.equal(chosen.sort(-1).values, table.expand(2, -1, -1))
    similarity = F.cosine_similarity(tokens[0, 0], tokens[0], dim=-1)
    assert similarity[chosen[0, 0]].tolist() == sorted(similarity[table[0]].tolist(), reverse=True)
    with pytest.raises(InputError, match=f"has only {most}"):
        nearest_neighbours(tokens, grid, most + 1)


def test_the_queue_is_a_ring_and_the_target_moves_before_the_next_step():
    method = build("moby", section("moby", method={"queue": 32}))
    method.begin()
    before = method.queues.clone()
    for step in range(3):
        keys = F.normalize(torch.full((2, 16, 8), step + 1.0), dim=-1)
        method._keys.append(keys)
        method.after_step(Moment(0, step, 100, 10), Ranks())
    assert int(method.oldest) == 16
    # The third step has replaced the first one's keys; nothing of the start is left.
    assert not any(torch.equal(row, first) for row, first in zip(method.queues[0], before[0], strict=True))


def test_the_centre_is_a_mean_over_all_rows():
    centre = Centre(4, 0.9)
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    for part in rows.split([2, 5, 3]):
        centre.add(part)
    centre.update(Ranks())
    torch.testing.assert_close(centre.value, 0.1 * rows.mean(0))


def test_a_killed_run_continues_bit_for_bit(shards, tmp_path):
    for name in NAMES:
        whole, _ = run(shards, tmp_path / name / "whole", name)
        given = tmp_path / name / "parts"
        with pytest.raises(KeyboardInterrupt):
            run_saving(shards, given, name, until=3)
        resumed, _ = run(shards, given, name)
        expected = whole.resume_state()
        for key, tensor in resumed.resume_state().items():
            assert torch.equal(tensor, expected[key]), (name, key)


def run_saving(shards, states, name, until):
    """`run` that saves a state after every step."""
    import vitpipe.train.speedometer as speedometer

    original = speedometer.Speedometer.minutes_since_save
    speedometer.Speedometer.minutes_since_save = lambda self: math.inf
    try:
        run(shards, states, name, until=until)
    finally:
        speedometer.Speedometer.minutes_since_save = original


@pytest.mark.parametrize("name", ["dino", "selfpatch", "esvit"])
def test_micro_batches_change_rounding_only(name, shards, tmp_path):
    whole, losses = run(shards, tmp_path / "whole", name)
    parts, in_parts = run(shards, tmp_path / "parts", name, micro_batch=4)
    assert in_parts[0] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(parts.centre("image").value, whole.centre("image").value, atol=1e-3, rtol=1e-2)


def test_effective_rank():
    assert effective_rank(torch.eye(5)) == pytest.approx(5.0)
    one = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)).double()
    assert effective_rank(one.t() @ one) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("means", "words"),
    [
        ({"teacher_entropy": math.log(32), "teacher_mean_entropy": math.log(32)}, "the same share"),
        ({"teacher_entropy": 0.0, "teacher_mean_entropy": 0.0}, "the same output"),
        ({"teacher_entropy": 1.0, "teacher_mean_entropy": 3.0, "feature_rank": 1.01}, "have become the same"),
    ],
)
def test_a_collapse_is_said_once_with_its_causes(means, words):
    config = settings_of(METHODS, "dino")
    watch = CollapseWatch(32, 32)
    means = {"feature_rank": 20.0, **means}
    # At the start every network looks like this.
    assert not watch.warnings(means, Moment(0, 10, 1000, 10), config)
    (line,) = watch.warnings(means, Moment(0, 400, 1000, 10), config)
    assert words in line
    assert "Usual causes" in line
    assert not watch.warnings(means, Moment(0, 500, 1000, 10), config)
    sound = {"teacher_entropy": 1.0, "teacher_mean_entropy": 3.0, "feature_rank": 20.0}
    again = CollapseWatch(32, 32)
    assert not again.warnings(sound, Moment(0, 10, 1000, 10), config)
    # From a sound state it is no start any more.
    assert again.warnings(means, Moment(0, 20, 1000, 10), config)
