"""The sets that torchvision knows: small ones in their true formats, the red of an image telling its label,
with the labels, names and images that come out; damaged ones against one sentence. All of them: -m slow.

    pytest tests/test_libraries.py
"""

import io
import json
import os
import pickle
import struct
import sys

import numpy as np
import pytest
import torchvision
from PIL import Image

import data
import libraries
import sets

SPLITS = ("train", "test")

# {path: what is in it} and the labels of (train, test). A number is an image of that label; text and bytes
# are themselves.


def red(label):
    return 40 + 5 * label


def plain(labels, side, channels=3):
    """uint8 [n, side, side, channels], as red as the labels say."""
    images = np.zeros((len(labels), side, side, channels), np.uint8)
    images[..., 0] = red(np.array(labels))[:, None, None]
    return images


def write(root, files):
    for path, content in files.items():
        path = root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            Image.new("RGB", (12, 9), (red(content), 0, 90)).save(path)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        else:
            path.write_bytes(content)


def under(base, files):
    return {f"{base}/{path}": content for path, content in files.items()}


def lines(*rows):
    return "".join(f"{row}\n" for row in rows)


def idx(kind):
    """Two files for each split: big-endian numbers, the first a magic one."""
    files, labels = {}, {"train": [9, 0, 4], "t10k": [3, 9]}
    for name, found in labels.items():
        head = struct.pack(">4i", 2051, len(found), 28, 28)
        files[f"{kind}/raw/{name}-images-idx3-ubyte"] = head + plain(found, 28, 1).tobytes()
        files[f"{kind}/raw/{name}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, len(found)) + bytes(found)
    return files, *labels.values()


def batch(labels, key):
    """As CIFAR keeps them: all the red of a image first."""
    return pickle.dumps(
        {"data": plain(labels, 32).transpose(0, 3, 1, 2).reshape(len(labels), -1), key: labels}
    )


def cifar10():
    train, base = [3, 0, 9, 9, 1], "cifar-10-batches-py"
    files = {f"{base}/data_batch_{i}": batch([label], "labels") for i, label in enumerate(train, 1)}
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files[f"{base}/batches.meta"] = pickle.dumps({"label_names": names})
    return files | {f"{base}/test_batch": batch([5, 8], "labels")}, train, [5, 8]


def cifar100():
    files = {"train": batch([11, 30], "fine_labels"), "test": batch([42], "fine_labels")}
    files["meta"] = pickle.dumps({"fine_label_names": [f"maple_tree{i}" for i in range(100)]})
    return under("cifar-100-python", files), [11, 30], [42]


def stl10():
    files, labels = {"unlabeled_X.bin": b""}, {"train": [0, 9, 4], "test": [2, 1]}
    for split, found in labels.items():
        files[f"{split}_X.bin"] = plain(found, 96).transpose(0, 3, 2, 1).tobytes()
        files[f"{split}_y.bin"] = bytes(label + 1 for label in found)
    return under("stl10_binary", files), *labels.values()


def fer2013():
    rows = [(0, "Training"), (6, "PublicTest"), (3, "Training"), (2, "PrivateTest")]
    cells = [f"{label},{' '.join([str(red(label))] * 48 * 48)},{usage}" for label, usage in rows]
    return {"fer2013/fer2013.csv": lines("emotion,pixels,Usage", *cells)}, [0, 3], [6, 2]


def food101():
    names, files = ["apple_pie", "baby_back_ribs", "sushi"], {}
    for split, numbers in (("train", (0, 1)), ("test", (5,))):
        table = {name: [f"{name}/{i}" for i in numbers] for name in names}
        files[f"food-101/meta/{split}.json"] = json.dumps(table)
        files |= {f"food-101/images/{n}/{i}.jpg": label for label, n in enumerate(names) for i in numbers}
    return files, [0, 0, 1, 1, 2, 2], [0, 1, 2]


def dtd():
    names = ["banded", "polka-dotted", "woven"]
    files = {f"images/{n}/{n}_{i}.jpg": label for label, n in enumerate(names) for i in (0, 1)}
    files["labels/train1.txt"] = lines(*[f"{name}/{name}_0.jpg" for name in names])
    files["labels/test1.txt"] = lines(*[f"{name}/{name}_1.jpg" for name in reversed(names)])
    return under("dtd/dtd", files), [0, 1, 2], [2, 1, 0]


def pets():
    names, files = ["Abyssinian", "great_pyrenees", "Sphynx"], {}
    for split, i in (("trainval", 1), ("test", 2)):
        rows = [f"{name}_{i} {label} 1 1" for label, name in enumerate(names, 1)]
        files[f"annotations/{split}.txt"] = lines(*rows)
        files |= {f"images/{name}_{i}.jpg": label for label, name in enumerate(names)}
    return under("oxford-iiit-pet", files), [0, 1, 2], [0, 1, 2]


def aircraft():
    files = {f"images/{number:07}.jpg": label for number, label in ((1, 1), (2, 0), (3, 0))}
    files["variants.txt"] = lines("707-320", "Eurofighter Typhoon")
    files["images_variant_trainval.txt"] = lines("0000001 Eurofighter Typhoon", "0000002 707-320")
    files["images_variant_test.txt"] = lines("0000003 707-320")
    return under("fgvc-aircraft-2013b/data", files), [1, 0], [0]


def gtsrb():
    files = {f"gtsrb/GTSRB/Training/{label:05}/00000_00000.ppm": label for label in range(43)}
    files |= {f"gtsrb/GTSRB/Final_Test/Images/{i:05}.ppm": label for i, label in enumerate([14, 2])}
    rows = [f"{i:05}.ppm;30;30;5;5;25;25;{label}" for i, label in enumerate([14, 2])]
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    return files | {"gtsrb/GT-final_test.csv": lines(head, *rows)}, list(range(43)), [14, 2]


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
    files["SUN397/ClassName.txt"] = lines(*[f"/{name[0]}/{name}" for name in names])
    return files, sorted([0, 1, 2] * 50), sorted([0, 1, 2] * 53)


def caltech101():
    counts = {"BACKGROUND_Google": 1, "Faces_easy": 70, "ant": 42, "water_lilly": 1}
    files = {
        f"caltech101/101_ObjectCategories/{name}/image_{i:04}.jpg": label if label >= 0 else 40
        for label, (name, count) in enumerate(counts.items(), -1)
        for i in range(count)
    }
    return files, [0] * 30 + [1] * 21, [0] * 40 + [1] * 21 + [2]


def mat(**arrays):
    file = io.BytesIO()
    pytest.importorskip("scipy.io").savemat(file, arrays)
    return file.getvalue()


def flowers():
    labels = [77, 1, 3, 102]  # of the images 1 to 4
    files = {f"jpg/image_{i:05}.jpg": label - 1 if label < 43 else 0 for i, label in enumerate(labels, 1)}
    files["imagelabels.mat"] = mat(labels=[labels])
    files["setid.mat"] = mat(trnid=[[3, 2]], valid=[[4]], tstid=[[2, 3]])
    return under("flowers-102", files), [2, 0], [0, 2]


def cars():
    kind, splits = [("fname", object), ("class", object)], {"train": [1, 0], "test": [0, 0, 1]}
    files = {}
    for split, labels in splits.items():
        rows = np.array([(f"{i:05}.jpg", label + 1) for i, label in enumerate(labels)], kind)
        files |= {f"cars_{split}/{i:05}.jpg": label for i, label in enumerate(labels)}
        place = "devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
        files[place] = mat(annotations=rows)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], object)
    files["devkit/cars_meta.mat"] = mat(class_names=names)
    return under("stanford_cars", files), *splits.values()


