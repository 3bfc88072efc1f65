"""Tracking of one stage: the logger that a stage is given.

    with stage_run(stage="finetune", recipe=recipe, folder=folder, state=state, ...) as logger:
        ...

All records go into an outbox (a folder in `state`, see outbox.py), and an uploader sends them to MLflow: a
slow server does not delay the stage, and a kill loses no final record. The same `state` continues the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import Recipe
from vitpipe.config.run_name import run_title
from vitpipe.contracts.address import Address
from vitpipe.contracts.artifact import HISTORY, read_metrics, write_table
from vitpipe.contracts.errors import InputError, StoppedError, StorageError, disk_errors
from vitpipe.contracts.files import linked_or_copied, write_whole
from vitpipe.track.console import Console
from vitpipe.track.journal import Journal, OfferedModel, Status, Target, UsedDataset, without_credentials
from vitpipe.track.outbox import MODEL_FOLDER, OUTBOX_FOLDER, Origin, Outbox, plain_value, table_as_json
from vitpipe.track.producer import Producer
from vitpipe.track.run_values import compared_values, flatten
from vitpipe.track.server import EXPERIMENT, OFF, address_to_use, store_address
from vitpipe.track.sync import UNSENT_SUFFIX, keep_unsent
from vitpipe.track.uploader import Uploader

_CLASS_COLUMNS = ("class", "true", "predicted")
_RUN_SECONDS = 30.0  # at most for the ID of the run, which the stage's card names
_CHECK_SECONDS = 5.0  # between checks of the server's status, each of which reads a file


class SilentLogger:
    """A logger that discards everything, for ranks other than 0."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def commit(self, step: int) -> None:
        """Do nothing."""

    def rewind(self, step: int) -> None:
        """Do nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Do nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Do nothing."""

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Do nothing."""

    def say(self, line: str) -> None:
        """Do nothing."""

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Do nothing."""


