"""Sets by their names: whatever `--data` may say becomes a Source of pictures with labels or captions.

Paper: section 4 and appendix (the 26 sets of zero-shot transfer).

    open_source("imagenet", root, "train") -> Source: source[i] -> (PIL picture, label or caption)

Not here: class names and prompts of our own wording (tasks.py), the samples made of a Source (data.py).
"""

import functools
import os
from pathlib import Path

import numpy as np
import torchvision

import captioned
import scenes
from data import SUFFIXES, Arrays, Files, Source


def open_source(name, root="data", split="train"):
    """The set `name` under `root`; split is "train" or "test". Raises ValueError or FileNotFoundError with
    one sentence.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: expected train or test")
    if name.split("-")[0] == "scenes":
        return open_scenes(name, split)
    if name in TORCHVISION:
        return open_torchvision(name, root, split)
    if name == "imagenet":
        return open_imagenet(Path(root), split)
    source = captioned.open_captioned(name, root, split)
    if source is not None:
        return source
    folder = Path(root) / name
    if (folder / "train").is_dir() or (folder / split).is_dir():
        return open_folder(name, folder, split)
    raise ValueError(
        f"unknown --data {name!r}: expected one of {', '.join(SCENES)}, imagenet, {', '.join(TORCHVISION)}, "
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
        raise ValueError(
            f"{name} has other classes for training ({train.classes}) than for testing ({test.classes})"
        )
    return train, test


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


TORCHVISION = {  # name: class, class names where torchvision's want rewording
    "fashionmnist": (
        "FashionMNIST",
        [
            "t-shirt",
            "pair of trousers",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ],
    ),
    "cifar10": ("CIFAR10", None),
    "cifar100": ("CIFAR100", None),
}


def open_torchvision(name, root, split):
    kind, classes = TORCHVISION[name]
    try:
        dataset = getattr(torchvision.datasets, kind)(root, train=split == "train", download=False)
    except RuntimeError:
        raise FileNotFoundError(
            f'no {kind} under {root}: download it with python -c "import torchvision; '
            f"torchvision.datasets.{kind}('{root}', download=True)\", or name its place with --root"
        ) from None
    return Source(
        name, Arrays(dataset.data, dataset.targets), classes or [c.replace("_", " ") for c in dataset.classes]
    )


def list_folder(folder):
    """folder/<class>/**/picture -> (sorted class names, sorted paths, labels)."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
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
    """<folder>/train/<class name>/ and <folder>/test/ or val/."""
    found = next(
        (folder / s for s in ([split] if split == "train" else ["test", "val"]) if (folder / s).is_dir()),
        None,
    )
    if found is None:
        raise FileNotFoundError(f"no {split} split in {folder}: expected {folder}/{split}/<class name>/")
    classes, paths, labels = list_folder(found)
    return Source(name, Files(paths, labels), [c.replace("_", " ") for c in classes])


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
