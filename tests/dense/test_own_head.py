"""A segmentation head that joins by a plugin's two files, trained and measured as a user runs it."""

from __future__ import annotations

import json

import pytest
from toy_project import make_project, must, refused

pytestmark = [pytest.mark.dense, pytest.mark.slow]

PARAMS = """
recipe: itpn/pixel_base
profile: demo
plugins: [mine]
overrides:
  - stages=[prepare, segment]
  - "data={sets: [ade20k], workers: 0, embedded: {scene_size: 64, scene_train_images: 8, scene_val_images: 4}}"
  - expect=[]
  - model.pyramid.width=16
  - segment.head=fcn
  - segment.global_batch=2
  - segment.steps=4
  - segment.scale=[256,64]
  - segment.optim.warmup_steps=1
  - segment.log_every_steps=1
"""


def test_it_trains_and_is_measured(tmp_path):
    project = make_project(tmp_path, PARAMS)
    must(project, "run", "prepare")
    must(project, "run", "segment")
    folder = project / "artifacts/itpn/pixel_base/demo/segment"
    assert 0.0 <= json.loads((folder / "metrics.json").read_text())["mIoU"] <= 1.0
    losses = [row for row in (folder / "tables/history.csv").read_text().splitlines() if "train/loss" in row]
    assert len(losses) == 4
    said = refused(project, "plan", "--set", "segment.head.widht=3")
    assert "segmentation head 'fcn' has no option 'widht' (did you mean 'width'?)" in said
    # The other task does not have it.
    said = refused(project, "plan", "--set", "detect.head=fcn")
    assert "there is no detection head 'fcn'" in said