class StageRun:
    """The logger of rank 0 (`RunLogger`). Made by `stage_run`."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        outbox: Outbox,
        address: Address,
        class_names: Mapping[str, str] | None = None,
    ) -> None:
        self.stage, self.folder, self.outbox, self.address = stage, folder, outbox, address
        self._class_names = dict(class_names or {})
        self.console = Console(stage)
        # Before RUNNING is recorded: an uploader of an earlier process that reads it must see that this
        # process is alive, or it would mark the run KILLED.
        outbox.write_producer(Producer.of_this_process())
        self.journal = Journal(outbox.journal)
        if num_damaged := self.journal.contents.num_damaged:
            self.say(f"{outbox.journal}: damaged lines skipped: {num_damaged}")
        self._is_new = not self.journal.contents.statuses
        self.journal.status("RUNNING")
        self._uploader = None if address == OFF else Uploader(outbox, address)
        self._has_warned, self._has_succeeded = False, False
        self._last_note, self._last_check = "", 0.0

    @property
    def run_id(self) -> str:
        """ID of the MLflow run; waits for MLflow's first answer. Empty when it does not answer."""
        if self._uploader is not None:
            self._uploader.begin()
            self._uploader.wait_for_run(_RUN_SECONDS)
        return self.outbox.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimiser step; pending until `commit`."""
        if values:
            self.journal.points(values, step)

    def commit(self, step: int) -> None:
        """Make points up to `step` final: they are on disk when this returns, and are then sent."""
        self.journal.commit(step)
        if self._uploader is not None:
            self._uploader.begin()
        self._wake()

    def rewind(self, step: int) -> None:
        """Discard pending points after `step`."""
        self.journal.rewind(step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `tables/NAME.csv` into the stage's folder and upload the table to MLflow.

        MLflow gets the names of classes, the file their keys, by which other stages find them.
        """
        if not rows:
            return
        write_table(self.folder, name, rows)
        shown = [
            {
                key: self._class_names.get(value, value) if key in _CLASS_COLUMNS else value
                for key, value in row.items()
            }
            for row in rows
        ]
        self.log_file(f"tables/{name}.json", table_as_json(shown))

    def figure(self, name: str, path: Path) -> None:
        """Upload an image file to MLflow as `figures/NAME` with the file's suffix."""
        self.log_file(f"figures/{name.removesuffix(path.suffix)}{path.suffix}", path)

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record a dataset that the stage reads; MLflow shows it on the run's page."""
        plain = {key: plain_value(value) for key, value in facts.items()}
        self.journal.dataset(UsedDataset(name, digest, source, context, plain))
        self._wake()

    def log_file(self, name: str, content: str | Path, target: Target = "run") -> None:
        """Upload an artifact named `name`: a text, or the present content of a file."""
        # A copy, because the file may change or be removed before the uploader reads it.
        path = self.outbox.files / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                write_whole(path, content)
        self.journal.file(name, target)
        self._wake()

    def offer_model(self, offered: OfferedModel, files: Mapping[str, str | bytes | Path]) -> None:
        """Record a model for MLflow's registry; nothing is kept when tracking is off.

        Args:
            files: name -> content, or a file; see `model_folder`.
        """
        if self._uploader is None:
            return
        for name, content in files.items():
            path = self.outbox.files / MODEL_FOLDER / name
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    linked_or_copied(content, path)
                else:
                    path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.journal.model(offered)
        self._wake()

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.say(line)

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show the step and the latest values on the console."""
        self.console.progress(step, num_steps, values)
        if time.monotonic() - self._last_check > _CHECK_SECONDS:
            self._check_server()

    def succeed(self) -> None:
        """Make all points final and write `tables/history.csv` from the journal; later calls do nothing."""
        # Called by the stage before it writes its card, which lists the files of the output, and again at the
        # end.
        if self._has_succeeded:
            return
        self._has_succeeded = True
        self.journal.commit()
        contents, metrics = self.journal.contents, read_metrics(self.folder)
        # When a finished stage writes its output again, its final metrics are already in the journal. In the
        # history they would make this output differ from the first one.
        final_metrics = {(name, contents.last_step) for name in metrics}
        rows = [
            {"step": p.step, "name": p.name, "value": p.value}
            for p in contents.final
            if (p.name, p.step) not in final_metrics
        ]
        if rows:
            self.table(HISTORY, rows)
        if metrics:
            self.journal.points(metrics, contents.last_step)
            self.journal.commit()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the output's record says of the tracking: that MLflow has not answered so far."""
        status = self._uploader.server_status() if self._uploader is not None else None
        if status is None or not status.reason:
            return ()
        return (f"not in MLflow when it ended: {status.reason} ({self.address})",)

    @property
    def has_nothing_to_show(self) -> bool:
        """Whether neither this process nor an earlier one has recorded a number."""
        return self._is_new and not self.journal.contents.final

    def withdraw(self) -> bool:
        """Forget a stage that has refused its input before MLflow has heard of it.

        Returns:
            Whether MLflow knows nothing of this process; a run of an earlier one stays as it is.
        """
        if self._uploader is not None and not self._uploader.withdraw():
            return False
        self.journal.close()
        self.console.close()
        # What an earlier process could not send is still to be sent.
        if self._is_new:
            shutil.rmtree(self.outbox.folder, ignore_errors=True)
        return True

    def end(self, status: Status, keep_at: Path) -> None:
        """Record the final status and wait until everything is sent; what cannot be sent is kept.

        Args:
            keep_at: folder for a copy of an undelivered outbox of a finished stage: its state is removed.

        Raises:
            StorageError: the disk refuses to record that the stage finished.
        """
        # After a failure, a full disk must not replace the error that the user has to see. Without FINISHED
        # in the journal, however, a finished run would later be marked KILLED.
        with contextlib.nullcontext() if status == "FINISHED" else contextlib.suppress(StorageError):
            self.journal.status(status)
        self.journal.close()
        self.console.close()
        if self._uploader is None:
            return
        self._uploader.finish()
        self._check_server()
        if self.outbox.is_delivered():
            if status == "REFUSED":  # of a run that is no more
                shutil.rmtree(self.outbox.folder, ignore_errors=True)
            return
        kept = keep_unsent(self.outbox, keep_at) if status == "FINISHED" else self.outbox.folder
        self.say(
            f"MLflow at {self.address} has not received all records of stage {self.stage}; they are kept in "
            f"{kept}. The next stage sends them. To send them now, run: vitpipe sync {shlex.quote(str(kept))}"
        )

    def _wake(self) -> None:
        if self._uploader is not None:
            self._uploader.wake()
            self._check_server()

    def _check_server(self) -> None:
        """Warn once per run when MLflow does not answer, and print every warning of the uploader once."""
        self._last_check = time.monotonic()
        self.outbox.touch_producer()  # the uploader renews the heartbeat too, but it may have been killed
        status = self._uploader.server_status() if self._uploader is not None else None
        if status is None:
            return
        if status.note and status.note != self._last_note:
            self._last_note = status.note
            self.say(status.note)
        if status.reason and not self._has_warned:
            self._has_warned = True
            fix = f" Fix: {status.fix}." if status.fix else ""
            self.say(
                f"{status.reason}: {self.address}. The run continues; its records are kept in "
                f"{self.outbox.folder} and sent when MLflow answers.{fix}"
            )


