"""The RevCol family, first version: its classifier from a recipe, and which weights it takes from another.

Reversible Column Networks; Yuxuan Cai et al.; arXiv 2212.11696: supervised training on ImageNet-1K, or on
ImageNet-22K and then ImageNet-1K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from vitpipe.contracts.errors import InputError
from vitpipe.models.families import Family, WeightsInfo
from vitpipe.models.network import Classifier, Network
from vitpipe.models.revcol.config import RevColConfig
from vitpipe.models.revcol.heads import RevColHeads
from vitpipe.models.revcol.revcol import NUM_LEVELS, SHAPES, STRIDE, RevCol, RevColEncoder, RevColShape
from vitpipe.models.weights import Rule

# Its length is the number of classes.
HEAD_BIAS = "cls.classifier.1.bias"
_OTHER_CLASSES = Rule("fresh", r"^cls\.classifier\.1\.", "another number of classes")
_NEW_HEAD = Rule("missing", r"^cls\.", "a new head")
_ONLY_CLASSIFIER = Rule("unused", r"^cls\.", "only a classifier has a classification head")


class RevColFamily(Family[RevColConfig]):
    """Builds RevCol's classifier, and reads and transfers its weights."""

    name = "revcol"

    def backbone(self, name: str, *, image_size: int, **options: Any) -> RevCol:
        """The whole network, whose `run_columns` gives feature maps; `options` are those of `RevCol`.

        Raises:
            InputError: when `image_size` is no multiple of 32.
        """
        # Convolutional: the network itself has no image size, the check only reports a wrong one early.
        _check_image_size(name, image_size)
        return RevCol(SHAPES[name], **options)

    def encoder(self, model: RevColConfig, *, drop_path: float) -> RevColEncoder:
        """The network without a classifier.

        Raises:
            InputError: when `image_size` is no multiple of 32.
        """
        _check_image_size(model.name, model.image_size)
        return RevColEncoder(
            SHAPES[model.name],
            drop_path=drop_path,
            memory_mode=model.columns.memory_mode,
            allow_reversible_amp=model.columns.reversible_autocast,
        )

    def classifier(self, model: RevColConfig, *, num_classes: int, drop_path: float) -> RevCol:
        """The network with one classifier at the end.

        Raises:
            InputError: when `image_size` is no multiple of 32.
        """
        _check_image_size(model.name, model.image_size)
        return RevCol(
            SHAPES[model.name],
            num_classes,
            drop_path=drop_path,
            head_init_std=model.head_init_std,
            memory_mode=model.columns.memory_mode,
            allow_reversible_amp=model.columns.reversible_autocast,
        )

    def intermediate_heads(self, model: RevColConfig, *, num_classes: int) -> RevColHeads:
        """Classifiers and decoders after each of the first three quarters of the columns.

        Raises:
            InputError: when the network has fewer than four columns.
        """
        return RevColHeads(SHAPES[model.name], num_classes, head_init_std=model.head_init_std)

    def describe(self, state: Mapping[str, Tensor]) -> WeightsInfo | None:
        """What a state is, recognised by the names of stem and first column."""
        if "stem.0.weight" not in state or "subnet0.alpha0" not in state:
            return None
        shape, head = shape_of(state), state.get(HEAD_BIAS)
        return WeightsInfo(
            family=self.name,
            kind="encoder" if head is None else "classifier",
            model="" if shape is None else shape.name,
            image_size=0,  # no position table: any multiple of 32
            num_classes=0 if head is None else head.numel(),
        )

    def transfer_rules(self, network: Network, info: WeightsInfo) -> Sequence[Rule]:
        """Between classifiers a last layer for another number of classes keeps its initial values.

        encoder > classifier: a new head; classifier > encoder: the head is not used.
        """
        if isinstance(network, Classifier):
            # The head's LayerNorm before it fits any number of classes and is loaded.
            return (_OTHER_CLASSES,) if info.kind == "classifier" else (_NEW_HEAD,)
        return (_ONLY_CLASSIFIER,)


def shape_of(state: Mapping[str, Tensor]) -> RevColShape | None:
    """The size in `SHAPES` that has these columns, widths and blocks; `None` when there is none."""
    columns = {found[1] for name in state if (found := re.match(r"subnet(\d+)\.", name))}
    alphas = [state.get(f"subnet0.alpha{level}") for level in range(NUM_LEVELS)]
    blocks = [
        {found[1] for name in state if (found := re.match(rf"subnet0\.level{level}\.blocks\.(\d+)\.", name))}
        for level in range(NUM_LEVELS)
    ]
    widths = tuple(0 if alpha is None else alpha.numel() for alpha in alphas)
    # The first column has no `up` links, so the second shows whether level 0 reads level 3 (revcol_huge
    # alone).
    to_lowest = "subnet1.level0.fusion.up2.channel_reschedule.0.weight" in state
    sizes = (widths, tuple(map(len, blocks)), len(columns), to_lowest)
    known = ((s, (s.widths, s.depths, s.num_columns, s.top_to_lowest)) for s in SHAPES.values())
    return next((shape for shape, its_sizes in known if its_sizes == sizes), None)


def _check_image_size(name: str, image_size: int) -> None:
    if image_size % STRIDE:
        raise InputError(
            f"{name} downsamples images by {STRIDE}, which does not divide {image_size} pixels",
            where="model.image_size",
            fix=f"use a multiple of {STRIDE}",
        )


FAMILY = RevColFamily()
