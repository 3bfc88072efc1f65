"""`vitpipe doctor` as a command: datasets by name, this machine, what the recipe needs of it."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import typer
from typer.testing import CliRunner

from vitpipe.contracts.errors import InputError
from vitpipe.verbs import machine
from vitpipe.verbs.doctor import register


@pytest.fixture
def run():
    app = typer.Typer()
    register(app)
    app.command()(lambda: None)  # a single command would swallow its name
    return lambda *arguments: CliRunner().invoke(
        app, ["doctor", *map(str, arguments)], catch_exceptions=False
    )


def test_the_verb(raw_copy, run):
    found = run("--data", raw_copy, "--dataset", "davis", "--dataset", "imagenet")
    assert found.exit_code == 0
    assert "class folders" in found.output
    assert "note: 80 of 80 images were checked." in found.output
    victim = raw_copy / "imagenet" / "val" / "n99900003" / "[red]odd.JPEG"
    victim.touch()
    found = run("--data", raw_copy, "--dataset", "imagenet")
    assert found.exit_code == 2
    assert "error: 1 image cannot be decoded: val/n99900003/[red]odd.JPEG" in found.output
    assert "Fix: replace" in found.output
    found = run("--data", raw_copy, "--dataset", "imagenet", "--json")
    assert found.exit_code == 2
    (report,) = json.loads(found.stdout)
    assert report["dataset"] == "imagenet"
    assert {"level", "what", "where", "fix"} == set(report["findings"][0])


def test_the_verb_on_this_machine(run, monkeypatch):
    found = run("--json")
    content = json.loads(found.stdout)
    assert {row["what"] for row in content["machine"]} >= {"free disk", "shared memory", "cores", "torch"}
    assert {row["what"] for row in content["machine"]} >= {"GPU", "git", "MLflow", "Docker"}
    assert len({row["what"] for row in content["machine"]}) == len(content["machine"])
    assert run("--deep").exit_code == 2
    locked = machine.locked_versions()
    assert locked["torch"].partition("+")[0] == version("torch").partition("+")[0]
    assert locked["numpy"] == version("numpy")  # several lines, one per Python
    monkeypatch.setattr(machine, "locked_versions", lambda: {**locked, "timm": "0.0.1"})
    monkeypatch.setattr(machine, "_MIN_SHARED_BYTES", 10**18)
    found = run()
    assert "warning: timm has version" in found.output
    assert "requirements.lock has 0.0.1" in found.output
    assert "--shm-size=2g" in found.output
    monkeypatch.setattr(machine, "_LIBRARIES", ("torch", "absent-library"))
    monkeypatch.setattr(machine, "locked_versions", lambda: {"absent-library": "1.0"})
    found = run()
    assert found.exit_code == 2
    assert "error: absent-library is not installed, requirements.lock has 1.0" in found.output


def test_the_machine_is_checked_for_the_recipe(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {row["what"]: row["value"] for row in json.loads(run("--json").stdout)["machine"]}
    assert rows["free disk"].endswith(f" in {tmp_path}")  # no params.yaml here, and so no recipe
    (tmp_path / "params.yaml").write_text("recipe: itpn/pixel_base\nprofile: demo\n")
    rows = {row["what"]: row["value"] for row in json.loads(run("--json").stdout)["machine"]}
    assert "the data of itpn/pixel_base (demo) need" in rows["free disk"]
    asked = ["--profile", "full", "--set", "data.root=/data", "--json"]
    rows = {row["what"]: row["value"] for row in json.loads(run(*asked).stdout)["machine"]}
    assert "the data of itpn/pixel_base (full) need 1" in rows["free disk"]
    (tmp_path / "params.yaml").write_text("recipe: itpn/pixel_bas\nprofile: demo\n")
    found = run("--json")
    assert found.exit_code == 2
    assert "did you mean 'itpn/pixel_base'?" in json.loads(found.stdout)["findings"][0]["what"]


def test_the_former_spelling_of_a_dataset(raw_copy, run, tmp_path):
    with pytest.raises(InputError, match="a dataset is named by --dataset") as error:
        run("--data", raw_copy, "--set", "davis")
    assert f"`vitpipe doctor --data {raw_copy} --dataset davis`" in error.value.fix
    assert error.value.exit_code == 2
    assert run("--data", raw_copy, "--set", "seed=1").exit_code == 2  # acts on the machine's check
    assert run("--dataset", "davis").exit_code == 2  # and this one on the data's
