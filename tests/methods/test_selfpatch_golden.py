"""Losses, centres, gradients, neighbours and parameter groups agree with the released code of SelfPatch and
DINO."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from selfpatch_golden import ENTRIES, GRADIENT_TOLERANCE, TOLERANCE, error, fill, probe

from vitpipe.config.model import model_config
from vitpipe.config.resolve import Accelerator, train_plan
from vitpipe.config.train_sections import OptimConfig, TrainConfig
from vitpipe.data.batches import Batch
from vitpipe.data.moment import Moment
from vitpipe.methods.distillation import Centre, across_views
from vitpipe.methods.patch_loss import PatchRows, patch_loss
from vitpipe.methods.selfpatch.config import SelfPatchConfig
from vitpipe.methods.selfpatch.method import SelfPatch
from vitpipe.models.class_attention import ClassAttention
from vitpipe.models.families import family_of
from vitpipe.models.neighbours import nearest_neighbours, neighbour_table
from vitpipe.optim.schedules import cosine, learning_rate, ramp, weight_decay
from vitpipe.stages.pretrain.config import PretrainConfig
from vitpipe.train.ranks import Ranks


def official_name(ours: str) -> str:
    """The released name of a parameter of the student's side."""
    for before, after in (
        ("model.backbone.patch_embed.", "backbone.patch_embed.proj."),
        ("model.backbone.position", "backbone.pos_embed"),
        ("model.backbone.", "backbone."),
        ("model.aggregation.token", "ca_head.cls_token"),
        ("model.aggregation.blocks.", "ca_head.cls_blocks."),
        ("model.aggregation.", "ca_head."),
        ("heads.image.", "c_head."),
        ("heads.patch.", "p_head."),
    ):
        if ours.startswith(before):
            name = after + ours.removeprefix(before)
            for part in ("q", "k", "v", "proj"):
                if name.startswith("ca_head.cls_blocks."):
                    name = name.replace(f".{part}.", f".attn.{part}.")
            return name
    raise AssertionError(ours)


def fill_officially(module: torch.nn.Module, prefix: str = "") -> None:
    """Fill every tensor by its released name; the lengths of prototypes are 1."""
    state = {name: t for name, t in module.state_dict().items() if name.startswith(("model.", "heads."))}
    filled = fill.fill({official_name(name): torch.zeros_like(t) for name, t in state.items()})
    for name, tensor in state.items():
        tensor.copy_(torch.ones(()) if name.endswith("weight_g") else filled[official_name(name)])


def method(prototypes: int, patch_prototypes: int) -> SelfPatch:
    model = model_config({"name": "vit_tiny", "pooling": "class_attention"})
    config = SelfPatchConfig(prototypes=prototypes, patch_prototypes=patch_prototypes, drop_path=0.0)
    section = TrainConfig(epochs=5, global_batch=2, optim=OptimConfig(base_lr=1e-3))
    return SelfPatch.build(config, family_of(model), model, section=section, classes=())


@pytest.mark.parametrize("name", ["neighbours_14x14_k4", "neighbours_6x6_k4"])
@torch.no_grad()
def test_neighbours_and_the_aggregation_module(name):
    entry = ENTRIES[name]
    tokens, grid = probe(entry["input"]["tokens"]), tuple(entry["grid"])
    chosen = nearest_neighbours(tokens, grid, entry["k"])
    record = entry["record"]
    checksum = zlib.crc32(np.ascontiguousarray(chosen.sort(-1).values.numpy().astype("<i4")).tobytes())
    assert checksum == record["selected_sorted_crc32_int32"]
    assert chosen[0, :8].tolist() == record["first_8_patches_of_image_0"]
    if "neighbour_table" in record:
        assert [sorted(row) for row in record["neighbour_table"]] == neighbour_table(grid).tolist()

    module = ClassAttention(192, 3)
    names = {f"model.aggregation.{n}": t for n, t in module.state_dict().items()}
    # The recording filled the module alone: without the prefix of the whole network.
    filled = fill.fill(
        {official_name(n).removeprefix("ca_head."): torch.zeros_like(t) for n, t in names.items()}
    )
    for n, tensor in names.items():
        tensor.copy_(filled[official_name(n).removeprefix("ca_head.")])
    image = module(tokens).unsqueeze(1)
    assert error(torch.cat([image, module.around(tokens, chosen)], 1), record["teacher_output"]) < TOLERANCE
    assert error(torch.cat([image, module.norm(tokens)], 1), record["student_output"]) < TOLERANCE


