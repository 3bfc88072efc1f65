"""One stage's run as seen by the tracker: what a stage is given as its logger.

    with stage_run(stage="finetune", recipe=recipe, folder=folder, state=state, ...) as logger:
        ...

Everything goes into an outbox (a folder in `state`, see outbox.py) and from there to MLflow by a uploader, so
that neither a slow server nor a kill costs the stage anything. The same `state` continues the same run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.address import Address
from vitpipe.contracts.artifact import METRICS, write_table
from vitpipe.contracts.errors import StoppedError, StorageError, disk_errors
from vitpipe.contracts.files import write_whole
from vitpipe.track.console import Console
from vitpipe.track.journal import Journal, Status, Target, UsedDataset, without_credentials
from vitpipe.track.outbox import Origin, Outbox, plain_value, table_as_json
from vitpipe.track.producer import Producer
from vitpipe.track.server import EXPERIMENT, OFF, address_to_use, store_address
from vitpipe.track.sync import UNSENT_SUFFIX, keep_unsent
from vitpipe.track.uploader import Uploader

OUTBOX_FOLDER = "track"
HISTORY = "history"
_RUN_SECONDS, _SECONDS_BETWEEN_LOOKS = 30.0, 5.0


class SilentLogger:
    """Swallows everything: the logger of ranks other than 0."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def commit(self, step: int) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def figure(self, name: str, path: Path) -> None:
        """Nothing."""

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Nothing."""


class StageRun:
    """The logger of rank 0 (`RunLogger`). Made by `stage_run`."""

    def __init__(self, stage: str, folder: Path, outbox: Outbox, store: Address) -> None:
        self.stage, self.folder, self.outbox, self.store = stage, folder, outbox, store
        self.console = Console(stage)
        outbox.write_producer(Producer.of_this_process())
        self.journal = Journal(outbox.journal)
        if num_damaged := self.journal.ledger.num_damaged:
            self.say(f"{outbox.journal}: damaged lines that were passed over: {num_damaged}")
        self.journal.status("RUNNING")
        self._uploader = None if store == OFF else Uploader(outbox, store)
        self._has_warned, self._has_succeeded = False, False
        self._noted, self._last_look = "", 0.0

    @property
    def run_id(self) -> str:
        """Number of the MLflow run; waits for MLflow's first answer. Empty when it does not answer."""
        if self._uploader is not None:
            self._uploader.wait_for_run(_RUN_SECONDS)
        return self.outbox.run_id

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at an optimiser step; pending until `commit`."""
        if values:
            self.journal.points(values, step)

    def commit(self, step: int) -> None:
        """Points up to `step` are final: they are on disk when this returns and are then sent."""
        self.journal.commit(step)
        self._wake()

    def rewind(self, step: int) -> None:
        """Forget pending points after `step`."""
        self.journal.rewind(step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `tables/NAME.csv` into the stage's folder and hand the table to MLflow."""
        if not rows:
            return
        write_table(self.folder, name, rows)
        self.hand_over(f"tables/{name}.json", table_as_json([dict(row) for row in rows]))

    def figure(self, name: str, path: Path) -> None:
        """Hand a picture file to MLflow as `figures/NAME` with the file's suffix."""
        self.hand_over(f"figures/{name.removesuffix(path.suffix)}{path.suffix}", path)

    def dataset(self, name: str, digest: str, source: str, context: str, facts: Mapping[str, Any]) -> None:
        """Name a dataset that the stage reads; MLflow shows it on the run's page."""
        plain = {key: plain_value(value) for key, value in facts.items()}
        self.journal.dataset(UsedDataset(name, digest, source, context, plain))
        self._wake()

    def hand_over(self, name: str, content: str | Path, target: Target = "run") -> None:
        """Give MLflow a file under `name`: a text, or a copy of a file as it is now."""
        path = self.outbox.files / name
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, path)
            else:
                write_whole(path, content)
        self.journal.file(name, target)
        self._wake()

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.say(line)

    def progress(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Show how far the run is."""
        self.console.progress(step, num_steps, values)
        if time.monotonic() - self._last_look > _SECONDS_BETWEEN_LOOKS:
            self._look()

    def succeed(self) -> None:
        """The stage is done: everything is final. Writes `tables/history.csv` from the journal, once."""
        if self._has_succeeded:
            return
        self._has_succeeded = True
        self.journal.commit()
        ledger, metrics_file = self.journal.ledger, self.folder / METRICS
        metrics = json.loads(metrics_file.read_text("utf-8")) if metrics_file.is_file() else {}
        # A finished stage that writes its output again has told its metrics already: no history of those.
        told = {(name, ledger.last_step) for name in metrics}
        rows = [
            {"step": p.step, "name": p.name, "value": p.value}
            for p in ledger.final
            if (p.name, p.step) not in told
        ]
        if rows:
            self.table(HISTORY, rows)
        if metrics:
            self.journal.points(metrics, ledger.last_step)
            self.journal.commit()

    def end(self, status: Status, keep_at: Path) -> None:
        """Record how it ended and wait until it is sent; what cannot be sent is kept.

        Args:
            keep_at: where the outbox is copied when the stage has finished, because its state folder goes.
        """
        # The disk that stopped a stage must not hide why behind a second error.
        with contextlib.nullcontext() if status == "FINISHED" else contextlib.suppress(StorageError):
            self.journal.status(status)
        self.journal.close()
        self.console.close()
        if self._uploader is None:
            return
        self._uploader.finish()
        self._look()
        if self.outbox.is_delivered():
            return
        kept = keep_unsent(self.outbox, keep_at) if status == "FINISHED" else self.outbox.folder
        self.say(
            f"MLflow at {self.store} has not got everything of stage {self.stage}; it is kept in {kept}. "
            f"The next stage sends it, or: vitpipe send {kept}"
        )

    def _wake(self) -> None:
        if self._uploader is not None:
            self._uploader.wake()
            self._look()

    def _look(self) -> None:
        """One warning per run when MLflow does not answer; what the uploader has to note, once each."""
        self._last_look = time.monotonic()
        self.outbox.producer_lives()
        contact = self._uploader.contact() if self._uploader is not None else None
        if contact is None:
            return
        if contact.note and contact.note != self._noted:
            self._noted = contact.note
            self.say(contact.note)
        if contact.reason and not self._has_warned:
            self._has_warned = True
            fix = f" Fix: {contact.fix}." if contact.fix else ""
            self.say(
                f"{contact.reason}: {self.store}. The run goes on; what it logs is kept in "
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
    pipeline: str | None = None,
    store: Address | str | None = None,
) -> Iterator[StageRun]:
    """Track one stage; on rank 0 only.

    Continues the MLflow run that `state` knows, else the one that Kubeflow's plugin names by
    `MLFLOW_RUN_ID` (taken out of the environment, as `mlflow.start_run` does), else opens a run below
    the one of the pipeline, which the first stage opens.

    Args:
        folder: the stage's output folder, for tables.
        state: survives a kill; the outbox lies in it. Unsent things are kept beside it at the end.
        tags: `git_commit`, `data_digest`, and whatever else tells where the numbers come from.
        params: the recipe sections that the stage reads, nested.
        pipeline: key that the stages of one pipeline run share; by default recipe, profile and digest.
        store: tracking URI, with its credentials; by default `store_address(current folder)`.
    """
    given = (
        store_address(Path.cwd()) if store is None else Address(store) if isinstance(store, str) else store
    )
    outbox = Outbox(state / OUTBOX_FOLDER)
    origin = outbox.open(_origin(stage, recipe, dict(tags or {}), params or {}, pipeline, given))
    sent = outbox.sent()
    is_told = sent is None or bool(sent.run_id)
    run = StageRun(stage, folder, outbox, address_to_use(origin.store, given, is_told=is_told))
    keep_at = state.parent / f"{state.stem}{UNSENT_SUFFIX}"
    status: Status = "FAILED"
    try:
        yield run
        run.succeed()
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, StoppedError):
        status = "KILLED"
        raise
    finally:
        run.end(status, keep_at)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as `a.b` -> text; None and empty values are left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None and value != "" and value != [] and value != ():
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _origin(
    stage: str,
    recipe: Recipe,
    tags: dict[str, str],
    params: Mapping[str, Any],
    pipeline: str | None,
    store: Address,
) -> Origin:
    whole = recipe.model_dump(mode="json")
    described = {"summary", "source", "expect", "discrepancies", "not_comparable", "report"}
    flat = flatten({key: value for key, value in whole.items() if key not in described})
    key = (
        pipeline
        or os.environ.get("VITPIPE_PIPELINE")
        or f"{recipe.name} {recipe.profile} {digest_of(recipe)[:12]}"
    )
    return Origin(
        store=store,
        experiment=os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT,
        experiment_id=os.environ.get("MLFLOW_EXPERIMENT_ID", ""),
        given_run_id=os.environ.pop("MLFLOW_RUN_ID", ""),
        pipeline=key.replace("'", ""),
        pipeline_title=f"{recipe.name} ({recipe.profile}, seed {recipe.seed})",
        stage=stage,
        params=without_credentials(flatten(params)),
        pipeline_params=without_credentials(flat),
        tags=without_credentials(
            {"recipe": recipe.name, "profile": recipe.profile, **{k: str(v) for k, v in tags.items()}}
        ),
    )
