"""Which packages of the lock an image has, layer by layer.

    python docker/package_layers.py LAYER...          the lock's lines of these layers, for uv
    python docker/package_layers.py --package NAME    those of one package
    python docker/package_layers.py --cpu-torch       torch of an index with CPU builds: versions only
    python docker/package_layers.py --cpu-rest        the other lines of the layer torch, without CUDA
    python docker/package_layers.py --write           docker/layers.json anew, from the installed environment

A layer has what the ones below it have not: torch with NVIDIA's libraries by itself, because it is most of an
image and changes with torch only, and a node that has pulled it once need not do so again. Reading a layer
needs the standard library only: it runs in an image that has no package yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "environment"))

from uv_runner import CUDA_PACKAGES, locked  # noqa: E402 - a sibling folder of scripts

LAYERS = HERE / "layers.json"
LOCK_FILE = HERE.parent / "requirements.lock"
# Layer -> what is asked for (package, its extras). Kubeflow's SDK, tests and build tools are in no image.
ROOTS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "torch": [("torch", ()), ("torchvision", ())],
    "train": [("vitpipe", ("cluster",))],
    "dense": [("vitpipe", ("cluster", "dense"))],
    # An image of its own, not on top of another layer.
    "mlflow": [("mlflow", ()), ("boto3", ())],
}
SERVER_EXTRA = "server"  # of pyproject.toml: what the server's image has besides
PYTHONS = ("3.11", "3.12", "3.13")
_TORCH = ("torch", "torchvision")


def names_of(layer: str) -> list[str]:
    """A layer's packages."""
    return list(json.loads(LAYERS.read_text(encoding="utf-8"))[layer])


def lines_of(layer: str) -> str:
    """The lock's lines (requirement, marker, hashes) of a layer's packages."""
    blocks = locked(LOCK_FILE)
    return "".join(blocks[name] for name in names_of(layer))


def layers() -> dict[str, list[str]]:
    """Layer -> its packages, from the metadata of the installed ones."""
    in_lock = set(locked(LOCK_FILE))
    server = list(_needs("vitpipe", (SERVER_EXTRA,), extra_only=True))
    roots = {**ROOTS, "mlflow": [*ROOTS["mlflow"], *server]}
    found = {name: _closure(asked) & in_lock for name, asked in roots.items()}
    found["dense"] -= found["train"]
    found["train"] -= found["torch"]
    return {name: sorted(packages) for name, packages in found.items()}


def _closure(roots: list[tuple[str, tuple[str, ...]]]) -> set[str]:
    """The packages, and all that they need, on Linux and on any of the supported Pythons."""
    extras_of: dict[str, set[str]] = {}
    waiting = list(roots)
    while waiting:
        name, extras = waiting.pop()
        if name in extras_of and extras_of[name] >= set(extras):
            continue
        extras_of[name] = extras_of.get(name, set()) | set(extras)
        waiting += _needs(name, tuple(extras_of[name]))
    return set(extras_of)


def _needs(
    name: str, extras: tuple[str, ...], *, extra_only: bool = False
) -> Iterator[tuple[str, tuple[str, ...]]]:
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # needed on other Pythons or platforms only: nothing here knows its needs
        return
    for line in lines:
        asked = Requirement(line)
        places = [
            {
                "sys_platform": "linux",
                "python_version": python,
                "python_full_version": f"{python}.5",
                "extra": extra,
            }
            for python in PYTHONS
            for extra in (*extras, *(() if extra_only else ("",)))
        ]
        marker = asked.marker
        if (marker is None and not extra_only) or (
            marker and any(marker.evaluate(place) for place in places)
        ):
            yield canonicalize_name(asked.name), tuple(asked.extras)


def cpu_torch() -> str:
    """torch and torchvision in their locked versions, without hashes: other builds have others."""
    blocks = locked(LOCK_FILE)
    return "".join(f"{blocks[name].split()[0]}\n" for name in _TORCH)


def cpu_rest() -> str:
    """The lock's lines of what the layer `torch` has besides, without what only CUDA needs."""
    names = [name for name in names_of("torch") if name not in _TORCH]
    blocks = locked(LOCK_FILE)
    return "".join(blocks[name] for name in names if not name.startswith(CUDA_PACKAGES))


def main(words: list[str]) -> None:
    """Do what the words ask for; see the module."""
    match words:
        case ["--write"]:
            LAYERS.write_text(json.dumps(layers(), indent=1) + "\n", encoding="utf-8")
        case ["--package", name]:
            print(locked(LOCK_FILE)[name])
        case ["--cpu-torch"]:
            print(cpu_torch())
        case ["--cpu-rest"]:
            print(cpu_rest())
        case names:
            print("".join(map(lines_of, names)))


if __name__ == "__main__":
    main(sys.argv[1:])
