"""The command line as a user meets it: a process, an exit code, one paragraph."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VITPIPE = [sys.executable, "-m", "vitpipe"]
HEAVY = ("torch", "timm", "mlflow", "kfp", "mmcv", "mmdet", "mmseg", "sklearn", "skimage")


def _run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VITPIPE, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["plan"],
        ["recipes"],
        ["recipe", "itpn/pixel_base", "--profile", "full"],
        ["models"],
        ["table", "revcolv2/5"],
        ["table", "revcolv2/5", "--run", "--plan"],
        ["references", "--plan"],
        ["doctor"],
    ],
)
def test_light_verbs_import_nothing_heavy(arguments: list[str]):
    code = (
        "import sys; from vitpipe.cli import main\n"
        f"sys.argv = ['vitpipe', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["recipe", "itpn/pixel_bas"], "did you mean 'itpn/pixel_base'?"),
        (["recipe", "itpn/pixel_base", "--profile", "ful"], "did you mean 'full'?"),
        (["recipe", "itpn/pixel_base", "--set", "pretrain.epoch=3"], "did you mean 'epochs'?"),
        (["recipe", "itpn/pixel_base", "--set", "pretrain.method.mask_ratio=2"], "less than 1"),
        (["run", "pretain", "--out", "x"], "There is no stage 'pretain'"),
        (["run", "pretrain", "--out", "x"], "needs the input 'data'"),
        (["run", "pretrain", "--in", "data=nowhere", "--out", "x"], "does not exist"),
        (["run", "pretrain", "--in", "data", "--out", "x"], "not of the form NAME=DIR"),
        (["run", "prepare", "--in", "data=x", "--out", "y"], "has no input 'data'"),
        (["run", "pretrain", "--in", "data=x"], "--out DIR"),
        (["run", "pretrain"], "artifacts/itpn/pixel_base/demo/prepare"),
        (["run", "pretain"], "There is no stage 'pretain'"),
        (["run", "prepare", "--recipe", "../own.yaml"], "does not exist"),
        (["run", "prepare", "--recipe", "a; touch x; echo "], "There is no recipe 'a; touch x; echo '"),
        (["plan", "https://me:secret@host/x"], "https://me:***@host/x"),
        (["https://me:secret@host/x"], "https://me:***@host/x"),
        (["run", "prepare", "--in", "https://me:secret@host/x"], "https://me:***@host/x"),
        (["plan", "--params", "nowhere.yaml"], "There is no 'nowhere.yaml' here"),
        (
            ["run", "intermediate", "--recipe", "itpn/pixel_base", "--profile", "full", "--out", "x"],
            "has no stage 'intermediate'",
        ),
        (["convert", "nowhere.pth", "--out", "x.safetensors"], "nowhere.pth"),
        (["table", "itpn/99"], "99"),
        (["references", "--recipe", "itpn/pixel_bas"], "did you mean 'itpn/pixel_base'?"),
        (["cost", "hivit_bas"], "hivit_base"),
        (["recipes", "itpn/pixel_bas"], "did you mean 'itpn/pixel_base'?"),
        (["table", "itp/11"], "did you mean 'itpn'?"),
        (["table", "revcolv2/1", "--run"], "No recipe claims a row of revcolv2/1"),
        (["table", "revcolv2/5", "--run", "--profile", "dem"], "did you mean 'demo'?"),
        (["table", "revcolv2/5", "--run", "--seeds", "0"], "greater than or equal to 1"),
        (["table", "revcolv2/5", "--run", "--set", "finetune.epoch=1"], "did you mean 'epochs'?"),
        (["table", "revcolv2/5", "--seeds", "3", "--plan"], "add --run"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph_and_exit_code_2(arguments: list[str], part: str, tmp_path: Path):
    params = ["--params", str(ROOT / "params.yaml")] if arguments[0] == "run" else []
    done = _run(*arguments, *params, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert part in done.stderr.replace("\n", " ").replace("│", " ")
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    assert not [p.name for p in tmp_path.iterdir() if not p.name.startswith("mlflow")]


def test_plan_says_what_would_run_and_why(tmp_path: Path):
    done = _run("plan", "--json", "--artifacts", str(tmp_path))
    planned = json.loads(done.stdout)
    assert planned["data"][0]["dataset"] == "imagenet"
    assert planned["data"][0]["num_shards"] == 2
    rows = planned["stages"]
    assert rows[0]["stage"] == "prepare"
    assert {row["runs"] for row in rows} == {"runs"}
    assert next(row for row in rows if row["stage"] == "pretrain")["steps"] > 0


def test_the_version_and_a_verdict_before_any_run(tmp_path: Path):
    assert _run("--version").stdout.startswith("vitpipe 0.")
    (tmp_path / "params.yaml").write_text("recipe: itpn/pixel_base\nprofile: demo\n")
    (tmp_path / "artifacts/itpn/pixel_base/demo/finetune").mkdir(parents=True)  # as `compile --dvc` makes it
    done = _run("verdict", cwd=tmp_path)
    assert done.returncode == 2
    assert "itpn/pixel_base has not run yet at profile demo" in done.stderr
    assert "make demo" in done.stderr
    assert "dvc repro" in done.stderr


def test_without_folders_the_verbs_use_those_of_dvc_yaml(tmp_path: Path):
    own = tmp_path / "my recipes" / "own.yaml"
    own.parent.mkdir()
    own.write_text((ROOT / "vitpipe/recipes/itpn/pixel_base.yaml").read_text())
    params = "recipe: my recipes/own.yaml\nprofile: demo\noverrides: ['stages=[prepare, report]']\n"
    (tmp_path / "params.yaml").write_text(params)
    assert _run("identity", cwd=tmp_path).returncode == 0
    folder = tmp_path / "artifacts" / "my recipes" / "own.yaml" / "demo"
    assert (folder / "identity" / "prepare.json").is_file()
    assert "artifacts/my recipes/own.yaml/demo" in _run("verdict", cwd=tmp_path).stderr
    (folder / "prepare").mkdir()
    (folder / "prepare" / "card.json").write_text("{}")
    planned = json.loads(_run("plan", "--json", cwd=tmp_path).stdout)["stages"]
    assert [row["why"] for row in planned if row["stage"] == "prepare"] != ["it has not run yet"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["identity", "--out", "/proc/self/x"], "refused a path"),
        (["compile", "--recipe", "itpn/pixel_base", "--out", "file/x.yaml"], "file"),
        (["sync", "nowhere"], "The folder does not exist"),
        (["report", "file", "--out", "loop"], "leads to itself"),
        (["run", "pretrain", "--in", "data=a", "--in", "data=b", "--out", "c"], "given twice"),
    ],
)
def test_a_path_that_cannot_be_used_is_no_traceback(arguments: list[str], part: str, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "params.yaml").write_text("recipe: itpn/pixel_base\nprofile: demo\n")
    done = _run(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_a_defect_keeps_its_traceback_without_credentials():
    code = (
        "import sys, vitpipe.config.read as read; from vitpipe.cli import main\n"
        "def broken(*_): raise RuntimeError('no route to https://me:hunter2@host/x')\n"
        "read.load_recipe = broken; sys.argv = ['vitpipe', 'recipe', 'itpn/pixel_base']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "https://me:***@host/x" in done.stderr
    assert "hunter2" not in done.stderr


def test_identities_are_stable_files(tmp_path: Path):
    for _ in range(2):
        assert _run("identity", "--out", str(tmp_path / "identity")).returncode == 0
    names = sorted(path.stem for path in (tmp_path / "identity").iterdir())
    assert "pretrain" in names
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "identity").iterdir()}
    assert (
        _run("identity", "--out", str(tmp_path / "identity"), "--set", "finetune.epochs=99").returncode == 0
    )
    changed = [path.stem for path in before if path.read_text() and path.stat().st_mtime_ns != before[path]]
    assert "finetune" in changed


def test_resolved_recipe_as_json_gives_every_reason():
    done = _run("recipe", "itpn/pixel_base", "--profile", "full", "--ranks", "64", "--json")
    shown = json.loads(done.stdout)
    derived = {row["path"]: row for row in shown["derived"]}
    assert derived["pretrain.peak_lr"]["value"] == pytest.approx(2.4e-3)
    assert all(row["why"] for row in derived.values())
    assert shown["recipe"]["model"]["name"] == "hivit_base"


def test_raw_data_without_a_folder_stop_nothing_late(tmp_path):
    """`plan` counts and marks the row; whatever starts or writes something refuses. Compiling looks at no path."""
    full = ["--recipe", "itpn/pixel_base", "--profile", "full"]
    unset = json.loads(_run("plan", *full, "--json", cwd=tmp_path).stdout)["stages"]
    assert (unset[0]["stage"], unset[0]["runs"], unset[0]["why"]) == (
        "prepare", "cannot run", "data.root is not set",
    )  # fmt: skip
    assert next(row["steps"] for row in unset if row["stage"] == "pretrain") == 499_200
    for verb in (["compile", "--dvc"], ["compile", "--out", "p.yaml"], ["identity", "--out", "ids"]):
        done = _run(*verb, *full, cwd=tmp_path)
        assert done.returncode == 2
        assert "data.root is not set, and data.source is 'folders'" in done.stderr
        assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    absent = [*full, "--set", "data.root=/nowhere/data"]
    assert json.loads(_run("plan", *absent, "--json", cwd=tmp_path).stdout)["stages"][0]["why"] == (
        "data.root does not exist: /nowhere/data"
    )
    assert _run("compile", "--dvc", *absent, cwd=tmp_path).returncode == 0
    stopped = _run("run", "prepare", *absent, "--out", "prepared", cwd=tmp_path)
    assert stopped.returncode == 2
    assert "/nowhere/data" in stopped.stderr
    demo = ["--recipe", "itpn/pixel_base", "--profile", "demo"]
    weights = _run("plan", *demo, "--set", "finetune.weights=/nowhere/w.safetensors", "--json", cwd=tmp_path)
    rows = {row["stage"]: row for row in json.loads(weights.stdout)["stages"]}
    assert rows["finetune"]["why"] == "finetune.weights does not exist: /nowhere/w.safetensors"
