"""Find what joins by files: stages, methods, families, heads and data files, ours and the user's plugins.

A kind is a package, such as `vitpipe.methods`; one of its kind is a folder in it with a `config.py`, which
says without torch what it is and which settings it has, and a second module that does the work. A plugin is a
folder with the same sub-folders as `vitpipe/`: the file `PLUGIN/methods/byol/method.py` is imported as
`vitpipe.methods.byol.method`, and `PLUGIN/recipes/mine/byol.yaml` is the recipe `mine/byol`.
"""

from __future__ import annotations

import functools
import glob
import importlib
import os
import pkgutil
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from vitpipe.contracts.errors import InputError

PACKAGE = Path(__file__).parent.parent
# In the environment, so that every process that this one starts (ranks, loader workers) finds the same.
PLUGINS_VARIABLE = "VITPIPE_PLUGINS"
_CONFIG = "config"
# What messages call one of a kind.
_KINDS = {
    "vitpipe.dense.heads": "head",
    "vitpipe.methods": "method",
    "vitpipe.models": "network family",
    "vitpipe.stages": "stage",
}
# What a module defines as a class; everything else is an instance.
_CLASSES = ("CONFIG", "METHOD")


def use_plugins(folders: Iterable[Path], where: str | Path = "plugins") -> None:
    """Let the packages of vitpipe find modules in these folders, too. Call it before a recipe is read.

    Args:
        folders: each with sub-folders named as those of `vitpipe/`.
        where: what names the folders, for messages.

    Raises:
        InputError: when a folder does not exist, has none of the sub-folders, or has a name that is taken.
    """
    # Those of the environment are in use, but nobody has looked at them: an image may lack the folder.
    for real in plugin_folders():
        _check(real, f"{PLUGINS_VARIABLE}: {real}")
    for folder in folders:
        real = folder.resolve()
        if real in plugin_folders():
            continue
        if os.pathsep in str(real):
            raise InputError(
                f"A plugin's path cannot hold '{os.pathsep}': it separates the folders in {PLUGINS_VARIABLE}",
                where=f"{where}: {folder}",
                fix="give the folder another name",
            )
        _check(real, f"{where}: {folder}")
        os.environ[PLUGINS_VARIABLE] = os.pathsep.join(map(str, (*plugin_folders(), real)))
        _extend(real)


def plugin_folders() -> tuple[Path, ...]:
    """The plugins in use, in the order in which they were named."""
    return tuple(Path(text) for text in os.environ.get(PLUGINS_VARIABLE, "").split(os.pathsep) if text)


@functools.cache
def names_in(package: str) -> tuple[str, ...]:
    """Names of all of a kind, sorted: sub-packages of `package` with a `config.py`.

    Args:
        package: for example `vitpipe.methods`.
    """
    places = importlib.import_module(package).__path__
    found = {info.name for info in pkgutil.iter_modules(places) if info.ispkg}
    # A plugin's folder needs no __init__.py.
    found |= {path.parent.name for place in places for path in Path(place).glob(f"*/{_CONFIG}.py")}
    return tuple(sorted(name for name in found if _has_config(places, name)))


def part_of(package: str, name: str, part: str, attribute: str, base: type | None = None) -> Any:
    """What one of a kind defines in one of its modules, imported when first used.

    Args:
        package: of the kind, for example `vitpipe.methods`.
        part: the module; `config` imports neither torch nor another heavy library.
        attribute: for example `CONFIG`.
        base: of which it must be a subclass, for `CONFIG` and `METHOD`, or an instance.

    Raises:
        InputError: when a plugin's module cannot be imported, or lacks the attribute or its type.
    """
    module = f"{package}.{name}.{part}"
    loaded = imported(module, kind_and_name(package, name))
    if not hasattr(loaded, attribute):
        raise InputError(
            f"{kind_and_name(package, name)} has no {attribute} in its {part}.py",
            where=source_of(module) or module,
            fix=f"define {attribute} there (docs/your-method.md), or take the folder out of the plugins",
        )
    found = getattr(loaded, attribute)
    is_one = base is None or (
        isinstance(found, type) and issubclass(found, base)
        if attribute in _CLASSES
        else isinstance(found, base)
    )
    if base is not None and not is_one:
        wanted = f"a subclass of {base.__name__}" if attribute in _CLASSES else f"a {base.__name__}"
        raise InputError(
            f"{attribute} of the {kind_and_name(package, name).removeprefix('The ')} is not {wanted}",
            where=source_of(module) or module,
            fix=f"give {attribute} {wanted}{'' if base is tuple else f' ({base.__module__})'}",
        )
    return found


