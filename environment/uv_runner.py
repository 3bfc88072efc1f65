"""Find uv, write the files that it installs from, run it, and explain its errors.

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

SECONDS_OF_SILENCE = 10.0  # after which a line shows that the installation is alive
LARGE_MIB = 100  # downloads from here on are shown: torch, triton and NVIDIA's libraries
# Only torch's CUDA build needs these: 4.1 of the 6.7 GB.
CUDA_PACKAGES = ("nvidia-", "cuda-", "triton")
# (pattern of uv's or pip's messages, ignoring case; cause; fix). The first match counts, so the order
# matters: a full disk also damages files, and a failed download may mention a zip.
KNOWN_FAILURES = (
    (
        r"no space left|os error 28|quota exceeded",
        "the disk is full",
        "free 7 GB on the disk of the checkout and of uv's cache, or set UV_CACHE_DIR to another disk",
    ),
    (
        r"permission denied|read-only file system|failed to initialize cache",
        "uv's cache, or the folder of the environment, cannot be written",
        "set UV_CACHE_DIR to a writable folder, and make the checkout writable",
    ),
    (
        r"hash mismatch|hashes are not",
        "the checksum of a package differs from the lock",
        "check which index the packages come from (UV_DEFAULT_INDEX); a proxy may serve modified files",
    ),
    (
        r"dns error|error sending request|connection refused|connection reset|network is unreachable|"
        r"timed out|tunnel|failed to fetch|could not connect|name resolution|certificate",
        "packages cannot be fetched",
        # People who have configured pip expect uv to use that.
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
    """Why the environment could not be installed: one paragraph with the fix."""


def say(line: str) -> None:
    """Print one line of progress."""
    # flush: stdout is block-buffered in CI, where a job without output is taken for hung.
    print(f"make: {line}", flush=True)


# The lock


def locked(lock_file: Path) -> dict[str, str]:
    """Package -> its lines of a lock file: requirement, marker, hashes."""
    # A package starts at the beginning of a line, its hashes are indented.
    blocks = re.split(r"^(?=[A-Za-z0-9])", lock_file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for block in blocks[1:]:
        name = re.split(r"[=\s;\[]", block, maxsplit=1)[0].lower()
        found[name] = found.get(name, "") + block  # several where Pythons need different versions
    return found


def requirement_files(lock_file: Path, scratch: Path, torch_index: str) -> list[tuple[Path, list[str]]]:
    """The requirement files to install one after the other, each with its options for uv.

    Args:
        scratch: folder for the files.
        torch_index: index for torch and torchvision in their locked versions, without the packages that
            only CUDA needs; empty for the index of all packages.
    """
    if not torch_index:
        return [(lock_file, ["--require-hashes"])]
    blocks = locked(lock_file)
    own, rest = scratch / "torch.txt", scratch / "rest.lock"
    special = ("torch", "torchvision")
    # Version only: another index has other builds, whose hashes the lock does not have.
    own.write_text("".join(f"{blocks[name].split()[0]}\n" for name in special), encoding="utf-8")
    rest.write_text(
        "".join(b for n, b in blocks.items() if n not in special and not n.startswith(CUDA_PACKAGES)),
        encoding="utf-8",
    )
    say(f"torch and torchvision come from {_without_password(torch_index)}; their checksums are not compared")
    # --require-hashes holds for a whole call of uv, hence two files.
    return [(rest, ["--require-hashes"]), (own, ["--default-index", torch_index])]


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//", address)


# The program uv


def find_uv(lock_file: Path, scratch: Path) -> Path:
    """A uv on the PATH that is at least the locked version, else the locked version, fetched by pip.

    Raises:
        SetupError: when this Python has no pip, or pip cannot fetch it.
    """
    pin = locked(lock_file)["uv"]
    least = _version(pin.split()[0])
    on_path = shutil.which("uv")
    # An older one has not been tried with this lock.
    if on_path and _version(_output([on_path, "--version"])) >= least:
        return Path(on_path)
    requirement = scratch / "uv.txt"
    requirement.write_text(pin, encoding="utf-8")
    target = scratch / "uv"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # A wheel with the locked hash into a temporary folder: pip must neither build nor change this Python.
    command += ["--only-binary=:all:", "--require-hashes", "--target", str(target), "-r", str(requirement)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return target / "bin" / "uv"
    if "No module named pip" in done.stderr:
        raise SetupError(
            f"{sys.executable} has no pip, which is needed once to fetch uv. Fix: install pip (Debian and "
            "Ubuntu: apt-get install python3-pip), or install uv (pipx install uv)."
        )
    raise SetupError(explain(done.stderr))


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0,)  # a uv that does not answer is too old


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(uv: Path, *arguments: str) -> None:
    """Run uv and print the lines of its output that show progress.

    Raises:
        SetupError: with the reason, when it fails.
    """
    # Progress bars would fill CI logs with thousands of lines.
    command = [str(uv), *arguments, "--no-progress"]
    messages: list[str] = []
    last = [time.monotonic()]  # of the last printed line; a list, because two threads share it
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        done = threading.Event()
        threading.Thread(target=_report_when_silent, args=(done, last), daemon=True).start()
        try:
            assert process.stderr is not None  # uv writes all its messages there
            for line in process.stderr:
                messages.append(line)
                if worth_saying(line):
                    last[0] = time.monotonic()
                    say(f"  {line.strip()}")
        except BaseException:
            process.terminate()
            raise
        finally:
            done.set()
    if process.returncode:
        raise SetupError(explain("".join(messages)))


def worth_saying(line: str) -> bool:
    """Whether a line of uv's output shows progress: a finished step, or a large download."""
    size = re.match(r"\s*Downloading .*\(([\d.]+)(MiB|GiB)\)", line)
    if size:
        return size[2] == "GiB" or float(size[1]) >= LARGE_MIB
    return re.match(r"\s*(Prepared|Installed)", line) is not None


def _report_when_silent(done: threading.Event, last: list[float]) -> None:
    started = time.monotonic()
    while not done.wait(1.0):
        if time.monotonic() - last[0] > SECONDS_OF_SILENCE:
            last[0] = time.monotonic()
            say(f"  still working, {last[0] - started:.0f} s")


def explain(text: str) -> str:
    """One paragraph that explains an error message of uv or pip."""
    # uv draws the chain of causes as a tree of box-drawing characters.
    lines = [re.sub(r"^[\s×╰─▶├│]*(error: )?", "", line) for line in text.splitlines() if line.strip()]
    tail = " ".join(lines[-3:])[:500] or "no message"  # the innermost causes are last
    known = (
        (cause, fix) for pattern, cause, fix in KNOWN_FAILURES if re.search(pattern, text, re.IGNORECASE)
    )
    cause, fix = next(known, ("a step failed", "correct the cause that the last lines name"))
    fix = fix.format(cache=cache_folder())
    return (
        f"The environment was not installed: {cause}; nothing has been changed. Fix: {fix}. "
        f"The last lines: {tail}"
    )


def cache_folder() -> str:
    """Folder of uv's cache, by uv's own rule (`UV_CACHE_DIR`, else XDG)."""
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "uv")  # noqa: PTH118 - ~ is shown
    return os.environ.get("UV_CACHE_DIR") or default
