"""Small images with captions as people write them on the web: the data set that needs no download.

    python scenes.py --out photos --count 200      # photos/00012-red-boat.png, 00012-red-boat.txt, ...

A scene (kind of thing, colour, texture, size, background) is drawn at random. Its caption names part of it,
nothing, or something wrong: of the 100 million photos behind YFCC15M five in six have no title or description
in English words (CLIP's paper). SHARES was set once in that spirit, after a trial in which SLIP led by far.
"""

import argparse
import functools
import json
import math
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# What captions name, as shares of all captions: 30% name the kind and 38% the colour.
SHARES = {"kind and colour": 0.18, "kind": 0.12, "colour": 0.20, "place": 0.20, "nothing": 0.30}
WRONG = 0.06  # share of all captions that name another kind or another colour
NAMES_TEXTURE, NAMES_SIZE, NAMES_PLACE, HASHTAGS = 0.10, 0.15, 0.25, 0.10  # of those that say anything
SCALES = {"small": (0.62, 0.70), "large": (0.78, 0.86)}  # side of the thing, as a share of the image
SHIFT, TILT = 0.07, 7  # at most: of the centre, as a share of the image; in degrees
HELD_OUT_SHARE = 1 / 6  # of the test split

DATA = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
KINDS, COLOURS, TEXTURES, SIZES, BACKGROUNDS = DATA["words"].values()  # name -> words, the usual one first
NAMES = dict(kind=list(KINDS), colour=list(COLOURS), texture=list(TEXTURES), background=list(BACKGROUNDS))
HELD_OUT = DATA["held_out"]  # kind -> a colour that no training image or caption joins to it
UNNAMED, FRAMES, NOTHING = DATA["unnamed"], DATA["frames"], DATA["nothing"]
PAINTS, ACCENTS = DATA["paints"], DATA["accents"]  # of a thing's body; of details, whatever its colour
BANDS = DATA["bands"]  # rows of height from the top, share of the image, and RGB; between them it blends
THINGS = DATA["things"]  # kind -> strokes, back to front; "about" in scenes.json says how one is written
Scene = namedtuple("Scene", "kind colour texture size background rgb scale shift tilt mirrored specks behind")


def scene(rng, split, curated=True):
    """One scene; `rng` is a random.Random. Pairs of HELD_OUT come in the test split only.
    Not curated: kinds follow Zipf's law, things are smaller and partly outside, specks are five times as
    many, and behind one thing in three stands another that neither labels nor caption name.
    Scale (side of the thing), shift (right, down) and specks (x, y, radius) are shares of the image."""
    weights = [1.0 if curated else 1 / (place + 1) for place in range(len(KINDS))]
    kind = rng.choices(list(KINDS), weights)[0]
    colour = rng.choice([c for c in COLOURS if c != HELD_OUT[kind]])
    if split == "test" and rng.random() < HELD_OUT_SHARE:
        colour = HELD_OUT[kind]
    texture, size, background = (rng.choice(list(table)) for table in (TEXTURES, SIZES, BACKGROUNDS))
    light = rng.uniform(0.86, 1.04)
    rgb = tuple(min(255, max(0, round(light * c) + rng.randint(-12, 12))) for c in PAINTS[colour])
    scale, tilt = rng.uniform(*SCALES[size]) * (1.0 if curated else 0.7), rng.uniform(-TILT, TILT)
    farthest = SHIFT if curated else 0.35
    shift = (rng.uniform(-farthest, farthest), rng.uniform(-farthest, farthest))
    count = rng.randint(3, 8) * (1 if curated else 5)
    specks = tuple((rng.random(), rng.random(), rng.uniform(0.01, 0.04)) for _ in range(count))
    behind = [] if curated or rng.random() < 2 / 3 else [scene(rng, "train", curated)]
    mirrored = rng.random() < 0.5
    return Scene(kind, colour, texture, size, background, rgb, scale, shift, tilt, mirrored, specks, behind)


def draw(scene, size=32):
    """Scene -> RGB image [size, size], painted four times as large, then averaged: equal everywhere."""
    side = 4 * size
    image = _backdrop(scene.background, side).copy()
    for x, y, r in scene.specks:
        faint = tuple(c + 26 for c in image.getpixel((int(x * side), int(y * side))))
        ImageDraw.Draw(image).ellipse([round(side * v) for v in (x - r, y - r, x + r, y + r)], fill=faint)
    for thing in (*scene.behind, scene):
        _paint(image, thing, side)
    image = image.reduce(4)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if scene.mirrored else image


def _paint(image, thing, side):
    dark = tuple(round(0.62 * c) for c in thing.rgb)
    body = Image.new("RGB", (side, side), thing.rgb)
    moved = [round(side * max(-0.5, min(0.0, shift - 0.25))) for shift in thing.shift]
    body.paste(dark, moved, mask=_pattern(thing.texture, side))
    flat, cloth = ACCENTS | {"shade": dark}, {"body": body, "hole": image.copy()}
    unit, angle = side * thing.scale / 100, math.radians(thing.tilt)
    turn = unit * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = side * (0.5 + np.array(thing.shift))
    for paint, width, outline in map(_stroke, THINGS[thing.kind]):
        points = (middle + outline @ turn).round().ravel().tolist()
        canvas = image if paint in flat else Image.new("L", (side, side))  # an image, or a mask
        brush, fill = ImageDraw.Draw(canvas), flat.get(paint, 255)
        if width:
            brush.line(points, fill=fill, width=round(unit * width), joint="curve")
        else:
            brush.polygon(points, fill=fill)
        if paint in cloth:
            image.paste(cloth[paint], mask=canvas)


