"""Which edits change the identity of which stage, on a temporary copy of the package."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vitpipe
from vitpipe.config import code_identity
from vitpipe.config.code_identity import CARRIERS, NAMED_IN, closure_of, code_file
from vitpipe.config.read import load_recipe
from vitpipe.contracts import discovery
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import graph_of
from vitpipe.papers import recorded_results
from vitpipe.stages.chosen_code import stage_closure
from vitpipe.stages.run import identity_of

PACKAGE = Path(vitpipe.__file__).parent
ITPN, REVCOL = ("itpn/pixel_base", "demo"), ("revcolv2/base", "demo")
TRAINING = {"pretrain", "intermediate", "finetune", "probe", "detect", "segment", "evaluate"}
ALL = {"prepare", *TRAINING, "report"}


def digests(which: tuple[str, str] = ITPN) -> dict[str, str]:
    """Stage -> code digest."""
    recipe = load_recipe(*which)
    return {node.name: identity_of(recipe, node.stage)["code_digest"] for node in graph_of(recipe.stages)}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package that the walker reads instead; the modules themselves stay ours."""
    place = tmp_path / "vitpipe"
    shutil.copytree(PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(discovery, "PACKAGE", place)
    monkeypatch.setattr(code_identity, "PACKAGE", place)
    return place


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text, f"{file} has no {old!r}"
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def changed(edit_files, which=ITPN) -> set[str]:
    before = digests(which)
    edit_files()
    after = digests(which)
    return {name for name in before if before[name] != after[name]}


def test_formatting_comments_and_docstrings_change_nothing(copy):
    def reformat():
        for path in copy.rglob("*.py"):
            # Unparsed: other line breaks and quotes, no comments; and a new first docstring.
            tree = ast.parse(path.read_text(encoding="utf-8"))
            has_docstring = ast.get_docstring(tree) is not None
            if has_docstring:
                tree.body[0].value.value = "Another docstring."
            path.write_text("# A comment.\n\n" + ast.unparse(tree) + "\n", encoding="utf-8")

    assert changed(reformat) == set()


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("models/paca.py", "", "width = 3\n"),
        ("models/paca/family.py", "", "width = 3\n"),
        ("methods/byol.py", "", "width = 3\n"),
        ("prepare/dataset_doctor.py", '"""', '"""A letter. '),
        ("verbs/doctor.py", "import", "import math\nimport"),
        ("config/recipe.py", "class RecipeBase(Section):", "class Unused(Section):\n    x: int = 1\n\n\nclass RecipeBase(Section):"),
        ("papers/drloc.yaml", "value:", "value: 1  # "),
        ("papers/itpn.yaml", "\n", "\n# A comment.\n"),
        ("models/hivit/conversion.py", "import", "import math\nimport"),
    ],
)  # fmt: skip
def test_what_no_stage_reads_changes_nothing(copy, file, old, new):
    def change():
        if old:
            edit(copy / file, old, new)
        else:
            (copy / file).parent.mkdir(exist_ok=True)
            (copy / file).write_text(new, encoding="utf-8")

    assert changed(change) == set()


def add_constant(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8") + "\nADDED = 1\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("data/resize_kernels.py", TRAINING),
        ("optim/schedules.py", TRAINING),
        ("models/hivit/hivit.py", TRAINING),
        ("models/revcol/revcol.py", set()),
        ("dense/feed.py", {"detect", "segment"}),
        ("dense/rcnn_parts.py", {"detect"}),
        ("dense/heads/upernet/head.py", {"segment"}),
        ("dense/heads/mask2former/head.py", set()),
        ("prepare/pack.py", {"prepare"}),
        ("report/compare.py", {"report"}),
        ("contracts/channel_statistics.py", {"detect", "segment"}),
        ("config/resolve.py", TRAINING | {"prepare"}),
    ],
)
def test_code_decides_the_stages_that_import_it(copy, file, expected):
    assert changed(lambda: add_constant(copy / file)) == expected


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("CONFIG =", "RATE = 3\n\n\nCONFIG =", set()),  # nobody reads it
        ("] = 0.75", "] = 0.5", set()),  # enters by its value
        ("CONFIG =", "@field_validator('name')\ndef check(name):\n    return name\n\n\nCONFIG =", set()),
        ("CONFIG =", "def hidden(patches):\n    return patches // 2\n\n\nCONFIG =", {"pretrain"}),
    ],
)
def test_what_a_settings_file_computes_counts_and_its_values_do_not(copy, old, new, expected):
    config = copy / "methods" / "masked_pixels" / "config.py"
    assert changed(lambda: edit(config, old, new)) == expected


