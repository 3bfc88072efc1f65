"""`vitpipe benchmark data`, `pack` and `index` as a user meets them, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "vitpipe", "benchmark", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "VITPIPE_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


def test_data_compares_every_pixel_of_every_path(run, tmp_path):
    done = run(
        "data", "--images", "32", "--batch", "16", "--rounds", "1", "--image-size", "64", "--figure", "x.png",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [path["path"] for path in found["paths"]] == [
        "crop and flip", "masked pre-training", "fine-tuning", "multi-crop 2 + 8", "evaluation",
    ]  # fmt: skip
    assert all((path["num_compared"], path["num_different"]) == (32, 0) for path in found["paths"])
    steps = {step["step"]: step for step in found["steps"]}
    assert set(steps) == {
        "read and decode", "crop and resize", "flip", "augment", "to tensor and normalise", "erase",
    }  # fmt: skip
    assert all(step["folder_ms"] > 0 and step["shards_ms"] > 0 for step in steps.values())
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_pack_measures_and_keeps_the_speed_for_plan(run, tmp_path):
    done = run(
        "pack", "--count", "60", "--photographs", "12", "--workers", "1", "--scratch", "here", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Each class has one more image, in val.
    assert [cost["num_images"] for cost in found["costs"]] == [12 + 10, 60 + 10]
    assert all(20 < cost["peak_packer_mb"] < 300 for cost in found["costs"])
    kept = json.loads(Path(found["kept"]).read_text())
    assert kept["cores"] == 1
    assert kept["megabytes_per_second_per_core"] == found["costs"][0]["megabytes_per_second"]
    assert list((tmp_path / "here").iterdir()) == [], "test images are removed"


def test_index_opens_and_shuffles(run):
    done = run("index", "--entries", "500000", "--classes", "100", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    cost = json.loads(done.stdout)[0]
    assert (cost["num_images"], cost["num_shards"]) == (500_000, 215)
    assert cost["index_mb"] == 12.0
    assert cost["peak_mb"] - cost["imports_mb"] < 100


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("data", "--images", "32", "--batch", "64"), "do not fill a batch of 64"),
        (("data", "--figure", "x.pdf"), "ends in .png"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(run, arguments, word):
    done = run(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert "measuring" not in done.stderr
