"""RevColV2: bottom-up columns encode the visible units of an image, top-down columns reconstruct all of it.

RevColV2: Exploring Disentangled Representations in Masked Image Modeling; Qi Han, Yuxuan Cai, Xiangyu Zhang;
arXiv 2309.01005, supplement, table 5 (sizes). No code is released. Published are: two kinds of columns,
reversible connections, a single column in ViT style, mask tokens between the kinds, pixels predicted at the
lowest level of the last column and classes at its top, parameters and FLOPs of two sizes. Widths, depths, the
number of columns and the links are our reading: the smallest symmetric design with these counts. Positions,
blocks and masking are those of Masked Autoencoders; Kaiming He et al.; arXiv 2111.06377.

    image > patches + positions > bottom-up columns (levels 0 > 3) --- mean of level 3 > linear probe
        > every level: its mask token at hidden units, + positions
        > top-down columns (levels 3 > 0) --- level 0 > pixels; mean of level 3 > classes; all levels > dense

Columns, sizes and layer ids: `columns.py`; the equations that couple columns: `../reversible.py`.

Shapes: B images, N units of 16 x 16 pixels (row-major) on a grid of H x W, K kept units, C channels. Tokens
are maps (B, H, W, C), or (B, N, C) where units are hidden. All levels are at stride 16 and C wide.

Parameter names: `patch_embed`, `pos_embed`, `top_down_pos_embed`, `{bottom_up,top_down}.J.gamma.L`,
`{bottom_up,top_down}.J.levels.L.{down,up}.{0,1}`, `...levels.L.blocks.K.{norm1,attn,norm2,mlp}`; around it
`backbone.`, `head.{norm,fc}`; in pre-training `mask_token`, `pixel_norm`, `pixel_head`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitpipe.models.masking import (
    PIXELS_PER_UNIT,
    UNIT_PIXELS,
    MaskedPrediction,
    check_input,
    check_mask_ratio,
    choose_units,
    gather_units,
    grid_of,
    units_per_side,
)
from vitpipe.models.memory_mode import MemoryPolicy, RequestedMode
from vitpipe.models.network import Network, Pretrainer
from vitpipe.models.positions import sincos_table
from vitpipe.models.revcolv2.columns import (
    NORM_EPS,
    NUM_LEVELS,
    DeepEmbed,
    RevColV2Shape,
    TokenColumn,
    check_shape,
    head_layer_index,
    layer_index,
)
from vitpipe.models.reversible import Column, States, aside, inverse_error, run_chain, smallest_scale


class RevColV2(nn.Module):
    """The backbone: patch embedding, positions, and both chains of columns.

    Args:
        shape: an entry of `columns.SHAPES` or your own.
        image_size: pixels per side that the position tables are made for, a multiple of 16. Images of other
            sizes are allowed; the tables are then resized in every forward.
        drop_path: drop ratio of the last block of a column; it rises linearly from 0 over a column's blocks.
        memory_mode: how activations are kept for the backward pass; see `memory_mode.py`.
        allow_reversible_amp: keep `reversible` under autocast, where it is inexact.
        trainable_positions: train the two position tables (they start as sine-cosine tables).
        window: side of the attention windows in units, for dense tasks on large images; see `Block`.

    Raises:
        InputError: without columns of a kind, or when a size is not divisible as needed.
    """

    def __init__(
        self,
        shape: RevColV2Shape,
        *,
        image_size: int,
        drop_path: float = 0.0,
        memory_mode: RequestedMode = "auto",
        allow_reversible_amp: bool = False,
        trainable_positions: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        check_shape(shape)
        self.shape, self.image_size, self.window = shape, image_size, window
        self.grid_side = units_per_side(image_size)
        self.memory = MemoryPolicy(memory_mode, allow_reversible_amp=allow_reversible_amp)

        def table() -> nn.Parameter:
            return nn.Parameter(sincos_table(self.grid_side, shape.width), requires_grad=trainable_positions)

        def column(top_down: bool, is_first: bool) -> TokenColumn:
            return TokenColumn(
                shape, top_down=top_down, is_first=is_first, drop_path=drop_path, window=window
            )

        # No class token, as in the first version: both read-outs are means over tokens.
        self.patch_embed: nn.Module
        if shape.deep_embed:
            self.patch_embed = DeepEmbed(shape.width)
        else:
            self.patch_embed = nn.Conv2d(3, shape.width, kernel_size=UNIT_PIXELS, stride=UNIT_PIXELS)
            # As a matrix (C, 768), like a Linear layer: MAE's initialisation. The fan of a convolution
            # differs.
            nn.init.xavier_uniform_(self.patch_embed.weight.view(shape.width, -1))
            nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        self.pos_embed, self.top_down_pos_embed = table(), table()
        self.bottom_up = nn.ModuleList(column(False, index == 0) for index in range(shape.num_bottom_up))
        self.top_down = nn.ModuleList(column(True, False) for _ in range(shape.num_top_down))
        # The columns alone: a `DeepEmbed` keeps its own initialisation.
        _init_weights(self.bottom_up)
        _init_weights(self.top_down)

    @property
    def columns(self) -> list[Column]:
        """All columns, bottom-up first."""
        return [*self._columns(self.bottom_up), *self._columns(self.top_down)]

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, height, width in pixels) -> patches with positions (B, H, W, C).

        Raises:
            InputError: when a side is no multiple of 16.
        """
        grid_of(images_BCHW, self.shape.name)
        x_BHWC = self.patch_embed(images_BCHW).permute(0, 2, 3, 1)
        return x_BHWC + self._map(self.pos_embed, x_BHWC)

    def encode(self, x: Tensor) -> States:
        """Patches with positions -> levels 0 ... 3 of the last bottom-up column."""
        return self._run(self._columns(self.bottom_up), x, None)

    def join(self, states: States) -> States:
        """Levels of the whole image -> the states in front of the top-down columns, all (B, H, W, C)."""
        # Positions are added without a mask too, so that the path is the same as in pre-training.
        return tuple(state + self._map(self.top_down_pos_embed, state) for state in states)

    def decode(self, states: States) -> States:
        """States of `join` -> levels 0 ... 3 of the last top-down column."""
        # A chain works in processing order, which is 3 ... 0 here; every top-down column has level 3 as its
        # input.
        upside_down = states[::-1]
        return self._run(self._columns(self.top_down), upside_down[0], upside_down)[::-1]

    def decode_top(self, states: States) -> Tensor:
        """Level 3 of `decode` alone, (B, H, W, C); only the levels that it depends on are run."""
        # Without the others the chain has no inverse, and `MemoryPolicy` takes mode `column` for
        # `reversible`. 12.9 instead of 18.7 GMAC for base, 45.7 instead of 66.6 for large.
        upside_down = states[::-1]
        columns, lengths = self._columns(self.top_down), self.positions_for_top
        return self._run(columns, upside_down[0], upside_down, lengths)[0]

    @property
    def positions_for_top(self) -> tuple[int, ...]:
        """Per top-down column, how many positions (from level 3 down) the last one's level 3 depends on."""
        # A position reads the next position of the column before: the last column needs one position, the
        # one before it two, and so on.
        num_columns = self.shape.num_top_down
        return tuple(min(NUM_LEVELS, num_columns - index) for index in range(num_columns))

    def forward(self, images_BCHW: Tensor) -> States:
        """Images -> levels 0 ... 3 of the last top-down column, each (B, H, W, C)."""
        return self.decode(self.join(self.encode(self.embed(images_BCHW))))

    def inverse_error(self, images_BCHW: Tensor) -> float:
        """Largest absolute error of the states that both chains rebuild from their ends, for these images.

        Without side effects on training: generators, gradients and autocast's cache stay as they are.
        """
        with aside(images_BCHW.device):
            x = self.embed(images_BCHW)
            bottom_up = self._columns(self.bottom_up)
            states = self.join(run_chain(bottom_up, x))[::-1]
            top_down_error = inverse_error(self._columns(self.top_down), states[0], states)
            return max(inverse_error(bottom_up, x), top_down_error)

    def _run(
        self,
        columns: list[Column],
        x: Tensor,
        states: States | None,
        num_positions: Sequence[int] | None = None,
    ) -> States:
        complete = num_positions is None
        mode = self.memory.prepare(columns, x.device, training=self.training, complete=complete)
        return run_chain(columns, x, states, mode=mode, num_positions=num_positions)

    def _map(self, table_1NC: Tensor, like_BHWC: Tensor) -> Tensor:
        """A position table as a map (1, H, W, C) of the same grid."""
        grid = (like_BHWC.shape[1], like_BHWC.shape[2])
        return resize_positions(table_1NC, grid).unflatten(1, grid)

    @staticmethod
    def _columns(columns: Iterable[nn.Module]) -> list[Column]:
        return [column for column in columns if isinstance(column, Column)]


