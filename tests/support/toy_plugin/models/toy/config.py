"""A family for tests, in the files that a plugin has: a mean of patches and a linear layer."""

from __future__ import annotations

from typing import ClassVar

from vitpipe.config.model import ModelConfig, ModelEntry
from vitpipe.config.section import Count, Effects


class ToyConfig(ModelConfig):
    """`width` is that of the embedded patches."""

    effects: ClassVar[Effects] = Effects(
        weights="width",
    )

    width: Count = 24


CONFIG = ToyConfig
ENTRIES = (
    ModelEntry(
        name="toy_tiny",
        summary="patches of 16 x 16 pixels, embedded, normed, averaged",
        paper="none",
        published_params=None,
        classifier_params=43_504,
        classifier_macs=318_912,
        image_size=64,
        num_layers=2,
    ),
)
