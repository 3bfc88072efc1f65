"""Composition of digits on textures, with exact masks.

A pixel belongs to a thing when the thing's ink covers more than half of it and that of no later thing does.
Images are float32 (H, W, 3) in [0, 1] during composition, uint8 in the result. As in COCO, "things" are
countable objects and "stuff" is background regions.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vitpipe.datasets.embedded.digits import NUM_DIGITS, Pose, Split, draw_digit, scans
from vitpipe.datasets.embedded.textures import CLUTTER, TEXTURES, Texture, crop_coin, crop_texture

NOTHING, OTHER = -1, 0
# Annotated things stay recognisable: later things may hide at most this share of an earlier one.
_MAX_HIDDEN = 0.4
_MIN_VISIBLE_PIXELS = 16  # a thing with a smaller mask in the image is not placed
_PLACING_ATTEMPTS = 12
# The first attempts look for free space; overlap is allowed only after they have failed.
_FREE_ATTEMPTS = 4


@dataclass(frozen=True)
class Thing:
    """A digit in an image. A crowd is a cluster of equal digits too small to annotate individually."""

    digit: int
    mask: NDArray[np.bool_] = field(repr=False)
    is_crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """An image with its ground truth.

    Attributes:
        image: (H, W, 3) uint8.
        stuff: (H, W) uint8, the background class: 0 where no class applies, else 1 + index into `TEXTURES`.
    """

    image: NDArray[np.uint8] = field(repr=False)
    things: tuple[Thing, ...]
    stuff: NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class Sprite:
    """A thing to paste: ink coverage (h, w) in [0, 1] and colour (h, w, 3) or (3,)."""

    cover: NDArray[np.float32]
    colour: NDArray[np.float32]


class Canvas:
    """An image under composition, with the owner of every pixel (`NOTHING` or the number of a thing)."""

    def __init__(self, image: NDArray[np.float32], stuff: NDArray[np.uint8]) -> None:
        self.image, self.stuff = image, stuff
        self.owner = np.full(stuff.shape, NOTHING, np.int16)
        self.areas: dict[int, int] = {}  # pixels of every thing when it was drawn, before later ones hide it

    def footprint(self, sprite: Sprite, x: int, y: int) -> NDArray[np.bool_]:
        """Mask (H, W) of the sprite's ink with its top left corner at (x, y), cropped to the image."""
        mask = np.zeros(self.stuff.shape, bool)
        here, there = _overlap(self.stuff.shape, sprite.cover.shape, x, y)
        mask[here] = sprite.cover[there] > 0.5
        return mask

    def accepts(self, mask: NDArray[np.bool_], may_overlap: bool) -> bool:
        """Whether a thing with this mask is visible and leaves every earlier thing recognisable."""
        if mask.sum() < _MIN_VISIBLE_PIXELS:
            return False
        touched = np.unique(self.owner[mask])
        touched = touched[touched != NOTHING]
        if not may_overlap:
            return not len(touched)
        return all(
            ((self.owner == number) & ~mask).sum() >= (1 - _MAX_HIDDEN) * self.areas[number]
            for number in touched.tolist()
        )

    def paste(self, sprite: Sprite, x: int, y: int, number: int, shadow: int = 0) -> None:
        """Draw a sprite as thing `number`, with a shadow offset by `shadow` pixels.

        With NOTHING as number it becomes background of label 0.
        """
        if shadow:
            here, there = _overlap(self.stuff.shape, sprite.cover.shape, x + shadow, y + shadow)
            self.image[here] *= 1.0 - 0.4 * sprite.cover[there][..., None]
        here, there = _overlap(self.stuff.shape, sprite.cover.shape, x, y)
        cover = sprite.cover[there][..., None]
        colour = sprite.colour[there] if sprite.colour.ndim == 3 else sprite.colour
        self.image[here] += cover * (colour - self.image[here])
        mask = self.footprint(sprite, x, y)
        self.owner[mask] = number
        if number == NOTHING:
            self.stuff[mask] = OTHER
        else:
            # Summed, because a crowd consists of several sprites.
            self.areas[number] = self.areas.get(number, 0) + int(mask.sum())

    def pixels(self) -> NDArray[np.uint8]:
        """The image as (H, W, 3) uint8."""
        return np.rint(np.clip(self.image, 0.0, 1.0) * 255.0).astype(np.uint8)


