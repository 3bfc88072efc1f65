"""A small paper with two tables and one recipe file with two variants, as a plugin in a folder of its own."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import yaml
from toy_stages import FakeStages

from vitpipe.config.read import load_recipe

ROW = {
    "method": "toy",
    "dataset": "digits",
    "unit": "percent",
    "setting": "as printed",
    "source": "toy paper, table 1",
}
ROWS = [
    {**ROW, "table": "1", "variant": "plain", "metric": "top1", "value": 60.0},
    {**ROW, "table": "1", "variant": "smooth", "metric": "top1", "value": 61.5},
    {**ROW, "table": "1", "variant": "plain", "metric": "params", "value": 2.0, "unit": "M"},
    {**ROW, "table": "1", "variant": "other", "metric": "top1", "value": 50.0},
    {**ROW, "table": "2", "variant": "other", "metric": "top1", "value": 55.0},
]
SMALLEST = (
    "stages=[prepare, pretrain, finetune, evaluate]",
    "data.sets=[imagenet]",
    "data.embedded.train_images=40",
    "data.embedded.val_images=60",
    "data.workers=0",
    *(
        f"{stage}.{key}"
        for stage in ("pretrain", "finetune")
        for key in ("epochs=1", "global_batch=20", "optim.warmup_epochs=0")
    ),
    "evaluate.throughput_rounds=1",
    "start_from={}",
)


def recipe_values() -> dict:
    """The smallest chain as the values of a recipe file with the variants plain and smooth."""
    loaded = load_recipe("itpn/pixel_base", "demo", SMALLEST)
    values = loaded.model_dump(mode="json")
    for key in ("name", "profile", "intermediate", "probe", "detect", "segment", "expect"):
        del values[key]
    return {
        **values,
        "summary": "${loss}",
        "source": {"paper": "toy", "title": "A toy paper"},
        "variants": {"loss": {"plain": None, "smooth": {"finetune": {"method": {"label_smoothing": 0.2}}}}},
        "expect": [
            {
                "stage": "finetune",
                "metric": "top1",
                "where": {"table": "1", "variant": "${loss}", "metric": "top1"},
                "tolerance": 0.3,
            },
            {
                "stage": "evaluate",
                "metric": "params",
                "where": {"table": "1", "variant": "${loss}", "metric": "params"},
                "when": {"loss": "plain"},
                "tolerance": 0.1,
                "scale": 1e-6,
            },
        ],
    }


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The plugin folder; its profile `size` changes nothing, so that verdicts are given."""
    folder = tmp_path / "plugin"
    texts = {
        "papers/toy.yaml": ROWS,
        "recipes/toy/cells.yaml": recipe_values(),
        "recipes/profiles/size.yaml": {"data": {"source": "embedded"}},
        "recipes/profiles/big.yaml": {"data": {"source": "folders", "root": str(tmp_path / "raw")}},
    }
    for name, values in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(copy.deepcopy(values), sort_keys=False), encoding="utf-8")
    monkeypatch.setenv("VITPIPE_PLUGINS", str(folder))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join((str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")))
    )
    return folder


@pytest.fixture
def fake(monkeypatch) -> FakeStages:
    """Stages that write what a stage writes, at once and in this process."""
    stages = FakeStages()
    monkeypatch.setattr("vitpipe.tables.run_table.run_stage_process", stages)
    return stages
