"""Captioned sets: each format against what was written into it; other tools' files, or one sentence."""

import csv
import io
import json
import pickle
import tarfile
import warnings
from pathlib import Path

import pytest
from PIL import Image

import captioned
from captioned import open_captioned

CAPTIONS = ["a red, round cup", 'the "big" house', "naïve café\u2028x", "猫 🏠", 'a 10" pipe', ""]
EMOJI = Path(__file__).parents[2] / "shared/data/emoji-noto.tar"


@pytest.fixture
def folder(tmp_path):
    """Six images, each of one grey that tells its number."""
    for i in range(len(CAPTIONS)):
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


def check(source, captions=CAPTIONS, numbers=None):
    assert len(source) == len(captions) and source.classes is None
    for i, expected in enumerate(captions):
        (image, found), number = source[i], i if numbers is None else numbers[i]
        assert image.mode == "RGB" and image.getpixel((3, 3)) == (40 * number,) * 3
        assert found == source.label(i) == (expected if isinstance(expected, list) else [expected])


def table(folder, name, rows, head=("filepath", "title"), **options):
    """Writes rows of (path, caption, ...) as JSON lines or by the csv module, and opens them."""
    if name.endswith("jsonl"):
        text = "\n".join(json.dumps(dict(zip(head, row))) for row in rows)
    else:
        file = io.StringIO()
        writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",", **options)
        writer.writerows(([head] if head else []) + list(rows))
        text = file.getvalue()
    return written(folder, name, text)


