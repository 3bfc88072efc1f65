"""Anomalies of single image files: what is kept, converted, resized or left out."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitpipe.data.manifest import Encoding
from vitpipe.datasets.bundled import bundled_file
from vitpipe.prepare.examine import examine


def saved(image, image_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width=90, height=60):
    return Image.effect_noise((width, height), 60).convert("RGB")


def as_trained_on(content):
    """Pixels as published loaders read them."""
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photo(), "JPEG", exif=exif)


KEPT = {
    "CMYK": (lambda: saved(photo().convert("CMYK"), "JPEG"), "a.JPEG"),
    "rotated by EXIF": (rotated, "a.JPEG"),
    "palette": (lambda: saved(photo().quantize(16), "PNG"), "a.png"),
    "transparency": (lambda: saved(photo().convert("RGBA"), "PNG"), "a.png"),
    "several frames": (
        lambda: saved(photo(), "GIF", save_all=True, append_images=[photo().transpose(1)]), "a.gif",
    ),
    "PNG named .jpeg": (lambda: saved(photo(), "PNG"), "n02105855_2933.JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("finding", KEPT)
def test_anomalies_that_loaders_read_are_kept_byte_for_byte_and_listed(finding):
    make, name = KEPT[finding]
    content = make()
    assert examine(content, name) == (content, "", finding, "kept", 0)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_images_have_no_finding_and_truncated_ones_are_left_out(image_format, mode):
    content = saved(photo().convert(mode), image_format)
    assert examine(content, f"a.{image_format.lower()}") == (content, "", "", "", 0)
    half = examine(content[: len(content) // 2], "a")
    assert half.content == b""
    assert half.finding
    assert half.treatment == "left out"


@pytest.mark.parametrize(
    "content", [b"", b"not an image", b"\xff\xd8\xff\xe0 begins like a JPEG", b"\x89PNG\r\n\x1a\n"]
)
def test_files_that_are_not_images_are_left_out(content):
    examined = examine(content, "a.jpg")
    assert (examined.content, examined.treatment) == (b"", "left out")
    assert examined.finding


def sixteen_bits(values):
    return saved(Image.fromarray(values.astype(np.uint16)), "PNG")


def test_sixteen_bit_grey_keeps_its_upper_byte_instead_of_being_clipped_to_white():
    values = np.arange(60 * 90, dtype=np.uint32).reshape(60, 90) * 12
    content = sixteen_bits(values)
    assert (as_trained_on(content) == 255).mean() > 0.9, "loaders see white"
    examined = examine(content, "a.png")
    assert (examined.suffix, examined.finding) == (".png", "more than 8 bits per value")
    assert examined.treatment == "converted"
    np.testing.assert_array_equal(as_trained_on(examined.content)[..., 0], (values >> 8).astype(np.uint8))


def test_a_dark_sixteen_bit_image_stays_dark():
    """By the same rule as every other: the images of a set keep their relative brightness."""
    pixels = as_trained_on(examine(sixteen_bits(np.full((60, 90), 4095)), "a.png").content)
    assert pixels.max() == 15
    assert as_trained_on(examine(sixteen_bits(np.full((60, 90), 200)), "a.png").content).max() == 0


def test_values_that_are_not_finite_become_black():
    values = np.linspace(0, 1, 60 * 90, dtype=np.float32).reshape(60, 90)
    values[0, 0], values[0, 1] = np.nan, np.inf
    pixels = as_trained_on(examine(saved(Image.fromarray(values), "TIFF"), "a.tif").content)
    assert (pixels[0, 0, 0], pixels[0, 1, 0], pixels[-1, -1, 0]) == (0, 0, 255)
    nothing = as_trained_on(examine(saved(Image.fromarray(values * np.nan), "TIFF"), "a.tif").content)
    assert nothing.max() == 0


def exif_segment(payload):
    """A JPEG with this as its EXIF data."""
    data = saved(photo(), "JPEG")
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 8) + b"Exif\0\0" + payload + data[2:]


BROKEN_EXIF = {
    "empty": b"",
    "zeros": bytes(8),
    "an index that is cut": b"II*\0\x08\0\0\0\x05\0\x12\x01\x03\0",
    "an index far away": b"II*\0\xff\xff\0\0",
    "a text as orientation": b"II*\0\x08\0\0\0\x01\0"
    + struct.pack("<HHI4s", 0x0112, 2, 4, b"top\0")
    + bytes(4),
    "orientation 9": b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 3, 1, 9) + bytes(4),
}


@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_never_costs_an_image(name, recwarn):
    content = exif_segment(BROKEN_EXIF[name])
    examined = examine(content, "a.jpg")
    assert examined.content == content
    assert "rotated" not in examined.finding
    assert not recwarn.list


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"tEXt", b"Raw profile type exif\0\nexif\n  20\nnot hex at all!\n"),
        (b"zTXt", b"comment\0\0" + zlib.compress(bytes(70_000_000))),
        (b"iCCP", b"profile\0\0not compressed"),
        (b"pHYs", b"\0"),
    ],
)
def test_a_broken_profile_of_a_png_never_costs_an_image(kind, body):
    data = saved(photo(), "PNG")
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    examined = examine(data[:33] + chunk + data[33:], "a.png")  # behind the header
    np.testing.assert_array_equal(as_trained_on(examined.content), as_trained_on(data))


def test_a_png_with_a_profile_and_damaged_pixels_is_left_out():
    data = saved(photo(), "PNG")
    chunk = struct.pack(">I", 4) + b"tEXt" + b"a\0bc" + struct.pack(">I", 7)
    assert examine((data[:33] + chunk + data[33:])[:-400], "a.png").treatment == "left out"


def test_messages_are_the_same_in_every_run():
    assert "0x" not in examine(b"no image", "a.jpg").finding


def test_floats_are_scaled_to_their_own_range():
    values = np.linspace(-2.0, 3.0, 60 * 90, dtype=np.float32).reshape(60, 90)
    pixels = as_trained_on(examine(saved(Image.fromarray(values), "TIFF"), "a.tif").content)
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_a_decompression_bomb_is_left_out_without_being_decoded():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
    examined = examine(bomb, "a.png")
    assert examined.treatment == "left out"
    assert "decompression bomb" in examined.finding


@pytest.mark.parametrize(
    ("size", "expected"), [((90, 60), (48, 32)), ((60, 91), (32, 49)), ((32, 500), None)]
)
def test_the_short_side_is_reduced_and_never_enlarged(size, expected):
    content = saved(photo(*size), "PNG")
    examined = examine(content, "a.png", encoding=Encoding(short_side=32, quality=90))
    with Image.open(io.BytesIO(examined.content)) as image:
        assert image.size == (expected or size)
        assert image.format == ("JPEG" if expected else "PNG")
    assert examined.suffix == (".jpeg" if expected else "")
    assert examined.finding == ""


def test_an_anomalous_image_that_is_resized_is_still_listed():
    examined = examine(
        saved(photo().convert("CMYK"), "JPEG"), "a.jpg", encoding=Encoding(short_side=32, quality=90)
    )
    assert (examined.finding, examined.treatment) == ("CMYK", "kept")


def test_hashes_of_one_image_in_two_sizes_are_close():
    large = Image.open(bundled_file("skimage", "data/chelsea.png")).convert("RGB")
    both = [examine(saved(image, "JPEG", quality=q), "a.jpg", hashed=True).hash
            for image, q in ((large, 95), (large.resize((226, 150)), 70))]  # fmt: skip
    assert (both[0] ^ both[1]).bit_count() <= 4
    assert examine(saved(photo(), "JPEG"), "a.jpg").hash == 0


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF"])
)
def test_arbitrary_bytes_do_not_raise(content, magic):
    examined = examine(magic + content, "a.jpg", hashed=True)
    assert examined.content in (b"", magic + content) or examined.treatment == "converted"
    assert bool(examined.content) != (examined.treatment == "left out")
