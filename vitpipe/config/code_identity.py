"""The code that decides a stage: the syntax trees of all that it imports, and the data files that these read.

    stage module > its imports, in functions too > their imports ...     (docstrings and comments dropped)
    modules that the recipe chooses, for example the family of its network
    what config.py beside a module computes, and constants that are imported from it
    files that these modules name in DATA_FILES

Nothing is imported and nothing but the sources is read, so that `vitpipe plan` stays fast.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitpipe.config.code_cache import code_cache, key_of
from vitpipe.config.digest import digest_of
from vitpipe.contracts.discovery import PACKAGE, files_in, plugin_folders, source_of
from vitpipe.contracts.errors import InputError

_ROOT = "vitpipe"
# Where a module names the data files that it opens: paths relative to vitpipe/, as globs. `{paper}` and
# `{dataset}` stand for what the recipe chooses, so that another paper's or set's file changes nothing.
NAMED_IN = "DATA_FILES"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
# Carriers: they hand over, name or show what others compute, and decide no number. A name stands for the
# modules below it, too.
CARRIERS = (
    "vitpipe",  # the package's own file: the version's number
    "vitpipe.contracts.address",  # hides passwords in what is shown
    "vitpipe.contracts.discovery",  # finds modules and files; what it finds enters itself
    "vitpipe.contracts.errors",  # messages
    "vitpipe.contracts.graph",  # which stages there are; a stage's inputs enter by their content
    "vitpipe.contracts.logger",  # a protocol
    "vitpipe.stages.context",  # carries inputs, recipe and folders
    "vitpipe.stages.used_datasets",  # tells the tracker what was read
    "vitpipe.track",  # writes down numbers that the stage has computed
)
# Recipe types, and how they are read: they enter by the resolved values. Derived values are computed here:
_DERIVING = "vitpipe.config.resolve"
_BY_VALUE = "config"
_WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# `timm:classes.txt`, `mmdet.models`, `sklearn`.
_PACKAGE_IN_TEXT = re.compile(r"(\w+)(?:\.[\w.]+|(:)[\w./]+)?")


@dataclass(frozen=True)
class CodeFile:
    """What one source file contributes.

    Attributes:
        digest: of its syntax tree; empty for a file that holds only a docstring.
        imports: absolute names of what it imports from vitpipe: modules, or names in modules.
        words: top-level names of packages that it imports or names in a text; with a colon where it names one
            of the package's files, `timm:`.
        data_files: its DATA_FILES.
    """

    digest: str
    imports: tuple[str, ...]
    words: frozenset[str]
    data_files: tuple[str, ...]


@dataclass(frozen=True)
class Closure:
    """All code that a stage can reach: module -> its file's content, in order of names."""

    modules: Mapping[str, CodeFile]

    @property
    def words(self) -> frozenset[str]:
        """Top-level names of the packages that it uses besides vitpipe."""
        return frozenset(word for file in self.modules.values() for word in file.words)

    @property
    def data_files(self) -> tuple[str, ...]:
        """The patterns of all data files that it opens, sorted."""
        return tuple(sorted({pattern for file in self.modules.values() for pattern in file.data_files}))


def code_digest(closure: Closure, choices: Mapping[str, Iterable[str]]) -> str:
    """Hex SHA-256 over a closure: names and syntax trees of its modules, names and content of its data files.

    Args:
        choices: placeholder of DATA_FILES -> what the recipe chooses; one that is missing stands for all.
    """
    files = {inside: _data_digest(path) for inside, path in data_files_of(closure, choices)}
    # The name, too: a module that moves changes what is imported.
    return digest_of({"code": {name: file.digest for name, file in closure.modules.items()}, "data": files})


def closure_of(modules: Iterable[str]) -> Closure:
    """Everything that these modules import when they run, themselves included.

    Args:
        modules: import names, of vitpipe or of plugins.

    Raises:
        InputError: when one of the given modules has no source, or a source cannot be parsed.
    """
    reached: dict[str, CodeFile] = {}
    named: set[str] = set()  # all that is imported, names in modules too
    places: dict[str, Path | None] = {}
    waiting = list(modules)
    for name in waiting:
        if _place(name, places) is None:
            raise InputError(
                f"The module {name} has no source file",
                where=source_of(f"{name.rpartition('.')[0]}.{_BY_VALUE}") or name,
                fix=f"add {name.rpartition('.')[2]}.py beside it",
            )
    while waiting:
        name = waiting.pop()
        named.add(name)
        if name in reached or not (_enters(name) or _is_by_folder(name)):
            continue
        path = _place(name, places)
        if path is None:  # a name in a module, not a module
            continue
        reached[name] = code_file(path, name)
        # `import a.b.c` runs the files of the packages a and a.b, too.
        waiting += [*reached[name].imports, *_packages_above(name)]
        # Settings reach a module as an object, which it need not import the type of.
        waiting.append(f"{name.rpartition('.')[0]}.{_BY_VALUE}")
    for name in filter(_is_by_folder, reached):
        used = frozenset(other.rpartition(".")[2] for other in named if other.rpartition(".")[0] == name)
        path = _place(name, places)
        assert path is not None, "it has been read above"
        reached[name] = replace(reached[name], digest=_digest_of_config(path, used, path.stat().st_mtime_ns))
    return Closure({name: reached[name] for name in sorted(reached) if reached[name].digest})


