"""Captioned sets: pictures with sentences, from a table, a folder, tar shards or a known set's layout.

Paper: section 4 (YFCC15M, CC3M, CC12M). Where a picture has several captions one is drawn at each visit
(data.Views); YFCC15M's are the title and the description.

    pairs.tsv, .csv, .jsonl -> Table      00000.tar, 00001.tar, ... -> Shards      x.jpg + x.txt -> Beside
    item i of each -> (PIL picture, caption or list of captions), read when it is asked for

A table stays in its file and a picture in its shard; only their places are in memory, 8 bytes for a row and
48 for a shard's picture, which forked workers share. Not here: labelled sets (sets.py), drawing and cropping
(data.py).
"""

import csv
import functools
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torchvision
from torch.utils.data import Dataset

from data import SUFFIXES, Files, Source, Strings, read_picture

PATH_COLUMNS = ("path", "filepath", "file_path", "image_path", "filename", "file_name", "file", "image")
CAPTION_COLUMNS = ("caption", "captions", "title", "description", "text", "sentence", "raw_caption")
TABLES = (".tsv", ".csv", ".jsonl")
PIECE = 1 << 24  # bytes of a table that are looked at together
PARSED = 1000  # rows, spread over a table, that are parsed when it is opened
QUOTING = (",", ";")  # separators of a CSV, where a cell in quotes may hold separators and line breaks
LAYOUTS = ("cc3m", "cc12m", "redcaps", "yfcc15m")  # <root>/<name>/<name>.tsv, or shards in <root>/<name>/
NAMES = (*LAYOUTS, "coco", "flickr8k", "flickr30k", "sbu")
PICKLED, REFUSED = (".npy", ".pkl"), "holds pickled objects, which can run code when opened: refused"


def open_captioned(name, root, split):
    """The Source of a captioned set, or None if `name` is none: see NAMES, or a table, a folder, shards.

    Raises ValueError or FileNotFoundError with one sentence.
    """
    opened.cache_clear()  # a file of this name may be another one by now
    here = Path(root) / name
    if name == "coco":
        return Source(name, open_coco(here, split))
    if name in LAYOUTS:
        return open_layout(name, here, split)
    if name.endswith(PICKLED) and os.path.isfile(name):
        raise ValueError(f"{name} {REFUSED}; write a table FILE.tsv with the columns path and caption")
    if name in NAMES:
        items = functools.partial(open_library, name, here)
    elif name.endswith(TABLES):
        items = functools.partial(Table, name)
    elif name.endswith(".tar"):
        items = functools.partial(Shards, name)
    else:
        folder = next((place for place in (here, Path(name)) if has_captions(place, split)), None)
        if folder is None:
            return None
        items = functools.partial(Beside, folder)
    if split == "test":
        raise FileNotFoundError(
            f"{name} has captions and one split, for training: python zeroshot.py takes it with --retrieval"
        )
    return Source(name, items())


def has_captions(folder, split):
    """Whether a folder is one of x.jpg and x.txt, and not one of class folders (sets.py)."""
    classes = any((folder / part).is_dir() for part in ("train", split))
    return folder.is_dir() and not classes and any(folder.rglob("*.txt"))


# A table: path and caption in each row


@functools.lru_cache(maxsize=256)
def opened(path):
    """A file, closed when 256 others have been opened since: there are more shards than descriptors."""
    return open(path, "rb", buffering=0)


def read(path, begin, size):
    """Bytes of a file, read by offset, so that forked workers may share it."""
    return os.pread(opened(path).fileno(), size, begin)


def scan(path, separator):
    """Where each row of a file ends, int64 [n], and how many separators it has, int32 [n].

    Between quotes neither counts in a CSV; an odd number of quotes is an error.
    """
    size, ends, counts, carry, odd = os.path.getsize(path), [], [], 0, 0
    for start in range(0, size, PIECE):
        part = np.fromfile(path, np.uint8, PIECE, offset=start)
        breaks = np.flatnonzero(part == ord("\n"))
        separators = np.flatnonzero(part == ord(separator)) if separator else breaks[:0]
        if separator in QUOTING:
            quotes = np.flatnonzero(part == ord('"'))
            breaks, separators = (
                found[(np.searchsorted(quotes, found) + odd) % 2 == 0] for found in (breaks, separators)
            )
            odd = (odd + len(quotes)) % 2
        before = np.searchsorted(separators, breaks)
        ends.append(breaks + start)
        counts.append(np.diff(before, prepend=-carry).astype(np.int32))
        carry = len(separators) - before[-1] if len(breaks) else carry + len(separators)
    if odd:
        raise ValueError(f"{path}, row {sum(map(len, ends)) + 1}: a quote is opened and never closed")
    if part[-1] != ord("\n"):
        ends.append([size])
        counts.append([carry])
    return np.concatenate(ends), np.concatenate(counts)


