"""Classification with dense relative localisation: mix > logits and grid > cross entropy + location loss.

Efficient Training of Visual Transformers with Small Datasets; Yahui Liu, Enver Sangineto, Wei Bi, Nicu Sebe,
Bruno Lepri, Marco De Nadai; NeurIPS 2021. The loss is in `localisation`; everything else of a training is as
without it, and the network is used without the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.resolve import Precision
from vitpipe.config.train_sections import TrainConfig
from vitpipe.contracts.errors import InputError
from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.data.moment import Moment
from vitpipe.evaluate.accuracy import evaluate_classifier
from vitpipe.methods.classify.method import Classify, network_and_mixing, soft_cross_entropy
from vitpipe.methods.drloc.config import DrlocConfig, grid_misfit
from vitpipe.methods.drloc.localisation import (
    Grid,
    LocationMLP,
    draw_pairs,
    equation_factor,
    location_loss,
    num_offset_classes,
    pair_embeddings,
    pooled,
    trivial_loss,
)
from vitpipe.methods.method import CentreCrops, Judgement
from vitpipe.models.families import Family
from vitpipe.models.network import Classifier, Features
from vitpipe.train.ranks import Ranks


class GridShape(NamedTuple):
    """A grid that the loss reads, behind the pooling: D, rows and columns."""

    width: int
    grid: Grid


class Drloc(Classify):
    """Trains a classifier on mixed images, and MLPs that localise pairs of cells of its grids.

    The result is the classifier alone; the MLPs are saved beside it.

    Args:
        model: (B, 3, H, W) -> logits (B, K).
        mix: see `Classify`.
        classes: names of the classes.
        config: the loss and its weight.
        shapes: of the grids, one, or one per block with loss `all`.
        global_batch: images of an optimiser step, over which `reduction: equation` sums.
    """

    model: Classifier

    def __init__(
        self,
        model: Classifier,
        mix: Mixup,
        classes: Sequence[str],
        *,
        config: DrlocConfig,
        shapes: Sequence[GridShape],
        global_batch: int,
    ) -> None:
        super().__init__(model, mix, classes)
        self.config, self.grids = config, tuple(shape.grid for shape in shapes)
        # Behind the classifier: with and without the loss it starts with the same weights.
        self.heads = nn.ModuleList(
            LocationMLP(
                shape.width,
                config.hidden_width,
                num_offset_classes(shape.grid) if config.loss in ("ce", "reg") else None,
                trunc_normal=config.init == "trunc_normal",
            )
            for shape in shapes
        )
        self._factor = equation_factor(config.loss, global_batch) if config.reduction == "equation" else 1
        self.trivial_loss = self._factor * sum(
            trivial_loss(config.loss, grid, raw_targets=config.raw_targets) for grid in self.grids
        )

    @classmethod
    def build(
        cls,
        config: MethodConfig,
        family: Family[Any],
        model: ModelConfig,
        *,
        section: TrainConfig,
        classes: Sequence[str],
    ) -> Drloc:
        """The family's classifier, with as many classes as the training set, and an MLP per grid.

        Raises:
            RecipeError: when the stage is not one of supervised training.
            InputError: when a grid of the network has no distances.
        """
        assert isinstance(config, DrlocConfig)
        shapes = _grid_shapes(config, family, model, section, classes)
        network, mix = network_and_mixing(config, family, model, section, classes)
        return cls(network, mix, classes, config=config, shapes=shapes, global_batch=section.global_batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`loss`: cross entropy + weight * location loss. Its parts: `class_loss`, `drloc_loss`.

        `trivial_drloc_loss` is what the latter is as long as nothing has been learnt, `drloc_weight` the
        weight where it is not constant. All are means over the batch.
        """
        images, targets = self.mix(batch.images, batch.labels_B, key=batch.key("mix"))
        features = features_of(self.model, images, self.config)
        class_loss = soft_cross_entropy(self.model.logits(features), targets)
        located = self.location_loss(features, batch, "locations")
        weight = location_weight(self.config, batch.moment)
        found = {
            "loss": class_loss + weight * located,
            "class_loss": class_loss.detach(),
            "drloc_loss": located.detach(),
            "trivial_drloc_loss": located.new_tensor(self.trivial_loss),
        }
        if self.config.weight_schedule != "constant":
            found["drloc_weight"] = located.new_tensor(weight)
        return found

    def location_loss(self, features: Features, batch: Batch, what: str) -> Tensor:
        """The localisation loss without its weight, a scalar; of several grids the sum.

        Args:
            features: of `features_of`, for the images of the batch.
            batch: whose moment and images the positions are functions of.
            what: purpose of the positions.

        Raises:
            InputError: when the grids are not those that the MLPs are made for.
        """
        found = []
        maps = grids_of(self.model, features, self.config)
        for number, (map_BDRC, mlp) in enumerate(zip(maps, self.heads, strict=True)):
            grid = (map_BDRC.shape[2], map_BDRC.shape[3])
            if mlp.has_classes and grid != self.grids[number]:
                raise InputError(
                    f"The images have grids of {grid[0]} x {grid[1]} cells, and the MLPs are made for "
                    f"{self.grids[number][0]} x {self.grids[number][1]}",
                    where="model.image_size",
                    fix=f"train on images of model.image_size, or choose a loss without classes, not "
                    f"{self.config.loss}",
                )
            # Every block has positions of its own.
            key = batch.moment.key(what, number)
            pairs = draw_pairs(key, batch.indices_B.to(map_BDRC.device), self.config.pairs, grid)
            outputs = mlp(pair_embeddings(map_BDRC, pairs))
            found.append(
                location_loss(
                    self.config.loss, outputs, pairs.offsets_BM2, grid, raw_targets=self.config.raw_targets
                )
            )
        return self._factor * torch.stack(found).sum()

    def judge(self, batches: CentreCrops, ranks: Ranks, precision: Precision) -> Judgement:
        """As `Classify.judge`, and `drloc_loss` on the validation images beside `trivial_drloc_loss`.

        Every image has fixed positions, so that losses of different epochs are comparable.
        """
        watched = _Watched(self)
        accuracy = evaluate_classifier(
            watched, watched.follow(batches("val")), len(self.classes), ranks=ranks, precision=precision
        )
        total, count = ranks.sum_numbers([watched.total, float(watched.num_images)])
        located = {"drloc_loss": total / max(count, 1.0), "trivial_drloc_loss": self.trivial_loss}
        return Judgement(
            {**accuracy.metrics(), **located}, tables={"per_class": accuracy.class_rows(self.classes)}
        )

    def results(self) -> dict[str, nn.Module]:
        """The classifier, and the MLPs beside it."""
        return {"weights": self.model, "heads": self.heads}


