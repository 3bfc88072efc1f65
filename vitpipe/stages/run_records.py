"""What a stage's output says without its weights, kept where the task at a pipeline's end can read it.

    /state/runs/RUN/pretrain-3f2a91c07b5e

Kubeflow starts no task whose input a failed one should have made, even if that input is optional. So stages
leave their cards, numbers, tables and pictures on the volume of the states, and the report of a failed run is
made of these.
"""

from __future__ import annotations

import re
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from vitpipe.config.digest import digest_of
from vitpipe.contracts.artifact import CARD, WEIGHTS, Artifact, open_artifact
from vitpipe.contracts.errors import ArtifactError, disk_errors
from vitpipe.contracts.files import remove
from vitpipe.contracts.provenance import UNTRACKED
from vitpipe.stages.pipeline_run import PipelineRun

_RUNS = "runs"  # beside the states, whose names end in a digest
_DIGITS = 12
# Tables and pictures of a stage are a few MiB together. Other large files are weights, too: an optimiser's
# averages, a served model.
_MAX_BYTES = 16 * 2**20


def keep_record(states: Path, pipeline: PipelineRun, artifact: Artifact) -> None:
    """Copy an output folder without its weights, unless it is there already.

    Args:
        states: folder of all states.
        artifact: a stage's output; also one that an earlier run has made and that this run takes.

    Raises:
        StorageError: the disk refuses the write.
    """
    name = f"{artifact.card.stage}-{digest_of(artifact.card)[:_DIGITS]}"
    record = _folder(states, pipeline) / name
    if record.exists():
        return
    # Two tasks that take one input may both be here.
    aside = record.with_name(f".{name}.{uuid.uuid4().hex[:8]}")
    with disk_errors(record):
        for file in (*artifact.card.files, *UNTRACKED, CARD):
            # A card may come from anybody (`compile --start-from`): no name leads out of its folder.
            if Path(file).is_absolute() or ".." in Path(file).parts:
                continue
            source = artifact.path / file
            if source.is_file() and source.name != WEIGHTS and source.stat().st_size <= _MAX_BYTES:
                (aside / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, aside / file)
        try:
            aside.rename(record)
        except OSError:
            remove(aside)
            if not record.exists():
                raise


def records_of(states: Path | None, pipeline: PipelineRun) -> dict[str, Path]:
    """Stage -> folder with its card, of the stages of one run that have finished.

    Args:
        states: as `all_records`.
    """
    found: dict[str, tuple[float, Path]] = {}
    for artifact in all_records(states, pipeline):
        # A stage that ran again has left two: the later one is the run's.
        stage, place = artifact.card.stage, artifact.path
        found[stage] = max(found.get(stage, (0.0, place)), ((place / CARD).stat().st_mtime, place))
    return {stage: place for stage, (_, place) in found.items()}


def all_records(states: Path | None, pipeline: PipelineRun, *, of_all_runs: bool = False) -> list[Artifact]:
    """What finished tasks have left; of a table's run many of the same stage.

    Args:
        states: folder of all states; None where the outputs themselves lie together, in a local run.
        of_all_runs: also of other runs than this one.
    """
    own = Path(pipeline.folder) if states is None else _folder(states, pipeline)
    folders = [own] if pipeline.run_id and own.is_dir() else []
    if of_all_runs and states is not None:
        folders = sorted((states / _RUNS).glob("[!.]*/"))
    found = []
    for place in (place for folder in folders for place in sorted(folder.glob("[!.]*/"))):
        with suppress(ArtifactError):  # the output of another kind of task
            found.append(open_artifact(place))
    return found


def _folder(states: Path, pipeline: PipelineRun) -> Path:
    return states / _RUNS / re.sub(r"[^A-Za-z0-9_.-]+", "-", pipeline.run_id).lstrip(".")
