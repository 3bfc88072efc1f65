"""Where a stage keeps what it can be resumed from, when one folder serves many runs.

    /state/itpn.pixel_base.demo.pretrain-3f2a91c07b5e

On a cluster the folder is a volume that outlives the pods. The name follows from what decides the weights
(recipe values, data, starting weights), so a task that starts again on another node, or in a pipeline run
that was submitted again, finds what it had saved. Two runs of the same training meet at the folder's lock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from vitpipe.config.digest import digest_of
from vitpipe.config.recipe import Recipe
from vitpipe.contracts.artifact import Artifact
from vitpipe.contracts.graph import Stage
from vitpipe.stages.weights_identity import weights_identity

STATES_VARIABLE = "VITPIPE_STATES"
_DIGITS = 12


def state_in(states: Path, stage: Stage, recipe: Recipe, inputs: Mapping[str, Artifact]) -> Path:
    """The state folder of one stage of one run below `states`.

    Args:
        states: folder of all states.
        inputs: the stage's inputs, opened.
    """
    digest = digest_of(weights_identity(stage, recipe, inputs))[:_DIGITS]
    # The name before the digest is for people.
    title = re.sub(r"[^A-Za-z0-9_]+", ".", f"{recipe.name}.{recipe.profile}.{stage.name}").strip(".")
    return states / f"{title}-{digest}"
