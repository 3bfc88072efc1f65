"""The colours of label maps in DAVIS and PASCAL VOC."""

from __future__ import annotations


def davis_palette() -> list[int]:
    """The 256 x 3 colours of DAVIS and PASCAL VOC, as a flat list."""
    # Bits 0, 1, 2 of the index become the highest bits of red, green and blue, bits 3, 4, 5 the next
    # lower ones, and so on: neighbouring indices get different colours (`VOClabelcolormap` of the VOC
    # devkit).
    colours = []
    for index in range(256):
        for channel in range(3):
            bits = [(index >> (3 * level + channel)) & 1 for level in range(8)]
            colours.append(sum(bit << (7 - level) for level, bit in enumerate(bits)))
    return colours
