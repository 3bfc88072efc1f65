"""Sizes of the Swin Transformers, and the image sizes that their windows fit; imports no torch.

Swin Transformer: Hierarchical Vision Transformer using Shifted Windows; Ze Liu et al.; arXiv 2103.14030.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

PATCH = 4
"""Pixels per side of a token of the first stage; each later stage merges 2 x 2 tokens."""

NUM_STAGES = 4
STRIDE = PATCH * 2 ** (NUM_STAGES - 1)
"""Pixels per side of a token of the last stage."""


@dataclass(frozen=True)
class SwinShape:
    """Numbers that distinguish the sizes.

    Attributes:
        name: in the registry.
        depths: blocks of the four stages.
        width: channels of the first stage; each stage doubles them.
        heads: attention heads of the four stages.
        window: tokens per side of a window, where `model.window` gives no other.
        init_gain: see `blocks.init_weights`; `None` for a standard deviation of 0.02, as released.
    """

    name: str
    depths: tuple[int, int, int, int]
    width: int
    heads: tuple[int, int, int, int]
    window: int = 7
    init_gain: float | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of all stages."""
        return sum(self.depths)

    @property
    def last_width(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (NUM_STAGES - 1)


SHAPES: dict[str, SwinShape] = {
    shape.name: shape
    for shape in (
        # Ours, for the demo. Two blocks in all but the last stage, so that windows shift at 64 pixels; narrow
        # layers need initial values by their number of inputs (see `blocks.init_weights`).
        SwinShape("swin_nano", (2, 2, 2, 1), 16, (1, 2, 4, 8), window=4, init_gain=1.0),
        # The paper, section 3.3.
        SwinShape("swin_tiny", (2, 2, 6, 2), 96, (3, 6, 12, 24)),
        SwinShape("swin_small", (2, 2, 18, 2), 96, (3, 6, 12, 24)),
        SwinShape("swin_base", (2, 2, 18, 2), 128, (4, 8, 16, 32)),
    )
}


def windows_fit(image_size: int, window: int) -> bool:
    """Whether every stage's grid can be cut into whole windows; a grid that is no larger is one window."""
    # Released code demands the same. timm would pad the grid, and its padding takes part in the attention.
    if image_size % STRIDE:
        return False
    grids = [image_size // PATCH // 2**stage for stage in range(NUM_STAGES)]
    return all(grid <= window or grid % window == 0 for grid in grids)


def misfit_of_windows(image_size: int, window: int) -> tuple[str, str] | None:
    """What is wrong with an image size, and how to put it right; `None` when it can be used.

    Args:
        image_size: pixels per side.
        window: tokens per side.
    """
    if windows_fit(image_size, window):
        return None
    below = next((s for s in range(_multiple_below(image_size), 0, -STRIDE) if windows_fit(s, window)), None)
    # Ends at the next multiple of STRIDE * window at the latest: there the last stage has whole windows.
    above = next(s for s in count(_multiple_below(image_size) + STRIDE, STRIDE) if windows_fit(s, window))
    advice = f"use {above} pixels" if below is None else f"use {below} or {above} pixels"
    if windows := [w for w in range(4, min(16, image_size // PATCH) + 1) if windows_fit(image_size, w)]:
        advice += f", or a window of {' or '.join(map(str, windows))}"
    if image_size % STRIDE:
        return f"Images of {image_size} pixels cannot be merged down to stride {STRIDE}", advice
    grids = "-".join(str(image_size // PATCH // 2**stage) for stage in range(NUM_STAGES))
    what = (
        f"Images of {image_size} pixels have {grids} tokens per side in the stages, which windows of {window}"
    )
    return f"{what} do not divide", advice


def _multiple_below(image_size: int) -> int:
    return image_size // STRIDE * STRIDE