def patch_camelyon():
    h5py, files, splits = pytest.importorskip("h5py"), {}, {"train": [1, 0], "test": [0, 1, 1]}
    for split, labels in splits.items():
        labels = np.array(labels, np.uint8)
        for name, array in (("x", plain(labels, 96)), ("y", labels.reshape(-1, 1, 1, 1))):
            with h5py.File(file := io.BytesIO(), "w") as inside:
                inside[name] = array
            files[f"pcam/camelyonpatch_level_2_split_{split}_{name}.h5"] = file.getvalue()
    return files, *splits.values()


COUNTRIES, OPINIONS, BY_VAL = ["AD", "GE", "XK"], ["negative", "positive"], ("train", "val")
WNIDS = list(sets.WORDING["names"]["imagenette"])
MADE = {  # set: (how it is made, a label, what that is called)
    "food101": (food101, 1, "baby back ribs"),
    "cifar10": (cifar10, 1, "automobile"),
    "cifar100": (cifar100, 7, "maple tree7"),
    "sun397": (sun397, 1, "outdoor apartment building"),
    "cars": (cars, 0, "AM General Hummer SUV 2000"),
    "aircraft": (aircraft, 1, "Eurofighter Typhoon"),
    "dtd": (dtd, 1, "polka-dotted"),
    "pets": (pets, 1, "Great Pyrenees"),
    "caltech101": (caltech101, 0, "face in the middle of the picture"),
    "flowers": (flowers, 76, "passion flower"),
    "mnist": (lambda: idx("MNIST"), 3, ["three", "3"]),
    "fer2013": (fer2013, 3, "happy"),
    "stl10": (stl10, 7, "monkey"),
    "eurosat": (eurosat, 9, "the sea or a lake"),
    "gtsrb": (gtsrb, 14, "stop"),
    "country211": (lambda: folders("country211", COUNTRIES, SPLITS, ".jpg"), 1, "Georgia, the country"),
    "patch_camelyon": (patch_camelyon, 0, "healthy tissue"),
    "clevr_counts": (clevr_counts, 7, ["ten objects", "10 objects"]),
    "rendered_sst2": (lambda: folders("rendered-sst2", OPINIONS, SPLITS, ".png"), 1, "positive"),
    "fashionmnist": (lambda: idx("FashionMNIST"), 9, "ankle boot"),
    "imagenette": (lambda: folders("imagenette2", WNIDS, BY_VAL, ".JPEG"), 0, ["tench", "Tinca tinca"]),
}


