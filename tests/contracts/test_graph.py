"""The graph: what a stage's cache identity covers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vitpipe
from vitpipe.contracts.graph import STAGES, Stage, graph_of

PACKAGE = Path(vitpipe.__file__).parent
# They carry a stage and decide nothing about its numbers.
CARRIERS = {"contracts/graph.py", "stages/context.py", "stages/used_datasets.py"}


def imported_files(file: Path) -> set[Path]:
    """Files of the package that `file` imports when it runs, wherever in it the statement stands."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for block in [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]:
        block.body = []  # for type checkers only
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            base = PACKAGE.parent / name.replace(".", "/")
            found |= {path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()}
    return {path for path in found if path.is_relative_to(PACKAGE)}


def reached_from(file: Path) -> set[str]:
    """The file and all that it imports, directly or not, as paths inside the package."""
    reached, waiting = set(), [file]
    while waiting:
        here = waiting.pop()
        if here not in reached:
            reached.add(here)
            waiting += imported_files(here)
    return {str(path.relative_to(PACKAGE)) for path in reached}


# Not the report: it shows what others computed, and names its own rooms.
COMPUTING = [stage for stage in STAGES if stage.name != "report"]


@pytest.mark.parametrize("stage", COMPUTING, ids=lambda stage: stage.name)
def test_the_code_identity_covers_all_that_a_stage_imports(stage: Stage) -> None:
    covered = stage.all_code
    outside = {
        path
        for path in reached_from(PACKAGE / "stages" / f"{stage.module_name}.py") - CARRIERS
        if not path.endswith("__init__.py") and not any(Path(path).is_relative_to(code) for code in covered)
    }
    assert not outside


def test_imports_inside_functions_count() -> None:
    reached = reached_from(PACKAGE / "stages" / "detect.py")
    assert {"stages/dense_training.py", "dense/runner.py", "train/loop.py"} <= reached


@pytest.mark.parametrize(
    ("start_from", "expected"), [({}, "pretrain"), ({"segment": "finetune"}, "finetune")]
)
def test_a_recipe_may_choose_whose_weights_a_stage_takes(start_from: dict[str, str], expected: str) -> None:
    nodes = {node.name: node for node in graph_of(("prepare", "pretrain", "finetune", "segment"), start_from)}
    assert nodes["segment"].inputs == {"data": "prepare", "weights": expected}
    assert nodes["finetune"].inputs["weights"] == "pretrain"
