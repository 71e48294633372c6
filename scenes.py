"""Small images with captions as people write them on the web: the data set that needs no download.

    python scenes.py                               # 24 images on one sheet, scenes.png; captions printed
    python scenes.py --out photos --count 200      # photos/00012-red-boat.png, 00012-red-boat.txt, ...

A scene (kind of thing, colour, texture, size, background) is drawn at random, and its caption names only
part of it. Most alternative texts on the web name none or one of the visible objects, many say nothing about
the image (file names, small talk), and some are wrong: of the 100 million photos behind YFCC15M five in six
have no title or description in English words (CLIP's paper). SHARES follows that in spirit, unmeasured: three
captions in ten name the kind, as many say nothing. It was set once, after one trial in which SLIP was far
ahead of CLIP; `kinds_told` of `build` shows how that lead depends on it.
In the paper: the place of YFCC15M, the pre-training data. A toy, no substitute.
In shapes: (seed, split, index) -> Scene -> one image, uint8 [size, size, 3], and one caption.
HELD_OUT is a colour for each kind that no training image or caption joins to it; the test split has both.
Left to others: batches (data.py), views (augment.py), prompts (prompts.json).
"""

import argparse
import functools
import math
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw

# What captions name, as shares of all captions: 30% name the kind and 38% the colour.
SHARES = {"kind and colour": 0.18, "kind": 0.12, "colour": 0.20, "place": 0.20, "nothing": 0.30}
WRONG = 0.06  # share of all captions that name another kind or another colour
NAMES_TEXTURE, NAMES_SIZE, NAMES_PLACE = 0.10, 0.15, 0.25  # among captions that say anything
HASHTAGS = 0.10  # of these, written "#red #boat"
SCALES = {"small": (0.62, 0.70), "large": (0.78, 0.86)}  # side of the thing, as a share of the image
SHIFT, TILT = 0.08, 8  # at most: of the centre, as a share of the image; in degrees
HELD_OUT_SHARE = 1 / 6  # of the test split


def _words(text):
    """ "house, hut; tree" -> {"house": ["house", "hut"], "tree": ["tree"]}: the usual word first."""
    return {words.split(", ")[0]: words.split(", ") for words in text.split("; ")}


