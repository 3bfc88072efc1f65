"""A Docker engine whose containers are processes on this machine: same calls, same places, no engine."""

from __future__ import annotations

import os
import signal as signals
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace


class ContainerDouble:
    """One container: a process from `start` on."""

    def __init__(self, engine, image, command, volumes, environment, working_dir, **settings) -> None:
        self.engine, self.image, self.command = engine, image, command
        self.environment, self.settings = environment, settings
        self.labels = settings.get("labels", {})
        self.volumes, self.working_dir = volumes, working_dir
        self.process = None
        self.attrs = {"State": {"OOMKilled": False}}

    def start(self):
        import docker

        name = self.labels.get("vitpipe.task", "")
        if name in self.engine.unable_to_start:
            raise docker.errors.APIError("refused", explanation="exec: no such file")
        for host, mount in self.volumes.items():
            assert Path(host).is_dir(), f"{host} must be made before the daemon makes it as root"
            assert host == mount["bind"]
        self.process = subprocess.Popen(
            self.command,
            cwd=self.working_dir,
            env={**os.environ, **self.environment, "PATH": os.environ["PATH"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.engine.started.append(
            SimpleNamespace(
                image=self.image, command=self.command, environment=self.environment, **self.settings
            )
        )
        self.engine.on_start(self)

    def logs(self, stream, follow):
        assert stream
        assert follow
        return iter(lambda: self.process.stdout.read1(7), b"")

    def wait(self):
        self.engine.answer()
        code = self.process.wait()
        return {"StatusCode": code if code >= 0 else 128 - code}

    def reload(self):
        pass

    def kill(self, signal):
        self.process.send_signal(getattr(signals, signal))

    def stop(self, timeout):
        self.process.terminate()
        self.process.wait(timeout)

    def remove(self, force):
        assert force
        self.engine.all.remove(self)
        self.engine.removed.append(self.labels.get("vitpipe.task", self.command[-1]))
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class DockerDouble:
    """As much of the docker client as a local run uses.

    Attributes:
        started: what every container was started with.
        removed: task of every container that was removed.
        unable_to_start: tasks whose containers are made, but do not start.
        on_start: called with every container that has started.
        is_gone: the engine does not answer any more.
    """

    def __init__(self, images=None) -> None:
        self.started: list[SimpleNamespace] = []
        self.removed: list[str] = []
        self.all: list[ContainerDouble] = []
        self.unable_to_start: tuple[str, ...] = ()
        self.on_start = lambda container: None
        self.is_gone = False
        self._images = images
        self.images = SimpleNamespace(get=self._get_image, pull=self._pull_image)
        self.containers = SimpleNamespace(create=self._create, list=self._list)

    def answer(self):
        import requests

        if self.is_gone:
            raise requests.exceptions.ConnectionError("connection refused")

    def ping(self):
        return True

    def info(self):
        return {"SecurityOptions": ["name=seccomp,profile=default"]}

    def close(self):
        pass

    def stages(self):
        """Stages whose containers were started, in order."""
        return [started.command[2] for started in self.started if started.command[1] == "run"]

    def _get_image(self, name):
        import docker

        if self._images is not None and name not in self._images:
            raise docker.errors.ImageNotFound(f"no {name}")
        return SimpleNamespace(id=f"sha256:{name}")

    def _pull_image(self, name):
        import docker

        raise docker.errors.NotFound(f"no registry has {name}")

    def _create(self, image, command, *, detach, volumes, environment, working_dir, **settings):
        assert detach
        assert "auto_remove" not in settings
        self.answer()
        container = ContainerDouble(self, image, command, volumes, environment, working_dir, **settings)
        self.all.append(container)
        return container

    def _list(self, *, all, filters):
        assert all
        self.answer()
        key, _, value = filters["label"].partition("=")
        return [container for container in self.all if container.labels.get(key) == value]


def signal_when(container, number, seen: str, send) -> None:
    """Call `send(number)` from another thread as soon as a text stands in the container's log."""
    log = Path(container.labels["vitpipe.run"]) / "logs" / f"{container.labels['vitpipe.task']}.log"

    def wait_for_it() -> None:
        while container.process.poll() is None:
            if log.is_file() and seen in log.read_text(encoding="utf-8"):
                send(number)
                return
            threading.Event().wait(0.05)

    threading.Thread(target=wait_for_it, daemon=True).start()
