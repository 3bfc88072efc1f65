"""How masked pre-training is judged: loss, what is painted, the picture; and throughput."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from vitpipe.benchmarks.throughput import images_per_second
from vitpipe.contracts.errors import StorageError
from vitpipe.data.batches import Batch
from vitpipe.data.image_grid import note_of
from vitpipe.data.moment import Moment
from vitpipe.evaluate.reconstruct import painted, save_columns
from vitpipe.evaluate.trivial_predictor import TrivialPredictor
from vitpipe.methods.masked_pixels.method import MaskedPixels
from vitpipe.models.build import build_pretrainer
from vitpipe.models.draws import uniform
from vitpipe.models.hivit.config import DecoderConfig, HiViTConfig, PyramidConfig
from vitpipe.models.pixel_target import normalised_target
from vitpipe.train.ranks import Ranks

NANO = HiViTConfig(
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
    moment = Moment(0, 0, 1, 1)
    return [Batch((IMAGES[rows],), rows, rows, moment) for rows in torch.arange(10).tensor_split(cuts)]


def test_the_loss_does_not_depend_on_the_batches(method):
    found = [
        method.judge(lambda split, cuts=cuts: iter(_batches(*cuts)), Ranks(), "off")
        for cuts in ((), (3,), (1, 2, 9))
    ]
    losses = [judgement.metrics["loss"] for judgement in found]
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert 0.5 < losses[0] < 2.0
    assert method.training
    for judgement in found:
        columns, note = judgement.figures["reconstructions"]
        assert list(columns) == ["original", "visible", "reconstruction + visible"]
        original, masked, painted = columns.values()
        assert torch.equal(original, IMAGES[:6])
        first = found[0].figures["reconstructions"].columns["reconstruction + visible"]
        torch.testing.assert_close(painted, first, rtol=1e-4, atol=1e-4)
        assert "visible patches of the original pasted in" in note
        assert "mean and contrast of every hidden patch are taken from the original" in note
        assert not torch.equal(masked, original)


def test_the_picture_has_images_of_different_classes_in_the_order_of_the_set(method):
    labels = torch.tensor([3, 3, 3, 1, 3, 0, 1, 2, 2, 3])
    batches = [batch._replace(labels_B=labels[batch.indices_B]) for batch in _batches(4)]
    judgement = method.judge(lambda split: iter(batches), Ranks(), "off")
    columns, note = judgement.figures["reconstructions"]
    assert torch.equal(columns["original"], IMAGES[[0, 3, 5, 7]])
    assert "of each of the first 4 classes" in note


def test_seen_units_are_kept_and_hidden_ones_painted(method):
    noise = uniform(0, torch.arange(10), 16)
    prediction = method.model(IMAGES, noise)
    masked, whole = painted(IMAGES, prediction, method.target(IMAGES))
    hidden = prediction.mask_BN.view(10, 1, 4, 4)
    hidden = torch.nn.functional.interpolate(hidden, scale_factor=16).expand(-1, 3, -1, -1).bool()
    assert torch.equal(whole[~hidden], IMAGES[~hidden])
    assert torch.equal(masked[~hidden], IMAGES[~hidden])
    assert (masked[hidden] == 0).all()
    assert not torch.equal(whole[hidden], IMAGES[hidden])


@pytest.mark.parametrize("by", ["unit", "image"])
def test_a_perfect_prediction_paints_the_image(method, by):
    target = normalised_target(IMAGES, by)
    prediction = method.model(IMAGES, uniform(0, torch.arange(10), 16))
    perfect = prediction._replace(pred_BND=target.units_BND)
    torch.testing.assert_close(painted(IMAGES, perfect, target)[1], IMAGES, rtol=0, atol=1e-5)


def test_the_trivial_guess_is_the_mean_image_and_a_colour():
    """On images of that kind it is exact; what it does not know stays as its error."""
    generator = torch.Generator().manual_seed(0)
    mean, colours = torch.randn(16, 768, generator=generator), torch.randn(6, 3, generator=generator)
    colours -= colours.mean(dim=0)
    units = mean + colours.repeat(1, 256).unsqueeze(1)
    predictor = TrivialPredictor(units.split([4, 2]), Ranks())
    mask = (torch.rand(6, 16, generator=generator) < 0.75).float()
    torch.testing.assert_close(predictor(units, mask), units)
    # Hidden units say nothing.
    hidden = torch.where(mask.bool().unsqueeze(-1), 100.0, units)
    torch.testing.assert_close(predictor(hidden, mask), units)


def test_the_trivial_loss_stands_beside_the_loss(method):
    metrics = method.judge(lambda split: iter(_batches(3)), Ranks(), "off").metrics
    # Noise has no colour of its own: the guess can only be the mean image, of ten images.
    assert metrics["trivial_loss"] == pytest.approx(0.9, abs=0.03)
    assert metrics["loss"] > metrics["trivial_loss"]


def test_the_picture_has_a_row_per_image_and_a_column_per_tensor(tmp_path):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    red = torch.tensor([2.5, -2.0, -1.5]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    grey = torch.zeros(2, 3, 8, 8)
    path = tmp_path / "picture.png"
    save_columns({"left": red, "right": grey}, mean, std, path, note="chosen by lot")
    assert note_of(path) == "chosen by lot"
    with Image.open(path) as picture:
        # Titles of 24 pixels; tiles of 8 pixels, enlarged to 192, with gaps of 8 between them and around.
        assert picture.size == (2 * 192 + 3 * 8, 24 + 2 * 192 + 3 * 8)
        assert picture.getpixel((0, 0)) == (255, 255, 255)
        assert picture.getpixel((8, 32)) == picture.getpixel((199, 423)) == (255, 0, 0)
        assert picture.getpixel((204, 32)) == (255, 255, 255)
        assert picture.getpixel((399, 423)) == (128, 102, 76)
        titles = [picture.crop((left, 0, left + 192, 24)).convert("L").getextrema()[0] for left in (8, 208)]
        assert max(titles) < 100, "both columns have a title"


def test_a_full_disk_is_a_storage_error(tmp_path):
    (tmp_path / "picture.png").symlink_to("/dev/full")
    with pytest.raises(StorageError):
        save_columns({"zeros": torch.zeros(1, 3, 64, 64)}, (0.0,) * 3, (1.0,) * 3, tmp_path / "picture.png")


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
