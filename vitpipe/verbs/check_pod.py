"""The verb `check-pod`: whether a pod of a pipeline has what its package promises, before hours of work.

The first tasks of a package call it, one for each image and one on a node with a GPU. That a task's output
reaches the object store is shown by its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitpipe.contracts.errors import disk_errors
from vitpipe.verbs.options import ExecutorInputOption, FixedProfileOption, FixedRecipeOption


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command(name="check-pod", hidden=True)(check_pod)


def check_pod(
    recipe: FixedRecipeOption,
    profile: FixedProfileOption,
    executor_input: ExecutorInputOption,
    writable: Annotated[list[Path] | None, typer.Option(help="folder of a volume to write to")] = None,
    readable: Annotated[list[Path] | None, typer.Option(help="folder of a volume to read from")] = None,
    shm_gib: Annotated[float, typer.Option(help="what /dev/shm has to hold")] = 0.0,
    gpus: Annotated[int, typer.Option(help="GPUs that torch has to compute on")] = 0,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="MLflow has to answer and to be writable")] = False,
) -> None:
    """Check a pod's volumes, /dev/shm, GPUs, MLflow and code. Exit code 2 if something is missing.

    Compiled packages call this.
    """
    # Imported here, as in every verb: plugins are found only after this module has been imported.
    from vitpipe.contracts.files import write_whole
    from vitpipe.stages.executor import ExecutorIO
    from vitpipe.verbs import pod_probes
    from vitpipe.verbs.mlflow_probe import examine_mlflow
    from vitpipe.verbs.show import print_rows

    io = ExecutorIO(executor_input)
    answers = {
        **{str(folder): pod_probes.examine_writable(folder) for folder in writable or ()},
        **{str(folder): pod_probes.examine_readable(folder) for folder in readable or ()},
    }
    if shm_gib:
        answers["/dev/shm"] = pod_probes.examine_shm(shm_gib)
    if gpus:
        answers["GPUs"] = pod_probes.examine_torch_gpus(gpus)
    if mlflow:
        answers["MLflow"] = examine_mlflow(Path.cwd())
    answers["code"] = pod_probes.examine_code(io.recipe(recipe, profile), io.code_digests())
    rows = [{"what": name, "found": said} for name, (said, _) in answers.items()]
    print_rows(rows, False, "This pod")
    out = io.output_folder()
    with disk_errors(out):
        write_whole(out, json.dumps(rows, indent=2) + "\n")
    found = [finding for _, findings in answers.values() for finding in findings if finding.level != "note"]
    for finding in found:
        print(f"{finding}\n")
    if found:
        raise typer.Exit(2)
    io.finish_with_text("The pod has what its package promises.")
