"""Make the locked environment; `make setup` runs this with the Python that `find_python.sh` found.

    PYTHON environment/install.py [--venv .venv] [--check]

Everything is installed into a folder beside the environment, tried, and renamed into its place, so that
whatever goes wrong (network, disk, a kill) leaves the earlier environment as it was, or none, never half of
one. What it was made from is written into it; a second call with the same lock does nothing. Standard
library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from uv_runner import SetupError, cache_folder, find_uv, locked, requirement_files, run, say

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "requirements.lock"
STAMP = ".ready"  # in a finished environment: what it was made from
MARK = ".made-by-vitpipe-setup"  # in a folder of ours that may be removed
# A first installation: 3 GB of downloads, unpacked to 6.5 GB in uv's cache and linked from there.
FIRST_TIME_BYTES = 7 * 2**30
# Imported when everything is installed, side by side: what does not work is found now, and what every chain
# imports is compiled now (6,000 files; all 27,000 would take a minute). The first line says what was found.
TRIALS = (
    "import torch; print(torch.__version__); from vitpipe.dense import mm_import; mm_import.open_detection()"
    "; mm_import.open_segmentation('mask2former'); import timm.optim, torchvision, safetensors.torch",
    "import mlflow; print(mlflow.__version__); import mlflow.store.tracking.sqlalchemy_store, dvc.cli, "
    "dvc.commands.repro, numba, sklearn.datasets, skimage.data, scipy.ndimage, matplotlib.pyplot, pandas",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment unless it is there already; 0 when it is there afterwards, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--check", action="store_true", help="only say by the exit code whether it is there")
    options = parser.parse_args(arguments)
    venv = options.venv.resolve()  # a link is followed, so that it stays one and the disk behind it is filled
    try:
        if options.check:
            return 0 if is_current(venv) else 1
        with one_at_a_time():
            if not is_current(venv):
                make(venv)
    except SetupError as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place = error.filename or venv
        print(
            f"make: The environment was not made: {error.strerror or error}. Where: {place}. Fix: make the "
            "folder writable and see that its disk is not full, then run this again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("make: stopped; no half-made environment is left", file=sys.stderr)
        return 130
    return 0


# What is there


def wanted(version: str, torch_index: str) -> dict[str, str]:
    """What decides the packages, by name, for a Python such as `3.13`.

    Args:
        torch_index: `as_stamped` of another index for torch.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    installed = {name: project.get(name) for name in ("project", "build-system")}
    return {
        "python": version,
        "lock": hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest(),
        "project": hashlib.sha256(json.dumps(installed, sort_keys=True).encode()).hexdigest(),
        "torch_index": torch_index,
        "checkout": str(ROOT),
    }


def as_stamped(torch_index: str) -> str:
    """An index's address as it is remembered: its digest, because it may hold a password."""
    return hashlib.sha256(torch_index.encode()).hexdigest() if torch_index else ""


def made_from(venv: Path) -> dict[str, str] | None:
    """`wanted` of a finished environment; None where there is none."""
    try:
        found = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and os.access(venv / "bin" / "python", os.X_OK) else None


def is_current(venv: Path) -> bool:
    """Whether the environment is what the checkout asks for.

    Any of the three Pythons and any index of torch will do, unless PYTHON or TORCH_INDEX is set.
    """
    found = made_from(venv)
    if found is None:
        return False
    version = this_version() if os.environ.get("PYTHON") else found.get("python", "")
    index = found.get("torch_index", "") if asked_index() is None else as_stamped(asked_index() or "")
    return found == wanted(version, index)


def asked_index() -> str | None:
    """What TORCH_INDEX says: an address, empty for `none`, None when it is not set."""
    said = os.environ.get("TORCH_INDEX")
    return "" if said == "none" else said or None


def this_version() -> str:
    """Of the Python that runs this, such as `3.13`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other process installs for this checkout."""
    # The folder itself is the lock: nothing to leave behind.
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process makes the environment of this checkout; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# Making it


