"""Maps of one network at other strides: what makes a pyramid of a plain vision transformer.

As in the segmentation of BEiT (Hangbo Bao et al., arXiv 2106.08254) and the detection of XCiT (Alaaeldin
El-Nouby et al., arXiv 2106.09681).
"""

from __future__ import annotations

from torch import nn


def rescaled(width: int, factor: float) -> nn.Module:
    """(B, C, H, W) -> (B, C, factor * H, factor * W), C = width.

    Args:
        factor: a power of two. Above 1 a transposed convolution for every doubling, with batch norm and GELU
            between two of them; below 1 the largest of a square.
    """
    if factor == 1:
        return nn.Identity()
    if factor < 1:
        side = round(1 / factor)
        # Rounded up: of a map with odd sides the last row and column would be lost otherwise.
        return nn.MaxPool2d(kernel_size=side, stride=side, ceil_mode=True)
    if factor == 2:
        return doubled(width, width)
    layers: list[nn.Module] = []
    while factor >= 2:
        layers += [doubled(width, width), nn.BatchNorm2d(width), nn.GELU()]
        factor /= 2
    # Under several processes the loop converts batch norms to synchronised ones.
    return nn.Sequential(*layers[:-2])


def doubled(width: int, out_width: int) -> nn.ConvTranspose2d:
    """(B, C, H, W) -> (B, C', 2H, 2W)."""
    return nn.ConvTranspose2d(width, out_width, kernel_size=2, stride=2)
