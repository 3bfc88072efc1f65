"""The losses of EsViT and MoBY against a written-out reference, pair by pair and image by image."""

from __future__ import annotations

import pytest
import torch
from self_supervised_runs import build, section
from torch.nn import functional as F

from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment


def batch_of(num_views: int, num_local: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(4)
    views = [torch.randn(3, 3, 32, 32, generator=generator) for _ in range(num_views)]
    views += [torch.randn(3, 3, 24, 24, generator=generator) for _ in range(num_local)]
    return Batch(tuple(views), torch.zeros(3, dtype=torch.int64), torch.arange(3), Moment(0, 0, 60, 6))


def cosine_match(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    return int(torch.stack([F.cosine_similarity(ours, other, dim=0) for other in theirs]).argmax())


@torch.no_grad()
def test_esvit_pair_by_pair():
    method, batch = build("esvit"), batch_of(2, 2)
    method.begin()
    method.eval()
    generator = torch.Generator().manual_seed(9)
    for name in ("image", "region"):
        method.centre(name).value.copy_(0.1 * torch.randn(32, generator=generator))
    tau_t, tau_s = method.config.teacher_temperature, method.config.student_temperature

    def sides(side, images):
        features = side.model.features(images)
        return features.pooled, side.model.final_norm(features.tokens[-1])

    total_view = total_region = 0.0
    for g in range(2):
        vector, regions = sides(method.teacher, batch.views[g])
        view_target = (
            (method.teacher.heads["image"](vector) - method.centre("image").value) / tau_t
        ).softmax(-1)
        outputs = method.teacher.heads["region"](regions)
        region_target = ((outputs - method.centre("region").value) / tau_t).softmax(-1)
        for v in range(4):
            if v == g:
                continue
            own, own_regions = sides(method.student, batch.views[v])
            log_p = F.log_softmax(method.heads["image"](own) / tau_s, -1)
            total_view += float(-(view_target * log_p).sum(-1).mean())
            log_r = F.log_softmax(method.heads["region"](own_regions) / tau_s, -1)
            for image in range(3):
                losses = [
                    -(region_target[image, cosine_match(region, regions[image])] * log_r[image, number]).sum()
                    for number, region in enumerate(own_regions[image])
                ]
                total_region += float(torch.stack(losses).mean()) / 3
    found = method.losses(batch)
    assert float(found["view_loss"]) == pytest.approx(total_view / 6, rel=1e-5)
    assert float(found["region_loss"]) == pytest.approx(total_region / 6, rel=1e-5)
    assert float(found["loss"]) == pytest.approx((total_view + total_region) / 12, rel=1e-5)


@torch.no_grad()
def test_moby_image_by_image():
    method, batch = build("moby"), batch_of(2)
    method.begin()
    method.eval()
    project, predict = method.heads["projector"], method.heads["predictor"]
    queries, keys = [], []
    for view in batch.views:
        queries.append(F.normalize(predict(project(method.model.features(view).pooled)), dim=-1))
        vector = method.teacher.model.features(view).pooled
        keys.append(F.normalize(method.teacher.heads["projector"](vector), dim=-1))
    total = 0.0
    for query, key, queue in (
        (queries[0], keys[1], method.queues[1]),
        (queries[1], keys[0], method.queues[0]),
    ):
        for image in range(3):
            own = torch.exp(query[image] @ key[image] / 0.2)
            others = torch.exp(query[image] @ queue.t() / 0.2).sum()
            total += float(-torch.log(own / (own + others))) / 3
    assert float(method.losses(batch)["loss"]) == pytest.approx(total, rel=1e-5)


def test_moby_trains_the_online_network_only():
    method, batch = build("moby_selfpatch", section("moby_selfpatch")), batch_of(2)
    method.begin()
    method.train()
    found = method.losses(batch)
    assert found["loss"].item() == pytest.approx(
        found["image_loss"].item() + 0.1 * found["patch_loss"].item(), rel=1e-6
    )
    found["loss"].backward()
    assert all(p.grad is None for p in method.teacher.parameters())
    learning = [
        n for n, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    # A bias in front of batch norm has no effect, and the aggregated patches are the teacher's alone.
    assert all(n.endswith("linear_hidden.0.bias") for n in learning), learning
