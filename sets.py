"""Sets by their names: whatever `--data` may say becomes a Source of pictures with labels or captions.

Paper: section 4 and appendix (the 26 sets of zero-shot transfer, tasks.PAPER).

    open_source("imagenet", root, "train") -> Source: source[i] -> (PIL picture, label or caption)
    found("imagenet", root) -> whether it is there       how_to_get("imagenet", root) -> what to do if not

A set is opened by torchvision's own class where it has one, else it is class folders. Not here: class names
and prompts of our own wording (tasks.py), captioned sets (captioned.py), the samples made of a Source
(data.py).
"""

import functools
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision

import captioned
import scenes
import tasks
from data import SUFFIXES, Arrays, Files, Source, part


def open_source(name, root="data", split="train"):
    """The set `name` under `root`; split is "train" or "test". Raises ValueError or FileNotFoundError with
    one sentence.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected train or test")
    if name.split("-")[0] == "scenes":
        return open_scenes(name, split)
    folder = Path(root) / name
    if name in TORCHVISION and ((Path(root) / TORCHVISION[name].place).exists() or not class_folders(folder)):
        return open_torchvision(name, root, split)
    if name == "imagenet":
        return open_imagenet(Path(root), split)
    if name not in captioned.NAMES and class_folders(folder):
        return open_folder(name, folder, split)
    if name in FOLDERS:
        raise FileNotFoundError(f"no {name} under {root}: {how_to_get(name, root)}")
    source = captioned.open_captioned(name, root, split)
    if source is not None:
        return source
    raise ValueError(
        f"unknown --data {name!r}: expected a set that python zeroshot.py --list shows, "
        f"{', '.join(captioned.NAMES)}, a table FILE.tsv of path and caption, shards '{{00000..00009}}.tar', "
        f"or a folder {folder} with train/<class name>/ and test/<class name>/, or x.jpg and x.txt, in it"
    )


def labelled(name, root="data"):
    """(train, test) of a labelled set; "scenes" are labelled by the kind of thing. Raises as open_source."""
    name = "scenes-kind" if name == "scenes" else name
    train, test = (open_source(name, root, split) for split in ("train", "test"))
    if train.classes is None:
        raise ValueError(f"{name} has captions, no classes: type a labelled set")
    if train.classes != test.classes:
        names = [str(c) for c in train.classes + test.classes if (c in train.classes) != (c in test.classes)]
        raise ValueError(
            f"{name} has other classes for training ({len(train.classes)}) than for testing "
            f"({len(test.classes)}): {', '.join(names[:3]) or 'another order'}"
        )
    return train, test


def open_captions(name, root="data"):
    """(a captioned set, its split): "test", or "train" where no other has captions."""
    try:
        source = open_source(name, root, "test")
        if source.classes is None:
            return source, "test"
    except FileNotFoundError:
        pass  # a table, a folder, shards: one split
    source = open_source(name, root, "train")
    if source.classes is not None:
        raise ValueError(f"{name} has classes, no captions: retrieval wants a captioned set")
    return source, "train"


def names(root):
    """The labelled sets which a name can be typed for: the paper's, the others known, your own in `root`."""
    known = [*tasks.PAPER, *(name for name in TORCHVISION if name not in tasks.PAPER)]
    taken = {*known, *captioned.NAMES, *(Path(entry.place).parts[0] for entry in TORCHVISION.values())}
    inside = sorted(os.listdir(root)) if os.path.isdir(root) else []
    own = [n for n in inside if n not in taken and class_folders(Path(root) / n, ("test", "val"))]
    return known + own


def found(name, root):
    """Whether the test split of a labelled set seems to be there; it may be damaged all the same."""
    root = Path(root)
    if name == "imagenet" and (root / "val").is_dir():
        return True
    there = name in TORCHVISION and (root / TORCHVISION[name].place).exists()
    return there or class_folders(root / name, ("test", "val"))


def how_to_get(name, root):
    """One clause: what to type, or what to put where."""
    if name in SCENES:
        return "it is built in"
    if name in TORCHVISION:
        get, needs = TORCHVISION[name].get, TORCHVISION[name].needs
        get = get or "type python zeroshot.py --download --data {name} --root {root}"
        return get.format(name=name, root=root) + (f"; pip install {needs} to read it" if needs else "")
    if name == "imagenet":
        return f"log in at image-net.org; put its pictures in {root}/imagenet/{{train,val}}/<wnid>/*.JPEG"
    what = f" ({FOLDERS[name]})" if name in FOLDERS else ""
    return f"put its pictures{what} in {root}/{name}/{{train,test}}/<class>/*.jpg"


