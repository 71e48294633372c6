"""The drawn images and their captions against the words of scenes.json: what is drawn, named and held out.

python -m pytest tests/test_scenes.py        # 4 s, no network
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import scenes
from scenes import COLOURS, HELD_OUT, KINDS, NAMES, SHARES, build, draw, scene


def named(text, table):
    """The entries of `table` of which a word is in the text."""
    return {name for name, words in table.items() if re.search(rf"\b({'|'.join(words)})\b", text)}


def captions(split):
    """(scene, caption in lower case, kinds named, colours named) without drawing."""
    rng = random.Random(f"captions {split}")
    drawn = [scene(rng, split) for _ in range(4000)]
    texts = [scenes.caption(rng, s).lower() for s in drawn]
    return [(s, text, named(text, KINDS), named(text, COLOURS)) for s, text in zip(drawn, texts)]


def close(hits, expected):
    hits = list(hits)  # within 4 standard errors of what is expected
    return abs(np.mean(hits) - expected) < 4 * (expected * (1 - expected) / len(hits)) ** 0.5


def test_an_image_depends_on_seed_split_and_index_alone_in_another_process_too():
    code = "import scenes; d = scenes.build('train', 5, 3); print(d['captions'], d['images'].tolist())"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=Path(scenes.__file__).parent)
    data = build("train", 9, 3)
    assert printed.decode().strip() == f"{data['captions'][:5]} {data['images'][:5].tolist()}"
    others = [build("train", 50), build("test", 50), build("train", 50, seed=1)]
    assert len({image.tobytes() for data in others for image in data["images"]}) == 150


def test_held_out_pairs_are_in_no_training_image_or_caption_and_in_a_sixth_of_the_test_split():
    for drawn, text, kinds, colours in captions("train"):
        assert HELD_OUT[drawn.kind] != drawn.colour and not {HELD_OUT[kind] for kind in kinds} & colours, text
    assert close((HELD_OUT[s.kind] == s.colour for s, *_ in captions("test")), scenes.HELD_OUT_SHARE)


def test_captions_name_what_the_shares_say_and_six_in_a_hundred_are_wrong_in_one_thing():
    drawn, texts, kinds, colours = zip(*captions("train"))
    assert close(map(bool, kinds), SHARES["kind and colour"] + SHARES["kind"])
    assert close(map(bool, colours), SHARES["kind and colour"] + SHARES["colour"])
    nothing = {text.lower() for text in scenes.NOTHING}
    assert close((text in nothing for text in texts), SHARES["nothing"])
    wrong = [len(k - {s.kind}) + len(c - {s.colour}) for s, k, c in zip(drawn, kinds, colours)]
    assert max(wrong) == 1 and close(wrong, scenes.WRONG)
    for s, text in zip(drawn, texts):
        assert named(text, scenes.TEXTURES) <= {s.texture} and named(text, scenes.SIZES) <= {s.size}
        assert named(text.replace("-", " "), scenes.BACKGROUNDS) <= {s.background}


def test_kinds_told_is_the_share_of_captions_that_name_the_kind_and_moves_no_pixel():
    many, usual = build("train", 300, size=8, kinds_told=0.75), build("train", 300, size=8)
    assert close((bool(named(text.lower(), KINDS)) for text in many["captions"]), 0.75)
    assert (many["images"] == usual["images"]).all()


def test_labels_are_those_of_the_drawn_image_and_every_kind_and_texture_shows():
    data = build("test", 150)
    assert all(set(data[name]) == set(range(len(NAMES[name]))) for name in NAMES)
    pairs = zip(data["kind"], data["colour"])
    assert list(data["held_out"]) == [HELD_OUT[NAMES["kind"][k]] == NAMES["colour"][c] for k, c in pairs]
    drawn = scene(random.Random(1), "train")._replace(kind="mushroom", texture="plain", shift=(0.0, 0.0))
    middle = np.array(draw(drawn), float)[12, 16]  # in the cap, whatever the size and tilt
    paints = {name: np.abs(np.array(paint) - middle).sum() for name, paint in scenes.PAINTS.items()}
    assert min(paints, key=paints.get) == drawn.colour
    others = [drawn._replace(texture=t) for t in scenes.TEXTURES] + [drawn._replace(kind=k) for k in KINDS]
    assert len({draw(other).tobytes() for other in others}) == len(scenes.TEXTURES) + len(KINDS) - 1


def test_uncurated_kinds_follow_zipfs_law_and_other_things_stand_behind():
    rng = random.Random(2)
    drawn = [scene(rng, "train", curated=False) for _ in range(2000)]
    assert close((s.kind == "house" for s in drawn), 1 / sum(1 / place for place in range(1, 13)))
    assert close((bool(s.behind) for s in drawn), 1 / 3)
    assert not any(HELD_OUT[s.kind] == s.colour for one in drawn for s in (one, *one.behind))


def test_the_command_writes_files_named_after_what_is_drawn(tmp_path):
    scenes.main(["--out", str(tmp_path / "photos"), "--count", "5"])
    data = build("train", 5)
    kind, colour = NAMES["kind"][data["kind"][4]], NAMES["colour"][data["colour"][4]]
    path = tmp_path / f"photos/00004-{colour}-{kind}.png"
    assert (np.array(Image.open(path)) == data["images"][4]).all()
    assert path.with_suffix(".txt").read_text().strip() == data["captions"][4]
