"""The stages of a table's runs among the records of pipeline runs, found by what their cards say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitpipe.config.digest import digest_of, recipe_digest
from vitpipe.contracts.artifact import Artifact
from vitpipe.stages.chosen_code import chosen_values
from vitpipe.tables.table_plan import StageWork, TableRun


class RecordedStages:
    """As `FinishedStages`, of records that lie anywhere.

    A record counts only if it was made by the present code with the recipe values of the wanted stage, and
    from the very inputs that were found for it. Which run of the pipeline left it does not matter: a task
    that Kubeflow takes from its cache leaves none.
    """

    def __init__(self, records: Sequence[Artifact]) -> None:
        self._by_values: dict[tuple[str, str], list[Artifact]] = {}
        for record in records:
            key = (record.card.stage, record.card.recipe_digest)
            self._by_values.setdefault(key, []).append(record)
        self._known: dict[str, list[Artifact]] = {}

    def folder(self, run: TableRun, stage: str) -> Path | None:
        """The folder of a stage's record; None when it has left none."""
        found = self._records(run, run.stages[stage])
        # A task that was tried again may have left two.
        return max(found, key=lambda item: item.run.started_at).path if found else None

    def _records(self, run: TableRun, work: StageWork) -> list[Artifact]:
        # Stages with one key do the same work on the same inputs: a package has one task for all of them.
        if work.key not in self._known:
            self._known[work.key] = self._look_up(run, work)
        return self._known[work.key]

    def _look_up(self, run: TableRun, work: StageWork) -> list[Artifact]:
        feeders = {
            name: {digest_of(item.card) for item in self._records(run, run.stages[feeder])}
            for name, feeder in work.node.inputs.items()
        }
        stage = work.node.stage
        digest = recipe_digest(work.recipe, stage.sections, chosen_values(work.recipe, stage))
        return [
            item
            for item in self._by_values.get((work.name, digest), ())
            if item.card.code_digest == work.identity["code_digest"]
            and item.card.parents.keys() == feeders.keys()
            and all(item.card.parents[name] in digests for name, digests in feeders.items())
        ]
