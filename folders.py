"""Class folders: a set of labelled images as people keep them, ImageNet among them.

Paper: "zero-shot transfer"; the sets which no library reads are brought into this form.

    base/{train,test}/<class>/**/*.jpg -> open_folders -> Source: source[i] -> (PIL RGB image, label)

A class is called as base/classes.txt says, or base/LOC_synset_mapping.txt, or as its folder.
"""

import os
import re
import warnings
from pathlib import Path

import numpy as np
import torchvision

from images import Files, Source, is_image

IGNORED = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "BACKGROUND_Google")  # the last: Caltech-101's


def has_splits(folder, splits=("train", "test", "val")):
    return any((folder / split).is_dir() for split in splits)


def open_folders(name, base, split, words):
    """A split, "train" or "test", of the class folders under `base`; ImageNet's test split is its folder val.
    `words`: folder names -> class names, where no file names them. Raises ValueError or FileNotFoundError."""
    splits = ["train"] if split == "train" else ["val"] if name == "imagenet" else ["test", "val"]
    folder = next((base / s for s in splits if (base / s).is_dir()), base / splits[0])
    folders, paths, labels = list_folder(folder)
    named = read_names(base, folders)
    if named:
        labels = np.array([list(named).index(f) for f in folders])[labels]
        return Source(name, Files(paths, labels), list(named.values()))
    return Source(name, Files(paths, labels), imagenet_names(name, base, folders) or words(folders))


def list_folder(folder, whole=False):
    """folder/<class>/**/image -> (sorted class folders, paths, labels int [n]).
    Other files, and classes without an image, are warned of. Raises FileNotFoundError where there is no
    image and, for a `whole` set, where a class has none."""
    classes, paths, labels, empty, other = [], [], [], [], []
    for name in sorted(os.listdir(folder)):
        if name.startswith(".") or name in IGNORED or not (folder / name).is_dir():
            continue
        files = list(walk(folder / name))
        images = [path for path in files if is_image(path)]
        other += [path for path in files if not is_image(path)]
        (classes if images else empty).append(name)
        paths += images
        labels += [len(classes) - 1] * len(images)
    if not paths or (whole and empty):
        flat = sum(map(is_image, os.listdir(folder)))  # ImageNet's validation images as the archive has them
        found = f"{flat:,} are in no folder: move each to its class (of ImageNet see LOC_val_solution.csv)"
        place = f"{folder}/{(empty or ['<class>'])[0]}"
        raise FileNotFoundError(f"no images in {place}/*.jpg (.png, ...); {found}")
    for files, fault in ((empty, "classes without images are left out"), (other, "files are passed over")):
        if files:
            warnings.warn(f"{folder}: {len(files):,} {fault}: {', '.join(files[:5])}", stacklevel=2)
    return classes, paths, np.array(labels)


def walk(folder):
    """The visible files under a folder, in their order, also through links; each folder once."""
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        new = os.path.realpath(parent) not in visited
        visited.add(os.path.realpath(parent))
        folders[:] = sorted(f for f in folders if new and not f.startswith("."))
        shown = sorted(f for f in files if new and not f.startswith(".") and f not in IGNORED)
        yield from (os.path.join(parent, f) for f in shown)


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from None


def read_names(base, folders):
    """{folder: class name} in the order of labels, or {} where no file says them: classes.txt has a line
    `folder<TAB>name` for each, LOC_synset_mapping.txt `n01440764 tench, Tinca tinca`, also of other folders.
    """
    mapping = not (base / "classes.txt").is_file()
    path = base / ("LOC_synset_mapping.txt" if mapping else "classes.txt")
    named = {}
    for line in filter(str.strip, read_text(path).splitlines() if path.is_file() else []):
        folder, *called = line.strip().split(None if mapping else "\t", 1)
        if not called:
            raise ValueError(f"{path}: found {line[:60]!r}, expected folder<TAB>name")
        named[folder.strip()] = called[0].split(",")[0] if mapping else called[0].strip()
    missing = [f for f in folders if f not in named]
    if named and missing:
        raise ValueError(f"{path} has no line for the folder {missing[0]} ({len(missing)} missing): add it")
    return {f: named[f] for f in folders} if named and mapping else named


def imagenet_names(name, base, folders):
    """Names of ImageNet's 1,000 WordNet ids by torchvision, or None."""
    wnids = [f for f in folders if re.fullmatch(r"n\d{8}", f)]
    if name == "imagenet" and len(wnids) == len(folders) == 1000:
        return list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
    if wnids:
        add = f"add {base / 'LOC_synset_mapping.txt'} with a line '{wnids[0]} its name' for each"
        warnings.warn(f"{wnids[0]} is a WordNet id without a name: {add} (Kaggle has it)", stacklevel=3)