def compose_single(
    digit: int, texture: Texture | None, split: Split, size: int, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """One large digit near the centre, (H, W, 3) uint8 with a shorter side of `size` pixels.

    Args:
        texture: the background, or None for any texture or cluttered photograph.
    """
    # Half of the images are square, 70 % of the others landscape.
    long = round(size * generator.choice((1.0, 1.0, 1.15, 1.3)))
    width, height = (long, size) if generator.random() < 0.7 else (size, long)
    pool = (*TEXTURES, *CLUTTER)
    chosen = texture or pool[generator.integers(len(pool))]
    background = crop_texture(chosen, width, height, generator)
    canvas = Canvas(background, np.ones((height, width), np.uint8))
    cover = _draw(digit, split, size * generator.uniform(0.66, 0.86), generator)
    shift = generator.uniform(-0.04, 0.04, 2) * size
    x = round((width - cover.shape[1]) / 2 + shift[0])
    y = round((height - cover.shape[0]) / 2 + shift[1])
    # No mask is kept: classification needs the pixels only.
    canvas.paste(_inked(cover, generator), x, y, 0, shadow=int(generator.integers(0, 3)))
    return canvas.pixels()


def compose_scene(
    split: Split, size: int, generator: np.random.Generator, *, num_things: int, with_crowd: bool
) -> Scene:
    """An image with several digits and background regions, sometimes a coin and a crowd.

    Args:
        size: longer side in pixels; the shorter one is size or three quarters of it.
        num_things: number of digits to try to place; 0 gives an image without annotations.
    """
    # 4:3 is the usual aspect ratio of COCO (640 x 480).
    short = size * 3 // 4
    height, width = ((short, size), (size, short), (size, size))[generator.choice(3, p=(0.6, 0.2, 0.2))]
    canvas = Canvas(*_background(height, width, generator))
    if generator.random() < 0.35:
        diameter = int(size * generator.uniform(0.12, 0.25))
        colour, cover = crop_coin(diameter, generator)
        x, y = (int(generator.integers(0, side - diameter)) for side in (width, height))
        canvas.paste(Sprite(cover, colour), x, y, NOTHING, shadow=1)
    # Small heights are more frequent (mean of the beta distribution 0.4), and large digits come first:
    # small ones still find free space beside them.
    heights = np.sort(size * generator.beta(1.2, 1.8, num_things) * 0.68 + size * 0.14)[::-1]
    digits: list[int] = []
    for ink_height in heights:
        digit = int(generator.integers(NUM_DIGITS))
        if _place(canvas, digit, split, float(ink_height), len(digits), generator):
            digits.append(digit)
    crowds = set()
    if with_crowd:
        crowds.add(len(digits))
        digits.append(_place_crowd(canvas, split, size, len(digits), generator))
    # At the end, when nothing more is drawn: what is visible is what is annotated. A crowd may have found
    # no place.
    masks = [canvas.owner == number for number in range(len(digits))]
    things = tuple(
        Thing(digit, mask, number in crowds)
        for number, (digit, mask) in enumerate(zip(digits, masks, strict=True))
        if mask.any()
    )
    return Scene(canvas.pixels(), things, canvas.stuff)


def compose_video(
    split: Split, size: int, num_frames: int, generator: np.random.Generator, *, num_things: int
) -> tuple[Scene, ...]:
    """Digits that move, rotate and occlude each other on a panning background.

    Thing k of every frame is the same object; its mask is empty while it is hidden or outside the frame.
    """
    # 16:9 as in DAVIS (854 x 480). The background is larger by the largest pan, two pixels per frame in
    # both directions.
    height, width = size * 9 // 16, size
    image, stuff = _background(height + num_frames * 2, width + num_frames * 2, generator)
    pan = generator.integers(-2, 3, 2)
    movers = [_Mover.draw(split, height, width, generator) for _ in range(num_things)]
    frames = []
    for time in range(num_frames):
        left, top = (num_frames + int(step) * (time - num_frames // 2) for step in pan)
        window = slice(top, top + height), slice(left, left + width)
        canvas = Canvas(image[window].copy(), stuff[window].copy())
        for number, mover in enumerate(movers):
            sprite, x, y = mover.at(time)
            canvas.paste(sprite, x, y, number, shadow=1)
        things = tuple(Thing(mover.digit, canvas.owner == n) for n, mover in enumerate(movers))
        frames.append(Scene(canvas.pixels(), things, canvas.stuff))
    return tuple(frames)


@dataclass(frozen=True)
class _Mover:
    """A digit on a straight path; pixels and degrees per frame."""

    digit: int
    scan: NDArray[np.float32]
    colour: NDArray[np.float32]
    height: float
    start: NDArray[np.float64]
    speed: NDArray[np.float64]
    turn: float
    turn_speed: float

    @classmethod
    def draw(cls, split: Split, height: int, width: int, generator: np.random.Generator) -> _Mover:
        digit = int(generator.integers(NUM_DIGITS))
        pool = scans(split)[digit]
        return cls(
            digit,
            pool[generator.integers(len(pool))],
            _paint(generator),
            height * generator.uniform(0.4, 0.65),
            generator.uniform((0.25 * width, 0.35 * height), (0.75 * width, 0.65 * height)),
            generator.uniform((-0.03 * width, -0.02 * height), (0.03 * width, 0.02 * height)),
            generator.uniform(-15, 15),
            generator.uniform(-3, 3),
        )

    def at(self, time: int) -> tuple[Sprite, int, int]:
        cover = draw_digit(self.scan, Pose(self.height, self.turn + self.turn_speed * time))
        x, y = self.start + self.speed * time - np.array(cover.shape[::-1]) / 2
        return Sprite(cover, self.colour), round(float(x)), round(float(y))


def _place(
    canvas: Canvas, digit: int, split: Split, height: float, number: int, generator: np.random.Generator
) -> bool:
    """Draw the digit where it is visible and leaves the others recognisable; False if nowhere."""
    sprite = _inked(_draw(digit, split, height, generator), generator)
    rows, columns = canvas.stuff.shape
    for attempt in range(_PLACING_ATTEMPTS):
        # Up to a tenth of the digit may be cut off by the image border.
        x, y = (
            int(generator.integers(-length // 10, max(1, side - length * 9 // 10)))
            for length, side in zip(sprite.cover.shape[::-1], (columns, rows), strict=True)
        )
        if canvas.accepts(canvas.footprint(sprite, x, y), may_overlap=attempt >= _FREE_ATTEMPTS):
            canvas.paste(sprite, x, y, number, shadow=1 + round(height / 40))
            return True
    return False


def _place_crowd(canvas: Canvas, split: Split, size: int, number: int, generator: np.random.Generator) -> int:
    """Draw a cluster of 3 x 4 small equal digits where the image is free; its ink is one crowd region."""
    digit = int(generator.integers(NUM_DIGITS))
    rows, columns = canvas.stuff.shape
    step = max(8, size // 12)
    x0, y0 = (int(generator.integers(0, side - 4 * step)) for side in (columns, rows))
    for row in range(3):
        for column in range(4):
            sprite = _inked(_draw(digit, split, step * 0.8, generator), generator)
            x, y = x0 + column * step, y0 + row * step
            mask = canvas.footprint(sprite, x, y)
            if (canvas.owner[mask] == NOTHING).all():
                canvas.paste(sprite, x, y, number)
    return digit


def _draw(digit: int, split: Split, height: float, generator: np.random.Generator) -> NDArray[np.float32]:
    pool = scans(split)[digit]
    pose = Pose(
        height,
        turn=generator.uniform(-10, 10),
        slant=generator.uniform(-0.1, 0.1),
        width_ratio=generator.uniform(0.9, 1.15),
    )
    return draw_digit(pool[generator.integers(len(pool))], pose)


def _inked(cover: NDArray[np.float32], generator: np.random.Generator) -> Sprite:
    """Colour a digit in a bright paint, with a vertical gradient of light."""
    light = np.linspace(1.0, generator.uniform(0.8, 1.0), cover.shape[0], dtype=np.float32)
    colour = _paint(generator) * light[:, None, None]
    return Sprite(cover, np.broadcast_to(colour, (*cover.shape, 3)))


def _paint(generator: np.random.Generator) -> NDArray[np.float32]:
    """A bright colour of any hue, (3,)."""
    # Always brighter than the background (full value, low saturation): with a fixed contrast polarity,
    # small networks learn the shapes in minutes.
    return np.array(colorsys.hsv_to_rgb(generator.random(), generator.uniform(0.0, 0.45), 1.0), np.float32)


def _background(
    height: int, width: int, generator: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One to three textures with wavy borders: image (H, W, 3) and class map (H, W)."""
    num_textures = generator.choice((1, 2, 3), p=(0.3, 0.45, 0.25))
    chosen = generator.permutation(len(TEXTURES))[:num_textures].tolist()
    image = crop_texture(TEXTURES[chosen[0]], width, height, generator)
    stuff = np.full((height, width), chosen[0] + 1, np.uint8)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    for texture in chosen[1:]:
        angle, phase = generator.uniform(0, 2 * np.pi, 2)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        wave = 0.06 * height * np.sin(across * (6.0 / width) + phase)
        # The quantile gives the new texture 30 to 55 % of the area at any angle.
        side = along + wave > np.quantile(along, generator.uniform(0.45, 0.7))
        image[side] = crop_texture(TEXTURES[texture], width, height, generator)[side]
        stuff[side] = texture + 1
    return np.ascontiguousarray(image), stuff


def _overlap(
    canvas: tuple[int, ...], patch: tuple[int, ...], x: int, y: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Slices of the canvas and of the patch where the two overlap; empty if they do not."""
    rows = slice(max(0, y), max(0, min(canvas[0], y + patch[0])))
    columns = slice(max(0, x), max(0, min(canvas[1], x + patch[1])))
    return (rows, columns), (
        slice(rows.start - y, max(rows.start, rows.stop) - y),
        slice(columns.start - x, max(columns.start, columns.stop) - x),
    )
