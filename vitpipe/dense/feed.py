"""Batches of mm datasets; order and augmentation are pure functions of the recipe's seed.

mmengine's samplers and the transforms of mmcv, mmdet and mmseg draw from global generators, so a resumed run
would see other images. Here the order is `vitpipe.data.order`'s, and the generators are seeded per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import cv2
import torch
from mmengine.dataset import pseudo_collate
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitpipe.config.resolve import TrainPlan
from vitpipe.contracts.seeds import kept_random_state, seed_everything
from vitpipe.data.loader_processes import begin_worker
from vitpipe.data.moment import Moment
from vitpipe.data.order import epoch_steps, eval_chunks, train_chunks

Place = tuple[int, int]  # optimiser step, index of the sample


class DenseBatch(NamedTuple):
    """One micro-batch of images of different sizes with their annotations.

    Attributes:
        inputs: (3, H, W) uint8 each, BGR.
        samples: mmdet's or mmseg's, with boxes, masks or label maps.
        indices_B: int64 positions in the dataset.
        moment: the step that it belongs to.
    """

    inputs: list[Tensor]
    samples: list[Any]
    indices_B: Tensor  # noqa: N815
    moment: Moment

    def to(self, device: torch.device) -> Self:
        """The batch itself: mm's data preprocessor moves the images when it pads them."""
        return self

    def key(self, what: str) -> int:
        """The key of draws that samples of a micro-batch share, see `Batch.key`."""
        return self.moment.key(what, int(self.indices_B[0]))

    def contents(self) -> dict[str, Any]:
        """Images, their files and positions."""
        paths = [getattr(sample, "img_path", "") for sample in self.samples]
        return {"images": self.inputs, "paths": paths, "indices": self.indices_B}


class SeededBatches(Dataset[DenseBatch]):
    """An mm dataset indexed by the places of a micro-batch, on which alone its augmentation depends.

    Args:
        dataset: mmdet's or mmseg's, in training mode.
        first: the moment of the first step.
    """

    def __init__(self, dataset: Any, first: Moment) -> None:
        self.dataset, self.first = dataset, first

    def __getitem__(self, places: Sequence[Place]) -> DenseBatch:
        """The samples after their data pipeline; all places are of one step."""
        moment, samples = self.first._replace(step=places[0][0]), []
        # Without workers this runs in the training process, whose generators must stay as they are.
        with kept_random_state():
            for step, index in places:
                seed_everything("dense", moment.seed, step, index)
                samples.append(self.dataset[index])
        return DenseBatch(
            [sample["inputs"] for sample in samples],
            [sample["data_samples"] for sample in samples],
            torch.tensor([index for _, index in places]),
            moment,
        )


class MicroBatches:
    """The micro-batches of one rank as lists of places, from `start_step` to the end of the plan.

    Each step takes the next `global_batch` samples of the order. Within the step they are sorted by group
    before they are cut into micro-batches, so that landscape and portrait images are rarely padded together.

    Args:
        groups: group number of each sample, for example 0 for landscape and 1 for portrait.
    """

    def __init__(
        self, plan: TrainPlan, groups: Sequence[int], *, seed: int, rank: int, start_step: int
    ) -> None:
        self.plan, self.groups = plan, groups
        self.seed, self.rank, self.start_step = seed, rank, start_step

    def __len__(self) -> int:
        return (self.plan.num_steps - self.start_step) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[Place]]:
        plan = self.plan
        whole_steps = train_chunks(
            len(self.groups),
            seed=self.seed,
            global_batch=plan.global_batch,
            # mmdet groups over the epoch. Here every rank sees the whole step and takes its part of it: a
            # step has the same samples for any number of ranks.
            micro_batch=plan.global_batch,
            rank=0,
            num_ranks=1,
            start_step=self.start_step,
            num_steps=plan.num_steps,
        )
        for step in whole_steps:
            # The sort is stable: the order within a group is that of the epoch.
            ordered = sorted(step.indices, key=lambda index: self.groups[index])
            places = [(step.step, index) for index in ordered]
            for micro in range(plan.accumulation):
                first = (micro * plan.num_ranks + self.rank) * plan.micro_batch
                yield places[first : first + plan.micro_batch]


def train_batches(
    dataset: Any,
    plan: TrainPlan,
    groups: Sequence[int],
    *,
    seed: int,
    rank: int,
    start_step: int,
    workers: int,
) -> Iterator[DenseBatch]:
    """This rank's micro-batches from `start_step` up to `plan.num_steps` (exclusive), in order.

    Args:
        dataset: mmdet's or mmseg's, in training mode.
        groups: group number of each sample, see `MicroBatches`.
        workers: loader processes; 0 loads in this process.
    """
    _one_thread_each()
    first = Moment(seed, start_step, plan.num_steps, epoch_steps(len(dataset), plan.global_batch))
    batches = SeededBatches(dataset, first)
    places = MicroBatches(plan, groups, seed=seed, rank=rank, start_step=start_step)
    if workers == 0:
        return (batches[micro] for micro in places)
    return iter(
        DataLoader(
            batches,
            # A list of places is a batch. Images of different sizes stay a list.
            batch_size=None,
            sampler=places,
            num_workers=workers,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # with batch_size None it gets single items
            # DataLoader draws a base seed for its workers, by default from the training process's generator.
            generator=torch.Generator(),
            worker_init_fn=begin_worker,
        )
    )


def eval_loader(dataset: Any, *, batch: int, rank: int, num_ranks: int, workers: int) -> DataLoader[Any]:
    """This rank's share of a validation set in mm's format; every sample comes once over all ranks."""
    _one_thread_each()
    # torch's DistributedSampler repeats samples to give all ranks the same number, which changes metrics.
    chunks = eval_chunks(len(dataset), batch=batch, rank=rank, num_ranks=num_ranks)
    return DataLoader(
        dataset,
        batch_sampler=[list(chunk.indices) for chunk in chunks],
        num_workers=workers,
        collate_fn=pseudo_collate,
        worker_init_fn=begin_worker,
    )


def _one_thread_each() -> None:
    # The transforms of several loader processes would compete for the cores with OpenCV's threads.
    cv2.setNumThreads(0)


def _unchanged(batch: DenseBatch) -> DenseBatch:
    return batch
