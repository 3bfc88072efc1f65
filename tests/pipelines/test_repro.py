"""`vitpipe repro` on real DVC: order, stages at the same time, failures and interrupts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipelines.repro import _urgency, jobs_for, repro
from vitpipe.config.read import load_recipe
from vitpipe.contracts.errors import EngineError
from vitpipe.contracts.graph import TWO_CORES, Node, Stage, graph_of

pytestmark = pytest.mark.slow

DVC = str(Path(sys.executable).parent / "dvc")
FEEDERS = {"first": (), "left": ("first",), "right": ("first",), "last": ("left", "right")}
# Waits until the other one has started, 30 s at most.
MEETS = "touch {0}.started; for i in $(seq 300); do test -e {1}.started && break; sleep 0.1; done; test -e {1}.started"


def nodes() -> list[Node]:
    found = []
    for order, (name, feeders) in enumerate(FEEDERS.items()):
        stage = Stage(name, order, name, (), "train", "Artifact", TWO_CORES)
        found.append(Node(stage, {feeder: feeder for feeder in feeders}))
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with DVC, whose stages note their names in `order`."""
    monkeypatch.chdir(tmp_path)
    subprocess.run([DVC, "init", "--quiet", "--no-scm"], check=True)
    return tmp_path


def write(**commands: str) -> None:
    """`dvc.yaml` with the graph; stages that are not named only note that they ran."""
    stages = {"identity": {"cmd": "echo identity >> order", "always_changed": True}}
    for name, feeders in FEEDERS.items():
        does = commands.get(name, "true")
        stages[name] = {
            "cmd": f"({does}) && echo {name} >> order && echo {name} > {name}.out",
            "deps": [f"{feeder}.out" for feeder in feeders],
            "outs": [f"{name}.out"],
        }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))


@pytest.fixture(params=["bash", "dash"])
def shell(request, monkeypatch):
    """What DVC runs a command with; bash turns into it, dash (Debian's sh) waits for it."""
    path = shutil.which(request.param)
    if path is None:
        pytest.skip(f"no {request.param} here")
    monkeypatch.setenv("SHELL", path)
    return path