def _place(name: str, places: dict[str, Path | None]) -> Path | None:
    """`source_of`, which looks at the disk; not asked for names inside a module, which are the most."""
    if name not in places:
        above = name.rpartition(".")[0]
        inside = _place(above, places) if above else None
        is_in_module = inside is not None and inside.name != "__init__.py"
        places[name] = None if is_in_module else source_of(name)
    return places[name]


def data_files_of(closure: Closure, choices: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, Path]]:
    """Path inside the package and file of all data files of a closure, in plugins as well, sorted."""
    patterns = {filled for pattern in closure.data_files for filled in _filled(pattern, choices)}
    found = {}
    for pattern in patterns:
        folder, _, name = pattern.partition("/")
        for path in files_in(folder, name):
            found[_inside(path)] = path
    yield from sorted(found.items())


def code_file(path: Path, module: str) -> CodeFile:
    """Parse one source file; each content of a file is parsed once per process."""
    status = path.stat()
    return _parsed(path, module, status.st_mtime_ns, status.st_size)


# One entry per version of a file: a long-lived process sees an edit, and does not parse again without one.
@functools.lru_cache(maxsize=2048)
def _parsed(path: Path, module: str, mtime_ns: int, size_bytes: int) -> CodeFile:
    content, package = path.read_bytes(), module if path.name == "__init__.py" else module.rpartition(".")[0]
    key = key_of(content, package, _own_digest())
    if (known := code_cache().get(key)) is not None:
        with contextlib.suppress(TypeError, ValueError):  # of a damaged cache
            digest, imports, words, data_files = known
            return CodeFile(digest, tuple(imports), frozenset(words), tuple(data_files))
    found = _read_file(path, content, package)
    code_cache().put(key, [found.digest, found.imports, sorted(found.words), found.data_files])
    return found


