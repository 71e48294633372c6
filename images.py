"""Images: how any file becomes a PIL image in RGB, and what a set of images is.

    read_image(path or file) -> RGB, 8 bits a channel: one reader for everything
    Source: source[i] -> (PIL RGB image, label or caption)

Not here: names of sets (sets.py, captioned.py), order and samples (data.py), crops (augment.py).
"""

import contextlib
import os
from dataclasses import dataclass
from errno import EMFILE, ENFILE, ENOMEM

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

# Formats of Pillow that are films, documents or measurements, or run another program to be drawn.
NO_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"}
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name not in NO_IMAGES}
FORMATS = [name for name in Image.OPEN if name not in NO_IMAGES]
WHITE = (1, 255, 1023, 4095, 16383, 65535)  # of floats, and of 8, 10, 12, 14 and 16 bits


def is_image(name):
    """Whether a file's name is that of an image which Pillow opens; hidden files are none."""
    name = os.path.basename(name)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def is_shortage(error):
    """Whether an error is one of memory or file descriptors, which says nothing about an image."""
    return isinstance(error, MemoryError) or getattr(error, "errno", 0) in (EMFILE, ENFILE, ENOMEM)


def read_image(file):
    """Any image (a path or a binary file) -> PIL RGB: turned as its EXIF says, transparent parts on white,
    other depths scaled to 8 bits, the first frame of several. Raises what Pillow raises."""
    with Image.open(file, formats=FORMATS) as image:
        image.load()
        if image.mode[0] in "IF":  # one channel of 16 or 32 bits
            image = eight_bits(image)
        with contextlib.suppress(Exception):  # damaged EXIF breaks its parser in every way there is
            image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def eight_bits(image):
    """One channel of integers or floats -> mode L. White is what the file states (TIFF, PGM), else the least
    usual white above all values. With negative values, the extremes are black and white. NaN: black."""
    values = np.asarray(image, np.float64)
    finite = values[np.isfinite(values)]
    low, high = finite.min(initial=0), finite.max(initial=0)
    if low == 0:
        stated = np.ravel(getattr(image, "tag_v2", {}).get(281, 0))[0]  # a TIFF's MaxSampleValue
        whites = [65535] if image.format == "PPM" and image.mode == "I" else [stated, *WHITE]  # PGM: scaled
        high = next((white for white in whites if high <= 1.05 * white), high)  # resampled floats overshoot
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, 1e-12)
    grey = Image.fromarray((255 * scaled.clip(0, 1)).round().astype(np.uint8))
    grey.info["exif"] = image.info.get("exif", b"")
    return grey


@dataclass(eq=False)
class Source:
    """A set: source[i] -> (PIL RGB image, label), or (image, caption or captions) where `classes` is None."""

    name: str
    items: Dataset
    classes: list | None = None  # class names; an entry may be a list of names
    indices: np.ndarray | None = None  # of the items that belong to it, in its order; None: of all

    def __post_init__(self):
        self.indices = np.arange(len(self.items)) if self.indices is None else self.indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.items[int(self.indices[index])]

    def label(self, index):
        """The label or caption alone, without decoding where the items know a way."""
        return self.items.label(int(self.indices[index])) if hasattr(self.items, "label") else self[index][1]

    def where(self, index):
        number = int(self.indices[index])
        return self.items.where(number) if hasattr(self.items, "where") else f"{self.name} number {number}"


def subset(source, indices):
    """The Source of the items with these indices, in their order."""
    return Source(source.name, source.items, source.classes, source.indices[np.asarray(indices, np.int64)])


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
        super().__init__(np.array([os.fsencode(path) for path in paths]), targets)  # forked workers share it

    def __getitem__(self, index):
        return read_image(self.where(index)), self.label(index)

    def where(self, index):
        return os.fsdecode(self.images[index])


class Opened(Dataset):
    """Images that only torchvision's class gives; where it would be pickled it is opened again."""

    def __init__(self, kind):
        self.kind, self.images = kind, kind()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image.convert("RGB"), int(label)

    def __reduce__(self):
        return Opened, (self.kind,)
