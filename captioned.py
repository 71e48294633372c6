"""Captioned sets: images with sentences, from a table, a folder, tar shards or COCO.

Paper: the pre-training data (YFCC15M, CC3M, CC12M) in "implementation details". Where an image has several
captions one is drawn at each visit (data.Views); YFCC15M's are the title and the description.

    pairs.tsv, .csv, .jsonl; a folder of x.jpg, x.txt; {00000..00331}.tar; COCO -> rows (path, captions)
    rows -> Pairs;  Pairs[i] -> (PIL RGB image, [captions]); the image is opened when it is asked for

Not here: what is in a shard (shards.py), labelled sets (sets.py), drawing one caption and cropping (data.py).
"""

import csv
import functools
import json
import os
import re
import warnings
from array import array
from pathlib import Path

import numpy as np

from images import Source, is_image, read_image
from shards import PACKED, codec, decode, image_file, open_shard, shard_rows

PATH_COLUMNS = "path filepath file_path image_path filename file_name image_name file image".split()
CAPTION_COLUMNS = "caption captions title description text sentence raw_caption comment".split()
TABLES = (".tsv", ".csv", ".jsonl")
NAMES = ("cc3m", "cc12m", "redcaps", "yfcc15m", "sbu", "flickr8k", "flickr30k", "coco")
LINKS = (
    "these are links, not images: fetch them first, for example with img2dataset --output_format webdataset, "
    "then type --data 'FOLDER/*.tar' (shards of KEY.jpg with KEY.txt) or a table of path and caption"
)
QUOTED = re.compile('"([^"]|"")*"')  # a cell in quotes, those inside doubled


def open_captioned(name, root, split):
    """The Source of a captioned set, or None if `name` is none: a folder (under `root` or by its path) that
    holds <name>.tsv (.csv, .jsonl), *.tar, or x.jpg with x.txt; or the path of a table or of shards.

    Split "test": <name>-test.tsv or COCO's val2017. ValueError or FileNotFoundError with one sentence.
    """
    open_shard.cache_clear()  # another file may have this name by now
    folder = next((place for place in (Path(root, name), Path(name)) if place.is_dir()), Path(root, name))
    stems = [f"{folder.name}-test", folder.name] if split == "test" else [folder.name]
    tables = [folder / f"{stem}{suffix}" for stem in stems for suffix in TABLES]
    table = next((path for path in tables if path.is_file()), Path(name))
    images, has_split = table.parent, split == "train" or table.stem == f"{folder.name}-test"
    if name == "coco":
        images, has_split = folder / ("train2017" if split == "train" else "val2017"), True
        rows, place = coco_rows, folder / "annotations" / f"captions_{images.name}.json"
    elif table.name.lower().endswith((*TABLES, ".txt")):  # Kaggle names the table of Flickr8k captions.txt
        rows, place = table_rows, table
    elif name.endswith(".tar") or any(folder.glob("[!.]*.tar")):
        images, rows, place = "", shard_rows, name if name.endswith(".tar") else str(folder / "*.tar")
    elif any(folder_rows(folder)):
        images, rows, place = folder, folder_rows, folder
    elif name in NAMES:
        wanted = (
            f"{folder / name}.tsv of path and caption, or shards {folder / '*.tar'} of KEY.jpg and KEY.txt"
        )
        raise FileNotFoundError(f"no {name} for {split}: expected {wanted}")
    else:
        return None
    if not has_split:
        line = f"python zeroshot.py --retrieval --data '{name}' --split val"
        raise FileNotFoundError(f"{name} has one split; for the part that training holds out type {line}")
    return Source(name, Pairs(place, images, rows(place)))


class Pairs:
    """Images with their captions from `rows` of (path, captions), paths relative to `folder`; equal paths are
    one image. They end as a few arrays, which forked workers share; a spawned worker gets a copy.

    Row r is the bytes ends[r] to ends[r + 1], path and captions with zero bytes between. Image i, in the
    order of first appearance, has the rows order[starts[i] : starts[i + 1]]. Errors name a row, a head is 1.
    """

    def __init__(self, name, folder, rows):
        self.folder, self.content, self.ends = str(folder), bytearray(), array("q", [0])
        number, hashes = 1, array("q")
        try:
            for row in rows:  # None for a head and for blank lines
                if row is not None:
                    self.content += pack(*row)
                    self.ends.append(len(self.content))
                    hashes.append(hash(row[0]))
                number += 1
        except (ValueError, csv.Error) as error:
            advice = (
                ", and a quote inside a cell in quotes is doubled" if isinstance(error, csv.Error) else ""
            )
            raise ValueError(f"{name}, row {number}: {error}{advice}") from None
        if not hashes:
            raise ValueError(f"{name} holds no images with captions")
        _, first, rows = np.unique(np.frombuffer(hashes, np.int64), return_index=True, return_inverse=True)
        first = first[rows]  # for each row, the first row with its path; 64-bit hashes tell paths apart
        self.order = np.argsort(first, kind="stable")
        self.starts = np.append(np.flatnonzero(np.diff(first[self.order], prepend=-1)), len(first))
        sample = [self.where(i) for i in np.linspace(0, len(self) - 1, 20).astype(int)]
        if any("://" in path for path in sample):
            raise ValueError(f"{name}: {LINKS}")
        if not any(os.path.isfile(PACKED.sub(r"\1", path)) for path in sample):
            raise FileNotFoundError(f"{name}: no image {sample[0]}: paths are relative to the table's folder")

    def __len__(self):
        return len(self.starts) - 1

    def row(self, number):
        return self.content[self.ends[number] : self.ends[number + 1]].decode().split("\0")

    def label(self, index):
        rows = self.order[self.starts[index] : self.starts[index + 1]].tolist()
        return [caption for number in rows for caption in self.row(number)[1:]]

    def where(self, index):
        path = os.path.join(self.folder, self.row(self.order[self.starts[index]])[0])
        return path.replace("\\", "/") if "\\" in path and not os.path.exists(path) else path

    def __getitem__(self, index):
        return read_image(image_file(self.where(index))), self.label(index)


