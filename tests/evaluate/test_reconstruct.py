"""Masks of evaluation, what is painted, the picture; and throughput."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vitpipe.benchmarks.throughput import images_per_second
from vitpipe.config.recipe import DecoderConfig, ModelConfig, PyramidConfig
from vitpipe.contracts.errors import StorageError
from vitpipe.data.batches import Batch
from vitpipe.evaluate.reconstruct import image_noise, masked_loss, reconstruct, save_columns
from vitpipe.methods.masked_pixels import MaskedPixels
from vitpipe.models.build import build_pretrainer
from vitpipe.train.ranks import Ranks

NANO = ModelConfig(
    name="hivit_nano",
    image_size=64,
    pyramid=PyramidConfig(width=32),
    decoder=DecoderConfig(width=32, depth=1, heads=2),
)
IMAGES = torch.randn(10, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return MaskedPixels(build_pretrainer(NANO))


def _batches(*cuts):
    return [Batch(IMAGES[rows], rows, rows, 0, 0, 0) for rows in torch.arange(10).tensor_split(cuts)]


def test_a_mask_belongs_to_its_image():
    whole = image_noise(torch.arange(10), 16, seed=0)
    assert torch.equal(image_noise(torch.tensor([7, 2]), 16, seed=0), whole[[7, 2]])
    assert not torch.equal(image_noise(torch.arange(10), 16, seed=1), whole)


def test_the_loss_does_not_depend_on_the_batches(method):
    losses = [
        masked_loss(method, _batches(*cuts), seed=0, ranks=Ranks(), precision="off")
        for cuts in ((), (3,), (1, 2, 9))
    ]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert 0.5 < losses[0] < 2.0
    assert method.training


def test_seen_units_are_kept_and_hidden_ones_painted(method):
    noise = image_noise(torch.arange(10), 16, seed=0)
    masked, whole = reconstruct(method, IMAGES, noise)
    hidden = method.model(IMAGES, noise).mask_BN.view(10, 1, 4, 4)
    hidden = torch.nn.functional.interpolate(hidden, scale_factor=16).expand(-1, 3, -1, -1).bool()
    assert torch.equal(whole[~hidden], IMAGES[~hidden])
    assert torch.equal(masked[~hidden], IMAGES[~hidden])
    assert (masked[hidden] == 0).all()
    assert not torch.equal(whole[hidden], IMAGES[hidden])


def test_a_perfect_prediction_paints_the_image(method, monkeypatch):
    from vitpipe.methods.masked_pixels import normalised_units

    noise = image_noise(torch.arange(10), 16, seed=0)
    prediction = method.model(IMAGES, noise)
    perfect = prediction._replace(pred_BND=normalised_units(IMAGES))
    monkeypatch.setattr(method.model, "forward", lambda images, noise: perfect)
    torch.testing.assert_close(reconstruct(method, IMAGES, noise)[1], IMAGES, rtol=0, atol=1e-5)


def test_the_picture_has_a_row_per_image_and_a_column_per_tensor(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    red = torch.tensor([2.5, -2.0, -1.5]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    grey = torch.zeros(2, 3, 8, 8)
    save_columns([red, grey], mean, std, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        # Tiles of 8 pixels with gaps of 8 between them and around.
        assert picture.size == (8 * 5, 8 * 5)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((8, 8)) == picture.getpixel((15, 31)) == (255, 0, 0)
        assert picture.getpixel((16, 8)) == (255, 255, 255)
        assert picture.getpixel((31, 31)) == (128, 102, 76)


def test_a_full_disk_is_a_storage_error(tmp_path):
    (tmp_path / "picture.png").symlink_to("/dev/full")
    with pytest.raises(StorageError):
        save_columns([torch.zeros(1, 3, 64, 64)], (0.0,) * 3, (1.0,) * 3, tmp_path / "picture.png")


def test_throughput_counts_images_in_evaluation_mode():
    calls = []

    class Spy(torch.nn.Linear):
        def forward(self, images):
            calls.append((tuple(images.shape), self.training, torch.is_grad_enabled()))
            return images

    spy = Spy(1, 1)
    speed = images_per_second(spy, image_size=32, batch=3, rounds=4, device=torch.device("cpu"))
    assert speed > 0
    assert calls == [((3, 3, 32, 32), False, False)] * 5
    assert spy.training