def in_a_process() -> subprocess.Popen[str]:
    """`repro` in a process of its own that a signal can be sent to."""
    paths = (str(Path(__file__).parent), str(Path(__file__).parents[2]))
    return subprocess.Popen(
        [sys.executable, "-c", "from test_repro import nodes, repro; repro(nodes(), 2, print)"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal, also where the tests run in the background, which ignores SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(folder: Path, *names: str) -> None:
    for _ in range(600):
        if all((folder / name).exists() for name in names):
            return
        time.sleep(0.1)
    raise AssertionError(f"not all of {names} have appeared")


def is_alive(number: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family_of(number: int) -> str:
    """What /proc says of a process and of its ancestors, for the message of a test."""
    said = []
    while number > 1 and (status := Path(f"/proc/{number}/status")).exists():
        said.append(f"{Path(f'/proc/{number}/cmdline').read_bytes()!r}\n{status.read_text()}")
        number = int(status.read_text().partition("PPid:")[2].split()[0])
    return "\n".join(said)


def ran(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_stages_that_do_not_need_each_other_run_at_the_same_time_and_finished_ones_once(folder):
    write(left=MEETS.format("left", "right"), right=MEETS.format("right", "left") + "; echo said")
    lines: list[str] = []
    repro(nodes(), 2, lines.append)
    order = ran(folder)
    assert (order[:2], sorted(order[2:4]), order[4:]) == (["identity", "first"], ["left", "right"], ["last"])
    assert "right: said" in lines
    repro(nodes(), 2, lines.append)
    assert ran(folder) == [*order, "identity"]


def test_one_job_keeps_the_order_of_the_graph(folder):
    write()
    repro(nodes(), 1, print)
    assert ran(folder) == ["identity", *FEEDERS]


def test_after_a_failure_what_runs_ends_and_nothing_else_starts(folder):
    # The other one is still at work when this one fails.
    write(left="echo wrong; exit 3", right="sleep 3")
    lines: list[str] = []
    with pytest.raises(EngineError, match=r"Failed: 'left' .*its own message is above"):
        repro(nodes(), 2, lines.append)
    assert "left: wrong" in lines
    assert ran(folder) == ["identity", "first", "right"]
    write(right="sleep 3")
    repro(nodes(), 2, lines.append)
    assert ran(folder)[3:] == ["identity", "left", "last"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_the_stages_that_run_and_waits_for_them(folder, number):
    saves = "trap 'sleep 1; touch {0}.saved; exit 130' INT; touch {0}.started; while :; do sleep 0.1; done"
    write(left=saves.format("left"), right=saves.format("right"))
    child = in_a_process()
    wait_for(folder, "left.started", "right.started")
    child.send_signal(number)
    said = child.communicate(timeout=60)[1]
    assert all((folder / f"{name}.saved").exists() for name in ("left", "right"))
    assert (
        "StoppedError: Stopped; finished stages and saved training states are kept. Where: left, right"
        in said
    )
    assert ran(folder) == ["identity", "first"]


def test_a_second_interrupt_ends_what_does_not_end_by_itself(folder):
    stubborn = "trap 'test -e {0}.first && exit 130; touch {0}.first' INT; touch {0}.started; while :; do sleep 0.1; done"
    write(left=stubborn.format("left"), right="true")
    child = in_a_process()
    wait_for(folder, "left.started", "right.out")
    child.send_signal(signal.SIGINT)
    wait_for(folder, "left.first")
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert "StoppedError: Stopped" in child.communicate(timeout=60)[1]


def test_stages_die_with_a_killed_repro(folder, shell):
    """After `kill -9` a stage that lived on would hold its folder against the next start."""
    (folder / "stage.py").write_text(
        "import os, pathlib, time\n"
        "from vitpipe.stages.launch import die_with_starter\n"
        "die_with_starter()\n"
        "pathlib.Path('pid').write_text(str(os.getpid()))\n"
        "pathlib.Path('left.started').touch()\n"
        "time.sleep(3000)\n"
    )
    write()
    graph = yaml.safe_load(Path("dvc.yaml").read_text())
    # Alone in its command, as in our dvc.yaml: bash becomes the stage.
    graph["stages"]["left"]["cmd"] = f"{sys.executable} stage.py"
    Path("dvc.yaml").write_text(yaml.safe_dump(graph))
    child = in_a_process()
    wait_for(folder, "left.started")
    # DVC's processes, too: one that has ended still holds its lock until somebody has asked for its exit code.
    calls = [
        int(number)
        for path in Path(f"/proc/{child.pid}/task").glob("*/children")
        for number in path.read_text().split()
    ]
    child.kill()
    child.communicate(timeout=60)
    number = int((folder / "pid").read_text())
    # Long, for a machine with other work: without the tie the stage would live for another 50 minutes.
    for _ in range(1200):
        if not is_alive(number) and not any(Path(f"/proc/{call}").exists() for call in calls):
            break
        time.sleep(0.1)
    assert calls
    assert not is_alive(number), family_of(number)
    write()
    repro(nodes(), 2, print)  # no lock of the killed one is in the way
    assert (folder / "last.out").exists()


def test_a_lock_list_that_a_kill_left_half_written_is_no_obstacle(folder):
    """DVC writes the list in place: killed in between, it leaves a file that it refuses to read."""
    write()
    listing = folder / ".dvc" / "tmp" / "rwlock"
    listing.write_text('{"write": {"first.out": {"pid": 1')
    said = subprocess.run([DVC, "repro", "first"], check=False, capture_output=True, text=True)
    assert "JSON structure is corrupted" in said.stderr
    repro(nodes()[:1], 1, print)
    assert ran(folder) == ["identity", "first"]
    listing.write_text("")
    repro(nodes()[:1], 1, print)


def test_what_dvc_itself_refuses_is_said(folder):
    """Not only that something failed: with --quiet DVC hides its errors, too."""
    write()
    graph = yaml.safe_load(Path("dvc.yaml").read_text())
    graph["stages"]["first"]["deps"] = ["absent.txt"]
    Path("dvc.yaml").write_text(yaml.safe_dump(graph))
    lines: list[str] = []
    with pytest.raises(EngineError, match=r"Failed: 'first' .*its own message is above"):
        repro(nodes(), 2, lines.append)
    assert any("absent.txt" in line and line.startswith("first: ERROR") for line in lines)
    write(left="echo wrong; exit 3")
    lines.clear()
    with pytest.raises(EngineError):
        repro(nodes(), 2, lines.append)
    # Nothing of DVC's usual talk, and the failure once.
    assert lines == ["left: wrong"]


def test_a_second_one_in_the_same_folder_is_refused_at_once(folder):
    write(left="touch left.started; sleep 3000")
    child = in_a_process()
    try:
        wait_for(folder, "left.started")
        with pytest.raises(EngineError, match=rf"runs here already \(process {child.pid} on "):
            repro(nodes(), 2, print)
    finally:
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=60)
    write()
    repro(nodes(), 2, print)


def test_a_folder_without_dvc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="There is no DVC repository here"):
        repro(nodes(), 2, print)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_graph(folder):
    with pytest.raises(EngineError, match=r"There is no dvc\.yaml here.*vitpipe compile --dvc"):
        repro(nodes(), 2, print)


def test_small_networks_share_the_cores_and_large_ones_do_not():
    alone = Path("/dev/nvidia0").exists()
    assert jobs_for(load_recipe("itpn/pixel_base", "demo")) == (1 if alone else len(os.sched_getaffinity(0)))
    assert jobs_for(load_recipe("itpn/pixel_base", "full")) == 1


def test_what_is_long_or_has_much_behind_it_comes_first():
    found = graph_of(load_recipe("itpn/pixel_base", "demo").stages)
    order = sorted((node.name for node in found), key=_urgency(found).__getitem__)
    assert order.index("intermediate") < order.index("finetune") < order.index("detect")
    assert order.index("segment") < order.index("probe")
