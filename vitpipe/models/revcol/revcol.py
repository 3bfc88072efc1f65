"""RevCol, first version: convolutional columns, each of which can be inverted from the next.

Reversible Column Networks; Yuxuan Cai, Yizhuang Zhou, Qi Han, Jianjian Sun, Xiangwen Kong, Jun Li, Xiangyu
Zhang; arXiv 2212.11696, section 3 and appendix (sizes, intermediate supervision). Blocks as in A ConvNet for
the 2020s; Zhuang Liu et al.; arXiv 2201.03545.

    image > stem (stride 4) > columns of four levels at strides 4, 8, 16, 32 > mean of level 3 > classes

Every column gets the stem's output and the states of the column before: see `reversible.py`. With
intermediate supervision there are four classifiers and three decoders to pixels, one after every quarter of
the columns: see `heads.py`.

Shapes: B images, C channels, maps (B, C, H, W); levels are C0 ... C3 wide. Parameter names are those of the
released code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.contracts.errors import InputError
from vitpipe.models.blocks import drop_path
from vitpipe.models.memory_mode import MemoryPolicy, RequestedMode
from vitpipe.models.network import Classifier, Encoder, Features
from vitpipe.models.reversible import Column, States, run_chain

NUM_LEVELS = 4
STRIDE = 32  # of level 3: the stem's 4, then three times 2
# The released code's values; eps, gamma and MLP ratio are ConvNeXt's too.
_NORM_EPS = 1e-6
_INITIAL_ALPHA = 0.5
_INITIAL_GAMMA = 1e-6  # layer scale: at first every block is almost the identity
_MLP_RATIO = 4


@dataclass(frozen=True)
class RevColShape:
    """One size.

    Attributes:
        name: as in the registry.
        widths: channels of levels 0 ... 3 (strides 4, 8, 16, 32).
        depths: blocks of these levels, in every column.
        num_columns: columns.
        top_to_lowest: whether level 0 also reads level 3 of the column before.
    """

    name: str
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    num_columns: int
    top_to_lowest: bool = False


SHAPES: dict[str, RevColShape] = {
    shape.name: shape
    for shape in (
        # Ours, for tests and laptops; the others are the released sizes. Three columns are the fewest with a
        # first, a middle and a last one.
        RevColShape("revcol_micro", (16, 32, 64, 128), (1, 1, 2, 1), num_columns=3),
        # Four are the fewest for intermediate supervision.
        RevColShape("revcol_nano", (16, 32, 64, 128), (1, 1, 1, 1), num_columns=4),
        RevColShape("revcol_tiny", (64, 128, 256, 512), (2, 2, 4, 2), num_columns=4),
        RevColShape("revcol_small", (64, 128, 256, 512), (2, 2, 4, 2), num_columns=8),
        RevColShape("revcol_base", (72, 144, 288, 576), (1, 1, 3, 2), num_columns=16),
        RevColShape("revcol_large", (128, 256, 512, 1024), (1, 2, 6, 2), num_columns=8),
        RevColShape("revcol_xlarge", (224, 448, 896, 1792), (1, 2, 6, 2), num_columns=8),
        RevColShape("revcol_huge", (360, 720, 1440, 2880), (1, 2, 6, 2), num_columns=8, top_to_lowest=True),
    )
}


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_NORM_EPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Depthwise 3 x 3 > LayerNorm > two-layer MLP over channels > gamma, on a residual branch."""

    def __init__(self, width: int, hidden_width: int, drop_ratio: float = 0.0) -> None:
        super().__init__()
        self.drop_ratio = drop_ratio
        self.dwconv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=_NORM_EPS)
        self.pwconv1 = nn.Linear(width, hidden_width)
        self.pwconv2 = nn.Linear(hidden_width, width)
        self.gamma = nn.Parameter(torch.full((width,), _INITIAL_GAMMA))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        # Channels last between the permutations: the MLP is two Linear layers (1 x 1 convolutions in
        # ConvNeXt's figure), whose names and shapes released weights have.
        branch_BHWC = self.norm(self.dwconv(x_BCHW).permute(0, 2, 3, 1))
        branch_BHWC = self.gamma * self.pwconv2(F.gelu(self.pwconv1(branch_BHWC)))
        return x_BCHW + drop_path(branch_BHWC.permute(0, 3, 1, 2), self.drop_ratio, self.training)


