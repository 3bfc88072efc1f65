"""Tasks as Kubeflow starts them: processes with a file system of their own and one shared volume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vitpipe.config.pipeline_parameters import parameter_of
from vitpipe.stages.folder_lock import STALE_SECONDS
from vitpipe.stages.pipeline_run import CONCLUSION

RECIPE = "itpn/pixel_base"
OVERRIDES = [
    "data.sets=[imagenet]",
    "data.embedded.train_images=48",
    "data.embedded.val_images=20",
    "data.workers=1",
    "stages=[prepare, pretrain, finetune, report]",
]
TRAINING = [
    "pretrain.epochs=8",
    "pretrain.global_batch=16",
    "pretrain.optim.warmup_epochs=0",
    "pretrain.checkpoint_minutes=0.001",
]


class Pod:
    """One try of a task as Kubeflow starts it: a fresh file system but for the mounted volumes."""

    def __init__(
        self,
        folder: Path,
        volume: Path,
        task: str,
        inputs: dict[str, Path],
        run: str,
        *,
        more: dict[str, Any] | None = None,
        pages: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.out = folder, folder / "out"
        values = {"overrides": OVERRIDES, parameter_of("pretrain"): TRAINING, **(more or {})}
        self.folder.mkdir(parents=True)
        message = {
            "inputs": {
                "parameterValues": values,
                "artifacts": {
                    key: {"artifacts": [{"name": key, "uri": str(place)}]} for key, place in inputs.items()
                },
            },
            "outputs": {
                "artifacts": {
                    # The address is the same in every pod, the place where it is mounted is the pod's own.
                    "out": {
                        "artifacts": [
                            {
                                "name": "out",
                                "uri": f"minio://mlpipeline/itpn/{run}/{task}/{folder.name}/out",
                                "customPath": str(self.out),
                            }
                        ]
                    },
                    "metrics": {"artifacts": [{"name": "metrics", "uri": str(folder / "metrics")}]},
                    **{
                        name: {
                            "artifacts": [
                                {
                                    "name": name,
                                    "uri": str(folder / name),
                                    "type": {"schemaTitle": f"system.{kind}"},
                                }
                            ]
                        }
                        for name, kind in (pages or {}).items()
                    },
                },
                "outputFile": str(self.folder / "executor_output.json"),
            },
        }
        verb = [CONCLUSION] if task == CONCLUSION else ["run", task]
        self.command = [sys.executable, "-m", "vitpipe", *verb, "--recipe", RECIPE, "--profile", "demo"]
        self.command += ["--executor-input", json.dumps(message)]
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "VITPIPE_STATES": str(volume / "states"),
            "POD_NAME": folder.name,
            "VITPIPE_IMAGE": "registry.example/train@sha256:0",
            "VITPIPE_KUBEFLOW_PAGES": "https://kubeflow.example",
            "MLFLOW_TRACKING_URI": f"sqlite:///{volume / 'mlflow.db'}",
        }
        self.environment.pop("VITPIPE_TRACKING", None)

    def start(self) -> subprocess.Popen:
        with (self.folder / "log").open("wb") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(self) -> Path:
        assert self.start().wait(timeout=300) == 0, (self.folder / "log").read_text()[-2000:]
        return self.out


def written_three_minutes_ago(lock: Path) -> None:
    """Let a dead pod's lock be as old as one that is taken over, which is tested by test_folder_lock.py."""
    owner = json.loads(lock.read_text(encoding="utf-8"))
    lock.write_text(json.dumps(owner | {"time": owner["time"] - STALE_SECONDS}) + "\n", encoding="utf-8")
