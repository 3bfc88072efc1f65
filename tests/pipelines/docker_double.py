"""A Docker engine whose containers are processes on this machine: same calls, same places, no engine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from types import SimpleNamespace


class DockerDouble:
    """As much of the docker client as kfp's runner and ours use; `started` keeps what was asked for."""

    def __init__(self, images=None) -> None:
        self.started: list[SimpleNamespace] = []
        self.removed: list[str] = []
        self._images = images
        self.images = SimpleNamespace(get=self._get_image, pull=self._pull_image)
        self.containers = SimpleNamespace(run=self._run)

    def ping(self):
        return True

    def info(self):
        return {}

    def close(self):
        pass

    def _get_image(self, name):
        import docker

        if self._images is not None and name not in self._images:
            raise docker.errors.ImageNotFound(f"no {name}")

    def _pull_image(self, name):
        import docker

        raise docker.errors.NotFound(f"no registry has {name}")

    def _run(self, image, command, *, volumes, detach, environment, working_dir, **settings):
        assert detach
        assert "auto_remove" not in settings
        for host, mount in volumes.items():
            assert Path(host).is_dir(), f"{host} must be made before the daemon makes it as root"
            assert host == mount["bind"] or mount["bind"] == "/kfp-workspace"
        process = subprocess.Popen(
            command,
            cwd=working_dir,
            env={**os.environ, **environment, "PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(
            SimpleNamespace(image=image, command=command, environment=environment, **settings)
        )
        return SimpleNamespace(
            logs=lambda stream, follow: iter(lambda: process.stdout.read1(7), b""),
            wait=lambda: {"StatusCode": process.wait()},
            remove=lambda force: (process.kill(), process.wait(), self.removed.append(command[2])),
        )
