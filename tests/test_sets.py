"""Sets by their names: class folders as people keep them against labels and names, and what is not there or
not right against one sentence; prompts; published JSON files.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

import sets
import zeroshot

APPLE = b"\x00\x05\x16\x07" + bytes(196)  # what a Mac leaves beside a file on a foreign disk


def fill(folder, *names, suffix=".JPEG", count=1):
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("L", (9, 9), 10 * i).save(folder / name / f"{i}{suffix}")


def test_a_folder_of_classes_is_a_set(tmp_path):
    """One that torchvision knows in another layout, too."""
    fill(tmp_path / "pets/train", "tabby_cat", "dog", "dog/more", count=2)
    fill(tmp_path / "pets/val", "tabby_cat", "dog")
    train, test = sets.labelled("pets", tmp_path)
    assert train.classes == ["dog", "tabby cat"] and len(test) == 2  # val, where there is no test
    assert [train.label(i) for i in range(len(train))] == [0] * 4 + [1] * 2
    assert train[4][0].mode == "RGB" and train[4][1] == 1


def test_what_is_no_class_and_no_image_does_not_count(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "pets" / split
        fill(folder, "cat", "dog", ".ipynb_checkpoints", "cat/.thumbnails", "__MACOSX")
        for junk in ("cat/._0.JPEG", "dog/.DS_Store", "dog/Thumbs.db"):
            (folder / junk).write_bytes(APPLE)
    (tmp_path / "pets/train/dog/1.heic").write_bytes(b"not opened")
    with pytest.warns(UserWarning, match="1 files are passed over: .*1.heic"):
        both = sets.labelled("pets", tmp_path)
    for source in both:
        assert source.classes == ["cat", "dog"] and len(source) == 2


def test_empty_classes_are_named_and_left_out_or_refused_where_the_splits_differ(tmp_path):
    for split in ("train", "test"):
        fill(tmp_path / "pets" / split, "cat", "dog")
        (tmp_path / "pets" / split / "fish").mkdir()
    with pytest.warns(UserWarning, match="classes without images are left out: fish"):
        train, test = sets.labelled("pets", tmp_path)
    assert train.classes == test.classes == ["cat", "dog"]
    fill(tmp_path / "pets/train", "fish")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"training \(3\) than .* \(2\): fish"):
        sets.labelled("pets", tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    fill(tmp_path / "elsewhere", "cat", count=3)
    fill(tmp_path / "pets/test", "dog")
    (tmp_path / "pets/test/cat").symlink_to(tmp_path / "elsewhere/cat", target_is_directory=True)
    (tmp_path / "elsewhere/cat/loop").symlink_to(tmp_path / "elsewhere/cat", target_is_directory=True)
    source = sets.open_source("pets", tmp_path, "test")
    assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 1]


def named(root, name, text, *folders):
    """{class folder: its class} and all classes of a set with this file of names, in the order of labels."""
    fill(root / name / "test", *folders)
    if text is not None:
        (root / name / "classes.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    source = sets.open_source(name, root, "test")
    places = [Path(source.where(i)).parent.name for i in range(len(source))]
    return {place: source.classes[source.label(i)] for i, place in enumerate(places)}, source.classes


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_file_of_names_names_the_folders_and_orders_the_labels(tmp_path, mark):
    text = mark + "b\tblue_tit\r\nmissing\tauk\r\na\tnaïve ape\r\n"
    found, classes = named(tmp_path, "apes", text, "a", "b")
    assert found == {"a": "naïve ape", "b": "blue_tit"} and classes == ["blue_tit", "auk", "naïve ape"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("a\tape\nb\n", "classes.txt: found 'b', expected folder<TAB>name"),
        ("a\tape\n", "classes.txt has no line for the folder b "),
        ("a\té\n".encode("cp1252"), "classes.txt is not text in UTF-8"),
        ("a\tape\nb\tbee\n".encode("utf-16"), "classes.txt is not text in UTF-8"),
    ],
)
def test_a_bad_file_of_names_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        named(tmp_path, "apes", text, "a", "b")


WNIDS = ("n01440764", "n02123045")
MAPPING = "n02123045 tabby, tabby cat\r\nn09999999 of no folder\r\n\r\nn01440764 tench, Tinca tinca\r\n"


@pytest.mark.parametrize("name, place, mark", [("imagenet", ".", ""), ("wnids", "wnids", "\ufeff")])
def test_a_mapping_beside_names_the_wordnet_ids(tmp_path, name, place, mark):
    fill(tmp_path / place / "val", *WNIDS)
    (tmp_path / place / "LOC_synset_mapping.txt").write_bytes((mark + MAPPING).encode())
    assert sets.open_source(name, tmp_path, "test").classes == ["tench", "tabby"]
    assert sets.found(name, tmp_path)
    fill(tmp_path / place / "val", "n00000001")
    with pytest.raises(ValueError, match=r"no line for the folder n00000001 \(1 missing\)"):
        sets.open_source(name, tmp_path, "test")


def test_wordnet_ids_without_names_are_warned_of(tmp_path):
    for name in ("imagenet", "wnids"):
        fill(tmp_path / name / "val", *WNIDS)
        with pytest.warns(UserWarning, match="n01440764 is a WordNet id.*add .*LOC_synset_mapping"):
            assert sets.open_source(name, tmp_path, "test").classes == list(WNIDS)


def test_a_flat_validation_folder_is_told_what_to_do(tmp_path):
    fill(tmp_path, "val", count=3)
    with pytest.raises(FileNotFoundError, match="no images in .*3 are in no folder.*LOC_val_solution.csv"):
        sets.open_source("imagenet", tmp_path, "test")


@pytest.mark.parametrize(
    "name, split, sentence",
    [
        ("imagenet", "train", "no imagenet under .*: log in .*<wnid>"),
        ("fashionmnist", "train", "no fashionmnist under .*: type .* --download --data fashion"),
        ("cub200", "test", "no cub200 under .*: put its images .Caltech-UCSD Birds"),
        ("nothere", "train", "unknown --data 'nothere': expected a set that .* --list shows, .* folder"),
        ("halfset", "test", "No such file or directory: .*halfset.test"),
    ],
)
def test_a_set_that_is_not_there_is_one_sentence(tmp_path, name, split, sentence):
    fill(tmp_path / "halfset/train", "dog")
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        sets.open_source(name, tmp_path, split)
    assert "\n" not in str(error.value)


def test_the_papers_26_sets_are_known_and_each_says_how_to_get_it(tmp_path):
    known = {*sets.TORCHVISION, *sets.FOLDERS, "imagenet"} - {"fashionmnist", "imagenette"}
    assert len(sets.PAPER) == 26 and set(sets.PAPER) == known and sets.names(tmp_path)[:26] == sets.PAPER
    assert all(str(tmp_path) in sets.how_to_get(name, tmp_path) for name in sets.names(tmp_path))
    assert {name for name in sets.PAPER if sets.metric(name) != "top1"} == set(sets.FACTS["metrics"])


def test_every_template_takes_one_name_and_imagenet_has_seven():
    tables = [*sets.FACTS["prompts"].values(), *sets.FACTS["captions"].values()]
    assert all(t.count("{}") == 1 for table in tables for t in table)
    assert len(sets.prompts("imagenet")) == 7  # as many as the published ones
    assert sets.prompts("own") == sets.FACTS["prompts"]["generic"]
    assert sets.caption_templates("own") == sets.FACTS["captions"]["generic"]
    assert set(sets.FACTS["prompts"]) >= set(sets.PAPER) - {"caltech101"}  # whose objects are of no kind


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 40, "test": 60})


def test_scenes_are_captioned_for_training_and_labelled_for_testing(few_scenes):
    train, test = sets.open_source("scenes"), sets.open_source("scenes", split="test")
    assert train.classes is None and isinstance(train[0][1], str) and train[0][0].size == (32, 32)
    assert len(test.classes) == 12 and isinstance(test[0][1], int)
    assert sets.labelled("scenes")[0].classes == test.classes
    held = sets.open_source("scenes-heldout", split="test")
    named = {held.classes[held.label(i)] for i in range(len(held))}
    assert 0 < len(held) < 60 and len(held.classes) == 96
    assert named <= {f"{colour} {kind}" for kind, colour in sets.scenes.HELD_OUT.items()}
    with pytest.raises(ValueError, match="for testing alone"):
        sets.open_source("scenes-heldout")


def test_captions_are_those_of_the_test_split_or_of_the_only_one(few_scenes, tmp_path):
    fill(tmp_path, "both", suffix=".jpg")
    for name in ("both/both.tsv", "both/both-test.tsv", "both/pairs.tsv"):
        (tmp_path / name).write_text("path\tcaption\n0.jpg\ta boat\n")
    for name, split in (("both", "test"), (f"{tmp_path}/both/pairs.tsv", "train"), ("scenes", "train")):
        for asked in (None, split):
            source, found = sets.open_captions(name, tmp_path, asked)
            assert (source.name, source.classes, found) == (name, None, split)
    with pytest.raises(ValueError, match="scenes has classes, no captions"):
        sets.open_captions("scenes", tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="nothere.tsv"):
        sets.open_captions("nothere.tsv", tmp_path)


def test_a_published_file_is_read_by_the_name_of_the_set(tmp_path):
    table = {"pets": ["Abyssinian", "café cat"], "cars": [["a", "b"], ["c"]], "food101": 7}
    (tmp_path / "labels.json").write_text("\ufeff" + json.dumps(table), encoding="utf-8")
    for name in ("pets", "cars"):
        assert zeroshot.read_published(tmp_path / "labels.json", name) == table[name]
    with pytest.raises(ValueError, match="no list under 'food101'"):
        zeroshot.read_published(tmp_path / "labels.json", "food101")
    with pytest.raises(FileNotFoundError, match="nothere.json"):
        zeroshot.read_published(tmp_path / "nothere.json", "pets")
    for content, sentence in ((b'{"pets": ["cat"', "not JSON"), (b"\xff\xfe\x00", "not text in UTF-8")):
        (tmp_path / "labels.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"labels.json is {sentence}"):
            zeroshot.read_published(tmp_path / "labels.json", "pets")
