"""A small encoder with a class token of its own at every block, for tests of what reads several blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitpipe.models.network import Encoder, Features


class TokenEncoder(Encoder):
    """Mean of the pixels of every patch > Linear and GELU, `depth` times > norm of the class token.

    Attributes:
        num_passes: calls of `features` so far.
    """

    family = "token"

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, kernel_size=16, stride=16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.num_passes = 0

    @property
    def num_layers(self) -> int:
        """Input, blocks and a head."""
        return len(self.blocks) + 2

    def layer_of(self, name: str) -> int:
        """0 for all, as nothing is trained layer by layer."""
        return 0

    @property
    def num_blocks(self) -> int:
        """`depth`."""
        return len(self.blocks)

    @property
    def feature_width(self) -> int:
        """`width`."""
        return self.embed.out_channels

    def final_norm(self, tokens: Tensor) -> Tensor:
        """The norm."""
        return self.norm(tokens)

    def features(
        self, images_BCHW: Tensor, blocks: Sequence[int] = (-1,), *, attention: bool = False
    ) -> Features:
        """The class token of a block is the mean of its tokens."""
        self.num_passes += 1
        x_BCHW = self.embed(images_BCHW)
        grid, x_BNC = (x_BCHW.shape[2], x_BCHW.shape[3]), x_BCHW.flatten(2).transpose(1, 2)
        outputs = []
        for block in self.blocks:
            x_BNC = x_BNC + block(x_BNC)
            outputs.append(x_BNC)
        asked = self.chosen_blocks(blocks)
        tokens = tuple(outputs[number] for number in asked)
        return Features(
            tokens,
            (grid,) * len(asked),
            self.norm(outputs[-1].mean(dim=1)),
            class_tokens=tuple(x.mean(dim=1) for x in tokens),
        )
