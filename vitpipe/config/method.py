"""The method of a training stage in a recipe: its name and its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AfterValidator, SerializeAsAny

from vitpipe.config.model import ModelConfig
from vitpipe.config.named import NamedSection, one_of, settings_of
from vitpipe.contracts.discovery import names_in
from vitpipe.contracts.graph import NetworkKind

METHODS = "vitpipe.methods"


class MethodConfig(NamedSection):
    """Base of the settings of all methods; a subclass has `name: Literal["<its folder>"]`.

    Attributes:
        gives_classifier: its result tells the classes of the training set apart: the stages intermediate and
            finetune take such methods, pretrain takes the others.
        needs_classes: its losses or what it is judged by read the labels: pretrain refuses a set without
            classes for it.
        ignored_augment: keys of the stage's `augment` that it does not read: a recipe that sets one is
        refused. builds: what its `build` asks the network's family for. A recipe whose family lacks it is
        refused.
    """

    gives_classifier: ClassVar[bool] = False
    needs_classes: ClassVar[bool] = False
    ignored_augment: ClassVar[tuple[str, ...]] = ()
    builds: ClassVar[tuple[NetworkKind, ...]] = ()

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Why the method cannot train this network with this batch; empty if it can.

        It begins with the key that is wrong, for example "queue is 63, which ...".

        Asked when a recipe is read, so that nothing is prepared for a training that cannot start.
        """
        return ""

    def files(self) -> dict[str, Path]:
        """Option -> a file of the user's that it names, such as a teacher's weights.

        Their content is part of a training's identity, and no output may be written over them.
        """
        return {}


def _gives_classifier(wanted: bool) -> AfterValidator:
    """A validator: refuses a method of the other kind, which the stage could not build or measure."""

    def check(method: MethodConfig) -> MethodConfig:
        if method.gives_classifier == wanted:
            return method
        names = [n for n in names_in(METHODS) if settings_of(METHODS, n).gives_classifier == wanted]
        what = (
            "trains no classifier, as this stage does" if wanted else "trains a classifier, this stage none"
        )
        raise ValueError(f"method '{method.name}' {what} (choose from: {', '.join(names)})")

    return AfterValidator(check)


# By the value's own class: as a `MethodConfig` a recipe would be written without the settings.
AnyMethod = SerializeAsAny[MethodConfig]
PretrainingMethod = Annotated[AnyMethod, one_of(METHODS, "method", "masked_pixels"), _gives_classifier(False)]
SupervisedMethod = Annotated[AnyMethod, one_of(METHODS, "method", "classify"), _gives_classifier(True)]
