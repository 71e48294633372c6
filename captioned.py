"""Captioned sets: images with sentences, from a table, a folder, tar shards or COCO.

Paper: the pre-training data (YFCC15M: title and description, CC3M, CC12M) in "implementation details".

    pairs.tsv, .csv, .jsonl; a folder of x.jpg, x.txt; {00000..00331}.tar; COCO -> rows (path, captions)
    rows -> Pairs;  Pairs[i] -> (PIL RGB image, [captions]); the image is opened when it is asked for

Not here: labelled sets (sets.py), drawing one caption and cropping (data.py).
"""

import contextlib
import csv
import functools
import glob
import io
import json
import os
import re
import shlex
import tarfile
import warnings
from array import array
from pathlib import Path

import numpy as np

from folders import walk
from images import Source, is_image, read_image

PATH_COLUMNS = "path filepath file_path image_path filename file_name file image".split()
CAPTION_COLUMNS = "caption captions title description text sentence".split()
TABLES = (".tsv", ".csv", ".jsonl")
NAMES = ("cc3m", "cc12m", "redcaps", "yfcc15m", "sbu", "flickr8k", "flickr30k", "coco")
LINKS = "these are links: fetch images (img2dataset --output_format webdataset: *.tar of KEY.jpg, KEY.txt)"
QUOTED = re.compile('"([^"]|"")*"')  # a cell in quotes, those inside doubled
PACKED = re.compile(r"(.*\.tar):.*:(\d+):(\d+)")  # SHARD.tar:NAME:START:SIZE, an image in a shard


def open_captioned(name, root, split):
    """The Source of a captioned set, or None if `name` is none: a folder (under `root` or by its path) that
    holds <name>.tsv (.csv, .jsonl), *.tar, or x.jpg with x.txt; or the path of a table or of shards. Split
    "test": <name>-test.tsv or COCO's val2017. Raises ValueError or OSError."""
    folder = next((place for place in (Path(root, name), Path(name)) if place.is_dir()), Path(root, name))
    if name == "coco":
        part = "train2017" if split == "train" else "val2017"
        place = folder / f"annotations/captions_{part}.json"
        return Source(name, Pairs(place, folder / part, coco_rows(place)))
    stems = [f"{folder.name}-test", folder.name] if split == "test" else [folder.name]
    tables = [folder / f"{stem}{suffix}" for stem in stems for suffix in TABLES]
    table = next(filter(Path.is_file, tables), Path(name))
    if table.name.lower().endswith((*TABLES, ".txt")):  # Kaggle names the table of Flickr8k captions.txt
        place, images, rows = table, table.parent, table_rows
    elif name.endswith(".tar"):
        place, images, rows = name, "", shard_rows
    elif any(folder.glob("[!.]*.tar")):
        place, images, rows = f"{glob.escape(str(folder))}/*.tar", "", shard_rows
    elif any(folder_rows(folder)):
        place, images, rows = folder, "", folder_rows
    elif name in NAMES:
        raise FileNotFoundError(f"no {name}: expected a table {folder / name}.tsv or shards {folder}/*.tar")
    else:
        return None
    if split == "test" and table.stem != f"{folder.name}-test":
        line = f"python zeroshot.py --checkpoint FILE --retrieval --data {shlex.quote(name)}"
        raise FileNotFoundError(f"{name} has captions and one split; for what training holds out type {line}")
    return Source(name, Pairs(place, images, rows(place)))


