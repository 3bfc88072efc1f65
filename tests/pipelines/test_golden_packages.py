"""What lands on each kind of cluster, word for word, and the rules that every package keeps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from pipelines.compile import compile_pipeline
from pipelines.lint import broken_rules, leaf_tasks
from pipelines.placement import read_placement
from vitpipe.contracts.errors import InputError

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/packages"
CLUSTERS = ("gke", "eks", "plain")
IMAGES = {kind: f"registry.example/vitpipe-{kind}@sha256:{'0' * 64}" for kind in ("train", "dense")}
REAL_DATA = ["data.root=/data/raw", "data.store=/state/shards"]


def compiled(cluster: str, out: Path, **more):
    placement = read_placement(ROOT / f"k8s/placement/{cluster}.yaml")
    return compile_pipeline(
        "itpn/pixel_base", "full", REAL_DATA, out, images=IMAGES, placement=placement, **more
    )


def documents(path: Path) -> list[dict]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def placed(path: Path) -> dict:
    """All that a placement decides in a package, by task."""
    spec, platform = documents(path)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        name: {
            "retry": task["retryPolicy"],
            "container": {
                key: value
                for key, value in spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"].items()
                if key in ("image", "resources", "env")
            },
            "pod": executors[f"exec-{name}"],
        }
        for name, task, _ in leaf_tasks(spec)
    }


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_package_of_a_cluster(cluster, tmp_path):
    """A change here changes real pods: look at it, then write the file anew with the line below."""
    package = compiled(cluster, tmp_path / "p.yaml", data_digest="2026-11-30", release=True)
    assert package.findings == ()
    found = placed(package.path)
    # To renew: (GOLDEN / f"{cluster}.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    assert found == yaml.safe_load((GOLDEN / f"{cluster}.yaml").read_text(encoding="utf-8"))


def test_a_release_refuses_what_would_spoil_the_run(tmp_path):
    out = tmp_path / "p.yaml"
    with pytest.raises(InputError) as caught:
        compile_pipeline("itpn/pixel_base", "full", ["data.root=/data"], out, release=True)
    for word in ("on no volume", "travel as artifacts", "begins again", "MLflow", "data_digest", "by a tag"):
        assert word in caught.value.what
    assert "claims.data" in caught.value.fix
    assert not out.exists()
    # Without --release the same is said, and the package is written.
    package = compile_pipeline("itpn/pixel_base", "full", ["data.root=/data"], out)
    assert len(package.findings) == 6
    # The embedded data of a demo need images that do not move, and nothing else.
    demo = compile_pipeline("itpn/pixel_base", "demo", [], out)
    assert ["by a tag" in found.what for found in demo.findings] == [True]


BROKEN = {
    "do not fit into": lambda s, p: tasks(s)["detect"]["retryPolicy"].update(backoffMaxDuration="900s"),
    "no time limit": lambda s, p: p["exec-detect"].pop("activeDeadlineSeconds"),
    "no memory limit": lambda s, p: container(s)["resources"].pop("resourceMemoryLimit"),
    "is no resource of a node": lambda s, p: container(s)["resources"]["accelerator"].update(
        resourceType="nvidia-tesla-a100"
    ),
    "/dev/shm": lambda s, p: p["exec-detect"].pop("emptyDirMounts"),
    "holds a secret": lambda s, p: container(s)["env"].append({"name": "DB_PASSWORD", "value": "x"}),
    "characters": lambda s, p: tasks(s)["detect"]["inputs"]["parameters"]["recipe"].update(
        runtimeValue={"constant": "x" * 10_001}
    ),
}


def tasks(spec: dict) -> dict[str, dict]:
    return {name: task for name, task, _ in leaf_tasks(spec)}


def container(spec: dict) -> dict:
    return spec["deploymentSpec"]["executors"]["exec-detect"]["container"]


@pytest.fixture(scope="module")
def gke(tmp_path_factory):
    return documents(compiled("gke", tmp_path_factory.mktemp("gke") / "p.yaml").path)


@pytest.mark.parametrize("words", BROKEN)
def test_each_rule_finds_what_breaks_it(gke, words):
    assert list(broken_rules(gke)) == []
    spec, platform = copy.deepcopy(gke)
    BROKEN[words](spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
    (found,) = broken_rules([spec, platform])
    assert found.startswith("task detect: ")
    assert words in found
