"""Real stages, tiny: a table that is killed and stopped on the way ends with the numbers of single runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

VITPIPE = [sys.executable, "-m", "vitpipe"]
TABLE = ["table", "toy/1", "--run", "--profile", "size", "--seeds", "2"]
PLAIN, SMOOTH = "toy/cells/plain", "toy/cells/smooth"
SECONDS_TO_DIE = 20


def start() -> subprocess.Popen:
    return subprocess.Popen(
        [*VITPIPE, *TABLE, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, seconds: float = 300.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def stage_processes(work: Path) -> list[int]:
    """Process numbers of the stages that run in this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").resolve() == work:
                command = (entry / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
                found += [int(entry.name)] if "run" in command else []
        except OSError:
            continue  # it has just ended
    return found


def started_stages(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("===") and " -> " in line]


def test_a_table_survives_a_kill_and_a_stop_and_agrees_with_single_runs(toy, tmp_path):
    work = Path.cwd()
    folder = work / "artifacts" / PLAIN / "size"

    # Killed with no chance to say anything, while the second stage is at work.
    table = start()
    wait_for(lambda: (folder / "prepare/card.json").is_file() and stage_processes(work))
    table.kill()
    table.communicate()
    # The running stage dies with it: nobody holds the folders' locks against the next call.
    wait_for(lambda: not stage_processes(work), SECONDS_TO_DIE)

    # Stopped as a cluster or Ctrl-C does it.
    table = start()
    wait_for(lambda: (folder / "pretrain/card.json").is_file() and stage_processes(work))
    table.send_signal(signal.SIGTERM)
    shown, said = table.communicate()
    assert table.returncode == 128 + signal.SIGTERM
    assert "the same command goes on from there" in said.replace("\n", " ")
    assert not stage_processes(work)
    assert all(" pretrain -> " in line or " finetune -> " in line for line in started_stages(said))

    # The rest: seven stages after packing and the first pre-training, in either case none of these two again.
    table = start()
    shown, said = table.communicate()
    assert table.returncode == 0, said
    assert len(started_stages(said)) in (6, 7)
    rows = {(row["variant"], row["metric"]): row for row in json.loads(shown)["rows"]}

    again = subprocess.run([*VITPIPE, *TABLE, "--json"], capture_output=True, text=True, check=True)
    assert started_stages(again.stderr) == []
    assert json.loads(again.stdout)["rows"] == list(rows.values())

    own = {
        int(part.partition(":")[0]): float(part.partition(":")[2])
        for part in rows["smooth", "top1"]["seeds"].split()
    }
    assert own.keys() == {0, 1}
    # The second seed, which shares the data with the first one in the table.
    assert own[1] == pytest.approx(100 * single(tmp_path / "single", SMOOTH, 1))
    assert rows["smooth", "top1"]["ours_mean"] == pytest.approx((own[0] + own[1]) / 2, abs=1e-3)
    # With two values the sample standard deviation is their distance over the root of two.
    assert rows["smooth", "top1"]["ours_sd"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5, abs=1e-3)
    # Both variants start from the same pre-trained weights.
    assert not (work / "artifacts" / SMOOTH / "size" / "pretrain").exists()


def single(root: Path, recipe: str, seed: int) -> float:
    """The top-1 accuracy of one run by `vitpipe run`, stage by stage in a folder of its own."""
    inputs: dict[str, list[str]] = {
        "prepare": [],
        "pretrain": [f"data={root}/prepare"],
        "finetune": [f"data={root}/prepare", f"weights={root}/pretrain"],
    }
    for stage, given in inputs.items():
        options = [part for text in given for part in ("--in", text)]
        command = [*VITPIPE, "run", stage, "--recipe", recipe, "--profile", "size", "--set", f"seed={seed}"]
        done = subprocess.run(
            [*command, *options, "--out", f"{root}/{stage}"],
            env={**os.environ}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    return float(json.loads((root / "finetune/metrics.json").read_text(encoding="utf-8"))["top1"])
