"""uv: which one, what it is given to install, what it says.

Standard library only; used by `install.py`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

SECONDS_OF_SILENCE = 10.0
LARGE_MIB = 100
# Only torch's CUDA build needs these; of the 6.5 GB they are more than half.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")
# What uv says (any of it, ignoring case), what it means, how to correct it; the first that fits.
KNOWN_FAILURES = (
    (
        r"no space left|os error 28|quota exceeded",
        "the disk is full",
        "free 7 GB where the checkout and uv's cache are; UV_CACHE_DIR names another folder for the cache",
    ),
    (
        r"permission denied|read-only file system|failed to initialize cache",
        "uv's cache, or the folder of the environment, cannot be written",
        "set UV_CACHE_DIR to a folder that you may write to, and see that the checkout is one",
    ),
    (
        r"hash mismatch|hashes are not",
        "a package is not the one that the lock names",
        "check which index the packages come from (UV_DEFAULT_INDEX); a proxy may serve changed files",
    ),
    (
        r"dns error|error sending request|connection refused|connection reset|network is unreachable|"
        r"timed out|tunnel|failed to fetch|could not connect|name resolution|certificate",
        "packages cannot be fetched",
        "check the network and the index: uv reads UV_DEFAULT_INDEX, HTTPS_PROXY and SSL_CERT_FILE, and does "
        "not read pip's settings",
    ),
    (
        r"zip|corrupt|deserialize|failed to read|failed to extract|unexpected end|missing.*dist-info|RECORD",
        "a package in uv's cache is damaged",
        "remove the cache ({cache}), which is filled again, and run this again",
    ),
)


class SetupError(Exception):
    """Why there is no environment: one paragraph with the fix."""


def say(line: str) -> None:
    """One line for the person who waits."""
    print(f"make: {line}", flush=True)


# The lock


def locked(lock_file: Path) -> dict[str, str]:
    """Package -> its lines of a lock file: requirement, marker, hashes."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for block in blocks[1:]:
        name = re.split(r"[=\s;\[]", block, maxsplit=1)[0].lower()
        found[name] = found.get(name, "") + block  # twice where Pythons take different versions
    return found


def requirement_files(lock_file: Path, scratch: Path, torch_index: str) -> list[tuple[Path, list[str]]]:
    """The files to install one after the other, each with its options.

    Args:
        scratch: where files may be written.
        torch_index: where torch and torchvision come from, by the locked version and without the packages
            that only CUDA needs; their hashes are another index's, so they cannot be compared. Empty for the
            index of all packages.
    """
    if not torch_index:
        return [(lock_file, ["--require-hashes"])]
    blocks = locked(lock_file)
    own, rest = scratch / "torch.txt", scratch / "rest.lock"
    special = ("torch", "torchvision")
    own.write_text("".join(f"{blocks[name].split()[0]}\n" for name in special), encoding="utf-8")
    rest.write_text(
        "".join(b for n, b in blocks.items() if n not in special and not n.startswith(CUDA_PACKAGES)),
        encoding="utf-8",
    )
    say(f"torch and torchvision come from {_without_password(torch_index)}; their checksums are not compared")
    return [(rest, ["--require-hashes"]), (own, ["--default-index", torch_index])]


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


# The program


def find_uv(lock_file: Path, scratch: Path) -> Path:
    """A uv on the path that is at least the locked one, else the locked one, fetched by pip.

    Raises:
        SetupError: when this Python has no pip, or pip cannot fetch it.
    """
    pin = locked(lock_file)["uv"]
    least = _version(pin.split()[0])
    there = shutil.which("uv")
    if there and _version(_output([there, "--version"])) >= least:
        return Path(there)
    requirement = scratch / "uv.txt"
    requirement.write_text(pin, encoding="utf-8")
    target = scratch / "uv"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--target", str(target), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return target / "bin" / "uv"
    if "No module named pip" in done.stderr:
        raise SetupError(
            f"{sys.executable} has no pip, which is needed once to fetch uv. Fix: install it (Debian and "
            "Ubuntu: apt-get install python3-pip), or put uv on the path (pipx install uv)."
        )
    raise SetupError(explain(done.stderr))


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0,)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(uv: Path, *arguments: str) -> None:
    """Run uv, pass on what it says about progress.

    Raises:
        SetupError: with the reason, when it fails.
    """
    command = [str(uv), *arguments, "--no-progress"]
    heard: list[str] = []
    last = [time.monotonic()]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        done = threading.Event()
        threading.Thread(target=_tell_when_silent, args=(done, last), daemon=True).start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                heard.append(line)
                if worth_saying(line):
                    last[0] = time.monotonic()
                    say(f"  {line.strip()}")
        except BaseException:
            process.terminate()
            raise
        finally:
            done.set()
    if process.returncode:
        raise SetupError(explain("".join(heard)))


def worth_saying(line: str) -> bool:
    """Whether a line of uv's is progress: a finished step, or a download that takes a while."""
    size = re.match(r"\s*Downloading .*\(([\d.]+)(MiB|GiB)\)", line)
    if size:
        return size[2] == "GiB" or float(size[1]) >= LARGE_MIB
    return re.match(r"\s*(Prepared|Installed)", line) is not None


def _tell_when_silent(done: threading.Event, last: list[float]) -> None:
    started = time.monotonic()
    while not done.wait(1.0):
        if time.monotonic() - last[0] > SECONDS_OF_SILENCE:
            last[0] = time.monotonic()
            say(f"  still working, {last[0] - started:.0f} s")


def explain(text: str) -> str:
    """One paragraph from what uv or pip said."""
    # uv draws the chain of causes as a tree.
    lines = [re.sub(r"^[\s×╰─▶├│]*(error: )?", "", line) for line in text.splitlines() if line.strip()]
    tail = " ".join(lines[-3:])[:500] or "no message"
    known = (
        (cause, fix) for pattern, cause, fix in KNOWN_FAILURES if re.search(pattern, text, re.IGNORECASE)
    )
    cause, fix = next(known, ("a step failed", "see the reason that follows"))
    fix = fix.format(cache=cache_folder())
    return (
        f"The environment was not made: {cause}; nothing has been changed. Fix: {fix}. The last lines: {tail}"
    )


def cache_folder() -> str:
    """Where uv keeps packages."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "uv")  # noqa: PTH118 - ~ is shown
    return os.environ.get("UV_CACHE_DIR") or default
