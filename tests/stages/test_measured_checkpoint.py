"""Probe and video of a converted checkpoint, without any training: a network as MoCo-v3's authors release it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from vitpipe.config.model import model_config
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import RecipeError
from vitpipe.models.build import build_encoder
from vitpipe.models.convert import convert
from vitpipe.models.weights import load_state

pytestmark = pytest.mark.slow

NETWORK = {"name": "vit_nano", "image_size": 48, "patch_size": 8, "heads": 8, "position": "sincos"}
VALUES = (
    "stages=[prepare, probe, video]", "data.sets=auto", "data.workers=0", "probe.epochs=2", "video.sample_videos=0",
    "model.heads=8", "model.position=sincos",
    *(f"data.embedded.{key}" for key in ("train_images=20", "val_images=10", "videos=1", "video_frames=3")),
)  # fmt: skip


def released(folder):
    """A MoCo-v3 training file: `state_dict`, `module.`, one table with the class token's zero entry."""
    torch.manual_seed(2)
    ours = build_encoder(model_config(NETWORK)).state_dict()
    official = {"pos_embed": torch.cat([torch.zeros(1, 1, 64), ours.pop("backbone.position")], dim=1)}
    for name, tensor in ours.items():
        inner = name.removeprefix("backbone.").replace("patch_embed.", "patch_embed.proj.")
        official[inner.replace("class_token", "cls_token")] = tensor
    state = {f"module.base_encoder.{name}": tensor for name, tensor in official.items()}
    state["module.base_encoder.head.0.weight"] = torch.zeros(4, 64)
    state |= {f"module.momentum_encoder.{name}": tensor for name, tensor in official.items()}
    torch.save({"state_dict": state, "epoch": 300, "arch": "vit_small"}, folder / "moco.pth")
    return official


def run(folder, stage, *more):
    command = [
        sys.executable,
        "-m",
        "vitpipe",
        "run",
        stage,
        "--recipe",
        "selfpatch/dino",
        "--profile",
        "demo",
    ]
    command += [part for value in (*VALUES, *more) for part in ("--set", value)]
    inputs = () if stage == "prepare" else ("--in", "data=prepare")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VITPIPE_TRACKING": "off"}
    return subprocess.run(
        [*command, *inputs, "--out", stage],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_released_network_is_probed_and_follows_videos(tmp_path):
    official = released(tmp_path)
    report = convert(tmp_path / "moco.pth", tmp_path / "moco.safetensors")
    assert report.count("dropped") == len(official) + 2  # the slow copies, a head, the table's first entry
    state = load_state(tmp_path / "moco.safetensors")
    assert torch.equal(state["backbone.blocks.0.attn.qkv.weight"], official["blocks.0.attn.qkv.weight"])
    weights = [f"{stage}.weights={tmp_path / 'moco.safetensors'}" for stage in ("probe", "video")]
    for stage in ("prepare", "probe", "video"):
        done = run(tmp_path, stage, *weights)
        assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "probe" / "metrics.json").read_text())
    assert {"knn_top1", "linear_top1", "random_knn_top1"} <= set(metrics)
    card = json.loads((tmp_path / "probe" / "card.json").read_text())
    assert set(card["parents"]) == {"data"}
    assert 0 <= json.loads((tmp_path / "video" / "metrics.json").read_text())["JF_mean"] <= 1
    # A checkpoint that is not there, and one of another network.
    gone = run(tmp_path, "probe", f"probe.weights={tmp_path / 'gone.safetensors'}", weights[1])
    assert gone.returncode == 2
    assert "gone.safetensors" in gone.stderr
    other = run(tmp_path, "probe", *weights, "stages=[prepare, probe]", "model.patch_size=16")
    assert other.returncode == 2
    assert "patch_embed" in other.stderr
    assert "Traceback" not in gone.stderr + other.stderr


@pytest.mark.parametrize("stage", ["probe", "evaluate", "video"])
def test_without_weights_there_is_nothing_to_measure(stage):
    with pytest.raises(RecipeError, match=f"stage '{stage}' has no weights to measure: list one of"):
        load_recipe("selfpatch/dino", "demo", (f"stages=[prepare, {stage}]", "data.sets=auto"))
