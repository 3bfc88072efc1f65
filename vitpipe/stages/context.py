"""What a stage is given, whatever engine calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.logger import RunLogger

if TYPE_CHECKING:  # torch takes seconds to import, and prepare and report do without it
    from vitpipe.train.ranks import Ranks


@dataclass(frozen=True)
class StageContext:
    """Inputs, recipe, folders and ranks of one stage run.

    Attributes:
        inputs: finished folders by input name (`data`, `weights`, for the report the stage names).
        folder: write outputs here; it becomes the stage's output folder when `run` returns.
        state: survives a kill; resumable training states are kept here.
        logger: the only way to report; on ranks other than 0 it discards everything.
        joined: the processes that share this stage; None for stages that run alone, without torch.
        previous: the stage's output folder of an earlier run, if there is one; read only.
    """

    stage: str
    recipe: Recipe
    inputs: dict[str, Artifact]
    folder: Path
    state: Path
    logger: RunLogger
    joined: Ranks | None = None
    previous: Path | None = None

    @property
    def section(self) -> Any:
        """The recipe's section of this stage, for example a `ClassifyConfig`."""
        return getattr(self.recipe, self.stage)

    @property
    def ranks(self) -> Ranks:
        """The processes that share this stage's training, and the device of this one."""
        assert self.joined is not None, f"stage {self.stage} runs alone"
        return self.joined

    @property
    def is_main(self) -> bool:
        """True on the rank that writes."""
        return self.joined is None or self.joined.is_main