@functools.cache
def _own_digest() -> str:
    """Of the rules by which a file is read: this module."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _read_file(path: Path, content: bytes, package: str) -> CodeFile:
    try:
        tree = ast.parse(content, filename=str(path))
    except SyntaxError as error:
        raise InputError(
            f"The file is not valid Python ({error.msg})",
            where=f"{path}, line {error.lineno}",
            fix="correct it",
        ) from error
    reading = _Reading(package)
    reading.block(tree.body)
    # A file that holds nothing but docstring and future imports decides nothing.
    digest = hashlib.sha256("\n".join(reading.text).encode()).hexdigest() if reading.text else ""
    imports = tuple(sorted(name for name in reading.names if name.partition(".")[0] == _ROOT))
    words = reading.words | {name.partition(".")[0] for name in reading.names}
    return CodeFile(digest, imports, frozenset(words), _named_data_files(tree))


class _Reading:
    """One pass over a syntax tree: its text without docstrings and positions, and what it names.

    Attributes:
        text: pieces of the tree as text.
        names: absolute names of all that is imported, of any package.
        words: packages that a text names, as `timm:` (a file of it) or `mmdet` (of `mmdet.models`).
    """

    # Not ast.dump: its text differs between Pythons (type_params since 3.12, no empty lists since 3.13), and
    # a pipeline may be compiled by another Python than that of its images, which compare this digest. One
    # pass, because walking 130 modules several times takes seconds.
    def __init__(self, package: str) -> None:
        self.package = package
        self.text: list[str] = []
        self.names: set[str] = set()
        self.words: set[str] = set()

    def block(self, statements: list[ast.stmt]) -> None:
        """Statements of a module, class or function, which may begin with a docstring."""
        first = statements[0] if statements else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            statements = statements[isinstance(first.value.value, str) :]
        for statement in statements:
            if not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
                self.node(statement)

    def node(self, node: ast.AST) -> None:
        """One node and all below it."""
        kind = type(node)
        if kind is ast.Constant:
            self._constant(node.value)  # type: ignore[attr-defined]
            return
        if kind is ast.Import or kind is ast.ImportFrom:
            self.names.update(_imported(node, self.package))
        self.text.append(kind.__name__)
        # What is for type checkers only never runs.
        hidden = kind is ast.If and _is_for_type_checkers(node.test)  # type: ignore[attr-defined]
        for field in node._fields:
            value = getattr(node, field, None)
            # `ctx` says that a name is read or written, which its place shows already.
            if value is None or value == [] or field == "ctx" or (hidden and field == "body"):
                continue
            self.text.append(field)
            if field == "body" and isinstance(value, list):
                self.block(value) if kind in _WITH_DOCSTRING else self._list(value)
            elif isinstance(value, list):
                self._list(value)
            elif isinstance(value, ast.AST):
                self.node(value)
            else:
                self.text.append(repr(value))
        self.text.append("end")

    def _list(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, ast.AST):
                self.node(value)
            else:  # a name of `global`; None for the key of `**more` in a dict
                self.text.append(repr(value))

    def _constant(self, value: Any) -> None:
        self.text.append(repr(value))
        # A package whose files are read without importing it ("timm:classes.txt"), or that is imported by a
        # text ("mmdet.models").
        if isinstance(value, str) and (named := _PACKAGE_IN_TEXT.fullmatch(value)):
            self.words.add(named[1] + (named[2] or ""))


def _imported(node: ast.AST, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:  # relative: one level is the package itself
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
    # What is imported may be a module itself.
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _is_for_type_checkers(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _named_data_files(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == NAMED_IN for target in targets):
            named: Any = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return tuple(named)
    return ()


def _enters(module: str) -> bool:
    if module == _DERIVING:
        return True
    by_value = module.rpartition(".")[2] == _BY_VALUE or module.startswith(f"{_ROOT}.{_BY_VALUE}.")
    carried = any(module == name or (name != _ROOT and module.startswith(f"{name}.")) for name in CARRIERS)
    return not by_value and not carried


def _is_by_folder(module: str) -> bool:
    """Whether it is the config.py of a method, a family, a head or a stage."""
    return module.rpartition(".")[2] == _BY_VALUE and module != f"{_ROOT}.{_BY_VALUE}"


@functools.lru_cache(maxsize=256)
def _digest_of_config(path: Path, used: frozenset[str], mtime_ns: int) -> str:
    """Digest of what decides beside the values of a config.py: its functions, and the constants in use.

    Fields and validators of its types enter by the recipe's values, entries of networks by `chosen_values`.

    Args:
        used: names that other modules import from it.
    """
    body = ast.parse(path.read_bytes(), filename=str(path)).body
    kinds = [node for node in body if isinstance(node, ast.ClassDef)]
    parts = [(kind.name, item) for kind in kinds for item in kind.body if _computes(item)]
    parts += [("", node) for node in body if _computes(node)]
    read = {n.id for _, part in parts for n in ast.walk(part) if isinstance(n, ast.Name)} | used
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id in read for target in targets):
            parts.append(("", node))
    reading = _Reading("")
    for owner, part in parts:
        reading.text.append(owner)
        reading.node(part)
    return hashlib.sha256("\n".join(reading.text).encode()).hexdigest() if parts else ""


def _computes(node: ast.stmt) -> bool:
    """Whether it is a function that code calls; pydantic calls validators, whose result is a value."""
    return isinstance(node, ast.FunctionDef) and not any(
        "validator" in ast.unparse(decorator) for decorator in node.decorator_list
    )


def _packages_above(module: str) -> Iterator[str]:
    parts = module.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def _filled(pattern: str, choices: Mapping[str, Iterable[str]]) -> list[str]:
    name = _PLACEHOLDER.search(pattern)
    if name is None:
        return [pattern]
    values = choices.get(name[1], ("*",))
    return [found for value in values for found in _filled(pattern.replace(name[0], value), choices)]


def _inside(path: Path) -> str:
    """A data file's path inside the package, or inside its plugin."""
    root = next(root for root in (PACKAGE, *plugin_folders()) if path.is_relative_to(root))
    return path.relative_to(root).as_posix()


def _data_digest(path: Path) -> str:
    status = path.stat()
    return _read_digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2048)
def _read_digest(path: Path, mtime_ns: int, size_bytes: int) -> str:
    if path.suffix != ".yaml":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    import yaml

    from vitpipe.contracts.safe_yaml import SAFE_LOADER

    # By value: a comment in a table of published numbers changes nothing.
    content = path.read_bytes()
    try:
        parsed = yaml.load(content, Loader=SAFE_LOADER)
    except yaml.YAMLError:
        # Whoever reads the file for its values says what is wrong with it.
        return hashlib.sha256(content).hexdigest()
    # repr and not JSON: YAML has dates and keys that are numbers.
    return hashlib.sha256(repr(_in_order(parsed)).encode()).hexdigest()


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted(
            ((repr(key), _in_order(inner)) for key, inner in value.items()), key=lambda item: item[0]
        )
    return [_in_order(item) for item in value] if isinstance(value, list) else value
