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
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from uv_runner import SetupError, find_uv, locked, requirement_files, run, say

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "requirements.lock"
STAMP = ".ready"  # in a finished environment: what it was made from
# A first installation: 3 GB of downloads, unpacked to 6.5 GB in uv's cache and linked from there.
FIRST_TIME_BYTES = 7 * 2**30
# Imported when everything is installed, side by side: what does not work is found now, and what every chain
# imports is compiled now (6,000 files; all 27,000 would take a minute). The first line says what was found.
TRIALS = (
    "import torch; print(torch.__version__); from vitpipe.dense import library; library.open_detection(); "
    "library.open_segmentation('mask2former'); import timm.optim, torchvision, safetensors.torch",
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
        print("make: stopped; nothing has been changed", file=sys.stderr)
        return 130
    return 0


# What is there


def wanted(version: str) -> dict[str, str]:
    """What decides the packages, by name, for a Python such as `3.13`."""
    return {
        "python": version,
        "lock": _digest(LOCK_FILE),
        "project": _digest(ROOT / "pyproject.toml"),
        "torch_index": os.environ.get("TORCH_INDEX", ""),
        "checkout": str(ROOT),
    }


def made_from(venv: Path) -> dict[str, str] | None:
    """The same of a finished environment; None where there is none."""
    try:
        found = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and os.access(venv / "bin" / "python", os.X_OK) else None


def is_current(venv: Path) -> bool:
    """Whether the environment is what the checkout asks for.

    Any of the three Pythons will do, unless PYTHON names one.
    """
    found = made_from(venv)
    if found is None:
        return False
    version = this_version() if os.environ.get("PYTHON") else found.get("python", "")
    return found == wanted(version)


def this_version() -> str:
    """Of the Python that runs this, such as `3.13`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _digest(*files: Path) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(file.read_bytes())
    return total.hexdigest()


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
    new, old = venv.with_name(f"{venv.name}.new"), venv.with_name(f"{venv.name}.old")
    for leftover in (new, old):  # of a setup that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    say_what_comes(venv)
    with _end_on_sigterm():
        try:
            install(new)
            (new / STAMP).write_text(json.dumps(wanted(this_version()), indent=2) + "\n", encoding="utf-8")
            replace(venv, new, old)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    shown = os.path.relpath(venv)
    say(f"{shown} is ready after {time.monotonic() - started:.0f} s (Python {this_version()})")
    say(f"`. {shown}/bin/activate` puts vitpipe, dvc and mlflow on your path")


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


def install(folder: Path) -> None:
    """Everything into a new environment.

    Raises:
        SetupError: when a step fails.
    """
    with scratch_folder(folder) as scratch:
        uv = find_uv(LOCK_FILE, scratch)
        base = getattr(sys, "_base_executable", sys.executable)
        # Relocatable, because it is renamed when it is finished.
        run(uv, "venv", "--quiet", "--relocatable", "--prompt", "vitpipe", "--python", base, str(folder))
        into = ("--python", str(folder / "bin" / "python"))
        # A source distribution (mmcv) is built apart from torch, so that it leaves its operators out, with
        # the build tools that the lock names.
        common = ("pip", "install", *into, "--no-deps", "--build-constraints", str(LOCK_FILE))
        for requirements, options in requirement_files(LOCK_FILE, scratch):
            # No --compile-bytecode: it compiles 27,000 files in 50 s, of which a chain imports a fifth.
            run(uv, *common, "--requirements", str(requirements), *options)
        run(uv, *common, "--quiet", "--editable", str(ROOT))
    say(f"torch {try_out(folder)} works")


def try_out(folder: Path) -> str:
    """Import what a chain imports; the version of torch.

    Raises:
        SetupError: when something cannot be imported.
    """
    # Where Python writes no bytecode (many container images say so), every later start would compile anew.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = [
        subprocess.Popen(
            [folder / "bin" / "python", "-c", trial],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
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
            reason = (errors.strip().splitlines() or ["no message"])[-1][:300]
            raise SetupError(
                f"The packages were installed but do not work ({reason}). Fix: most likely a package in uv's "
                "cache is damaged; empty it (`uv cache clean`, or remove ~/.cache/uv) and run this again."
            )
    return said[0][0].strip()


def replace(venv: Path, new: Path, old: Path) -> None:
    """Put `new` in the place of `venv`, and say what was in it that the lock does not name."""
    gone = extra_packages(venv, new)
    if venv.exists():
        venv.rename(old)
    new.rename(venv)
    shutil.rmtree(old, ignore_errors=True)
    if gone:
        say(f"no longer installed, because the lock does not name them: {', '.join(gone)}")


def extra_packages(venv: Path, new: Path) -> list[str]:
    """What somebody installed by hand into the earlier environment."""
    before, after = ({name.name.partition("-")[0] for name in _metadata(f)} for f in (venv, new))
    return sorted(before - after)


def _metadata(venv: Path) -> list[Path]:
    return list(venv.glob("lib/python3.*/site-packages/*.dist-info"))


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder for the time of the installation, on the same disk; /tmp is often small."""
    scratch = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
