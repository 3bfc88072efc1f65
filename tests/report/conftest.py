"""Tiny finished runs, made by hand: folders as the stages write them, with invented numbers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image
from prepared_tables import write_catalogue_tables

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import (
    Artifact,
    Card,
    RunRecord,
    open_artifact,
    write_card,
    write_metrics,
    write_table,
)
from vitpipe.contracts.graph import graph_of
from vitpipe.report.results import RunResults

SECONDS = {
    "prepare": 9.8, "pretrain": 71.3, "intermediate": 38.6, "finetune": 41.2, "probe": 6.7,
    "detect": 58.4, "segment": 49.9, "evaluate": 7.1,
}  # fmt: skip


def _metrics(stage: str, chance: random.Random) -> dict[str, float]:
    def near(value: float) -> float:
        return min(1.0, value * chance.uniform(0.97, 1.03))

    coco = {
        f"{kind}_{name}": near(value)
        for kind in ("box", "mask")
        for name, value in zip(
            ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100", "AR_small",
             "AR_medium", "AR_large"),
            (0.31, 0.58, 0.29, 0.12, 0.33, 0.44, 0.25, 0.41, 0.43, 0.2, 0.45, 0.55),
            strict=True,
        )
    }  # fmt: skip
    return {
        "prepare": {"imagenet_num_train": 2000.0, "imagenet_num_val": 400.0, "num_bytes": 14_400_000.0, "num_corrupt": 0.0},
        "pretrain": {"loss": near(0.41)},
        "intermediate": {"top1": near(0.81), "top5": near(0.96), "loss": near(0.7)},
        "finetune": {"top1": near(0.95), "top5": near(0.99), "loss": near(0.3)},
        "probe": {"knn_top1": near(0.62), "linear_top1": near(0.79)},
        "detect": coco,
        "segment": {"mIoU": near(0.46), "aAcc": near(0.88), "mAcc": near(0.6)},
        "evaluate": {"top1": near(0.95), "top5": near(0.99), "loss": near(0.3), "params": 1_234_567.0,
                     "gmacs": 0.0625, "images_per_second": near(0.9) * 1000},
    }[stage]  # fmt: skip


def _history(stage: str, chance: random.Random) -> list[dict[str, float | int | str]]:
    names = {"pretrain": ["loss"], "detect": ["loss", "loss_rpn_cls", "loss_cls", "loss_bbox", "loss_mask"]}
    if stage not in ("pretrain", "intermediate", "finetune", "detect", "segment"):
        return []
    rows: list[dict[str, float | int | str]] = []
    for step in range(10, 601, 10):
        for i, name in enumerate(names.get(stage, ["loss"])):
            value = (2.2 - 0.4 * i) * math.exp(-step / 170) + 0.2 + chance.uniform(0, 0.06)
            rows.append({"step": step, "name": f"train/{name}", "value": value})
        rows.append({"step": step, "name": "train/learning_rate", "value": 1e-3 * math.cos(step / 400) ** 2})
        rows.append({"step": step, "name": "train/images_per_second", "value": 400 + chance.uniform(0, 40)})
        if step % 100 == 0 and stage == "finetune":
            rows.append({"step": step, "name": "val/loss", "value": 1.6 * math.exp(-step / 220) + 0.3})
            rows.append({"step": step, "name": "val/top1", "value": 0.95 * (1 - math.exp(-step / 120))})
    return rows


def _tables(stage: str, chance: random.Random, folder: Path, profile: str) -> None:
    write_table(folder, "history", _history(stage, chance))
    digits = [str(i) for i in range(10)]
    if stage == "prepare" and profile == "full":
        write_catalogue_tables(folder, ["imagenet", "coco", "ade20k"])
    elif stage == "prepare":
        sizes = {"imagenet": (2000, 400, 10), "coco": (200, 60, 10), "ade20k": (200, 60, 18)}
        write_table(folder, "splits", [
            {"dataset": name, "split": split, "num_images": number, "num_annotations": number,
             "num_classes": num_classes, "num_bytes": 9_000_000}
            for name, (train, val, num_classes) in sizes.items()
            for split, number in (("train", train), ("val", val))
        ])  # fmt: skip
        write_table(
            folder, "classes", [{"dataset": "imagenet", "class": d, "name": f"digit {d}"} for d in digits]
        )
    if stage == "prepare":
        Image.new("RGB", (64, 32), (30, 120, 90)).save(folder / "contact_sheet.png")
    if stage in ("finetune", "evaluate"):
        write_table(
            folder, "per_class", [{"class": d, "images": 40, "top1": 0.9, "top5": ""} for d in digits]
        )
    if stage == "evaluate":
        write_table(folder, "confusion", [
            {"true": t, "predicted": p, "images": n}
            for t in digits for p in digits if (n := 36 if t == p else chance.choice([0, 0, 0, 1, 3]))
        ])  # fmt: skip
        write_table(folder, "cost", [{"name": "params", "value": 1234567, "convention": "all parameters"}])
    if stage == "detect":
        write_table(folder, "per_class", [
            {"class": d, "objects": 20, "box_AP": 0.3, "mask_AP": 0.28} for d in digits
        ])  # fmt: skip


def _make_run(
    root: Path, recipe: Recipe, changed: Mapping[tuple[str, str], list[dict[str, object]]] | None = None
) -> RunResults:
    """Write finished folders of all stages of a recipe below `root` and open them.

    Args:
        changed: (stage, table) -> rows, instead of the usual ones.
    """
    chance = random.Random(recipe.seed)
    artifacts: dict[str, Artifact] = {}
    for i, node in enumerate(graph_of(recipe.stages)):
        if node.name == "report":
            continue
        folder = root / node.name
        folder.mkdir(parents=True)
        write_metrics(folder, _metrics(node.name, chance))
        _tables(node.name, chance, folder, recipe.profile)
        for (stage, table), rows in (changed or {}).items():
            if stage == node.name:
                write_table(folder, table, rows)
        write_card(folder, Card(
            stage=node.name, recipe=recipe.name, profile=recipe.profile, recipe_digest=f"{i:x}" * 64,
            data_digest="da" * 32, code_digest=f"c{i:x}" * 32, image=node.stage.image, identity="1d" * 32,
            parents=dict.fromkeys(node.inputs, "ab" * 32), seed=recipe.seed, libraries={"python": "3.11", "torch": "2.13.0"},
        ), RunRecord(
            git_commit="0123456789ab+changes", libraries={"python": "3.11.7"},
            hardware={"processor": "a <fast> one", "num_cores": 2},
            started_at=f"2026-11-20T10:0{i}:00+00:00", wall_seconds=SECONDS[node.name], tracking_run="f" * 32,
        ))  # fmt: skip
        artifacts[node.name] = open_artifact(folder, node.name)
    return RunResults(recipe, artifacts)


@pytest.fixture(scope="session")
def make_run():
    """Makes a finished run of a recipe in a folder."""
    return _make_run


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory) -> RunResults:
    """A run of the demo profile."""
    return _make_run(tmp_path_factory.mktemp("demo"), load_recipe("itpn/pixel_base", "demo"))


@pytest.fixture(scope="session")
def full_run(tmp_path_factory) -> RunResults:
    """A run of the full profile, so that verdicts are given."""
    return _make_run(tmp_path_factory.mktemp("full"), load_recipe("itpn/pixel_base", "full"))


@pytest.fixture(scope="session")
def seed_runs(tmp_path_factory) -> list[RunResults]:
    """Three runs that differ in the seed."""
    recipes = [load_recipe("itpn/pixel_base", "demo", [f"seed={seed}"]) for seed in range(3)]
    return [_make_run(tmp_path_factory.mktemp(f"seed{r.seed}"), r) for r in recipes]