def written(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_captioned(str(folder / name), "data", "train")


ROWS = [(f"{i}.png", caption) for i, caption in enumerate(CAPTIONS)]


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv", "pairs.jsonl"])
def test_a_table_gives_its_images_and_captions_pickled_too(folder, name):
    check(pickle.loads(pickle.dumps(table(folder, name, ROWS))))
    if not name.endswith("jsonl"):
        check(table(folder, name, ROWS, head=None))


def test_a_tsv_with_quotes_by_pandas_or_without_any_reads_the_same(folder):
    check(table(folder, "quoted.tsv", ROWS, quoting=csv.QUOTE_ALL))
    check(written(folder, "plain.tsv", "path\tcaption\n" + "".join(f"{p}\t{c}\n" for p, c in ROWS)))
    check(written(folder, "start.tsv", 'path\tcaption\n0.png\t"big" cup\n1.png\t"\n'), ['"big" cup', '"'])


def test_a_line_break_between_the_quotes_of_a_csv_belongs_to_its_row(folder):
    captions = ["one\nand, two", 'a "quoted\n" one', "last"]
    check(table(folder, "p.csv", [(f"{i}.png", c) for i, c in enumerate(captions)]), captions)


def test_inch_marks_without_quotes_lose_no_row_of_a_csv(folder):
    lines = [f"{i}.png,{caption}" for i, caption in enumerate(["a", 'a 10" pipe', "b", 'a 90" one', "c"])]
    check(written(folder, "p.csv", "\n".join(["path,caption", *lines])), [li.split(",")[1] for li in lines])


@pytest.mark.parametrize("form", ["pairs.tsv", "pairs.csv", "pairs.jsonl"])
def test_rows_of_one_path_are_one_image_with_their_captions_in_order_of_appearance(folder, form):
    rows = [("2.png", "a"), ("0.png", "b"), ("2.png", "c"), ("1.png", "d"), ("2.png", "e")]
    check(table(folder, form, rows), [["a", "c", "e"], "b", "d"], numbers=[2, 0, 1])


def test_several_caption_columns_are_a_list_without_the_empty_ones(folder):
    rows = [("../0.png", "boat", "a boat at sea"), ("../1.png", "", "only this")]
    (folder / "yfcc15m").mkdir()
    table(folder, "yfcc15m/yfcc15m.tsv", rows, head=("Path", "Title", "DESCRIPTION"))
    check(open_captioned("yfcc15m", folder, "train"), [["boat", "a boat at sea"], "only this"])
    rows = [("0.png", ["a", "b"], None), ("1.png", None, "c")]
    check(table(folder, "p.jsonl", rows, ("image", "captions", "title")), [["a", "b"], "c"])


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_tells_the_encoding(folder, codec):
    for name, text in [("t.csv", "path,caption\n0.png,café\n"), ("t.tsv", "path\tcaption\n0.png\tcafé\n")]:
        check(written(folder, name, text.encode(codec)), ["café"])
    check(written(folder, "t.jsonl", '{"path": "0.png", "text": "café"}\n'.encode(codec)), ["café"])
    (folder / "f").mkdir()
    (folder / "0.png").rename(folder / "f/0.png")
    (folder / "f/0.TXT").write_bytes("café".encode(codec))
    check(open_captioned("f", folder, "train"), ["café"])


def test_semicolons_blank_lines_backslashes_and_absolute_paths_are_understood(folder):
    (folder / "sub").mkdir()
    (folder / "0.png").rename(folder / "sub/0.png")
    text = f"caption;file\r\na, b;sub\\0.png\r\n\r\nb;{folder}/1.png\r\n\r\n"
    check(written(folder, "p.csv", text), ["a, b", "b"])


BAD = {  # file: (content, what the sentence says)
    "no-path.tsv": ("name\tcaption\nx\ta\n", r"row 1: columns \['name', 'caption'\]: expected one of"),
    "no-key.jsonl": ('{"path": "0.png", "text": "a"}\n{"path": "0.png"}\n', "row 2: columns .*'path'"),
    "no-text.jsonl": ('{"path": "0.png", "text": 7}\n', "row 1: expected text under path and caption"),
    "list.jsonl": ("[1, 2]\n", "row 1: expected text under path and caption"),
    "not.jsonl": ('{"path": "0.png", "text": "a"}\n{path: 1}\n', "row 2: Expecting"),
    "empty.tsv": ("", "holds no images"),
    "break.tsv": ('path\tcaption\n0.png\t"a\nb"\n', "row 3: found 1 columns.* line break .* wants CSV"),
    "nowhere.tsv": ("path\tcaption\nx/y.png\ta\n", "no image .*x/y.png: paths are relative"),
    "open.csv": ('path,caption\n0.png,a\n1.png,"b\n2.png,c\n3.png,d\n', "row 3: unexpected end"),
    "late.csv": ('path,caption\n0.png,"a\n1.png,b\n2.png,c"\n3.png,d\n', "row 2: a cell holds other rows"),
    "late2.csv": ('caption,path\n"a,0.png\nb",1.png\n3,3.png\n', "row 2: a cell holds other rows"),
    "cp1252.csv": ("path,caption\n0.png,a\n1.png,café\n".encode("cp1252"), "row 3, '1.png': not UTF-8"),
    "Train_GCC-training.tsv": ("a cup of tea\thttp://x/a.jpg\n", "row 1: these are links.*img2dataset"),
    "cc12m.tsv": ("https://x/a.jpg\ta cup of tea\n", "these are links.*KEY.jpg, KEY.txt"),
    "torn.tar": (b"\0" * 100, "torn.tar is truncated, damaged or not an uncompressed tar file"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_sentence_with_its_row(folder, name):
    content, sentence = BAD[name]
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        written(folder, name, content)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_folder_of_images_and_texts_gives_a_caption_a_line_and_counts_what_it_passes_over(folder):
    photos, other = folder / "photos", folder / "other"
    photos.mkdir()
    other.mkdir()
    for i, place in enumerate([photos / "0.PNG", photos / "1.png", other / "2.png"]):
        (folder / f"{i}.png").rename(place)
    (photos / "linked").symlink_to(other)
    (other / "back").symlink_to(photos)
    (photos / "0.txt").write_bytes(b"first\r\n\r\nsecond")
    (photos / "1.TXT").write_text("one")
    (other / "2.txt").write_text("x")
    for name in ("._0.png", "._0.txt", ".DS_Store", "Thumbs.db"):
        (photos / name).write_bytes(b"\0\5\x16\7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(open_captioned("photos", folder, "train"), [["first", "second"], "one", "x"])
    (photos / "3.heic").write_bytes(b"")
    with pytest.warns(UserWarning, match="passed over 1 unpaired files, as .*3.heic"):
        open_captioned(str(photos), "data", "train")
    (photos / "1.TXT").write_bytes("café".encode("cp1252"))
    with pytest.raises(ValueError, match="1.png.*not UTF-8"):
        open_captioned("photos", folder, "train")
    assert open_captioned("other/nothing", folder, "train") is None


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(content), 0.5  # a broken second: a pax header, as in practice
            tar.addfile(entry, io.BytesIO(content))
    return path


def shard_set(folder, size=3):
    files = []
    for i, caption in enumerate(CAPTIONS[:-1]):
        text = "txt" if i != 1 else "cls"  # the caption of one is in its JSON alone
        files += [(f"{i:04}.png", (folder / f"{i}.png").read_bytes()), (f"{i:04}.{text}", caption.encode())]
        files.append((f"{i:04}.json", json.dumps({"status": "success", "caption": caption}).encode()))
    for number, start in enumerate(range(0, len(files), 3 * size)):
        shard(folder / f"{number:05}.tar", files[start : start + 3 * size])
    return folder


@pytest.mark.parametrize("pattern", ["/{00000..00001}.tar", "/*.tar", ""])
def test_shards_give_their_images_and_captions_pickled_too(folder, pattern):
    (folder / "._00000.tar").write_bytes(b"what a Mac leaves")
    source = open_captioned(f"{shard_set(folder)}{pattern}", "data", "train")
    check(pickle.loads(pickle.dumps(source)), CAPTIONS[:-1])
    assert source.where(3).startswith(f"{folder}/00001.tar:0003.png:")


def test_a_shard_is_gone_through_once_and_again_when_it_changes(folder, monkeypatch):
    name, calls, read_tar = f"{shard_set(folder)}/*.tar", [], captioned.read_tar
    monkeypatch.setattr(captioned, "read_tar", lambda path: calls.append(path) or read_tar(path))
    for _ in range(2):
        check(open_captioned(name, "data", "train"), CAPTIONS[:-1])
    assert len(calls) == 2
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes() + bytes(512))
    assert open_captioned(name, "data", "train")[3][1] == [CAPTIONS[0]] and len(calls) == 3
    (folder / "00000.tar.places").write_bytes(b"torn")
    check(open_captioned(f"{folder}/00000.tar", "data", "train"), CAPTIONS[:3])


def test_there_may_be_more_shards_than_files_may_be_open(folder):
    resource = pytest.importorskip("resource")
    image, (soft, hard) = (folder / "0.png").read_bytes(), resource.getrlimit(resource.RLIMIT_NOFILE)
    for i in range(300):
        shard(folder / f"{i:05}.tar", [("a.png", image), ("a.txt", f"red {i}".encode())])
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))  # as on macOS
    try:
        check(open_captioned(f"{folder}/*.tar", "data", "train"), [f"red {i}" for i in range(300)], [0] * 300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_hidden_files_of_a_shard_are_none_and_keys_without_caption_are_counted(folder):
    image = (folder / "0.png").read_bytes()
    names = ["._a.png", ".DS_Store", "d/a.PNG", "d/a.TXT", "b.png", "c.heic", "c.txt", "._b.txt"]
    shard(folder / "s.tar", [(n, image if n.lower().endswith("png") else b"text") for n in names])
    with pytest.warns(UserWarning, match="passed over 2 keys"):
        check(open_captioned(f"{folder}/s.tar", "data", "train"), ["text"])


def test_a_shard_that_is_truncated_anywhere_is_refused(folder):
    path = shard_set(folder, size=5) / "00000.tar"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    content, third = path.read_bytes(), members[6]
    for end in (third.offset, third.offset + 100, third.offset_data, third.offset_data + 60):
        path.write_bytes(content[:end])
        with pytest.raises(OSError, match="00000.tar is truncated, damaged or"):
            open_captioned(str(path), "data", "train")
    path.write_bytes(content[: third.offset] + b"x" + content[third.offset + 1 :])  # no header
    with pytest.raises(OSError, match="damaged"):
        open_captioned(str(path), "data", "train")
    with pytest.raises(FileNotFoundError, match="00001.tar"):
        open_captioned(f"{folder}/{{00001..00003}}.tar", "data", "train")


def test_coco_gives_all_captions_of_an_image_and_its_validation_split(folder):
    coco = folder / "coco"
    (coco / "annotations").mkdir(parents=True)
    images = [{"id": 70 + i, "file_name": f"{i}.png"} for i in range(3)]
    notes = [{"image_id": i, "caption": c} for i, c in [(70, "a"), (71, "b"), (71, "c")]]
    for part in ("train2017", "val2017"):
        (coco / part).symlink_to(folder)
        path = coco / f"annotations/captions_{part}.json"
        path.write_text(json.dumps({"images": images, "annotations": notes}))
    check(open_captioned("coco", folder, "train"), ["a", ["b", "c"]])
    check(open_captioned("coco", folder, "test"), ["a", ["b", "c"]])


def test_only_a_known_folder_with_a_test_table_has_a_test_split(folder):
    (folder / "cc3m").mkdir()
    with pytest.raises(FileNotFoundError, match="no cc3m: expected a table .*cc3m.tsv or shards"):
        open_captioned("cc3m", folder, "train")
    table(folder, "cc3m/cc3m.tsv", [("../0.png", "a")])
    with pytest.raises(FileNotFoundError, match="zeroshot.py --checkpoint FILE --retrieval --data cc3m$"):
        open_captioned("cc3m", folder, "test")
    table(folder, "cc3m/cc3m-test.tsv", [("../1.png", "b")])
    check(open_captioned("cc3m", folder, "test"), ["b"], numbers=[1])
    check(open_captioned("cc3m", folder, "train"), ["a"])


@pytest.mark.skipif(not EMOJI.exists(), reason="the shards of emoji are not beside the repository")
def test_the_emoji_are_read_whole():
    source = open_captioned(str(EMOJI), "data", "train")
    captions = {caption for i in range(len(source)) for caption in source.label(i)}
    assert source[1905][0].size == (64, 64) and {"grinning face", "wales flag"} <= captions
