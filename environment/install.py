"""Install the locked environment; `make setup` runs this with the Python that `find_python.sh` found.

    PYTHON environment/install.py [--venv .venv] [--check]

Everything is installed into a new folder beside the environment, imported as a test, and renamed into its
place: after any failure (network, disk, a kill) the earlier environment is unchanged. A second call with the
same lock does nothing. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
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

# A sibling script, not a package: this file runs before vitpipe is installed.
from uv_runner import SetupError, cache_folder, find_uv, locked, requirement_files, run, say

ROOT = Path(__file__).resolve().parent.parent
LOCK_FILE = ROOT / "requirements.lock"
STAMP = ".ready"  # file in a finished environment with the inputs it was made from
MARK = ".made-by-vitpipe-setup"  # file in a temporary folder that this script may remove
# A first installation downloads 3 GB and unpacks them to 6.5 GB in uv's cache. The environment takes no
# further space, because uv links its files from the cache (on the same disk).
FIRST_TIME_BYTES = 7 * 2**30
# Run after the installation, in parallel. A package that does not work is found now, and the modules that
# every pipeline imports get their bytecode (6,000 files; all 27,000 would take a minute). The first trial
# must print the version of torch.
TRIALS = (
    "import torch; print(torch.__version__); from vitpipe.dense import mm_import; mm_import.open_detection()"
    "; mm_import.open_segmentation(('mmdet.models',)); import timm.optim, torchvision, safetensors.torch",
    "import mlflow; print(mlflow.__version__); import mlflow.store.tracking.sqlalchemy_store, dvc.cli, "
    "dvc.commands.repro, numba, sklearn.datasets, skimage.data, scipy.ndimage, matplotlib.pyplot, pandas",
)
# What is imported later than the trials do: the checkout's packages, and folders of site-packages (the verbs
# of DVC, the migrations of a new MLflow database, the compiler of the image kernels).
OWN_PACKAGES = ("vitpipe", "pipelines", "components")
COMPILED_FOLDERS = (
    "dvc", "dvc_data", "dvc_objects", "scmrepo", "ruamel", "pathspec", "typer", "mlflow/store",
    "mlflow/pyfunc", "mlflow/system_metrics", "numba/core", "numba/cpython", "numba/np",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Install the environment unless it is current. Exit code 0, 1 (error) or 130 (interrupted)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument(
        "--check", action="store_true", help="exit with 0 if the environment is current, else 1"
    )
    options = parser.parse_args(arguments)
    # A symbolic link is followed: it must stay one, and the environment belongs on the disk that it points
    # to.
    venv = options.venv.resolve()
    try:
        if options.check:
            return 0 if is_current(venv) else 1
        with one_at_a_time():
            # Under the lock: another process may just have finished.
            if not is_current(venv):
                make(venv)
    except SetupError as error:
        print(f"make: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place = error.filename or venv
        print(
            f"make: The environment was not installed: {error.strerror or error}. Where: {place}. Fix: make "
            "the folder writable and check that its disk is not full, then run this again.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("make: interrupted; no incomplete environment was left", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
    return 0


# The state on disk


def wanted(version: str, torch_index: str) -> dict[str, str]:
    """The inputs that decide the content of an environment, for a Python version such as `3.13`.

    Args:
        torch_index: `as_stamped` of the index for torch; empty for the common index.
    """
    # Only these two tables of pyproject.toml are installed; settings of tools change nothing.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    installed = {name: project.get(name) for name in ("project", "build-system")}
    return {
        "python": version,
        "lock": hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest(),
        "project": hashlib.sha256(json.dumps(installed, sort_keys=True).encode()).hexdigest(),
        "torch_index": torch_index,
        "checkout": str(ROOT),  # the editable installation holds this path: a moved checkout needs a new one
    }


def as_stamped(torch_index: str) -> str:
    """SHA-256 of an index's address, for the stamp: the address may contain a password."""
    return hashlib.sha256(torch_index.encode()).hexdigest() if torch_index else ""


