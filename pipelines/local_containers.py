"""Containers of this machine's Docker engine: started, followed, stopped and always removed."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vitpipe.contracts.errors import EngineError
from vitpipe.contracts.shell import with_typed_commands

DEV_IMAGE = "vitpipe-dev:latest"
RUN_LABEL, TASK_LABEL = "vitpipe.run", "vitpipe.task"
_WITHOUT_DOCKER = "start Docker, or run the same stages without it by `dvc repro`"
_NUM_LOG_LINES = 12
# 126 and 127 are the codes of POSIX shells and of Docker; above 128 it is 128 + the number of the signal.
_EXIT_MEANS = {
    126: "the command cannot be executed in this image",
    127: "the image does not contain `vitpipe`",
    135: "bus error (SIGBUS), usually too little shared memory: increase --shm-gib",
    137: "killed (SIGKILL), usually out of memory: increase --memory, or free some",
    143: "stopped by SIGTERM",
}
_NO_MEMORY = "it needed more memory than it may have: increase --memory, or free some"


class EngineStoppedError(EngineError):
    """The engine does not answer any more: no further task can run."""


@dataclass(frozen=True)
class Ended:
    """How a container ended.

    Attributes:
        code: its exit code; None when it never started.
        why: what the code means, or why it did not start; empty when that is not known.
    """

    code: int | None
    why: str = ""

    def __str__(self) -> str:
        if self.code is None:
            return f" ({self.why})" if self.why else ""
        return f" (exit code {self.code}{f', {self.why}' if self.why else ''})" if self.code else ""


class Containers:
    """Runs one container after the other; keeps their logs.

    Args:
        client: docker client.
        logs: folder for one log per task.
        say: gets every line that a container prints, and what is said of it here.
    """

    def __init__(self, client: Any, logs: Path, say: Callable[[str], None]) -> None:
        self._client, self._logs, self._say = client, logs, say

    def run(self, task: str, image: str, command: list[str], **settings: Any) -> Ended:
        """Run one container until it ends and remove it.

        Args:
            settings: further arguments of `docker create`.

        Raises:
            EngineStoppedError: the engine does not answer any more.
            KeyboardInterrupt: this process was interrupted; the container got SIGTERM and has ended. After a
                second interrupt it is removed at once.
        """
        from docker.errors import APIError

        with engine_errors(f"while '{task}' was running"):
            container = None
            try:
                # Not containers.run: it leaves a container that does not start. No auto_remove: when the
                # engine removes one before wait(), kfp 2.17 took docker's NotFound for exit code 0.
                container = self._client.containers.create(image, command, detach=True, **settings)
                container.start()
            except APIError as error:
                _remove(container)
                return Ended(None, f"the container did not start: {_words_of(error)}")
            except BaseException:
                _remove(container)
                raise
            try:
                return self._follow(task, container)
            finally:
                _remove(container)

    def log(self, task: str) -> Path:
        """File with everything that a task's container printed."""
        return self._logs / f"{task}.log"

    def last_lines(self, task: str) -> str:
        """The last lines that a task's container printed, as one line."""
        if not self.log(task).is_file():
            return ""
        lines = self.log(task).read_text(encoding="utf-8").splitlines()
        return " | ".join(deque((line.strip() for line in lines if line.strip()), maxlen=_NUM_LOG_LINES))

    def stop_leftovers(self, run: Path) -> list[str]:
        """Stop and remove containers of a run whose `vitpipe local` was killed; the names of their tasks."""
        with engine_errors("before the first stage"):
            left = self._client.containers.list(all=True, filters={"label": f"{RUN_LABEL}={run}"})
            names = sorted(container.labels.get(TASK_LABEL, "") for container in left)
            for container in left:
                self._say(
                    f"A container of this run is left ({container.labels.get(TASK_LABEL, '')}): stopping it"
                )
                container.stop(timeout=600)  # its stage saves its state first; seconds until SIGKILL
                _remove(container)
        return names

    def _follow(self, task: str, container: Any) -> Ended:
        """Copy the log until the container has ended."""
        follower = _Follower(task, container, self.log(task), self._say)
        follower.start()
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                follower.join()
                break
            except KeyboardInterrupt as again:
                if interrupt is not None:
                    raise
                interrupt = again
                self._say(f"Stopping '{task}', which saves its state first; once more stops it at once")
                with contextlib.suppress(Exception):  # it may have ended just now
                    container.kill(signal="SIGTERM")
        if interrupt is not None:
            raise interrupt
        if follower.error is not None:
            raise follower.error
        code = follower.code
        container.reload()
        killed_for_memory = container.attrs.get("State", {}).get("OOMKilled")
        return Ended(code, _NO_MEMORY if code and killed_for_memory else _EXIT_MEANS.get(code or 0, ""))


