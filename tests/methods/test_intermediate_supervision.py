"""Intermediate supervision: the compound loss against a written-out one, its weights, saved states, results."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from short_runs import CLASSES, HIVIT, REVCOL, STEPS, built, packed_digits, run, section_of, weights_of
from torch import Tensor
from torch.nn import functional as F

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.logger import MemoryLogger
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.intermediate_supervision.method import IntermediateSupervision, head_weights
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.draws import image_draws
from vitpipe.models.transfer import load_same, transfer_weights
from vitpipe.models.weights import load_state, save_weights

NAME = "intermediate_supervision"
MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def _method(model=REVCOL, mixed: bool = False, **options) -> IntermediateSupervision:
    section = section_of("finetune", 3, method={"name": NAME, **options})
    augment = section.augment.model_copy(update=MIXED if mixed else {})
    method = built(section.model_copy(update={"augment": augment}), model)
    assert isinstance(method, IntermediateSupervision)
    with torch.no_grad():  # blocks that do something: their scale is 1e-6 at first
        for name, parameter in method.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
    return method


def _batch(num_images: int = 4, first: int = 0) -> Batch:
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    chosen = slice(first, first + num_images)
    return Batch((images[chosen],), torch.arange(8)[chosen], torch.arange(8)[chosen], Moment(0, 1, 10, 10))


def _losses(method, batch) -> dict[str, Tensor]:
    with image_draws(batch.moment.key("network"), batch.indices_B):
        return method(batch)


def _written_out(method: IntermediateSupervision, batch: Batch) -> Tensor:
    """The loss head by head, with plain autograd through every column from the beginning."""
    model, heads = method.model, method.heads
    images, targets = method.mix(batch.images, batch.labels_B, key=batch.key("mix"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = torch.stack([images[:, c] * std[c] + mean[c] for c in range(3)], dim=1).clamp(0.01, 0.99)
    x, states, loss = model.stem(images), None, torch.zeros(())
    for number, column in enumerate(model.columns):
        outputs: list[Tensor] = []
        for level in range(4):
            below = outputs[-1] if outputs else x
            above = () if states is None else states[level + 1 :]
            y = column.level(level)(below, above)
            outputs.append(y if states is None else y + column.scales()[level] * states[level])
        states = tuple(outputs)
        if number < 3:
            p = torch.sigmoid(heads.decoder_blocks[number](states[3]))
            error = -(pixels * p.log() + (1 - pixels) * (1 - p).log()).mean()
            log_q = F.log_softmax(heads.cls_blocks[number](states[3]), dim=1)
            alpha, beta = (3.0, 2.0, 1.0)[number], (0.175, 0.35, 0.525)[number]
            loss = loss + alpha * error + beta * -(targets * log_q).sum(dim=1).mean()
    log_q = F.log_softmax(model.cls(states[3]), dim=1)
    return loss - (targets * log_q).sum(dim=1).mean()


@pytest.mark.parametrize("mode", ["plain", "column", "reversible"])
@pytest.mark.parametrize("mixed", [False, True])
def test_value_and_gradients_are_those_of_the_written_out_loss(mode, mixed, monkeypatch):
    method, batch = _method(mixed=mixed).double().eval(), _batch()
    batch = batch._replace(views=(batch.images.double(),))
    # Not by the policy, which would choose another mode for four inverted columns.
    monkeypatch.setattr(method.model.memory, "prepare", lambda *_, **__: mode)
    known = {name: p for name, p in method.named_parameters() if p.requires_grad}
    expected = _written_out(method, batch)
    expected_grads = torch.autograd.grad(expected, list(known.values()))
    loss = method(batch)["loss"]
    # The method's losses are float32, whatever the network is.
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    grads = torch.autograd.grad(loss, list(known.values()))
    for name, ours, theirs in zip(known, grads, expected_grads, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_the_parts_are_the_losses_without_weights():
    found = _losses(_method(), _batch())
    pixels = [found[f"pixel_loss_{i}"].item() for i in (1, 2, 3)]
    classes = [found[f"class_loss_{i}"].item() for i in (1, 2, 3, 4)]
    assert len(found) == 8
    parts = zip((3, 2, 1, 0.175, 0.35, 0.525, 1), (*pixels, *classes), strict=True)
    assert found["loss"].item() == pytest.approx(sum(w * x for w, x in parts), rel=1e-6)
    assert not any(found[name].requires_grad for name in found if name != "loss")


@given(st.integers(2, 12), st.floats(0.0, 10.0), st.floats(0.0, 10.0))
def test_pixels_count_less_and_classes_more_from_depth_to_depth(num_heads, pixel_weight, class_weight):
    pixels, classes = head_weights(num_heads, pixel_weight, class_weight)
    assert (len(pixels), len(classes)) == (num_heads - 1, num_heads)
    assert pixels[0] == pixel_weight
    assert classes[-1] == 1.0
    assert classes[0] == pytest.approx(class_weight / num_heads)
    assert list(pixels) == sorted(pixels, reverse=True)
    assert list(classes[:-1]) == sorted(classes[:-1])


@pytest.mark.parametrize(
    ("options", "without"), [({"pixel_weight": 0.0}, "decoder_blocks"), ({"class_weight": 0.0}, "cls_blocks")]
)
def test_a_weight_of_zero_switches_its_heads_off(options, without):
    method = _method(**options)
    _losses(method, _batch())["loss"].backward()
    for name, parameter in method.heads.named_parameters():
        assert bool(parameter.grad.any()) == (not name.startswith(without)), name


def test_the_target_is_the_picture_between_its_bounds():
    section = section_of("finetune", 3, method={"name": NAME})
    augment = section.augment.model_copy(update={"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.5)})
    method = built(section.model_copy(update={"augment": augment}), REVCOL)
    picture = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    normalised = (picture - torch.tensor(augment.mean).view(3, 1, 1)) / torch.tensor(augment.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(method.pixels(normalised), picture.clamp(0.01, 0.99))
    # A decoder that gives the picture back has the least loss that there is: the pixels' entropy.
    target = method.pixels(normalised)
    best = F.binary_cross_entropy_with_logits(torch.logit(target), target)
    for worse in (0.9 * target + 0.05, torch.full_like(target, 0.5)):
        assert F.binary_cross_entropy_with_logits(torch.logit(worse), target) > best


def test_a_mixed_picture_is_its_own_target():
    method, batch = _method(mixed=True), _batch()
    seen = []
    before = method.pixels
    method.pixels = lambda images: seen.append(images) or before(images)
    _losses(method, batch)
    mixed, targets = method.mix(batch.images, batch.labels_B, key=batch.key("mix"))
    assert torch.equal(seen[0], mixed)
    assert not torch.equal(mixed, batch.images)
    assert (targets > 0.2).sum(dim=1).max() == 2


def test_losses_and_gradients_do_not_depend_on_the_micro_batch():
    method = _method().train()  # with drop path, whose draws belong to the image

    def run(batches):
        method.zero_grad()
        found = [_losses(method, batch) for batch in batches]
        for losses in found:
            (losses["loss"] / len(found)).backward()
        means = {name: sum(losses[name].item() for losses in found) / len(found) for name in found[0]}
        return means, torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])

    whole, whole_grad = run([_batch(8)])
    parts, parts_grad = run([_batch(4), _batch(4, first=4)])
    assert parts == pytest.approx(whole, rel=1e-5)
    assert (parts_grad - whole_grad).norm() < 1e-5 * whole_grad.norm()


def test_the_result_is_the_classifier_and_the_heads_lie_beside_it(tmp_path):
    method = _method().eval()
    results = method.results()
    assert list(results) == ["weights", "heads"]
    plain = build_classifier(REVCOL, num_classes=len(CLASSES)).eval()
    assert set(results["weights"].state_dict()) == set(plain.state_dict())
    save_weights(results["weights"], tmp_path / "weights.safetensors")
    load_same(plain, load_state(tmp_path / "weights.safetensors"))
    images = _batch().images
    with torch.no_grad():
        assert torch.equal(plain(images), method.model(images))
    report = transfer_weights(build_classifier(REVCOL, num_classes=3), tmp_path / "weights.safetensors")
    assert report.count("fresh") == 2
    transfer_weights(build_encoder(REVCOL), tmp_path / "weights.safetensors")


def test_a_saved_state_has_the_heads_and_no_constants():
    names = _method().resume_state()
    assert {name.split(".")[0] for name in names} == {"model", "heads"}
    assert {name.split(".")[1] for name in names if name.startswith("heads")} == {
        "cls_blocks",
        "decoder_blocks",
    }


def test_heads_start_with_the_recipes_deviation():
    section = section_of("finetune", 3, method={"name": NAME})
    method = built(section, REVCOL.model_copy(update={"head_init_std": 0.5}))
    for head in (*method.heads.cls_blocks, method.model.cls):
        assert head.classifier[1].weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_networks_without_heads_and_too_shallow_ones_are_refused():
    section = section_of("finetune", 3, method={"name": NAME})
    with pytest.raises(
        RecipeError, match=r"hivit_nano has no heads.*choose another method, or choose a model.*revcol "
    ):
        built(section, HIVIT)
    with pytest.raises(InputError, match=r"needs 4 columns, but revcol_micro has 3"):
        built(section, model_config({"name": "revcol_micro", "image_size": 64}))
    with pytest.raises(ValidationError, match=f"'{NAME}' trains a classifier, this stage none"):
        section_of("pretrain", 3, method={"name": NAME})


def test_all_losses_fall():
    method, batch = _method().train(), _batch()
    smooth = F.interpolate(torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1)), size=64)
    batch = batch._replace(views=(smooth,))
    optimiser = torch.optim.AdamW(method.parameters(), lr=2e-3)
    history = []
    for step in range(40):
        losses = _losses(method, batch._replace(moment=Moment(0, step, 40, 10)))
        optimiser.zero_grad()
        losses["loss"].backward()
        optimiser.step()
        history.append({name: value.item() for name, value in losses.items()})
    assert all(math.isfinite(value) for value in history[-1].values())
    for name, value in history[-1].items():
        assert value < 0.97 * history[0][name], name


class _Interrupted(MemoryLogger):
    """Ends the run after step 3."""

    def progress(self, step, num_steps, values):
        if step == 3:
            raise InterruptedError


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    shards = packed_digits(tmp_path)
    section = section_of("finetune", STEPS, method=NAME, ema_decay=0.9, checkpoint_minutes=1e-9)
    section = section.model_copy(update={"augment": section.augment.model_copy(update=MIXED)})
    whole, losses, _ = run(shards, section, tmp_path / "whole", model=REVCOL)
    with pytest.raises(InterruptedError):
        run(shards, section, tmp_path / "stopped", model=REVCOL, logger=_Interrupted())
    logger = MemoryLogger()
    again, rest, _ = run(shards, section, tmp_path / "stopped", model=REVCOL, logger=logger)
    assert logger.lines == ["Resuming after step 2"]
    assert rest == losses[2:]
    assert torch.equal(weights_of(again), weights_of(whole))
    assert whole.average is not None
    assert again.average is not None
    assert all(torch.equal(again.average.shadow[n], x) for n, x in whole.average.shadow.items())
