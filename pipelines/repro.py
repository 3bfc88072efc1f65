"""Run `dvc.yaml` with DVC, stages that do not depend on each other at the same time.

`dvc repro` runs one stage after the other. DVC's documentation advises to start it several times by hand for
more; this module does that, in the order of the graph.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from vitpipe.config.recipe import Recipe
from vitpipe.config.resolve import num_threads
from vitpipe.contracts.errors import ArtifactError, EngineError, StoppedError
from vitpipe.contracts.graph import Node
from vitpipe.contracts.processes import sigterm_interrupts, start_reading
from vitpipe.stages.folder_lock import holder_of, locked_folders
from vitpipe.stages.identity import IDENTITY, check_dvc_folder

_BIN = Path(sys.executable).parent
# DVC: dies with this process, its stage with it, and it can be interrupted: a shell's background job, such as
# `nohup make demo &`, ignores SIGINT, and so would all that it starts.
_STARTED = (
    "import os, sys; from signal import SIG_DFL, SIGINT, signal; "
    "from vitpipe.contracts.processes import TIED_VARIABLE, die_with_parent; "
    "die_with_parent(int(sys.argv[1])); signal(SIGINT, SIG_DFL); "
    "os.environ[TIED_VARIABLE] = str(os.getpid()); os.execv(sys.argv[2], sys.argv[2:])"
)
# What DVC says of its own work in every call. Its errors and warnings stay, which --quiet would hide, too.
_USUAL = (
    "Running stage '",
    "> ",
    "Updating lock file ",
    "Generating lock file ",
    "Use `dvc push` ",
    "To track the changes with git",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Data and pipelines are up to date",
)


def jobs_for(recipe: Recipe) -> int:
    """Stages that this machine should run at the same time: on a CPU one per core if each uses one thread."""
    alone = num_threads(recipe.model.entry.classifier_params) is None or Path("/dev/nvidia0").exists()
    return 1 if alone else len(os.sched_getaffinity(0))


def repro(nodes: Sequence[Node], jobs: int, say: Callable[[str], None]) -> None:
    """Run every stage of `dvc.yaml` that has changed.

    After a failure no further stage is started; those that are running end as usual.

    Args:
        nodes: the graph.
        jobs: stages at the same time.
        say: gets every line that DVC and the stages print, with the stage's name in front.

    Raises:
        InputError: as `check_dvc_folder`.
        EngineError: a stage failed, this is no DVC repository, or another process does this here.
        StoppedError: Ctrl-C or SIGTERM; the stages that were running have saved their states.
    """
    check_dvc_folder(Path.cwd())
    if not Path(".dvc").is_dir():
        raise EngineError(
            "There is no DVC repository here",
            where=Path.cwd(),
            fix="go to the folder of params.yaml and dvc.yaml, or run `dvc init` (outside of git "
            "`dvc init --no-scm`)",
        )
    if not Path("dvc.yaml").is_file():
        raise EngineError("There is no dvc.yaml here", where=Path.cwd(), fix="run `vitpipe compile --dvc`")
    with _alone():
        _drop_cut_lock()
        _run_all(nodes, jobs, say)


@contextmanager
def _alone() -> Iterator[None]:
    """Hold the folder: of two processes, one would find the other's stages locked by DVC in the middle."""
    lock = Path(".dvc/tmp/repro")
    holder = holder_of(lock)
    with ExitStack() as held:
        try:
            held.enter_context(locked_folders(lock, wait_seconds=0, say=lambda line: None))
        except ArtifactError as error:
            raise EngineError(
                f"`vitpipe repro` runs here already{f' ({holder})' if holder else ''}",
                where=Path.cwd(),
                fix="wait for it or stop it",
            ) from error
        yield


