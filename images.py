"""Images: how any file becomes a PIL image in RGB, and what a set of images is.

Paper: left to its libraries; the images of YFCC15M are whatever people put on the web.

    read_image(path or file) -> RGB, 8 bits a channel: one reader for everything
    Source: source[i] -> (PIL RGB image, label or caption)

Not here: names of sets (sets.py, captioned.py), order and samples (data.py), crops (augment.py).
"""

import errno
import functools
import os
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

# Files

# Formats of Pillow that are films, documents or measurements, or run another program to be drawn.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"}
WHITE = (1, 255, 1023, 4095, 16383, 65535)  # of floats, and of 8, 10, 12, 14 and 16 bits
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@functools.cache
def image_formats():
    """What the installed Pillow opens -> (names of formats, lower-case file suffixes)."""
    Image.init()
    formats = [name for name in Image.OPEN if name not in NO_IMAGES]
    known = {*formats, "MPO"}  # a JPEG of several images, opened as a JPEG
    return formats, {suffix for suffix, name in Image.registered_extensions().items() if name in known}


def is_image(name):
    """Whether a file's name is that of an image which the installed Pillow opens; hidden files are none."""
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_formats()[1]


def is_shortage(error):
    """Whether an error is one of memory or file descriptors, which says nothing about an image."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES)


def read_image(file):
    """Any image (a path or a binary file) -> PIL RGB: turned as its EXIF says, transparent parts on white,
    other depths scaled to 8 bits, the first frame of several. Raises what Pillow raises.
    """
    with Image.open(file, formats=image_formats()[0]) as image:
        image.load()
        if image.mode[0] in "IF":  # one channel of 16 or 32 bits
            image = eight_bits(image)
        try:
            image = ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF breaks its parser in every way there is: the image stays unturned
            pass
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """One channel of integers or floats -> mode L. White is the value that the file states (TIFF, PGM), else
    the smallest usual one that holds the values found. With negative values, black and white are the smallest
    and the largest found. What is not a number is black.
    """
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if low >= 0:
        usual = next((white for white in WHITE if high <= 1.05 * white), high)  # resampled floats overshoot
        low, stated = 0.0, stated_white(image)
        high = stated if stated >= high > 0 else usual
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    grey = Image.fromarray((255 * scaled.clip(0, 1)).round().astype(np.uint8))
    grey.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return grey


def stated_white(image):
    """The largest value by the file's own words, or 0."""
    if image.format == "PPM" and image.mode != "F":
        return 65535  # Pillow has scaled the file's values to this
    tags = getattr(image, "tag_v2", {})  # of a TIFF: BitsPerSample and MaxSampleValue
    bits, largest = (np.ravel(tags.get(tag, 0))[0] for tag in (258, 281))
    return largest or (4095 if bits == 12 else 0)


# Sets


@dataclass
class Source:
    """A set: source[i] -> (PIL RGB image, label), or (image, caption or captions) where `classes` is None."""

    name: str
    items: Dataset
    classes: list | None = None  # class names; an entry may be a list of names

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def label(self, index):
        """The label or caption alone, without decoding where the items know a way."""
        return self.items.label(index) if hasattr(self.items, "label") else self.items[index][1]

    def where(self, index):
        """What to call an item in a message: its path or the like."""
        return self.items.where(index) if hasattr(self.items, "where") else f"{self.name} number {index}"


def subset(source, indices):
    """The Source of the items with these indices, in their order."""
    return Source(source.name, Subset(source, np.asarray(indices, np.int64)), source.classes)


@dataclass(eq=False)
class Subset(Dataset):
    """The items of a subset."""

    source: Source
    indices: np.ndarray

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.source[int(self.indices[index])]

    def label(self, index):
        return self.source.label(int(self.indices[index]))

    def where(self, index):
        return self.source.where(int(self.indices[index]))


class Strings:
    """Many strings as two arrays: forked workers share them, spawned ones get one copy each."""

    def __init__(self, strings):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        part = self.bytes[self.ends[index] : self.ends[index + 1]]
        return part.tobytes().decode("utf-8", "surrogateescape")


class Arrays(Dataset):
    """Images in memory, uint8 [n, H, W, 3] or [n, H, W], with a label or caption each."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]).convert("RGB"), self.label(index)

    def label(self, index):
        target = self.targets[index]
        return target if isinstance(target, (str, list)) else int(target)


class Files(Arrays):
    """Images in files, by their paths, with a label, a caption or a list of captions each."""

    def __init__(self, paths, targets):
        super().__init__(Strings(paths), targets)

    def __getitem__(self, index):
        return read_image(self.images[index]), self.label(index)

    def where(self, index):
        return self.images[index]
