import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.augment import eval_transform, train_transform
from vitpipe.data.batches import Batch, eval_batches, train_batches
from vitpipe.data.moment import Moment
from vitpipe.data.shards import open_shards

HEAVY = AugmentConfig(
    rand_augment="rand-m9-mstd0.5-inc1", erase_probability=0.5, crop_scale=(0.3, 1.0), color_jitter=0.4
)


@pytest.fixture
def shards(prepared):
    return open_shards(prepared, "imagenet", "train")


def batches(shards, *, workers=0, num_ranks=1, rank=0, start_step=0, num_steps=5, seed=0):
    return list(
        train_batches(
            shards,
            train_transform(HEAVY, 32),
            seed=seed,
            global_batch=12,
            micro_batch=3,
            rank=rank,
            num_ranks=num_ranks,
            start_step=start_step,
            num_steps=num_steps,
            workers=workers,
        )
    )


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels_B, b.labels_B)
        assert torch.equal(a.indices_B, b.indices_B)
        assert a.moment == b.moment


def test_batches_have_the_contracts_shapes(shards):
    found = batches(shards)
    assert [batch.moment.step for batch in found[:5]] == [0, 0, 0, 0, 1]
    assert found[4].moment == (0, 1, 5, len(shards) // 12)
    assert len(found) == 5 * 4
    assert found[0].images.shape == (3, 3, 32, 32)
    assert found[0].images.dtype == torch.float32
    assert found[0].labels_B.tolist() == shards.labels[found[0].indices_B.numpy()].tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_pixels_do_not_depend_on_the_number_of_workers(shards, workers):
    assert_same(batches(shards, workers=workers), batches(shards))


def test_pixels_do_not_depend_on_the_number_of_ranks(shards):
    alone = batches(shards)
    together = [batch for rank in range(2) for batch in batches(shards, num_ranks=2, rank=rank)]
    place = {int(batch.indices_B[0]): number for number, batch in enumerate(alone[:4])}
    of_first_step = sorted(together, key=lambda batch: place.get(int(batch.indices_B[0]), -1))
    assert_same([b for b in of_first_step if b.moment.step == 0], alone[:4])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_iterator_yields_exactly_the_tail(shards, workers):
    assert_same(batches(shards, start_step=3, workers=workers), batches(shards)[12:])


def test_an_image_looks_different_in_another_epoch_and_with_another_seed(shards):
    by_step = {}
    for batch in batches(shards, num_steps=4):
        for index, image in zip(batch.indices_B.tolist(), batch.images, strict=True):
            by_step.setdefault(index, []).append(image)
    repeated = next(images for images in by_step.values() if len(images) > 1)
    assert not torch.equal(repeated[0], repeated[1])
    assert not torch.equal(batches(shards)[0].images, batches(shards, seed=1)[0].images)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_training_processs_generators_alone(shards, workers):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seeded():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seeded()
    expected = draws()
    seeded()
    batches(shards, num_steps=1, workers=workers)
    assert draws() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_over_ranks(prepared, workers):
    shards = open_shards(prepared, "imagenet", "val")
    transform = eval_transform(32, 0.875, AugmentConfig())
    found = [
        batch
        for rank in range(2)
        for batch in eval_batches(shards, transform, batch=16, rank=rank, num_ranks=2, workers=workers)
    ]
    assert sorted(torch.cat([batch.indices_B for batch in found]).tolist()) == list(range(50))
    for batch in found:
        assert batch.labels_B.tolist() == shards.labels[batch.indices_B.numpy()].tolist()


def test_pixels_do_not_depend_on_the_micro_batch(shards):
    of_micro_batches = [
        torch.cat([b.images for b in batches(shards)[4 * step : 4 * step + 4]]) for step in range(2)
    ]
    whole = train_batches(
        shards, train_transform(HEAVY, 32), seed=0, global_batch=12, micro_batch=12, rank=0, num_ranks=1,
        start_step=0, num_steps=2, workers=0,
    )  # fmt: skip
    for ours, theirs in zip(whole, of_micro_batches, strict=True):
        assert torch.equal(ours.images, theirs)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_without_a_traceback(prepared_copy, workers):
    shard = prepared_copy / "imagenet" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    shards = open_shards(prepared_copy, "imagenet", "train")
    for record in shards._records.tolist():
        content[record[0] + 20] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match="has changed since it was packed") as caught:
        batches(shards, workers=workers)
    assert "Traceback" not in str(caught.value)


