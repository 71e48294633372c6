"""Little pictures with captions as people write them on the web: the data set that needs no download.

    python scenes.py                        # 24 pictures to scenes.png, their captions on the screen; 0.3 s
    python scenes.py --size 96 --seed 3     # other scenes, drawn sharp

The concept: a scene (kind of thing, colour, texture, size, background) is drawn at random and *partly* told.
Of four captions three name the kind; of three, two the colour; of ten, one the texture; some are wrong, some
say nothing. Language sees part of the picture, so a loss on the pixels alone has something to add.
In the paper: the place of YFCC15M (section 4.1), whose captions are such a mixture; a toy, no substitute.
In shapes: (seed, split, index) -> Scene -> one picture, bytes [size, size, 3], and one caption.
HELD_OUT is a colour for each kind that no training picture or caption joins to it; the test split has both.
Left out: sampling and batches (data.py), views (augment.py), prompts (tasks.py).
"""

import argparse
import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# What captions tell, as shares of all captions: so 75% name the kind and 65% the colour.
TELLS = {"kind and colour": 0.55, "kind": 0.20, "colour": 0.10, "place": 0.04, "nothing": 0.11}
WRONG = 0.06  # share of all captions that name another kind or another colour
TELLS_TEXTURE, TELLS_SIZE, TELLS_PLACE = 0.10, 0.15, 0.25  # among captions that say something
HASHTAGS = 0.10  # of these, written "#red #boat"
SCALES = {"small": (0.62, 0.70), "large": (0.78, 0.86)}  # side of the thing, as a share of the picture
# The thing moves and tilts so far that its place betrays little: a linear classifier of the pixels gets 59%
# of the kinds right, a ViT (width 128, depth 4, patch 8) with labels 91 and 92% in 500 steps (two seeds).
SHIFT, TILT = 0.08, 8  # at most: of the centre, as a share of the picture; in degrees
HELD_OUT_SHARE = 1 / 6  # of the test split

