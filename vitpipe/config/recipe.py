"""The typed recipe: everything that one reproduction does, frozen once read.

A recipe is one YAML file under `vitpipe/recipes/`. It has one section per stage, whose type stands in the
stage's folder (`vitpipe/stages/NAME/config.py`). Values that are `"auto"` here are derived in `resolve.py`,
each with its reason. Unknown keys are refused by `read.py` with "did you mean". Sizes in pixels, learning
rates per `lr_reference_batch` images, ratios in [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from pydantic import AfterValidator, ValidationError, create_model, model_validator

from vitpipe.config.data import DataConfig
from vitpipe.config.model import AnyModel, families_that_build
from vitpipe.config.section import Effects, Positive, Section, refuse_twice
from vitpipe.config.set_names import sets_to_prepare
from vitpipe.contracts.address import hidden
from vitpipe.contracts.discovery import part_of
from vitpipe.contracts.errors import InputError
from vitpipe.contracts.graph import STAGE_PACKAGE, NetworkKind, all_stages, graph_of, stage_config_file
from vitpipe.contracts.spelling import did_you_mean


def _is_stage(name: str) -> str:
    """A validator: refuses a name that no stage has."""
    known = all_stages()
    if name not in known:
        listed = ", ".join(known)
        raise ValueError(f"there is no stage '{name}'{did_you_mean(name, known)} (known: {listed})")
    return name


_NETWORKS: dict[NetworkKind, str] = {
    "encoder": "a network without a head",
    "classifier": "a classifier",
    "intermediate_heads": "heads at intermediate depths",
    "pretrainer": "a network for masked pre-training",
    "feature_predictor": "a network that predicts a teacher's features",
    "dense": "feature maps for detection and segmentation",
}
StageName = Annotated[str, AfterValidator(_is_stage)]


class SourceConfig(Section):
    """Where the recipe's values come from; `url` is shown and never opened."""

    effects: ClassVar[Effects] = Effects(
        figures="paper title url tables",
    )

    paper: str
    title: str
    url: Annotated[str, AfterValidator(hidden)] = ""
    tables: dict[str, str] = {}


class Expectation(Section):
    """A published row that this recipe claims to reproduce.

    `stage` and `metric` name our number, `where` selects exactly one row of `papers/<paper>.yaml` by
    equality on its keys. `tolerance` is in the row's unit; `scale` turns our number into that unit.
    `searched` is a key of the recipe whose values the paper has searched for this number: of variants that
    claim the same row, the best one is reported as such. `settings` are tables that hold settings of this
    number and no results: `vitpipe table` runs them as the rows that name them.
    """

    effects: ClassVar[Effects] = Effects(
        figures="stage metric where tolerance scale protocol searched settings",
    )

    stage: StageName
    metric: str
    where: dict[str, str | float | int]
    tolerance: Positive
    # Our ratios lie in [0, 1], published accuracies are percentages.
    scale: Positive = 100.0
    protocol: dict[str, str] = {}
    searched: str = ""
    settings: tuple[str, ...] = ()


