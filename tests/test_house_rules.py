"""The house rules of the design, kept on the syntax tree: rooms, sizes, docstrings, names, imports."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vitpipe", "components", "pipelines", "environment")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_COMPONENT_STATEMENTS = 400, 60, 25
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
# A room may import rooms of a lower floor and its own.
FLOORS = {
    "contracts": 0, "config": 1, "papers": 1, "data": 2, "models": 2, "datasets": 3, "optim": 4, "prepare": 4.5,
    "train": 5, "evaluate": 6, "dense": 6, "methods": 6.5, "track": 7, "report": 7, "benchmarks": 7.5, "stages": 8, "tables": 8.2, "cluster": 8.3, "verbs": 8.5, "cli": 9, "__main__": 9.5,
    "components": 10, "pipelines": 11,
}  # fmt: skip
HEAVY = ("torch", "torchvision", "timm", "mlflow", "kfp", "mmcv", "mmengine", "mmdet", "mmseg")


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("components", "pipelines"):
        return parts[0]
    return parts[1] if parts[0] == "vitpipe" and len(parts) > 1 else None


def _functions(tree: ast.Module):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def _top_level_imports(tree: ast.Module):
    """Modules imported when the file is imported; imports inside functions and TYPE_CHECKING do not count."""
    found: list[str] = []

    def visit(statements):
        for node in statements:
            if isinstance(node, ast.Import):
                found.extend(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                found.append(node.module or "")
                found.extend(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
                visit(node.body + node.orelse)
            elif isinstance(node, ast.Try | ast.With):
                visit(node.body)

    visit(tree.body)
    return found


def _imports(tree: ast.Module):
    """Modules that a file imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_file_keeps_the_house_rules(path: Path):
    text = path.read_text(encoding="utf-8")
    tree = _tree(path)
    broken = []
    if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES:
        broken.append("is named after nothing")
    if len(text.splitlines()) > MAX_FILE_LINES:
        broken.append(f"has {len(text.splitlines())} lines")
    if not ast.get_docstring(tree):
        broken.append("has no module docstring")
    for node in _functions(tree):
        length = (node.end_lineno or 0) - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            broken.append(f"{node.name} has {length} lines")
        arguments = [a for a in [*node.args.args, *node.args.kwonlyargs] if a.arg not in ("self", "cls")]
        if node.returns is None or any(a.annotation is None for a in arguments):
            broken.append(f"{node.name} is not fully annotated")
    public = [
        n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")
    ]
    for node in public:
        if not ast.get_docstring(node):
            broken.append(f"{node.name} has no docstring")
        methods = [m for m in ast.walk(node) if isinstance(m, ast.FunctionDef) and m is not node]
        inside = methods if isinstance(node, ast.ClassDef) else []
        broken += [
            f"{node.name}.{m.name} has no docstring"
            for m in inside
            if not m.name.startswith("_") and m in node.body and not ast.get_docstring(m)
        ]
    if any(isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names) for n in ast.walk(tree)):
        broken.append("has a star import")
    assert not broken, f"{_name(path)}: " + "; ".join(broken)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_imports_never_go_upward(path: Path):
    module = _name(path)
    room = _room(module)
    if room is None:
        return
    upward = [
        imported
        for imported in _top_level_imports(_tree(path))
        if (other := _room(imported)) in FLOORS and other != room and FLOORS[other] >= FLOORS[room]
    ]
    assert not upward, f"{module} imports upward: {upward}"


def test_jobs_on_a_cluster_know_stages_and_what_they_rest_on():
    """Nothing else: a launcher trains nothing, and tables know nothing of clusters."""
    for path in (ROOT / "vitpipe" / "cluster").glob("*.py"):
        rooms = {_room(imported) for imported in _imports(_tree(path))}
        assert rooms <= {None, "contracts", "config", "stages", "cluster"}, path.name


@pytest.mark.parametrize(
    "place", ["contracts", "config", "papers", "stages/context.py", "stages/run.py", "cli.py"]
)
def test_light_rooms_import_nothing_heavy(place: str):
    root = ROOT / "vitpipe" / place
    for path in [root] if root.is_file() else root.rglob("*.py"):
        heavy = [i for i in _top_level_imports(_tree(path)) if i.split(".")[0] in HEAVY]
        assert not heavy, f"{_name(path)} imports {heavy}"


def test_networks_hold_no_training_code():
    for path in (ROOT / "vitpipe" / "models").rglob("*.py"):
        assert not [i for i in _top_level_imports(_tree(path)) if i.startswith("torch.optim")], path.name


def test_components_hold_no_logic():
    for path in (ROOT / "components").glob("*.py"):
        for node in _functions(_tree(path)):
            statements = sum(isinstance(n, ast.stmt) for n in ast.walk(node)) - 1
            assert statements <= MAX_COMPONENT_STATEMENTS, (
                f"{path.name}:{node.name} has {statements} statements"
            )


def test_the_training_loop_is_short():
    assert len((ROOT / "vitpipe/train/loop.py").read_text(encoding="utf-8").splitlines()) < 250


def test_nothing_names_this_machine_or_a_registry():
    words = [
        "/" + "work/",
        "pypi" + ".org",
        "python" + "hosted",
        "deb.debian" + ".org",
        "registry.npm" + "js",
    ]
    suffixes = (".py", ".yaml", ".toml", ".md", ".lock", ".sh", ".html", ".txt", "")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    assert "README.md" in names
    for path in (ROOT / name for name in names if name):
        if not path.is_file() or path.suffix not in suffixes:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        assert not [w for w in words if w in text], (
            f"{path.relative_to(ROOT)} names {[w for w in words if w in text]}"
        )


def test_no_room_holds_more_than_a_fifth():
    lines = {}
    for path in (ROOT / "vitpipe").rglob("*.py"):
        parts = path.relative_to(ROOT / "vitpipe").parts
        # Every family of networks is a room of its own: one is read without the others, and each paper adds one.
        room = "/".join(parts[: 2 if parts[0] == "models" and len(parts) > 2 else 1])
        lines[room] = lines.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    largest = max(lines, key=lambda room: lines[room])
    assert lines[largest] < 0.2 * sum(lines.values()), f"{largest} holds {lines[largest]} lines"


# One of a kind is a folder, and all of a kind have the same files.
REPEATED = {"__init__", "config", "conversion", "family", "head", "method", "stage"}


def test_one_name_means_one_module():
    names: dict[str, list[str]] = {}
    for path in (ROOT / "vitpipe").rglob("*.py"):
        if path.stem not in REPEATED:
            names.setdefault(path.stem, []).append(_name(path))
    twice = {name: found for name, found in names.items() if len(found) > 1}
    assert not twice, twice
