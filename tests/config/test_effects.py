"""Every recipe key has a decision on what it can change, and the decisions reach the identities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from vitpipe.config.head import HEADS
from vitpipe.config.method import METHODS
from vitpipe.config.model import FAMILIES
from vitpipe.config.read import load_recipe
from vitpipe.config.recipe import Recipe
from vitpipe.config.section import Effects, Section
from vitpipe.contracts.discovery import names_in, part_of
from vitpipe.contracts.graph import graph_of
from vitpipe.stages.run import identity_of, raw_data_of
from vitpipe.stages.weights_identity import weights_identity


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections_in(field.annotation)
    for inner in get_args(annotation):
        yield from sections_in(inner)


def every_section() -> list[type[Section]]:
    kinds = (FAMILIES, METHODS, HEADS)
    chosen = [part_of(kind, name, "config", "CONFIG") for kind in kinds for name in names_in(kind)]
    found = {section for root in (Recipe, *chosen) for section in sections_in(root)}
    return sorted(found, key=lambda section: section.__qualname__)


@pytest.mark.parametrize("section", every_section(), ids=lambda section: section.__qualname__)
def test_every_key_has_one_decision(section: type[Section]) -> None:
    assert section.undecided() == []
    own = vars(section).get("effects", Effects())
    named = own.weights | own.figures | own.nothing
    assert named <= set(section.model_fields), "a decision about a key that there is not"


def test_a_key_without_a_decision_is_found_and_counts() -> None:
    class Undecided(Section):
        effects = Effects(weights="both", figures="both")
        both: int = 1
        neither: int = 2

    assert Undecided.undecided() == ["both", "neither"]
    assert Undecided().acting(on_weights_only=True) == {"both": 1, "neither": 2}


def identities(*overrides: str) -> dict[str, tuple[str, str]]:
    recipe = load_recipe("itpn/pixel_base", "demo", overrides)
    return {
        node.name: (
            identity_of(recipe, node.stage)["identity"],
            weights_identity(node.stage, recipe, {})["recipe"],
        )
        for node in graph_of(recipe.stages)
    }


@pytest.mark.parametrize(
    ("override", "stage", "runs", "retrains"),
    [
        ("finetune.optim.base_lr=0.5", "finetune", True, True),
        ("finetune.method.label_smoothing=0.3", "finetune", True, True),
        ("finetune.eval_crop_ratio=0.5", "finetune", True, False),
        ("finetune.log_every_steps=3", "finetune", True, False),
        ("finetune.checkpoint_minutes=3", "finetune", False, False),
        ("segment.stride=50", "segment", True, False),
        ("segment.head.width=16", "segment", True, True),
        ("detect.test_size=[96, 64]", "detect", True, False),
        ("probe.neighbours=3", "probe", True, False),
        ("probe.best_epoch=true", "probe", True, False),
        ("probe.standardise=false", "probe", True, True),
        ("probe.base_lr=[0.5, 1.0]", "probe", True, True),
        ("probe.schedule_unit=epoch", "probe", True, True),
        ("evaluate.batch=3", "evaluate", True, False),
        ("data.workers=0", "prepare", False, False),
        ("data.max_corrupt_images=3", "prepare", False, False),
        ("report.sample_images=3", "report", True, False),
    ],
)
def test_a_decision_reaches_identity_and_saved_states(
    override: str, stage: str, runs: bool, retrains: bool
) -> None:
    before, after = identities(), identities(override)
    assert [a != b for a, b in zip(before[stage], after[stage], strict=True)] == [runs, retrains]
    assert {name for name in before if before[name] != after[name]} <= {stage}


def test_a_changed_file_of_starting_weights_is_noticed(tmp_path: Path) -> None:
    weights = tmp_path / "own.safetensors"
    recipe = load_recipe("itpn/pixel_base", "demo", [f"finetune.weights={weights}"])
    stage = next(node.stage for node in graph_of(recipe.stages) if node.name == "finetune")
    absent = raw_data_of(recipe, stage)
    weights.write_bytes(b"one")
    one = raw_data_of(recipe, stage)
    weights.write_bytes(b"other")
    assert set(one) == {"finetune.weights"}
    assert absent != one != raw_data_of(recipe, stage)
