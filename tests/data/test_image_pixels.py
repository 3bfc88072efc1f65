"""One rule from an image file to pixels: what is packed and trained on is what a served model sees."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vitpipe.config.data import DataConfig
from vitpipe.data.image_pixels import as_packed, encoding_of, rgb_file
from vitpipe.data.manifest import Encoding
from vitpipe.data.shards import open_shards
from vitpipe.datasets.sources.class_folders import read_class_folders
from vitpipe.prepare.pack import PackOptions, Quarantine, pack
from vitpipe.track.posted_pictures import pictures


def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def photo(seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((90, 60))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif)


def with_damaged_text():
    data, body = saved(photo(), "PNG"), b"profile\0\0not compressed"
    chunk = struct.pack(">I", len(body)) + b"iCCP" + body + struct.pack(">I", zlib.crc32(b"iCCP" + body))
    return data[:33] + chunk + data[33:]


def grey(kind, low, high):
    return Image.fromarray(np.linspace(low, high, 5400).reshape(60, 90).astype(kind))


FILES = {
    "RGB.jpg": lambda: saved(photo(), "JPEG"),
    "RGB.png": lambda: saved(photo(), "PNG"),
    "RGB.webp": lambda: saved(photo(), "WEBP"),
    "L.png": lambda: saved(photo().convert("L"), "PNG"),
    "1.png": lambda: saved(photo().convert("1"), "PNG"),
    "palette.png": lambda: saved(photo().quantize(16), "PNG"),
    "palette-transparent.png": lambda: saved(photo().quantize(16), "PNG", transparency=0),
    "RGBA.png": lambda: saved(Image.merge("RGBA", [*photo().split(), photo(1).convert("L")]), "PNG"),
    "LA.png": lambda: saved(Image.merge("LA", [photo().convert("L"), photo(1).convert("L")]), "PNG"),
    "CMYK.jpg": lambda: saved(photo().convert("CMYK"), "JPEG"),
    "CMYK.tif": lambda: saved(photo().convert("CMYK"), "TIFF"),
    "rotated.jpg": rotated,
    "frames.gif": lambda: saved(photo(), "GIF", save_all=True, append_images=[photo(1)]),
    "16-bit.png": lambda: saved(grey(np.uint16, 0, 65535), "PNG"),
    "16-bit-dark.png": lambda: saved(grey(np.uint16, 0, 4095), "PNG"),
    "16-bit-big-endian.tif": lambda: saved(
        Image.frombytes("I;16B", (90, 60), np.asarray(grey(np.uint16, 0, 65535)).astype(">u2").tobytes()),
        "TIFF",
    ),
    "integers.tif": lambda: saved(grey(np.int32, -500, 2**24), "TIFF"),
    "floats.tif": lambda: saved(grey(np.float32, -2, 3), "TIFF"),
    "unit-floats.tif": lambda: saved(grey(np.float32, 0, 1), "TIFF"),
    "damaged-profile.png": with_damaged_text,
}


def packed_pixels(folder, content, name, encoding):
    """What training reads of a file after `prepare` has packed it."""
    for split in ("train", "val"):
        (folder / "set" / split / "a").mkdir(parents=True)
        (folder / "set" / split / "a" / name).write_bytes(content)
    pack(
        read_class_folders(folder / "set", "own"),
        folder / "out" / "own",
        options=PackOptions(1 << 24, encoding),
        quarantine=Quarantine(0),
        scratch=folder / "scratch",
    )
    image, _ = open_shards(folder / "out", "own", "val").decode(0)
    return np.asarray(image)


@pytest.mark.parametrize("short_side", [None, 32])
@pytest.mark.parametrize("name", FILES)
def test_a_posted_picture_has_the_pixels_that_training_reads(name, short_side, tmp_path):
    content = FILES[name]()
    encoding = encoding_of(DataConfig(root="x", short_side=short_side))
    (posted,) = pictures([base64.b64encode(content).decode()], encoding)
    expected = packed_pixels(tmp_path, content, name, encoding)
    assert np.ptp(expected) > 10
    np.testing.assert_array_equal(np.asarray(posted), expected)


# A damaged profile is taken out before anything is drawn.
@pytest.mark.parametrize("name", [name for name in FILES if name != "damaged-profile.png"])
def test_a_drawing_shows_the_same_pixels(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name]())
    np.testing.assert_array_equal(np.asarray(rgb_file(tmp_path / name)), np.asarray(as_packed(FILES[name]())))


@pytest.mark.parametrize(
    "name", [name for name in FILES if not name.startswith(("integers", "floats", "unit"))]
)
def test_detectors_and_segmentors_are_served_what_they_were_measured_with(name):
    """COCO's and ADE20K's files are kept as they are, and mmcv reads them by OpenCV."""
    mmcv = pytest.importorskip("mmcv")
    content = FILES[name]()
    # The flag of `coco_dataset` and `segmentor`; OpenCV's channels are blue, green, red.
    measured = mmcv.imfrombytes(content, flag="color_ignore_orientation")
    served = np.asarray(as_packed(content))
    # The two libraries round CMYK differently.
    assert np.abs(measured[..., ::-1].astype(int) - served).max() <= (1 if name == "CMYK.jpg" else 0)


def test_a_picture_between_the_limit_and_its_double_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 60)
    assert as_packed(saved(photo(), "PNG")).size == (90, 60)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 60 - 1)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(Image.DecompressionBombError, match="90x60 pixels"),
    ):
        as_packed(saved(photo(), "PNG"))


def test_only_larger_pictures_are_reduced():
    small = saved(photo(), "PNG")
    whole = np.asarray(as_packed(small))
    np.testing.assert_array_equal(np.asarray(as_packed(small, Encoding(short_side=60, quality=90))), whole)
    assert as_packed(small, Encoding(short_side=30, quality=90)).size == (45, 30)