def made_from(venv: Path) -> dict[str, str] | None:
    """The stamp of a finished environment, as `wanted` made it; None where there is none."""
    try:
        found = json.loads((venv / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Without the Python check, an environment whose base Python was uninstalled would count as finished.
    return found if isinstance(found, dict) and os.access(venv / "bin" / "python", os.X_OK) else None


def is_current(venv: Path) -> bool:
    """Whether the environment matches the checkout.

    Any of the supported Pythons and any index of torch is accepted, unless PYTHON or TORCH_INDEX is set.
    """
    found = made_from(venv)
    if found is None:
        return False
    version = this_version() if os.environ.get("PYTHON") else found.get("python", "")
    index = found.get("torch_index", "") if asked_index() is None else as_stamped(asked_index() or "")
    return found == wanted(version, index)


def asked_index() -> str | None:
    """The value of TORCH_INDEX: an address, empty for `none`, None when it is not set."""
    value = os.environ.get("TORCH_INDEX")
    return "" if value == "none" else value or None


def this_version() -> str:
    """Version of the Python that runs this script, such as `3.13`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Wait until no other process installs for this checkout."""
    # flock on the folder itself needs no lock file, and the kernel releases it when the process ends,
    # however.
    handle = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is installing the environment of this checkout; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# Installation


def make(venv: Path) -> None:
    """Install into a folder beside `venv`, test it, rename it to `venv`.

    Raises:
        SetupError: when a package cannot be fetched or does not work, or `venv` was not made by this script.
    """
    started = time.monotonic()
    refuse_foreign(venv)  # before minutes of downloads
    index = index_to_use(venv)
    venv.parent.mkdir(parents=True, exist_ok=True)
    announce(venv)
    with _end_on_sigterm(), workshop(venv) as folder:
        install(folder / "new", folder, index)
        stamp = wanted(this_version(), as_stamped(index))
        # Last, after the trials: an environment with a stamp is complete.
        (folder / "new" / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        removed = extra_packages(venv, folder / "new")
        replace(venv, folder / "new", folder / "old")
    if removed:
        say(f"no longer installed, because they are not in the lock: {', '.join(removed)}")
    shown = os.path.relpath(venv)
    say(f"{shown} is ready after {time.monotonic() - started:.0f} s (Python {this_version()})")
    say(f"run `. {shown}/bin/activate` to have vitpipe, dvc and mlflow on your PATH")


@contextlib.contextmanager
def workshop(venv: Path) -> Iterator[Path]:
    """A temporary folder beside `venv`; removes those that killed installations left."""
    # Beside it, because a rename works within one file system only.
    prefix = f"{venv.name}.setup-"
    for leftover in venv.parent.glob(f"{prefix}*"):
        if (leftover / MARK).exists():  # a folder of this name may also be the user's
            shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=venv.parent))
    try:
        (folder / MARK).touch()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def index_to_use(venv: Path) -> str:
    """The index to take torch from, empty for the index of all packages.

    Raises:
        SetupError: when the environment has torch from another index and TORCH_INDEX is not set now.
    """
    # The stamp has the digest of the address only, so it cannot be used again without being given.
    asked, found = asked_index(), made_from(venv)
    if asked is None and found is not None and found.get("torch_index"):
        raise SetupError(
            f"{venv} must be installed again. Its torch came from the index that TORCH_INDEX named, which is "
            "not set now. Fix: set it again, or set TORCH_INDEX=none to take torch from the index of the "
            "other packages."
        )
    return asked or ""


def refuse_foreign(venv: Path) -> None:
    """Refuse to replace anything but an environment that this script made.

    Raises:
        SetupError: when `venv` is something else.
    """
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        return
    # Earlier versions of the Makefile wrote an empty stamp, and when interrupted left an environment with uv
    # in it and without a stamp.
    if (venv / STAMP).exists() or ((venv / "pyvenv.cfg").exists() and (venv / "bin" / "uv").exists()):
        return
    raise SetupError(
        f"{venv} was not made by `make setup`, so it is not replaced. Fix: move it away, or choose another "
        "folder: make VENV=.venv-vitpipe setup."
    )


def announce(venv: Path) -> None:
    """Print how much will be installed, with a note if the disk seems too small."""
    free = shutil.disk_usage(venv.parent).free
    say(f"installing {len(locked(LOCK_FILE))} locked packages for Python {this_version()} (6.5 GB, once)")
    if free < FIRST_TIME_BYTES:
        # Only a note: with a filled cache on this disk almost nothing is needed.
        say(f"note: {free / 2**30:.1f} GiB are free; 7 GiB are needed unless uv's cache has the packages")


def install(venv: Path, scratch: Path, torch_index: str) -> None:
    """Install everything into a new environment.

    Args:
        scratch: folder for temporary files; /tmp is often small.

    Raises:
        SetupError: when a step fails.
    """
    uv = find_uv(LOCK_FILE, scratch)
    # When this runs in the environment that will be replaced, the new one must not depend on that one's
    # Python.
    base = getattr(sys, "_base_executable", sys.executable)
    # Relocatable: scripts of an environment hold its path, and this one is renamed when it is finished.
    run(uv, "venv", "--quiet", "--relocatable", "--prompt", "vitpipe", "--python", base, str(venv))
    into = ("--python", str(venv / "bin" / "python"))
    # mmcv is a source distribution. uv builds it in an isolated environment without torch, so that it skips
    # its compiled operators (which needed a compiler and ten minutes); build tools come from the lock, too.
    # No dependencies are resolved: the lock is complete.
    common = ("pip", "install", *into, "--no-deps", "--build-constraints", str(LOCK_FILE))
    for requirements, options in requirement_files(LOCK_FILE, scratch, torch_index):
        # No --compile-bytecode: it compiles 27,000 files in 50 s, of which a pipeline imports a fifth.
        run(uv, *common, "--requirements", str(requirements), *options)
    run(uv, *common, "--quiet", "--editable", str(ROOT))
    say(f"torch {try_out(venv)} works")


def try_out(venv: Path) -> str:
    """Import what a pipeline imports; returns the version of torch.

    Raises:
        SetupError: when an import fails.
    """
    # Many container images set this variable; without the bytecode every later start would compile again.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    site = next(venv.glob("lib*/python3*/site-packages"), venv)
    folders = [*(ROOT / name for name in OWN_PACKAGES), *(site / name for name in COMPILED_FOLDERS)]
    # -qq, and its exit code is not asked for: a file that cannot be compiled is none that is imported.
    compiler = ("-m", "compileall", "-qq", *(str(folder) for folder in folders if folder.is_dir()))
    started = [
        subprocess.Popen(
            # -I: neither PYTHONPATH nor the current folder may provide a module that is missing here.
            [venv / "bin" / "python", "-I", *arguments],
            cwd=venv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for arguments in (*(("-c", trial) for trial in TRIALS), compiler)
    ]  # fmt: skip
    try:
        printed = [process.communicate() for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started[: len(TRIALS)], printed, strict=False):
        if process.returncode:
            # Popen reports a signal as a negative code, for instance -4 for an instruction the CPU lacks.
            ended = f"signal {-process.returncode}" if process.returncode < 0 else "no message"
            # The last line of a traceback is the exception.
            raise SetupError(explain_trial((errors.strip().splitlines() or [ended])[-1][:300]))
    return printed[0][0].strip()


def explain_trial(reason: str) -> str:
    """One paragraph for a failed trial import.

    Args:
        reason: the exception, as the last line of a traceback shows it.
    """
    # A module of the checkout itself that was renamed or deleted: TRIALS names it, uv's cache does not hold
    # it.
    if re.match(r"(ModuleNotFound|Import)Error\b.*'vitpipe[.']", reason):
        return (
            f"The packages were installed, but a module of this checkout cannot be imported ({reason}); "
            "nothing has been changed. Fix: restore the module (`git status` shows what was changed), or "
            "correct its name where it is imported: TRIALS in environment/install.py, or vitpipe itself."
        )
    return (
        f"The packages were installed but do not work ({reason}); nothing has been changed. Fix: remove uv's "
        f"cache ({cache_folder()}), in which a package is probably damaged, and run this again."
    )


def replace(venv: Path, new: Path, old: Path) -> None:
    """Rename `venv` to `old` and `new` to `venv`; undoes the first if the second fails."""
    # Two renames, because rename(2) cannot replace a folder that is not empty.
    if not venv.exists():
        new.rename(venv)
        return
    venv.rename(old)
    try:
        new.rename(venv)
    except BaseException:  # KeyboardInterrupt, too
        old.rename(venv)
        raise


def extra_packages(venv: Path, new: Path) -> list[str]:
    """Packages of the earlier environment that the new one does not have."""
    before, after = ({name.name.partition("-")[0] for name in _metadata(f)} for f in (venv, new))
    return sorted(before - after)


def _metadata(venv: Path) -> list[Path]:
    return list(venv.glob("lib/python3.*/site-packages/*.dist-info"))


@contextlib.contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, so that temporary folders are removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