class Table(Dataset):
    """A .tsv, .csv or .jsonl file with a picture's path and its caption or captions in each row.

    Separator and columns are found by looking at the first line: it names them, or, in a file of two
    columns, is itself a path and a caption. Paths are relative to the table's folder, and may lead into a
    zip file: images/123.zip/456.jpg. A JSON line holds the same names; its caption may be a list.
    """

    def __init__(self, path):
        self.path = str(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no table at {path}: expected a {', '.join(TABLES)} of path and caption")
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty: expected a path and a caption in each row")
        first = read(self.path, 0, 1 << 20).split(b"\n")[0].decode("utf-8-sig", "replace")
        if "\0" in first:
            raise ValueError(f"{self.path} is not text in UTF-8: expected a path and a caption in each row")
        self.json = self.path.endswith(".jsonl")
        self.separator = None if self.json else next((s for s in ("\t", *QUOTING) if s in first), "\t")
        self.ends, counts = scan(self.path, self.separator)
        while len(self.ends) > 1 and not self.text(len(self.ends) - 1).strip():  # blank lines at the end
            self.ends, counts = self.ends[:-1], counts[:-1]
        self.columns = int(counts[0]) + 1
        self.first = 0  # rows before the first picture: a head or none
        self.find_columns(first)
        self.check_rows(counts)

    def find_columns(self, first):
        row = self.parse(0)
        if self.json:
            names = list(row) if isinstance(row, dict) else []
        else:
            names = [cell.strip().lower() for cell in row]
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

    def check_rows(self, separators):
        """Rows of the wrong width, and paths that lead nowhere, before anything is trained on."""
        if len(self) == 0:
            raise ValueError(f"{self.path} has a head and no rows")
        other = np.flatnonzero(separators != self.columns - 1)
        if len(other):
            found = separators[other[0]] + 1
            raise ValueError(f"{self.name_row(other[0])}: found {found} columns, expected {self.columns}")
        looked = np.linspace(0, len(self) - 1, min(len(self), PARSED)).astype(int).tolist()
        paths = [self.row(i)[0] for i in looked][:: -(-len(looked) // 20)]
        missing = [path for path in paths if not os.path.exists(archive(path)[0] or path)]
        if len(missing) == len(paths):
            raise FileNotFoundError(
                f"{self.where(0)}: no picture at {missing[0]}: paths are relative to the table's folder"
            )

    def __len__(self):
        return len(self.ends) - self.first

    def name_row(self, row):
        """Row `row` of the file (from 0) as errors name it: its line, but where a row may have several."""
        return f"{self.path}, {'row' if self.separator in QUOTING else 'line'} {row + 1}"

    def text(self, row):
        start = int(self.ends[row - 1]) + 1 if row else 0
        text = read(self.path, start, int(self.ends[row]) - start).decode("utf-8", "surrogateescape")
        return text.removesuffix("\r").removeprefix("\ufeff")

    def parse(self, row):
        """Row `row` of the file (from 0) as a list of cells or a JSON object."""
        text = self.text(row)
        try:
            if self.json:
                return json.loads(text)
            if self.separator == "\t":
                return [unquoted(cell) for cell in text.split("\t")]
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=self.separator))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.name_row(row)}: not JSON ({error.msg})") from None
        except csv.Error as error:
            raise ValueError(f"{self.name_row(row)}: not CSV ({error})") from None
        if len(cells) != self.columns:  # quotes in the middle of a cell are letters, and hide no separator
            raise ValueError(f"{self.name_row(row)}: found {len(cells)} columns, expected {self.columns}")
        return cells

    def row(self, index):
        """-> (path, [captions])."""
        row = self.parse(self.first + index)
        try:
            path, captions = row[self.path_column], [row[c] for c in self.caption_columns]
        except (KeyError, TypeError) as error:
            found = list(row) if isinstance(row, dict) else row
            raise ValueError(f"{self.where(index)}: lacks a column ({error}), found {found}") from None
        captions = [c for entry in captions for c in (entry if isinstance(entry, list) else [entry])]
        captions = [c for c in captions if isinstance(c, str) and c.strip()] or [""]
        if not isinstance(path, str):
            raise ValueError(f"{self.where(index)}: the path is {path!r}, expected a string")
        return os.path.join(os.path.dirname(self.path), path), captions

    def __getitem__(self, index):
        path, captions = self.row(index)
        packed, inside = archive(path)
        if packed is None:
            return read_picture(path), captions
        with zipfile.ZipFile(packed) as file:
            return read_picture(io.BytesIO(file.read(inside))), captions

    def label(self, index):
        return self.row(index)[1]

    def where(self, index):
        return self.name_row(self.first + index)


def unquoted(cell):
    """A cell of a TSV that stands in quotes, as pandas writes those with a quote in them."""
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if whole else cell