class _Watched(nn.Module):
    """A method's classifier, whose location loss is summed up on the way to the logits."""

    def __init__(self, method: Drloc) -> None:
        super().__init__()
        self.method = method
        self.total, self.num_images = 0.0, 0
        self._batch: Batch | None = None

    def follow(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; each is known when its images come."""
        for batch in batches:
            self._batch = batch
            yield batch

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, K)."""
        assert self._batch is not None
        features = features_of(self.method.model, images_BCHW, self.method.config)
        loss = self.method.location_loss(features, self._batch, "eval locations")
        self.total += float(loss) * len(images_BCHW)
        self.num_images += len(images_BCHW)
        return self.method.model.logits(features)


def features_of(model: Classifier, images_BCHW: Tensor, config: DrlocConfig) -> Features:
    """One forward pass: what the head reads, and the blocks whose grids the loss reads."""
    return model.forward_features(images_BCHW, range(model.num_blocks) if config.loss == "all" else (-1,))


def grids_of(model: Classifier, features: Features, config: DrlocConfig) -> tuple[Tensor, ...]:
    """The grids that the loss reads, behind the pooling, (B, D, R, C) each."""
    if config.loss == "all":
        return features.maps()
    return (pooled(model.location_grid(features), config.pooling),)


def location_weight(config: DrlocConfig, moment: Moment) -> float:
    """Weight of the location loss in a step: constant, or as in the released code by epochs from 0."""
    if config.weight_schedule == "constant":
        return config.weight
    epoch, num_epochs = moment.epoch, moment.num_steps / moment.steps_per_epoch
    if epoch <= config.ramp_epochs:
        return config.weight * epoch / config.ramp_epochs
    return config.weight * (1.0 - (epoch - config.ramp_epochs) / (num_epochs - config.ramp_epochs))


def _grid_shapes(
    config: DrlocConfig,
    family: Family[Any],
    model: ModelConfig,
    section: TrainConfig,
    classes: Sequence[str],
) -> tuple[GridShape, ...]:
    """Width and grid of everything that the loss reads.

    Raises:
        InputError: when there is no grid, or one without distances.
    """
    # By the network itself on torch's meta device, which computes shapes only: no table of widths and strides
    # that a new network would have to keep.
    with torch.device("meta"), torch.no_grad():
        network, _ = network_and_mixing(config, family, model, section, classes)
        images = torch.empty(1, 3, model.image_size, model.image_size)
        network.eval()
        features = features_of(network, images, config)
        if not features.grids:
            raise InputError(
                f"'{model.name}' gives no grid of embeddings, in which drloc could localise cells",
                where="method, model.name",
                fix="choose another network, or method classify",
            )
        unpooled = config.model_copy(update={"pooling": "none"})
        for map_BDRC in grids_of(network, features, unpooled):
            if why := grid_misfit((map_BDRC.shape[2], map_BDRC.shape[3]), config.pooling):
                raise InputError(
                    f"method.{why}, which '{model.name}' has for images of {model.image_size} pixels",
                    where="method, model.image_size",
                    fix="give the network larger images, choose another pooling, or another network",
                )
        maps = grids_of(network, features, config)
        return tuple(GridShape(found.shape[1], (found.shape[2], found.shape[3])) for found in maps)


METHOD = Drloc