SCENES = {
    "scenes": "kind",
    "scenes-kind": "kind",
    "scenes-colour": "colour",
    "scenes-texture": "texture",
    "scenes-heldout": "kind",
}
SCENES_COUNT = {"train": 8192, "test": 2400}
SCENES_SEED = {"train": 0, "test": 1}  # the test split was drawn anew when all settings had been chosen


@functools.cache
def drawn(split):
    return scenes.build(split, SCENES_COUNT[split], SCENES_SEED[split])


def open_scenes(name, split):
    """The built-in set: captioned for training, labelled for testing. "heldout" are pairs which no caption
    names.
    """
    if name not in SCENES:
        raise ValueError(f"unknown --data {name!r}: expected one of {', '.join(SCENES)}")
    data = drawn(split)
    if split == "train" and name == "scenes":
        return Source(name, Arrays(data["images"], data["captions"]))
    if name == "scenes-heldout":
        names = [(colour, kind) for kind in scenes.KINDS for colour in scenes.COLOURS]
        keep, classes = data["held_out"], [f"{colour} {kind}" for colour, kind in names]
        labels = data["kind"] * len(scenes.COLOURS) + data["colour"]
        return Source(name, Arrays(data["images"][keep], labels[keep]), classes)
    return Source(name, Arrays(data["images"], data[SCENES[name]]), scenes.NAMES[SCENES[name]])


# Sets that torchvision reads


@dataclass(frozen=True)
class Library:
    """A set as torchvision reads it.

    Where it comes without splits, `training` pictures of each class, but at most half, are for training and
    the others for testing, drawn once and for all (`divide`).
    """

    kind: str  # the class torchvision.datasets.<kind>
    place: str  # what is under --root when the set is there
    keeps: tuple = ()  # its attributes: pictures (paths or arrays) and labels, or pairs of them
    splits: tuple = ({}, {})  # the class's arguments for training and for the test
    training: int = 0
    first: int = 0  # the smallest label
    needs: str = ""  # a package
    get: str = ""  # how to get it where torchvision cannot


BY_SPLIT, BY_FLAG = ({"split": "train"}, {"split": "test"}), ({"train": True}, {"train": False})
BY_VAL = ({"split": "train"}, {"split": "val"})  # the labels of the test split are secret, or there is none
TRAINVAL = ({"split": "trainval"}, {"split": "test"})
FILES, PAIRS, ARRAY = ("_image_files", "_labels"), ("_samples",), ("data", "targets")
IDX = "raw/t10k-images-idx3-ubyte"
NO_CARS = "its home is gone; put devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat in "
NO_CARS += "{root}/stanford_cars"
NO_FER = "log in at kaggle.com; put its fer2013.csv or icml_face_data.csv in {root}/fer2013"
TORCHVISION = {
    "food101": Library("Food101", "food-101", FILES, BY_SPLIT),
    "cifar10": Library("CIFAR10", "cifar-10-batches-py", ARRAY, BY_FLAG),
    "cifar100": Library("CIFAR100", "cifar-100-python", ARRAY, BY_FLAG),
    "sun397": Library("SUN397", "SUN397", FILES, training=50),
    "cars": Library("StanfordCars", "stanford_cars", PAIRS, BY_SPLIT, needs="scipy", get=NO_CARS),
    "aircraft": Library("FGVCAircraft", "fgvc-aircraft-2013b", FILES, TRAINVAL),
    "dtd": Library("DTD", "dtd/dtd", FILES, BY_SPLIT),
    "pets": Library("OxfordIIITPet", "oxford-iiit-pet/annotations", ("_images", "_labels"), TRAINVAL),
    "caltech101": Library("Caltech101", "caltech101/101_ObjectCategories", training=30),
    "flowers": Library("Flowers102", "flowers-102/jpg", FILES, BY_SPLIT, needs="scipy"),
    "mnist": Library("MNIST", f"MNIST/{IDX}", ARRAY, BY_FLAG),
    "fer2013": Library("FER2013", "fer2013", PAIRS, BY_SPLIT, get=NO_FER),
    "stl10": Library("STL10", "stl10_binary", ("data", "labels"), BY_SPLIT),
    "eurosat": Library("EuroSAT", "eurosat/2750", ("samples",), training=1000),
    "gtsrb": Library("GTSRB", "gtsrb/GTSRB", PAIRS, BY_SPLIT),
    "country211": Library("Country211", "country211", ("samples",), BY_SPLIT),
    "patch_camelyon": Library("PCAM", "pcam", (), BY_SPLIT, needs="h5py"),
    "clevr_counts": Library("CLEVRClassification", "clevr/CLEVR_v1.0", FILES, BY_VAL, first=3),
    "rendered_sst2": Library("RenderedSST2", "rendered-sst2", PAIRS, BY_SPLIT),
    "fashionmnist": Library("FashionMNIST", f"FashionMNIST/{IDX}", ARRAY, BY_FLAG),
    "imagenette": Library("Imagenette", "imagenette2", PAIRS, BY_VAL),
}


