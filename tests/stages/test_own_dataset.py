"""A dataset that joins by files alone: a plugin's facts or a folder that the recipe names, packed and trained on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitpipe.config.read import load_recipe
from vitpipe.config.resolve import UNKNOWN
from vitpipe.contracts.artifact import read_card
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.catalogue import facts
from vitpipe.datasets.set_sizes import sized_facts
from vitpipe.prepare.packing_cost import packing_cost
from vitpipe.stages.resolved import resolved_rows, training_steps
from vitpipe.stages.weights_identity import dataset_read

BIRDS = ("finch", "owl", "wren")
NANO = (
    "data={source: folders, sets: auto, workers: 0}",
    "stages=[prepare, finetune, evaluate, report]",
    "model.image_size=32",
    "finetune.dataset=birds",
    "finetune.epochs=1",
    "finetune.global_batch=8",
    "evaluate.throughput_rounds=1",
)
OWN = "data.own_sets={birds: classes}"


@pytest.fixture
def birds(tmp_path) -> Path:
    """Class folders below a data root: 8 training and 3 validation images of each of three classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(BIRDS):
            folder = tmp_path / "data/birds" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 80, (40, 40, 3), np.uint8)
                pixels[..., label] += 150
                Image.fromarray(pixels).save(folder / f"{name}{number}.png")
    return tmp_path / "data"


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "vitpipe", *arguments],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


def options(birds: Path, *more: str) -> list[str]:
    return [part for text in (*NANO, f"data.root={birds}", *more) for part in ("--set", text)]


def chain(folder: Path, birds: Path, *more: str, **variables: str) -> None:
    """prepare, finetune and evaluate of itpn/pixel_base, as `vitpipe run` starts them."""
    common = ["--recipe", "itpn/pixel_base", "--profile", "demo", *options(birds, *more)]
    run(folder, "run", "prepare", "--out", "prepared", *common, **variables)
    data = ["--in", "data=prepared"]
    run(folder, "run", "finetune", *data, "--out", "finetuned", "--ranks", "1", *common, **variables)
    weights = ["--in", "weights=finetuned"]
    run(folder, "run", "evaluate", *data, *weights, "--out", "measured", *common, **variables)


def test_a_plugin_adds_a_set_by_its_facts(tmp_path, birds):
    place = tmp_path / "mine/datasets/facts"
    place.mkdir(parents=True)
    (place / "birds.yaml").write_text("title: Garden birds\nlicence: ours\nnum_train: 24\nnum_val: 9\n")
    plugin = {"VITPIPE_PLUGINS": str(tmp_path / "mine")}
    chain(tmp_path, birds, **plugin)
    assert read_card(tmp_path / "prepared").dataset == ""
    # Evaluation has no `dataset` key: it reads what the weights' card names.
    assert [read_card(tmp_path / name).dataset for name in ("finetuned", "measured")] == ["birds", "birds"]
    manifest = json.loads((tmp_path / "prepared/birds/manifest.json").read_text())
    assert manifest["classes"] == list(BIRDS)
    metrics = json.loads((tmp_path / "measured/metrics.json").read_text())
    assert metrics["top1"] == json.loads((tmp_path / "finetuned/metrics.json").read_text())["top1"]
    shown = run(tmp_path, "datasets", "birds", **plugin).stdout
    assert "Garden birds" in shown
    arguments = ["--recipe", "itpn/pixel_base", "--profile", "demo", "--json", *options(birds)]
    stages = json.loads(run(tmp_path, "plan", *arguments, **plugin).stdout)["stages"]
    assert [row["steps"] for row in stages if row["stage"] == "finetune"] == [3]


def test_a_reader_of_a_plugin_reads_its_own_format(tmp_path):
    """A set that comes as one NumPy archive, with a reader beside its facts."""
    place = tmp_path / "mine/datasets"
    (place / "facts").mkdir(parents=True)
    (place / "sources").mkdir()
    (place / "facts/birds.yaml").write_text(
        "title: Birds\nreader: [numpy_archive]\nnum_train: 8\nnum_val: 8\n"
    )
    (place / "sources/numpy_archive.py").write_text(READER)
    (tmp_path / "data/birds").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (8, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "data/birds/birds.npz", pixels=pixels)
    common = ["--recipe", "itpn/pixel_base", "--profile", "demo", *options(tmp_path / "data")]
    run(tmp_path, "run", "prepare", "--out", "prepared", *common, VITPIPE_PLUGINS=str(tmp_path / "mine"))
    manifest = json.loads((tmp_path / "prepared/birds/manifest.json").read_text())
    assert manifest["form"] == "a NumPy archive"
    assert manifest["splits"]["train"]["images_per_class"] == [4, 4]


