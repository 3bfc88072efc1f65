"""Captioned grids of images as one PNG. Images are (H, W, 3) uint8 arrays, RGB.

Drawn with Pillow and NumPy, as `torchvision.utils` does: that and torch take 8 s to import, a quarter of
the time in which a small dataset is prepared.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vitpipe.contracts.errors import StorageError, disk_errors, reason_of

Pixels = NDArray[np.uint8]
_GAP, _INNER_GAP = 8, 2
_PAPER = 255
# Text heights in pixels; a strip has room for descenders below its line.
_CAPTION_FONT, _CAPTION_STRIP = 12, 18
_TITLE_FONT, _TITLE_STRIP = 16, 24
_LABEL_FONT = 11
_SWATCH = 14
# Titles of columns and legends; a page shows wide sheets smaller than they are.
_HEAD_FONT, _WIDE_HEAD_FONT, _WIDE = 14, 18, 700
_FRAME_WIDTH = 2
_MASK_OPACITY, _CLASS_OPACITY = 0.45, 0.6
# Multiples of the golden ratio, modulo 1, are spread evenly for any number of classes.
_GOLDEN_RATIO = 0.618034
_NOTE = "Description"  # a keyword that the PNG standard names


@dataclass(frozen=True)
class Tile:
    """An image at the size at which it is shown, and the caption below it."""

    image: Pixels
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """Tiles that share a heading, titles of the columns and a legend; what is empty takes no space.

    Attributes:
        legend: colours with their names, below the tiles.
    """

    title: str
    tiles: Sequence[Tile]
    heads: Sequence[str] = ()
    legend: Sequence[tuple[tuple[int, int, int], str]] = ()


@dataclass(frozen=True)
class DrawnObject:
    """An annotated or predicted object: row of the colour table, box, mask and label.

    Attributes:
        box: corners (x0, y0, x1, y1) in pixels of the image.
        mask: (H, W) of the image.
    """

    colour: int
    box: Sequence[float]
    mask: NDArray[np.bool_]
    text: str


def class_colours(num_classes: int) -> Pixels:
    """Distinct colours, (K, 3): hues in steps of the golden ratio, odd classes darker than even ones."""
    hues = [(number * _GOLDEN_RATIO) % 1.0 for number in range(num_classes)]
    values = [colorsys.hsv_to_rgb(hue, 0.75, 0.95 - 0.3 * (n % 2)) for n, hue in enumerate(hues)]
    return (np.array(values) * 255).astype(np.uint8)


def rgb(colour: Pixels) -> tuple[int, int, int]:
    """A row of a colour table as Pillow takes it: plain integers, not NumPy's."""
    red, green, blue = colour.tolist()
    return red, green, blue


