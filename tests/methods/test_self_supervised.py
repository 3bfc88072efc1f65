"""DINO, SelfPatch, EsViT, MoBY, MoBY + SelfPatch: what each step does, resumption, ranks, collapse.

Resumption and ranks of a training on a frozen teacher's features, too.
"""

from __future__ import annotations

import math
import signal

import pytest
import torch
from self_supervised_runs import FEATURES, NAMES, build, child, run, section
from short_runs import AUGMENT, opened, packed_digits
from tiny_runs import free_port, run_processes
from torch.nn import functional as F

from vitpipe.config.distillation_section import num_neighbours
from vitpipe.config.method import METHODS
from vitpipe.config.named import settings_of
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import Batch, eval_batches
from vitpipe.data.moment import Moment
from vitpipe.methods import collapse
from vitpipe.methods.collapse import CollapseWatch, effective_rank
from vitpipe.methods.distillation import Centre, cross_entropy
from vitpipe.models.neighbours import nearest_neighbours, neighbour_table
from vitpipe.train.ranks import Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("unlabelled")
    packed_digits(place)
    return place


@pytest.fixture(autouse=True)
def _one_thread():
    """As the child processes: another number of threads adds up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(folder):
    return opened(folder)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, FEATURES])
def test_a_killed_process_continues_bit_for_bit(name, folder):
    """Teacher, heads, centres, queues: all that the method keeps is what an undisturbed run has."""
    whole, _ = run(opened(folder), folder / f"{name}-whole", name)
    assert run_processes(child, (folder, name, 3)) == [-signal.SIGKILL]
    assert run_processes(child, (folder, name, None)) == [0]
    found = torch.load(folder / f"{name}-0.pt", weights_only=True)
    assert len(found["losses"]) == 3  # of six steps: it did not begin anew
    for key, tensor in whole.resume_state().items():
        assert torch.equal(found["state"][key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "is_exact"), [("selfpatch", True), ("esvit", True), ("moby_selfpatch", False), (FEATURES, True)]
)
def test_two_ranks_are_one_rank_with_accumulation(name, is_exact, folder):
    """To the last bit without batch norm, which has the statistics of both ranks together."""
    place, port = folder / "ranks", free_port()
    place.mkdir(exist_ok=True)
    if not (place / "packed").exists():
        (place / "packed").symlink_to(folder / "packed")
    assert run_processes(child, *[(place, name, None, rank, 2, port) for rank in range(2)]) == [0, 0]
    saved = [torch.load(place / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]
    alone, losses = run(opened(folder), folder / f"{name}-alone", name, micro_batch=8 if is_exact else 16)
    # Where rounding differs, AdamW follows it in gradients that are nearly 0; the losses do not.
    assert saved[0]["losses"] == (losses if is_exact else pytest.approx(losses, rel=1e-3))
    for key, tensor in alone.resume_state().items():
        assert torch.equal(saved[0]["state"][key], saved[1]["state"][key]), key
        assert not is_exact or torch.equal(saved[0]["state"][key], tensor), key


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
    for step in (10, 20):
        assert not watch.warnings(means, Moment(0, step, 1000, 10), config)
    (line,) = watch.warnings(means, Moment(0, 400, 1000, 10), config)
    assert words in line
    assert "Usual causes" in line
    assert not watch.warnings(means, Moment(0, 500, 1000, 10), config)
    sound = {"teacher_entropy": 1.0, "teacher_mean_entropy": 3.0, "feature_rank": 20.0}
    again = CollapseWatch(32, 32)
    assert not again.warnings(sound, Moment(0, 10, 1000, 10), config)
    # From a sound state it is no start any more; one point is not enough.
    assert not again.warnings(means, Moment(0, 20, 1000, 10), config)
    assert again.warnings(means, Moment(0, 30, 1000, 10), config)


@pytest.mark.slow
def test_a_collapse_made_on_purpose_is_said_by_the_loop(shards, tmp_path, monkeypatch):
    """A teacher at a temperature of 10 gives all prototypes the same share, whatever it sees."""
    monkeypatch.setattr(collapse, "GRACE_EPOCHS", 2)  # what the grace is for has its own test
    monkeypatch.setattr(collapse, "GRACE_STEPS", 10)
    hot = {"teacher_temperature": 10.0, "warmup_teacher_temperature": 10.0}
    method, _ = run(shards, tmp_path, "dino", epochs=8, method=hot)
    (line,) = [line for line in method.said if "Collapse" in line]
    assert "the same share" in line
    assert "teacher_temperature (10) too high" in line
    judged = method.judge(
        lambda split: eval_batches(
            shards, eval_transform(32, 1.0, AUGMENT), batch=20, rank=0, num_ranks=1, workers=0
        ),
        Ranks(),
        "off",
    )
    assert judged.metrics["teacher_entropy"] == pytest.approx(math.log(32), rel=0.02)
    assert judged.metrics["loss"] >= 0.98 * judged.metrics["trivial_loss"]
    (sentence,) = judged.warnings
    assert sentence.startswith("Collapse on the validation images: the teacher gives all prototypes the same")


@pytest.mark.parametrize("name", ["dino", "esvit", "selfpatch"])
def test_local_crops_of_the_global_size_stay_local(name):
    """The teacher's targets are the two global crops, whatever the size of the others."""
    crops = {"global_size": 32, "local_size": 32, "num_local": 2}
    method = build(name, section(name, method={"crops": crops}))
    method.begin()
    method.eval()
    generator = torch.Generator().manual_seed(5)
    views = [torch.randn(2, 3, 32, 32, generator=generator) for _ in range(4)]
    batch = Batch(tuple(views), torch.zeros(2, dtype=torch.int64), torch.arange(2), Moment(0, 0, 60, 6))
    logits = [method.image_logits(method.student, view)[1] for view in views]
    targets = [
        method.centre("image").targets(
            method.image_logits(method.teacher, view)[1], method.config.teacher_temperature
        )
        for view in views[:2]
    ]
    pairs = [
        -(targets[g] * F.log_softmax(logits[v] / 0.1, -1)).sum(-1).mean()
        for g in range(2)
        for v in range(4)
        if v != g
    ]
    found = method.losses(batch)
    image_loss = next(found[key] for key in ("image_loss", "view_loss", "loss") if key in found)
    assert image_loss.item() == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-5)


def test_one_image_for_batch_norm_and_heads_that_do_not_divide_are_mistakes_of_the_recipe():
    method = build("moby").train()
    view = torch.randn(1, 3, 32, 32)
    batch = Batch((view, view), torch.zeros(1, dtype=torch.int64), torch.arange(1), Moment(0, 0, 60, 6))
    with pytest.raises(InputError, match="at least two images in a micro-batch"):
        method.losses(batch)
    with pytest.raises(InputError, match="cannot be shared among 7 heads"):
        build(
            "moby_selfpatch",
            section("moby_selfpatch", method={"aggregation_heads": 7}),
            pooling="class_token",
        )


def test_a_layer_decay_is_refused_and_not_ignored():
    given = section("dino")
    optim = given.optim.model_copy(update={"layer_decay": 0.75})
    with pytest.raises(RecipeError, match="trains all layers at one rate"):
        build("dino", given.model_copy(update={"optim": optim}))
