"""A stand-in for the processes of stages: writes a finished output with invented numbers."""

from __future__ import annotations

from pathlib import Path

from prepared_tables import write_catalogue_tables

from vitpipe.config.digest import digest_of
from vitpipe.config.read import load_recipe
from vitpipe.contracts.artifact import Card, RunRecord, open_artifact, write_card, write_metrics, writing
from vitpipe.contracts.errors import RunError
from vitpipe.stages.run import identity_of, node_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeStages:
    """Takes the arguments of `vitpipe run`; `calls` holds what was run, `broken` what fails: (recipe, stage)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []
        self.broken: set[tuple[str, str]] = set()
        self.interrupted_at: tuple[str, str] | None = None

    def __call__(self, arguments, log, say) -> None:
        stage, options = arguments[1], arguments[2:]
        given: dict[str, list[str]] = {}
        for name, value in zip(options[::2], options[1::2], strict=True):
            given.setdefault(name, []).append(value)
        name, profile, out = given["--recipe"][0], given["--profile"][0], Path(given["--out"][0])
        recipe = load_recipe(name, profile, given.get("--set", []))
        self.calls.append((name, recipe.seed, stage))
        if (name, stage) == self.interrupted_at:
            self.interrupted_at = None
            raise KeyboardInterrupt
        if (name, stage) in self.broken:
            raise RunError("The loss is not finite", where=log, fix="lower the learning rate")
        inputs = {
            key: Path(folder) for key, _, folder in (text.partition("=") for text in given.get("--in", []))
        }
        self._write(recipe, stage, inputs, out)

    def _write(self, recipe, stage: str, inputs: dict[str, Path], out: Path) -> None:
        node = node_of(recipe, stage)
        assert set(inputs) == set(node.inputs)
        identity = identity_of(recipe, node.stage)
        smoothing = recipe.finetune.method.label_smoothing
        metrics = {"top1": 0.6 + 0.01 * recipe.seed + (0.1 if smoothing == 0.2 else 0.0), "params": 2.04e6}
        with writing(out) as folder:
            write_metrics(folder, metrics)
            if stage == "prepare" and recipe.profile != "demo":
                write_catalogue_tables(folder, ["imagenet"])
            write_card(folder, Card(
                stage=stage, recipe=recipe.name, profile=recipe.profile, recipe_digest=identity["recipe_digest"],
                data_digest="da" * 32, code_digest=identity["code_digest"], image=node.stage.image,
                identity=identity["identity"],
                parents={key: digest_of(open_artifact(path).card) for key, path in inputs.items()},
                seed=recipe.seed, libraries={},
            ), RunRecord(
                wall_seconds=1.0, git_commit=COMMIT, hardware={"processor": "Toy 1"}, started_at=f"2026-03-0{recipe.seed + 1}T10:00:00+00:00",
            ))  # fmt: skip
