"""Captioned sets: pictures with sentences, from a table, a folder, tar shards or a known set's layout.

Paper: section 4 (YFCC15M, CC3M, CC12M). Where a picture has several captions one is drawn at each visit
(data.Views); YFCC15M's are the title and the description.

    pairs.tsv, .csv, .jsonl -> Table      00000.tar, 00001.tar, ... -> Shards      x.jpg + x.txt -> Beside
    item i of each -> (PIL picture, caption or list of captions), read when it is asked for

A table stays in its file, mapped; only the places of its lines are in memory: 8 bytes a row, which forked
workers share. Not here: labelled sets (sets.py), drawing and cropping (data.py).
"""

import csv
import functools
import io
import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import torchvision
from torch.utils.data import Dataset

from data import SUFFIXES, Files, Source, Strings, read_picture

PATH_COLUMNS = ("path", "filepath", "file_path", "image_path", "filename", "file_name", "file", "image")
CAPTION_COLUMNS = ("caption", "captions", "title", "description", "text", "sentence", "raw_caption")
TABLES, SPLITS = (".tsv", ".csv", ".jsonl"), {"train": ("train",), "test": ("test", "val")}
PIECE = 1 << 24  # bytes of a table that are looked at together
LAYOUTS = ("cc3m", "cc12m", "redcaps", "yfcc15m")  # <root>/<name>/<name>.tsv, or shards in <root>/<name>/
NAMES = (*LAYOUTS, "coco", "flickr8k", "flickr30k", "sbu")


