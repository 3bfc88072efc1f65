"""The file of our own recorded results: read strictly, written whole, absent without harm."""

from __future__ import annotations

import copy
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vitpipe.config.read import recipe_names
from vitpipe.contracts.errors import InputError
from vitpipe.papers import published, recorded_results
from vitpipe.papers.recorded_results import (
    DATA_FILES,
    RECIPES,
    REFERENCE_FILE,
    Reference,
    ReferenceRow,
    find_reference,
    read_references,
    write_references,
)

ROW = {
    "stage": "evaluate",
    "metric": "top1",
    "unit": "percent",
    "scale": 100.0,
    "decimals": 2,
    "mean": 91.5,
    "minimum": 90.0,
    "maximum": 93.0,
    "spread": 1.5,
}
ENTRY = {
    "recipe": "toy/one",
    "profile": "demo",
    "seeds": [0, 1, 2],
    "processors": ["Toy 1"],
    "commits": ["01" * 20 + "+changes"],
    "measured_on": "2026-03-01",
    "data_digest": "da" * 32,
    "rows": [ROW],
    "values": {"seed": 0, "model": {"name": "hivit_nano"}},
}


def reference(**changes) -> Reference:
    rows = tuple(ReferenceRow(**row) for row in changes.pop("rows", [ROW]))
    lists = {key: tuple(ENTRY[key]) for key in ("seeds", "processors", "commits")}
    return Reference(**{**ENTRY, **lists, "rows": rows, **changes})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "demo.yaml"


def write(path, entry, version=1):
    path.write_text(yaml.safe_dump({"schema_version": version, "references": [entry]}))


def test_what_is_written_is_read_back(file):
    write_references(file, [reference()])
    assert read_references(file) == (reference(),)
    assert file.read_text().startswith("# Written by `vitpipe references`")


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=6),
    st.lists(st.text("ab /-é:#'\"", min_size=1), min_size=1, max_size=3),
)
def test_any_numbers_and_names_come_back(tmp_path_factory, values, processors):
    mean = sum(values) / len(values)
    row = {
        **ROW,
        "mean": mean,
        "minimum": min(values),
        "maximum": max(values),
        "spread": math.dist(values, [mean] * len(values)),
    }
    written = reference(rows=[row], processors=tuple(processors))
    path = tmp_path_factory.mktemp("references") / "demo.yaml"
    write_references(path, [written])
    assert read_references(path) == (written,)


def test_results_of_other_recipes_are_kept_and_earlier_ones_replaced(file):
    write_references(file, [reference(), reference(recipe="toy/two")])
    write_references(file, [reference(seeds=(0, 1))])
    found = {item.recipe: item.seeds for item in read_references(file)}
    assert found == {"toy/one": (0, 1), "toy/two": (0, 1, 2)}


def test_the_same_results_give_the_same_bytes(file):
    write_references(file, [reference(recipe="b"), reference(recipe="a")])
    before = file.read_bytes()
    write_references(file, [reference(recipe="a"), reference(recipe="b")])
    assert file.read_bytes() == before


@pytest.mark.parametrize("text", [None, "", "# nothing yet\n"])
def test_without_a_file_or_with_an_empty_one_there_are_no_results(file, text):
    if text is not None:
        file.write_text(text)
    assert read_references(file) == ()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"seed": [0]}, "'references.0.seed': Extra inputs"),
        ({"seeds": [0]}, "'references.0.seeds'"),
        ({"seeds": [0, 0]}, "the seed 0 stands twice"),
        ({"rows": [ROW, ROW]}, "stands twice"),
        ({"rows": []}, "'references.0.rows'"),
        ({"rows": [{**ROW, "mean": "91.5"}]}, "'references.0.rows.0.mean': Input should be a valid number"),
        (
            {"rows": [{**ROW, "mean": math.nan}]},
            "'references.0.rows.0.mean': Input should be a finite number",
        ),
        ({"rows": [{**ROW, "mean": 99.0}]}, "the mean lies outside"),
        ({"rows": [{**ROW, "spread": -1.0}]}, "'references.0.rows.0.spread'"),
        (
            {"rows": [{k: v for k, v in ROW.items() if k != "unit"}]},
            "'references.0.rows.0.unit': Field required",
        ),
        ({"data_digest": "da"}, "'references.0.data_digest'"),
        ({"measured_on": "yesterday"}, "'references.0.measured_on'"),
    ],
)
def test_other_keys_or_values_are_refused_with_place_and_fix(file, change, part):
    write(file, {**copy.deepcopy(ENTRY), **change})
    with pytest.raises(InputError) as caught:
        read_references(file)
    text = str(caught.value)
    assert part in text
    assert f"Where: {file}" in text
    assert "Fix: choose another file with --out, or restore this one if it was written by" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"references: [", "are not valid YAML"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"just text", "something else than references"),
        (b"{1: 2}", "something else than references"),
        (yaml.safe_dump({"schema_version": 2, "references": []}).encode(), "'schema_version'"),
        (yaml.safe_dump({"schema_version": 1, "references": [ENTRY, ENTRY]}).encode(), "stand twice"),
    ],
)
def test_a_file_of_something_else_is_refused_and_never_replaced(file, content, part):
    file.write_bytes(content)
    with pytest.raises(InputError, match=part):
        read_references(file)
    with pytest.raises(InputError, match=part):
        write_references(file, [reference()])
    assert file.read_bytes() == content


def test_the_package_s_own_file_is_restored_by_git(file, monkeypatch):
    monkeypatch.setattr(recorded_results, "REFERENCE_FILE", file)
    file.write_text("references: [")
    with pytest.raises(InputError, match=r"Where: .*, line 2\. Fix: restore the file with git"):
        read_references(file)


def test_results_are_found_in_the_package_and_in_plugins(tmp_path, monkeypatch):
    monkeypatch.setenv("VITPIPE_PLUGINS", str(tmp_path))
    (tmp_path / "papers").mkdir()
    write_references(tmp_path / "papers/mine.demo.yaml", [reference()])
    assert find_reference("toy/one", "demo") == reference()
    assert find_reference("toy/one", "full") is None
    assert find_reference("toy/other", "demo") is None
    # They are no published tables.
    assert "mine.demo" not in published.papers()
    write_references(tmp_path / "papers/more.demo.yaml", [reference()])
    with pytest.raises(InputError, match=r"several files.*mine\.demo\.yaml.*more\.demo\.yaml"):
        find_reference("toy/one", "demo")


def test_the_package_s_own_file_is_whole_and_of_the_demos_of_the_readme():
    assert set(RECIPES) <= set(recipe_names())
    assert {item.recipe for item in read_references(REFERENCE_FILE)} <= set(recipe_names())
    assert any(REFERENCE_FILE.match(pattern) for pattern in DATA_FILES)
    assert "demo" not in published.papers()
    assert recorded_results.PROFILE == "demo"