def pack(path, captions):
    """-> bytes: the path and the captions that are not empty, or one empty one. ValueError: no text."""
    try:
        texts = [text for text in map(str.strip, captions) if text]
        return "\0".join((path or None, *(texts or [""]))).encode()
    except TypeError:
        raise ValueError(f"expected a path and captions, found {path!r:.80} and {captions!r:.80}") from None
    except UnicodeEncodeError:  # bytes that could not be decoded
        raise ValueError(f"{path!r}, {captions!r:.80}: not UTF-8 (but cp1252?), save it as UTF-8") from None


@functools.lru_cache
def find_columns(names):
    """Column names -> (place of the path, places of the captions)."""
    lower = [name.strip().lower() for name in names]
    paths = [lower.index(name) for name in PATH_COLUMNS if name in lower]
    captions = [i for i, name in enumerate(lower) if name in CAPTION_COLUMNS]
    if not paths and any("url" in name or "://" in name for name in lower):
        raise ValueError(LINKS)
    if not paths or not captions:
        what, wanted = ("caption", CAPTION_COLUMNS) if paths else ("path", PATH_COLUMNS)
        found = ", ".join(map(repr, names))[:200]
        raise ValueError(f"no column for the {what}, found {found}: name one {' or '.join(wanted[:4])}")
    return paths[0], captions


def table_rows(path):
    """Rows of a .tsv, .csv or .jsonl file, None for a head and for blank lines."""
    if not path.is_file():
        raise FileNotFoundError(f"no table at {path}: expected a {', '.join(TABLES)} of path and caption")
    with open(path, "rb") as file:
        encoding = codec(file.read(2))
    with open(path, encoding=encoding, errors="surrogateescape", newline="") as file:
        yield from map(json_row, file) if path.suffix.lower() == ".jsonl" else cell_rows(file)


def json_row(line):
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with path and caption, found {line.strip()!r:.60}")
    (path, captions), values = find_columns(tuple(row)), list(row.values())
    cells = [values[i] if isinstance(values[i], list) else [values[i]] for i in captions]
    return values[path], [text for cell in cells for text in cell if text is not None]


def cell_rows(file):
    """The first line shows the separator and names the columns, or is itself a path and a caption. In CSV a
    quote opens a cell only at its start; with tabs a row is a line.
    """
    line = file.readline()
    file.seek(0)
    separator = "\t" if "\t" in line else min(",;|", key=lambda s: line.find(s) if s in line else len(line))
    tabs, names, lines = separator == "\t", None, 0
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(file, delimiter=separator, quoting=quoting, strict=True)
    for row in reader:
        several, lines = reader.line_num > lines + 1, reader.line_num
        if tabs and '"' in "".join(row):
            row = [cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell for cell in row]
        if row and names is None:
            headless = len(row) == 2 and is_image(row[0]) and "://" not in row[0]
            names, row = (("path", "caption"), row) if headless else (tuple(row), [])
            path, captions = find_columns(names)
        if row and len(row) != len(names):
            why = ": a tab or line break in a cell wants CSV" if tabs else ""
            raise ValueError(f"found {len(row)} columns, expected {len(names)}{why}")
        if several and count_images(row, separator) > 1:
            raise ValueError("a cell holds other rows: the quote at its start is closed too late or never")
        yield (row[path].strip(), [row[i] for i in captions]) if row else None


def count_images(row, separator):
    """How many cells of a row of several lines would be images, if its lines were rows."""
    lines = [line.split(separator) for line in separator.join(row).split("\n")]
    return sum(is_image(cell.strip()) for cells in lines if len(cells) > 1 for cell in cells)


def coco_rows(path):
    """Rows of annotations/captions_{train,val}2017.json: five an image."""
    if not path.is_file():
        raise FileNotFoundError(f"no captions at {path}: unpack COCO's annotations_trainval2017.zip in coco/")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in table["images"]}
        return [(names[note["image_id"]], [note["caption"]]) for note in table["annotations"]]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is not like COCO's: {error!r:.100}") from None


def folder_rows(folder):
    """(x.jpg, lines of x.txt) of a folder and those in it, links included; warns of what is passed over."""
    passed, taken, seen = [], 0, set()
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(base) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(os.path.realpath(base))
        stems = {name: os.path.splitext(name)[0] for name in sorted(files) if not name.startswith(".")}
        texts = {stem: Path(base, name) for name, stem in stems.items() if name.lower().endswith(".txt")}
        images = {name: stem for name, stem in stems.items() if is_image(name) and stem in texts}
        for name, stem in images.items():
            lines = decode(texts[stem].read_bytes()).split("\n")
            yield os.path.relpath(os.path.join(base, name), folder), lines
        taken += len(images)
        used = set(images.values())
        passed += [name for name, stem in stems.items() if stem not in used and name != "Thumbs.db"]
    if passed and taken:
        words = f"{len(passed)} files, as {passed[0]}, which are no image with its text"
        warnings.warn(f"{folder}: passed over {words}", stacklevel=2)
