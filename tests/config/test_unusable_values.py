"""Values that no system can use (NUL, half a surrogate, endless names and numbers) and files that are none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from toy_project import call

from pipelines.placement import read_placement
from vitpipe.config.params_file import load_params
from vitpipe.config.plugins import use_plugins_of
from vitpipe.config.read import load_recipe, parse_override, read_mapping, recipe_path
from vitpipe.contracts.errors import InputError, RecipeError
from vitpipe.contracts.files import read_text

HEAD = "recipe: itpn/pixel_base\nprofile: demo\n"
LONG = "k" * 20_000


@pytest.fixture
def params(tmp_path):
    """Function that writes a params file with one more line, and gives its path."""

    def write(line: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(f"{HEAD}{line}\n")
        return path

    return write


UNUSABLE = {
    r'plugins: ["a\0b"]': r"the character U\+0000 \(NUL\) is not allowed in 'a\\x00b'.*line 3",
    r'plugins: ["a\uD800b"]': r"the character U\+D800 \(half of a surrogate pair\) is not allowed in",
    r'data: {root: "/a\0b"}': r"NUL",
    r'data: {store: "/a\0b"}': r"NUL",
    r'data: {pinned: {path: "/a\uDCFF"}}': r"U\+DCFF",
    r'finetune: {weights: "a\0b.safetensors"}': r"NUL",
    r'"a\0b": 1': r"NUL",
    r'overrides: ["data.root=\0"]': r"NUL",
    f"seed: {'7' * 20_000}": r"the number '7{80}\.\.\.' has 20,000 digits, which is too long.*line 3",
    f"seed: 0x{'7' * 20_000}": r"the number '0x7{78}\.\.\.' has 20,002 digits",
    "seed: !!int x": r"'x' is no number",
    "finetune: {optim: {base_lr: !!float x}}": r"'x' is no number",
    f"{LONG}: 1": r"the key 'k{80}\.\.\.' has 20,000 characters, and YAML allows 1,024.*line 3",
    f'"{LONG}": 1': r"the key 'k{80}\.\.\.' has 20,000 characters",
    f"finetune: {{{LONG}: 1}}": r"the key 'k{80}\.\.\.' has 20,000 characters.*line 3",
    f"finetune:\n  {LONG}: 1": r"the key 'k{80}\.\.\.' has 20,000 characters.*line 4",
}


@pytest.mark.parametrize("line", UNUSABLE, ids=range(len(UNUSABLE)))
def test_a_value_that_no_system_can_use_is_refused_in_a_short_sentence(line, params):
    with pytest.raises(RecipeError, match=UNUSABLE[line]) as refused:
        load_params(params(line))
    assert len(str(refused.value)) < 500 + len(str(params(line)))
    assert "sys." not in str(refused.value)


@pytest.mark.parametrize("text", [r'"\0"', r'"\uD800"', "7" * 20_000, f"{{{LONG}: 1}}"])
def test_an_override_says_the_same(text):
    with pytest.raises(
        RecipeError, match=r"is not YAML: the (character|number|key) .*Where: --set"
    ) as refused:
        parse_override(f"seed={text}")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("key", ["data.root", "finetune.weights"])
def test_a_name_that_no_file_system_takes_is_refused_with_its_key(key):
    with pytest.raises(RecipeError, match=rf"'{key}': the name 'é{{80}}\.\.\.' in this path has 512 bytes"):
        load_recipe("itpn/pixel_base", "demo", [f"{key}=/data/{'é' * 256}/x"])
    load_recipe("itpn/pixel_base", "demo", [f"{key}=/data/{'é' * 127}/x"])


@pytest.mark.parametrize("name", ["k" * 300, LONG, f"/{'/'.join(['y' * 200] * 30)}"])
def test_a_plugin_folder_that_cannot_be_is_refused(name, params):
    with pytest.raises(InputError, match=r"The plugin folder does not exist.*plugins in ") as refused:
        use_plugins_of(params(f"plugins: [{name}]"))
    assert len(str(refused.value)) < 4500


@pytest.mark.parametrize("verb", [("plan",), ("verdict",), ("run", "prepare")])
@pytest.mark.parametrize("line", [r'plugins: ["a\0b"]', r'data: {root: "\uD800"}'])
def test_verbs_end_with_one_paragraph(verb, line, params):
    done = call(params(line).parent, *verb)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("vitpipe: The file is not valid YAML: the character U+")


def test_doctor_finds_a_params_file_that_cannot_be_read(params):
    path = params(r'plugins: ["a\0b"]')
    done = call(path.parent, "doctor")
    assert "error: The file is not valid YAML: the character U+0000" in " ".join(done.stdout.split())
    path.unlink()
    os.mkfifo(path)
    done = call(path.parent, "doctor")
    assert "error: The file cannot be read (it is a named pipe" in " ".join(done.stdout.split())


@pytest.mark.parametrize("verb", [("models",), ("recipes",)])
def test_verbs_that_need_no_params_file_go_on_without_its_plugins(verb, params):
    done = call(params(r'plugins: ["a\0b"]').parent, *verb)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_path_that_is_too_long_is_shown_shortened(tmp_path):
    done = call(tmp_path, "verdict", LONG)
    assert done.returncode == 2
    assert "The file system refused a path (File name too long). Where: " + "k" * 80 + "..." in done.stderr


def test_a_stage_runs_into_a_folder_whose_name_is_not_utf_8(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "summary: one set\nsource: {paper: none, title: none}\nstages: [prepare, finetune, report]\n"
        "data: {sets: [imagenet], workers: 0, embedded: {image_size: 64, train_images: 20, val_images: 10}}\n"
        "model: {name: hivit_nano, image_size: 64}\nfinetune: {epochs: 1, global_batch: 16, optim: {base_lr: 1.0e-3}}\n"
    )
    out = os.fsdecode(b"caf\xe9")
    done = call(tmp_path, "run", "prepare", "--recipe", "r.yaml", "--out", f"{out}/prepare")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / out / "prepare" / "card.json").is_file()


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # an address has at most 108 bytes


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")  # whose end nobody reaches


IRREGULAR = {"a named pipe": named_pipe, "a socket": bound_socket, "a device": link_to_a_device}


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_file_that_is_no_regular_one_is_refused_and_not_waited_for(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("params.yaml")
    IRREGULAR[kind](path)
    said = rf"it is {kind}, not a regular file\)\. Where: .*params\.yaml"
    for reads in (load_params, read_mapping, lambda file: load_recipe(str(file), "demo")):
        with pytest.raises(RecipeError, match=said):
            reads(path)
    with pytest.raises(InputError, match=said):
        read_placement(path)
    with pytest.raises(OSError, match=f"it is {kind}"):
        read_text(path)
    use_plugins_of(path)  # names none; the verb that needs the file refuses it
    assert recipe_path("params.yaml", "recipe") == (path, ())


def test_plan_does_not_wait_for_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "params.yaml")
    os.mkfifo(tmp_path / "r.yaml")
    for arguments in ((), ("--recipe", "r.yaml"), ("--params", "r.yaml")):
        done = call(tmp_path, "plan", *arguments)
        assert done.returncode == 2
        assert "it is a named pipe, not a regular file" in done.stderr