def open_captioned(name, root, split):
    """The Source of a captioned set, or None if `name` is none: see NAMES, or a table, a folder, shards.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    if name == "coco":
        return Source(name, open_coco(Path(root) / "coco", split))
    if name in NAMES and split == "test" and name not in LAYOUTS:
        raise FileNotFoundError(f"{name} has no test split of its own here")
    if name in LAYOUTS:
        return open_layout(name, Path(root) / name, split)
    if name in NAMES:
        return Source(name, open_library(name, Path(root) / name))
    if name.endswith((*TABLES, ".tar")) and split == "test":
        raise FileNotFoundError(f"{name} is one split, for training")
    if name.endswith(TABLES):
        return Source(name, Table(name))
    if name.endswith(".tar"):
        return Source(name, Shards(expand(name)))
    for folder in (Path(root) / name, Path(name)):
        if folder.is_dir() and any(folder.rglob("*.txt")) and not (folder / "train").is_dir():
            if split == "test":
                raise FileNotFoundError(f"{name} is one split, for training")
            return Source(name, Beside(folder))
    return None


# A table: path and caption in each row


@functools.lru_cache(maxsize=8)
def mapped(path):
    return np.memmap(path, np.uint8, mode="r")


def line_ends(path, quoted):
    """Where each row of a file ends, int64 [n]; with `quoted` a break between quotes belongs to its row."""
    size, ends, odd = os.path.getsize(path), [], 0
    for start in range(0, size, PIECE):  # read, not mapped: pages that were looked at once need not stay
        part = np.fromfile(path, np.uint8, PIECE, offset=start)
        breaks = np.flatnonzero(part == 10)
        if quoted:
            quotes = np.flatnonzero(part == 34)
            inside = (np.searchsorted(quotes, breaks) + odd) % 2
            breaks, odd = breaks[inside == 0], (odd + len(quotes)) % 2
        ends.append(breaks + start)
    if part[-1] != 10:
        ends.append([size])
    return np.concatenate(ends).astype(np.int64)


class Table(Dataset):
    """A .tsv, .csv or .jsonl file with a picture's path and its caption or captions in each row.

    Separator and columns are found by looking at the first line: it names them, or, in a file of two
    columns, is itself a path and a caption. Paths are relative to the table's folder. A JSON line holds the
    same names; its caption may be a list.
    """

    def __init__(self, path):
        self.path = str(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no table at {path}: expected a {', '.join(TABLES)} of path and caption")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty: expected a path and a caption in each row")
        self.json, self.separator = self.path.endswith(".jsonl"), None
        first = mapped(self.path)[: 1 << 20].tobytes().split(b"\n")[0].decode("utf-8-sig", "replace")
        if not self.json:
            self.separator = "\t" if "\t" in first or self.path.endswith(".tsv") else ","
        self.ends = line_ends(self.path, quoted=self.separator == ",")
        self.first = 0  # rows before the first picture: a head or none
        self.find_columns(first)
        self.check_rows()

    def find_columns(self, first):
        if self.json:
            row = self.parse(0)
            names = list(row) if isinstance(row, dict) else []
        else:
            row = self.parse(0)
            names = [cell.strip().lower().lstrip("\ufeff") for cell in row]
            if len(row) == 2 and row[0].lower().endswith(SUFFIXES):
                self.path_column, self.caption_columns = 0, [1]
                return
            self.first = 1
        paths = [n for n in PATH_COLUMNS if n in names]
        captions = [n for n in names if n in CAPTION_COLUMNS]
        if not paths or not captions:
            what = "path" if not paths else "caption"
            wanted = PATH_COLUMNS if not paths else CAPTION_COLUMNS
            raise ValueError(
                f"{self.path}, line 1: no column for the {what}, found "
                f"{', '.join(map(repr, names)) or repr(first[:60])}: name one {' or '.join(wanted[:4])}"
            )
        self.path_column, self.caption_columns = paths[0], captions
        if not self.json:
            self.path_column = names.index(paths[0])
            self.caption_columns = [names.index(n) for n in captions]
            self.columns = len(names)

    def check_rows(self):
        """Rows of the wrong width, and paths that lead nowhere, before anything is trained on."""
        if len(self) == 0:
            raise ValueError(f"{self.path} has a head and no rows")
        looked = sorted({0, 1, 2, len(self) // 2, len(self) - 1} & set(range(len(self))))
        missing = [p for p in (self.row(i)[0] for i in looked) if not os.path.exists(p)]
        if len(missing) == len(looked):
            raise FileNotFoundError(
                f"{self.path}, line {self.first + 1}: no picture at {missing[0]}: "
                "paths are relative to the table's folder"
            )
        if self.separator == "\t":
            self.check_width()

    def check_width(self):
        """Every line must have as many tabs as the first: counted, not parsed."""
        begin, expected = 0, None
        for rows in np.array_split(self.ends, -(-os.path.getsize(self.path) // PIECE)):
            part = np.fromfile(self.path, np.uint8, rows[-1] - begin, offset=begin)
            tabs = np.flatnonzero(part == 9) + begin
            counts = np.diff(np.searchsorted(tabs, rows), prepend=0)
            expected = counts[0] if expected is None else expected
            wrong = np.flatnonzero(counts != expected)
            if len(wrong):
                line = int(np.searchsorted(self.ends, rows[wrong[0]])) + 1
                raise ValueError(
                    f"{self.path}, line {line}: found {counts[wrong[0]] + 1} columns, expected {expected + 1}"
                )
            begin = rows[-1]

    def __len__(self):
        return len(self.ends) - self.first

    def parse(self, line):
        """Line `line` of the file (from 0) as a list of cells or a JSON object."""
        start = int(self.ends[line - 1]) + 1 if line else 0
        text = mapped(self.path)[start : int(self.ends[line])].tobytes().decode("utf-8", "replace")
        text = text.removesuffix("\r").removeprefix("\ufeff")
        if self.separator == ",":
            return next(csv.reader(io.StringIO(text, newline="")), [])
        if self.separator:
            return text.split("\t")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}, line {line + 1}: not JSON ({error.msg})") from None

    def row(self, index):
        """-> (path, [captions])."""
        row, line = self.parse(self.first + index), self.first + index + 1
        try:
            path, captions = row[self.path_column], [row[c] for c in self.caption_columns]
        except (IndexError, KeyError, TypeError) as error:
            found = list(row) if isinstance(row, dict) else len(row) if isinstance(row, list) else row
            raise ValueError(f"{self.path}, line {line}: lacks a column ({error}), found {found}") from None
        captions = [c for entry in captions for c in (entry if isinstance(entry, list) else [entry])]
        captions = [c for c in captions if isinstance(c, str) and c.strip()] or [""]
        if not isinstance(path, str):
            raise ValueError(f"{self.path}, line {line}: the path is {path!r}, expected a string")
        return os.path.join(os.path.dirname(self.path), path), captions

    def __getitem__(self, index):
        path, captions = self.row(index)
        return read_picture(path), captions

    def label(self, index):
        return self.row(index)[1]

    def where(self, index):
        return f"{self.path} line {self.first + index + 1}"


# Shards: tar files of key.jpg and key.txt (or the caption in key.json), as img2dataset writes them


def expand(pattern):
    """dir/{00000..00331}.tar, dir/*.tar or one name -> the paths, all of which exist."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found:
        low, high = found.groups()
        paths = [
            pattern.replace(found.group(), f"{n:0{len(low)}}", 1) for n in range(int(low), int(high) + 1)
        ]
    elif "*" in pattern:
        paths = sorted(map(str, Path(pattern).parent.glob(Path(pattern).name)))
    else:
        paths = [pattern]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise FileNotFoundError(
            f"no shard {missing[0]} ({len(missing)} of {len(paths)} missing): check {pattern}"
            if missing
            else f"no shard fits {pattern}"
        )
    return paths


class Shards(Dataset):
    """Tar files as a list: where each picture and its caption begin is noted once, when the set is opened;
    an item is then two reads from a file that stays packed.

    So shards are shuffled, resumed, and shared by ranks and workers as every other set, and train exactly
    as the same pictures in a table do. A stream of shards for each worker, as webdataset gives, reads a
    network disk in longer pieces, but its order depends on the workers.
    """

    def __init__(self, paths):
        self.paths = paths
        keys, places, captions = [], [], 0
        for shard, path in enumerate(paths):
            before = len(places)
            for key, parts in members(path).items():
                if "picture" in parts:
                    text, kind = parts.get("txt"), 0
                    if text is None and "json" in parts:
                        text, kind = parts["json"], 1
                    captions += text is not None
                    places.append((shard, kind, *parts["picture"], *(text or (0, -1))))
                    keys.append(key)
            if len(places) == before:
                raise ValueError(f"{path} holds no pictures: expected KEY.jpg with KEY.txt or KEY.json each")
        if not captions:
            raise ValueError(f"{paths[0]}: no picture has a caption: expected KEY.txt or KEY.json each")
        self.keys, self.places = Strings(keys), np.array(places, np.int64)  # shard, kind, 2 x (begin, size)

    def __len__(self):
        return len(self.places)

    def read(self, shard, begin, size):
        return os.pread(opened(self.paths[shard]), size, begin)

    def __getitem__(self, index):
        shard, _, begin, size = self.places[index][:4]
        return read_picture(io.BytesIO(self.read(shard, int(begin), int(size)))), self.label(index)

    def label(self, index):
        shard, kind, _, _, begin, size = map(int, self.places[index])
        if size < 0:
            return ""
        text = self.read(shard, begin, size).decode("utf-8", "replace")
        return (json.loads(text).get("caption") or "") if kind else text.strip()

    def where(self, index):
        return f"{self.paths[int(self.places[index][0])]} {self.keys[index]}"


@functools.lru_cache(maxsize=512)
def opened(path):
    """A file descriptor that is read by offset, so that forked workers may share it."""
    return os.open(path, os.O_RDONLY)


def members(path):
    """A tar's files -> {key: {"picture" or suffix: (begin, size)}}, in their order."""
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                base, _, suffix = member.name.rpartition(".")
                if member.isfile() and base:
                    kind = "picture" if f".{suffix.lower()}" in SUFFIXES else suffix.lower()
                    found.setdefault(base, {})[kind] = (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a whole tar file ({error}): fetch it again") from None
    if os.path.getsize(path) < end - tarfile.BLOCKSIZE:
        raise ValueError(f"{path} is cut short: {os.path.getsize(path)} bytes of {end}: fetch it again")
    return found


class Beside(Dataset):
    """A folder in which the caption of x.jpg is the text of x.txt; lines are captions of their own."""

    def __init__(self, folder):
        pictures = sorted(str(p) for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
        with_text = [p for p in pictures if os.path.isfile(os.path.splitext(p)[0] + ".txt")]
        if not with_text:
            raise FileNotFoundError(
                f"{folder}: none of {len(pictures)} pictures has its caption beside it: expected x.jpg, x.txt"
            )
        self.paths = Strings(with_text)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_picture(self.paths[index]), self.label(index)

    def label(self, index):
        text = Path(os.path.splitext(self.paths[index])[0] + ".txt").read_text("utf-8", "replace")
        return [line.strip() for line in text.splitlines() if line.strip()] or [""]

    def where(self, index):
        return self.paths[index]


# Known sets


class Groups:
    """Lists of strings, a list for each picture, as arrays."""

    def __init__(self, groups):
        self.ends = np.cumsum([0, *map(len, groups)])
        self.strings = Strings([string for group in groups for string in group])

    def __getitem__(self, index):
        return [self.strings[i] for i in range(self.ends[index], self.ends[index + 1])]


def open_layout(name, folder, split):
    """<root>/<name>/ with <name>.tsv (.csv, .jsonl), for a test split <name>-test.tsv, or with tar shards."""
    stem = name if split == "train" else f"{name}-test"
    for suffix in TABLES:
        if (folder / f"{stem}{suffix}").is_file():
            return Source(name, Table(folder / f"{stem}{suffix}"))
    if split == "train" and any(folder.glob("*.tar")):
        return Source(name, Shards(expand(str(folder / "*.tar"))))
    if split == "train" and (folder / "redcaps.json").is_file():
        return Source(name, open_redcaps(folder))
    columns = "path, title and description" if name == "yfcc15m" else "path and caption"
    pickled = sorted([*folder.glob("*.npy"), *folder.glob("*.pkl")])
    wanted = f"expected {folder}/{stem}.tsv with the columns {columns}, or shards {folder}/*.tar"
    if pickled:
        raise ValueError(
            f"{pickled[0]} holds pickled objects, which can run code when opened: refused; {wanted}"
        )
    raise FileNotFoundError(f"no {name} for {split}: {wanted}")


def read_json(path, *keys):
    """The lists under `keys` of a JSON file."""
    if not path.is_file():
        raise FileNotFoundError(f"no captions at {path}")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for key in keys:
        if not isinstance(table, dict) or not isinstance(table.get(key), list):
            found = ", ".join(table) if isinstance(table, dict) else type(table).__name__
            raise ValueError(f"{path} has no list under {key!r}: found {found}")
    return [table[key] for key in keys]


def entries(path, key, rows, *names):
    """The fields `names` of each row of a JSON list."""
    for i, row in enumerate(rows):
        missing = [name for name in names if not isinstance(row, dict) or name not in row]
        if missing:
            raise ValueError(f"{path}: {key}[{i}] has no {missing[0]!r}")
        yield [row[name] for name in names]


def open_coco(folder, split):
    """annotations/captions_{train,val}2017.json beside train2017/ and val2017/: five captions a picture."""
    part = "train2017" if split == "train" else "val2017"
    path = folder / "annotations" / f"captions_{part}.json"
    images, annotations = read_json(path, "images", "annotations")
    captions = {}
    for image, caption in entries(path, "annotations", annotations, "image_id", "caption"):
        captions.setdefault(image, []).append(caption)
    names = [(n, captions[i]) for i, n in entries(path, "images", images, "id", "file_name") if i in captions]
    return Files([str(folder / part / name) for name, _ in names], Groups([group for _, group in names]))


def open_redcaps(folder):
    """redcaps.json, {"annotations": [{image_id, subreddit, caption}]}, and <subreddit>/<image_id>.jpg."""
    path = folder / "redcaps.json"
    (rows,) = read_json(path, "annotations")
    rows = list(entries(path, "annotations", rows, "subreddit", "image_id", "caption"))
    return Files([str(folder / s / f"{i}.jpg") for s, i, _ in rows], Strings([c for _, _, c in rows]))


def open_library(name, folder):
    """Flickr8k, Flickr30k and SBU as torchvision reads them; pictures stay closed."""
    sets = torchvision.datasets
    try:
        if name == "sbu":
            data = sets.SBU(folder, download=False)
            return Files([str(folder / "dataset" / p) for p in data.photos], Strings(data.captions))
        kind, captions = {
            "flickr8k": (sets.Flickr8k, folder / "Flickr_8k.html"),
            "flickr30k": (sets.Flickr30k, folder / "results_20130124.token"),
        }[name]
        data = kind(folder / "images", captions)
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no {name} as torchvision reads it in {folder} ({str(error).splitlines()[0]}): expected images/ "
            "and Flickr_8k.html or results_20130124.token; for sbu what torchvision.datasets.SBU downloads"
        ) from None
    paths = [os.path.join(folder / "images", path) for path in data.ids]
    return Files(paths, Groups([data.annotations[i] for i in data.ids]))