GROUP_SIGNAL = """
import os, signal, sys
from pathlib import Path
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.data.augment import train_transform
from vitpipe.data.batches import train_batches
from vitpipe.contracts.seeds import seed_everything
from vitpipe.data.shards import open_shards

answered = []
signal.signal(signal.SIGTERM, lambda number, frame: answered.append(number))
shards = open_shards(Path(sys.argv[1]), "imagenet", "train")
place = dict(seed=0, global_batch=4, micro_batch=4, rank=0, num_ranks=1, start_step=0, num_steps=12)
stream = train_batches(shards, train_transform(AugmentConfig(), 32), workers=1, **place)
for batch in stream:
    if batch.moment.step == 3:
        os.killpg(os.getpgrp(), signal.SIGTERM)
print(batch.moment.step, answered == [signal.SIGTERM])
"""


def test_a_signal_to_the_process_group_leaves_the_loader_alone(prepared):
    """The trainer finishes its step and saves; a killed worker would end it with a traceback."""
    command = [sys.executable, "-c", GROUP_SIGNAL, str(prepared)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, start_new_session=True
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["11", "True"]), ended.stderr


NO_ROOM = """
import os, resource, signal, sys
from pathlib import Path
from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import VitpipeError
from vitpipe.data.augment import train_transform
from vitpipe.data.batches import train_batches
from vitpipe.data.loader_processes import loader_errors
from vitpipe.data.shards import open_shards

shards = open_shards(Path(sys.argv[1]), "imagenet", "train")
place = dict(seed=0, global_batch=4, micro_batch=4, rank=0, num_ranks=1, start_step=0, num_steps=12)
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with loader_errors():
        for batch in train_batches(shards, train_transform(AugmentConfig(), 32), workers=1, **place):
            if sys.argv[2] == "kill":
                (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
                os.kill(int(worker), signal.SIGKILL)
except VitpipeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("limit", "StorageError: A loader process found no shared memory for a batch. Where: /dev/shm"),
        ("kill", "RunError: A loader process "),  # was killed, or ended: whichever is noticed first
    ],
)
def test_a_loader_process_that_cannot_go_on_ends_the_run_with_a_message(prepared, how, said):
    """torch's worker drops a batch that finds no room, and the trainer would wait for it for ever."""
    command = [sys.executable, "-c", NO_ROOM, str(prepared), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_multi_crop_gives_all_views_of_every_image(prepared):
    from vitpipe.config.multi_crop import CropsConfig
    from vitpipe.data.crops import MultiCrop

    shards = open_shards(prepared, "imagenet", "train")
    crops = MultiCrop(CropsConfig(global_size=32, local_size=16, num_local=3))
    options = {
        "seed": 0,
        "global_batch": 6,
        "micro_batch": 6,
        "rank": 0,
        "num_ranks": 1,
        "start_step": 0,
        "num_steps": 2,
    }
    for workers in (0, 1):
        batches = list(train_batches(shards, crops, **options, workers=workers))
        shapes = [tuple(view.shape) for view in batches[0].views]
        assert shapes == [(6, 3, 32, 32)] * 2 + [(6, 3, 16, 16)] * 3
        assert torch.equal(batches[0].images, batches[0].views[0])
        index = int(batches[1].indices_B[4])
        image, _ = shards.decode(index)
        seed_everything("sample", 0, 1, index)
        assert all(
            torch.equal(view[4], one) for view, one in zip(batches[1].views, crops(image), strict=True)
        )


def test_a_transform_that_returns_parts_of_something_larger_is_stacked(prepared):
    shards = open_shards(prepared, "imagenet", "val")
    whole = torch.arange(12.0).reshape(2, 6)
    batch = next(eval_batches(shards, lambda image: whole[1], batch=3, rank=0, num_ranks=1, workers=0))
    assert torch.equal(batch.images, whole[1].expand(3, 6))
    assert len(batch.views) == 1


def test_a_batch_moves_with_all_its_tensors():
    views = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4))
    batch = Batch(views, torch.zeros(2), torch.tensor([5, 3]), Moment(1, 2, 10, 5))
    moved = batch.to(torch.device("meta"))
    assert {t.device.type for t in (*moved.views, moved.labels_B, moved.indices_B)} == {"meta"}
    assert moved.moment == batch.moment
    assert (moved.moment.epoch, moved.moment.progress) == (0, 0.2)
    assert batch.images is views[0]
    # Mixing knows its micro-batch by the first image.
    assert batch.key("mix") != batch._replace(indices_B=torch.tensor([3, 5])).key("mix")