def make(root, *names):
    """Write sets; the labels (train, test) of the last."""
    for name in names:
        files, *labels = MADE[name][0]()
        write(root, files)
    return labels


@pytest.fixture
def any_md5(monkeypatch):
    """Small files cannot have the sums of the true ones; they must be there all the same."""
    for module in ("cifar", "stl10", "fer2013", "flowers102"):
        check = lambda path, md5=None: os.path.isfile(path)  # noqa: E731
        monkeypatch.setattr(getattr(torchvision.datasets, module), "check_integrity", check)


def check_set(root, name):
    assert not sets.found(name, root)
    expected = make(root, name)
    assert sets.found(name, root)
    for split, labels in zip(SPLITS, expected):
        source = sets.open_source(name, root, split)
        assert source.name == name
        assert sorted(source.label(i) for i in range(len(source))) == sorted(labels)
        for i in range(len(source)):
            image, label = source[i]
            assert image.mode == "RGB" and type(label) is int and label == source.label(i)
            assert abs(image.getpixel((5, 5))[0] - red(label)) <= 2  # JPEG's rounding; labels are 5 apart
        assert source.classes[MADE[name][1]] == MADE[name][2]
        again = pickle.loads(pickle.dumps(source))  # for a worker that is started anew
        assert again[0][1] == source[0][1] and len(again) == len(source)


