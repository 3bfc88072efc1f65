"""Entry and recipe section of stage `prepare`."""

from __future__ import annotations

from vitpipe.contracts.graph import MANY_CORES, Stage

STAGE = Stage(
    name="prepare",
    order=10,
    summary="raw images to verified shards",
    sections=("data", "seed"),
    image="train",
    kind="Dataset",
    resources=MANY_CORES,
    keeps_output=True,  # sets whose files have not changed are taken from it, not packed again
)
CONFIG = None  # it reads the section `data`
