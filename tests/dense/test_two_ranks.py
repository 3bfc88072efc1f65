"""Both dense stages under torchrun: two processes share the batches, rank 0 writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dense, pytest.mark.slow]


@pytest.mark.parametrize(
    ("stage", "head"),
    [("detect", "own"), ("segment", "own"), ("detect", "cascade_mask_rcnn"), ("segment", "mask2former")],
)
def test_two_ranks_agree_and_one_writes(prepared, tmp_path, stage, head):
    script = Path(__file__).with_name("rank_stage.py")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(script), stage, head, str(prepared), str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["losses"]
    assert first["losses"] == second["losses"]
    assert first["files"] == ["mm_config.json", "predictions.png", "weights.safetensors"]
    assert second["files"] == []
    assert first["metrics"]
    if stage == "segment":
        assert first["metrics"] == second["metrics"]