def imported(module: str, what: str) -> ModuleType:
    """A module by its name, of vitpipe or of a plugin.

    Args:
        what: how a message begins.

    Raises:
        InputError: when a plugin's code fails while it is imported; names file and line.
    """
    try:
        return importlib.import_module(module)
    # A plugin's module can raise whatever its author's code raises; the cause keeps the traceback.
    except Exception as error:
        where = _line_of(error)
        if not where:
            raise  # a defect of ours
        raise InputError(
            f"{what} cannot be imported ({type(error).__name__}: {error})",
            where=where,
            fix="correct that line, or take the folder out of the plugins",
        ) from error


def kind_and_name(package: str, name: str) -> str:
    """How a message begins: `The method 'byol'`."""
    return f"The {_KINDS.get(package, 'part')} '{name}'"


def files_in(folder: str, pattern: str) -> tuple[Path, ...]:
    """Data files of the package and of all plugins, sorted by their path inside it.

    Args:
        folder: for example `recipes`.
        pattern: as of `glob.glob`; hidden files are not found, such as those that macOS lays beside others.
    """
    found = list(_listed_once(PACKAGE, folder, pattern))
    # Those of a plugin are listed each time: whoever works on one adds files to it.
    for root in plugin_folders():
        found += _listed(root, folder, pattern)
    return tuple(path for _, path in sorted(found))


def _listed(root: Path, folder: str, pattern: str) -> tuple[tuple[str, Path], ...]:
    """Names below `root/folder`, and the files themselves."""
    # pathlib's own glob is four times as slow.
    names = glob.glob(pattern, root_dir=root / folder)  # noqa: PTH207
    return tuple((name, root / folder / name) for name in names)


# Every reading of a recipe lists files several times, and the package's own do not change while it runs.
_listed_once = functools.cache(_listed)


def source_of(module: str) -> Path | None:
    """The file of a module of vitpipe, without importing it; None when there is none."""
    parts = module.split(".")[1:]
    for root in (PACKAGE, *plugin_folders()):
        base = root.joinpath(*parts)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _line_of(error: Exception) -> str:
    """File and line of a plugin at which an import has failed; empty when no plugin's file is concerned."""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    for name, line in reversed(lines):
        if any(Path(name).is_relative_to(folder) for folder in plugin_folders()):
            return f"{name}, line {line}"
    return ""


def _has_config(places: Iterable[str], name: str) -> bool:
    return any((Path(place) / name / f"{_CONFIG}.py").is_file() for place in places)


def _extend(plugin: Path) -> None:
    """Append a plugin's folders to the search paths of the packages of the same names."""
    for package, folder in _shared_packages(plugin):
        search: list[str] = importlib.import_module(package).__path__  # type: ignore[assignment]
        if str(folder) not in search:
            search.append(str(folder))
    importlib.invalidate_caches()
    names_in.cache_clear()


def _shared_packages(plugin: Path) -> Iterator[tuple[str, Path]]:
    """Packages of vitpipe that a plugin has a folder for: import name and the plugin's folder."""
    for folder in sorted(path for path in plugin.rglob("*") if path.is_dir()):
        inside = folder.relative_to(plugin)
        if (PACKAGE / inside / "__init__.py").is_file():
            yield ".".join(("vitpipe", *inside.parts)), folder


def _check(plugin: Path, where: str) -> None:
    if not os.path.isdir(plugin):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
        raise InputError("The plugin folder does not exist", where=where, fix="check the path")
    if not any((PACKAGE / place.name).is_dir() for place in plugin.iterdir() if place.is_dir()):
        raise InputError(
            "The plugin folder has none of the folders that vitpipe looks into",
            where=where,
            fix="give it folders such as methods/, models/, recipes/ (docs/your-method.md)",
        )
    _refuse_taken_names(plugin)


def _refuse_taken_names(plugin: Path) -> None:
    # Found by the search path's order, a second file of a name would silently never be used.
    for path in sorted(
        p for p in plugin.rglob("*") if p.suffix in (".py", ".yaml") and p.name != "__init__.py"
    ):
        inside = path.relative_to(plugin)
        # A module hides a package of its name, and the other way round.
        same = [inside]
        if path.suffix == ".py":
            same += [inside.with_suffix("") / "__init__.py", inside.with_suffix("") / f"{_CONFIG}.py"]
        if path.stem == _CONFIG:
            same.append(inside.parent.with_suffix(".py"))
        roots = (PACKAGE, *(folder for folder in plugin_folders() if folder != plugin))
        for other in (root / name for root in roots for name in same):
            if other.is_file():
                raise InputError(
                    f"The plugin's file {inside} has the name of a file that is there already",
                    where=path,
                    fix=f"give it another name; the other one is {other}",
                )


# In a process whose parent has chosen plugins. Absolute, because this process may start others elsewhere.
if plugin_folders():
    os.environ[PLUGINS_VARIABLE] = os.pathsep.join(str(folder.resolve()) for folder in plugin_folders())
for _folder in plugin_folders():
    _extend(_folder)
