"""Ask the machine's programs (NVIDIA's driver, git, Docker) what runs would find; nothing waits for long."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distribution
from pathlib import Path

from vitpipe.config.digest import git_commit
from vitpipe.contracts.address import hidden
from vitpipe.contracts.discovery import PACKAGE
from vitpipe.contracts.errors import reason_of
from vitpipe.contracts.git import ask_git
from vitpipe.contracts.units import counted, format_bytes
from vitpipe.prepare.findings import Finding

Answer = tuple[str, list[Finding]]
"""What one probe found: the text of its row, and the findings that need a fix."""
PROBE_SECONDS = 8.0  # for all probes together, which run side by side
_PROGRAM_SECONDS = 5.0


def ask_all(probes: Mapping[str, Callable[[], Answer]], seconds: float = PROBE_SECONDS) -> dict[str, Answer]:
    """Every probe's answer, in their order; one that fails or does not end in time is said to have.

    Args:
        seconds: for all of them together.
    """
    answers: dict[str, Answer] = {}

    def ask(name: str, probe: Callable[[], Answer]) -> None:
        try:
            answers[name] = probe()
        # Whatever a library raises here is no reason to keep the other answers back.
        except Exception as error:
            what = f"{name} could not be examined ({reason_of(error)})"
            answers[name] = ("not examined", [Finding("warning", what, fix="examine it by hand")])

    # Daemons: a thread that hangs, on a dead network disk for example, does not keep the process alive.
    threads = [threading.Thread(target=ask, args=item, daemon=True) for item in probes.items()]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    silent = f"no answer within {seconds:g} s"
    missing = {
        name: (silent, [Finding("warning", f"{name} gives {silent}", fix="examine it by hand")])
        for name in probes
    }
    return {name: answers.get(name, missing[name]) for name in probes}


def examine_gpus() -> Answer:
    """Name, memory and driver of every GPU, as nvidia-smi says: importing torch takes seconds."""
    absent = "none: the CPU is used"
    if shutil.which("nvidia-smi") is None:
        if not Path("/proc/driver/nvidia/version").exists():
            return absent, []
        what = "The NVIDIA driver is loaded, but there is no nvidia-smi"
        return "not examined", [Finding("warning", what, fix="install the driver's tools (nvidia-utils)")]
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=_PROGRAM_SECONDS, check=False)
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not rows or any(len(row) != 3 for row in rows):
        said = " ".join((done.stdout + done.stderr).split())[:120]
        what = f"nvidia-smi finds no GPU ({said or f'exit code {done.returncode}'})"
        fix = "if there is a GPU, load or reinstall its driver; else nothing"
        return absent, [Finding("note", what, fix=fix)]
    shown = [f"{name}, {_memory(mebibytes)}, driver {driver}" for name, mebibytes, driver in rows]
    findings = _unused_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return "; ".join(f"{i}: {text}" for i, text in enumerate(shown)) if len(shown) > 1 else shown[0], findings


def _memory(mebibytes: str) -> str:
    # Virtual GPUs and some cards answer "[N/A]".
    return format_bytes(float(mebibytes) * 2**20, binary=True) if mebibytes.isdigit() else "memory unknown"


def _unused_gpus(visible: str | None) -> list[Finding]:
    findings = []
    if visible is not None and visible.strip() in ("", "-1"):
        what = "CUDA_VISIBLE_DEVICES hides every GPU: the CPU is used"
        findings.append(Finding("warning", what, fix="unset CUDA_VISIBLE_DEVICES"))
    if not _torch_has_cuda():
        what = "There is a GPU, but the installed torch is built without CUDA: the CPU is used"
        fix = "install torch's build for CUDA (pytorch.org/get-started)"
        findings.append(Finding("warning", what, fix=fix))
    return findings


def _torch_has_cuda() -> bool:
    try:
        text = Path(str(distribution("torch").locate_file("torch/version.py"))).read_text(encoding="utf-8")
    except (OSError, ImportError):
        return True  # not installed: another finding says that
    return not re.search(r"^cuda\b.*= None", text, re.MULTILINE)


def examine_git() -> Answer:
    """Commit and changes of the code, as every result records them."""
    if shutil.which("git") is None:
        what = "git is not installed: results cannot name the commit of their code"
        return "not installed", [Finding("warning", what, fix="install git")]
    try:
        head = ask_git(PACKAGE, "rev-parse", "HEAD", seconds=_PROGRAM_SECONDS)
        changed = ask_git(PACKAGE, "status", "--porcelain", seconds=_PROGRAM_SECONDS).splitlines()
    except subprocess.CalledProcessError as error:
        return _no_commit(error)
    branch = ask_git(PACKAGE, "rev-parse", "--abbrev-ref", "HEAD", seconds=_PROGRAM_SECONDS)
    value = f"commit {head[:12]} ({branch})"
    if changed:
        value += f", uncommitted: {counted(len(changed), 'path')}"
    if not git_commit().endswith("+changes"):  # as it is recorded: only code counts
        return value, []
    what = "The code has uncommitted changes: results say so, and nobody can restore that code"
    fix = "commit the changes before runs whose results count (`git status` lists them)"
    return value, [Finding("note", what, str(PACKAGE.parent), fix)]


def _no_commit(error: subprocess.CalledProcessError) -> Answer:
    said = " ".join(str(error.stderr or "").split())
    place = next((folder for folder in PACKAGE.parents if (folder / ".git").exists()), None)
    if "safe.directory" in said and place is not None:
        what = "git refuses the repository of the code, which belongs to another user: results name no commit"
        fix = f"`git config --global --add safe.directory {shlex.quote(str(place))}`"
        return "refused", [Finding("warning", what, str(place), fix)]
    if place is None:
        what = "The code lies in no git repository: results cannot name its commit"
        fix = "run from a clone of the repository if results must be traceable to their code"
        return "no repository", [Finding("note", what, str(PACKAGE.parent), fix)]
    what = f"git cannot tell the commit of the code ({hidden(said)[:120]})"
    fix = "make a first commit, or repair the repository (`git fsck`)"
    return "no commit", [Finding("warning", what, str(place), fix)]


_SOCKET_ERRORS = {
    "FileNotFoundError": "it does not run: there is no socket",
    "ConnectionRefusedError": "it does not run: the socket refuses connections",
    "PermissionError": "this user may not open its socket",
}


def examine_docker() -> Answer:
    """Version of the Docker engine that answers; only `vitpipe local` needs one."""
    use = "only `vitpipe local` needs it"
    try:
        import docker
    except ImportError:
        what = f"The Docker client for Python is not installed; {use}"
        return f"no client ({use})", [Finding("note", what, fix="install the extra vitpipe[kubeflow]")]
    try:
        engine = docker.from_env(timeout=int(_PROGRAM_SECONDS))
        return f"engine {engine.version()['Version']} answers ({use})", []
    except Exception as error:  # of docker, requests and the socket
        fix = "start Docker, or run the same stages without it by `dvc repro`"
        if "Permission denied" in str(error):
            fix = "add this user to the group docker and log in again"
        # docker-py nests the socket's error in two others, each of which prints those inside it.
        inner = next((kind for kind in _SOCKET_ERRORS if kind in str(error)), "")
        what = f"No Docker engine answers ({_SOCKET_ERRORS.get(inner) or reason_of(error)}); {use}"
        return f"no engine answers ({use})", [Finding("note", what, fix=fix)]
