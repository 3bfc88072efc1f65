"""Entry and recipe section of stage `report`."""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.section import Count, Effects, Section
from vitpipe.contracts.graph import TWO_CORES, Stage


class ReportConfig(Section):
    """The page at the end."""

    effects: ClassVar[Effects] = Effects(
        figures="sample_images",
    )

    sample_images: Count = 12


STAGE = Stage(
    name="report",
    order=100,
    summary="every result compared with the published row",
    takes_every_stage=True,
    sections=(
        "name",
        "profile",
        "summary",
        "source",
        "expect",
        "discrepancies",
        "report",
        "stages",
    ),
    image="train",
    kind="Artifact",
    resources=TWO_CORES,
    pages={"report": "HTML", "verdict": "Markdown"},  # which Kubeflow shows on its own pages
)
CONFIG = ReportConfig