class _Follower(threading.Thread):
    """Copies a container's output and waits for its end. A thread, so that interrupts do not cut a line."""

    def __init__(self, task: str, container: Any, log: Path, say: Callable[[str], None]) -> None:
        super().__init__(name=f"log of {task}", daemon=True)
        self.task, self.container, self.path, self.say = task, container, log, say
        self.code: int | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        """Copy lines until the end; the exit code is in `code`, a failure of the engine in `error`."""
        try:
            with self._log() as log:
                for line in _lines(self.container.logs(stream=True, follow=True)):
                    with contextlib.suppress(OSError):  # a full disk must not end the stage
                        print(line, file=log)
                    # Lines of training begin with the stage's name.
                    self.say(line if line.startswith(f"{self.task}:") else f"{self.task}: {line}")
            self.code = int(self.container.wait()["StatusCode"])
        except Exception as error:  # raised where the thread is waited for
            self.error = error

    def _log(self) -> IO[str]:
        try:
            # Appended: a resumed run keeps what was printed before.
            return self.path.open("a", encoding="utf-8", buffering=1)
        except OSError:
            return Path(os.devnull).open("w", encoding="utf-8")


def _lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Whole lines of a stream of bytes, whose pieces may end inside a line or a character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + decoder.decode(piece)).split("\n")
        yield from (line.rstrip("\r") for line in lines)
    if rest:
        yield rest


def _remove(container: Any) -> None:
    """Remove a container; an engine that is gone has been reported, or will be."""
    if container is not None:
        with contextlib.suppress(Exception):
            container.remove(force=True)


def _words_of(error: Any) -> str:
    return " ".join(str(error.explanation or error).split())


@contextlib.contextmanager
def engine_errors(when: str) -> Iterator[None]:
    """Turn every way in which the engine may fail to answer into one error.

    Args:
        when: for the message.

    Raises:
        EngineStoppedError: the engine refused, or does not answer.
    """
    import docker
    import requests  # type: ignore[import-untyped]  # a dependency of docker
    import urllib3

    try:
        yield
    except (
        docker.errors.DockerException,
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        ConnectionError,
    ) as error:
        reason = _words_of(error) if isinstance(error, docker.errors.APIError) else type(error).__name__
        raise EngineStoppedError(
            f"The Docker engine failed {when} ({reason})", where="docker", fix="start Docker again"
        ) from error


@contextlib.contextmanager
def docker_engine() -> Iterator[Any]:
    """A client of the engine, which has answered.

    Raises:
        EngineError: there is no client, or no engine answers.
    """
    try:
        import docker
    except ImportError as error:
        raise EngineError(
            "The Docker client for Python is not installed", fix="install the extra: vitpipe[kubeflow]"
        ) from error
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        raise EngineError("No Docker engine answers", where="docker", fix=_WITHOUT_DOCKER) from error
    with contextlib.closing(client):
        yield client


def image_ids(client: Any, images: Iterable[str]) -> dict[str, str]:
    """Image reference -> ID of its content; a missing one is pulled.

    All before the first stage: a missing image is not found after hours of training.

    Raises:
        EngineError: an image is not here and cannot be pulled.
    """
    return {image: _id_of(client, image) for image in sorted(images)}


def _id_of(client: Any, image: str) -> str:
    import docker

    with engine_errors("before the first stage"):
        try:
            return str(client.images.get(image).id)
        except docker.errors.ImageNotFound:
            fix = (
                "run docker/dev-image.sh"
                if image == DEV_IMAGE
                else "build it, or choose another with --image"
            )
            print(with_typed_commands(f"Pulling the image {image}"), file=sys.stderr, flush=True)
            try:
                return str(client.images.pull(image).id)
            except docker.errors.APIError as error:
                raise EngineError(
                    f"The image {image} does not exist locally and cannot be pulled ({_words_of(error)})",
                    where="docker",
                    fix=fix,
                ) from error
