"""Every `vitpipe` command in README and docs names a verb and options that exist."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = ("benchmark",)


def commands(page):
    """The commands in a page's code blocks and code spans, comments cut off."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    spans = re.findall(r"`(vitpipe [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    found = [*(line for line in lines if line.startswith("vitpipe ")), *spans]
    return [command.partition(" #")[0].strip() for command in found]


@cache
def options_of(verb):
    done = subprocess.run(
        [sys.executable, "-m", "vitpipe", *verb, "--help"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}, check=False,
    )  # fmt: skip
    return set(re.findall(r"--[a-z][a-z-]*", done.stdout)) if done.returncode == 0 else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_exist(page):
    for command in commands(page):
        words = shlex.split(command)[1:]
        verb = tuple(words[: 2 if words[0] in GROUPS else 1])
        known = options_of(verb)
        assert known is not None, f"{page.name}: there is no verb in '{command}'"
        unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - known
        assert not unknown, f"{page.name}: '{command}' has unknown options {unknown}"


def test_the_readme_has_commands_to_check():
    assert len(commands(ROOT / "README.md")) > 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
