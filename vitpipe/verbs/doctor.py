"""The verb `doctor`: check datasets or this machine; every finding names its fix."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpipe.contracts.shell import with_typed_commands
from vitpipe.verbs.show import print_rows

if TYPE_CHECKING:
    from vitpipe.prepare.findings import Finding


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="doctor")(doctor)


def doctor(
    data: Annotated[
        Path | None, typer.Option("--data", help="folder with imagenet/, coco/, ..., or a prepared folder")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="dataset, may be repeated  [default: all that exist]")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="decode every image instead of a sample")] = False,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="read archives or shards completely and compare checksums")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable output")] = False,
) -> None:
    """Check datasets (--data) or this machine without changing anything. Exit code 2 if there are errors."""
    findings: list[Finding]
    if data is None:
        if sets or deep or checksums:
            raise typer.BadParameter("--set, --deep and --checksums need --data DIR")
        # Imported here: `vitpipe --help` must stay below 0.5 s of CPU time.
        from vitpipe.verbs.machine import examine_machine

        rows, findings = examine_machine(Path.cwd())
        if as_json:
            _print_json({"machine": rows, "findings": [asdict(finding) for finding in findings]})
        else:
            print_rows(rows, False, "This machine")
            _print_findings(findings)
    else:
        from vitpipe.prepare.dataset_doctor import examine
        from vitpipe.prepare.findings import COUNTS

        # Progress goes to stderr: stdout is the result, which --json makes readable for programs.
        reports = examine(data, sets, deep=deep, checksums=checksums, say=_tell)
        findings = [finding for report in reports for finding in report.findings]
        if as_json:
            _print_json([asdict(report) for report in reports])
        else:
            print_rows([report.table() for report in reports], False, right=COUNTS)
            for report in reports:
                print(f"{report.dataset}: {report.form or 'not usable'}")
                _print_findings(report.findings)
    # Exit code 2 means wrong input, as in every verb; warnings and notes do not fail a script.
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(2)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _print_findings(findings: Sequence[Finding]) -> None:
    for level in ("error", "warning", "note"):  # most severe first
        for finding in findings:
            if finding.level == level:
                print(f"{with_typed_commands(str(finding))}\n")
    if not any(finding.level in ("error", "warning") for finding in findings):
        print("Nothing to fix.\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
