"""A toy stage: the spectrum of a network's features."""

from __future__ import annotations

from vitpipe.config.section import Count, Effects, Section
from vitpipe.contracts.graph import DATA, ONE_GPU, Stage


class SpectrumConfig(Section):
    """How many of the largest eigenvalues are written down."""

    effects = Effects(figures="num_values")
    num_values: Count = 4


STAGE = Stage(
    name="spectrum",
    order=55,
    summary="spectrum: eigenvalues of the covariance of frozen features",
    inputs={**DATA, "weights": ("finetune", "pretrain")},
    sections=("seed", "model", "spectrum"),
    image="train",
    kind="Artifact",
    resources=ONE_GPU,
    headline="effective_rank",
)
CONFIG = SpectrumConfig