@pytest.mark.parametrize(("kind", "folder"), [("reader: [mine]", "sources"), ("kind: mine", "layouts")])
def test_a_mistake_in_a_plugins_reader_or_layout_names_its_line(tmp_path, kind, folder):
    place = tmp_path / "mine/datasets"
    for name in ("facts", folder):
        (place / name).mkdir(parents=True)
    (place / "facts/birds.yaml").write_text(f"title: Birds\n{kind}\n")
    (place / folder / "mine.py").write_text("x = 1\ndef broken(\n")
    (tmp_path / "data/birds").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-m", "vitpipe", "run", "prepare", "--out", "prepared", "--recipe", "itpn/pixel_base",
         "--profile", "demo", *options(tmp_path / "data")],
        cwd=tmp_path, env={**os.environ, "VITPIPE_PLUGINS": str(tmp_path / "mine")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "mine.py, line 2" in done.stderr


READER = '''
"""Images in one NumPy archive."""
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vitpipe.datasets.sources.byte_ranges import Pixels
from vitpipe.datasets.sources.source import Form, ImageEntry, Source


@dataclass(eq=False)
class NumpyArchive(Source):
    dataset: str
    root: Path
    form: str = "a NumPy archive"
    classes: tuple = ("even", "odd")
    class_names: tuple = ()
    splits: tuple = ("train", "val")
    notes: tuple = ()

    def entries(self, split):
        for number, image in enumerate(np.load(self.root / "birds.npz")["pixels"]):
            yield ImageEntry(f"{number}.png", number % 2, Pixels(image.tobytes(), 16, 16), f"{number}")


FORMAT = Form(
    lambda _: ("birds.npz",),
    lambda root, _: (root / "birds.npz").is_file(),
    lambda root, dataset: NumpyArchive(dataset, root),
)
'''


def test_a_folder_that_the_recipe_names(tmp_path, birds):
    chain(tmp_path, birds, OWN)
    assert read_card(tmp_path / "measured").dataset == "birds"
    rows = (tmp_path / "prepared/tables/splits.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [["birds", "train", "24"], ["birds", "val", "9"]]


def recipe(birds: Path, *more: str):
    return load_recipe("itpn/pixel_base", "demo", [*NANO, f"data.root={birds}", OWN, *more])


def test_the_images_of_an_own_set_are_counted_in_its_folder(birds):
    known = sized_facts("birds", recipe(birds).data)
    assert (known.num_train_images, known.num_val_images, known.num_classes) == (24, 9, 3)
    assert training_steps(recipe(birds), 1) == {"finetune": 3}
    cost = packing_cost(recipe(birds).data)[0]
    assert (cost.dataset, cost.num_train, cost.num_shards) == ("birds", 24, 2)
    assert cost.source_bytes == sum(path.stat().st_size for path in birds.rglob("*.png"))


def test_without_the_folder_the_number_is_unknown(tmp_path):
    absent = recipe(tmp_path / "nowhere")
    assert training_steps(absent, 1) == {"finetune": UNKNOWN}
    assert [row.value for row in resolved_rows(absent, 1) if row.path.startswith("finetune")] == [UNKNOWN]
    assert packing_cost(absent.data)[0].note == UNKNOWN


def test_an_own_set_in_a_dense_layout(raw, tmp_path):
    (tmp_path / "tables").symlink_to(raw / "coco")
    data = recipe(tmp_path, "data.own_sets={birds: classes, tables: coco}").data
    assert facts("tables", data).kind == "coco"
    known = sized_facts("tables", data)
    assert (known.num_train_images, known.num_val_images, known.num_classes) == (6, 4, 10)
    with pytest.raises(DatasetError, match="no dataset 'tables'"):
        facts("tables")


def test_catalogue_sizes_reach_the_plan():
    """CIFAR-100 has 50,000 training images: 48 batches of 1024 in each of 100 epochs."""
    overrides = ["finetune.dataset=cifar100", "stages=[prepare, finetune, evaluate]"]
    assert training_steps(load_recipe("itpn/pixel_base", "full", overrides), 1) == {"finetune": 100 * 48}


@pytest.mark.parametrize(
    ("stage", "trained_in", "on", "expected"),
    [
        ("finetune", "pretrain", "cifar10", "flowers102"),
        ("probe", "pretrain", "cifar10", "cifar10"),
        ("evaluate", "finetune", "svhn", "svhn"),
        # Cards of earlier versions do not name the set: what the recipe says of that stage.
        ("evaluate", "finetune", "", "flowers102"),
        ("probe", "pretrain", "", "imagenet"),
    ],
)
def test_the_weights_card_decides_where_a_section_names_no_set(stage, trained_in, on, expected):
    chosen = load_recipe("itpn/pixel_base", "full", ["finetune.dataset=flowers102"])
    card = SimpleNamespace(stage=trained_in, dataset=on)
    inputs = {"data": None, "weights": SimpleNamespace(card=card)}
    assert dataset_read(stage, chosen, inputs) == expected
    assert dataset_read("report", chosen, {}) is None
