"""The card of a finished stage: who made the output, from what, with what, and how long it took."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vitpipe.config.digest import git_commit, hardware, library_versions
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact, Card
from vitpipe.contracts.graph import Stage

if TYPE_CHECKING:
    from vitpipe.stages.context import StageContext


def make_card(
    stage: Stage, ctx: StageContext, identity: Mapping[str, str], parents: Mapping[str, str], started: float
) -> Card:
    """The card of a stage whose outputs lie in `ctx.folder`.

    Args:
        identity: as `identity_of`.
        parents: input name -> digest of that input's card.
        started: see `process_started`.
    """
    data_digest, revisions = _data_of(stage, ctx.folder, ctx.inputs)
    recipe: Recipe = ctx.recipe
    return Card(
        stage=stage.name,
        recipe=recipe.name,
        profile=recipe.profile,
        recipe_digest=identity["recipe_digest"],
        code_digest=identity["code_digest"],
        data_digest=data_digest,
        data_revisions=revisions,
        image=stage.image,
        identity=identity["identity"],
        parents=dict(parents),
        seed=recipe.seed,
        git_commit=git_commit(),
        libraries=library_versions(dense=stage.image == "dense"),
        hardware={**hardware(), **_gpus(ctx)},
        started_at=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        wall_seconds=round(time.time() - started, 3),
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


def _data_of(
    stage: Stage, folder: Path, inputs: Mapping[str, Artifact]
) -> tuple[str, dict[str, dict[str, str]]]:
    """Digest of the prepared data that a stage has made or read, and what DVC knows of it."""
    if stage.name == "prepare":
        from vitpipe.data.manifest import DataManifest, read_digest, read_manifest

        return read_digest(folder), read_manifest(folder, DataManifest).revisions
    # The report reads every stage's output; the data are those of prepare.
    data = inputs.get("data") or inputs.get("prepare")
    if data is None:
        return "", {}
    from vitpipe.stages.used_datasets import revisions_of

    return data.card.data_digest, revisions_of(data.path)


def _gpus(ctx: StageContext) -> dict[str, str | int]:
    """Name and number of the GPUs that shared the stage; nothing on a CPU."""
    if ctx.joined is None or ctx.joined.device.type != "cuda":
        return {}
    import torch

    return {"gpu": torch.cuda.get_device_name(ctx.joined.device), "num_gpus": ctx.joined.num_ranks}
