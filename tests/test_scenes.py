"""The built-in pictures and captions against the tables of scenes.py: what is drawn, told and held out.

Captions are read back with every synonym in the tables and compared with the scene they were written for.
Shares over n captions must lie within four standard deviations, 4 sqrt(p (1 - p) / n), of the constants.

    python -m pytest tests/test_scenes.py        # 4 s, no network
"""

import hashlib
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import scenes
from scenes import COLOURS, HELD_OUT, KINDS, NAMES, PAINTS, TELLS, TEXTURES, build, caption, draw, scene

COUNT = 20_000


def named(text, table):
    """The entries of `table` that have a word in the text."""
    found = [name for name, words in table.items() if re.search(rf"\b({'|'.join(words)})\b", text.lower())]
    return set(found)


def told(split, count=COUNT):
    rng = random.Random(f"told {split}")
    drawn = [scene(rng, split) for _ in range(count)]
    return [(s, caption(rng, s)) for s in drawn]


@pytest.fixture(scope="module")
def training():
    return told("train")


def digest(data):
    return hashlib.sha256(data["images"].tobytes() + "\n".join(data["captions"]).encode()).hexdigest()


def close(share, expected, count=COUNT):
    return abs(share - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_another_process_draws_and_writes_the_same():
    code = "from tests.test_scenes import build, digest; print(digest(build('train', 24)))"
    root = Path(scenes.__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == digest(build("train", 24))


def test_a_picture_does_not_depend_on_how_many_are_drawn():
    few, many = build("test", 5), build("test", 9)
    assert (few["images"] == many["images"][:5]).all() and few["captions"] == many["captions"][:5]
    assert all((few[name] == many[name][:5]).all() for name in [*NAMES, "held_out"])


def test_splits_and_seeds_share_no_picture():
    sets = [build("train", 400), build("test", 400), build("train", 400, seed=1)]
    pictures = [{image.tobytes() for image in data["images"]} for data in sets]
    assert [len(p) for p in pictures] == [400, 400, 400]
    assert len(set.union(*pictures)) == 1200


def test_held_out_pairs_are_neither_drawn_nor_named_in_training(training):
    for drawn, text in training:
        assert HELD_OUT[drawn.kind] != drawn.colour
        for kind in named(text, KINDS):
            assert HELD_OUT[kind] not in named(text, COLOURS), text


def test_every_other_pair_is_well_covered_in_training(training):
    pairs = [(drawn.kind, drawn.colour) for drawn, _ in training]
    assert list(HELD_OUT) == list(KINDS) and set(HELD_OUT.values()) == set(COLOURS)
    assert len(set(pairs)) == len(KINDS) * (len(COLOURS) - 1)
    assert min(map(pairs.count, set(pairs))) > 0.7 * COUNT / len(set(pairs))


def test_a_sixth_of_the_test_split_is_held_out_and_captions_say_so():
    test = told("test", 6000)
    pairs = [(drawn, text) for drawn, text in test if HELD_OUT[drawn.kind] == drawn.colour]
    assert close(len(pairs) / 6000, scenes.HELD_OUT_SHARE, 6000)
    both = [named(t, KINDS) == {d.kind} and named(t, COLOURS) == {d.colour} for d, t in pairs]
    assert np.mean(both) > 0.4


def test_shares_of_what_captions_tell(training):
    n = len(training)
    kinds = [named(text, KINDS) for _, text in training]
    colours = [named(text, COLOURS) for _, text in training]
    assert max(map(len, kinds)) == max(map(len, colours)) == 1
    assert close(sum(map(len, kinds)) / n, TELLS["kind and colour"] + TELLS["kind"])
    assert close(sum(map(len, colours)) / n, TELLS["kind and colour"] + TELLS["colour"])
    assert close(sum(text in scenes.NOTHING for _, text in training) / n, TELLS["nothing"])
    says = 1 - TELLS["nothing"]
    assert close(sum(bool(named(text, TEXTURES)) for _, text in training) / n, scenes.TELLS_TEXTURE * says)
    assert close(sum(bool(named(text, scenes.SIZES)) for _, text in training) / n, scenes.TELLS_SIZE * says)


def test_the_share_of_wrong_captions_and_each_is_wrong_in_one_thing(training):
    wrong = [
        len(named(text, KINDS) - {drawn.kind}) + len(named(text, COLOURS) - {drawn.colour})
        for drawn, text in training
    ]
    assert max(wrong) == 1
    assert close(sum(wrong) / len(wrong), scenes.WRONG)


def test_textures_sizes_and_places_are_never_told_wrong(training):
    for drawn, text in training:
        assert named(text, TEXTURES) <= {drawn.texture}
        assert named(text, scenes.SIZES) <= {drawn.size}
        assert named(text.replace("-", " "), scenes.BACKGROUNDS) <= {drawn.background}


def test_the_words_around_name_neither_kind_nor_colour():
    tables = [*TEXTURES.values(), *scenes.SIZES.values(), *scenes.BACKGROUNDS.values()]
    around = " ".join([*scenes.NOTHING, *scenes.FRAMES, *scenes.UNNAMED, *sum(tables, ())])
    assert not named(around, KINDS) and not named(around, COLOURS)


def test_labels_are_those_of_the_captioned_picture():
    data = build("test", 600)
    for name in NAMES:
        assert data[name].dtype == np.int64 and set(data[name]) == set(range(len(NAMES[name])))
    words = [named(text, KINDS) for text in data["captions"]]
    right = [NAMES["kind"][k] in w for k, w in zip(data["kind"], words, strict=True) if w]
    assert np.mean(right) > 0.9  # all but the wrong ones; 1 in 12 if captions and labels were out of step
    pairs = zip(data["kind"], data["colour"], strict=True)
    assert list(data["held_out"]) == [HELD_OUT[NAMES["kind"][k]] == NAMES["colour"][c] for k, c in pairs]


def test_the_body_is_painted_in_the_colour_of_the_label():
    rng = random.Random(0)
    paints = np.array([np.array(paint) / max(paint) for paint in PAINTS.values()])
    for _ in range(100):
        drawn = replace(scene(rng, "train"), kind="mushroom", texture="plain", shift_x=0.0, shift_y=0.0)
        middle = np.array(draw(drawn))[12, 16]  # in the cap, whatever the size and tilt
        nearest = np.abs(paints - middle / middle.max()).sum(1).argmin()  # some are painted darker
        assert NAMES["colour"][nearest] == drawn.colour


def test_mirrored_scenes_are_mirror_images_and_textures_and_kinds_show():
    rng = random.Random(1)
    for _ in range(10):
        plain = replace(scene(rng, "train"), texture="plain", mirrored=False)
        picture = draw(plain)
        assert ImageOps.mirror(picture).tobytes() == draw(replace(plain, mirrored=True)).tobytes()
        others = [replace(plain, texture=t) for t in TEXTURES] + [replace(plain, kind=k) for k in KINDS]
        assert len({draw(other).tobytes() for other in others}) == len(TEXTURES) + len(KINDS) - 1


def test_a_large_drawing_shows_the_same_scene():
    rng = random.Random(2)
    for _ in range(10):
        drawn = scene(rng, "train")
        small, large = draw(drawn, 32), draw(drawn, 96)
        assert large.size == (96, 96) and large.mode == "RGB"
        difference = np.abs(np.array(small, float) - np.array(large.reduce(3), float)).mean()
        assert difference < 6  # of 255: corners fall on whole pixels of either canvas; another scene is at 30


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'val': expected 'train' or 'test'"):
        build("val", 1)


def test_the_command_saves_a_sheet_and_prints_its_captions(tmp_path, capsys):
    scenes.main(["--out", str(tmp_path / "sheet.png"), "--seed", "5", "--size", "48"])
    assert Image.open(tmp_path / "sheet.png").size == (800, 300)
    lines = capsys.readouterr().out.splitlines()
    texts = [line.split("  ", 1)[1] for line in lines[:24]]
    assert texts == build("train", 24, seed=5)["captions"]
    with pytest.raises(SystemExit, match="2"):
        scenes.main(["--out", str(tmp_path / "missing" / "sheet.png")])
