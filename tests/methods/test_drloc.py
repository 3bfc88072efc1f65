"""drloc as a method: its losses, what is trained and saved, resumption, ranks, what is refused."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from short_runs import (
    AUGMENT,
    CLASSES,
    HIVIT,
    IMAGE_SIZE,
    REVCOL,
    STEPS,
    Killing,
    built,
    opened,
    packed_digits,
    run,
    section_of,
    weights_of,
)
from tiny_runs import free_port, run_processes
from torch import Tensor, nn

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import Batch, eval_batches
from vitpipe.data.moment import Moment
from vitpipe.methods.classify.method import soft_cross_entropy
from vitpipe.methods.drloc.config import DrlocConfig
from vitpipe.methods.drloc.localisation import draw_pairs
from vitpipe.methods.drloc.method import Drloc, location_weight
from vitpipe.models.draws import image_draws
from vitpipe.models.families import family_of
from vitpipe.models.network import Features
from vitpipe.train.ranks import Ranks, joined

SWIN = model_config({"name": "swin_nano"})  # a grid of 2 x 2 at 64 pixels
VIT = model_config({"name": "vit_nano", "image_size": 64, "patch_size": 8})  # 8 x 8
NETWORKS = {
    "swin": SWIN,
    "vit": VIT,
    "hivit": HIVIT,
    "revcol": REVCOL,
    "paca": model_config({"name": "paca_nano", "image_size": 64}),
}
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def _section(**options):
    return section_of("finetune", STEPS, method={"name": "drloc", "hidden_width": 32, **options})


def _method(model=VIT, **options) -> Drloc:
    method = built(_section(**options), model)
    assert isinstance(method, Drloc)
    return method


def _batch(num_images: int = 4, first: int = 0, size: int = IMAGE_SIZE) -> Batch:
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(3))
    chosen = slice(first, first + num_images)
    return Batch((images[chosen],), torch.arange(8)[chosen], torch.arange(8)[chosen], Moment(0, 1, 10, 10))


def _losses(method, batch) -> dict[str, Tensor]:
    with image_draws(batch.moment.key("network"), batch.indices_B):
        return method(batch)


def _written_out(mlp: nn.Module, map_BDRC: Tensor, batch: Batch, number: int, num_pairs: int) -> Tensor:
    """The paper's pseudo-code, pair by pair."""
    rows, columns = map_BDRC.shape[2:]
    found = draw_pairs(batch.moment.key("locations", number), batch.indices_B, num_pairs, (rows, columns))
    errors = []
    for b in range(len(map_BDRC)):
        for (i, j), (p, h) in zip(found.first_BM2[b].tolist(), found.second_BM2[b].tolist(), strict=True):
            x = torch.cat([map_BDRC[b, :, i, j], map_BDRC[b, :, p, h]])
            first, second, last = (mlp.layers[number] for number in (0, 2, 4))
            y = last(torch.relu(second(torch.relu(first(x)))))
            errors += [(y[0] - abs(i - p) / rows).abs(), (y[1] - abs(j - h) / columns).abs()]
    return torch.stack(errors).mean()


@pytest.mark.parametrize("kind", ["drloc", "all"])
@pytest.mark.parametrize("network", NETWORKS)
def test_value_and_gradients_are_those_of_the_written_out_loss(network, kind):
    method, batch = _method(NETWORKS[network], loss=kind, pairs=5, weight=0.3).eval(), _batch(2)
    images, targets = method.mix(batch.images, batch.labels_B, key=batch.key("mix"))
    blocks = range(method.model.num_blocks) if kind == "all" else (-1,)
    maps = method.model.features(images, blocks).maps()
    assert len(maps) == len(method.heads) == len(method.grids)
    located = torch.stack(
        [
            _written_out(mlp, one, batch, number, 5)
            for number, (one, mlp) in enumerate(zip(maps, method.heads, strict=True))
        ]
    ).sum()
    expected = soft_cross_entropy(method.model(images), targets) + 0.3 * located
    found = _losses(method, batch)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found["drloc_loss"], located.detach(), rtol=1e-5, atol=0.0)
    known = [p for p in method.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(loss, known, allow_unused=True) for loss in (found["loss"], expected))
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["drloc", "signed", "ce", "reg", "all"])
def test_the_equation_sums_over_the_global_batch(kind):
    mean, equation = (_losses(_method(loss=kind, reduction=r), _batch()) for r in ("mean", "equation"))
    images = _section().global_batch
    factor = images if kind in ("ce", "reg") else 2 * images
    for name in ("drloc_loss", "trivial_drloc_loss"):
        assert equation[name].item() == pytest.approx(factor * mean[name].item(), rel=1e-5)
    assert torch.equal(equation["class_loss"], mean["class_loss"])