def open_torchvision(name, root, split):
    """A set of the table. Raises FileNotFoundError where it is not there, ValueError where it is damaged."""
    entry, place = TORCHVISION[name], Path(root) / TORCHVISION[name].place
    if not place.exists():
        get = how_to_get(name, root)
        raise FileNotFoundError(f"no {entry.kind} under {root}: {get}, or name its place with --root")
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise ValueError(f"{name} is read by {entry.needs}: type pip install {entry.needs}")
    try:
        items, labels, found = read_library(entry, root, split)
        classes = class_names(name, found)
        if labels is not None and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels {labels.min()} to {labels.max()}, expected 0 to {len(classes) - 1}")
    except Exception as error:  # a torn file breaks its reader in every way there is
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(
            f"cannot read {name} at {place}, it may be incomplete or damaged ({reason})"
        ) from None
    source = Source(name, items, classes)
    return part(source, divide(labels, split, entry.training)) if entry.training else source


def read_library(entry, root, split):
    """-> (items of pictures and labels, labels int [n] or None, the library's class names or None).

    Pictures in files are read by our own reader, when they are asked for.
    """
    if entry.kind == "Caltech101":  # torchvision's class wants scipy for every picture
        folders, paths, labels = list_folder(Path(root) / entry.place, leave_out=("BACKGROUND_Google",))
        return Files(paths, labels), labels, folders
    dataset = getattr(torchvision.datasets, entry.kind)(root, **entry.splits[split == "test"])
    names = getattr(dataset, "classes", None)
    if not entry.keeps:  # PCAM's pictures stay in one large file, and it gives them one by one
        return dataset, None, names
    kept = [getattr(dataset, name) for name in entry.keeps]
    if not len(kept[0]):
        raise ValueError("no pictures")
    pictures, labels = kept if len(kept) == 2 else zip(*kept[0])
    if isinstance(labels, tuple) and None in labels:
        raise ValueError("its test pictures come without labels")
    labels = np.asarray(labels).astype(np.int64) - entry.first
    if isinstance(pictures[0], (str, Path)):
        pictures, order = [str(path) for path in pictures], np.arange(len(labels))
        if entry.training:  # the order of a walk through folders is the file system's
            order = np.array(sorted(order, key=lambda i: pictures[i]))
        return Files([pictures[i] for i in order], labels[order]), labels[order], names
    images = np.stack(pictures) if isinstance(pictures, tuple) else np.asarray(pictures)
    images = images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images  # [n, H, W, 3] or [n, H, W]
    return Arrays(images, labels), labels, names


