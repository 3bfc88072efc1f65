"""CLIP's image tower from every kind of file, every key accounted for; wrong files in one paragraph."""

from __future__ import annotations

import zipfile

import pytest
import torch
from clip_files import hugging_face_state, openai_state, save_torchscript, small_tower, text_state
from safetensors.torch import save_file
from torch import nn

from vitpipe.contracts.errors import CheckpointError
from vitpipe.models.clip.conversion import read_tower
from vitpipe.models.convert import convert, convert_state, read_checkpoint
from vitpipe.models.weights import load_metadata

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LAYOUTS = {
    "openai.pt": lambda tower, path: save_torchscript({**openai_state(tower), **text_state()}, path),
    "open_clip.safetensors": lambda tower, path: save_file({**openai_state(tower), **text_state()}, path),
    "hugging_face.safetensors": lambda tower, path: save_file(hugging_face_state(tower), path),
    "state.pth": lambda tower, path: torch.save({**openai_state(tower), **text_state()}, path),
    "visual.pth": lambda tower, path: torch.save({"state_dict": openai_state(tower, "")}, path),
    "ours.safetensors": lambda tower, path: save_file(tower.state_dict(), path),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_tower(name, tmp_path):
    tower = small_tower()
    LAYOUTS[name](tower, tmp_path / name)
    found = read_tower(tmp_path / name, "random")
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in found.parameters())
    # OpenAI's are in half precision.
    near = {"atol": 2e-2, "rtol": 2e-2} if name == "openai.pt" else {"atol": 0.0, "rtol": 0.0}
    torch.testing.assert_close(found.targets(IMAGES), tower.targets(IMAGES), **near)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_is_accounted_for(name, tmp_path):
    tower = small_tower()
    LAYOUTS[name](tower, tmp_path / name)
    given = read_checkpoint(tmp_path / name)
    report = convert(tmp_path / name, tmp_path / "out.safetensors")
    assert sorted(row.source for row in report.rows) == sorted(given)
    assert {row.outcome for row in report.rows} <= {"renamed", "dropped"}
    assert all(row.why for row in report.rows if row.outcome == "dropped")
    assert load_metadata(tmp_path / "out.safetensors")["kind"] == "clip_image_tower"


def test_the_large_teacher_and_its_table_for_336_pixels(golden):
    state = golden.empty_state("teacher_l14")
    assert convert_state(state).model == "clip_l14"
    larger = {**state, "visual.positional_embedding": torch.zeros(1 + 24 * 24, 1024, device="meta")}
    assert convert_state(larger).state["positions"].shape == (577, 1024)


def test_another_grid_gets_resampled_positions():
    tower = small_tower(grid_side=4)
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    assert tower(images).shape == (1, 24, 32)
    # Smoothly: twice the grid of a constant table is the same constant.
    with torch.no_grad():
        tower.positions.fill_(0.5)
        torch.testing.assert_close(tower._positions((8, 8)), torch.full((65, 64), 0.5))


def test_the_program_of_an_archive_is_not_looked_at(tmp_path):
    """Code that torch could not even parse changes nothing."""
    save_torchscript(openai_state(small_tower()), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"import os; os.abort()" if "/code/" in name else old.read(name))
    with pytest.raises(RuntimeError):
        torch.jit.load(tmp_path / "b.pt")
    assert torch.equal(
        read_tower(tmp_path / "b.pt", "random").class_token,
        read_tower(tmp_path / "a.pt", "random").class_token,
    )


def _other_sizes(tower, path):
    save_file(openai_state(tower), path)


@pytest.mark.parametrize(
    ("wanted", "write", "words"),
    [
        ("clip_b16", _other_sizes, "random .patches of 16 pixels.*but the recipe's teacher is clip_b16"),
        ("random", lambda t, p: save_file(text_state(), p), "text tower only.*visual. or vision_model."),
        (
            "random",
            lambda t, p: save_torchscript(nn.Linear(2, 3).state_dict(), p),
            "TorchScript archive holds no image tower of CLIP .first keys: bias, input_resolution, weight",
        ),
        ("random", lambda t, p: save_file(nn.Linear(2, 3).state_dict(), p), "The file holds no image tower"),
        (
            "random",
            lambda t, p: save_file({**openai_state(t), "visual.conv1.weight": torch.zeros(64, 3, 8, 8)}, p),
            "patches of 8 pixels.*no known size.*clip_l14",
        ),
        (
            "random",
            lambda t, p: save_file(
                {k: v for k, v in openai_state(t).items() if k != "visual.ln_post.bias"}, p
            ),
            "norm_after.bias is missing",
        ),
        (
            "random",
            lambda t, p: save_file({**openai_state(t), "visual.more": torch.zeros(1)}, p),
            "visual.more is not known",
        ),
        (
            "random",
            lambda t, p: save_file(
                {
                    k: v
                    for k, v in hugging_face_state(t).items()
                    if k != "vision_model.encoder.layers.1.self_attn.k_proj.weight"
                },
                p,
            ),
            r"blocks.1.attn.qkv.weight has shape \(128, 64\), not \(192, 64\)",
        ),
    ],
)
def test_a_wrong_file_is_named_in_one_paragraph(wanted, write, words, tmp_path):
    path = tmp_path / ("a.pt" if "TorchScript" in words else "a.safetensors")
    write(small_tower(), path)
    with pytest.raises(CheckpointError, match=words) as raised:
        read_tower(path, wanted)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 0.99])
@pytest.mark.parametrize("name", ["openai.pt", "open_clip.safetensors"])
def test_a_truncated_file_is_named(name, share, tmp_path):
    LAYOUTS[name](small_tower(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="truncated"):
        read_tower(tmp_path / name, "random")


def test_a_changed_byte_of_an_archive_is_found(tmp_path):
    save_torchscript(openai_state(small_tower()), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum|damaged"):
        read_tower(tmp_path / "a.pt", "random")


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_tower(tmp_path / "none.pt", "clip_b16")
