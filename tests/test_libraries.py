"""The sets that torchvision knows: small ones in their true formats, the red of an image telling its label,
with the labels, names and images that come out; damaged ones against one sentence.
"""

import json
import os
import pickle
import sys

import numpy as np
import pytest
import torchvision
from PIL import Image

import sets

SPLITS = ("train", "test")

# {path: what is in it} and the labels of (train, test). A number is an image of that label; text and bytes
# are themselves.


def red(label):
    return 40 + 5 * label


def write(root, files):
    for path, content in files.items():
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            Image.new("RGB", (12, 9), (red(content), 0, 90)).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def cifar10():
    """As CIFAR keeps them: all the red of an image first."""
    train, base, files = [3, 0, 9, 9, 1], "cifar-10-batches-py", {}
    for i, labels in enumerate([[5, 8], *([label] for label in train)]):
        pixels = np.zeros((len(labels), 3, 32 * 32), np.uint8)
        pixels[:, 0] = [[red(label)] for label in labels]
        content = pickle.dumps({"data": pixels.reshape(len(labels), -1), "labels": labels})
        files[f"{base}/data_batch_{i}" if i else f"{base}/test_batch"] = content
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    return files | {f"{base}/batches.meta": pickle.dumps({"label_names": names})}, train, [5, 8]


def food101():
    names, files = ["apple_pie", "baby_back_ribs", "sushi"], {}
    for split, numbers in (("train", (0, 1)), ("test", (5,))):
        table = {name: [f"{name}/{i}" for i in numbers] for name in names}
        files[f"food-101/meta/{split}.json"] = json.dumps(table)
        files |= {f"food-101/images/{n}/{i}.jpg": label for label, n in enumerate(names) for i in numbers}
    return files, [0, 0, 1, 1, 2, 2], [0, 1, 2]


def clevr_counts():
    base, files, splits = "clevr/CLEVR_v1.0", {}, {"train": [0, 7], "val": [7, 1, 1]}
    for split, labels in splits.items():
        names = [f"CLEVR_{split}_{i:06}.png" for i in range(len(labels))]
        found = [{"image_filename": name, "objects": [{}] * (n + 3)} for name, n in zip(names, labels)]
        files[f"{base}/scenes/CLEVR_{split}_scenes.json"] = json.dumps({"scenes": found})
        files |= {f"{base}/images/{split}/{name}": label for name, label in zip(names, labels)}
    return files, *splits.values()


def folders(base, names, splits, suffix):
    """base/<split>/<class>/0<suffix>"""
    files = {f"{base}/{s}/{n}/0{suffix}": label for s in splits for label, n in enumerate(names)}
    return files, list(range(len(names))), list(range(len(names)))


def eurosat():
    names = "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop".split()
    names += ["Residential", "River", "SeaLake"]
    files = {f"eurosat/2750/{n}/{n}_{i}.jpg": label for label, n in enumerate(names) for i in range(4)}
    return files, sorted([*range(10)] * 2), sorted([*range(10)] * 2)


def sun397():
    names = ["abbey", "apartment_building/outdoor", "church/indoor"]
    files = {f"SUN397/{n[0]}/{n}/sun_{i:03}.jpg": c for c, n in enumerate(names) for i in range(103)}
    files["SUN397/ClassName.txt"] = "\n".join(f"/{name[0]}/{name}" for name in names)
    return files, sorted([0, 1, 2] * 50), sorted([0, 1, 2] * 53)


def caltech101():
    counts = {"BACKGROUND_Google": 1, "Faces_easy": 70, "ant": 42, "water_lilly": 1}
    files = {
        f"caltech101/101_ObjectCategories/{name}/image_{i:04}.jpg": label if label >= 0 else 40
        for label, (name, count) in enumerate(counts.items(), -1)
        for i in range(count)
    }
    return files, [0] * 30 + [1] * 21, [0] * 40 + [1] * 21 + [2]