@pytest.mark.parametrize("kind", ["drloc", "signed", "ce", "reg", "all"])
def test_losses_and_gradients_do_not_depend_on_the_micro_batch(kind):
    method = _method(SWIN, loss=kind).train()  # with drop path, whose draws belong to the image

    def gradient(batches):
        method.zero_grad()
        found = [_losses(method, batch) for batch in batches]
        for losses in found:
            (losses["loss"] / len(found)).backward()
        means = {name: sum(losses[name].item() for losses in found) / len(found) for name in found[0]}
        return means, torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    whole, whole_grad = gradient([_batch(8)])
    parts, parts_grad = gradient([_batch(4), _batch(4, first=4)])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert (parts_grad - whole_grad).norm() < 1e-5 * whole_grad.norm()


def test_positions_are_other_ones_in_every_step_block_and_image():
    moments = [Moment(0, step, 10, 10).key("locations", block) for step in (0, 1) for block in (0, 1)]
    drawn = [draw_pairs(key, torch.tensor([3, 4]), 64, (7, 7)).first_BM2 for key in moments]
    sets = [part for pairs in drawn for part in pairs]
    assert not any(torch.equal(a, b) for n, a in enumerate(sets) for b in sets[:n])


def test_the_network_starts_with_the_same_weights_as_without_the_loss():
    plain = built(section_of("finetune", STEPS), VIT)
    with_loss = _method().model.state_dict()
    assert all(torch.equal(with_loss[name], tensor) for name, tensor in plain.model.state_dict().items())


def test_the_loss_reaches_network_and_mlp_and_a_weight_of_zero_neither():
    method = _method()
    _losses(method, _batch())["loss"].backward()
    assert all(bool(p.grad.any()) for p in method.heads.parameters())
    nothing = _method(weight=0.0)
    found = _losses(nothing, _batch())
    found["loss"].backward()
    assert found["loss"].item() == found["class_loss"].item()
    assert not any(bool(p.grad.any()) for p in nothing.heads.parameters())


def test_the_mlps_learn_at_the_full_rate_and_their_biases_do_not_decay():
    section = section_of("finetune", STEPS, method={"name": "drloc"}, optim={"layer_decay": 0.5})
    groups = built(section, VIT).groups(section.optim)
    found = {name: group for group in groups for name in group["names"]}
    assert found["heads.0.layers.0.weight"]["lr_scale"] == 1.0
    assert found["heads.0.layers.0.weight"]["weight_decay"] == 0.05
    assert found["heads.0.layers.0.bias"]["weight_decay"] == 0.0


def test_the_result_is_the_classifier_and_the_mlps_lie_beside_it():
    method = _method()
    results = method.results()
    assert list(results) == ["weights", "heads"]
    plain = family_of(VIT).classifier(VIT, num_classes=len(CLASSES), drop_path=0.0)
    assert set(results["weights"].state_dict()) == set(plain.state_dict())
    assert {name.split(".")[0] for name in method.resume_state()} == {"model", "heads"}


@pytest.mark.parametrize(("init", "deviation"), [("trunc_normal", 0.02), ("default", (3 * 128) ** -0.5)])
def test_initial_values_of_the_mlp(init, deviation):
    first = _method(init=init, hidden_width=512).heads[0].layers[0]
    assert first.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert bool(first.bias.any()) == (init == "default")


def test_the_ramp_is_the_released_codes():
    config = DrlocConfig(weight=0.5, weight_schedule="ramp")

    def at(epoch: int, epochs: int = 300) -> float:
        return location_weight(config, Moment(0, epoch * 7 + 3, epochs * 7, 7))

    assert [at(e) for e in (0, 1, 10, 20)] == pytest.approx([0.0, 0.025, 0.25, 0.5])
    assert [at(e) for e in (21, 160, 299)] == pytest.approx([0.5 * (1 - d / 280) for d in (1, 140, 279)])
    # A run that ends on the way up never divides by what is left.
    assert [at(e, 20) for e in (0, 19)] == pytest.approx([0.0, 0.475])
    assert location_weight(DrlocConfig(weight=0.3), Moment(0, 0, 10, 10)) == 0.3
    losses = _losses(_method(weight_schedule="ramp"), _batch())
    assert losses["drloc_weight"].item() == 0.0
    assert losses["loss"].item() == losses["class_loss"].item()


