"""Sets by their names: whatever `--data` may say becomes a Source of images with labels or captions.

Paper: the 26 sets of "zero-shot transfer" (PAPER), how each is judged, and prompts, worded by us.

    open_source("imagenet", root, "train") -> Source: source[i] -> (PIL RGB image, label or caption)
    found("imagenet", root) -> whether it is there       how_to_get("imagenet", root) -> what to do if not
    prompts("imagenet") -> templates with {} for the name

The wording of names and prompts stands in sets.json. Not here: class folders (folders.py), captioned sets
(captioned.py), the samples made of a Source (data.py).
"""

import functools
import importlib.util
import inspect
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torchvision

import captioned
import scenes
from folders import has_splits, list_folder, open_folders
from images import Arrays, Files, Opened, Source, is_image, is_shortage, subset

FACTS = json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8"))
PAPER = FACTS["paper"]  # the names of its 26 sets, in its order
FOLDERS = ("cub200", "resisc45", "kitti_distance", "ucf101_frames", "kinetics700_frames", "hateful_memes")
SCENES = ("scenes", *(f"scenes-{kind}" for kind in ("kind", "colour", "texture", "heldout", "uncurated")))
SCENES_COUNT = {"train": 8192, "test": 2400}
SCENES_SEED = {"train": 0, "test": 2}  # the test split was drawn anew when all settings had been chosen


@dataclass(frozen=True)
class Library:
    """A set as torchvision knows it. Where it has no splits, `divide` makes them, the same at any time."""

    kind: str  # the class torchvision.datasets.<kind>
    place: str  # what is under --root when the set is there
    splits: tuple = ({"split": "train"}, {"split": "test"})  # the class's arguments for training and the test
    folders: tuple = ()  # under `place`, where a split is a folder of class folders
    training: int = 0  # images of each class, but at most half, that `divide` takes for training
    first: int = 0  # the smallest label
    needs: str = ""  # a package


TORCHVISION = {name: Library(**row) for name, row in FACTS["torchvision"].items()}


def open_source(name, root="data", split="train"):
    """The set `name` under `root`; split is "train" or "test". Raises ValueError or FileNotFoundError."""
    folder = Path(root) / name
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected train or test")
    if name.split("-")[0] == "scenes":
        return open_scenes(name, split)
    if name in TORCHVISION and (Path(root) / TORCHVISION[name].place).exists():
        source = open_torchvision(name, root, split)
        source.classes = class_names(name, source.classes)
        return source
    if name == "imagenet" and not has_splits(folder):
        folder = Path(root)  # of both splits
    if name not in captioned.NAMES and has_splits(folder):
        return open_folders(name, folder, split, functools.partial(class_names, name))
    if name in (*PAPER, *TORCHVISION):
        raise FileNotFoundError(f"no {name} under {root}: {how_to_get(name, root)}")
    source = captioned.open_captioned(name, root, split)
    if source is not None:
        return source
    raise ValueError(
        f"unknown --data {name!r}: expected a set that zeroshot.py --list shows, a name of "
        f"{', '.join(captioned.NAMES)}, a table FILE.tsv, shards FILE.tar, or a folder {folder} of "
        "{train,test}/<class>/ or of x.jpg with x.txt"
    )


def labelled(name, root="data"):
    """(train, test) of a labelled set; "scenes" are labelled by the kind of thing. Raises as open_source."""
    name = "scenes-kind" if name == "scenes" else name
    train, test = (open_source(name, root, split) for split in ("train", "test"))
    if train.classes is None:
        raise ValueError(f"{name} has captions, no classes: type a labelled set")
    if train.classes != test.classes:
        ours, theirs = ({str(c) for c in source.classes} for source in (train, test))
        numbers = f"training ({len(train.classes)}) than for testing ({len(test.classes)})"
        raise ValueError(f"{name} has other classes for {numbers}: {', '.join(sorted(ours ^ theirs)[:3])}")
    return train, test


def open_captions(name, root="data", split=None):
    """(a captioned Source, its split): the split asked for, else "test" if it has captions, else "train"."""
    for wanted in [split] if split else ["test", "train"]:
        try:
            source = open_source(name, root, wanted)
        except FileNotFoundError:
            if wanted == (split or "train"):
                raise
            continue  # a table, a folder, shards: one split
        if source.classes is None:
            return source, wanted
    raise ValueError(f"{name} has classes, no captions: retrieval wants a captioned set")


def names(root):
    """The labelled sets which a name can be typed for: the paper's, the others known, your own in `root`."""
    known = [*PAPER, *(name for name in TORCHVISION if name not in PAPER)]
    taken = {*known, *captioned.NAMES, *(Path(entry.place).parts[0] for entry in TORCHVISION.values())}
    inside = sorted(os.listdir(root)) if os.path.isdir(root) else []
    return known + [n for n in inside if n not in taken and has_splits(Path(root) / n, ("test", "val"))]


def found(name, root):
    """Whether the test split of a labelled set seems to be there; it may be damaged all the same."""
    root = Path(root)
    if name in SCENES or (name == "imagenet" and (root / "val").is_dir()):
        return True
    if name in TORCHVISION and (root / TORCHVISION[name].place).exists():
        return True
    return has_splits(root / name, ("test", "val"))


