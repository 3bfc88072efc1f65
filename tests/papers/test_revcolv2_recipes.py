"""The recipes of RevColV2 against the hyper-parameters that the supplement prints."""

from __future__ import annotations

from typing import Any

import pytest

from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.config.train_sections import ClassifyConfig
from vitpipe.papers.published import rows
from vitpipe.stages.pretrain.config import PretrainConfig

SIZES = {"base": "RevColV2-B", "large": "RevColV2-L"}
ROWS = [row for row in rows("revcolv2") if row["metric"].startswith("hparam.")]


def published(table: str, variant: str) -> dict[str, list[Any]]:
    """Hyper-parameter -> the values printed for a size or for all sizes."""
    found: dict[str, list[Any]] = {}
    for row in ROWS:
        if row["table"] == table and row["variant"] in (variant, "all"):
            found.setdefault(row["metric"].removeprefix("hparam."), []).append(row["value"])
    return found


def values_of(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Our section in the names of the supplement's tables."""
    section: PretrainConfig | ClassifyConfig = getattr(recipe, stage)
    optim, augment = section.optim, section.augment
    values: dict[str, Any] = {
        "optimizer": {"adamw": "AdamW"}[optim.name],
        "base_lr": optim.base_lr,
        "scaled_lr": optim.base_lr * section.global_batch / (optim.lr_reference_batch or 1),
        "weight_decay": optim.weight_decay,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "batch_size": section.global_batch,
        "schedule": "cosine",
        "warmup_epochs": optim.warmup_epochs,
        "epochs": section.epochs,
        "augmentation": "RandomResizedCrop",
    }
    if isinstance(section, ClassifyConfig):
        names = {"rand-m9-mstd0.5-inc1": "RandAug(9,0.5)"}
        values |= {
            "augmentation": names[str(augment.rand_augment)],
            "layer_decay": optim.layer_decay,
            "label_smoothing": section.method.label_smoothing,
            "mixup": augment.mixup_alpha or "none",
            "cutmix": augment.cutmix_alpha or "none",
            "drop_path": section.drop_path,
            "head_init": recipe.model.head_init_std / 0.02,
            "ema": section.ema_decay or "none",
        }
    return values


def recipe(size: str, kind: str = "") -> Recipe:
    return load_recipe(f"revcolv2/{size}{kind}", "full")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("table", "kind", "stage"),
    [("1", "", "pretrain"), ("1", "_22k", "pretrain"), ("2", "_22k", "intermediate"), ("3", "", "finetune"),
     ("4", "_22k", "finetune")],
)  # fmt: skip
def test_every_printed_value_is_the_recipes(size: str, table: str, kind: str, stage: str) -> None:
    printed = published(table, SIZES[size])
    assert len(printed) >= 11
    ours = values_of(recipe(size, kind), stage)
    for name, (value, *_) in printed.items():
        wanted = pytest.approx(value) if isinstance(value, (int, float)) else value
        assert ours[name] == wanted, (table, name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "head"), [("", "Mask R-CNN"), ("_22k", "Cascade")])
def test_detection_is_as_printed(size: str, kind: str, head: str) -> None:
    printed, detect = published("section-1.5", SIZES[size]), recipe(size, kind).detect
    assert detect is not None
    for name, ours in (
        ("epochs", detect.epochs),
        ("batch_size", detect.global_batch),
        ("lr", detect.optim.base_lr),
        ("layer_decay", detect.optim.layer_decay),
        ("drop_path", detect.drop_path),
        ("lsj_min", detect.jitter_range[0]),
        ("lsj_max", detect.jitter_range[1]),
    ):
        assert any(ours == pytest.approx(value) for value in printed[name]), (head, name)
    assert (detect.epochs, detect.global_batch) == ((50, 32) if head == "Mask R-CNN" else (100, 64))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "lr", "decay", "drop"), [("", 4e-5, 0.65, 0.1), ("_22k", 2e-5, 0.9, 0.3)])
def test_segmentation_is_as_printed(size: str, kind: str, lr: float, decay: float, drop: float) -> None:
    printed, segment = published("section-1.4", SIZES[size]), recipe(size, kind).segment
    assert segment is not None
    assert (segment.optim.base_lr, segment.optim.layer_decay, segment.drop_path) == (lr, decay, drop)
    assert lr in printed["lr"]
    assert decay in printed["layer_decay"]
    assert drop in printed["drop_path"]
    assert [segment.steps, segment.global_batch] == [printed["iterations"][0], printed["batch_size"][0]]


@pytest.mark.parametrize("size", SIZES)
def test_probe_and_baseline_are_as_printed(size: str) -> None:
    probe, supervised = recipe(size).probe, recipe(size, "_supervised").finetune
    assert probe is not None
    assert probe.linear is not None
    assert supervised is not None
    printed = published("section-2.2", SIZES[size])
    assert (probe.linear.epochs, probe.linear.optim.name) == (printed["epochs"][0], "lars")
    assert printed["optimizer"] == ["LARS"]
    assert [supervised.ema_decay] == published("section-2.1", SIZES[size])["ema"]