# Attribute -> the words for it, the usual one first.
KINDS = {
    "house": ("house", "cottage", "cabin", "hut"),
    "tree": ("tree", "oak", "maple"),
    "boat": ("boat", "sailboat", "yacht", "dinghy"),
    "fish": ("fish", "carp", "perch"),
    "car": ("car", "auto", "automobile", "hatchback"),
    "mushroom": ("mushroom", "toadstool", "fungus"),
    "cup": ("cup", "mug", "teacup"),
    "flower": ("flower", "blossom", "bloom"),
    "umbrella": ("umbrella", "parasol", "brolly"),
    "balloon": ("balloon", "hot-air balloon"),
    "rocket": ("rocket", "spaceship", "spacecraft"),
    "butterfly": ("butterfly", "moth", "swallowtail"),
}
COLOURS = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange", "tangerine", "amber"),
    "yellow": ("yellow", "golden", "lemon"),
    "green": ("green", "emerald", "lime"),
    "blue": ("blue", "azure", "cobalt"),
    "purple": ("purple", "violet", "lilac"),
    "pink": ("pink", "rosy", "blush"),
    "white": ("white", "snowy", "ivory"),
}
TEXTURES = {
    "plain": ("plain", "unpatterned"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted", "polka-dot"),
    "checked": ("checked", "chequered", "tartan"),
}
BACKGROUNDS = {
    "night": ("at night", "after dark", "under the stars"),
    "sea": ("by the sea", "at the seaside", "near the ocean"),
    "meadow": ("in the meadow", "on the grass", "in the park"),
    "room": ("indoors", "in the kitchen", "in my room"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("big", "large", "huge")}
HELD_OUT = {
    "house": "purple",
    "tree": "blue",
    "boat": "orange",
    "fish": "green",
    "car": "pink",
    "mushroom": "yellow",
    "cup": "red",
    "flower": "white",
    "umbrella": "green",
    "balloon": "purple",
    "rocket": "yellow",
    "butterfly": "red",
}
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
PAINTS = {
    "red": (214, 40, 40),
    "orange": (242, 132, 30),
    "yellow": (246, 214, 56),
    "green": (66, 172, 72),
    "blue": (56, 112, 226),
    "purple": (136, 66, 186),
    "pink": (246, 146, 190),
    "white": (238, 238, 232),
}
ACCENTS = {
    "ink": (26, 24, 30),
    "brown": (124, 84, 52),
    "cream": (232, 222, 196),
    "grey": (146, 148, 152),
    "glass": (156, 184, 194),
    "stem": (70, 108, 52),
}
# Bands of a background from the top down: start, colour there, colour at the end, end.
BANDS = {
    "night": ((0.0, (14, 15, 30), (40, 40, 62), 1.0),),
    "sea": ((0.0, (78, 86, 94), (98, 104, 106), 0.52), (0.52, (44, 70, 80), (28, 50, 60), 1.0)),
    "meadow": ((0.0, (44, 52, 62), (72, 74, 76), 0.64), (0.64, (54, 66, 44), (34, 44, 30), 1.0)),
    "room": ((0.0, (96, 86, 78), (84, 76, 70), 0.76), (0.76, (60, 50, 44), (50, 42, 38), 1.0)),
}
# A thing is a row of strokes, back to front, in a square of 100 by 100 with y down: paint, form, numbers.
# Paints: "body" is the colour with its texture, "shade" is darker, "hole" the background; else ACCENTS.
# Forms: poly, x y of corners; oval, left top right bottom; dome, its upper half; line, width, x y of points.
THINGS = {
    "house": (
        "grey poly 70 6 84 6 84 40 70 40 | body poly 12 44 88 44 88 98 12 98 | "
        "shade poly 0 50 50 2 100 50 | brown poly 40 62 60 62 60 98 40 98 | "
        "cream poly 18 58 34 58 34 76 18 76 | cream poly 66 58 82 58 82 76 66 76 | cream oval 42 22 58 38"
    ),
    "tree": (
        "brown poly 42 50 58 50 60 84 74 100 26 100 40 84 | body oval 0 26 50 70 | "
        "body oval 50 26 100 70 | body oval 20 0 80 64 | brown line 7 50 90 50 56 30 40 | "
        "brown line 7 50 64 68 44"
    ),
    "boat": (
        "brown line 4 52 2 52 74 | body poly 56 4 96 64 56 64 | cream poly 48 12 48 64 10 64 | "
        "body poly 0 70 100 70 82 98 18 98 | shade line 5 3 73 97 73"
    ),
    "fish": (
        "shade poly 28 32 50 4 68 30 | shade poly 32 70 44 94 60 70 | "
        "body poly 64 50 100 14 90 50 100 86 | body oval 0 20 80 80 | "
        "cream poly 10 66 40 70 66 64 54 76 40 80 24 77 | shade line 6 40 28 48 50 40 72 | "
        "cream oval 8 30 34 56 | ink oval 14 36 28 50"
    ),
    "car": (
        "body poly 20 50 34 18 70 18 86 50 | glass poly 29 48 38 25 50 25 50 48 | "
        "glass poly 55 48 55 25 67 25 78 48 | body poly 0 54 8 48 92 48 100 54 100 78 0 78 | "
        "cream oval 0 54 12 66 | ink oval 10 62 40 92 | ink oval 60 62 90 92 | grey oval 18 70 32 84 | "
        "grey oval 68 70 82 84"
    ),
    "mushroom": ("cream poly 37 52 63 52 70 98 30 98 | shade oval 0 42 100 66 | body dome 0 2 100 106"),
    "cup": (
        "grey oval 0 84 84 100 | shade oval 60 36 100 80 | hole oval 68 45 90 71 | "
        "body poly 6 32 78 32 72 78 60 94 24 94 12 78 | cream oval 6 23 78 41 | brown oval 12 27 72 39 | "
        "cream line 5 30 20 36 12 30 2 | cream line 5 52 20 58 12 52 2"
    ),
    "flower": (
        "stem line 7 50 50 50 100 | stem poly 50 94 58 74 88 64 78 86 | "
        "stem poly 50 98 42 80 12 70 22 92 | body oval 35 0 65 32 | body oval 35 40 65 72 | "
        "body oval 8 8 42 38 | body oval 58 8 92 38 | body oval 8 34 42 64 | body oval 58 34 92 64 | "
        "brown oval 35 21 65 51"
    ),
    "umbrella": (
        "grey line 8 50 0 50 86 54 96 66 96 70 84 | body dome 0 6 100 110 | hole oval 0 50 34 68 | "
        "hole oval 34 50 66 68 | hole oval 66 50 100 68 | shade line 4 50 8 34 30 33 56 | "
        "shade line 4 50 8 66 30 67 56 | grey line 8 50 56 50 80"
    ),
    "balloon": (
        "cream line 4 32 56 41 84 | cream line 4 68 56 59 84 | body poly 16 50 84 50 62 74 38 74 | "
        "body oval 10 0 90 68 | cream oval 37 0 63 75 | brown poly 36 82 64 82 61 100 39 100"
    ),
    "rocket": (
        "cream poly 38 78 62 78 50 100 | shade poly 34 46 8 74 8 94 36 78 | "
        "shade poly 66 46 92 74 92 94 64 78 | "
        "body poly 50 0 63 16 71 36 71 60 66 82 34 82 29 60 29 36 37 16 | grey oval 36 28 64 56 | "
        "glass oval 41 33 59 51"
    ),
    "butterfly": (
        "cream line 4 50 30 34 4 | cream line 4 50 30 66 4 | body poly 48 50 0 12 4 48 20 58 | "
        "body poly 52 50 100 12 96 48 80 58 | body oval 12 46 48 94 | body oval 52 46 88 94 | "
        "cream oval 10 26 24 40 | cream oval 76 26 90 40 | cream oval 22 68 36 82 | "
        "cream oval 64 68 78 82 | ink oval 44 20 56 88"
    ),
}


@dataclass(frozen=True)
class Scene:
    kind: str
    colour: str
    texture: str
    size: str
    background: str
    rgb: tuple  # the colour as painted, jittered
    scale: float  # side of the thing, as a share of the picture
    shift_x: float  # of its centre from the middle, as a share of the picture
    shift_y: float
    tilt: float  # degrees
    mirrored: bool
    specks: tuple  # faint clutter: (x, y, radius) as shares of the picture


def scene(rng, split):
    """One scene; `rng` is a random.Random. Pairs of HELD_OUT come in the test split only."""
    kind = rng.choice(list(KINDS))
    colour = rng.choice([c for c in COLOURS if c != HELD_OUT[kind]])
    if split == "test" and rng.random() < HELD_OUT_SHARE:
        colour = HELD_OUT[kind]
    size = rng.choice(list(SIZES))
    light = rng.uniform(0.86, 1.04)
    return Scene(
        kind,
        colour,
        texture=rng.choice(list(TEXTURES)),
        size=size,
        background=rng.choice(list(BACKGROUNDS)),
        rgb=tuple(min(255, max(0, round(light * c) + rng.randint(-12, 12))) for c in PAINTS[colour]),
        scale=rng.uniform(*SCALES[size]),
        shift_x=rng.uniform(-SHIFT, SHIFT),
        shift_y=rng.uniform(-SHIFT, SHIFT),
        tilt=rng.uniform(-TILT, TILT),
        mirrored=rng.random() < 0.5,
        specks=tuple((rng.random(), rng.random(), rng.uniform(0.01, 0.04)) for _ in range(rng.randint(3, 8))),
    )


def draw(scene, size=32):
    """Scene -> RGB picture, painted four times as large in whole pixels, then averaged.

    The same bytes on every machine; another version of Pillow moves the edges in 0.05% of the pixels.
    """
    side = 4 * size
    picture = _backdrop(scene.background, side).copy()
    brush = ImageDraw.Draw(picture)
    for x, y, r in scene.specks:
        faint = tuple(c + 26 for c in picture.getpixel((int(x * side), int(y * side))))
        brush.ellipse([round(side * v) for v in (x - r, y - r, x + r, y + r)], fill=faint)
    dark = tuple(round(0.62 * c) for c in scene.rgb)
    flat = ACCENTS | {"shade": dark}
    cloth = {"body": _cloth(scene, side, dark), "hole": picture.copy()}
    unit, angle = side * scene.scale / 100, math.radians(scene.tilt)
    cos, sin = unit * math.cos(angle), unit * math.sin(angle)
    left, top = side * (0.5 + scene.shift_x), side * (0.5 + scene.shift_y)
    for paint, width, outline in _strokes(scene.kind):
        points = [(round(left + cos * x - sin * y), round(top + sin * x + cos * y)) for x, y in outline]
        if paint in flat:
            _stroke(brush, points, unit * width, flat[paint])
        else:
            mask = Image.new("L", (side, side))
            _stroke(ImageDraw.Draw(mask), points, unit * width, 255)
            picture.paste(cloth[paint], mask=mask)
    picture = picture.reduce(4)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if scene.mirrored else picture


@functools.cache
def _strokes(kind):
    """THINGS[kind] -> [(paint, width of the line or 0, [(x, y), ...] around the middle of the thing)]."""
    strokes = []
    for stroke in THINGS[kind].split(" | "):
        paint, form, *numbers = stroke.split()
        numbers = [int(n) for n in numbers]
        width = numbers.pop(0) if form == "line" else 0
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        if form in ("oval", "dome"):
            (x0, y0), (x1, y1) = points
            turns = [math.pi * (1 + i / 16) for i in range(32 if form == "oval" else 17)]
            circle = [(0.5 + math.cos(a) / 2, 0.5 + math.sin(a) / 2) for a in turns]
            points = [(x0 + (x1 - x0) * x, y0 + (y1 - y0) * y) for x, y in circle]
        strokes.append((paint, width, [(x - 50, y - 50) for x, y in points]))
    return strokes


def _stroke(brush, points, width, fill):
    if width:
        brush.line(points, fill=fill, width=round(width), joint="curve")
    else:
        brush.polygon(points, fill=fill)


@functools.cache
def _backdrop(background, side):
    picture = Image.new("RGB", (side, side))
    brush = ImageDraw.Draw(picture)
    for start, above, below, end in BANDS[background]:
        first, last = round(start * side), round(end * side)
        for y in range(first, last):
            mix = (y - first) / (last - first)
            colour = tuple(round(a + mix * (b - a)) for a, b in zip(above, below, strict=True))
            brush.line((0, y, side, y), fill=colour)
    return picture


def _cloth(scene, side, dark):
    """A canvas full of the texture, moved with the thing."""
    cloth = Image.new("RGB", (side, side), scene.rgb)
    x, y = (round(side * (shift - 0.25)) for shift in (scene.shift_x, scene.shift_y))
    cloth.paste(dark, (x, y), mask=_pattern(scene.texture, side))
    return cloth


@functools.cache
def _pattern(texture, side):
    """The dark parts of a texture, half as large again as the canvas: there is a quarter to move it by."""
    pattern = Image.new("L", (side * 3 // 2, side * 3 // 2))
    brush = ImageDraw.Draw(pattern)
    step = side // 8
    for row in range(14):
        y = row * step
        if texture == "striped":
            brush.rectangle((0, y, pattern.width, y + step // 2), fill=255)
        for x in range(0, pattern.width, step):
            if texture == "dotted":
                left = x + step // 2 * (row % 2)
                brush.ellipse((left, y, left + step * 5 // 9, y + step * 5 // 9), fill=255)
            elif texture == "checked" and (row + x // step) % 2:
                brush.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    return pattern


def caption(rng, scene):
    """What somebody might write under the picture: part of it, in words of their own, at times wrong."""
    tells = rng.choices(list(TELLS), TELLS.values())[0]
    if tells == "nothing":
        return rng.choice(NOTHING)
    kind, colour = scene.kind, scene.colour
    names_kind, names_colour = "kind" in tells, "colour" in tells
    if tells != "place" and rng.random() < WRONG / (1 - TELLS["place"] - TELLS["nothing"]):
        others = [(k, colour) for k in KINDS if names_kind and k != kind]
        others += [(kind, c) for c in COLOURS if names_colour and c != colour]
        kind, colour = rng.choice([(k, c) for k, c in others if HELD_OUT[k] != c])
    words = []
    if rng.random() < TELLS_SIZE:
        words.append(_word(rng, SIZES[scene.size]))
    if rng.random() < TELLS_TEXTURE:
        words.append(_word(rng, TEXTURES[scene.texture]))
    if names_colour:
        words.append(_word(rng, COLOURS[colour]))
    words.append(_word(rng, KINDS[kind]) if names_kind else rng.choice(UNNAMED))
    tells_place = tells == "place" or rng.random() < TELLS_PLACE
    place = [rng.choice(BACKGROUNDS[scene.background])] if tells_place else []
    if rng.random() < HASHTAGS:
        return " ".join("#" + word.replace(" ", "-") for word in words + place)
    it = " ".join(words)
    a = f"{'an' if it[0] in 'aeiou' else 'a'} {it}"
    return " ".join([rng.choice(FRAMES).format(it=it, a=a), *place])


def _word(rng, words):
    return words[0] if rng.random() < 0.75 else rng.choice(words)


def build(split, count, seed=0, size=32):
    """`count` pictures of a split with captions and labels; picture i depends on (seed, split, i) alone."""
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: expected 'train' or 'test'")
    scenes, images, captions = [], np.empty((count, size, size, 3), np.uint8), []
    for i in range(count):
        rng = random.Random(f"{seed} {split} {i}")  # a string is hashed by SHA-512: the same everywhere
        scenes.append(scene(rng, split))
        images[i] = draw(scenes[i], size)
        captions.append(caption(rng, scenes[i]))
    labels = {k: np.array([v.index(getattr(s, k)) for s in scenes], np.int64) for k, v in NAMES.items()}
    held_out = np.array([HELD_OUT[s.kind] == s.colour for s in scenes], bool)
    return {"images": images, "captions": captions, **labels, "held_out": held_out}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Save a sheet of pictures and print their captions.")
    parser.add_argument("--out", default="scenes.png")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=32, help="side of the pictures as drawn; shown at 96")
    args = parser.parse_args(argv)
    rows, columns, tile = 3, 8, 96
    data = build("train", rows * columns, args.seed, args.size)
    sheet = Image.new("RGB", (columns * (tile + 4), rows * (tile + 4)), "white")
    for i, pixels in enumerate(data["images"]):
        y, x = divmod(i, columns)
        picture = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST)
        sheet.paste(picture, (x * (tile + 4), y * (tile + 4)))
        print(f"{y + 1}.{x + 1}  {data['captions'][i]}")
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as error:  # no such directory, or an ending that names no picture format
        parser.error(f"--out {args.out}: {error}")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
