"""Options of classification with dense relative localisation; imports no torch.

Efficient Training of Visual Transformers with Small Datasets; Yahui Liu et al.; NeurIPS 2021.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from vitpipe.config.model import ModelConfig
from vitpipe.config.section import Count, Effects, NotNegative, Positive
from vitpipe.methods.classify.config import MixedTargetsConfig

LossKind = Literal["drloc", "signed", "ce", "reg", "all"]
Pooling = Literal["none", "2x2", "3x3"]


class DrlocConfig(MixedTargetsConfig):
    """Classification + `weight` times a localisation loss on pairs of cells of the network's grid.

    `loss` is the paper's drloc (absolute offsets), drloc* (`signed`), drloc-ce (offsets as classes),
    drloc-reg (a Gaussian prior on the classes) or drloc-all (every block's own grid, with an MLP for each).
    `raw_targets` leaves offsets undivided by the side of the grid, as the released code does. `reduction:
    equation` sums over the images of the global batch and over both axes, as the paper's equations do;
    its pseudo-code takes means. `weight_schedule: ramp` is the released code's: the weight rises over
    `ramp_epochs` epochs and falls to 0 afterwards. `pooling` makes the grid coarser for the loss alone: `2x2`
    averages, or the released code's windows of 3 at stride 2, whose padding does not count. `init` is that of
    the MLP: normal with a deviation of 0.02 and zero biases, or PyTorch's default.
    """

    effects: ClassVar[Effects] = Effects(
        weights=(
            "name loss weight weight_schedule ramp_epochs pairs hidden_width reduction raw_targets pooling "
            "init"
        ),
    )

    name: Literal["drloc"] = "drloc"
    loss: LossKind = "drloc"
    weight: NotNegative = 0.5
    weight_schedule: Literal["constant", "ramp"] = "constant"
    ramp_epochs: Positive = 20.0
    pairs: Count = 64
    hidden_width: Count = 512
    reduction: Literal["mean", "equation"] = "mean"
    raw_targets: bool = False
    pooling: Pooling = "none"
    init: Literal["trunc_normal", "default"] = "trunc_normal"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.raw_targets and self.loss in ("ce", "reg"):
            raise ValueError(f"raw_targets means nothing to loss {self.loss}, whose targets are classes")
        if self.pooling != "none" and self.loss == "all":
            raise ValueError("loss all reads the grid of every block as it is: leave pooling out")
        return self

    def misfit(self, model: ModelConfig, global_batch: int) -> str:
        """Why the loss cannot be computed on the last grid of this network; empty if it can.

        A network whose options do not tell its grid is checked when it is built.
        """
        side = model.image_size // model.token_pixels
        why = grid_misfit((side, side), self.pooling)
        return f"{why}, from images of {model.image_size} pixels in '{model.name}'" if why else ""


def pooled_grid(grid: tuple[int, int], pooling: Pooling) -> tuple[int, int]:
    """Rows and columns of a grid behind the pooling."""
    if pooling == "none":
        return grid
    # Windows of 3 at stride 2 with padding 1 begin at every second cell.
    rows, columns = ((side + 1) // 2 if pooling == "3x3" else side // 2 for side in grid)
    return rows, columns


def grid_misfit(grid: tuple[int, int], pooling: Pooling) -> str:
    """Why nothing can be localised in a grid; empty if it can. It begins with the option that is wrong."""
    rows, columns = grid
    if pooling == "2x2" and (rows % 2 or columns % 2):
        return f"pooling 2x2 would leave cells of a grid of {rows} x {columns} out"
    if max(pooled_grid(grid, pooling)) > 1:
        return ""
    behind = "" if pooling == "none" else f" behind pooling {pooling}"
    return f"loss has no distances to learn in a grid of {rows} x {columns}{behind}"


CONFIG = DrlocConfig
