"""What a stage is handed, whatever engine calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.logger import RunLogger


@dataclass(frozen=True)
class StageContext:
    """Inputs, recipe and places of one stage run.

    Attributes:
        inputs: finished folders by input name (`data`, `weights`, for the report the stage names).
        folder: write outputs here; it becomes the stage's output folder when `run` returns.
        state: survives a kill; resumable training states live here; removed after success.
        logger: the only way to report; on ranks other than 0 it swallows everything.
        device: `cpu` or `cuda:LOCAL_RANK`.
        previous: the stage's output folder of an earlier run, if there is one; read only.
    """

    stage: str
    recipe: Recipe
    inputs: dict[str, Artifact]
    folder: Path
    state: Path
    logger: RunLogger
    rank: int
    num_ranks: int
    local_rank: int
    device: str
    previous: Path | None = None

    @property
    def is_main(self) -> bool:
        """True on the rank that writes."""
        return self.rank == 0
