"""Compile mmcv's operators against the installed torch, once, and install the wheel.

    python docker/build_ops.py [--rebuild]

mmcv ships as source: its operators must be compiled against the very torch that runs them. The wheel is kept
in `$VITPIPE_CACHE/wheels` (default `~/.cache/vitpipe/wheels`) in a folder named after torch, Python, platform
and compiler flags, so the next environment takes seconds. The source is pinned by version and checksum in
`requirements-ops.lock`. Needs the locked environment, a C++ compiler and the Python headers; with
`FORCE_CUDA=1` also the CUDA toolkit. Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

LOCK_FILE = Path(__file__).resolve().parent.parent / "requirements-ops.lock"
PACKAGE = "onedl-mmcv"
# Light optimisation: the operators' time is small beside the network's, full optimisation doubles the build.
DEFAULT_FLAGS = {"CFLAGS": "-O1 -g0", "MMCV_WITH_OPS": "1"}
# What else changes the operators that come out.
FLAG_NAMES = (*DEFAULT_FLAGS, "CXXFLAGS", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CC", "CXX")
GIB = 2**30
MIN_FREE_BYTES = 3 * GIB
JOB_BYTES = 2.5 * GIB
SECONDS_BETWEEN_NOTES = 30.0
# What a build's log says, what it means, how to mend it; the first that fits.
KNOWN_FAILURES = (
    ("No space left on device", "the disk is full", "free some space, or set VITPIPE_CACHE"),
    (
        "DO NOT MATCH THE HASHES",
        "the source is not the pinned one",
        "check the package index, and that requirements-ops.lock is the repository's",
    ),
    (
        "No matching distribution|Could not find a version|NewConnectionError|Failed to establish|"
        "Temporary failure in name resolution|ConnectTimeout|ReadTimeout|ProxyError|getaddrinfo",
        "the source cannot be fetched",
        "check the network and pip's index settings",
    ),
    (
        "Killed signal|fatal error: Killed|internal compiler error",
        "a compiler was killed, most likely for want of memory",
        "set MAX_JOBS=1",
    ),
    (
        "CUDA_HOME environment variable is not set|nvcc: not found",
        "the CUDA toolkit is missing",
        "unset FORCE_CUDA, or install the toolkit of torch's CUDA version",
    ),
)


class BuildError(Exception):
    """Why there are no operators: one paragraph with the mend."""


def main(arguments: list[str] | None = None) -> int:
    """Install the operators from the cache, or build them first; 0 when they are there, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rebuild", action="store_true", help="build even if the cache has a wheel")
    rebuild = parser.parse_args(arguments).rebuild
    try:
        key = build_key(os.environ)
        folder = cache_folder(os.environ) / key
        with only_one(folder.parent):
            if rebuild:
                shutil.rmtree(folder, ignore_errors=True)
            wheel = cached_wheel(folder)
            if wheel is None:
                wheel = build(folder, build_environment(os.environ))
            else:
                say(f"taking mmcv's operators from the cache: {wheel}")
        install(wheel)
    except BuildError as error:
        print(f"build_ops: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"build_ops: The disk or the cache folder cannot be used ({error}). To mend it: free some space, "
            "or set VITPIPE_CACHE to a folder you can write to.",
            file=sys.stderr,
        )
        return 1
    return 0


def say(line: str) -> None:
    """One line for the person who waits."""
    print(f"build_ops: {line}", flush=True)


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where wheels are kept."""
    root = environment.get("VITPIPE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "vitpipe") / "wheels"


def build_flags(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings that decide what is compiled: ours, unless the caller's environment has others."""
    flags = {**DEFAULT_FLAGS, **{name: environment[name] for name in FLAG_NAMES if environment.get(name)}}
    return dict(sorted(flags.items()))


def build_key(environment: Mapping[str, str]) -> str:
    """Folder name of what fits this interpreter: torch, Python, platform, and a digest of pin and flags."""
    parts = json.dumps([pinned(), build_flags(environment)])
    digest = hashlib.sha256(parts.encode()).hexdigest()[:10]
    return f"torch{torch_version()}-{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{digest}"


def pinned() -> str:
    """The one requirement with its checksum.

    Raises:
        BuildError: when the lock file is not as it should be.
    """
    lines = LOCK_FILE.read_text(encoding="utf-8").split("\n")
    found = [line for line in lines if re.fullmatch(rf"{PACKAGE}==\S+ --hash=sha256:[0-9a-f]{{64}}", line)]
    if len(found) != 1:
        raise BuildError(
            f"{LOCK_FILE.name} must hold one line '{PACKAGE}==VERSION --hash=sha256:...'. To mend it: take "
            "the file from the repository."
        )
    return found[0]


