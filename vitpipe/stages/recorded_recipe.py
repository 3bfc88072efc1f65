"""Whether finished outputs are what a recipe and each other's cards say: facts for the verdict.

A folder may have been run by hand, with `--set`, or belong to an earlier state of `params.yaml`; the recipe
of a run then says less than the cards of its stages.
"""

from __future__ import annotations

from vitpipe.config.digest import digest_of, recipe_digest
from vitpipe.report.results import RunResults
from vitpipe.stages.chosen_code import chosen_values


def mismatches_of(run: RunResults) -> dict[str, str]:
    """Stage -> why its output is not one of the run's recipe and inputs; as `RunResults.mismatches`."""
    found: dict[str, str] = {}
    for node in run.nodes():
        artifact = run.artifacts.get(node.name)
        if artifact is None:
            continue
        # What prepare has made is judged by its digest; a table's seeds share it, whatever its card's seed.
        is_data = node.stage.kind == "Dataset"
        wanted = recipe_digest(run.recipe, node.stage.sections, chosen_values(run.recipe, node.stage))
        if not is_data and artifact.card.recipe_digest != wanted:
            found[node.name] = f"the output of {node.name} was made with other recipe values than the run's"
            continue
        # Of inputs that lie elsewhere, as those that the runs of a table share, nothing is known here.
        moved = [
            feeder
            for name, feeder in node.inputs.items()
            if feeder in run.artifacts
            and artifact.card.parents.get(name) != digest_of(run.artifacts[feeder].card)
        ]
        if moved:
            found[node.name] = f"the output of {node.name} was made from another output of {', '.join(moved)}"
    return found