def _run_all(nodes: Sequence[Node], jobs: int, say: Callable[[str], None]) -> None:
    # First and once: DVC would run `identity` in every call, and all others read what it writes.
    needs = {IDENTITY: set[str]()} | {node.name: {IDENTITY, *node.inputs.values()} for node in nodes}
    urgent, calls = _urgency(nodes), _Calls(say)
    done, failures, running = set[str](), dict[str, int](), dict[Future[int], str]()
    with sigterm_interrupts(), ThreadPoolExecutor(jobs) as pool:
        try:
            while needs or running:
                ready = sorted((name for name in needs if needs[name] <= done), key=urgent.__getitem__)
                for name in ready[: 0 if failures else jobs - len(running)]:
                    del needs[name]
                    running[pool.submit(calls.run, name)] = name
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    name, code = running.pop(future), future.result()
                    done.add(name)
                    if code:
                        failures[name] = code
                    elif name == IDENTITY and calls.is_current():
                        return
        except KeyboardInterrupt as stop:
            calls.interrupt_until_ended(running)
            raise StoppedError(
                "Stopped; finished stages and saved training states are kept",
                where=", ".join(sorted(running.values())),
                fix="the same command goes on from there",
                by=stop.args[0] if stop.args else signal.SIGINT,
            ) from stop
    if failures:
        names = ", ".join(f"'{name}' (exit code {code} of DVC)" for name, code in failures.items())
        raise EngineError(
            f"Failed: {names}; its own message is above",
            where="dvc repro",
            fix="correct the cause and run the same command again; finished stages are kept",
        )


def _drop_cut_lock() -> None:
    """Remove DVC's list of locked files if a killed process left it half-written.

    DVC 3.67 overwrites the list in place and refuses to start while it is no JSON; entries of processes that
    have ended it drops by itself.
    """
    listing = Path(".dvc/tmp/rwlock")
    if not listing.is_file() or _is_json(listing):
        return
    # Imported here, because it takes a second and is needed after a kill only.
    from dvc.lock import make_lock

    # Under DVC's own guard: without it the file may only be half-written *yet*, by a DVC that is alive.
    with make_lock(str(listing.with_suffix(".lock")), tmp_dir=str(listing.parent)):
        if not _is_json(listing):
            listing.unlink()


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _urgency(nodes: Sequence[Node]) -> dict[str, tuple[int, int]]:
    """Sort key of every stage, lowest first: by the longest chain behind it, then by its GPUs on a cluster.

    What is long, as training is, shall not start last, when nothing else is left to run beside it.
    """
    chain = dict.fromkeys((node.name for node in nodes), 0)
    for node in reversed(nodes):
        for feeder in node.inputs.values():
            chain[feeder] = max(chain[feeder], chain[node.name] + 1)
    keys = {node.name: (-chain[node.name], -node.stage.resources.gpus) for node in nodes}
    return {IDENTITY: (0, 0), **keys}


def _is_usual(line: str) -> bool:
    # Of a failed stage we say ourselves that it failed.
    is_repeated = line.startswith("ERROR: failed to reproduce") and "failed to run:" in line
    is_skipped = line.startswith("Stage '") and line.endswith("didn't change, skipping")
    return line.startswith(_USUAL) or is_skipped or is_repeated


class _Calls:
    """Calls of `dvc repro` for one stage each; all of them can be interrupted."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, stage: str) -> int:
        """Run a stage if it has changed; the exit code."""
        # --single-item, because what feeds it has been run before, and the stage `identity` would run again.
        # The lock is held for moments only: while a stage works, DVC gives it back.
        command = [str(_BIN / "dvc"), "--wait-for-lock", "repro", "--single-item", stage]
        process = start_reading(
            [sys.executable, "-c", _STARTED, str(os.getpid()), *command],
            # `dvc` runs `vitpipe` from the PATH.
            {"PATH": os.pathsep.join((str(_BIN), os.environ.get("PATH", "")))},
        )
        self._running.add(process)
        assert process.stdout is not None  # stdout=PIPE
        for line in process.stdout:
            text = line.strip("\r\n")
            if text.strip() and not _is_usual(text.strip()):
                # The lines of training have it already.
                self._say(text if text.startswith(f"{stage}:") else f"{stage}: {text}")
        code = process.wait()
        self._running.discard(process)
        return code

    def is_current(self) -> bool:
        """Whether DVC finds every stage but `identity`, which it always runs, as it was."""
        # One question in place of a call per stage, each of which takes two seconds to find nothing to do.
        done = subprocess.run([str(_BIN / "dvc"), "status", "--json"], capture_output=True, check=False)
        try:
            return done.returncode == 0 and set(json.loads(done.stdout)) <= {IDENTITY}
        except ValueError:
            return False  # the calls will say what is wrong

    def interrupt_until_ended(self, calls: Iterable[Future[int]]) -> None:
        """Do what Ctrl-C in a terminal does, once more for every further one, and wait for the end.

        DVC waits for its stage, which saves its state after the first and ends at once after the second.
        """
        while True:
            for process in tuple(self._running):
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGINT)
            try:
                wait(calls)
                return
            except KeyboardInterrupt:
                continue
