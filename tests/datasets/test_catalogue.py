"""Facts are consistent: counts, sizes, format of checksums, class orders; reading them is cheap."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from vitpipe.config.data import EMBEDDED_SETS, DataConfig, EmbeddedConfig
from vitpipe.contracts.errors import DatasetError
from vitpipe.datasets.catalogue import (
    FACTS,
    class_names,
    class_order,
    embedded_facts,
    facts,
)
from vitpipe.datasets.set_sizes import train_sizes
from vitpipe.datasets.sources.detect_format import layouts_of
from vitpipe.verbs.datasets import register

SHARD_SETS = [name for name, known in FACTS.items() if known.has_classes]
HEX_DIGITS = {"md5": 32, "sha256": 64}
IMAGE_ROLES = re.compile(r"images|label maps")


def test_every_set_of_the_recipes_has_facts():
    assert {"imagenet", "imagenet22k", "cifar100", "coco", "ade20k", "davis"} <= set(FACTS)
    assert len(FACTS) >= 15
    for name, known in FACTS.items():
        assert known.name == name
        assert known.num_train_images > 0
        assert known.forms
        assert known.layout
        assert known.licence
        assert known.home.startswith("http")
        assert known.citation.year >= 2005
        assert known.class_order


@pytest.mark.parametrize("name", list(FACTS))
def test_checksums_have_the_right_length_and_a_source(name):
    files = [archive.file for archive in facts(name).every_archive]
    assert len(files) == len(set(files))
    for archive in facts(name).every_archive:
        assert archive.role
        if archive.checksum is None:
            assert archive.algorithm is None
            assert archive.source is None
        else:
            assert re.fullmatch(rf"[0-9a-f]{{{HEX_DIGITS[archive.algorithm]}}}", archive.checksum)
            assert archive.source, "every checksum names its publisher"
        assert archive.size_bytes is None or archive.size_bytes > 0


@pytest.mark.parametrize("name", list(FACTS))
def test_the_size_of_a_set_is_that_of_its_image_archives(name):
    known = facts(name)
    images = [a for a in known.archives if IMAGE_ROLES.search(a.role) and "list" not in a.role]
    sizes = [a.size_bytes for a in images if "labels" not in a.role]
    if not known.size_is_estimate and None not in sizes:
        assert sum(sizes) == known.size_bytes


@pytest.mark.parametrize("name", SHARD_SETS)
def test_forms_are_those_that_the_readers_accept(name):
    accepted, listed = " ".join(layouts_of(facts(name))), " ".join(facts(name).forms)
    named = set(re.findall(r"[\w-]+\.(?:tar\.gz|tar|tgz|zip|mat|txt|csv)", accepted))
    if "ImageNet-1K" in listed:  # the subsets refer to the formats of the whole set
        listed += " ".join(facts("imagenet").forms)
    assert all(file in listed for file in named)
    assert ("parquet" in accepted) == ("parquet" in listed)


def test_counts_of_the_papers():
    """Split sizes of table 1a of the dense relative localisation paper, and the releases of ImageNet."""
    sizes = {name: (FACTS[name].num_train_images, FACTS[name].num_val_images) for name in FACTS}
    assert sizes["cifar10"] == sizes["cifar100"] == (50_000, 10_000)
    assert sizes["svhn"] == (73_257, 26_032)
    assert sizes["flowers102"] == (2_040, 6_149)
    assert sizes["imagenet100"] == (126_689, 5_000)
    # Images of each domain after its authors removed duplicates ("cleaned version").
    cleaned = {
        "clipart": 48_129, "infograph": 51_605, "painting": 72_266, "quickdraw": 172_500, "real": 172_947,
        "sketch": 69_128,
    }  # fmt: skip
    assert {name: sum(sizes[f"domainnet_{name}"]) for name in cleaned} == cleaned
    assert sizes["domainnet_quickdraw"] == (120_750, 51_750)
    assert sizes["domainnet_real"] == (120_906, 52_041)
    releases = {
        r.name: (r.num_train_images, r.num_val_images, r.num_classes) for r in FACTS["imagenet22k"].releases
    }
    assert releases == {
        "fall11": (14_197_122, 0, 21_841),
        "winter21": (13_153_500, 0, 19_167),
        "fall11_p": (11_797_632, 561_052, 11_221),
        "winter21_p": (11_060_223, 522_500, 10_450),
    }  # fmt: skip
    assert FACTS["davis"].num_train_images + FACTS["davis"].num_val_images == 6_208


@pytest.mark.parametrize("name", list(FACTS))
def test_class_orders_are_complete(name):
    order, names = class_order(name), class_names(name)
    assert len(set(order)) == len(order)
    assert len(names) == len(order)
    if FACTS[name].class_file is not None:
        assert len(order) == FACTS[name].num_classes
    if name.startswith("imagenet"):
        assert list(order) == sorted(order)
        assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in order)


def test_class_orders_of_small_sets_and_of_parts_of_imagenet():
    assert class_order("cifar10")[3] == "cat"
    assert class_order("cifar100")[0] == "apple"
    assert list(class_order("cifar100")) == sorted(class_order("cifar100"))
    assert class_order("svhn") == tuple("0123456789")
    assert class_order("flowers102")[:2] == ("1", "2")
    assert class_names("flowers102")[20] == "fire lily"
    assert class_names("imagenet")[:2] == ("tench", "goldfish")
    for part in ("imagenet10", "imagenet100"):
        assert set(class_order(part)) < set(class_order("imagenet"))
    left_over = set(class_order("imagenet")) - set(class_order("imagenet22k"))
    assert left_over == {"n04399382"}, "the list of 22K lacks the teddy bear"
    assert class_order("domainnet_sketch") == ()


def test_releases_have_orders_of_their_own():
    processed = class_order("imagenet22k", "winter21_p")
    assert len(processed) == 10_450
    assert list(processed) == sorted(processed)
    assert class_order("imagenet22k", "winter21") == ()
    with pytest.raises(DatasetError, match=r"no release 'spring'.*fall11, winter21"):
        class_order("imagenet22k", "spring")


def test_archives_of_all_releases_and_parts():
    by_file = {archive.file: archive for archive in facts("imagenet22k").every_archive}
    assert by_file["winter21_whole.tar.gz"].size_bytes == 1_185_381_173_159
    assert "data_batch_3" in {archive.file for archive in facts("cifar10").every_archive}


def test_embedded_facts_exist_for_embedded_sets_only():
    data = DataConfig(source="embedded", sets=EMBEDDED_SETS)
    assert set(train_sizes(data, EMBEDDED_SETS)) == set(EMBEDDED_SETS)
    assert set(train_sizes(DataConfig(root="x"), FACTS)) == set(FACTS)
    assert facts("imagenet", data).num_classes == 10
    with pytest.raises(DatasetError, match=r"no embedded 'svhn'.*imagenet22k"):
        embedded_facts("svhn", EmbeddedConfig())
    with pytest.raises(DatasetError, match=r"no dataset 'mnist'.*cifar100"):
        facts("mnist")


def test_importing_the_catalogue_reads_and_loads_nothing_heavy():
    code = (
        "import sys, vitpipe.datasets.catalogue as c, vitpipe.prepare.packing_cost;"
        "assert c._read_facts.cache_info().currsize == 0;"
        "print([m for m in ('torch', 'timm', 'numpy', 'scipy', 'PIL', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.fixture
def run_verb():
    app = typer.Typer()
    register(app)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_the_verb_lists_all_sets(run_verb):
    shown = run_verb()
    assert shown.exit_code == 0
    for known in FACTS.values():
        assert known.name in shown.output
    assert "1,281,167" in shown.output
    rows = json.loads(run_verb("--json").output)
    assert [row["name"] for row in rows] == list(FACTS)


def test_the_verb_shows_everything_of_one_set(run_verb):
    text = run_verb("imagenet22k").output
    for part in (
        "winter21",
        "ab313ce03179fd803a401b02c651c0a2",
        "not found",
        "n00004475 organism",
        "CVPR, 2009",
    ):
        assert part in text
    assert "60 and 30 sequences" in run_verb("davis").output
    whole = json.loads(run_verb("flowers102", "--json").output)
    assert whole["classes"][0] == "1"
    assert whole["class_names"][0] == "pink primrose"
    assert whole["archives"][0]["checksum"] == "52808999861908f626f3c1f4e79d11fa"


def test_the_verb_refuses_an_unknown_set(run_verb):
    assert isinstance(run_verb("mnist").exception, DatasetError)
