"""Steps, batch shares and learning rates of the dense transfers, against the released configurations."""

from __future__ import annotations

import pytest

from vitpipe.config.resolve import Accelerator
from vitpipe.contracts.errors import RecipeError
from vitpipe.dense.plan import detect_plan, drop_factor, poly_factor, segment_plan

GPU = Accelerator("cuda", has_bf16=True)
# train2017: 118,287 images, 117,266 of them with objects.
COCO_IMAGES = 117_266


def test_coco_schedule_of_the_paper(full_recipe):
    plan = detect_plan(full_recipe.detect, num_images=COCO_IMAGES, num_ranks=32, accelerator=GPU)
    per_epoch = COCO_IMAGES // 64
    assert plan.num_steps == 12 * per_epoch
    assert (plan.micro_batch, plan.accumulation, plan.norm, plan.precision) == (2, 1, "SyncBN", "bf16")
    factors = [
        plan.lr_factor(step) for step in (0, 250, 500, 9 * per_epoch - 1, 9 * per_epoch, 11 * per_epoch)
    ]
    assert factors == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.1, 0.01])


def test_coco_schedule_of_vitdet(vitdet_recipe):
    """Drops at 8/9 and 26/27 of the training, warm-up over 250 steps."""
    plan = detect_plan(vitdet_recipe.detect, num_images=COCO_IMAGES, num_ranks=8, accelerator=GPU)
    num_steps = 50 * (COCO_IMAGES // 32)
    assert plan.num_steps == num_steps
    # 1% beside the published 184,375, which counts images without objects too.
    assert plan.num_steps == pytest.approx(184_375, rel=0.01)
    first, second = round(num_steps * 8 / 9), round(num_steps * 26 / 27)
    factors = [plan.lr_factor(step) for step in (0, 125, 250, first - 1, first, second - 1, second)]
    assert factors == pytest.approx([0.001, 0.5005, 1.0, 1.0, 0.1, 0.1, 0.01])


def test_fewer_gpus_accumulate(full_recipe):
    plan = detect_plan(full_recipe.detect, num_images=COCO_IMAGES, num_ranks=8, accelerator=GPU)
    assert (plan.micro_batch, plan.accumulation) == (2, 4)
    assert plan.global_batch == plan.micro_batch * plan.accumulation * plan.num_ranks


def test_ade_schedule_of_the_paper(full_recipe):
    plan = segment_plan(full_recipe.segment, num_ranks=8, accelerator=GPU)
    assert (plan.num_steps, plan.micro_batch, plan.accumulation) == (160_000, 2, 1)
    assert plan.lr_factor(0) == pytest.approx(1e-6)
    assert plan.lr_factor(750) == pytest.approx((1 - 750 / 160_000) * 0.5000005)
    assert plan.lr_factor(80_000) == pytest.approx(0.5)
    assert plan.lr_factor(160_000) == 0.0


def test_no_warmup_starts_at_full_rate():
    assert drop_factor(0, warmup_steps=0, drop_steps=()) == 1.0
    assert poly_factor(0, warmup_steps=0, num_steps=10) == 1.0


def test_one_cpu_says_what_its_batch_norm_sees(tiny_recipe):
    plan = segment_plan(tiny_recipe.segment, num_ranks=1, accelerator=Accelerator())
    assert (plan.norm, plan.precision, plan.accumulation) == ("BN", "off", 1)
    assert any("batch norm in the heads over one rank (2 images)" in note for note in plan.notes)


def test_batch_that_ranks_cannot_share(full_recipe):
    with pytest.raises(RecipeError, match=r"segment\.global_batch"):
        segment_plan(full_recipe.segment, num_ranks=3, accelerator=GPU)


def test_one_image_is_too_few_for_batch_norm(tiny_recipe):
    with pytest.raises(RecipeError, match="4 divides"):
        segment_plan(tiny_recipe.segment, num_ranks=2, accelerator=Accelerator())
    assert segment_plan(tiny_recipe.segment, num_ranks=2, accelerator=GPU).norm == "SyncBN"


def test_mask2former_takes_one_image_per_rank(tiny_head):
    section = tiny_head("mask2former").segment
    plan = segment_plan(section, num_ranks=2, accelerator=Accelerator())
    assert plan.micro_batch == 1
    assert [plan.lr_factor(step) for step in range(4)] == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])


def test_too_few_images(full_recipe):
    with pytest.raises(RecipeError, match="63 images"):
        detect_plan(full_recipe.detect, num_images=63, num_ranks=1, accelerator=GPU)


def test_a_precision_that_the_gpu_lacks_is_refused(full_recipe):
    section = full_recipe.segment.model_copy(update={"precision": "bf16"})
    with pytest.raises(RecipeError, match=r"no bfloat16.*segment\.precision"):
        segment_plan(section, num_ranks=1, accelerator=Accelerator("cuda", has_bf16=False))
