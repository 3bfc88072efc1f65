"""Options that methods share in which a student learns from a moving average of itself; without torch."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from vitpipe.config.method import MethodConfig
from vitpipe.config.model import ModelConfig
from vitpipe.config.multi_crop import CropsConfig
from vitpipe.config.section import Count, Effects, Positive, Ratio
from vitpipe.config.train_sections import SINGLE_VIEW
from vitpipe.contracts.graph import NetworkKind

WholeEpochs = Annotated[int, Field(ge=0)]

# Of a single one every distribution is the same, and the loss is 0.
Prototypes = Annotated[int, Field(ge=2)]


class SelfDistillationConfig(MethodConfig):
    """DINO's options (Caron et al., arXiv 2104.14294); its successors add theirs.

    The student's head has `prototypes` outputs behind a bottleneck of `head_width` channels and layers of
    `head_hidden`, whose initial values have a std of 0.02, or by fan-in where `head_init_gain` is given (for
    narrow heads). With `scale_prototypes` the length of each prototype is trained, too; it is 1 otherwise.
    The teacher's outputs are centred by their running mean (`centre_momentum`) and sharpened by
    `teacher_temperature`, which begins at `warmup_teacher_temperature` and reaches its value in the last of
    the warm-up epochs. The average's momentum rises from `teacher_momentum` to 1. Prototypes learn nothing in
    the first `freeze_prototypes_epochs`. `drop_path` is the student's; the teacher has none.
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "crops prototypes head_hidden head_width head_init_gain scale_prototypes student_temperature "
            "teacher_temperature warmup_teacher_temperature warmup_teacher_temperature_epochs "
            "centre_momentum teacher_momentum freeze_prototypes_epochs drop_path"
        ),
    )

    ignored_augment: ClassVar[tuple[str, ...]] = SINGLE_VIEW
    builds: ClassVar[tuple[NetworkKind, ...]] = ("encoder",)

    crops: CropsConfig = CropsConfig()
    prototypes: Prototypes = 65_536
    head_hidden: Count = 2048
    head_width: Count = 256
    head_init_gain: Positive | None = None
    scale_prototypes: bool = False
    student_temperature: Positive = 0.1
    teacher_temperature: Positive = 0.04
    warmup_teacher_temperature: Positive = 0.04
    warmup_teacher_temperature_epochs: WholeEpochs = 0
    centre_momentum: Ratio = 0.9
    teacher_momentum: Ratio = 0.996
    freeze_prototypes_epochs: WholeEpochs = 1
    drop_path: Ratio = 0.1

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Crops that the network cannot take; see `MethodConfig.misfit`."""
        return crops_misfit(self.crops, model)

    def grids(self, model: ModelConfig) -> list[tuple[int, int]]:
        """Rows and columns of tokens of the two kinds of crops; of one kind without local crops."""
        sizes = [self.crops.global_size, *([self.crops.local_size] if self.crops.num_local else [])]
        return [(size // model.token_pixels,) * 2 for size in sizes]


class PatchLossConfig(SelfDistillationConfig):
    """SelfPatch's options (Yun et al., CVPR 2022) beside DINO's.

    `patch_prototypes` is the number of outputs of the patch head, `neighbours` k, the positives that a patch
    takes of its eight neighbours, and `patch_weight` lambda, the weight of the patch loss.
    """

    effects: ClassVar[Effects] = Effects(
        weights="patch_prototypes neighbours patch_weight",
    )

    patch_prototypes: Prototypes = 4096
    neighbours: Annotated[int, Field(ge=1, le=8)] = 4
    patch_weight: Positive = 0.1

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Crops that the network cannot take, or whose patches have too few neighbours."""
        return super().misfit(model, global_batch) or neighbours_misfit(self.neighbours, self.grids(model))


def crops_misfit(crops: CropsConfig, model: ModelConfig) -> str:
    """Why the network cannot take these crops; empty if it can."""
    unit = model.token_pixels
    sizes = {
        "global_size": crops.global_size,
        **({"local_size": crops.local_size} if crops.num_local else {}),
    }
    for key, size in sizes.items():
        if size != model.image_size and not model.takes_any_size:
            return (
                f"crops.{key} is {size}, but with these options '{model.name}' takes images of image_size "
                f"({model.image_size}) only: give it an option without relative positions, or the same size"
            )
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            fits = f"{below} or {above}" if below else str(above)
            return f"crops.{key} is {size}, '{model.name}' needs a multiple of {unit}: give {fits}"
    return ""


def num_neighbours(grid: tuple[int, int]) -> int:
    """How many different neighbours a patch has: 8, fewer on a grid with fewer than three rows or columns."""
    # At the border the neighbourhood wraps round: on two rows both steps lead to the same one.
    return min(3, grid[0]) * min(3, grid[1]) - 1


def neighbours_misfit(k: int, grids: list[tuple[int, int]]) -> str:
    """Why a patch cannot have k positives on one of these grids; empty if it can."""
    for grid in grids:
        if k > (most := num_neighbours(grid)):
            return (
                f"neighbours is {k}, but on {grid[0]} x {grid[1]} patches of a crop a patch has only "
                f"{most}: give fewer, or larger crops"
            )
    return ""
