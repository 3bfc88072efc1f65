"""Data loaders for mmengine's runner; order and augmentation are pure functions of the recipe's seed.

mmengine's samplers and the transforms of mmcv, mmdet and mmseg draw from global generators, so a resumed run
would see other images. Here the order is `vitpipe.data.order`'s, and the generators are seeded per sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader, Dataset

from vitpipe.contracts.seeds import kept_random_state, seed_everything
from vitpipe.data.batches import begin_worker
from vitpipe.data.order import eval_chunks, train_chunks
from vitpipe.dense.plan import DensePlan

Place = tuple[int, int, int]  # epoch, position in its order, index of the sample


class SeededDataset(Dataset[Any]):
    """An mm dataset indexed by (epoch, position, index), on which alone its augmentation depends."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        # mmengine's loop reads the class names from here.
        self.metainfo = dataset.metainfo

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Any:
        """One sample after its data pipeline."""
        epoch, position, index = place
        # Without workers the sample is made in the training process, whose generators drive dropout as well.
        with kept_random_state():
            seed_everything("dense", self.seed, epoch, position)
            return self.dataset[index]


class MicroBatches:
    """The micro-batches of one rank as lists of places, from `start_step` to the end of the plan.

    Each step takes the next `global_batch` samples of the order. Within the step they are sorted by group
    before they are cut into micro-batches, so that landscape and portrait images are rarely padded together.

    Args:
        groups: group number of each sample, for example 0 for landscape and 1 for portrait.
    """

    def __init__(
        self, plan: DensePlan, groups: Sequence[int], *, seed: int, rank: int, start_step: int
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
            places = [
                (step.epoch, step.first_position + offset, index) for offset, index in enumerate(step.indices)
            ]
            # The sort is stable: the order within a group is that of the epoch.
            places.sort(key=lambda place: self.groups[place[2]])
            for micro in range(plan.accumulation):
                # The chunks of a step are numbered as for its seeds, see `runner`.
                first = (micro * plan.num_ranks + self.rank) * plan.micro_batch
                yield places[first : first + plan.micro_batch]


def train_loader(
    dataset: Any,
    plan: DensePlan,
    groups: Sequence[int],
    *,
    seed: int,
    rank: int,
    start_step: int,
    workers: int,
) -> DataLoader[Any]:
    """This rank's training batches from `start_step` on, in mm's format (lists of inputs and samples)."""
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=MicroBatches(plan, groups, seed=seed, rank=rank, start_step=start_step),
        num_workers=workers,
        # Images of different sizes stay a list; the data preprocessor pads them on the device.
        collate_fn=pseudo_collate,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
    )


def eval_loader(dataset: Any, *, batch: int, rank: int, num_ranks: int, workers: int) -> DataLoader[Any]:
    """This rank's share of a validation set; every sample comes once over all ranks."""
    # torch's DistributedSampler repeats samples to give all ranks the same number, which changes metrics.
    chunks = eval_chunks(len(dataset), batch=batch, rank=rank, num_ranks=num_ranks)
    return DataLoader(
        dataset,
        batch_sampler=[list(chunk.indices) for chunk in chunks],
        num_workers=workers,
        collate_fn=pseudo_collate,
        worker_init_fn=begin_worker,
    )
