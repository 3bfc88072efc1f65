"""`vitpipe benchmark reversible` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SMALL = ["--columns", "2", "--columns", "4", "--width", "16", "--image-size", "64", "--batch", "1"]


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitpipe", "benchmark", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_table_notes_and_figures(tmp_path: Path):
    done = _run("reversible", *SMALL, "--rounds", "1", "--figure", "new/steps.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for part in (
        "width 16, depth 1, 64 pixels, batch 1, float32, rounds 1, CPU",
        "block",
        "2 columns are 1 + 1",
    ):
        assert part in done.stdout
    assert done.stderr.splitlines() == ["measuring 2 columns", "measuring 4 columns"]
    assert (tmp_path / "new/steps.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_settings_steps_and_scales(tmp_path: Path):
    done = _run(
        "reversible", *SMALL, "--rounds", "2", "--device", "cpu", "--json", "--error-figure", "e.png", cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["setting"]["columns"] == [2, 4]
    assert [(step["columns"], step["way"]) for step in found["steps"]] == [
        (count, way) for count in (2, 4) for way in ("plain", "reversible", "column", "block")
    ]
    assert [error["scale"] for error in found["scales"]][:3] == [1.0, 0.7, 0.5]
    assert found["scales"][-1]["auto"] == "column"
    assert (tmp_path / "e.png").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--columns", "0"], "0 columns cannot be split"),
        (["--columns", "4", "--columns", "5"], "5 columns cannot be split"),
        (["--columns", "two"], "should be a valid integer"),
        (["--batch", "0"], "greater than or equal to 1"),
        (["--device", "tpu"], "This machine has no device 'tpu'"),
        (["--device", "cuda"], "no device 'cuda'. Where: --device. Fix: choose one of cpu"),
        (["--image-size", "50"], "50"),
        (["--image-size", "16"], "mask_ratio"),
        (["--width", "130"], "width of 130"),
        (["--figure", "steps.txt"], "'steps.txt' is not the name of a PNG file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(arguments: list[str], part: str, tmp_path: Path):
    done = _run("reversible", *arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert part in done.stderr.replace("\n", " ").replace("│", " ")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_names_the_measurement(tmp_path: Path):
    assert "reversible" in _run("--help", cwd=tmp_path).stdout