def fit(image: Pixels, side: int) -> Pixels:
    """Resize an image, keeping its aspect ratio, so that its longer side has `side` pixels."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    # An image that is far longer than wide would round to a side of zero.
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def draw_objects(image: Pixels, objects: Sequence[DrawnObject], colours: Pixels, side: int) -> Pixels:
    """Resize an image as `fit` does and draw masks, boxes and labels; the first object is on top.

    Args:
        colours: (K, 3), used in turn if there are fewer than the objects need.
        side: pixels of the longer side of the result.
    """
    chosen = [rgb(colours[thing.colour % len(colours)]) for thing in objects]
    tinted = draw_masks(image, [thing.mask for thing in objects], chosen)
    # Boxes and labels are drawn after resizing, so that lines stay thin and text readable.
    drawn = fit(tinted, side)
    if not objects:
        return drawn
    from PIL import ImageDraw

    height, width = drawn.shape[:2]
    scale = side / max(image.shape[:2])
    # A detector early in training predicts NaN, or corners in reverse order, which Pillow refuses.
    boxes = np.nan_to_num(np.array([thing.box for thing in objects], np.float64)) * scale
    boxes = boxes.clip(0, (width - 1, height - 1, width - 1, height - 1))
    boxes[:, 2:] = np.maximum(boxes[:, :2], boxes[:, 2:])
    picture = Image.fromarray(drawn)
    pen = ImageDraw.Draw(picture)
    for box, colour in zip(boxes[::-1].astype(int).tolist(), chosen[::-1], strict=True):
        pen.rectangle(box, outline=colour, width=_FRAME_WIDTH)
    labels = [
        (box[0] + _FRAME_WIDTH + 1, box[1] + 1, thing.text) for box, thing in zip(boxes, objects, strict=True)
    ]
    return _write(np.asarray(picture), labels, _LABEL_FONT, on_image=True)


def draw_masks(
    image: Pixels,
    masks: Sequence[NDArray[np.bool_]],
    colours: Sequence[tuple[int, int, int]],
    opacity: float = _MASK_OPACITY,
) -> Pixels:
    """Tint masks (H, W), one colour each; where masks overlap, the first one counts."""
    painted = image.copy()
    for mask, colour in zip(reversed(masks), reversed(colours), strict=True):
        painted[mask] = colour
    return (image * (1 - opacity) + painted * opacity).astype(np.uint8)


def draw_labels(image: Pixels, labels: NDArray[np.integer[Any]], colours: Pixels) -> Pixels:
    """Tint an image by its label map (H, W); labels that are not rows of `colours` (ignored) turn dark."""
    known = (labels >= 0) & (labels < len(colours))
    present = np.unique(labels[known]).tolist()
    masks = [labels == label for label in present]
    chosen = [rgb(colours[label]) for label in present]
    # Black for ignored pixels: left as they are, they would be the brightest pixels.
    return draw_masks(image, [*masks, ~known], [*chosen, (0, 0, 0)], _CLASS_OPACITY)


def legend_of(
    maps: Sequence[NDArray[np.integer[Any]]],
    colours: Pixels,
    names: Sequence[str],
    *,
    ignored: str = "ignored",
) -> list[tuple[tuple[int, int, int], str]]:
    """Colour and name of every class that occurs in label maps, as `draw_labels` tints them.

    Args:
        names: of the rows of `colours`.
        ignored: what labels that are no class are called.
    """
    present = np.unique(np.concatenate([np.unique(labels) for labels in maps])) if maps else np.array([], int)
    known = [label for label in present.tolist() if 0 <= label < len(colours)]
    black = [((0, 0, 0), ignored)] if len(known) < len(present) else []
    return [*((rgb(colours[label]), names[label]) for label in known), *black]


def side_by_side(images: Sequence[Pixels]) -> Pixels:
    """Images in one row, bottoms aligned, without a border."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    # A smaller gap than between tiles, so that they are seen as one.
    row = _row([_canvas(image, height, width) for image in images], _INNER_GAP)
    return row[_INNER_GAP:-_INNER_GAP, _INNER_GAP:-_INNER_GAP]


def write_grid(path: Path, sections: Sequence[Section], *, columns: int, note: str = "") -> None:
    """Write sections one below the other as a PNG, each a grid of tiles with captions below.

    A row is as high as its highest tile; images are aligned with their captions at the bottom left. Captions
    that are wider than the widest tile end in an ellipsis.

    Args:
        note: what the picture shows and how it was chosen; kept in the file, see `note_of`.

    Raises:
        StorageError: when the disk is full or cannot be written.
    """
    filled = [section for section in sections if section.tiles]
    # One width for all sections, so that their columns are aligned.
    width = max((tile.image.shape[1] for section in filled for tile in section.tiles), default=1)
    columns = max(1, min(columns, max((len(section.tiles) for section in filled), default=1)))
    sheet_width = columns * (width + _GAP) + _GAP
    strips = [_blank(0, sheet_width)]
    for section in filled:
        if section.title:
            title = _write(_blank(_TITLE_STRIP, sheet_width), [(_GAP, _GAP, section.title)], _TITLE_FONT)
            strips.append(title)
        if section.heads:
            places = [(_GAP + i * (width + _GAP), head) for i, head in enumerate(section.heads[:columns])]
            strips.append(_heads(places, width, sheet_width))
        for first in range(0, len(section.tiles), columns):
            # Row by row, since a grid of portrait and landscape rows would leave a gap above the latter.
            cells = _cells(section.tiles[first : first + columns], width, columns)
            strips.append(_row(cells, _GAP)[:-_GAP])
        if section.legend:
            strips += [_blank(_GAP, sheet_width), _legend(section.legend, sheet_width)]
    sheet = np.concatenate([*strips, _blank(_GAP, sheet_width)])
    about = PngInfo()
    if note:
        about.add_itxt(_NOTE, note)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(path, "PNG", pnginfo=about)


def note_of(path: Path) -> str:
    """What a picture of `write_grid` or `write_animation` shows, in its own words; empty for others."""
    with Image.open(path) as picture:
        return str(picture.info.get(_NOTE, "")) or picture.info.get("comment", b"").decode("utf-8", "replace")