def torch_version() -> str:
    """torch's version with its local part (`2.13.0+cu130`), read without importing torch.

    Raises:
        BuildError: when torch is not installed.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            f"torch is not installed in {sys.prefix}. To mend it: install the locked environment first "
            "(`make setup`)."
        )
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    return found[1] if found else "unknown"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Wait until no other process builds into this cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process builds into this cache; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached_wheel(folder: Path) -> Path | None:
    """The wheel of a finished build; folders appear by rename, so what is there is whole."""
    return next(iter(sorted(folder.glob("*.whl"))), None)


def num_jobs() -> int:
    """Compilers at a time: one per core, as far as memory reaches (2.5 GiB each)."""
    cores = len(os.sched_getaffinity(0))
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
    memory = int(found[1]) * 1024 if found else JOB_BYTES
    return max(1, min(cores, int(memory / JOB_BYTES)))


def build_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the build."""
    return {
        **environment,
        **build_flags(environment),
        "MAX_JOBS": environment.get("MAX_JOBS", str(num_jobs())),
    }


def build(folder: Path, environment: Mapping[str, str]) -> Path:
    """Compile into a folder beside `folder`, then rename.

    Raises:
        BuildError: when something is missing or the build fails.
    """
    check_means(folder.parent, environment)
    say(f"compiling mmcv's operators for torch {torch_version()} ({environment['MAX_JOBS']} at a time).")
    say("This happens once per machine and usually takes 5 to 10 minutes on two cores.")
    log = folder.parent / f"{folder.name}.log"
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as place:
        out = Path(place) / "wheel"
        # pip's own cache keeps wheels by source alone: one for another torch would fit by name.
        command = [
            *(sys.executable, "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps"),
            *("--no-build-isolation", "--no-binary", PACKAGE, "--require-hashes"),
            *("--requirement", str(LOCK_FILE), "--wheel-dir", str(out)),
        ]
        # Objects are large and /tmp is often small: everything happens inside the cache folder.
        started = time.monotonic()
        status = run_logged(command, {**environment, "TMPDIR": place}, log)
        wheel = cached_wheel(out) if status == 0 else None
        if wheel is None:
            raise BuildError(why_failed(log))
        (out / "flags.json").write_text(
            json.dumps(build_flags(environment), indent=2) + "\n", encoding="utf-8"
        )
        shutil.rmtree(folder, ignore_errors=True)
        out.rename(folder)
    say(f"compiled in {(time.monotonic() - started) / 60:.1f} minutes, kept in {folder}")
    return folder / wheel.name


def check_means(place: Path, environment: Mapping[str, str]) -> None:
    """Say what is missing before minutes are spent.

    Raises:
        BuildError: no compiler, no Python headers, no disk.
    """
    compiler = environment.get("CXX", "c++")
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        raise BuildError(
            f"There is no C++ compiler ('{compiler}' is not on the path), and mmcv's operators must be "
            "compiled. To mend it: install one (Debian and Ubuntu: `apt-get install g++`)."
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise BuildError(
            f"Python's headers are missing ({header}). To mend it: install them (Debian and Ubuntu: "
            f"`apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev`)."
        )
    free = shutil.disk_usage(place).free
    if free < MIN_FREE_BYTES:
        raise BuildError(
            f"Building needs {MIN_FREE_BYTES / GIB:.0f} GiB of disk for a while, {place} has "
            f"{free / GIB:.1f}. To mend it: free some space, or set VITPIPE_CACHE to another disk."
        )


def run_logged(command: list[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command with its output in a file; say now and then how far the compiler is."""
    noted = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            done = re.match(r"\s*\[(\d+)/(\d+)\]", line)
            if done and time.monotonic() - noted > SECONDS_BETWEEN_NOTES:
                noted = time.monotonic()
                say(f"  {done[1]} of {done[2]} files compiled")
        return process.wait()


def why_failed(log: Path) -> str:
    """One paragraph from the build's log."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = [line.strip() for line in text.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
    unknown = (errors[0][:160] if errors else "see the log", "read the log")
    known = ((cause, mend) for pattern, cause, mend in KNOWN_FAILURES if re.search(pattern, text))
    cause, mend = next(known, unknown)
    return f"mmcv's operators were not built: {cause}. Log: {log}. To mend it: {mend}, then run this again."


def install(wheel: Path) -> None:
    """Install the wheel into this environment without touching anything else.

    Raises:
        BuildError: when pip refuses it or the operators do not load.
    """
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
        *("--force-reinstall", str(wheel)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        command = [sys.executable, "-c", "import torch, mmcv._ext"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise BuildError(
            f"The wheel cannot be used here ({reason}). To mend it: run `{Path(sys.executable).name} "
            f"docker/build_ops.py --rebuild`. Wheel: {wheel}."
        )
    say(f"installed {wheel.name}")


if __name__ == "__main__":
    sys.exit(main())
