"""Shards: tar files of KEY.jpg with KEY.txt, or with the caption in KEY.json, as img2dataset writes them.

Paper: left to its tools. A shard is gone through once and what is where is kept beside it; an image is then
one seek and one read. So shards are shuffled, resumed and shared by ranks and workers as any other set.

    {00000..00331}.tar -> rows (SHARD.tar:NAME:START:SIZE, [caption]) -> captioned.Pairs

Not here: tables and folders, and the set made of the rows (captioned.py).
"""

import functools
import io
import json
import os
import re
import tarfile
import warnings
from pathlib import Path

from images import is_image

PACKED = re.compile(r"(.*\.tar):.*:(\d+):(\d+)")
VERSION = 3  # of the files X.tar.places


def decode(content):
    """Bytes -> text. What is neither UTF-8 nor marked as UTF-16 becomes surrogates, which Pairs refuses."""
    return content.decode(codec(content), "surrogateescape")


def codec(content):
    return "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def image_file(path):
    """What read_image takes: the path itself, or the bytes of an image in a shard."""
    packed = PACKED.fullmatch(path)
    if not packed:
        return path
    file = open_shard(packed[1], os.getpid())
    file.seek(int(packed[2]))
    return io.BytesIO(file.read(int(packed[3])))


@functools.lru_cache(maxsize=32)  # files that are open in a process; a system may allow 256
def open_shard(path, process):
    """`process` keeps a forked worker from its parent's files, with which it would share the position."""
    return open(path, "rb", buffering=0)


def shard_paths(pattern):
    """dir/{00000..00331}.tar, dir/*.tar or one file -> paths, all of which exist."""
    paths, numbers = [pattern], re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if numbers:
        first, last = numbers.groups()
        names = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        paths = [pattern.replace(numbers.group(), name, 1) for name in names]
    elif "*" in pattern:
        found = Path(pattern).parent.glob(Path(pattern).name)
        paths = sorted(str(path) for path in found if not path.name.startswith("."))
    missing = [path for path in paths or [pattern] if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"no shard {missing[0]} ({len(missing)} of {len(paths)} missing)")
    return paths


def shard_rows(pattern):
    """Rows of all shards of a pattern, one shard in memory at a time; warns of what is passed over. Raises
    OSError with one sentence.
    """
    passed = 0
    for path in shard_paths(pattern):
        shard = index_shard(path)
        passed += shard["passed"]
        for place, caption in shard["rows"]:
            yield f"{path}:{place}", [caption]
    if passed:
        warnings.warn(f"{pattern}: passed over {passed} keys without image or caption", stacklevel=2)


def index_shard(path):
    """{"rows": [["NAME:START:SIZE", caption], ...], "passed": count of other keys} of a shard, kept in
    PATH.places where that can be written. OSError if it is truncated or holds no image with its caption.
    """
    state, kept = os.stat(path), f"{path}.places"
    stamp = [VERSION, state.st_size, state.st_mtime_ns]
    try:
        shard = json.loads(Path(kept).read_bytes())
        if shard["stamp"] == stamp:
            return shard
    except (OSError, ValueError, LookupError, TypeError):
        pass  # none, or torn
    keys = read_tar(path).values()
    rows = [(parts["image"], parts["text"]) for parts in keys if "image" in parts and parts.get("text")]
    if not rows:
        found = f"{sum('image' in parts for parts in keys)} images, none with its caption"
        raise FileNotFoundError(f"{path} holds {found}: expected KEY.jpg with KEY.txt or KEY.json each")
    shard = {"stamp": stamp, "rows": rows, "passed": len(keys) - len(rows)}
    try:
        Path(f"{kept}.{os.getpid()}").write_text(json.dumps(shard))
        os.replace(f"{kept}.{os.getpid()}", kept)
    except OSError:
        pass  # a folder that cannot be written: gone through at each start
    return shard


def read_tar(path):
    """{key: {"image": "NAME:START:SIZE", "text": caption}} in their order; OSError if it is not whole."""
    keys = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, _, suffix = member.name.rpartition(".")
                name = os.path.basename(member.name)
                parts = {} if name.startswith(".") else keys.setdefault(key, {})
                if is_image(name):
                    parts["image"] = f"{name}:{member.offset_data}:{member.size}"
                elif suffix.lower() == "txt":
                    parts["text"] = decode(tar.extractfile(member).read())
                elif suffix.lower() == "json" and not name.startswith("."):
                    parts.setdefault("text", json.load(tar.extractfile(member)).get("caption"))
            file.seek(tar.offset)  # where the first header that is none begins
            end = file.read(2 * tarfile.RECORDSIZE)
    except (tarfile.TarError, ValueError, AttributeError) as error:
        raise OSError(f"{path} is damaged, or no uncompressed tar file ({error}): fetch it again") from None
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise OSError(f"{path} is truncated or damaged, it does not end with zeros: fetch it again")
    return keys
