"""Official checkpoints of vision transformers: an account of every key, and what is lost between trunks."""

from __future__ import annotations

import pytest
import torch
from selfpatch_golden import keys

from vitpipe.config.model import model_config
from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.build import build_classifier, build_encoder
from vitpipe.models.convert import convert, convert_state
from vitpipe.models.transfer import describe, transfer_weights
from vitpipe.models.weights import save_weights

# Key list > kind, network, parameters of the encoder.
FILES = {
    "selfpatch_vit_tiny_16_coco": ("vit_self_distilled", "vit_tiny", 5_523_648 + 890_304),
    "selfpatch_vit_small_16_imagenet": ("vit_self_distilled", "vit_small", 21_664_128 + 3_550_080),
    "dino_vit_tiny_16": ("vit_self_distilled", "vit_tiny", 5_524_416),
    "dino_vit_small_16": ("vit_self_distilled", "vit_small", 21_665_664),
    "esvit_deit_tiny_16_coco": ("vit", "vit_tiny", 5_524_416),
    "moby_vit_tiny_16": ("vit_moby", "vit_tiny", 5_524_416),
    "moby_deit_small": ("vit_moby", "vit_small", 21_665_664),
    # Trunks inside a detector and segmentors; those of segmentors have a table for 512 pixels.
    "selfpatch_vit_small_16_maskrcnn": ("vit_self_distilled", "vit_small", 21_664_128),
    "selfpatch_vit_small_16_semfpn": ("vit_self_distilled", "vit_small", 21_982_080),
    "selfpatch_vit_small_16_upernet_mln": ("vit_self_distilled", "vit_small", 21_982_080),
    # Without the class token's entry of the fixed table, which is zero.
    "mocov3_vit_small": ("vit_mocov3", "vit_small", 21_665_664 - 384),
}


def empty(name: str, part: str = "keys") -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in keys(name)[part].items()}


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_a_training_file_has_its_row(name):
    official = empty(name)
    converted = convert_state(official)
    kind, model, num_params = FILES[name]
    assert (converted.kind, converted.model) == (kind, model)
    assert sum(t.numel() for t in converted.state.values()) == num_params
    rows = converted.report.rows
    assert {row.source for row in rows} == set(official)
    assert all(row.why for row in rows if row.outcome == "dropped")
    assert len(converted.state) == sum(row.outcome == "renamed" for row in rows)


@pytest.mark.parametrize("name", [name for name in FILES if "backbone_only" in keys(name)])
def test_a_bare_trunk_is_known_too(name):
    converted = convert_state(empty(name, "backbone_only"))
    assert converted.kind == "vit"
    assert not any(key.startswith("aggregation") for key in converted.state)


def test_the_teacher_of_a_training_file_is_taken(tmp_path):
    """As people have them: student with `module.`, teacher, optimiser, centres."""
    teacher = {key: torch.full(shape, 2.0) for key, shape in keys("dino_vit_tiny_16")["keys"].items()}
    student = {f"module.{key}": torch.zeros_like(tensor) for key, tensor in teacher.items()}
    file = tmp_path / "checkpoint.pth"
    torch.save(
        {"student": student, "teacher": teacher, "epoch": 3, "dino_loss": {"center": torch.zeros(1, 4096)}},
        file,
    )
    report = convert(file, tmp_path / "dino.safetensors")
    assert "teacher" in report.note
    assert "student" in report.note
    network = build_encoder(model_config({"name": "vit_tiny"}))
    assert transfer_weights(network, tmp_path / "dino.safetensors").count("matched") == len(
        network.state_dict()
    )
    assert network.backbone.class_token.mean().item() == 2.0


@pytest.mark.parametrize("key", ["backbone.blocks.3.attn.gate", "backbone.rope", "extra.weight"])
def test_an_unknown_key_is_refused(key):
    with pytest.raises(CheckpointError, match=key):
        convert_state(empty("dino_vit_tiny_16") | {key: torch.empty(1)})


@pytest.fixture
def nano():
    return {"name": "vit_nano", "image_size": 32, "patch_size": 8}


def saved(options, path):
    torch.manual_seed(0)
    network = build_encoder(model_config(options))
    save_weights(network, path)
    return network


def test_between_trunks_with_and_without_class_token_every_loss_is_named(nano, tmp_path):
    for given, wanted, lost, new in (
        ("class_token", "class_attention", ["class_position", "class_token", "norm"], ["aggregation"]),
        ("class_attention", "class_token", ["aggregation"], ["class_position", "class_token", "norm"]),
    ):
        path = tmp_path / f"{given}.safetensors"
        saved({**nano, "pooling": given}, path)
        network = build_encoder(model_config({**nano, "pooling": wanted}))
        report = transfer_weights(network, path)
        unused = {row.source for row in report.rows if row.outcome == "unused"}
        missing = {row.target for row in report.rows if row.outcome == "missing"}
        assert all(any(part in key for key in unused) for part in lost)
        assert all(any(part in key for part in lost) for key in unused)
        assert all(any(part in key for part in new) for key in missing)
        assert all("lost" in row.why for row in report.rows if row.outcome == "unused")
        # Everything else is there: all blocks, patches, positions.
        assert report.count("matched") == len(network.state_dict()) - len(missing)


def test_positions_are_resized_and_other_sizes_refused(nano, tmp_path):
    path = tmp_path / "weights.safetensors"
    saved(nano, path)
    larger = build_encoder(model_config({**nano, "image_size": 64}))
    report = transfer_weights(larger, path)
    assert [row.target for row in report.rows if row.outcome == "resized"] == ["backbone.position"]
    classifier = build_classifier(model_config(nano), num_classes=5)
    assert transfer_weights(classifier, path).count("missing") == 2
    with pytest.raises(CheckpointError, match="patch_embed"):
        transfer_weights(build_encoder(model_config({**nano, "patch_size": 16})), path)


@pytest.mark.parametrize("pooling", ["class_token", "class_attention", "mean"])
def test_a_file_says_what_network_it_is_for(nano, tmp_path, pooling):
    from vitpipe.models.build import as_stored

    network = saved({**nano, "pooling": pooling}, tmp_path / "weights.safetensors")
    info = describe(network.state_dict())
    assert (info.family, info.kind, info.model, info.image_size) == ("vit", "encoder", "vit_nano", 32)
    assert as_stored(model_config(nano), info).pooling == pooling
