"""The card of a finished stage (from what and with what it was made) and its run record (when and where)."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vitpipe.config.digest import git_commit
from vitpipe.config.hardware import hardware
from vitpipe.config.libraries import recorded_libraries
from vitpipe.config.recipe import Recipe
from vitpipe.config.recorded import recorded_values
from vitpipe.contracts.artifact import Artifact, Card, RunRecord
from vitpipe.contracts.graph import Stage
from vitpipe.stages.weights_identity import dataset_read

if TYPE_CHECKING:
    from vitpipe.stages.context import StageContext


def make_card(
    stage: Stage,
    ctx: StageContext,
    identity: Mapping[str, str],
    parents: Mapping[str, str],
    libraries: Mapping[str, str],
) -> Card:
    """The card of a stage whose outputs lie in `ctx.folder`: the same for the same inputs and result.

    Args:
        identity: as `identity_of`.
        parents: input name -> digest of that input's card.
        libraries: as `libraries.deciding_libraries`.
    """
    recipe: Recipe = ctx.recipe
    return Card(
        stage=stage.name,
        recipe=recipe.name,
        profile=recipe.profile,
        recipe_digest=identity["recipe_digest"],
        code_digest=identity["code_digest"],
        data_digest=_data_digest(stage, ctx.folder, ctx.inputs),
        dataset=dataset_read(stage.name, recipe, ctx.inputs) or "",
        image=stage.image,
        identity=identity["identity"],
        parents=dict(parents),
        seed=recipe.seed,
        libraries=dict(libraries),
    )


def make_run_record(stage: Stage, ctx: StageContext, started: float) -> RunRecord:
    """How and where this process has run the stage.

    Args:
        started: see `process_started`.
    """
    return RunRecord(
        git_commit=git_commit(),
        libraries=recorded_libraries(),
        hardware={**hardware(), **_gpus(ctx)},
        started_at=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        wall_seconds=round(time.time() - started, 3),
        data_revisions=_data_revisions(stage, ctx),
        values=recorded_values(ctx.recipe),
    )


def process_started() -> float:
    """When this process started (seconds since the epoch), so that imports count as wall time."""
    try:
        # Field 22 of /proc/PID/stat, in clock ticks since boot. The command name before it may hold spaces
        # and brackets, so fields are counted from the last bracket.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
    except (OSError, AttributeError):  # not Linux: the imports are then not counted
        return time.time()


def _data_digest(stage: Stage, folder: Path, inputs: Mapping[str, Artifact]) -> str:
    """Digest of the prepared data that a stage has made or read."""
    if stage.name == "prepare":
        from vitpipe.data.manifest import read_digest

        return read_digest(folder)
    data = _data_input(inputs)
    return data.card.data_digest if data else ""


def _data_revisions(stage: Stage, ctx: StageContext) -> dict[str, dict[str, str]]:
    """What DVC knows of the raw sets (prepare), or of the prepared data that a stage has read."""
    from vitpipe.stages.used_datasets import raw_revisions, revisions_of

    if stage.name == "prepare":
        return raw_revisions(ctx.folder, ctx.recipe.data)
    data = _data_input(ctx.inputs)
    return revisions_of(data.path) if data else {}


def _data_input(inputs: Mapping[str, Artifact]) -> Artifact | None:
    # The report reads every stage's output; the data are those of prepare.
    return inputs.get("data") or inputs.get("prepare")


def _gpus(ctx: StageContext) -> dict[str, str | int]:
    """Name and number of the GPUs that shared the stage; nothing on a CPU."""
    if ctx.joined is None or ctx.joined.device.type != "cuda":
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(ctx.joined.device), "num_gpus": ctx.joined.num_ranks}
