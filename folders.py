"""Class folders: a set of labelled images as people keep them, and ImageNet as its archives leave it.

Paper: "zero-shot transfer"; the sets which no library reads are brought into this form.

    base/{train,test}/<class>/**/*.jpg -> open_folders -> Source: source[i] -> (PIL RGB image, label)

A class is called as base/classes.txt says, or base/LOC_synset_mapping.txt, or as its folder. Not here: what
else a name may mean (sets.py), captions beside images (captioned.py).
"""

import csv
import os
import re
import warnings
from pathlib import Path

import numpy as np
import torchvision

from images import Files, Source, is_image

NO_CLASSES = ("__MACOSX", "@eaDir", "lost+found", "BACKGROUND_Google")  # the last: Caltech-101's
NO_FILES = ("Thumbs.db", "desktop.ini")


def has_splits(folder, splits=("train", "test", "val")):
    """Whether a folder has one of these splits."""
    return any((folder / split).is_dir() for split in splits)


def open_folders(name, base, split, words):
    """A split, "train" or "test", of the class folders under `base`; ImageNet's test split is its folder val.

    `words`: folder names -> class names, where no file names them. Raises ValueError or FileNotFoundError.
    """
    splits = ["train"] if split == "train" else ["val"] if name == "imagenet" else ["test", "val"]
    folder = next((base / s for s in splits if (base / s).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no {split} split of {name}: expected {base / splits[0]}/<class>/*.jpg")
    flat = sorted(entry.name for entry in os.scandir(folder) if is_image(entry.name) and entry.is_file())
    folders, paths, labels = list_flat(base, folder, flat) if flat else list_folder(folder)
    listed = base / "classes.txt"
    if not listed.is_file():
        return Source(name, Files(paths, labels), folder_names(name, base, folders) or words(folders))
    named = read_names(listed)
    missing = [f for f in folders if f not in named]
    if missing:
        raise ValueError(f"{listed} has no line for the folder {missing[0]}")
    places = np.array([list(named).index(f) for f in folders])
    return Source(name, Files(paths, places[labels]), list(named.values()))


def list_folder(folder, whole=False):
    """folder/<class>/**/image -> (sorted class folders, paths, labels int [n]).

    Hidden files and folders count for nothing; other files, and classes without an image, are warned of.
    Raises FileNotFoundError where there is no image, and, for a `whole` set, where a class has none.
    """
    classes, paths, labels, empty, other = [], [], [], [], []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        if name.startswith(".") or name in NO_CLASSES:
            continue
        count = len(paths)
        for path in walk(folder / name):
            (paths if is_image(path) else other).append(path)
        if len(paths) == count:
            empty.append(name)
            continue
        labels += [len(classes)] * (len(paths) - count)
        classes.append(name)
    if not paths or (whole and empty):
        missing = folder / empty[0] if paths else folder
        raise FileNotFoundError(f"no images in {missing}: expected {folder}/<class>/*.jpg (.png, .webp, ...)")
    if empty:
        these = ", ".join(empty[:10])
        warnings.warn(f"{folder}: classes without images are left out: {these}", stacklevel=2)
    if other:
        warnings.warn(
            f"{folder}: {len(other):,} files are passed over, which the installed Pillow does not open, "
            f"such as {other[0]}",
            stacklevel=2,
        )
    return classes, paths, np.array(labels)


def walk(folder):
    """The visible files under a folder, in their order, also through links; each folder once."""
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in visited:
            folders.clear()
            continue
        visited.add(place)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            if not file.startswith(".") and file not in NO_FILES:
                yield os.path.join(parent, file)


def list_flat(base, folder, files):
    """As list_folder, for ImageNet's validation images as the archive has them, all in one folder."""
    solution = base / "LOC_val_solution.csv"
    if not solution.is_file():
        raise FileNotFoundError(
            f"{folder} holds {len(files):,} images outside of class folders: move each to {folder}/<class>/, "
            f"or, for ImageNet, put LOC_val_solution.csv, which comes with it from Kaggle, into {base}"
        )
    rows = csv.reader(read_text(solution).splitlines()[1:])
    wnids = {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].strip()}
    missing = [file for file in files if Path(file).stem not in wnids]
    if missing:
        raise ValueError(f"{solution} has no line for {missing[0]} ({len(missing):,} missing)")
    classes, labels = np.unique([wnids[Path(file).stem] for file in files], return_inverse=True)
    return classes.tolist(), [str(folder / file) for file in files], labels


def read_text(path):
    """A text file in UTF-8, with a byte order mark or without."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8") from None


def read_names(path):
    """A file of names, a line `folder<TAB>name` for each class in the order of labels -> {folder: name}."""
    named = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells) or cells[0] in named:
            again = " again" if cells[0] in named else ""
            raise ValueError(f"{path}, line {number}: found {line[:60]!r}{again}, expected folder<TAB>name")
        named[cells[0]] = cells[1]
    return named


def folder_names(name, base, folders):
    """Names of WordNet ids, by LOC_synset_mapping.txt or, for ImageNet's 1,000, torchvision, or None."""
    mapping = base / "LOC_synset_mapping.txt"
    if mapping.is_file():
        lines = [line.split(maxsplit=1) for line in read_text(mapping).splitlines() if line.strip()]
        table = {line[0]: line[-1].split(",")[0].strip() for line in lines}
        missing = [f for f in folders if f not in table]
        if missing:
            raise ValueError(
                f"{mapping} has no line for {missing[0]} ({len(missing)} missing): add '{missing[0]} name'"
            )
        return [table[f] for f in folders]
    wnids = [f for f in folders if re.fullmatch(r"n\d{8}", f)]
    if name == "imagenet" and len(wnids) == len(folders) == 1000:
        return list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
    if wnids:
        sentence = (
            f"{base} has {len(folders)} class folders, and {wnids[0]} is a WordNet id without a name: add "
            f"{mapping} with a line '{wnids[0]} its name' for each (the file comes with ImageNet from Kaggle)"
        )
        if name == "imagenet":
            raise ValueError(sentence)
        warnings.warn(sentence, stacklevel=3)
    return None