def divide(labels, split, training):
    """Indices of a split of a set that comes without one; labels [n]."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mine = np.random.default_rng((training, label)).permutation(np.flatnonzero(labels == label))
        chosen[mine[: min(training, len(mine) // 2)]] = True
    return np.flatnonzero(chosen == (split == "train"))


def class_names(name, found):
    """The names of a set's classes: the library's, or ours (tasks.py) where these are codes or no words."""
    ours = tasks.NAMES.get(name, {})
    if isinstance(ours, list):
        return ours
    if name == "sun397":  # church/indoor
        found = [" ".join(reversed(c.split("/"))) for c in found]
    return [list(c) if isinstance(c, tuple) else ours.get(c, c.replace("_", " ")) for c in found]


def download(name, root):
    """Fetch a set, all its splits, by torchvision. Raises ValueError with one sentence if that fails."""
    entry = TORCHVISION.get(name)
    if entry is None or entry.get:
        raise ValueError(f"{name} cannot be downloaded: {how_to_get(name, root)}")
    try:
        for arguments in entry.splits:
            getattr(torchvision.datasets, entry.kind)(root, **arguments, download=True)
    except Exception as error:  # the network and foreign files fail in every way there is
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"{name} was not downloaded ({reason})") from None


# Sets in class folders

FOLDERS = {  # what torchvision has no class for
    "cub200": "Caltech-UCSD Birds 200-2011, divided as its train_test_split.txt says",
    "resisc45": "NWPU-RESISC45",
    "kitti_distance": "KITTI's streets, in the folders beside, near, far and none: where the next car is",
    "ucf101_frames": "the middle frame of each clip of UCF101",
    "kinetics700_frames": "the middle frame of each clip of Kinetics-700",
    "hateful_memes": "Facebook's Hateful Memes, in the folders harmless and hateful",
}


def class_folders(folder, splits=("train", "test", "val")):
    """Whether a folder has one of these splits."""
    return any((folder / split).is_dir() for split in splits)


def list_folder(folder, leave_out=()):
    """folder/<class>/**/picture -> (sorted class folders, sorted paths, labels)."""
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and e.name not in leave_out)
    paths, labels = [], []
    for label, name in enumerate(classes):
        for parent, _, files in sorted(os.walk(folder / name, followlinks=True)):
            found = [os.path.join(parent, file) for file in sorted(files) if file.lower().endswith(SUFFIXES)]
            paths += found
            labels += [label] * len(found)
    if not paths:
        raise FileNotFoundError(
            f"no pictures under {folder}: expected {folder}/<class>/*.jpg (or {', '.join(SUFFIXES[1:4])})"
        )
    return classes, paths, np.array(labels)


def open_folder(name, folder, split):
    """<folder>/train/<class>/ and <folder>/test/ or val/."""
    splits = ["train"] if split == "train" else ["test", "val"]
    found = next((folder / s for s in splits if (folder / s).is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"no {split} split in {folder}: expected {folder}/{split}/<class name>/")
    folders, paths, labels = list_folder(found)
    if not (folder / "classes.txt").is_file():
        return Source(name, Files(paths, labels), [folder_name(name, f) for f in folders])
    named = read_names(folder / "classes.txt")
    missing = [f for f in folders if f not in named]
    if missing:
        raise ValueError(f"{folder / 'classes.txt'} has no line for the folder {missing[0]}")
    places = np.array([list(named).index(f) for f in folders])
    return Source(name, Files(paths, places[labels]), list(named.values()))


def read_names(path):
    """A file of names, a line `folder<TAB>name` for each class in the order of labels -> {folder: name}."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None
    named = {}
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) != 2 or not all(cells) or cells[0] in named:
            again = " again" if cells[0] in named else ""
            raise ValueError(f"{path}, line {number}: found {line[:60]!r}{again}, expected folder<TAB>name")
        named[cells[0]] = cells[1]
    return named


def folder_name(name, folder):
    """What a class folder is called; in the paper's sets "001.Black_footed_Albatross" -> "Black footed
    Albatross", "ApplyLipstick" -> "Apply Lipstick".
    """
    if name not in FOLDERS:
        return folder.replace("_", " ")
    words = re.sub(r"^\d+\.", "", folder).replace("_", " ")
    return tasks.NAMES.get(name, {}).get(folder) or re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)


def open_imagenet(root, split):
    """The usual layout: root[/imagenet]/{train,val}/<wnid>/*.JPEG."""
    base = root / "imagenet" if (root / "imagenet").is_dir() else root
    folder = base / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no ImageNet at {folder}: put its training pictures in {base}/train/<wnid>/*.JPEG and the "
            f"validation pictures in {base}/val/<wnid>/, or name the folder of both with --root"
        )
    folders, paths, labels = list_folder(folder)
    return Source("imagenet", Files(paths, labels), imagenet_names(base, folders))


def imagenet_names(base, folders):
    """Folder names -> class names: from LOC_synset_mapping.txt, else torchvision's 1,000, else the folder's
    own words.
    """
    mapping = base / "LOC_synset_mapping.txt"
    wnids = [f for f in folders if len(f) == 9 and f[0] == "n" and f[1:].isdigit()]
    if mapping.is_file():
        lines = [
            line.split(" ", 1) for line in mapping.read_text(encoding="utf-8").splitlines() if line.strip()
        ]
        table = {line[0]: line[-1].split(",")[0].strip() for line in lines}
        missing = [f for f in folders if f not in table]
        if missing:
            raise ValueError(
                f"{mapping} has no line for {missing[0]} ({len(missing)} missing): add '{missing[0]} name'"
            )
        return [table[f] for f in folders]
    if len(wnids) == len(folders) == 1000:
        return list(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
    if wnids:
        raise ValueError(
            f"{base} has {len(folders)} class folders, and {wnids[0]} is a WordNet id without a name: add "
            f"{mapping} with a line '{wnids[0]} its name' for each (the file comes with ImageNet from Kaggle)"
        )
    return [f.replace("_", " ").replace("-", " ") for f in folders]
