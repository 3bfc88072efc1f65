"""Sizes of PaCa-ViT; imports no torch.

Grainger et al., PaCa-ViT: Learning Patch-to-Cluster Attention in Vision Transformers (CVPR 2023, arXiv
2203.11987), supplement, figures 7 and 8; depths of the teacher's networks as in the released code, whose
parameters are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

NUM_STAGES = 4
STRIDE = 32  # pixels of a token of the last stage
Four = tuple[int, int, int, int]


@dataclass(frozen=True)
class PacaShape:
    """One size.

    Attributes:
        widths: channels of the four stages, at strides 4, 8, 16 and 32.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        clusters: M of each stage; 0 for attention among all patches.
        teacher_depths: layers of the clustering teacher in each stage; `None` without a teacher.
        init_gain: see `blocks.init_weights`.
    """

    name: str
    widths: Four
    depths: Four
    heads: Four = (2, 4, 8, 16)
    clusters: Four = (100, 100, 100, 0)
    teacher_depths: Four | None = None
    init_gain: float | None = None

    @property
    def num_blocks(self) -> int:
        """Of all stages, without the teacher's layers."""
        return sum(self.depths)


_SMALL, _BASE = (96, 192, 320, 384), (96, 192, 384, 512)
_ALL = (100, 100, 100, 100)
SHAPES: dict[str, PacaShape] = {
    shape.name: shape
    for shape in (
        # Ours. Narrow networks need initial values by fan-in, see `init_weights`.
        PacaShape("paca_nano", (16, 32, 48, 64), (1, 1, 2, 1), (2, 2, 4, 4), (16, 16, 8, 0), init_gain=1.0),
        PacaShape("paca_tiny", _SMALL, (2, 2, 4, 2)),
        PacaShape("paca_small", _SMALL, (3, 3, 10, 3)),
        PacaShape("paca_base", _BASE, (3, 3, 18, 3)),
        PacaShape("paca_teacher_tiny", _SMALL, (2, 2, 2, 2), clusters=_ALL, teacher_depths=(2, 2, 2, 2)),
        PacaShape("paca_teacher_small", _SMALL, (3, 3, 7, 3), clusters=_ALL, teacher_depths=(2, 2, 2, 2)),
        PacaShape("paca_teacher_base", _BASE, (3, 3, 16, 3), clusters=_ALL, teacher_depths=(2, 2, 4, 2)),
    )
}