@contextmanager
def stage_run(
    *,
    stage: str,
    recipe: Recipe,
    folder: Path,
    state: Path,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    pipeline: str | None = None,
    class_names: Mapping[str, str] | None = None,
    address: Address | str | None = None,
) -> Iterator[StageRun]:
    """Track one stage; on rank 0 only.

    Continues the MLflow run of the outbox in `state`, else the one that Kubeflow's MLflow plugin sets by
    `MLFLOW_RUN_ID` (removed from the environment), else creates a run below the pipeline's run, which the
    first stage creates. The final status is FINISHED, KILLED after SIGINT or SIGTERM, else FAILED; a stage
    that refuses its input before it has numbers leaves no run: one that has appeared meanwhile is deleted.

    Args:
        folder: the stage's output folder, for tables.
        state: folder that survives a kill and holds the outbox; an undelivered outbox is kept beside it.
        tags: `git_commit` and other short facts about the origin of the results.
        params: the recipe sections that the stage reads, nested.
        provenance: digests, kept as the artifact `provenance.json`.
        pipeline: key that the stages of one pipeline run share; by default recipe, profile and digest.
        class_names: class key -> name for people.
        address: tracking URI with credentials; by default `store_address(current folder)`.

    Raises:
        StorageError: the disk refuses a write of the outbox.
    """
    given = store_address(Path.cwd()) if address is None else address
    given = Address(given) if isinstance(given, str) else given
    outbox = Outbox(state / OUTBOX_FOLDER)
    origin = outbox.open(_origin(stage, recipe, dict(tags or {}), params or {}, pipeline, given))
    sent = outbox.sent()
    may_have_run = sent is None or bool(sent.run_id)
    address = address_to_use(origin.store, given, may_have_run=may_have_run)
    run = StageRun(stage, folder, outbox, address, class_names)
    keep_at = state.parent / f"{state.stem}{UNSENT_SUFFIX}"
    status: Status = "FAILED"
    is_withdrawn = False
    try:
        if provenance:
            run.log_file("provenance.json", json.dumps(provenance, indent=2) + "\n")
        yield run
        run.succeed()
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, StoppedError):
        status = "KILLED"
        raise
    except InputError:
        is_withdrawn = run.withdraw()
        status = "REFUSED" if run.has_nothing_to_show else "FAILED"
        raise
    finally:
        if not is_withdrawn:
            run.end(status, keep_at)


def _origin(
    stage: str,
    recipe: Recipe,
    tags: dict[str, str],
    params: Mapping[str, Any],
    pipeline: str | None,
    address: Address,
) -> Origin:
    key = pipeline or f"{recipe.name} {recipe.profile} {digest_of(recipe)[:12]}"
    title = run_title(recipe)
    return Origin(
        store=address,
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
        experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID", ""),
        # Removed as by `mlflow.start_run`, so that later stages of this process do not continue the same run.
        given_run_id=os.environ.pop("MLFLOW_RUN_ID", ""),
        pipeline=key.replace("'", ""),  # a quote would end the string in MLflow's search filter
        pipeline_title=title,
        stage=stage,
        params=without_credentials(flatten(params)),
        pipeline_params=without_credentials(compared_values(recipe)),
        tags=without_credentials(
            {"recipe": recipe.name, "profile": recipe.profile, **{k: str(v) for k, v in tags.items()}}
        ),
    )