def make(venv: Path) -> None:
    """Install beside `venv`, try it, rename it into its place.

    Raises:
        SetupError: when a package cannot be had or does not work, or `venv` is not ours.
    """
    started = time.monotonic()
    refuse_foreign(venv)
    index = index_to_use(venv)
    venv.parent.mkdir(parents=True, exist_ok=True)
    say_what_comes(venv)
    with _end_on_sigterm(), workshop(venv) as folder:
        install(folder / "new", folder, index)
        stamp = wanted(this_version(), as_stamped(index))
        (folder / "new" / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        gone = extra_packages(venv, folder / "new")
        replace(venv, folder / "new", folder / "old")
    if gone:
        say(f"no longer installed, because the lock does not name them: {', '.join(gone)}")
    shown = os.path.relpath(venv)
    say(f"{shown} is ready after {time.monotonic() - started:.0f} s (Python {this_version()})")
    say(f"`. {shown}/bin/activate` puts vitpipe, dvc and mlflow on your path")


@contextlib.contextmanager
def workshop(venv: Path) -> Iterator[Path]:
    """A folder on the same disk for the time of the installation; what killed ones left there is removed."""
    prefix = f"{venv.name}.setup-"
    for leftover in venv.parent.glob(f"{prefix}*"):
        if (leftover / MARK).exists():
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=venv.parent))
    try:
        (folder / MARK).touch()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def index_to_use(venv: Path) -> str:
    """The index of torch, empty for that of all packages.

    Raises:
        SetupError: when the environment has torch from another one and nobody says which to take now.
    """
    asked, found = asked_index(), made_from(venv)
    if asked is None and found is not None and found.get("torch_index"):
        raise SetupError(
            f"{venv} must be made again, and its torch came from an index that TORCH_INDEX named, which is "
            "not set now. Fix: set it again, or TORCH_INDEX=none to take torch from where the other packages "
            "come from."
        )
    return asked or ""


def refuse_foreign(venv: Path) -> None:
    """Only an environment that this script made is ever replaced.

    Raises:
        SetupError: when something else is there.
    """
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        return
    # Earlier versions of the Makefile left an empty stamp, or, interrupted, uv in an environment without one.
    if (venv / STAMP).exists() or ((venv / "pyvenv.cfg").exists() and (venv / "bin" / "uv").exists()):
        return
    raise SetupError(
        f"{venv} was not made by `make setup`, so it is left alone. Fix: move it away, or choose another "
        "folder: make VENV=.venv-vitpipe setup."
    )


def say_what_comes(venv: Path) -> None:
    """How much is to be installed, and whether the disk looks too small for it."""
    free = shutil.disk_usage(venv.parent).free
    say(f"installing {len(locked(LOCK_FILE))} locked packages for Python {this_version()} (6.5 GB, once)")
    if free < FIRST_TIME_BYTES:
        say(f"note: {free / 2**30:.1f} GB are free; 7 are needed unless uv's cache already has the packages")


def install(venv: Path, scratch: Path, torch_index: str) -> None:
    """Everything into a new environment.

    Args:
        scratch: for files that are needed on the way; /tmp is often small.

    Raises:
        SetupError: when a step fails.
    """
    uv = find_uv(LOCK_FILE, scratch)
    base = getattr(sys, "_base_executable", sys.executable)
    # Relocatable, because it is renamed when it is finished.
    run(uv, "venv", "--quiet", "--relocatable", "--prompt", "vitpipe", "--python", base, str(venv))
    into = ("--python", str(venv / "bin" / "python"))
    # A source distribution (mmcv) is built apart from torch, so that it leaves its operators out, with the
    # build tools that the lock names.
    common = ("pip", "install", *into, "--no-deps", "--build-constraints", str(LOCK_FILE))
    for requirements, options in requirement_files(LOCK_FILE, scratch, torch_index):
        # No --compile-bytecode: it compiles 27,000 files in 50 s, of which a chain imports a fifth.
        run(uv, *common, "--requirements", str(requirements), *options)
    run(uv, *common, "--quiet", "--editable", str(ROOT))
    say(f"torch {try_out(venv)} works")


def try_out(venv: Path) -> str:
    """Import what a chain imports; the version of torch.

    Raises:
        SetupError: when something cannot be imported.
    """
    # Where Python writes no bytecode (many container images say so), every later start would compile anew.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = [
        subprocess.Popen(
            [venv / "bin" / "python", "-I", "-c", trial],
            cwd=venv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for trial in TRIALS
    ]  # fmt: skip
    try:
        said = [process.communicate() for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        if process.returncode:
            died = f"signal {-process.returncode}" if process.returncode < 0 else "no message"
            reason = (errors.strip().splitlines() or [died])[-1][:300]
            raise SetupError(
                f"The packages were installed but do not work ({reason}); nothing has been changed. Fix: "
                f"most likely one is damaged in uv's cache; remove the cache ({cache_folder()}), which is "
                "filled again, and run this again."
            )
    return said[0][0].strip()


def replace(venv: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `venv`, which becomes `old`; should that fail, nothing has happened."""
    if not venv.exists():
        new.rename(venv)
        return
    venv.rename(old)
    try:
        new.rename(venv)
    except BaseException:
        old.rename(venv)
        raise


def extra_packages(venv: Path, new: Path) -> list[str]:
    """What somebody installed by hand into the earlier environment."""
    before, after = ({name.name.partition("-")[0] for name in _metadata(f)} for f in (venv, new))
    return sorted(before - after)


def _metadata(venv: Path) -> list[Path]:
    return list(venv.glob("lib/python3.*/site-packages/*.dist-info"))


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """SIGTERM cleans up as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
