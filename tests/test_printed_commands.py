"""Commands in messages can be pasted: they parse in a shell, and their verbs and options exist."""

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from vitpipe import cli

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for package in ("vitpipe", "pipelines", "components")
    for path in sorted((ROOT / package).rglob("*.py"))
]
COMMAND = re.compile(r"`((?:PATH=\S+ )?(?:vitpipe|dvc|git|mlflow|kfp) [^`]+)`")
VALUE = "0"  # stands for what a message fills in
# Named as a kind of command and not to be typed: the words that follow a verb in prose.
NAMES_A_KIND = {"vitpipe run STAGE ..."}


def _texts(tree):
    """The constant texts of a module without its docstrings, and its f-strings with values filled in."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in documentation | inside
        ):
            yield node.value


def _printed():
    found = {}
    for path in SOURCES:
        for text in _texts(ast.parse(path.read_text(encoding="utf-8"))):
            for command in COMMAND.findall(text):
                if command not in NAMES_A_KIND:
                    found[command] = str(path.relative_to(ROOT))
    return found


PRINTED = _printed()


@pytest.fixture(scope="module")
def program():
    cli._mount_engine_verbs()
    return typer.main.get_command(cli.app)


def test_there_are_commands_to_check():
    assert len(PRINTED) > 25
    assert sum(command.startswith("vitpipe") for command in PRINTED) > 15


@pytest.mark.parametrize("command", PRINTED)
def test_a_printed_command_is_one_for_a_shell(command):
    assert not set("<>|;*?") & set(command), PRINTED[command]
    assert (
        shutil.which("sh") is None or subprocess.run(["sh", "-n", "-c", command], check=False).returncode == 0
    )


@pytest.mark.parametrize("command", [command for command in PRINTED if command.startswith("vitpipe")])
def test_a_printed_command_of_ours_is_accepted_by_the_parser(program, command):
    words = shlex.split(command)[1:]
    if words[0] in ("--help", "--version"):
        return
    verb = program
    while getattr(verb, "commands", None) and words and not words[0].startswith("-"):
        assert words[0] in verb.commands, PRINTED[command]
        verb = verb.commands[words.pop(0)]
    # Arguments that a message leaves to the reader are not asked for; a wrong option or value is an error.
    if words and not any(param.required for param in verb.params):
        verb.make_context("vitpipe", list(words))
    else:
        _check_options(verb, words)


def _check_options(verb, words):
    known = {text for param in verb.params for text in param.opts} | {"--help"}
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
    assert not unknown, unknown
