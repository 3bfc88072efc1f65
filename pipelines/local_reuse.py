"""Finished work of earlier local runs: found by what decides it, and taken over instead of done again.

What decides a stage: the recipe values that act on it, its code, the image's content (with --dev: libraries),
the raw data, and the cards of its inputs. Each run keeps it in `RUN/kubeflow/TASK/work.json`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.local_graph import EXECUTOR_OUTPUT, KUBEFLOW
from pipelines.package_tasks import PackageTask
from vitpipe.config.digest import digest_of, file_digest
from vitpipe.contracts.artifact import CARD, changed_files, open_artifact, writing
from vitpipe.contracts.errors import ArtifactError, VitpipeError, disk_errors
from vitpipe.contracts.files import is_empty, linked_or_copied, read_keys, write_whole
from vitpipe.stages.executor import OUT, RECEIPT, ExecutorIO
from vitpipe.stages.folder_lock import holder_of
from vitpipe.stages.resume import is_state
from vitpipe.stages.run import identity_of, node_of, raw_data_of

_WORK = "work.json"


@dataclass(frozen=True)
class Work:
    """What one task of a run has to do.

    Attributes:
        run: the run's folder.
        key: digest of all that decides the result; empty when it cannot be known here.
    """

    run: Path
    task: str
    stage: str
    key: str

    @property
    def out(self) -> Path:
        """The stage's output folder."""
        return self.run / self.task

    @property
    def state(self) -> Path:
        """The folder of its training states."""
        return self.run / f".{self.task}.state"

    @property
    def messages(self) -> Path:
        """The folder of what Kubeflow reads and writes."""
        return self.run / KUBEFLOW / self.task

    def problem(self) -> str:
        """Why the output cannot be used; empty when it is finished and whole."""
        try:
            message = json.loads((self.messages / EXECUTOR_OUTPUT).read_text(encoding="utf-8"))
            receipt = message["artifacts"][OUT]["artifacts"][0]["metadata"][RECEIPT]
            open_artifact(self.out, self.stage)  # compares the checksums of the folder's files
            if receipt != file_digest(self.out / CARD):
                return "left a receipt that does not match its card.json"
        except (OSError, ValueError, LookupError, TypeError):
            return "did not finish"
        except ArtifactError as error:
            return f"left an incomplete output folder ({error.what})"
        return ""

    def is_finished(self) -> bool:
        """Whether this very work has been done in this folder, and nobody has changed the result since."""
        known = read_keys(self.messages / _WORK).get("key")
        return bool(self.key) and known == self.key and not self.problem() and not changed_files(self.out)

    def note(self) -> None:
        """Keep the key of work that begins, and drop the receipt of other work in this folder."""
        (self.messages / EXECUTOR_OUTPUT).unlink(missing_ok=True)
        self.keep_key()

    def keep_key(self) -> None:
        """Keep the key: by it this run, or another one, finds the result and the training state."""
        with disk_errors(self.messages):
            self.messages.mkdir(parents=True, exist_ok=True)
        write_whole(self.messages / _WORK, json.dumps({"stage": self.stage, "key": self.key}) + "\n")


def work_key(task: PackageTask, message: Mapping[str, Any], image_id: str, *, development: bool) -> str:
    """The digest of what decides a task; empty when that is not known here.

    Args:
        message: the task's ExecutorInput.
        image_id: ID of the image's content.
        development: the container has the libraries of this process, not those of its image.

    Raises:
        ArtifactError: with `development`, when the code has changed since the package was compiled.
    """
    given = message.get("inputs", {}).get("parameterValues", {})
    if not task.stage or not given.get("code_digest"):
        return ""
    io = ExecutorIO(json.dumps(message))
    try:
        recipe = io.recipe(str(given.get("recipe")), str(given.get("profile")))
        stage = node_of(recipe, task.stage).stage
        identity, raw_data = identity_of(recipe, stage), raw_data_of(recipe, stage)
        inputs = {name: digest_of(open_artifact(folder).card) for name, folder in io.inputs().items()}
    except VitpipeError:
        return ""  # the stage itself says what is wrong
    if development:
        io.check_code(recipe, task.stage)
    return digest_of(
        {
            "stage": task.stage,
            "recipe": identity["recipe_digest"],
            "code": given["code_digest"],
            "image": image_id,
            "libraries": identity["libraries"] if development else "",
            "data": [str(given.get("data_digest", "")), raw_data],
            "inputs": inputs,
        }
    )


def finished_elsewhere(work: Work) -> Work | None:
    """The same work, finished in another run beside this one; the newest of several."""
    return next((other for other in _same_work(work) if other.is_finished()), None)


def take_output(found: Work, work: Work) -> bool:
    """Give a run the finished output of another one, by hard links where the disk has them.

    Returns:
        Whether it is there now: the other run may be removed at the same moment.

    Raises:
        ArtifactError, StorageError: as `writing`.
    """
    try:
        with writing(work.out) as folder:
            _link_tree(found.out, folder)
        work.messages.mkdir(parents=True, exist_ok=True)
        for path in found.messages.iterdir():
            if path.name not in (EXECUTOR_OUTPUT, _WORK):
                linked_or_copied(path, work.messages / path.name)
        message = json.loads((found.messages / EXECUTOR_OUTPUT).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    # The addresses in it are those of the other run.
    for name, listed in message["artifacts"].items():
        for artifact in listed["artifacts"]:
            artifact["uri"] = str(work.out if name == OUT else work.messages / name)
    write_whole(work.messages / EXECUTOR_OUTPUT, json.dumps(message, indent=2) + "\n")
    return not work.problem()


def take_state(work: Work) -> Path | None:
    """Move the training state of the same work from a run that was stopped; the run it came from."""
    if work.state.is_dir() and not is_empty(work.state):
        return None
    for other in _same_work(work):
        # A stage that still works, and a run that would start it, keep theirs.
        if is_state(other.state) and not holder_of(other.run) and not holder_of(other.state):
            with suppress(OSError):  # of two runs that want it, one is first
                other.state.rename(work.state)
                return other.run
    return None


def _same_work(work: Work) -> Iterator[Work]:
    """The same work in other runs beside this one, the newest first."""
    if not work.key:
        return
    files = work.run.parent.glob(f"*/{KUBEFLOW}/{work.task}/{_WORK}")
    for file in sorted(files, key=_changed_at, reverse=True):
        run = file.parents[2]
        if run != work.run and read_keys(file).get("key") == work.key:
            yield Work(run, work.task, work.stage, work.key)


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _link_tree(source: Path, target: Path) -> None:
    for root, folders, names in os.walk(source):
        place = target / Path(root).relative_to(source)
        for name in folders:
            if (Path(root) / name).is_symlink():
                (place / name).symlink_to((Path(root) / name).readlink())
            else:
                (place / name).mkdir(exist_ok=True)
        for name in names:
            path = Path(root) / name
            if path.is_symlink():
                shutil.copy2(path, place / name, follow_symlinks=False)
            else:
                linked_or_copied(path, place / name)