class Pairs:
    """Images with their captions from `rows` of (path, captions), paths relative to `folder`; equal paths are
    one image. Row r is the bytes ends[r] to ends[r + 1], path and captions with zero bytes between. Image i,
    in the order of first appearance, has the rows order[starts[i] : starts[i + 1]]."""

    def __init__(self, name, folder, rows):
        self.folder, self.content, self.ends = str(folder), bytearray(), array("q", [0])
        number, hashes = 1, array("q")  # 64-bit hashes tell paths apart
        try:
            for row in rows:  # None for a head and for blank lines
                if row is not None:
                    path, captions = row
                    texts = [text for text in map(str.strip, captions) if text]
                    self.content += "\0".join([path, *(texts or [""])]).encode()
                    self.ends.append(len(self.content))
                    hashes.append(hash(path))
                number += 1
        except UnicodeEncodeError:  # of what open_text could not decode
            raise ValueError(f"{name}, row {number}, {path!r}: not UTF-8, save it as UTF-8") from None
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{name}, row {number}: {error}") from None
        except (TypeError, KeyError) as error:  # JSON of another form
            what = f"expected text under path and caption, found {error!r:.60}"
            raise ValueError(f"{name}, row {number}: {what}") from None
        if not hashes:
            raise ValueError(f"{name} holds no images with captions")
        _, first, rows = np.unique(np.asarray(hashes), return_index=True, return_inverse=True)
        first = first[rows]  # for each row, the first row with its path
        self.order = np.argsort(first, kind="stable")
        self.starts = np.append(np.flatnonzero(np.diff(first[self.order], prepend=-1)), len(first))
        sample = [self.where(i) for i in np.linspace(0, len(self) - 1, 20).astype(int)]
        if not any(os.path.isfile(PACKED.sub(r"\1", path)) for path in sample):
            why = LINKS if "://" in sample[0] else "paths are relative to the table's folder"
            raise FileNotFoundError(f"{name}: no image {sample[0]}: {why}")

    def __len__(self):
        return len(self.starts) - 1

    def row(self, number):
        return self.content[self.ends[number] : self.ends[number + 1]].decode().split("\0")

    def label(self, index):
        rows = self.order[self.starts[index] : self.starts[index + 1]].tolist()
        return [caption for number in rows for caption in self.row(number)[1:]]

    def where(self, index):
        return os.path.join(self.folder, self.row(self.order[self.starts[index]])[0]).replace("\\", "/")

    def __getitem__(self, index):
        file = self.where(index)
        if packed := PACKED.fullmatch(file):
            with open(packed[1], "rb") as shard:
                shard.seek(int(packed[2]))
                file = io.BytesIO(shard.read(int(packed[3])))
        return read_image(file), self.label(index)


def open_text(file):
    """A binary file -> its text. Bytes that are not UTF-8 (or UTF-16) become surrogates: Pairs refuses."""
    codec = "utf-16" if file.peek(2)[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(file, codec, "surrogateescape", newline="")


@functools.lru_cache
def find_columns(names):
    """Column names -> (place of the path, places of the captions)."""
    lower = [name.strip().lower() for name in names]
    paths = [lower.index(name) for name in PATH_COLUMNS if name in lower]
    captions = [i for i, name in enumerate(lower) if name in CAPTION_COLUMNS]
    if not paths and any("url" in name or "://" in name for name in lower):
        raise ValueError(LINKS)
    if not paths or not captions:
        raise ValueError(f"columns {list(names)}: expected one of {PATH_COLUMNS} and {CAPTION_COLUMNS}")
    return paths[0], captions


def table_rows(path):
    """Rows of a .tsv, .csv or .jsonl file, None for a head and for blank lines."""
    with open_text(open(path, "rb")) as file:
        yield from map(json_row, file) if path.suffix.lower() == ".jsonl" else cell_rows(file)


def json_row(line):
    if not line.strip():
        return None
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"expected text under path and caption, found {row!r:.60}")
    (path, captions), values = find_columns(tuple(row)), list(row.values())
    cells = [values[i] if isinstance(values[i], list) else [values[i]] for i in captions]
    return values[path], [text for cell in cells for text in cell if text is not None]