KINDS = _words(
    "house, cottage, cabin, hut; tree, oak, maple; boat, sailboat, yacht, dinghy; fish, carp, perch; "
    "car, auto, automobile, hatchback; mushroom, toadstool, fungus; cup, mug, teacup; "
    "flower, blossom, bloom; umbrella, parasol, brolly; balloon, hot-air balloon; "
    "rocket, spaceship, spacecraft; butterfly, moth, swallowtail"
)
COLOURS = _words(
    "red, crimson, scarlet; orange, tangerine, amber; yellow, golden, lemon; green, emerald, lime; "
    "blue, azure, cobalt; purple, violet, lilac; pink, rosy, blush; white, snowy, ivory"
)
TEXTURES = _words("plain; striped, stripy; dotted, spotted, polka-dot; checked, chequered, tartan")
BACKGROUNDS = {
    "night": ("at night", "after dark", "under the stars"),
    "sea": ("by the sea", "at the seaside", "near the ocean"),
    "meadow": ("in the meadow", "on the grass", "in the park"),
    "room": ("indoors", "in the kitchen", "in my room"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("big", "large", "huge")}
_COLOURS = "purple blue orange green pink yellow red white green purple yellow red"
HELD_OUT = dict(zip(KINDS, _COLOURS.split(), strict=True))
NAMES = dict(kind=list(KINDS), colour=list(COLOURS), texture=list(TEXTURES), background=list(BACKGROUNDS))

UNNAMED = ("thing", "one", "something", "beauty")
FRAMES = (
    "{a} | {a} | {it} | {it} | photo of {a} | a picture of {a} | my {it} | the {it} we saw | found {a} | "
    "{it} - stock photo | look, {a}! | {it} for sale | {it}, 2014 | another {it} | drawing of {a}"
).split(" | ")
NOTHING = (
    "nice one | my holiday | IMG 4032 | untitled | sunday | love this!! | from my phone | best day ever | "
    "day 3 | test | for you, mum | see my profile for more | no words | file 17 copy | wow | happy friday"
).split(" | ")

# Colours of the main body, and of details that are the same whatever the colour of the thing.
_CODES = "#d62828 #f2841e #f6d638 #42ac48 #3870e2 #8842ba #f692be #eeeee8"
PAINTS = dict(zip(COLOURS, map(ImageColor.getrgb, _CODES.split()), strict=True))
_CODES = "ink #1a181e brown #7c5434 cream #e8dec4 grey #929498 glass #9cb8c2 stem #466c34".split()
ACCENTS = dict(zip(_CODES[::2], _CODES[1::2], strict=True))
# Heights from the top down, as shares of the image, and the colours there; between them they blend.
BANDS = {
    "night": ((0, 1), ("#0e0f1e", "#28283e")),
    "sea": ((0, 0.52, 0.52, 1), ("#4e565e", "#62686a", "#2c4650", "#1c323c")),
    "meadow": ((0, 0.64, 0.64, 1), ("#2c343e", "#484a4c", "#36422c", "#222c1e")),
    "room": ((0, 0.76, 0.76, 1), ("#60564e", "#544c46", "#3c322c", "#322a26")),
}
# A thing is a row of strokes, back to front, in a square of 100 by 100 with y down: paint, form, numbers.
# Paints: "body" is the colour with its texture, "shade" is darker, "hole" the background; else ACCENTS.
# Forms: poly, x y of corners; oval, left top right bottom; dome, its upper half; line, width, x y of points.
THINGS = """
house: grey poly 70 6 84 6 84 40 70 40 | body poly 12 44 88 44 88 98 12 98 | shade poly 0 50 50 2 100 50 |
  brown poly 40 62 60 62 60 98 40 98 | cream poly 18 58 34 58 34 76 18 76 |
  cream poly 66 58 82 58 82 76 66 76 | cream oval 42 22 58 38
tree: brown poly 42 50 58 50 60 84 74 100 26 100 40 84 | body oval 0 26 50 70 | body oval 50 26 100 70 |
  body oval 20 0 80 64 | brown line 7 50 90 50 56 30 40 | brown line 7 50 64 68 44
boat: brown line 4 52 2 52 74 | body poly 56 4 96 64 56 64 | cream poly 48 12 48 64 10 64 |
  body poly 0 70 100 70 82 98 18 98 | shade line 5 3 73 97 73
fish: shade poly 28 32 50 4 68 30 | shade poly 32 70 44 94 60 70 | body poly 64 50 100 14 90 50 100 86 |
  body oval 0 20 80 80 | cream poly 10 66 40 70 66 64 54 76 40 80 24 77 | shade line 6 40 28 48 50 40 72 |
  cream oval 8 30 34 56 | ink oval 14 36 28 50
car: body poly 20 50 34 18 70 18 86 50 | glass poly 29 48 38 25 50 25 50 48 |
  glass poly 55 48 55 25 67 25 78 48 | body poly 0 54 8 48 92 48 100 54 100 78 0 78 | cream oval 0 54 12 66 |
  ink oval 10 62 40 92 | ink oval 60 62 90 92 | grey oval 18 70 32 84 | grey oval 68 70 82 84
mushroom: cream poly 37 52 63 52 70 98 30 98 | shade oval 0 42 100 66 | body dome 0 2 100 106
cup: grey oval 0 84 84 100 | shade oval 60 36 100 80 | hole oval 68 45 90 71 |
  body poly 6 32 78 32 72 78 60 94 24 94 12 78 | cream oval 6 23 78 41 | brown oval 12 27 72 39 |
  cream line 5 30 20 36 12 30 2 | cream line 5 52 20 58 12 52 2
flower: stem line 7 50 50 50 100 | stem poly 50 94 58 74 88 64 78 86 | stem poly 50 98 42 80 12 70 22 92 |
  body oval 35 0 65 32 | body oval 35 40 65 72 | body oval 8 8 42 38 | body oval 58 8 92 38 |
  body oval 8 34 42 64 | body oval 58 34 92 64 | brown oval 35 21 65 51
umbrella: grey line 8 50 0 50 86 54 96 66 96 70 84 | body dome 0 6 100 110 | hole oval 0 50 34 68 |
  hole oval 34 50 66 68 | hole oval 66 50 100 68 | shade line 4 50 8 34 30 33 56 |
  shade line 4 50 8 66 30 67 56 | grey line 8 50 56 50 80
balloon: cream line 4 32 56 41 84 | cream line 4 68 56 59 84 | body poly 16 50 84 50 62 74 38 74 |
  body oval 10 0 90 68 | cream oval 37 0 63 75 | brown poly 36 82 64 82 61 100 39 100
rocket: cream poly 38 78 62 78 50 100 | shade poly 34 46 8 74 8 94 36 78 |
  shade poly 66 46 92 74 92 94 64 78 | body poly 50 0 63 16 71 36 71 60 66 82 34 82 29 60 29 36 37 16 |
  grey oval 36 28 64 56 | glass oval 41 33 59 51
butterfly: cream line 4 50 30 34 4 | cream line 4 50 30 66 4 | body poly 48 50 0 12 4 48 20 58 |
  body poly 52 50 100 12 96 48 80 58 | body oval 12 46 48 94 | body oval 52 46 88 94 |
  cream oval 10 26 24 40 | cream oval 76 26 90 40 | cream oval 22 68 36 82 | cream oval 64 68 78 82 |
  ink oval 44 20 56 88
"""
THINGS = dict(line.split(": ") for line in THINGS.replace("\n  ", " ").strip().splitlines())
Scene = namedtuple("Scene", "kind colour texture size background rgb scale shift tilt mirrored specks behind")


def scene(rng, split, curated=True):
    """One scene; `rng` is a random.Random. Pairs of HELD_OUT come in the test split only.

    Not curated: kinds follow Zipf's law, things are smaller and partly outside the image, there is five times
    the clutter, and in one scene of three another thing behind, which neither labels nor caption name.
    Fields: rgb is the colour as painted, tilt in degrees; scale (side of the thing), shift (of its centre:
    right, down) and specks (faint clutter: x, y, radius) are shares of the image; behind lists Scenes.
    """
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
    """Scene -> RGB image [size, size], painted four times as large in whole pixels, then averaged.

    The same bytes on every machine; another version of Pillow moves the edges in 0.05% of the pixels.
    """
    side = 4 * size
    image = _backdrop(scene.background, side).copy()
    brush = ImageDraw.Draw(image)
    for x, y, r in scene.specks:
        faint = tuple(c + 26 for c in image.getpixel((int(x * side), int(y * side))))
        brush.ellipse([round(side * v) for v in (x - r, y - r, x + r, y + r)], fill=faint)
    for thing in (*scene.behind, scene):
        _paint(image, thing, side)
    image = image.reduce(4)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if scene.mirrored else image


def _paint(image, thing, side):
    """The strokes of a thing, onto the image."""
    dark = tuple(round(0.62 * c) for c in thing.rgb)
    body = Image.new("RGB", (side, side), thing.rgb)
    moved = [round(side * max(-0.5, min(0.0, shift - 0.25))) for shift in thing.shift]
    body.paste(dark, moved, mask=_pattern(thing.texture, side))
    flat, cloth = ACCENTS | {"shade": dark}, {"body": body, "hole": image.copy()}
    unit, angle = side * thing.scale / 100, math.radians(thing.tilt)
    turn = unit * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    middle = side * (0.5 + np.array(thing.shift))
    for paint, width, outline in _strokes(thing.kind):
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
def _strokes(kind):
    """THINGS[kind] -> [(paint, width of the line or 0, points around the middle of the thing [n, 2])]."""
    strokes = []
    for stroke in THINGS[kind].split(" | "):
        paint, form, *numbers = stroke.split()
        width = int(numbers.pop(0)) if form == "line" else 0
        points = np.array(numbers, float).reshape(-1, 2) - 50
        if form in ("oval", "dome"):
            turns = math.pi * (1 + np.arange(32 if form == "oval" else 17) / 16)
            circle = np.stack([np.cos(turns), np.sin(turns)], axis=1)
            points = points.mean(0) + (points[1] - points[0]) / 2 * circle
        strokes.append((paint, width, points))
    return strokes


@functools.cache
def _backdrop(background, side):
    heights, codes = BANDS[background]
    channels = zip(*map(ImageColor.getrgb, codes), strict=True)
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


def build(split, count, seed=0, size=32, kinds_told=None, curated=True):
    """`count` images of a split with captions and labels; image i depends on (seed, split, i) alone.

    `kinds_told`: the share of captions that name the kind, 0.10 to 0.75, the other shares in proportion; the
    images stay. `curated`: as in `scene`. -> {images: uint8 [n, size, size, 3], captions: list;
    kind, colour, texture, background: int64 [n]; held_out: bool [n]}. Raises ValueError.
    """
    if split not in ("train", "test") or count < 1 or size < 8:
        raise ValueError(f"found {split}, {count} images of {size} pixels: expected train or test, 1, 8")
    named = SHARES["kind and colour"] + SHARES["kind"]
    kinds_told = named if kinds_told is None else kinds_told
    if not 0.10 <= kinds_told <= 0.75:
        raise ValueError(f"found a share of {kinds_told} captions that name the kind, expected 0.10 to 0.75")
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


def save_sheet(path, data):
    """Whole rows of eight images, enlarged, in one file; their captions are printed."""
    images = data["images"][: len(data["images"]) // 8 * 8]
    sheet = rearrange(images, "(row column) h w c -> (row h) (column w) c", column=8)
    Image.fromarray(sheet.repeat(3, axis=0).repeat(3, axis=1)).save(path)
    print("\n".join(data["captions"]))


def save_folder(folder, data):
    """folder/00012-red-boat.png, named after what is drawn, and its caption in 00012-red-boat.txt."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(data["captions"]):
        colour, kind = (NAMES[what][data[what][i]] for what in ("colour", "kind"))
        path = Path(folder) / f"{i:05d}-{colour}-{kind}.png"
        Image.fromarray(data["images"][i]).save(path)
        path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save drawn images with their captions.")
    add = parser.add_argument
    add("--out", default="scenes.png", help="a file for one sheet, or a folder (default: %(default)s)")
    add("--count", type=int, default=24, help="images (default: %(default)s)")
    add("--split", choices=["train", "test"], default="train", help="default: %(default)s")
    add("--seed", type=int, default=0, help="another seed draws other scenes (default: %(default)s)")
    add("--size", type=int, default=32, help="side of an image, pixels (default: %(default)s)")
    args = parser.parse_args(argv)
    save = save_sheet if Path(args.out).suffix else save_folder
    try:
        save(args.out, build(args.split, args.count, args.seed, args.size))
    except (OSError, ValueError) as error:  # no such folder, an ending that names no image format, ...
        parser.exit(2, f"cannot save {args.out}: {error}\n")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