COUNTRIES, BY_VAL = ["AD", "GE", "XK"], ("train", "val")
WNIDS = list(sets.FACTS["names"]["imagenette"])
MADE = {  # set: (how it is made, a label, what that is called)
    "food101": (food101, 1, "baby back ribs"),
    "cifar10": (cifar10, 1, "automobile"),
    "sun397": (sun397, 1, "outdoor apartment building"),
    "caltech101": (caltech101, 0, "face in the middle of the picture"),
    "eurosat": (eurosat, 9, "the sea or a lake"),
    "country211": (lambda: folders("country211", COUNTRIES, SPLITS, ".jpg"), 1, "Georgia, the country"),
    "clevr_counts": (clevr_counts, 7, ["ten objects", "10 objects"]),
    "imagenette": (lambda: folders("imagenette2", WNIDS, BY_VAL, ".JPEG"), 0, ["tench", "Tinca tinca"]),
}


def make(root, name):
    """Write a set -> its labels (train, test)."""
    files, *labels = MADE[name][0]()
    write(root, files)
    return labels


@pytest.mark.parametrize("name", MADE)
def test_a_set_of_torchvision_has_its_images_labels_and_names(tmp_path, monkeypatch, name):
    exists = lambda path, md5=None: os.path.isfile(path)  # noqa: E731  small files have other sums
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", exists)
    assert not sets.found(name, tmp_path)
    expected = make(tmp_path, name)
    assert sets.found(name, tmp_path)
    for split, labels in zip(SPLITS, expected):
        source = sets.open_source(name, tmp_path, split)
        assert sorted(source.label(i) for i in range(len(source))) == sorted(labels)
        for i in range(len(source)):
            image, label = source[i]
            assert image.mode == "RGB" and type(label) is int and label == source.label(i)
            assert abs(image.getpixel((5, 5))[0] - red(label)) <= 2  # JPEG's rounding; labels are 5 apart
        assert source.classes[MADE[name][1]] == MADE[name][2]
        again = pickle.loads(pickle.dumps(source))  # for a worker that is started anew
        assert again[0][1] == source[0][1] and len(again) == len(source)


def test_a_set_without_splits_gets_two_that_are_always_the_same(tmp_path):
    make(tmp_path, "eurosat")

    def places(split):
        source = sets.open_source("eurosat", tmp_path, split)
        return [source.where(i) for i in range(len(source))]

    train, test = places("train"), places("test")
    assert (train, test) == (places("train"), places("test")) and not set(train) & set(test)
    whole = sorted(str(path) for path in tmp_path.rglob("*.jpg"))
    assert sorted(train + test) == whole and train != whole[: len(train)]  # drawn, not the first ones


DAMAGED = {  # set: (files, what they hold instead; None: they are gone)
    "food101": ("food-101/meta/test.json", b'{"apple_pie": ['),
    "cifar10": ("cifar-10-batches-py/test_batch", b"\x80\x04"),
    "eurosat": ("eurosat/2750/Forest/*", None),
    "clevr_counts": ("clevr/CLEVR_v1.0/images/val/*", None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_set_is_one_sentence_with_its_place(tmp_path, name):
    make(tmp_path, name)
    pattern, content = DAMAGED[name]
    for path in tmp_path.glob(pattern):
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read {name} at .*, incomplete or damaged") as error:
        sets.open_source(name, tmp_path, "test")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_sentence_with_the_line_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    (tmp_path / sets.TORCHVISION["cars"].place).mkdir(parents=True)
    with pytest.raises(ValueError, match="cars is read by scipy: type pip install scipy"):
        sets.open_source("cars", tmp_path, "test")
    assert "pip install scipy" in sets.how_to_get("cars", tmp_path)


def test_what_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch):
    def dead(url, *args, **options):
        raise OSError("Network is unreachable\nat all")

    monkeypatch.setattr("urllib.request.urlopen", dead)
    with pytest.raises(ValueError, match="cub200 cannot be downloaded: put its images"):
        sets.download("cub200", tmp_path)
    with pytest.raises(ValueError, match=r"dtd was not downloaded \(OSError\('Network is unreachable"):
        sets.download("dtd", tmp_path)
