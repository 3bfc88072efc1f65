"""The images as a cluster runs them: read-only, no capabilities, not root, 4 GiB, no home, no network."""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_trials import PROFILE, RECIPE, TINY
from pod_double import written_three_minutes_ago
from safetensors.torch import load_file

from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import open_artifact
from vitpipe.contracts.graph import all_stages
from vitpipe.stages.folder_lock import lock_of
from vitpipe.stages.identity import identity_of

ROOT = Path(__file__).parents[2]
UNNAMED = 54321  # a uid without an entry in /etc/passwd
SETTINGS = [
    *TINY,
    "stages=[prepare, pretrain, detect, report]",
    "data.sets=[imagenet, coco]",
    "pretrain.epochs=12",
    "pretrain.checkpoint_minutes=0.001",
]

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(900)]


def image_of(kind: str) -> str:
    return f"vitpipe-{kind}:0.1.0"


def ask(engine: Any, kind: str, *command: str) -> str:
    """What a command prints in a container of the image."""
    return engine.containers.run(
        image_of(kind), list(command), remove=True, network_mode="none", read_only=True
    ).decode()


class Work:
    """One folder that containers see as their working folder, as a volume of a cluster."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self.engine, self.folder, self.label = engine, folder, uuid.uuid4().hex
        folder.mkdir()
        folder.chmod(0o777)

    def start(self, stage: str, *, states: str = "states") -> Any:
        """The stage in a container that may write nothing but this folder."""
        command = ["vitpipe", "run", stage, "--recipe", RECIPE, "--profile", PROFILE]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        return self.engine.containers.run(
            image_of(all_stages()[stage].image), command, detach=True, user=f"{UNNAMED}:{UNNAMED}", read_only=True,
            cap_drop=["ALL"], security_opt=["no-new-privileges"], mem_limit="4g", memswap_limit="4g",
            network_mode="none", working_dir="/mnt/run", labels={"vitpipe.test": self.label},
            environment={"OMP_NUM_THREADS": "1", "VITPIPE_STATES": f"/mnt/run/{states}"},
            volumes={str(self.folder): {"bind": "/mnt/run", "mode": "rw"}},
        )  # fmt: skip

    def run(self, stage: str, **options: Any) -> str:
        """The same, to its end."""
        container = self.start(stage, **options)
        code, log = container.wait(timeout=600)["StatusCode"], container.logs().decode()
        container.remove()
        assert code == 0, log
        assert "Traceback" not in log
        return log

    def output(self, stage: str) -> Path:
        return self.folder / "artifacts" / RECIPE / PROFILE / stage

    def close(self) -> None:
        for container in self.engine.containers.list(
            all=True, filters={"label": f"vitpipe.test={self.label}"}
        ):
            container.remove(force=True)


@pytest.fixture(scope="module")
def work(engine, tmp_path_factory):
    found = Work(engine, tmp_path_factory.mktemp("hardened") / "work")
    found.run("prepare")
    yield found
    found.close()


def test_a_killed_pre_training_goes_on_in_another_container(work):
    """In the image and as a user without a name; afterwards the weights are those of an unbroken run."""
    work.run("pretrain", states="other")
    expected = load_file(open_artifact(work.output("pretrain"), "pretrain").weights)
    work.output("pretrain").rename(work.folder / "unbroken")

    container = work.start("pretrain")
    deadline = time.monotonic() + 300
    while not list((work.folder / "states").glob("*/state-*.pt")):
        container.reload()
        assert container.status == "running", container.logs().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    container.kill(signal="SIGKILL")
    assert container.wait()["StatusCode"] == 137
    assert not work.output("pretrain").exists()
    # Another host name: whether the process that had the lock is alive shows by time alone.
    (states,) = (work.folder / "states").glob("*.pretrain-*/")
    for locked in (states, work.output("pretrain")):
        written_three_minutes_ago(lock_of(locked))
    assert "Resuming after step" in work.run("pretrain")
    found = load_file(open_artifact(work.output("pretrain"), "pretrain").weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_detection_and_report(work):
    if not work.output("pretrain").exists():
        work.run("pretrain")
    work.run("detect")
    assert "box_AP" in json.loads((work.output("detect") / "metrics.json").read_text(encoding="utf-8"))
    work.run("report")
    page = (work.output("report") / "report.html").read_text(encoding="utf-8")
    assert "box AP" in page
    record = json.loads((work.output("detect") / "run.json").read_text(encoding="utf-8"))
    assert record["hardware"]["memory_gib"] == 4.0
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["git_commit"])


def test_the_card_has_the_code_of_the_checkout(work):
    """A package compiled here runs in this image: it compares the digests of the code."""
    recipe = load_recipe(RECIPE, PROFILE, SETTINGS)
    card = open_artifact(work.output("prepare"), "prepare").card
    assert card.code_digest == identity_of(recipe, all_stages()["prepare"])["code_digest"]


@pytest.mark.parametrize("kind", ["train", "dense"])
def test_the_image_says_what_it_is(engine, kind):
    image = engine.images.get(image_of(kind))
    config = image.attrs["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] is None
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"


@pytest.mark.parametrize("kind", ["train", "dense"])
def test_the_image_has_what_its_layers_list_and_no_tools(engine, kind):
    script = (
        "import importlib.metadata as m, json, re, shutil, torch; print(json.dumps({"
        "'packages': sorted(re.sub('[-_.]+', '-', d.metadata['Name']).lower() for d in m.distributions()),"
        "'tools': [t for t in ('gcc', 'cc', 'g++', 'nvcc', 'uv', 'pip', 'kfp') if shutil.which(t)],"
        "'cuda': torch._C._cuda_getArchFlags()}))"
    )
    found = json.loads(ask(engine, kind, "python", "-c", script))
    layers = json.loads((ROOT / "docker/layers.json").read_text(encoding="utf-8"))
    expected = {*layers["torch"], *layers["train"], *(layers["dense"] if kind == "dense" else ()), "vitpipe"}
    assert set(found["packages"]) <= expected
    # What the lock has for other Pythons or platforms only is not installed.
    assert len(expected - set(found["packages"])) < 12, expected - set(found["packages"])
    assert found["tools"] == []
    assert "sm_80" in found["cuda"]  # A100
    assert ask(engine, kind, "git", "--version").startswith("git version")