class RevColV2Network(Network):
    """Common base of the trained networks around the backbone: layer ids, weight decay, diagnostics."""

    family = "revcolv2"
    # Gammas need no entry, their tensors have one dimension and never decay. The first version decays its
    # alphas; decay pulls them to 0, where they cannot be inverted.
    no_decay = ("pos_embed", "mask_token")

    def __init__(self, backbone: RevColV2) -> None:
        super().__init__()
        self.backbone = backbone

    def diagnostics(self) -> dict[str, Tensor]:
        """`smallest_scale`: min |gamma|, which decides whether columns can be inverted; see `safe_scale`."""
        return {"smallest_scale": torch.tensor(smallest_scale(self.backbone.columns))}

    @property
    def num_layers(self) -> int:
        """Number of layer ids; see `layer_index`."""
        return head_layer_index(self.backbone.shape) + 1

    def layer_of(self, name: str) -> int:
        """Layer id of a parameter; see `layer_index`."""
        return layer_index(name, self.backbone.shape)


class RevColV2Pretrainer(RevColV2Network, Pretrainer):
    """Masked pre-training: bottom-up columns encode visible units, the last column's level 0 predicts pixels.

    Args:
        mask_ratio: share of the units that are hidden.

    Raises:
        InputError: when no unit would be left to see, or none to predict.
    """

    def __init__(self, backbone: RevColV2, mask_ratio: float = 0.75) -> None:
        super().__init__(backbone)
        self.mask_ratio, self.num_units = mask_ratio, backbone.grid_side**2
        check_mask_ratio(self.num_units, mask_ratio)
        width = backbone.shape.width
        # One per level: the first top-down column takes the states of all four.
        self.mask_token = nn.Parameter(torch.empty(NUM_LEVELS, 1, 1, width))
        self.pixel_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.pixel_head = nn.Linear(width, PIXELS_PER_UNIT)
        nn.init.normal_(self.mask_token, std=0.02)  # as in MAE
        _init_weights(self.pixel_head)

    def forward(self, images_BCHW: Tensor, noise_BN: Tensor) -> MaskedPrediction:
        """Hide units by noise and predict them.

        Args:
            images_BCHW: (B, 3, image_size, image_size), normalised.
            noise_BN: uniform noise per unit, (B, N); see `choose_units`.

        Raises:
            InputError: when images or noise are of another size than the network is built for.
        """
        check_input(images_BCHW, noise_BN, self.backbone.image_size)
        choice = choose_units(noise_BN.to(images_BCHW.device), self.mask_ratio)
        seen_BKC = gather_units(self.backbone.embed(images_BCHW).flatten(1, 2), choice.kept_BK)
        levels = self.backbone.encode(seen_BKC)
        states = tuple(
            self._fill(seen, mask_token, choice.restore_BN)
            for seen, mask_token in zip(levels, self.mask_token, strict=True)
        )
        lowest_BNC = self.backbone.decode(states)[0]
        pred_BND = self.pixel_head(self.pixel_norm(lowest_BNC))
        return MaskedPrediction(pred_BND, choice.mask_BN, choice.kept_BK)

    def _fill(self, seen_BKC: Tensor, mask_token_11C: Tensor, restore_BN: Tensor) -> Tensor:
        """Visible units in image order, mask tokens at hidden ones, plus positions: (B, N, C)."""
        num_images, num_seen, width = seen_BKC.shape
        hidden = mask_token_11C.to(seen_BKC.dtype).expand(num_images, self.num_units - num_seen, width)
        x_BNC = gather_units(torch.cat([seen_BKC, hidden], dim=1), restore_BN)
        return x_BNC + self.backbone.top_down_pos_embed


def resize_positions(table_1NC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square position table to another grid, bicubic: (1, S*S, C) -> (1, rows*columns, C)."""
    # To the exact size, without the 0.1 of `resample_positions`: no released weights need its shifted
    # samples.
    side = math.isqrt(table_1NC.shape[1])
    if grid == (side, side):
        return table_1NC
    square = table_1NC.transpose(1, 2).unflatten(2, (side, side))
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _init_weights(module: nn.Module) -> None:
    """Linear layers as in Masked Autoencoders: Xavier uniform, biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