class Upsample(nn.Module):
    """Linear > LayerNorm over channels, then nearest upsampling."""

    def __init__(self, width: int, out_width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.channel_reschedule = nn.Sequential(
            nn.Linear(width, out_width), nn.LayerNorm(out_width, eps=_NORM_EPS)
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', factor * H, factor * W)."""
        x_BCHW = self.channel_reschedule(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(x_BCHW, scale_factor=self.factor, mode="nearest")


class Fusion(nn.Module):
    """Sum of the level below and of higher levels of the column before, brought to this level's size."""

    def __init__(self, shape: RevColShape, level: int, is_first: bool) -> None:
        super().__init__()
        width = shape.widths[level]
        self.down: nn.Module = nn.Identity()
        if level > 0:
            conv = nn.Conv2d(shape.widths[level - 1], width, kernel_size=2, stride=2)
            self.down = nn.Sequential(conv, ChannelNorm(width))
        # The first column has no column before it, and level 3 no level above.
        self.up = self.up2 = None
        if level < NUM_LEVELS - 1 and not is_first:
            self.up = Upsample(shape.widths[level + 1], width, 2)
        if level == 0 and shape.top_to_lowest and not is_first:
            self.up2 = Upsample(shape.widths[-1], width, 8)  # stride 32 to stride 4

    def forward(self, below: Tensor, above: States) -> Tensor:
        """The level below, and states of the column before from the next level on -> this level's map."""
        x = self.down(below)
        if self.up is not None:
            x = x + self.up(above[0])
        if self.up2 is not None:
            x = x + self.up2(above[-1])
        return x


class ConvLevel(nn.Module):
    """F: fusion, then blocks."""

    def __init__(self, shape: RevColShape, level: int, is_first: bool, drop_ratios: Sequence[float]) -> None:
        super().__init__()
        width = shape.widths[level]
        self.fusion = Fusion(shape, level, is_first)
        self.blocks = nn.Sequential(*(ConvBlock(width, _MLP_RATIO * width, ratio) for ratio in drop_ratios))

    def forward(self, below: Tensor, above: States) -> Tensor:
        """As `Fusion`."""
        return self.blocks(self.fusion(below, above))


class ConvColumn(Column):
    """Four levels and their scales alpha (1, C, 1, 1).

    Args:
        shape: the size.
        is_first: no column before it: no `up` links, and the scales are not used.
        drop_path: drop ratio of the column's last block.
    """

    def __init__(self, shape: RevColShape, *, is_first: bool, drop_path: float) -> None:
        super().__init__()
        self.is_first = is_first
        # Equal in every column, rising from level 0 to 3 (not over the whole network). On the CPU even under
        # `torch.device("meta")`, where there would be no values.
        ratios = torch.linspace(0, drop_path, sum(shape.depths), device="cpu").tolist()
        for level, (width, depth) in enumerate(zip(shape.widths, shape.depths, strict=True)):
            # The released first column has alphas too, which scale states of zero. They are kept, untrained,
            # so that official states fit; their gradient would be exactly 0 in plain autograd, and noise if
            # rebuilt.
            alpha = nn.Parameter(torch.full((1, width, 1, 1), _INITIAL_ALPHA), requires_grad=not is_first)
            self.register_parameter(f"alpha{level}", alpha)
            self.add_module(f"level{level}", ConvLevel(shape, level, is_first, ratios[:depth]))
            ratios = ratios[depth:]

    @property
    def num_levels(self) -> int:
        """4."""
        return NUM_LEVELS

    def level(self, position: int) -> nn.Module:
        """`level0` ... `level3`."""
        return self.get_submodule(f"level{position}")

    def scales(self) -> tuple[nn.Parameter, ...]:
        """`alpha0` ... `alpha3`."""
        return () if self.is_first else tuple(self.get_parameter(f"alpha{i}") for i in range(NUM_LEVELS))


class RevColColumns(Encoder):
    """Stem and columns, uninitialised: what `RevColEncoder` and `RevCol` share.

    The blocks of `features` are the four levels of the last column.

    Args:
        shape: an entry of `SHAPES` or your own.
        drop_path: drop ratio of the last block of a column; it rises linearly from 0 over a column's blocks.
        memory_mode: how activations are kept for the backward pass; see `memory_mode.py`.
        allow_reversible_amp: keep `reversible` under autocast, where it is inexact.

    Raises:
        InputError: without columns.
    """

    # No `no_decay`: the released code exempts 1-D tensors only, so its alphas (4-D) decay. RevColV2's do not.
    family = "revcol"

    def __init__(
        self,
        shape: RevColShape,
        *,
        drop_path: float = 0.0,
        memory_mode: RequestedMode = "auto",
        allow_reversible_amp: bool = False,
    ) -> None:
        super().__init__()
        if shape.num_columns < 1:
            raise InputError(
                f"The shape has {shape.num_columns} columns", where=shape.name, fix="give at least one column"
            )
        self.shape = shape
        self.memory = MemoryPolicy(memory_mode, allow_reversible_amp=allow_reversible_amp)
        width = shape.widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, width, kernel_size=4, stride=4), ChannelNorm(width))
        for index in range(shape.num_columns):
            self.add_module(f"subnet{index}", ConvColumn(shape, is_first=index == 0, drop_path=drop_path))

    @property
    def columns(self) -> list[Column]:
        """`subnet0`, `subnet1` ..."""
        modules = (self.get_submodule(f"subnet{index}") for index in range(self.shape.num_columns))
        return [module for module in modules if isinstance(module, Column)]

    @property
    def num_blocks(self) -> int:
        """4."""
        return NUM_LEVELS

    @property
    def feature_width(self) -> int:
        """C3."""
        return self.shape.widths[-1]

    @property
    def num_layers(self) -> int:
        """Number of layer ids: stem, paths of 1 ... blocks + columns - 1 steps, heads; see `layer_index`."""
        return sum(self.shape.depths) + self.shape.num_columns + 1

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `layer_index`."""
        return layer_index(name, self.shape)

    def run_columns(self, images_BCHW: Tensor, ends: Sequence[int]) -> list[States]:
        """Levels 0 ... 3 after the given numbers of columns (rising); later columns are not run.

        Raises:
            InputError: when a side is no multiple of 32.
        """
        height, breadth = images_BCHW.shape[-2:]
        if height % STRIDE or breadth % STRIDE:
            raise InputError(
                f"Images of {height} x {breadth} pixels cannot be downsampled by {STRIDE}",
                where=self.shape.name,
                fix=f"resize or pad the images to multiples of {STRIDE}",
            )
        x, columns = self.stem(images_BCHW), self.columns
        states: States | None = None
        found: list[States] = []
        # One chain per requested end. Within a chain only the last states are kept in mode `reversible`, so
        # every end costs the memory of four states.
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            chain = columns[start:end]
            mode = self.memory.prepare(chain, x.device, training=self.training)
            states = run_chain(chain, x, states, mode=mode)
            found.append(states)
        return found

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """Levels of the last column as tokens, strides 4 to 32, and the mean of level 3 (B, C3)."""
        self.refuse_attention(attention)
        wanted = self.chosen_blocks(blocks)
        levels = self.run_columns(images_BCHW, [self.shape.num_columns])[-1]
        maps = [levels[number] for number in wanted]
        return Features(
            tokens=tuple(x_BCHW.flatten(2).transpose(1, 2) for x_BCHW in maps),
            grids=tuple((x_BCHW.shape[2], x_BCHW.shape[3]) for x_BCHW in maps),
            pooled=levels[-1].mean(dim=(2, 3)),
        )


class RevColEncoder(RevColColumns):
    """The network without a classifier; arguments are those of `RevColColumns`."""

    def __init__(self, shape: RevColShape, **options: Any) -> None:
        super().__init__(shape, **options)
        init_weights(self)


class RevCol(RevColColumns, Classifier):
    """The network with one classifier at its end.

    Args:
        shape: an entry of `SHAPES` or your own.
        num_classes: number of logits.
        head_init_std: of the classifier's weight (released: 0.02 times a head init scale).
        options: further arguments of `RevColColumns`.
    """

    def __init__(
        self, shape: RevColShape, num_classes: int = 1000, *, head_init_std: float = 0.02, **options: Any
    ) -> None:
        super().__init__(shape, **options)
        self._num_classes = num_classes
        self.cls = ClassifierHead(shape.widths[-1], num_classes)
        init_weights(self, head_init_std)

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self._num_classes

    def logits(self, features: Features) -> Tensor:
        """LayerNorm and Linear on the mean."""
        return self.cls.classifier(features.pooled)


class ClassifierHead(nn.Module):
    """LayerNorm > Linear."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.LayerNorm(width, eps=_NORM_EPS), nn.Linear(width, num_classes))

    def forward(self, top_BCHW: Tensor) -> Tensor:
        """Level 3 (B, C3, H, W) -> logits (B, num_classes)."""
        return self.classifier(top_BCHW.mean(dim=(2, 3)))


_COLUMN_NAME = re.compile(r"(?:^|\.)subnet(\d+)\.(?:alpha|level(\d+)\.(?:fusion|blocks\.(\d+)))")


def layer_index(name: str, shape: RevColShape) -> int:
    """Layer id of a parameter for layer-wise learning rates, as in the released code.

    Stem 0; block h of column j (both from 0, h over the levels of a column) h + j + 1; fusion that of its
    level's first block; alpha j + 1; heads blocks + columns.
    """
    # The id is the length of the shortest path from the input through the grid of blocks and columns, so ids
    # of neighbouring columns overlap: 8 columns of 10 blocks have 19 ids and not 82.
    if re.search(r"(?:^|\.)stem\.", name):
        return 0
    found = _COLUMN_NAME.search(name)
    if found is None:
        return sum(shape.depths) + shape.num_columns
    column, level, block = (int(number or 0) for number in found.groups())
    return sum(shape.depths[:level]) + block + column + 1


def init_weights(network: nn.Module, head_init_std: float = 0.02) -> None:
    """Initialise all layers as the released code does: truncated normal, biases 0.

    Args:
        network: of this module's layers.
        head_init_std: of the last layer of every `ClassifierHead`.
    """
    last_layers: list[nn.Module] = []
    for module in network.modules():
        # 0.02 for convolutions, too, unlike in HiViT's stem.
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ClassifierHead):
            last_layers.append(module.classifier[-1])
    # After all others, so that their values do not depend on the heads.
    for layer in last_layers:
        assert isinstance(layer, nn.Linear)
        nn.init.trunc_normal_(layer.weight, std=head_init_std)