def cell_rows(file):
    """The first line shows the separator and names the columns, or is itself a path and a caption."""
    line = next(filter(str.strip, file), "")
    file.seek(0)
    separator = "\t" if "\t" in line else re.search("[,;]|$", line)[0] or ","
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL  # with tabs a row is a line
    names = None
    for row in csv.reader(file, delimiter=separator, quoting=quoting, strict=True):
        text = separator.join(row)
        if separator == "\t" and '"' in text:
            row = [cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell for cell in row]
        if row and names is None:
            headless = len(row) == 2 and is_image(row[0])
            names, row = (("path", "caption"), row) if headless else (tuple(row), [])
            path, captions = find_columns(names)
        if row and len(row) != len(names):
            why = "a separator or a line break in a cell wants CSV, with quotes around the cell"
            raise ValueError(f"found {len(row)} columns, expected {len(names)}: {why}")
        if "\n" in text and sum(is_image(cell.strip()) for cell in re.split(f"[\n{separator}]", text)) > 1:
            raise ValueError("a cell holds other rows: the quote at its start is closed too late or never")
        yield (row[path].strip(), [row[i] for i in captions]) if row else None


def coco_rows(path):
    """Rows of annotations/captions_{train,val}2017.json: five an image."""
    table = json.loads(path.read_bytes())
    names = {image["id"]: image["file_name"] for image in table["images"]}
    for note in table["annotations"]:
        yield names[note["image_id"]], [note["caption"]]


def folder_rows(folder):
    """(x.jpg, lines of x.txt) of a folder and those in it, links included; warns of what is passed over."""
    files, used = list(walk(folder)), set()
    texts = {os.path.splitext(path)[0]: path for path in files if path.lower().endswith(".txt")}
    for path in filter(is_image, files):
        if text := texts.get(os.path.splitext(path)[0]):
            used |= {path, text}
            with open_text(open(text, "rb")) as lines:
                yield path, list(lines)
    passed = [path for path in files if path not in used]
    if used and passed:
        warnings.warn(f"{folder}: passed over {len(passed)} unpaired files, as {passed[0]}", stacklevel=2)


def shard_rows(pattern):
    """Rows of dir/{00000..00331}.tar, dir/*.tar or one file; warns of what is passed over."""
    paths, passed = sorted(glob.glob(pattern)) or [pattern], 0
    if numbers := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
        first, last = numbers.groups()
        span = range(int(first), int(last) + 1)
        paths = [pattern.replace(numbers[0], str(number).zfill(len(first))) for number in span]
    for path in paths:
        for parts in index_shard(path).values():
            if len(parts) == 2:
                yield f"{path}:{parts['image']}", [parts["text"]]
            else:
                passed += 1
    if passed:
        warnings.warn(f"{pattern}: passed over {passed} keys without image or caption", stacklevel=2)


def index_shard(path):
    """What read_tar gives, kept in PATH.places, where that can be written: a shard is gone through once."""
    state, kept = os.stat(path), Path(f"{path}.places")
    with contextlib.suppress(OSError, ValueError):  # none yet, or torn
        stamp, keys = json.loads(kept.read_bytes())
        if stamp == [state.st_size, state.st_mtime_ns]:
            return keys
    keys = read_tar(path)
    with contextlib.suppress(OSError):
        kept.write_text(json.dumps([[state.st_size, state.st_mtime_ns], keys]))
    return keys


def read_tar(path):
    """{key: {"image": "NAME:START:SIZE", "text": caption}} of a tar file; OSError if it is not whole."""
    keys = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, suffix = os.path.splitext(member.name)
                if os.path.basename(key).startswith("."):
                    continue
                parts = keys.setdefault(key, {})
                if is_image(member.name):
                    parts["image"] = f"{member.name}:{member.offset_data}:{member.size}"
                elif suffix.lower() == ".txt":
                    parts["text"] = open_text(tar.extractfile(member)).read()
                elif suffix.lower() == ".json":  # img2dataset writes both, other tools this one alone
                    about = json.load(tar.extractfile(member))
                    if isinstance(about, dict) and about.get("caption"):
                        parts.setdefault("text", about["caption"])
            file.seek(tar.offset)  # where the first header that is none begins
            end = file.read(2 * tarfile.RECORDSIZE)
            if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
                raise tarfile.ReadError("it does not end with zeros")
    except (tarfile.TarError, ValueError) as error:
        raise OSError(f"{path} is truncated, damaged or not an uncompressed tar file: {error}") from None
    return keys
