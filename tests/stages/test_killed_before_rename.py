"""A stage that dies between its last number and the rename of its output is KILLED, and its model is not offered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VALUES = (
    "stages=[prepare, finetune]", "data.sets=[imagenet]", "data.workers=0", "finetune.epochs=1",
    "finetune.global_batch=10", "finetune.optim.warmup_epochs=0",
    *(f"data.embedded.{key}" for key in ("train_images=20", "val_images=10")),
)  # fmt: skip
# Runs the command line, and dies where the output folder is renamed to its final name.
DYING = """
import os, signal, sys
from pathlib import Path
from vitpipe.cli import main
rename = Path.rename
def dies(self, target):
    if self.name == f".{sys.argv[2]}.partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = dies
main()
"""


def stage(folder: Path, name: str, code: str = "from vitpipe.cli import main; main()") -> int:
    command = [sys.executable, "-c", code, "run", name, "--recipe", "itpn/pixel_base", "--profile", "demo"]
    command += [part for value in VALUES for part in ("--set", value)]
    command += ["--out", name, *(("--in", "data=prepare") if name != "prepare" else ())]
    store = f"sqlite:///{folder / 'mlflow.db'}"
    environment = {key: value for key, value in os.environ.items() if key != "VITPIPE_TRACKING"}
    environment |= {"MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, check=False)
    subprocess.run([sys.executable, "-m", "vitpipe", "sync", "."], cwd=folder, env=environment, check=True)
    return done.returncode


def test_finished_is_said_after_the_output_is_there(tmp_path):
    assert stage(tmp_path, "prepare", DYING) == -signal.SIGKILL
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def status(name: str) -> str:
        runs = client.search_runs([client.get_experiment_by_name("vitpipe").experiment_id])
        (run,) = (run for run in runs if run.data.tags.get("vitpipe.stage") == name)
        return run.info.status

    assert status("prepare") == "KILLED"
    assert stage(tmp_path, "prepare") == 0
    assert status("prepare") == "FINISHED"

    assert stage(tmp_path, "finetune", DYING) == -signal.SIGKILL
    assert not (tmp_path / "finetune").exists()
    assert status("finetune") == "KILLED"
    assert not client.search_registered_models()
    # Resumed: nothing is trained again, and one version is registered.
    assert stage(tmp_path, "finetune") == 0
    assert status("finetune") == "FINISHED"
    (model,) = client.search_registered_models()
    assert {str(version) for version in model.aliases.values()} == {"1"}
