"""A family of the user's own, by files in a plugin folder alone: listed, trained, measured; broken ones named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent.parent / "support" / "toy_plugin"
RECIPE = """
summary: Two steps of a toy
source: {paper: none, title: none}
stages: [prepare, finetune, probe, evaluate]
start_from: {probe: finetune}
data:
  sets: [imagenet]
  workers: 0
  embedded: {image_size: 64, train_images: 40, val_images: 20}
model: {name: toy_tiny, image_size: 64, width: 12}
finetune: {epochs: 1, global_batch: 16, optim: {base_lr: 1.0e-3, layer_decay: 0.5}}
probe: {epochs: 2, batch: 20}
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the plugin and a recipe of it."""
    shutil.copytree(PLUGIN, tmp_path / "mine", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "toy.yaml").write_text(RECIPE)
    return tmp_path


def call(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "VITPIPE_PLUGINS": str(home / "mine"), "VITPIPE_TRACKING": "off"}
    command = [sys.executable, "-m", "vitpipe", *arguments]
    return subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)


def metrics(home: Path, stage: str, **inputs: str) -> dict[str, float]:
    """Run one stage into a folder of its name."""
    given = [part for name, made in inputs.items() for part in ("--in", f"{name}={home / made}")]
    recipe = ("--recipe", "toy.yaml", "--profile", "demo")
    done = call(home, "run", stage, *recipe, *given, "--out", str(home / stage))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((home / stage / "metrics.json").read_text())


def test_it_is_listed_resolved_trained_and_measured(home: Path) -> None:
    listed = json.loads(call(home, "models", "--json").stdout)
    assert [(row["name"], row["family"]) for row in listed if row["family"] == "toy"] == [("toy_tiny", "toy")]
    shown = json.loads(call(home, "recipe", "toy.yaml", "--profile", "demo", "--json").stdout)
    assert shown["recipe"]["model"] == {"name": "toy_tiny", "image_size": 64, "width": 12}
    derived = {row["path"]: row["value"] for row in shown["derived"]}
    assert derived["finetune.num_steps"] == 2
    assert derived["finetune.layer_lr.0"] == pytest.approx(derived["finetune.layer_lr.1"] / 2)
    metrics(home, "prepare")
    trained = metrics(home, "finetune", data="prepare")
    measured = metrics(home, "evaluate", data="prepare", weights="finetune")
    assert measured["top1"] == trained["top1"]
    # 3 x 16 x 16 x 12 + 12 patches, 2 x 12 norm, 12 x 10 + 10 head.
    assert measured["params"] == 9_228 + 24 + 130
    assert 0.0 <= metrics(home, "probe", data="prepare", weights="finetune")["linear_top1"] <= 1.0


def test_its_options_and_capabilities_are_checked(home: Path) -> None:
    (home / "wrong.yaml").write_text(RECIPE.replace("width: 12", "widht: 12"))
    said = call(home, "recipe", "wrong.yaml", "--profile", "demo").stderr
    assert "'model.widht' is not a known key (did you mean 'width'?)" in " ".join(said.split())
    code = (
        "from vitpipe.config.model import model_config; from vitpipe.models.build import build_pretrainer; "
        "build_pretrainer(model_config({'name': 'toy_tiny'}))"
    )
    env = {**os.environ, "VITPIPE_PLUGINS": str(home / "mine")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "toy_tiny has no masked pre-training" in done.stderr
    assert "choose a model of the family hivit or itpn_vit or revcolv2" in done.stderr


def test_what_it_states_is_held_against_what_it_builds(home: Path) -> None:
    path = home / "mine" / "models" / "toy" / "config.py"
    stated = 'builds = ("encoder", "dense")'
    path.write_text(path.read_text().replace("    width: Count = 24", f"    {stated}\n    width: Count = 24"))
    code = "from vitpipe.models.families import family; family('toy')"
    env = {**os.environ, "VITPIPE_PLUGINS": str(home / "mine")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "The family 'toy' builds encoder, classifier, but states encoder, dense" in done.stderr
    said = " ".join(call(home, "recipe", "toy.yaml", "--profile", "demo").stderr.split())
    assert (
        "method 'classify' of stage 'finetune' needs a classifier, which 'toy_tiny' of the family toy" in said
    )


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("config", "import a_library_that_is_not_there", "ModuleNotFoundError"),
        ("config", "ENTRIES = (", "SyntaxError"),
    ],
)
def test_a_family_that_cannot_be_imported_is_named(home: Path, part: str, text: str, reason: str) -> None:
    path = home / "mine" / "models" / "toy" / f"{part}.py"
    path.write_text(text + "\n")
    done = call(home, "models")
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, said
    assert f"The network family 'toy' cannot be imported ({reason}" in said
    assert f"{path}, line 1." in said


def test_a_broken_network_file_is_named_where_weights_are_described(home: Path) -> None:
    (home / "mine" / "models" / "toy" / "family.py").write_text("import a_library_that_is_not_there\n")
    assert call(home, "models").returncode == 0
    code = "from vitpipe.models.transfer import describe; describe({})"
    env = {**os.environ, "VITPIPE_PLUGINS": str(home / "mine")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "InputError: The network family 'toy' cannot be imported (ModuleNotFoundError" in done.stderr


def test_two_networks_of_one_name_are_refused(home: Path) -> None:
    path = home / "mine" / "models" / "toy" / "config.py"
    path.write_text(path.read_text().replace('"toy_tiny"', '"hivit_base"'))
    said = " ".join(call(home, "models").stderr.split())
    assert "The families 'hivit' and 'toy' both have a network 'hivit_base'" in said
