"""A user's project around the toy plugin: params.yaml, a recipe, and the command line as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

TOY = Path(__file__).parent / "toy_plugin"
RECIPE = """
summary: Two steps of a toy
source: {paper: none, title: none}
stages: [prepare, finetune, spectrum, evaluate, report]
data:
  sets: [imagenet]
  workers: 0
  embedded: {image_size: 64, train_images: 40, val_images: 20}
model: {name: toy_tiny, image_size: 64, width: 12}
finetune: {epochs: 1, global_batch: 16, optim: {base_lr: 1.0e-3, layer_decay: 0.5}}
evaluate: {throughput_rounds: 1}
"""
PARAMS = "recipe: lab/toy\nprofile: demo\nplugins: [mine]\n"


def write(path: Path, text: str) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_project(folder: Path, params: str = PARAMS) -> Path:
    """The toy plugin as `mine/`, its recipe `lab/toy`, and a params.yaml that names both."""
    shutil.copytree(TOY, folder / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    write(folder / "mine/recipes/lab/toy.yaml", RECIPE)
    write(folder / "params.yaml", params)
    return folder


def call(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`vitpipe ARGUMENTS` in a folder; VITPIPE_PLUGINS is not inherited."""
    kept = {name: value for name, value in os.environ.items() if name != "VITPIPE_PLUGINS"}
    return subprocess.run(
        [sys.executable, "-m", "vitpipe", *arguments],
        cwd=folder, env={**kept, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def must(folder: Path, *arguments: str, **variables: str) -> str:
    """As `call`, which must succeed; what it printed."""
    done = call(folder, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def planned(folder: Path, **variables: str) -> dict[str, str]:
    """Stage -> `runs` or `cached`."""
    stages: list[dict[str, Any]] = json.loads(must(folder, "plan", "--json", **variables))["stages"]
    return {row["stage"]: row["runs"] for row in stages}


def refused(folder: Path, *arguments: str) -> str:
    """The paragraph by which a command refuses its input, on one line."""
    done = call(folder, *arguments)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert said.startswith("vitpipe: "), said
    return said
