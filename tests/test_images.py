"""Image files: odd ones against pixels known by construction, one image in many depths, damaged metadata."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from images import is_image, read_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def two_pixels(mode, left, right):
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def palette():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putpixel((1, 0), 1)
    return image


ODD = {  # name: (file, left pixel, right pixel) in RGB
    "palette with a clear entry": lambda: (stored(palette(), transparency=0), WHITE, BLUE),
    "alpha": lambda: (stored(two_pixels("RGBA", (*RED, 128), (*RED, 0))), (255, 127, 127), WHITE),
    "grey with alpha": lambda: (stored(two_pixels("LA", (0, 255), (0, 51))), (0,) * 3, (204,) * 3),
    "CMYK": lambda: (stored(two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF"), RED, WHITE),
    "turned": lambda: (stored(two_pixels("RGB", BLUE, RED), exif=orientation(3)), RED, BLUE),
    "animation": lambda: (stored(palette(), "GIF", save_all=True, append_images=[palette()]), RED, BLUE),
}


def orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_read_as_rgb(name):
    file, left, right = ODD[name]()
    image = read_image(file)
    assert image.mode == "RGB" and image.size == (2, 1)
    assert (image.getpixel((0, 0)), image.getpixel((1, 0))) == (left, right)


GREY = np.add.outer(np.arange(15), 15 * np.arange(17)).astype(np.int64)  # 0 to 254


def grey_tiff(values, **options):
    return stored(Image.fromarray(values), "TIFF", **options)


def pgm(values, largest):
    head = f"P5 {values.shape[1]} {values.shape[0]} {largest}\n".encode()
    return io.BytesIO(head + values.astype(">u2").tobytes())


DEPTHS = {  # the same grey image in other depths
    "float 0-1": lambda: grey_tiff((GREY / 255).astype(np.float32)),
    "float -1 to 1": lambda: grey_tiff((GREY / 127 - 1).astype(np.float32)),
    "float with a stated white": lambda: grey_tiff((GREY / 25.5).astype(np.float32), tiffinfo={281: 10}),
    "8 bits in 32": lambda: grey_tiff(GREY.astype(np.int32)),
    "12 bits in 16": lambda: stored(Image.fromarray((GREY << 4).astype(np.uint16))),
    "PGM of 12 bits": lambda: pgm(GREY << 4, 4095),
    "a dark PGM of 16 bits": lambda: pgm(GREY, 255 * 256),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_other_depths_are_scaled_to_the_same_grey(name):
    image = np.asarray(read_image(DEPTHS[name]())).astype(int)
    assert image.shape == (15, 17, 3)
    expected = GREY // 256 if name.startswith("a dark") else GREY
    assert np.abs(image - expected[..., None]).max() <= 2  # 254 of 255 or of 256 steps are white


def test_what_is_not_a_number_is_black_and_costs_nothing_else():
    values = (GREY / 255).astype(np.float32)
    values[3, 4], values[5, 6] = np.nan, np.inf
    image = np.asarray(read_image(grey_tiff(values)))[..., 0].astype(int)
    assert image[3, 4] == 0 and image[5, 6] >= 254
    assert np.abs(image - GREY)[6:].max() <= 2


def tiff_block(*entries):
    """EXIF: little-endian entries (tag, type, count, four bytes), then a rational of -1/0 at byte 200."""
    block = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    block += b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return block.ljust(200, b"\0") + struct.pack("<ii", -1, 0)


TURN = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
BROKEN_EXIF = {
    "no TIFF": b"no TIFF",
    "a rational of -1/0": tiff_block(TURN, (0x011A, 10, 1, struct.pack("<I", 200))),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_damaged_exif_never_costs_the_pixels(name):
    block, png = BROKEN_EXIF[name], stored(Image.new("RGB", (8, 6), (90, 140, 40))).getvalue()
    chunk = struct.pack(">I", len(block)) + b"eXIf" + block + struct.pack(">I", zlib.crc32(b"eXIf" + block))
    image = read_image(io.BytesIO(png[:33] + chunk + png[33:]))
    assert image.getcolors() == [(48, (90, 140, 40))]


def test_images_are_told_by_what_pillow_opens():
    for name in ("a.jpg", "b/a.JFIF", "a.AvIf", "a.pgm", "a.webp", "a.TIFF", "a.mpo"):
        assert is_image(name), name
    for name in ("._a.jpg", "x/._a.jpg", ".a.png", ".DS_Store", "Thumbs.db", "a.txt", "jpg", "a.pdf", "a.h5"):
        assert not is_image(name), name