class RecipeBase(Section):
    """What every recipe has beside the sections of its stages.

    `stages` names the stages that this method has, in any order. `start_from` says for a stage whose weights
    it takes, where that is not the usual one: the pre-trained network for dense tasks, the result of the step
    before for the others.
    """

    effects: ClassVar[Effects] = Effects(
        weights="seed start_from data model",
        figures="name profile summary source stages expect discrepancies",
    )

    name: str
    profile: str
    summary: str
    source: SourceConfig
    seed: int = 0
    stages: tuple[StageName, ...]
    start_from: dict[StageName, StageName] = {}
    data: DataConfig
    model: AnyModel
    expect: tuple[Expectation, ...] = ()
    discrepancies: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _stages_have_sections(self) -> RecipeBase:
        if not self.stages:
            raise ValueError("'stages' names no stage")
        refuse_twice("stages", self.stages)
        for stage in self.stages:
            if stage in _SECTIONS and getattr(self, stage) is None:
                raise ValueError(
                    f"stage '{stage}' is listed in stages, but the recipe has no '{stage}:' section"
                )
        for stage, feeder in self.start_from.items():
            if stage in self.stages and feeder not in self.stages:
                raise ValueError(f"stage '{stage}' starts from '{feeder}', which is not listed in stages")
            later, earlier = all_stages()[stage], all_stages()[feeder]
            is_possible = earlier.gives_weights and earlier.order < later.order
            if not is_possible or "weights" not in later.inputs:
                raise ValueError(f"stage '{stage}' cannot start from '{feeder}', which has no weights for it")
        return self

    @model_validator(mode="after")
    def _measured_weights_are_there(self) -> RecipeBase:
        for node in graph_of(self.stages, self.start_from):
            section = getattr(self, node.name, None)
            if (
                node.stage.needs_weights
                and "weights" not in node.inputs
                and not getattr(section, "weights", None)
            ):
                feeders = ", ".join(node.stage.inputs["weights"])
                file = (
                    f", or give a converted checkpoint as {node.name}.weights"
                    if hasattr(section, "weights")
                    else ""
                )
                raise ValueError(
                    f"stage '{node.name}' has no weights to measure: list one of {feeders} in stages{file}"
                )
        return self

    @model_validator(mode="after")
    def _network_can_be_built(self) -> RecipeBase:
        entry = self.model.entry
        for stage in self.stages:
            method = getattr(getattr(self, stage, None), "method", None)
            needed = dict.fromkeys(all_stages()[stage].builds, f"stage '{stage}'")
            if method is not None:
                needed |= dict.fromkeys(method.builds, f"method '{method.name}' of stage '{stage}'")
            for kind, by in needed.items():
                if kind not in self.model.builds:
                    able = ", ".join(families_that_build(kind)) or "no family here"
                    raise ValueError(
                        f"{by} needs {_NETWORKS[kind]}, which '{entry.name}' of the family "
                        f"{entry.family} does not have; take a network of: {able} (`vitpipe models`)"
                    )
        return self

    @model_validator(mode="after")
    def _sections_fit_the_network(self) -> RecipeBase:
        for stage in self.stages:
            section: Section | None = getattr(self, stage, None)
            if section is not None and (why := section.network_misfit(self.model)):
                raise ValueError(f"{stage}.{why}")
        return self

    @model_validator(mode="after")
    def _names_its_sets(self) -> RecipeBase:
        # `auto` is replaced here, so that what is prepared is part of the identity of `prepare`. Past the
        # frozen model's own assignment: a validator has to return the same object.
        object.__setattr__(self, "data", self.data.with_sets(sets_to_prepare(cast(Recipe, self))))
        return self


def _default(section: type[Section]) -> Section | None:
    """The section with all of its defaults; None where some value must be given."""
    try:
        return section()
    except ValidationError:
        return None


def _section_types() -> dict[str, type[Section]]:
    """Stage -> type of its section. A stage such as `prepare`, which reads other sections only, has none.

    Raises:
        InputError: when a stage's section is of another type or cannot be one, or is not read by its stage.
    """
    found: dict[str, type[Section]] = {}
    for name in all_stages():
        if part_of(STAGE_PACKAGE, name, "config", "CONFIG") is not None:
            found[name] = part_of(STAGE_PACKAGE, name, "config", "CONFIG", Section)
    known = {*RecipeBase.model_fields, *found}
    for stage in all_stages().values():
        what = fix = ""
        if hasattr(RecipeBase, stage.name) or stage.name in RecipeBase.model_fields:
            what, fix = f"A recipe has another part named '{stage.name}'", "give the stage another name"
        elif unknown := [section for section in stage.sections if section not in known]:
            what = f"The stage '{stage.name}' reads the section '{unknown[0]}', which no recipe has"
            fix = f"name some of: {', '.join(sorted(known))}"
        elif stage.name in found and stage.name not in stage.sections:
            # Its values would not be part of its identity: a change would re-run nothing.
            what = f"The stage '{stage.name}' has a section of its own, which is not among its `sections`"
            fix = f"add '{stage.name}' to `sections`"
        if what:
            raise InputError(what, where=stage_config_file(stage.name), fix=fix)
    return found


_SECTIONS = _section_types()

if TYPE_CHECKING:

    class Recipe(RecipeBase):
        """One reproduction, complete; `recipe.finetune` is the section of stage `finetune`, or None."""

        def __getattr__(self, stage: str) -> Any: ...

else:
    Recipe = create_model(
        "Recipe",
        __base__=RecipeBase,
        __doc__="One reproduction, complete; `recipe.finetune` is the section of stage `finetune`, or None.",
        **{name: (section | None, _default(section)) for name, section in _SECTIONS.items()},
    )
    # What a section can change is said by its own keys.
    Recipe.effects = Effects(weights=" ".join(_SECTIONS))
