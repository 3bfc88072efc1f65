"""RevCol's recipe through the chain at the smallest size: what later stages get is a plain classifier."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitpipe.models.weights import load_state

pytestmark = pytest.mark.slow

RECIPE = "revcol/supervised/tiny"
STAGES = ("prepare", "finetune", "probe", "evaluate", "report")
SMALLEST = (
    f"stages=[{', '.join(STAGES)}]",
    "data.embedded={image_size: 64, train_images: 80, val_images: 40}",
    "data.workers=0",
    "finetune.epochs=2",
    "finetune.global_batch=20",
    "finetune.optim.warmup_epochs=0",
    "finetune.augment.mixup_alpha=0.8",
    "finetune.log_every_steps=1",
    "probe.linear=null",
    "probe.epochs=3",
    "evaluate.throughput_rounds=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The outputs of all stages."""
    root = tmp_path_factory.mktemp("revcol")
    options = [word for setting in SMALLEST for word in ("--set", setting)]
    for stage in STAGES:
        done = subprocess.run(
            [sys.executable, "-m", "vitpipe", "run", stage, "--recipe", RECIPE, "--profile", "demo", *options],
            cwd=root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    return root / "artifacts" / RECIPE / "demo"


def _metrics(folder: Path, stage: str) -> dict[str, float]:
    return json.loads((folder / stage / "metrics.json").read_text(encoding="utf-8"))


def test_the_classifier_and_its_average_are_saved_and_the_heads_beside_them(folder):
    files = {path.name for path in (folder / "finetune").glob("*.safetensors")}
    assert files == {"weights.safetensors", "ema.safetensors", "heads.safetensors"}
    weights, heads = (
        load_state(folder / "finetune" / f"{name}.safetensors") for name in ("weights", "heads")
    )
    assert {name.split(".")[0] for name in heads} == {"cls_blocks", "decoder_blocks"}
    assert not any(name.startswith(("cls_blocks", "decoder_blocks")) for name in weights)
    assert set(load_state(folder / "finetune" / "ema.safetensors")) == set(weights)


def test_evaluation_and_probe_start_from_it(folder):
    trained, evaluated = _metrics(folder, "finetune"), _metrics(folder, "evaluate")
    assert evaluated["top1"] == trained["top1"]
    assert {"ema_top1", "loss"} <= set(trained)
    assert {"knn_top1", "linear_top1"} <= set(_metrics(folder, "probe"))
    with (folder / "probe" / "tables" / "weights_account.csv").open(encoding="utf-8") as file:
        outcomes = {row["source"]: row["outcome"] for row in csv.DictReader(file)}
    assert {name for name, outcome in outcomes.items() if outcome == "unused"} == {
        f"cls.classifier.{part}.{kind}" for part in (0, 1) for kind in ("weight", "bias")
    }


def test_the_report_puts_it_beside_the_published_row(folder):
    pages = [path.read_text(encoding="utf-8") for path in (folder / "report").glob("*.md")]
    assert any("82.2" in page and "not comparable" in page for page in pages)