def archive(path):
    """ "a.zip/b.jpg" -> ("a.zip", "b.jpg"); a path that leads into no zip file -> (None, path)."""
    before, packed, inside = path.partition(".zip/")
    return (f"{before}.zip", inside) if packed else (None, path)


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

    def __init__(self, pattern):
        self.paths, found = expand(pattern), {}
        # Ranks that start together each begin with other shards and find what the rest have noted.
        for path in np.random.default_rng(os.getpid()).permutation(self.paths).tolist():
            found[path] = places(path)
            if sys.stderr.isatty():
                end = "\n" if len(found) == len(self.paths) else ""
                print(f"\rlooked through {len(found)} of {len(self.paths)} shards", end=end, file=sys.stderr)
        tables = [found[path] for path in self.paths]
        self.shard = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self.places = np.concatenate(tables)  # [n, 5]

    def __len__(self):
        return len(self.places)

    def read(self, index, begin, size):
        return read(self.paths[self.shard[index]], begin, size)

    def __getitem__(self, index):
        begin, size, _, _, _ = self.places[index].tolist()
        return read_picture(io.BytesIO(self.read(index, begin, size))), self.label(index)

    def label(self, index):
        _, _, begin, size, in_json = self.places[index].tolist()
        text = self.read(index, begin, size).decode("utf-8", "surrogateescape")
        if not in_json:
            return text.strip()
        try:
            caption = json.loads(text)["caption"] or ""
        except (json.JSONDecodeError, KeyError, TypeError):
            caption = None
        if not isinstance(caption, str):
            raise ValueError(f"{self.where(index)}: expected its JSON to hold a string under 'caption'")
        return caption

    def where(self, index):
        """The shard and the name of the picture, which stands before it in the shard."""
        header = self.read(index, int(self.places[index, 0]) - tarfile.BLOCKSIZE, 100)
        return f"{self.paths[self.shard[index]]} {header.split(bytes(1))[0].decode('utf-8', 'replace')}"


def places(path):
    """Where a shard's pictures and captions are, int64 [n, 5]: begin and size of the picture, of the caption,
    and 1 if that is the JSON; a picture without caption is left out.

    Noted in PATH.places, where that can be written: looking through a shard takes 140 microseconds a picture.
    """
    state, kept = os.stat(path), f"{path}.places"
    stamp = np.array([[state.st_size, state.st_mtime_ns, 0, 0, 0]])
    try:
        table = np.load(kept, allow_pickle=False)
        if np.array_equal(table[:1], stamp):
            return table[1:]
    except (OSError, ValueError, EOFError):
        pass  # none, or torn
    rows, pictures = [], 0
    for parts in members(path).values():
        pictures += "picture" in parts
        text = next((kind for kind in ("txt", "json") if kind in parts), None)
        if "picture" in parts and text:
            rows.append((*parts["picture"], *parts[text], text == "json"))
    if not rows:
        found = f"{pictures} pictures, none with its caption" if pictures else "no pictures"
        raise ValueError(f"{path} holds {found}: expected KEY.jpg with KEY.txt or KEY.json each")
    rows = np.array(rows, np.int64)
    try:
        with open(f"{kept}.{os.getpid()}.tmp", "wb") as file:
            np.save(file, np.concatenate([stamp, rows]), allow_pickle=False)
        os.replace(file.name, kept)
    except OSError:
        pass  # a folder that cannot be written: looked through at each start
    return rows


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
        return Source(name, Shards(str(folder / "*.tar")))
    if split == "train" and (folder / "redcaps.json").is_file():
        return Source(name, open_redcaps(folder))
    columns = "path, title and description" if name == "yfcc15m" else "path and caption"
    pickled = sorted(path for suffix in PICKLED for path in folder.glob(f"*{suffix}"))
    wanted = f"expected {folder}/{stem}.tsv with the columns {columns}, or shards {folder}/*.tar"
    if pickled:
        raise ValueError(f"{pickled[0]} {REFUSED}; {wanted}")
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
    library, images = torchvision.datasets, folder / "images"
    captions = folder / ("Flickr_8k.html" if name == "flickr8k" else "results_20130124.token")
    try:
        if name == "sbu":
            data = library.SBU(folder, download=False)
            return Files([str(folder / "dataset" / p) for p in data.photos], Strings(data.captions))
        data = (library.Flickr8k if name == "flickr8k" else library.Flickr30k)(images, captions)
    except IndexError:  # Flickr8k's pictures are looked for by the beginnings of their names
        raise ValueError(f"a picture named in {captions} is not in {images}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the captions of {name} in {folder} are not text in UTF-8 ({error})") from None
    except ValueError:  # torchvision's own words do not name the line
        with open(captions) as file:
            bad = next(n for n, line in enumerate(file, 1) if line.strip().count("\t") != 1)
        raise ValueError(f"{captions}, line {bad}: found no picture and caption with a tab between") from None
    except (RuntimeError, OSError) as error:
        raise FileNotFoundError(
            f"no {name} as torchvision reads it in {folder} ({str(error).splitlines()[0]}): expected images/ "
            "and Flickr_8k.html or results_20130124.token; for sbu what torchvision.datasets.SBU downloads"
        ) from None
    paths = [os.path.join(images, path) for path in data.ids]
    return Files(paths, Groups([data.annotations[i] for i in data.ids]))
