"""The sets that torchvision knows: where each lies, and how it becomes a Source.

Paper: most of the 26 sets of "zero-shot transfer", and two more.

    open_torchvision("dtd", root, "test") -> Source, with the library's own names of the classes or None

Class folders are read by folders.py; from other formats torchvision's class gives paths and labels, or, where
it takes no `loader`, the images. Not here: what the classes are called (sets.py).
"""

import functools
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision
from torch.utils.data import Dataset

from folders import list_folder
from images import Files, Source, is_image, is_shortage, subset


@dataclass(frozen=True)
class Library:
    """A set as torchvision knows it. Where it comes without splits, `training` images of each class, but at
    most half, are for training and the others for testing, drawn once and for all (`divide`).
    """

    kind: str  # the class torchvision.datasets.<kind>
    place: str  # what is under --root when the set is there
    splits: tuple = ({}, {})  # the class's arguments for training and for the test
    folders: tuple = ()  # under `place`, where a split is a folder of class folders
    training: int = 0
    first: int = 0  # the smallest label
    needs: str = ""  # a package


BY_SPLIT, BY_FLAG = ({"split": "train"}, {"split": "test"}), ({"train": True}, {"train": False})
BY_VAL = ({"split": "train"}, {"split": "val"})  # the labels of the test split are secret, or there is none
TRAINVAL = ({"split": "trainval"}, {"split": "test"})
UNDIVIDED, DIVIDED = (".", "."), ("train", "test")
IDX = "raw/t10k-images-idx3-ubyte"
TORCHVISION = {
    "food101": Library("Food101", "food-101", BY_SPLIT),
    "cifar10": Library("CIFAR10", "cifar-10-batches-py", BY_FLAG),
    "cifar100": Library("CIFAR100", "cifar-100-python", BY_FLAG),
    "sun397": Library("SUN397", "SUN397", training=50),
    "cars": Library("StanfordCars", "stanford_cars", BY_SPLIT, needs="scipy"),
    "aircraft": Library("FGVCAircraft", "fgvc-aircraft-2013b", TRAINVAL),
    "dtd": Library("DTD", "dtd/dtd", BY_SPLIT),
    "pets": Library("OxfordIIITPet", "oxford-iiit-pet/annotations", TRAINVAL),
    "caltech101": Library("Caltech101", "caltech101/101_ObjectCategories", folders=UNDIVIDED, training=30),
    "flowers": Library("Flowers102", "flowers-102/jpg", BY_SPLIT, needs="scipy"),
    "mnist": Library("MNIST", f"MNIST/{IDX}", BY_FLAG),
    "fer2013": Library("FER2013", "fer2013", BY_SPLIT),
    "stl10": Library("STL10", "stl10_binary", BY_SPLIT),
    "eurosat": Library("EuroSAT", "eurosat/2750", folders=UNDIVIDED, training=1000),
    "gtsrb": Library("GTSRB", "gtsrb/GTSRB", BY_SPLIT),
    "country211": Library("Country211", "country211", BY_SPLIT, DIVIDED),
    "patch_camelyon": Library("PCAM", "pcam", BY_SPLIT, needs="h5py"),
    "clevr_counts": Library("CLEVRClassification", "clevr/CLEVR_v1.0", BY_VAL, first=3),
    "rendered_sst2": Library("RenderedSST2", "rendered-sst2", BY_SPLIT, DIVIDED),
    "fashionmnist": Library("FashionMNIST", f"FashionMNIST/{IDX}", BY_FLAG),
    "imagenette": Library("Imagenette", "imagenette2", BY_VAL, ("train", "val")),
}


def open_torchvision(name, root, split):
    """A split of a set of the table. Raises ValueError if it is damaged, or a package is missing."""
    entry, place, testing = TORCHVISION[name], Path(root) / TORCHVISION[name].place, split == "test"
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise ValueError(f"{name} is read by {entry.needs}: type pip install {entry.needs}")
    try:
        if entry.folders:
            classes, paths, labels = list_folder(place / entry.folders[testing], whole=True)
            items = Files(paths, labels)
        else:
            items, labels, classes = read_library(entry, root, entry.splits[testing])
    except Exception as error:  # a torn file breaks its reader in every way there is
        if is_shortage(error):
            raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(
            f"cannot read {name} at {place}, it may be incomplete or damaged ({reason})"
        ) from None
    source = Source(name, items, classes)
    return subset(source, divide(labels, testing, entry.training)) if entry.training else source


def read_library(entry, root, arguments):
    """-> (items, labels int [n] or None, the library's names of the classes or None).

    A class that takes a `loader` gives paths and labels at once; the images are then read by our own reader.
    """
    kind = getattr(torchvision.datasets, entry.kind)
    if "loader" not in inspect.signature(kind.__init__).parameters:
        items = Opened(functools.partial(kind, root, **arguments))
        items[0]  # whatever is wrong comes to light here
        return items, None, getattr(items.dataset, "classes", None)
    dataset = kind(root, loader=str, **arguments)
    pairs = sorted(dataset[i] for i in range(len(dataset)))
    paths, labels = zip(*[(path, label) for path, label in pairs if is_image(path)])
    labels, classes = np.array(labels, np.int64) - entry.first, getattr(dataset, "classes", None)
    return Files(paths, labels), labels, classes


class Opened(Dataset):
    """A set whose images only torchvision's class can give; where it would be pickled it is opened again."""

    def __init__(self, kind):
        self.kind, self.dataset = kind, kind()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        if label is None:
            raise ValueError("its images come without labels")
        return image.convert("RGB"), int(label)

    def __reduce__(self):
        return Opened, (self.kind,)


def divide(labels, testing, training):
    """Indices of a split of a set that comes without one; labels [n]."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.random.default_rng((training, label)).permutation(np.flatnonzero(labels == label))
        chosen[own[: min(training, len(own) // 2)]] = True
    return np.flatnonzero(chosen != testing)


def download(name, root):
    """Fetch a set, all its splits. Raises ValueError with one sentence if that fails."""
    entry = TORCHVISION[name]
    try:
        for arguments in entry.splits:
            getattr(torchvision.datasets, entry.kind)(root, **arguments, download=True)
    except Exception as error:  # the network and foreign files fail in every way there is
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"{name} was not downloaded ({reason})") from None