@functools.cache
def _stroke(text):
    """ "body oval 0 26 50 70" -> paint, width of the line or 0, points around the thing's middle [n, 2]."""
    paint, form, *numbers = text.split()
    width = int(numbers.pop(0)) if form == "line" else 0
    points = np.array(numbers, float).reshape(-1, 2) - 50
    if form in ("oval", "dome"):
        turns = math.pi * (1 + np.arange(32 if form == "oval" else 17) / 16)
        circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
        points = points.mean(0) + (points[1] - points[0]) / 2 * circle
    return paint, width, points


@functools.cache
def _backdrop(background, side):
    heights, *channels = zip(*BANDS[background])
    column = [np.interp(np.arange(side) / side, heights, channel).round() for channel in channels]
    return Image.fromarray(np.stack([column] * side).transpose(2, 0, 1).astype(np.uint8))


@functools.cache
def _pattern(texture, side):
    """A texture's dark parts as a mask half as large again as the image, so that it can move by a quarter."""
    y, x = np.mgrid[: side * 3 // 2, : side * 3 // 2] / (side // 8)  # eight rows to the image
    dark = {
        "plain": np.zeros_like(x, bool),
        "striped": y % 1 < 0.55,
        "dotted": np.hypot((x + y // 1 % 2 / 2) % 1 - 0.3, y % 1 - 0.3) < 0.3,
        "checked": (x // 1 + y // 1) % 2 == 1,
    }
    return Image.fromarray(255 * dark[texture].astype(np.uint8))


def caption(rng, scene, shares=SHARES):
    """What somebody might write under the image: part of it, in words of their own, at times wrong."""
    what = rng.choices(list(shares), shares.values())[0]
    if what == "nothing":
        return rng.choice(NOTHING)
    kind, colour = scene.kind, scene.colour
    names_kind, names_colour = "kind" in what, "colour" in what
    if what != "place" and rng.random() < WRONG / (1 - shares["place"] - shares["nothing"]):
        others = [(k, colour) for k in KINDS if names_kind and k != kind]
        others += [(kind, c) for c in COLOURS if names_colour and c != colour]
        kind, colour = rng.choice([(k, c) for k, c in others if HELD_OUT[k] != c])
    words = [_word(rng, SIZES[scene.size])] if rng.random() < NAMES_SIZE else []
    words += [_word(rng, TEXTURES[scene.texture])] if rng.random() < NAMES_TEXTURE else []
    words += [_word(rng, COLOURS[colour])] if names_colour else []
    words.append(_word(rng, KINDS[kind]) if names_kind else rng.choice(UNNAMED))
    names_place = what == "place" or rng.random() < NAMES_PLACE
    place = [rng.choice(BACKGROUNDS[scene.background])] if names_place else []
    if rng.random() < HASHTAGS:
        return " ".join("#" + word.replace(" ", "-") for word in words + place)
    it = " ".join(words)
    a = f"{'an' if it[0] in 'aeiou' else 'a'} {it}"
    return " ".join([rng.choice(FRAMES).format(it=it, a=a), *place])


def _word(rng, words):
    return words[0] if rng.random() < 0.75 else rng.choice(words)


@functools.cache
def build(split, count, seed=0, size=32, kinds_told=None, curated=True):
    """`count` images of a split with captions and labels; image i depends on (seed, split, i) alone.
    `kinds_told`: the share of captions that name the kind, the others in proportion; the images stay.
    -> {images: uint8 [n, size, size, 3], captions: list, held_out: bool [n], and the labels int64 [n]: kind,
    colour, texture, background}; cached, so not to be written to."""
    named = SHARES["kind and colour"] + SHARES["kind"]
    kinds_told = named if kinds_told is None else kinds_told
    more, less = kinds_told / named, (1 - kinds_told) / (1 - named)
    shares = {what: share * (more if "kind" in what else less) for what, share in SHARES.items()}
    scenes, images, captions = [], np.empty((count, size, size, 3), np.uint8), []
    for i in range(count):
        rng = random.Random(f"{seed} {split} {i}")  # a string is hashed by SHA-512: the same everywhere
        scenes.append(scene(rng, split, curated))
        images[i] = draw(scenes[i], size)
        captions.append(caption(rng, scenes[i], shares))
    labels = {k: np.array([v.index(getattr(s, k)) for s in scenes], np.int64) for k, v in NAMES.items()}
    held_out = np.array([HELD_OUT[s.kind] == s.colour for s in scenes], bool)
    return {"images": images, "captions": captions, **labels, "held_out": held_out}


def main(argv=None):
    """An image and its caption to a file each, named after what is drawn."""
    parser = argparse.ArgumentParser(description="Save drawn images, x.png, with their captions, x.txt.")
    parser.add_argument("--out", default="scenes", help="folder (default: %(default)s)")
    parser.add_argument("--count", type=int, default=24, help="images (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        out, data = Path(args.out), build("train", args.count)
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: --out {args.out} --count {args.count}: {error}\n")
    for i, text in enumerate(data["captions"]):
        colour, kind = (NAMES[what][data[what][i]] for what in ("colour", "kind"))
        path = out / f"{i:05d}-{colour}-{kind}.png"
        Image.fromarray(data["images"][i]).save(path)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