def test_dino_loss_over_several_steps():
    entry = ENTRIES["dino_loss_2+2"]
    setting = entry["setting"]
    crops, batch, width = setting["crops"], setting["batch"], setting["out_dim"]
    centre = Centre(width, setting["center_momentum"])
    for record in entry["record"]:
        step = record["step"]
        student = (0.3 * fill.probe((crops * batch, width), 100 + step)).requires_grad_()
        teacher = 0.3 * fill.probe((2 * batch, width), 200 + step)
        temperature = ramp(
            record["epoch"], setting["warmup_teacher_temp_epochs"], setting["warmup_teacher_temp"],
            setting["teacher_temp"],
        )  # fmt: skip
        assert temperature == pytest.approx(record["teacher_temp"])
        targets = centre.targets(teacher, temperature).unflatten(0, (2, batch))
        loss = across_views(student.unflatten(0, (crops, batch)), targets, setting["student_temp"])
        loss.backward()
        centre.add(teacher)
        centre.update(Ranks())
        assert loss.item() == pytest.approx(record["loss"], rel=TOLERANCE)
        assert error(centre.value.unsqueeze(0), record["center_after"]) < TOLERANCE
        assert error(student.grad, record["student_grad"]) < GRADIENT_TOLERANCE


def test_selfpatch_loss_over_several_steps():
    entry = ENTRIES["selfpatch_loss_2+2"]
    setting, shapes = entry["setting"], entry["input"]["tensors"]
    centre, patch_centre = Centre(setting["out_dim"], 0.9), Centre(setting["out_dim_selfpatch"], 0.9)
    for record in entry["record"]:
        seed = 300 + 10 * record["step"]
        student = {
            n: (0.3 * fill.probe(tuple(s), seed + i)).requires_grad_()
            for i, (n, s) in enumerate(shapes.items())
        }
        teacher = {n: 0.3 * fill.probe(tuple(s), seed + 4 + i) for i, (n, s) in enumerate(shapes.items())}
        tau_t, tau_s = setting["teacher_temp"], setting["student_temp"]
        targets = centre.targets(teacher["cls_global"].flatten(0, 1), tau_t).unflatten(0, (2, 2))
        images = torch.cat([student["cls_global"], student["cls_local"]]).flatten(0, 1)
        image_loss = across_views(images.unflatten(0, (4, 2)), targets, tau_s)
        names = ("patch_global", "patch_local")
        rows = [PatchRows(student[n].flatten(0, 1), 2) for n in names]
        patch_targets = [patch_centre.targets(teacher[n].flatten(0, 1), tau_t) for n in names]
        patches = patch_loss(rows, patch_targets, tau_s)
        loss = image_loss + setting["weight_of_patch_loss"] * patches
        loss.backward()
        centre.add(torch.cat([teacher["cls_global"], teacher["cls_local"]]).flatten(0, 1))
        patch_centre.add(torch.cat([teacher[n].flatten(0, 1) for n in names]))
        for each in (centre, patch_centre):
            each.update(Ranks())
        found = {"loss": loss, "image_loss": image_loss, "patch_loss": patches}
        assert all(value.item() == pytest.approx(record[n], rel=TOLERANCE) for n, value in found.items())
        assert error(centre.value.view(1, 1, -1), record["center_after"]) < TOLERANCE
        assert error(patch_centre.value.unsqueeze(0), record["patch_center_after"]) < TOLERANCE
        for n, tensor in student.items():
            assert error(tensor.grad, record["grad"][n]) < GRADIENT_TOLERANCE