def test_a_constant_that_is_imported_from_a_settings_file_counts(copy):
    method, config = (copy / "methods" / "masked_pixels" / f"{name}.py" for name in ("method", "config"))
    edit(config, "CONFIG =", "RATE = 3\n\n\nCONFIG =")
    edit(method, "METHOD =", "from vitpipe.methods.masked_pixels.config import RATE\n\nMETHOD =")
    assert changed(lambda: edit(config, "RATE = 3", "RATE = 4")) == {"pretrain"}


def test_a_change_in_one_family_leaves_the_others_alone(copy):
    def change():
        add_constant(copy / "models" / "revcolv2" / "columns.py")
        add_constant(copy / "models" / "revcolv2" / "family.py")

    before = digests(ITPN)
    assert changed(change, REVCOL) == TRAINING - {"intermediate"}
    assert digests(ITPN) == before


def test_a_published_number_reaches_the_report_only(copy):
    assert changed(lambda: edit(copy / "papers" / "itpn.yaml", "value: ", "value: 1")) == {"report"}


def test_a_damaged_table_changes_the_identity_and_is_no_traceback(copy):
    path = copy / "papers" / "itpn.yaml"
    assert changed(lambda: path.write_text("tables: [", encoding="utf-8")) == {"report"}


def test_a_class_name_reaches_the_sets_that_have_it(copy):
    def rename():
        path = copy / "datasets" / "names" / "coco.txt"
        path.write_text("x" + path.read_text(encoding="utf-8"), encoding="utf-8")

    # Detection takes them from the prepared data: prepare's output changes with them.
    assert changed(rename) == {"prepare", "report"}


def test_a_template_reaches_the_report_only(copy):
    assert changed(lambda: edit(copy / "report/templates/report.md.j2", "#", "##")) == {"report"}


def test_a_module_that_moves_counts(copy):
    def move():
        (copy / "optim" / "schedules.py").rename(copy / "optim" / "curves.py")
        for path in copy.rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace("vitpipe.optim.schedules", "vitpipe.optim.curves"), encoding="utf-8")

    assert changed(move) >= {"pretrain", "finetune"}


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not():
    recipe = load_recipe(*ITPN)
    node = next(node for node in graph_of(recipe.stages) if node.name == "detect")
    reached = set(stage_closure(recipe, node.stage).modules)
    assert {"vitpipe.stages.dense_training", "vitpipe.dense.method", "vitpipe.train.loop"} <= reached
    assert "vitpipe.models.revcol.revcol" not in reached


def source(folder: Path, name: str, text: str):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return code_file(path, f"vitpipe.{path.stem}")


def test_what_a_file_names(tmp_path):
    found = source(
        tmp_path, "one.py",
        '"""Doc."""\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vitpipe.never\n'
        'else:\n    import vitpipe.ever\nfrom . import near\nDATA_FILES = ("names/*.txt",)\n'
        'def f():\n    import scipy.ndimage\n    return "timm:x.txt", "mmdet.models", "no package"\n',
    )  # fmt: skip
    assert found.imports == ("vitpipe", "vitpipe.ever", "vitpipe.near")
    assert {"scipy", "timm:", "mmdet"} <= found.words
    assert "no package" not in found.words
    assert found.data_files == ("names/*.txt",)
    assert (
        source(tmp_path, "two.py", '"""Only a docstring."""\nfrom __future__ import annotations\n').digest
        == ""
    )


