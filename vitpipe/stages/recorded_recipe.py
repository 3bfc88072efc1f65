"""The recipe of finished outputs, and whether they are what it and each other's cards say.

A folder may have been run by hand, with `--set`, or belong to an earlier state of `params.yaml`; the recipe
of a run then says less than the cards of its stages.
"""

from __future__ import annotations

from pathlib import Path

from vitpipe.config.digest import digest_of, recipe_digest
from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.config.recorded import recipe_as_recorded
from vitpipe.contracts.artifact import CARD, open_artifact
from vitpipe.contracts.graph import all_stages
from vitpipe.report.results import RunResults
from vitpipe.stages.chosen_code import chosen_values


def recipe_of_cards(folder: Path) -> Recipe | None:
    """The recipe of a run whose stage `report` has not run, from the cards and records of its stages.

    A stage's section is what its own record says; everything else is from the stage that ran last. `None`
    when no stage is finished there.

    Raises:
        RecipeError: when the recipe or the values cannot be read any more.
    """
    finished = {
        stage: open_artifact(folder / stage) for stage in all_stages() if (folder / stage / CARD).is_file()
    }
    if not finished:
        return None
    last = max(finished.values(), key=lambda artifact: artifact.run.started_at)
    name, profile = last.card.recipe, last.card.profile
    if not last.run.values:
        # Of an earlier version, or damaged: what was set beside the recipe's file is not known.
        return load_recipe(name, profile, [f"seed={last.card.seed}"])
    own = {
        stage: artifact.run.values[stage]
        for stage, artifact in finished.items()
        if stage in artifact.run.values
    }
    return recipe_as_recorded(name, profile, {**last.run.values, **own})


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