def test_a_whole_step():
    entry = ENTRIES["selfpatch_step_vit_tiny"]
    trained = method(entry["model"]["out_dim"], entry["model"]["out_dim_selfpatch"])
    with torch.no_grad():
        fill_officially(trained)
    trained.begin()
    trained.eval()
    views = [probe(entry["input"][kind]) for kind in ("global", "local")]
    batch = Batch(
        tuple(half for view in views for half in view.chunk(2)),
        torch.zeros(2, dtype=torch.int64), torch.arange(2), Moment(0, 0, 10, 2),
    )  # fmt: skip
    found = trained.losses(batch)
    found["loss"].backward()
    record = entry["record"]
    for name in ("loss", "image_loss", "patch_loss"):
        assert found[name].item() == pytest.approx(record[name], rel=TOLERANCE), name
    for side, is_teacher in ((trained.student, False), (trained.teacher, True)):
        outputs = trained.outputs(side, views, is_teacher=is_teacher)
        expected = record["teacher" if is_teacher else "student"]
        images, patches = outputs.images_RK.split(4), outputs.patches_RK.split(outputs.num_patches)
        for kind, image, patch in zip(("global", "local"), images, patches, strict=True):
            assert error(image.unsqueeze(1), expected[f"cls_{kind}"]) < TOLERANCE
            assert error(patch.unflatten(0, (4, -1)), expected[f"patch_{kind}"]) < TOLERANCE
    norms = {official_name(n): p.grad.norm() for n, p in trained.named_parameters() if p.grad is not None}
    for name, norm in record["grad_norm"].items():
        assert float(norms[name]) == pytest.approx(norm, rel=GRADIENT_TOLERANCE), name


def test_parameter_groups():
    record = ENTRIES["parameter_groups_vit_tiny"]["record"]
    trained = method(64, 32)
    groups = {group["decays"]: group for group in trained.groups(OptimConfig(base_lr=1e-3))}
    for decays, name in ((True, "decayed"), (False, "not_decayed")):
        assert len(groups[decays]["params"]) == record[name]["tensors"]
        assert sum(p.numel() for p in groups[decays]["params"]) == record[name]["elements"]
    assert set(record["decayed"]["includes"]) <= {official_name(n) for n in groups[True]["names"]}
    frozen = [
        n for n, p in trained.named_parameters() if not p.requires_grad and not n.startswith("teacher.")
    ]
    assert sorted(map(official_name, frozen)) == record["not_trained"]


def test_schedules():
    """Rate, weight decay, momentum and temperature of every step, by the functions that the loop calls."""
    entry = ENTRIES["dino_schedules"]
    setting, record = entry["setting"], entry["record"]
    optim = OptimConfig(
        base_lr=setting["lr_peak"], lr_reference_batch=None, min_lr=setting["lr_end"],
        warmup_epochs=setting["warmup_epochs"], warmup_reaches_peak=True,
        weight_decay=setting["wd"][0], final_weight_decay=setting["wd"][1],
    )  # fmt: skip
    section = PretrainConfig(epochs=setting["epochs"], global_batch=1, optim=optim)
    plan = train_plan(
        section,
        path="pretrain",
        num_images=setting["iterations_per_epoch"],
        num_ranks=1,
        accelerator=Accelerator(),
    )
    steps = range(plan.num_steps)
    rates = [learning_rate(step, plan, optim) for step in steps]
    decays = [weight_decay(step, plan, optim) for step in steps]
    momenta = [
        cosine(Moment(0, step, plan.num_steps, plan.steps_per_epoch).progress, 0.996, 1.0) for step in steps
    ]
    for found, name, total in (
        (rates, "lr", "sum_lr"), (decays, "weight_decay", "sum_wd"), (momenta, "teacher_momentum", "sum_momentum")
    ):  # fmt: skip
        assert [found[i] for i in record["iteration"]] == pytest.approx(record[name], rel=1e-9)
        assert sum(found) == pytest.approx(record[total], rel=1e-9)
    start, end, length = setting["teacher_temp"]
    assert [ramp(epoch, length, start, end) for epoch in range(10)] == pytest.approx(
        record["teacher_temp_per_epoch"]
    )
