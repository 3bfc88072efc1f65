"""Entry and recipe section of stage `evaluate`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from vitpipe.config.section import Count, Effects, Section
from vitpipe.contracts.graph import CLASSES, DATA, ONE_GPU, Stage


class EvaluateConfig(Section):
    """The independent measurement of the fine-tuned network."""

    effects: ClassVar[Effects] = Effects(
        figures="batch throughput_batch throughput_rounds eval_crop_ratio",
    )

    batch: Count = 64
    throughput_batch: Count = 8
    # The median is taken: the first rounds may still warm caches.
    throughput_rounds: Count = 5
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256


STAGE = Stage(
    name="evaluate",
    order=90,
    summary="accuracy, cost and throughput of the result",
    inputs={**DATA, "weights": ("finetune", "intermediate", "pretrain")},
    reads=CLASSES,
    needs_weights=True,
    sections=("seed", "model", "evaluate"),
    image="train",
    kind="Artifact",
    resources=ONE_GPU,
    pages={"confusion": "ClassificationMetrics"},
    headline="top1",
)
CONFIG = EvaluateConfig