@pytest.mark.parametrize("name", ["mnist", "dtd", "pets", "imagenette"])
def test_a_set_of_torchvision_has_its_images_labels_and_names(tmp_path, name):
    check_set(tmp_path, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", libraries.TORCHVISION)
def test_every_set_of_torchvision_has_its_images_labels_and_names(tmp_path, any_md5, name):
    check_set(tmp_path, name)


def test_a_label_is_known_without_decoding_and_a_bad_image_by_its_path(tmp_path):
    make(tmp_path, "food101")
    for path in tmp_path.rglob("*.jpg"):
        path.write_bytes(b"")
    source = sets.open_source("food101", tmp_path, "test")
    assert [source.label(i) for i in range(3)] == [0, 1, 2]
    with pytest.raises(data.Unreadable, match="cannot read .*apple_pie.5.jpg"):
        data.EvaluationViews(source, 8)[0]


def test_hidden_files_and_folders_are_no_part_of_a_set(tmp_path):
    _, labels = make(tmp_path, "country211")
    for split in SPLITS:
        write(tmp_path / "country211" / split, {".ipynb_checkpoints/0.jpg": 3, "AD/._0.jpg": b"\0\5"})
    source = sets.open_source("country211", tmp_path, "test")
    assert [source.label(i) for i in range(len(source))] == labels


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eurosat", "sun397", "caltech101"])
def test_a_set_without_splits_gets_two_that_are_always_the_same(tmp_path, name):
    make(tmp_path, name)

    def places(split):
        source = sets.open_source(name, tmp_path, split)
        return [source.where(i) for i in range(len(source))]

    train, test = places("train"), places("test")
    assert (train, test) == (places("train"), places("test")) and not set(train) & set(test)
    whole = sorted(str(path) for path in tmp_path.rglob("*.jpg") if "BACKGROUND" not in str(path))
    assert sorted(train + test) == whole
    assert train != whole[: len(train)] and test != whole[: len(test)]  # drawn, not the first ones


DAMAGED = {  # set: (file, what it holds instead; None: it is gone)
    "food101": ("food-101/meta/test.json", b'{"apple_pie": ['),
    "cifar10": ("cifar-10-batches-py/test_batch", b"\x80\x04"),
    "cifar100": ("cifar-100-python/meta", None),
    "sun397": ("SUN397/ClassName.txt", b"/a/abbey\n"),
    "pets": ("oxford-iiit-pet/annotations/test.txt", b"Abyssinian_1 1\n"),
    "mnist": ("MNIST/raw/t10k-labels-idx1-ubyte", b"\0\0\x08\x01"),
    "fer2013": ("fer2013/fer2013.csv", b"emotion,pixels,Usage\n0,1 2 3,PublicTest\n"),
    "stl10": ("stl10_binary/test_X.bin", b"123"),
    "eurosat": ("eurosat/2750/Forest/*", None),
    "gtsrb": ("gtsrb/GTSRB/Final_Test/Images/*", None),
    "clevr_counts": ("clevr/CLEVR_v1.0/images/val/*", None),
    "country211": ("country211/test/*/*", None),
    "imagenette": ("imagenette2/val/*/*", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_set_is_one_sentence_with_its_place(tmp_path, any_md5, name):
    make(tmp_path, name)
    pattern, content = DAMAGED[name]
    for path in tmp_path.glob(pattern):
        path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match="it may be incomplete or damaged") as error:
        sets.open_source(name, tmp_path, "test")
    assert f"cannot read {name} at {tmp_path / libraries.TORCHVISION[name].place}" in str(error.value)
    assert "\n" not in str(error.value)


def test_checksums_that_differ_and_test_images_without_labels_are_one_sentence(tmp_path, monkeypatch):
    make(tmp_path, "stl10")
    with pytest.raises(ValueError, match="cannot read stl10 at .*corrupted"):
        sets.open_source("stl10", tmp_path, "test")
    write(tmp_path, {"fer2013/test.csv": lines("pixels", " ".join(["7"] * 48 * 48))})
    monkeypatch.setattr(
        torchvision.datasets.fer2013, "check_integrity", lambda path, md5: os.path.isfile(path)
    )
    with pytest.raises(ValueError, match="fer2013 at .*images come without labels"):
        sets.open_source("fer2013", tmp_path, "test")


@pytest.mark.parametrize("name", ["flowers", "cars", "patch_camelyon"])
def test_a_missing_package_is_one_sentence_with_the_line_to_install_it(tmp_path, monkeypatch, name):
    package = libraries.TORCHVISION[name].needs
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / libraries.TORCHVISION[name].place).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{name} is read by {package}: type pip install {package}"):
        sets.open_source(name, tmp_path, "test")
    assert f"pip install {package}" in sets.how_to_get(name, tmp_path)


@pytest.mark.parametrize(
    "name, why",
    [
        ("cub200", "cannot be downloaded: put its images"),
        ("fer2013", "cannot be downloaded: .*kaggle"),
        ("cars", "cannot be downloaded: its home is gone"),
        ("dtd", r"was not downloaded \(OSError: Network is unreachable\)$"),
    ],
)
def test_what_cannot_be_downloaded_is_one_sentence(tmp_path, monkeypatch, name, why):
    def dead(url, *args, **options):
        raise OSError("Network is unreachable\nat all")

    monkeypatch.setattr("urllib.request.urlopen", dead)
    with pytest.raises(ValueError, match=f"{name} {why}"):
        sets.download(name, tmp_path)
    make(tmp_path, "food101")
    sets.download("food101", tmp_path)  # what is there needs no network
