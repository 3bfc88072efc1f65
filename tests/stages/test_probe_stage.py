"""Stage `probe` on small sets: what it measures, by which features and rates, on one rank and on two."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from probe_runs import AUGMENTED, context, make_inputs, rank_child
from tiny_runs import free_port, run_processes
from token_encoder import TokenEncoder

from vitpipe.contracts.errors import InputError, RecipeError, StoppedError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.augment import eval_transform
from vitpipe.data.batches import eval_batches
from vitpipe.evaluate.knn import knn_accuracy
from vitpipe.models.weights import load_state
from vitpipe.stages.probe import stage
from vitpipe.stages.training import open_sets, trained_augment
from vitpipe.train.ranks import Ranks

SWEEP = ("probe.base_lr=[1e-6, 0.3, 3.0]", "probe.best_epoch=true")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    make_inputs(root)
    return root


def _settings_of(tables, metric):
    return {row["setting"]: row["value"] for row in tables["protocol"] if row["metric"] == metric}


def test_a_sweep_is_told_in_a_table_and_in_the_ledger(root):
    ctx = context(root, "sweep", SWEEP)
    metrics = stage.run(ctx)
    measured = ("knn_top1", "knn_top5", "linear_top1", "linear_best_epoch_top1")
    assert set(metrics) == {f"{of}{name}" for of in ("", "random_") for name in measured}
    assert all(0.0 <= value <= 1.0 for value in metrics.values())
    assert metrics["linear_best_epoch_top1"] >= metrics["linear_top1"]
    rows = ctx.logger.tables["linear_sweep"]
    assert [(row["weights"], row["base_lr"]) for row in rows] == [
        (of, rate) for of in ("trained", "random") for rate in (1e-6, 0.3, 3.0)
    ]
    for of, prefix in (("trained", ""), ("random", "random_")):
        own = [row for row in rows if row["weights"] == of]
        (chosen,) = [row for row in own if row["chosen"]]
        assert chosen["held_out_top1"] == max(row["held_out_top1"] for row in own)
        assert chosen["val_top1_all_images"] == metrics[f"{prefix}linear_top1"]
        assert chosen["best_epoch_val_top1_all_images"] == metrics[f"{prefix}linear_best_epoch_top1"]
    chosen = next(row["base_lr"] for row in rows if row["chosen"])
    found = _settings_of(ctx.logger.tables, "linear_top1")
    assert found["learning rate"] == (
        f"{chosen:g} per 256 images, chosen from 1e-06, 0.3, 3 by 10% of the training images"
    )
    assert found["features"] == "image vector behind the last block"
    assert (found["classifier"], found["epoch"]) == ("on features computed once", "last")
    assert _settings_of(ctx.logger.tables, "linear_best_epoch_top1") == {
        **found,
        "epoch": "best on the validation images",
    }
    neighbours = _settings_of(ctx.logger.tables, "knn_top5")
    assert neighbours == _settings_of(ctx.logger.tables, "knn_top1")
    assert (neighbours["neighbours"], neighbours["temperature"]) == ("20", "0.07")


def test_the_ledger_counts_the_neighbours_that_there_are(root):
    ctx = context(root, "many", (*SWEEP, "probe.neighbours=999"))
    stage.run(ctx)
    neighbours = int(_settings_of(ctx.logger.tables, "knn_top1")["neighbours"])
    assert 0 < neighbours < 999


def test_the_chosen_rate_alone_gives_the_same_figures(root):
    ctx = context(root, "sweep-again", SWEEP)
    metrics = stage.run(ctx)
    rows = ctx.logger.tables["linear_sweep"]
    for of, prefix in (("trained", ""), ("random", "random_")):
        rate = next(row["base_lr"] for row in rows if row["chosen"] and row["weights"] == of)
        alone = context(root, f"alone-{of}", [f"probe.base_lr={rate}"])
        found = stage.run(alone)
        assert found[f"{prefix}linear_top1"] == metrics[f"{prefix}linear_top1"]
        assert "linear_sweep" not in alone.logger.tables


def _embedded(ctx, network, shards, blocks):
    """Features and labels by the network alone, image after image."""
    transform = eval_transform(32, ctx.section.eval_crop_ratio, trained_augment(ctx))
    batches = list(eval_batches(shards, transform, batch=64, rank=0, num_ranks=1, workers=0))
    with torch.no_grad():
        features = torch.cat([network.frozen_features(batch.images, blocks) for batch in batches])
    return features, torch.cat([batch.labels_B for batch in batches]).long()


def test_one_pass_gives_neighbours_the_last_block_and_the_linear_classifier_all(root, monkeypatch):
    torch.manual_seed(3)
    network, random = (TokenEncoder(width=12, depth=4) for _ in range(2))
    monkeypatch.setattr(stage, "_frozen_networks", lambda ctx: (network, random))
    widths = []
    learn = stage.linear_accuracy

    def spied(train, val, *arguments, **options):
        widths.append((train[0].shape[1], val[0].shape[1]))
        return learn(train, val, *arguments, **options)

    monkeypatch.setattr(stage, "linear_accuracy", spied)
    monkeypatch.setattr(type(context(root, "blocks").recipe.model), "num_frozen_blocks", 4)
    ctx = context(root, "blocks", ["probe.last_blocks=3"])
    metrics = stage.run(ctx)
    # 40 training and 40 validation images are one batch each.
    assert (network.num_passes, random.num_passes) == (2, 2)
    assert widths == [(36, 36), (36, 36)]
    train, val = (_embedded(ctx, network, shards, 1) for shards in open_sets(ctx))
    expected = knn_accuracy(*train, *val, num_classes=3, num_neighbours=20, temperature=0.07, ranks=Ranks())
    assert (metrics["knn_top1"], metrics["knn_top5"]) == (expected.top1, expected.top5)
    reading = [_settings_of(ctx.logger.tables, name)["features"] for name in ("knn_top1", "linear_top1")]
    assert reading == [
        "image vector behind the last block",
        "class tokens of the last 3 blocks, each behind the final norm",
    ]


@pytest.mark.parametrize(
    ("blocks", "fix"),
    [(2, "set it to 1, or choose a network with a class token"), (999, "a number from 1 to")],
)
def test_blocks_that_cannot_be_read_are_refused(root, blocks, fix, monkeypatch):
    with pytest.raises(
        RecipeError, match=f"last_blocks is {blocks}, of 'hivit_nano' with these options 1 can"
    ):
        context(root, "refused", [f"probe.last_blocks={blocks}"])
    # The networks refuse it, too: a family may not say how many it has.
    monkeypatch.setattr(type(context(root, "refused").recipe.model), "num_frozen_blocks", 1000)
    with pytest.raises(InputError, match=fix):
        stage.run(context(root, "refused", [f"probe.last_blocks={blocks}"]))
    assert list((root / "refused").iterdir()) == []


class Stopping(MemoryLogger):
    """Sends SIGTERM to this process after a step."""

    def progress(self, step, num_steps, values):
        if step == 3:  # seen before step 4, after which the run stops
            os.kill(os.getpid(), signal.SIGTERM)


def test_augmented_training_reports_the_best_epoch_through_a_stop(root):
    settings = (*AUGMENTED, "probe.best_epoch=true", "probe.standardise=false", "seed=2")
    whole = context(root, "whole", settings)
    metrics = stage.run(whole)
    by_epoch = [value for _, name, value in whole.logger.points if name == "val/top1"]
    assert len(by_epoch) == 3
    # Else the figure would be right without any memory of the epochs before the stop.
    assert max(by_epoch[:2]) > by_epoch[2]
    assert metrics["linear_top1"] == by_epoch[-1]
    assert metrics["linear_best_epoch_top1"] == max(by_epoch)
    assert "cached_linear_best_epoch_top1" in metrics
    assert set(load_state(root / "whole" / "linear.safetensors")) == {"fc.weight", "fc.bias"}
    found = _settings_of(whole.logger.tables, "linear_top1")
    assert (found["classifier"], found["standardised"]) == ("on augmented images", "no")
    assert found["learning rate"] == "3 per 256 images, SGD"
    # Stopped after the second of three epochs: the first two are measured by another process.
    with pytest.raises(StoppedError):
        stage.run(context(root, "stopped", settings, logger=Stopping()))
    resumed = context(root, "stopped", settings)
    assert stage.run(resumed) == metrics
    assert len([name for _, name, _ in resumed.logger.points if name == "val/top1"]) == 1


def test_without_the_best_epoch_nothing_else_changes(root):
    plain, measured = (
        stage.run(context(root, name, [*AUGMENTED, f"probe.best_epoch={value}"]))
        for name, value in (("plain", "false"), ("measured", "true"))
    )
    assert {name for name in measured if name not in plain} == {
        "linear_best_epoch_top1", "cached_linear_best_epoch_top1", "random_cached_linear_best_epoch_top1",
    }  # fmt: skip
    assert all(measured[name] == value for name, value in plain.items())
    first, second = (load_state(root / name / "linear.safetensors") for name in ("plain", "measured"))
    assert set(first) == {
        "fc.weight",
        "fc.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    }
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(root):
    settings, port = [*SWEEP, "probe.batch=8"], free_port()
    assert run_processes(rank_child, *[(root, settings, rank, 2, port) for rank in range(2)]) == [0, 0]
    found = [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1] == stage.run(context(root, "one", settings))