@contextmanager
def optional_figure(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """Report an error inside the context instead of raising it: no figure is worth the loss of a result.

    Figures are drawn after hours of training, from predictions that may hold anything. A disk that refuses a
    write is reported as an error: it would meet the results as well.

    Args:
        say: takes the report, one line.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {reason_of(error)}"
        say(f"The figure {name} was not drawn ({why}); all results are complete")


def _cells(tiles: Sequence[Tile], width: int, columns: int) -> list[Pixels]:
    """One row of tiles with their captions as images of one size, filled up with blank ones."""
    height = max(tile.image.shape[0] for tile in tiles)
    strip = _CAPTION_STRIP if any(tile.caption for tile in tiles) else 0
    cells = []
    for tile in tiles:
        cell = _canvas(tile.image, height, width, below=strip)
        if tile.caption:
            cell = _write(cell, [(0, height + 2, tile.caption)], _CAPTION_FONT)
        cells.append(cell)
    return cells + [_blank(height + strip, width)] * (columns - len(cells))


def _head_font(sheet_width: int) -> int:
    return _WIDE_HEAD_FONT if sheet_width > _WIDE else _HEAD_FONT


def _heads(places: Sequence[tuple[int, str]], width: int, sheet_width: int) -> Pixels:
    """Titles of columns, each cut to the width of its column."""
    strip, size = _blank(_TITLE_STRIP, sheet_width).copy(), _head_font(sheet_width)
    for left, head in places:
        strip[:, left : left + width] = _write(_blank(_TITLE_STRIP, width), [(0, 2, head)], size)
    return strip


def _legend(entries: Sequence[tuple[tuple[int, int, int], str]], width: int) -> Pixels:
    """Swatches with names, from left to right in as many lines as they need; (H, width, 3)."""
    from PIL import ImageFont

    size = _head_font(width)
    font, line = ImageFont.load_default(size), _blank(size + 8, width)
    lines, left = [line.copy()], _GAP
    for colour, name in entries:
        needed = _SWATCH + 4 + round(font.getlength(name))
        if left > _GAP and left + needed > width - _GAP:
            lines.append(line.copy())
            left = _GAP
        top = (len(line) - _SWATCH) // 2
        lines[-1][top : top + _SWATCH, left : left + _SWATCH] = colour
        lines[-1] = _write(lines[-1], [(left + _SWATCH + 4, 2, name)], size).copy()
        left += needed + 2 * _GAP
    return np.concatenate(lines)


def _blank(height: int, width: int) -> Pixels:
    return np.full((height, width, 3), _PAPER, np.uint8)


def _canvas(image: Pixels, height: int, width: int, *, below: int = 0) -> Pixels:
    """An image at the bottom left of a blank one (height + below, width, 3), above `below` blank rows."""
    canvas = _blank(height + below, width)
    canvas[height - image.shape[0] : height, : image.shape[1]] = image
    return canvas


def _row(cells: Sequence[Pixels], gap: int) -> Pixels:
    """Images of one size from left to right, with a gap between them and around."""
    height, width = cells[0].shape[:2]
    row = _blank(height + 2 * gap, len(cells) * (width + gap) + gap)
    for number, cell in enumerate(cells):
        left = gap + number * (width + gap)
        row[gap : gap + height, left : left + width] = cell
    return row


def _write(
    image: Pixels, texts: Sequence[tuple[float, float, str]], size: int, *, on_image: bool = False
) -> Pixels:
    """Write (x, y of the top left corner, text) with Pillow; a text is moved or shortened to stay inside.

    Args:
        on_image: white letters with a black outline, for any background, and below each other where they
            would overlap, the first at its place; else black letters.
    """
    from PIL import ImageDraw, ImageFont

    picture = Image.fromarray(image)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    outline = 1 if on_image else 0
    taken: list[tuple[float, float, float, float]] = []
    for x, y, wanted in texts:
        text = wanted
        room = picture.width - 2 * outline
        # A caption keeps its place at the left of its tile; a label moves to the left first.
        while len(text) > 1 and font.getlength(text) > room - (0 if on_image else x):
            text = text.rstrip("…")[:-1].rstrip() + "…"
        _, _, right, bottom = pen.textbbox((0, 0), text, font=font, stroke_width=outline)
        left = max(outline, min(x, picture.width - right))
        top = max(outline, min(y, picture.height - bottom))
        if on_image:
            top = _free_place(left, top, (right, bottom), taken, picture.height)
            pen.text((left, top), text, "white", font=font, stroke_width=outline, stroke_fill="black")
        else:
            pen.text((left, top), text, "black", font=font)
        taken.append((left, top, left + right, top + bottom))
    return np.asarray(picture)


def _free_place(
    left: float,
    top: float,
    size: tuple[float, float],
    taken: Sequence[tuple[float, float, float, float]],
    height: int,
) -> float:
    """The next lower place of a label where it covers none of the earlier ones; its own if there is none."""
    width, own = size
    place = top
    while place + own <= height:
        hit = [
            y1
            for x0, y0, x1, y1 in taken
            if left < x1 and x0 < left + width and place < y1 and y0 < place + own
        ]
        if not hit:
            return place
        place = max(hit)
    return top
