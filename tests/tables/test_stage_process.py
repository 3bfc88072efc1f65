"""A stage's process: what it says is kept, its error is one message, and an interrupt lets it save."""

from __future__ import annotations

import pytest

from vitpipe.contracts.errors import RunError
from vitpipe.tables import stage_process
from vitpipe.tables.stage_process import run_stage_process, stage_arguments


def test_the_arguments_are_those_of_the_verb_run(tmp_path):
    given = stage_arguments("finetune", "a/b", "demo", ["seed=1"], {"data": tmp_path / "d"}, tmp_path / "o")
    assert " ".join(given) == (
        f"run finetune --recipe a/b --profile demo --set seed=1 --in data={tmp_path}/d --out {tmp_path}/o"
    )


def test_a_typed_error_of_the_stage_is_the_message(tmp_path):
    said = []
    arguments = stage_arguments("pretain", "itpn/pixel_base", "demo", [], {}, tmp_path / "out")
    with pytest.raises(RunError, match="There is no stage 'pretain'") as caught:
        run_stage_process(arguments, tmp_path / "logs/a.log", said.append)
    assert caught.value.where == str(tmp_path / "logs/a.log")
    assert (tmp_path / "logs/a.log").read_text().rstrip("\n").split("\n") == said


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL, often for lack of memory",
        ),
        ("import sys; print('step 1'); sys.exit(3)", "exit code 3; last output: step 1"),
        ("raise RuntimeError('no route to https://me:hunter2@host/x')", r"https://me:\*\*\*@host/x"),
    ],
)
def test_other_ends_are_named(tmp_path, monkeypatch, code, message):
    monkeypatch.setattr(stage_process, "_TIED", code)
    with pytest.raises(RunError, match=message) as caught:
        run_stage_process([], tmp_path / "a.log", lambda line: None)
    assert "hunter2" not in str(caught.value)


def test_an_interrupted_stage_is_asked_to_stop_and_waited_for(tmp_path, monkeypatch):
    code = (
        "import signal, sys, time\n"
        "def save(*_): print('state saved', flush=True); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); print('at work', flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(stage_process, "_TIED", code)

    def interrupt(line: str) -> None:
        if line == "at work":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage_process([], tmp_path / "a.log", interrupt)
    assert (tmp_path / "a.log").read_text() == "at work\nstate saved\n"
