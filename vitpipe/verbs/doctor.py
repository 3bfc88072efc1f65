"""The verb `doctor`: check datasets or this machine; every finding names its fix."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitpipe.contracts.errors import InputError, VitpipeError, shortened
from vitpipe.contracts.shell import with_typed_commands
from vitpipe.verbs.completion import complete_dataset
from vitpipe.verbs.options import JsonOption, ParamsOption, ProfileOption, RecipeOption, SetOption
from vitpipe.verbs.run_folders import check_run_place
from vitpipe.verbs.show import print_progress, print_rows

if TYPE_CHECKING:
    from vitpipe.prepare.findings import Finding


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="doctor")(doctor)


def doctor(
    data: Annotated[
        Path | None, typer.Option("--data", help="folder with imagenet/, coco/, ..., or a prepared folder")
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            help="with --data: only this one, may be repeated  [default: all that exist]",
            autocompletion=complete_dataset,
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="with --data: decode every image instead of a sample")
    ] = False,
    checksums: Annotated[
        bool,
        typer.Option(
            "--checksums", help="with --data: read archives or shards completely, compare checksums"
        ),
    ] = False,
    recipe: RecipeOption = None,
    profile: ProfileOption = None,
    overrides: SetOption = None,
    params: ParamsOption = Path("params.yaml"),
    as_json: JsonOption = False,
) -> None:
    """Check datasets (--data) or this machine without changing anything. Exit code 2 if there are errors.

    The machine is checked for the recipe of params.yaml, or the one of --recipe, --profile and --set.
    """
    _refuse_former_spelling(overrides, data)
    if data is None:
        if datasets or deep or checksums:
            raise typer.BadParameter("--dataset, --deep and --checksums need --data DIR")
        is_chosen = bool(recipe or profile or overrides or params != Path("params.yaml"))
        findings = _show_machine(recipe, profile, overrides, params, as_json, is_chosen=is_chosen)
    else:
        if recipe or profile or overrides:
            raise typer.BadParameter(
                "--recipe, --profile and --set act on the check of this machine: leave --data out"
            )
        findings = _show_datasets(data, datasets, as_json, deep=deep, checksums=checksums)
    # Exit code 2 means wrong input, as in every verb; warnings and notes do not fail a script.
    if any(finding.level == "error" for finding in findings):
        raise typer.Exit(2)


def _refuse_former_spelling(overrides: Sequence[str] | None, data: Path | None) -> None:
    # Until 0.1 `doctor --set NAME` named a dataset; --set means the same in every verb now.
    if named := [text for text in overrides or () if "=" not in text]:
        again = ["vitpipe", "doctor", "--data", str(data or "/data")]
        again += [word for name in named for word in ("--dataset", name)]
        raise InputError(
            f"--set takes section.key=value, as in every verb; '{shortened(named[0])}' is none",
            where="--set",
            fix=f"a dataset is named by --dataset: `{shlex.join(again)}`",
        )


def _show_machine(
    recipe: str | None,
    profile: str | None,
    overrides: list[str] | None,
    params: Path,
    as_json: bool,
    *,
    is_chosen: bool,
) -> list[Finding]:
    # Imported here: `vitpipe --help` must stay below 0.5 s of CPU time.
    from vitpipe.config.params_file import choose
    from vitpipe.config.read import ARTIFACTS, load_recipe, run_folder
    from vitpipe.prepare.findings import Finding
    from vitpipe.stages.identity import check_dvc_folder
    from vitpipe.verbs.machine import examine_machine

    loaded, run, mistakes = None, ARTIFACTS, []
    # Outside of a project there is none, and the machine can be checked all the same.
    if is_chosen or params.exists():
        try:
            chosen = choose(recipe, profile, overrides or (), params, default_profile="demo")
            loaded = load_recipe(chosen.recipe, chosen.profile, chosen.overrides)
            run = run_folder(chosen.recipe, chosen.profile)
            check_run_place(run)
        except VitpipeError as error:
            if is_chosen:
                raise
            mistakes.append(Finding.of(error))
    try:
        check_dvc_folder(Path.cwd())
    except VitpipeError as error:
        mistakes.append(Finding.of(error))
    rows, findings = examine_machine(Path.cwd(), loaded, run)
    findings = [*mistakes, *findings]
    if as_json:
        _print_json({"machine": rows, "findings": [asdict(finding) for finding in findings]})
    else:
        print_rows(rows, False, "This machine")
        _print_findings(findings)
    return findings


def _show_datasets(
    data: Path, datasets: list[str] | None, as_json: bool, *, deep: bool, checksums: bool
) -> list[Finding]:
    from vitpipe.prepare.dataset_doctor import examine
    from vitpipe.prepare.findings import COUNTS

    # Progress goes to stderr: stdout is the result, which --json makes readable for programs.
    reports = examine(data, datasets, deep=deep, checksums=checksums, say=print_progress)
    if as_json:
        _print_json([asdict(report) for report in reports])
    else:
        print_rows([report.table() for report in reports], False, right=COUNTS)
        for report in reports:
            print(f"{report.dataset}: {report.form or 'not usable'}")
            _print_findings(report.findings)
    return [finding for report in reports for finding in report.findings]


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _print_findings(findings: Sequence[Finding]) -> None:
    for level in ("error", "warning", "note"):  # most severe first
        for finding in findings:
            if finding.level == level:
                print(f"{with_typed_commands(str(finding))}\n")
    if not any(finding.level in ("error", "warning") for finding in findings):
        print("Nothing to fix.\n")
