"""Cross entropy with soft targets, and the mixing before it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from short_runs import HIVIT, section_of
from torch import nn
from torch.nn import functional as F

from vitpipe.config.train_sections import AugmentConfig
from vitpipe.contracts.errors import RecipeError
from vitpipe.data.batches import Batch
from vitpipe.data.mixup import Mixup
from vitpipe.data.moment import Moment
from vitpipe.methods.classify.config import SoftTargetsConfig
from vitpipe.methods.classify.method import Classify, soft_cross_entropy
from vitpipe.models.families import family_of

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 1, 1])
BATCH = Batch((IMAGES,), LABELS, torch.arange(6), Moment(0, 1, 10, 10))


@given(st.integers(1, 8), st.integers(2, 12), st.floats(0.0, 0.9))
def test_is_torchs_smoothed_cross_entropy_when_nothing_is_mixed(num_images, num_classes, smoothing):
    generator = torch.Generator().manual_seed(num_images * 100 + num_classes)
    logits = torch.randn(num_images, num_classes, generator=generator) * 5
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    targets = Mixup(AugmentConfig(), num_classes, smoothing).soft_targets(labels)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected)


def test_half_precision_logits_are_counted_in_float32():
    logits = torch.tensor([[20.0, -20.0]], dtype=torch.bfloat16)
    loss = soft_cross_entropy(logits, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(40.0)


def test_mixes_before_the_network_and_draws_from_the_batchs_place_alone():
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.mean(dim=(2, 3)).repeat(1, 2)[:, :4]

    method = Classify(Spy(), Mixup(AugmentConfig(mixup_alpha=0.8), 4, 0.1))
    first = method(BATCH)["loss"]
    torch.rand(10)
    again = method(BATCH)["loss"]
    other = method(BATCH._replace(moment=Moment(0, 2, 10, 10)))["loss"]
    assert first.item() == again.item() != other.item()
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], IMAGES)
    # Every mixed image lies between itself and its partner in the reversed batch.
    share = ((seen[0] - IMAGES.flip(0)) / (IMAGES - IMAGES.flip(0))).median()
    torch.testing.assert_close(seen[0], share * IMAGES + (1 - share) * IMAGES.flip(0), rtol=1e-3, atol=1e-4)


def test_is_refused_in_a_stage_without_its_options():
    """A stage of somebody's own may name any method; pretrain refuses it when the recipe is read."""
    section, classes = section_of("pretrain", 3), ("zero", "one")
    with pytest.raises(RecipeError, match="stages intermediate and finetune only"):
        Classify.build(SoftTargetsConfig(), family_of(HIVIT), HIVIT, section=section, classes=classes)