def how_to_get(name, root):
    """One clause: what to type, or what to put where."""
    if name in SCENES:
        return "it is built in"
    get = "put its images in {root}/{name}/{{train,test}}/<class>/*.jpg"
    if name in TORCHVISION:
        get = "type python zeroshot.py --download --data {name} --root {root}"
    needs = TORCHVISION[name].needs if name in TORCHVISION else ""
    get = FACTS["get"].get(name, get).format(name=name, root=root)
    return get + (f"; pip install {needs} to read it" if needs else "")


def download(name, root):
    """Fetch a set, all its splits, by torchvision. Raises ValueError with one sentence if that fails."""
    if name not in TORCHVISION or name in FACTS["get"]:
        raise ValueError(f"{name} cannot be downloaded: {how_to_get(name, root)}")
    entry = TORCHVISION[name]
    try:
        for arguments in entry.splits:
            getattr(torchvision.datasets, entry.kind)(root, **arguments, download=True)
    except Exception as error:  # the network and foreign files fail in every way there is
        raise ValueError(f"{name} was not downloaded ({error!r:.120})") from None


def open_torchvision(name, root, split):
    """A split of a set of the table. Raises ValueError if it is damaged, or a package is missing."""
    entry, place, testing = TORCHVISION[name], Path(root) / TORCHVISION[name].place, split == "test"
    if entry.needs and importlib.util.find_spec(entry.needs) is None:
        raise ValueError(f"{name} is read by {entry.needs}: type pip install {entry.needs}")
    try:
        if entry.folders:
            classes, paths, labels = list_folder(place / entry.folders[testing], whole=True)
            source = Source(name, Files(paths, labels), classes)
        else:
            source = read_library(name, root, entry.splits[testing])
    except Exception as error:  # a torn file breaks its reader in every way there is
        if is_shortage(error):
            raise
        raise ValueError(f"cannot read {name} at {place}, incomplete or damaged ({error!r:.120})") from None
    return subset(source, divide(source.items.targets, testing, entry.training)) if entry.training else source


def read_library(name, root, arguments):
    """A class that takes a `loader` gives paths and labels at once; our own reader reads the images."""
    entry = TORCHVISION[name]
    kind = getattr(torchvision.datasets, entry.kind)
    if "loader" not in inspect.signature(kind.__init__).parameters:
        items = Opened(functools.partial(kind, root, **arguments))
        items[0]  # whatever is wrong comes to light here
        return Source(name, items, getattr(items.images, "classes", None))
    dataset = kind(root, loader=str, **arguments)
    pairs = sorted(dataset[i] for i in range(len(dataset)))
    paths, labels = zip(*[(path, label - entry.first) for path, label in pairs if is_image(path)])
    return Source(name, Files(paths, np.array(labels)), getattr(dataset, "classes", None))


def divide(labels, testing, training):
    """Indices of a split of a set that comes without one; labels [n]."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.random.default_rng((training, label)).permutation(np.flatnonzero(labels == label))
        chosen[own[: min(training, len(own) // 2)]] = True
    return np.flatnonzero(chosen != testing)


def metric(name):
    """How the paper judges a set: a key of evaluate.METRICS."""
    return FACTS["metrics"].get(name, "top1")


def prompts(name):
    """The templates of zero-shot transfer, with {}."""
    return FACTS["prompts"].get(name, FACTS["prompts"]["generic"])


def caption_templates(name):
    """The templates in which a class name is a caption for training, with {}."""
    return FACTS["captions"].get(name, FACTS["captions"]["generic"])


def class_names(name, classes):
    """The names of a set's classes: the library's, or ours where these are codes or no words."""
    ours = FACTS["names"].get(name, {})
    if isinstance(ours, list):
        return ours
    if name == "sun397":  # church/indoor
        classes = [" ".join(reversed(c.split("/"))) for c in classes]
    if name in FOLDERS:  # 001.Black_footed_Albatross, ApplyLipstick
        classes = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"^\d+\.", "", c)) for c in classes]
    return [ours.get(c, c.replace("_", " ")) for c in classes]


def open_scenes(name, split):
    """Captioned for training, labelled for testing. Training sets for comparisons: "scenes-told-40" has 40%
    captions that name the kind, "scenes-uncurated" is cluttered and long-tailed; the test split is the same.
    """
    told = re.fullmatch(r"scenes-told-(\d\d)", name)
    if name not in SCENES and not told:
        raise ValueError(f"unknown --data {name!r}: expected one of {', '.join(SCENES)}, scenes-told-40")
    training, count, seed = split == "train", SCENES_COUNT[split], SCENES_SEED[split]
    if training and name == "scenes-heldout":
        raise ValueError(f"{name} is for testing alone, without captions or training images: type scenes")
    share = int(told[1]) / 100 if told and training else None
    curated = not training or name != "scenes-uncurated"
    table = scenes.build(split, count, seed, kinds_told=share, curated=curated)
    if training and (told or name == "scenes"):
        return Source(name, Arrays(table["images"], table["captions"]))
    if name == "scenes-heldout":
        classes = [f"{colour} {kind}" for kind in scenes.KINDS for colour in scenes.COLOURS]
        labels = table["kind"] * len(scenes.COLOURS) + table["colour"]
        source = Source(name, Arrays(table["images"], labels), classes)
        return subset(source, np.flatnonzero(table["held_out"]))
    last = name.split("-")[-1]
    attribute = last if last in scenes.NAMES else "kind"
    return Source(name, Arrays(table["images"], table[attribute]), scenes.NAMES[attribute])