def test_it_is_judged_on_fixed_positions_beside_the_best_constant(tmp_path):
    shards, method = packed_digits(tmp_path), _method(VIT)

    def crops(batch):
        return lambda _: eval_batches(
            shards, eval_transform(64, 1.0, AUGMENT), batch=batch, rank=0, num_ranks=1, workers=0
        )

    whole, parts = (method.judge(crops(batch), Ranks(), "off") for batch in (96, 20))
    assert whole.metrics == pytest.approx(parts.metrics, rel=1e-5)
    # 8 x 8 cells; an MLP that knows nothing costs the mean distance.
    assert whole.metrics["trivial_drloc_loss"] == 0.1953125
    assert whole.metrics["drloc_loss"] == pytest.approx((64 - 1) / (3 * 64), abs=0.03)
    plain = built(section_of("finetune", STEPS), VIT).judge(crops(96), Ranks(), "off")
    assert {name: whole.metrics[name] for name in plain.metrics} == plain.metrics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "greater than or equal to 1"),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"loss": "ce", "raw_targets": True}, "raw_targets means nothing to loss ce"),
        ({"loss": "all", "pooling": "2x2"}, "loss all reads the grid of every block as it is"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DrlocConfig(**options)


@pytest.mark.parametrize(
    ("name", "size", "pooling", "message"),
    [
        ("swin_nano", 32, "none", "loss has no distances to learn in a grid of 1 x 1"),
        ("swin_nano", 64, "2x2", "loss has no distances to learn in a grid of 2 x 2 behind pooling 2x2"),
        ("swin_nano", 64, "3x3", "loss has no distances to learn in a grid of 2 x 2 behind pooling 3x3"),
        ("swin_tiny", 224, "2x2", "pooling 2x2 would leave cells of a grid of 7 x 7 out"),
        ("revcol_nano", 32, "none", "loss has no distances to learn in a grid of 1 x 1"),
    ],
)
def test_grids_without_distances_are_refused_before_torch(name, size, pooling, message):
    model = model_config({"name": name, "image_size": size})
    assert DrlocConfig(pooling=pooling).misfit(model, 8).startswith(message)
    with pytest.raises(InputError, match=message):
        _method(model, pooling=pooling)


def test_a_recipe_with_such_a_grid_is_refused_with_its_key():
    from vitpipe.config.read import load_recipe

    changes = ("finetune.method={name: drloc}", "model={name: swin_nano, image_size: 32}")
    with pytest.raises(RecipeError, match=r"method\.loss has no distances to learn in a grid of 1 x 1"):
        load_recipe("paca/imagenet/tiny", "demo", changes)


def test_a_network_without_a_grid_is_refused_when_it_is_built(monkeypatch):
    from vitpipe.models.swin.swin import SwinEncoder

    empty = Features(tokens=(), grids=(), pooled=torch.empty(1, 8, device="meta"))
    monkeypatch.setattr(SwinEncoder, "features", lambda *_, **__: empty)
    with pytest.raises(InputError, match="'swin_nano' gives no grid"):
        _method(SWIN)


def test_images_of_another_size_are_refused_where_classes_would_not_fit():
    method = _method(VIT, loss="ce")
    with pytest.raises(InputError, match=r"grids of 12 x 12 cells, and the MLPs are made for 8 x 8"):
        _losses(method, _batch(size=96))


def test_it_trains_in_the_supervised_stages_only():
    with pytest.raises(ValidationError, match="trains a classifier, this stage none"):
        section_of("pretrain", STEPS, method="drloc")


def _child(folder: Path, name: str, kind: str, at_step: int | None = None) -> None:
    torch.set_num_threads(1)
    method = {"name": "drloc", "loss": kind, "hidden_width": 32, "weight_schedule": "ramp"}
    section = section_of("finetune", STEPS, method=method, checkpoint_minutes=1e-9, ema_decay=0.9)
    section = section.model_copy(update={"augment": section.augment.model_copy(update=MIXED)})
    state, losses, _ = run(opened(folder), section, folder / name, model=SWIN, logger=Killing(at_step))
    torch.save({"losses": losses, "weights": weights_of(state)}, folder / f"{name}.pt")


def _rank_child(folder: Path, rank: int, num_ranks: int, port: int) -> None:
    torch.set_num_threads(1)
    import os

    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(names, RANK=str(rank), WORLD_SIZE=str(num_ranks))
    section = _section().model_copy(update={"micro_batch": 32 // num_ranks})
    with joined(rank, num_ranks, "cpu") as ranks:
        state, losses, _ = run(
            opened(folder), section, folder / f"{num_ranks}-ranks", model=SWIN, ranks=ranks
        )
        if rank == 0:
            torch.save({"losses": losses, "weights": weights_of(state)}, folder / f"ranks{num_ranks}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("located")
    packed_digits(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drloc", "all"])
def test_a_killed_run_ends_with_the_same_bits(folder, kind):
    assert run_processes(_child, (folder, f"whole-{kind}", kind)) == [0]
    assert run_processes(_child, (folder, f"killed-{kind}", kind, 3)) == [-signal.SIGKILL]
    assert run_processes(_child, (folder, f"killed-{kind}", kind)) == [0]
    whole, again = (
        torch.load(folder / f"{name}-{kind}.pt", weights_only=True) for name in ("whole", "killed")
    )
    assert again["losses"] == whole["losses"][2:]
    assert torch.equal(again["weights"], whole["weights"])


@pytest.mark.slow
def test_two_ranks_train_as_one(folder):
    assert run_processes(_rank_child, (folder, 0, 1, free_port())) == [0]
    port = free_port()
    assert run_processes(_rank_child, *[(folder, rank, 2, port) for rank in range(2)]) == [0, 0]
    one, two = (torch.load(folder / f"ranks{n}.pt", weights_only=True) for n in (1, 2))
    # Rank 0 logs the mean over the ranks.
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert (one["weights"] - two["weights"]).norm() < 1e-3 * one["weights"].norm()
