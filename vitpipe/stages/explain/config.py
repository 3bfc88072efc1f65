"""Entry and recipe section of stage `explain`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, Section
from vitpipe.contracts.graph import CLASSES, DATA, ONE_GPU, Stage


class ExplainConfig(Section):
    """Pictures of what the fine-tuned network looks at.

    A network of clusters (PaCa) shows each cluster of `stage` as a mask of the image, which is classified
    again; `mask: binary` cuts the mask at `threshold`. Any other shows the attention of its image vector. Of
    the validation set the first `images` are taken, no two of one class while there are others; `columns`
    masked images stand in a row.
    """

    effects: ClassVar[Effects] = Effects(
        figures="stage images mask threshold columns eval_crop_ratio batch",
    )

    stage: Annotated[int, Field(ge=1, le=4)] = 3
    images: Count = 4
    mask: Literal["soft", "binary"] = "soft"
    # Below 1: enlarged bilinearly, few masks reach it anywhere.
    threshold: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    columns: Count = 10
    eval_crop_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 224 / 256
    batch: Count = 32

    def network_misfit(self, model: ModelConfig) -> str:
        """A stage of the network without clusters, or a network that can show nothing."""
        clusters = model.num_clusters
        if clusters and not clusters[self.stage - 1]:
            if not any(clusters):
                return f"'{model.name}' has no clusters at all with model.clusters {list(clusters)}"
            having = [number for number, count in enumerate(clusters, start=1) if count]
            return f"stage is {self.stage}, and '{model.name}' has clusters in {having} only"
        if not clusters and not model.shows_attention:
            return (
                f"images cannot be explained: '{model.name}' with these options has neither clusters nor "
                "attention of an image vector; take a network of paca or vit, or remove the stage"
            )
        return ""


STAGE = Stage(
    name="explain",
    order=95,
    summary="what the classifier looks at: clusters or attention of validation images",
    inputs={**DATA, "weights": ("finetune", "intermediate")},
    reads=CLASSES,
    builds=("classifier",),
    needs_weights=True,
    sections=("seed", "model", "explain"),
    image="train",
    kind="Artifact",
    resources=ONE_GPU,
    headline="positive_share",
)
CONFIG = ExplainConfig