@settings(deadline=None, max_examples=30)
@given(
    st.integers(), st.text(st.characters(codec="utf-8", exclude_characters='"\\\r\n\x00'), max_size=8),
    st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_only_values_count(tmp_path_factory, number, words, lines, has_docstring):
    folder = tmp_path_factory.mktemp("code")
    docstring = f'    """{words} """\n' if has_docstring else ""
    plain = source(folder, "a.py", f"def f(x):\n    return x + {number}\n")
    dressed = source(
        folder, "b.py", f'"""{words} """\n# {words}\n' + "\n" * lines
        + f"def f(\n    x,\n):\n{docstring}    return (x  +  {number})  # {words}\n",
    )  # fmt: skip
    other = source(folder, "c.py", f"def f(x):\n    return x + {number + 1}\n")
    assert plain.digest == dressed.digest != other.digest


def test_every_carrier_exists():
    assert [name for name in CARRIERS if name != "vitpipe.track" and discovery.source_of(name) is None] == []


def package_files() -> list[Path]:
    return [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


# Read from outside of stages, or by value: recipes are, and the marker says that the package is typed.
NOT_OF_STAGES = ("recipes/*", "py.typed")
# `vitpipe references` writes the first, plugins have the others.
MAY_BE_ABSENT = recorded_results.DATA_FILES


def test_every_data_file_is_named_by_a_module():
    named = [
        pattern.replace("{paper}", "*").replace("{dataset}", "*")
        for path in package_files()
        if path.suffix == ".py"
        for pattern in code_file(path, "vitpipe.x").data_files
    ]
    patterns = [*named, *NOT_OF_STAGES]
    files = {path.relative_to(PACKAGE) for path in package_files() if path.suffix != ".py"}
    homeless = {
        str(file)
        for file in files
        if not any(file.match(pattern) or str(file).startswith(pattern.rstrip("*")) for pattern in patterns)
    }
    assert homeless == set()
    absent = {pattern for pattern in named if not list(PACKAGE.glob(pattern))}
    assert absent <= set(MAY_BE_ABSENT)


# They look at the package itself, not at its data.
NO_DATA = {
    "config/read.py",
    "config/set_names.py",
    "contracts/discovery.py",
    "data/resize_kernels.py",
    "track/model_registry.py",
    "verbs/machine.py",
}


def test_every_module_that_opens_package_data_names_it():
    signs = ('files("vitpipe")', "Path(__file__)", "FileSystemLoader", "PackageLoader", "files_in(")
    silent = {
        path.relative_to(PACKAGE).as_posix()
        for path in package_files()
        if path.suffix == ".py"
        and any(sign in (text := path.read_text(encoding="utf-8")) for sign in signs)
        and f"{NAMED_IN} =" not in text
    }
    assert silent - NO_DATA - {"config/code_identity.py"} == set()


# Where a module is imported by a name: what they choose is in stages/chosen_code.py, or fixed by their code.
BY_NAME = {
    "config/model.py",
    "config/named.py",
    "config/recipe.py",
    "contracts/discovery.py",
    "contracts/graph.py",
    "datasets/layouts/__init__.py",
    "datasets/sources/detect_format.py",
    "dense/head.py",
    "dense/mm_import.py",
    "methods/method.py",
    "models/convert.py",  # of the verb `convert`; no stage
    "models/families.py",
    "stages/run.py",
}


def test_every_import_by_a_name_is_known():
    calls = re.compile(r"\b(import_module|part_of|imported)\(")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in package_files()
        if path.suffix == ".py" and calls.search(path.read_text(encoding="utf-8"))
    }
    assert found == BY_NAME


def test_a_module_without_a_file_is_named():
    with pytest.raises(InputError, match=r"vitpipe\.stages\.nothing"):
        closure_of(["vitpipe.stages.nothing"])


def written(place: Path, out: Path) -> dict[str, dict[str, str]]:
    """The files of `vitpipe identity`, run by the package in `place`."""
    environment = {**os.environ, "PYTHONPATH": str(place.parent)}
    command = [sys.executable, "-m", "vitpipe", "identity", "--recipe", ITPN[0], "--out", str(out)]
    subprocess.run(command, env=environment, cwd=place.parent, check=True, capture_output=True)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")}


@pytest.mark.slow
def test_the_command_of_an_edited_copy(tmp_path):
    place = tmp_path / "vitpipe"
    shutil.copytree(PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__"))
    before = written(place, tmp_path / "identity")
    assert set(before) == ALL
    edit(place / "prepare" / "dataset_doctor.py", '"""', '"""A letter. ')
    (place / "models" / "paca.py").write_text("width = 3\n", encoding="utf-8")
    assert written(place, tmp_path / "identity") == before
    add_constant(place / "data" / "resize_kernels.py")
    after = written(place, tmp_path / "identity")
    assert {name for name in ALL if before[name] != after[name]} == TRAINING


def test_recorded_results_run_the_report_again_and_nothing_else():
    recipe = load_recipe("itpn/pixel_base", "demo")
    reading = [
        node.name
        for node in graph_of(recipe.stages)
        if set(recorded_results.DATA_FILES) & set(stage_closure(recipe, node.stage).data_files)
    ]
    assert reading == ["report"]
