"""Captioned sets: each format against what was written; what is wrong, by line or key.

pytest tests/test_captioned.py
"""

import csv
import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torchvision
from PIL import Image

import captioned
import data
import sets
import train

CAPTIONS = ["a red, round cup", 'the "big" house', "naïve café\u2028", "猫 🏠", "plain", ""]


@pytest.fixture
def pictures(tmp_path):
    """Six pictures, each of one grey that tells its number."""
    for i in range(len(CAPTIONS)):
        Image.new("RGB", (8, 8), (40 * i,) * 3).save(tmp_path / f"{i}.png")
    return tmp_path


def check(source, captions=CAPTIONS):
    assert len(source) == len(captions) and source.classes is None
    for i, caption in enumerate(captions):
        picture, found = source[i]
        assert picture.getpixel((3, 3)) == (40 * i,) * 3
        assert found == source.label(i)
        assert (found if isinstance(found, list) else [found]) == (
            caption if isinstance(caption, list) else [caption]
        )


def table(folder, name, head=True):
    rows = [[f"{i}.png", caption] for i, caption in enumerate(CAPTIONS)]
    path = folder / name
    if name.endswith("jsonl"):
        lines = [json.dumps({"caption": caption, "image_path": file}) for file, caption in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif name.endswith("tsv"):
        lines = ["\t".join(row) for row in ([["filepath", "title"]] if head else []) + rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(([["file", "text"]] if head else []) + rows)
    return path


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.csv", "pairs.jsonl"])
@pytest.mark.parametrize("head", [True, False])
def test_a_table_gives_its_pictures_and_captions(pictures, name, head):
    check(sets.open_source(str(table(pictures, name, head))))


def test_a_line_break_between_quotes_belongs_to_its_row(pictures):
    path, captions = pictures / "pairs.csv", ["one\nand two", 'a "quoted\n" one', "last"]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["path", "caption"], *([f"{i}.png", c] for i, c in enumerate(captions))])
    check(sets.open_source(str(path)), captions)


def test_blank_lines_at_the_end_semicolons_and_quotes_in_a_tsv_are_understood(pictures):
    for text in ("path;text\n0.png;a\n1.png;b\n\n", 'path\ttext\r\n0.png\ta\r\n1.png\t"b"\r\n\r\n'):
        (pictures / "pairs.csv").write_bytes(text.encode())
        check(sets.open_source(str(pictures / "pairs.csv")), ["a", "b"])


def test_a_path_may_lead_into_a_zip_file(pictures):
    with zipfile.ZipFile(pictures / "123.zip", "w") as file:
        file.write(pictures / "0.png", "456.png")
    (pictures / "pairs.tsv").write_text("path\ttitle\n123.zip/456.png\ta\n")
    check(sets.open_source(str(pictures / "pairs.tsv")), ["a"])


def test_title_and_description_are_two_captions_and_an_empty_one_is_left_out(pictures):
    (pictures / "yfcc15m").mkdir()
    rows = ["path\ttitle\tdescription", "../0.png\tboat\ta boat at sea", "../1.png\t\tonly this"]
    (pictures / "yfcc15m/yfcc15m.tsv").write_text("\n".join(rows))
    check(sets.open_source("yfcc15m", pictures), [["boat", "a boat at sea"], ["only this"]])


def test_each_of_several_captions_is_drawn(pictures):
    (pictures / "p.jsonl").write_text(json.dumps({"path": "0.png", "caption": ["a", "b", "c"]}) + "\n")
    source = sets.open_source(str(pictures / "p.jsonl"))
    views = data.Views(source, None, image_size=8, seed=0, light_crop=0.5, strong_crop=0.1, language=True,
                       pair=None)  # fmt: skip
    assert {views[((epoch, 0), (epoch, 0))]["caption"] for epoch in range(40)} == {"a", "b", "c"}


def shards(folder, pattern="{:05d}.tar", each=3, form="txt"):
    """The pictures and captions as tar files of three each."""
    for start in range(0, len(CAPTIONS), each):
        with tarfile.open(folder / pattern.format(start // each), "w") as tar:
            for i in range(start, start + each):
                text = CAPTIONS[i] if form == "txt" else json.dumps({"caption": CAPTIONS[i]})
                for name, content in [
                    (f"{i:04}.png", (folder / f"{i}.png").read_bytes()),
                    (f"{i:04}.{form}", text.encode()),
                ]:
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    entry.mtime = 0.5  # a broken second: a pax header, as in practice
                    tar.addfile(entry, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("form", ["txt", "json"])
@pytest.mark.parametrize("pattern", ["{00000..00001}.tar", "*.tar"])
def test_shards_give_their_pictures_and_captions(pictures, pattern, form):
    captions = [c.strip() for c in CAPTIONS] if form == "txt" else CAPTIONS
    check(sets.open_source(f"{shards(pictures, form=form)}/{pattern}"), captions)


def test_shards_are_looked_through_once_and_again_when_they_change(pictures, monkeypatch):
    name, looked, members = f"{shards(pictures)}/*.tar", [], captioned.members
    monkeypatch.setattr(captioned, "members", lambda path: looked.append(path) or members(path))
    first, again = sets.open_source(name), sets.open_source(name)
    assert len(looked) == 2 and np.array_equal(first.items.places, again.items.places)
    assert again.where(4).endswith("00001.tar 0004.png")
    (pictures / "00001.tar").write_bytes((pictures / "00000.tar").read_bytes() + bytes(512))
    changed = sets.open_source(name)
    assert len(looked) == 3 and changed[3][1] == CAPTIONS[0]
    (pictures / "00000.tar.places").write_bytes(b"torn")
    check(sets.open_source(f"{pictures}/00000.tar"), [c.strip() for c in CAPTIONS[:3]])


def test_a_picture_without_caption_is_left_out_of_a_shard(pictures):
    with tarfile.open(pictures / "some.tar", "w") as tar:
        for name in ("1.png", "0.png"):
            tar.add(pictures / name, name)
        tar.add(table(pictures, "pairs.tsv"), "0.txt")
    source = sets.open_source(f"{pictures}/some.tar")
    assert len(source) == 1 and source[0][0].getpixel((0, 0)) == (0, 0, 0)


def test_there_may_be_more_shards_than_files_that_can_be_open(pictures):
    resource = pytest.importorskip("resource", reason="this system has no limits to set")
    shards(pictures)
    for i in range(300):
        (pictures / f"more-{i}.tar").symlink_to(pictures / "00000.tar")
    source, limits = sets.open_source(f"{pictures}/more-*.tar"), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (290, limits[1]))
    try:
        assert {source[i][1] for i in range(0, len(source), 3)} == {CAPTIONS[0]}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_shard_and_a_table_give_the_same_samples(pictures):
    kept = dict(image_size=8, seed=3, light_crop=0.5, strong_crop=0.1, language=True, pair=None)
    names = [str(table(pictures, "pairs.tsv")), f"{shards(pictures)}/*.tar"]
    one, other = (data.Views(sets.open_source(name), None, **kept) for name in names)
    for i in (0, 1, 3, 4):
        a, b = one[((2, i), (2, i))], other[((2, i), (2, i))]
        assert a["caption"] == b["caption"] and (a["images"] == b["images"]).all()


def test_a_caption_may_lie_beside_its_picture(pictures):
    for i in (0, 1):
        (pictures / f"{i}.txt").write_text(["first\n\nsecond", "only"][i])
    check(sets.open_source(pictures.name, pictures.parent), [["first", "second"], ["only"]])


def test_a_text_in_a_folder_of_classes_makes_no_captions_of_it(pictures):
    folder = pictures / "pets/test/dog"
    folder.mkdir(parents=True)
    (pictures / "0.png").rename(folder / "0.png")
    (folder / "notes.txt").write_text("of the photographer")
    assert sets.open_source("pets", pictures, "test").classes == ["dog"]


def test_coco_gives_all_captions_of_a_picture(pictures):
    folder = pictures / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").symlink_to(pictures)
    images = [{"id": 70 + i, "file_name": f"{i}.png"} for i in range(3)]
    notes = [{"image_id": 71, "caption": "b"}, {"image_id": 70, "caption": "a"}]
    notes.append({"image_id": 71, "caption": "c"})
    table = {"images": images, "annotations": notes}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(table))
    check(sets.open_source("coco", pictures), [["a"], ["b", "c"]])


def test_redcaps_is_read_from_its_own_json(pictures):
    (pictures / "redcaps/cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(pictures / "redcaps/cats/x1.jpg")
    rows = {"annotations": [{"image_id": "x1", "subreddit": "cats", "caption": "a cat"}]}
    (pictures / "redcaps/redcaps.json").write_text(json.dumps(rows))
    check(sets.open_source("redcaps", pictures), ["a cat"])


def test_flickr30k_is_read_through_torchvision(pictures):
    folder = pictures / "flickr30k"
    folder.mkdir()
    (folder / "images").symlink_to(pictures)
    (folder / "results_20130124.token").write_text("0.png#0\tone\n0.png#1\ttwo\n1.png#0\tthree\n")
    check(sets.open_source("flickr30k", pictures), [["one", "two"], ["three"]])


BAD = {  # file: (content, what the sentence says)
    "no-path.tsv": ("url\tcaption\nhttp://x\ta\n", r"line 1: no column for the path, found 'url', 'caption'"),
    "no-caption.csv": ("path,width\n0.png,3\n", r"no column for the caption, found 'path', 'width'"),
    "no-key.jsonl": ('{"path": "0.png"}\n', r"no column for the caption, found 'path'"),
    "not.jsonl": ("{path: 1}\n", r"line 1: not JSON"),
    "empty.tsv": ("", "is empty"),
    "head.tsv": ("path\tcaption\n", "no rows"),
    "width.tsv": ("path\tcaption\n0.png\ta\n1.png\tb\tc\n", "line 3: found 3 columns, expected 2"),
    "nowhere.tsv": ("path\tcaption\nx/y.png\ta\n", r"line 2: no picture at .*x/y.png"),
    "short.jsonl": ('{"path": "0.png", "text": "a"}\n{"text": "b"}\n', "line 2: lacks a column .*path"),
    "deep.jsonl": ('{"path": "0.png", "text": "a"}\n' * 400 + "{\n", "line 401: not JSON"),
    "width.csv": (
        "path,caption\n" + '0.png,"a, b"\n' * 5 + "1.png\n0.png,c\n",
        "row 7: found 1 col.*expected 2",
    ),
    "quote.csv": ('path,caption\n0.png,"a\n1.png,b\n', "row 2: a quote is opened and never closed"),
    "inner.csv": ('path,caption\n0.png,a "b, c" d\n', "row 2: found 3 columns, expected 2"),
    "long.csv": (f'path,caption\n0.png,"{"a" * 140_000}"\n', "row 2: not CSV .field larger"),
    "wide.tsv": ("path\tcaption\n".encode("utf-16"), "not text in UTF-8"),
    "x.npy": (b"\x93NUMPY", "x.npy holds pickled objects"),
    "torn.tar": (b"\0" * 100, "not a whole tar|holds no pictures"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_sentence_with_its_line(pictures, name):
    content, sentence = BAD[name]
    (pictures / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        sets.open_source(str(pictures / name))[0]
    assert "\n" not in str(error.value)


def test_shards_that_are_missing_empty_cut_or_bare_are_one_sentence(pictures):
    shards(pictures)
    with pytest.raises(FileNotFoundError, match=r"no shard .*00002.tar \(2 of 4 missing\)"):
        sets.open_source(f"{pictures}/{{00000..00003}}.tar")
    (pictures / "cut.tar").write_bytes((pictures / "00000.tar").read_bytes()[:1500])
    with pytest.raises(ValueError, match="cut.tar"):
        sets.open_source(f"{pictures}/cut.tar")
    with tarfile.open(pictures / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="empty.tar holds no pictures"):
        sets.open_source(f"{pictures}/empty.tar")
    with tarfile.open(pictures / "bare.tar", "w") as tar:
        tar.add(pictures / "0.png", "0.png")
    with pytest.raises(ValueError, match="bare.tar holds 1 pictures, none with its caption"):
        sets.open_source(f"{pictures}/bare.tar")


def test_sbu_is_read_through_torchvision_without_the_photos_that_are_gone(tmp_path, monkeypatch):
    (tmp_path / "sbu/dataset").mkdir(parents=True)
    for name, grey in (("a.png", 0), ("c.png", 40)):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / "sbu/dataset" / name)
    lines = {
        "urls": ["http://x/a.png", "http://x/b.png", "http://y/c.png"],
        "captions": ["one", "two", "three"],
    }
    for what, rows in lines.items():
        (tmp_path / f"sbu/dataset/SBU_captioned_photo_dataset_{what}.txt").write_text("\n".join(rows))
    archive = tmp_path / "sbu/SBUCaptionedPhotoDataset.tar.gz"
    archive.write_bytes(b"what was downloaded")
    with pytest.raises(FileNotFoundError, match="what torchvision.datasets.SBU downloads"):
        sets.open_source("sbu", tmp_path)  # not the archive that it should be
    checksum = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision.datasets.SBU, "md5_checksum", checksum)
    check(sets.open_source("sbu", tmp_path), ["one", "three"])


def test_a_line_of_flickrs_captions_that_is_wrong_is_named(tmp_path):
    (tmp_path / "flickr30k/images").mkdir(parents=True)
    (tmp_path / "flickr30k/results_20130124.token").write_text("0.png#0\tone\n0.png#1 two\n")
    with pytest.raises(ValueError, match="token, line 2: found no picture and caption"):
        sets.open_source("flickr30k", tmp_path)


def test_captions_of_flickr_that_are_not_utf8_are_one_sentence(tmp_path):
    (tmp_path / "flickr30k/images").mkdir(parents=True)
    (tmp_path / "flickr30k/results_20130124.token").write_bytes(b"0.png#0\tcaf\xe9\n")
    with pytest.raises(ValueError, match="not text in UTF-8"):
        sets.open_source("flickr30k", tmp_path)


def test_a_picture_of_flickr8k_that_is_missing_is_one_sentence(tmp_path):
    (tmp_path / "flickr8k/images").mkdir(parents=True)
    page = "<table><a>http://flickr/12/</a><li>one</li></table>"
    (tmp_path / "flickr8k/Flickr_8k.html").write_text(page)
    with pytest.raises(ValueError, match="a picture named in .*html is not in .*images"):
        sets.open_source("flickr8k", tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "flickr8k/images/12_ab.jpg")
    check(sets.open_source("flickr8k", tmp_path), [["one"]])


@pytest.mark.parametrize("name", ["cc3m.npy", "yfcc15m.pkl"])
def test_pickled_objects_are_refused(tmp_path, name):
    folder = tmp_path / name.split(".")[0]
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="pickled objects.*expected .*tsv"):
        sets.open_source(folder.name, tmp_path)


def test_a_wrong_annotation_is_named_by_its_key(tmp_path):
    path = tmp_path / "coco/annotations/captions_train2017.json"
    path.parent.mkdir(parents=True)
    for text, sentence in [
        ("{", "is not JSON"),
        ('{"images": []}', "no list under 'annotations': found images"),
        ('{"images": [], "annotations": [{"caption": "a"}]}', r"annotations\[0\] has no 'image_id'"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            sets.open_source("coco", tmp_path)


def test_rows_end_where_lines_end_also_across_the_pieces_that_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(captioned, "PIECE", 100)
    rng = np.random.default_rng(0)
    lines = [b"x" * int(n) for n in rng.integers(0, 9, 1000)]
    (tmp_path / "lines").write_bytes(b"\n".join(lines))
    ends = captioned.scan(str(tmp_path / "lines"), "\t")[0]
    assert np.array_equal(ends, np.cumsum([len(line) + 1 for line in lines]) - 1)


def test_training_by_table_by_shards_and_by_coco_gives_the_same_losses_without_a_zero_shot_column(
    tmp_path, capsys
):
    """One order, one generator for each sample, one picture each: the logs are equal to the last digit."""
    rng, rows = np.random.default_rng(0), []
    pictures = tmp_path / "coco/train2017"
    pictures.mkdir(parents=True)
    (tmp_path / "coco/val2017").symlink_to(pictures)
    with tarfile.open(tmp_path / "0.tar", "w") as first, tarfile.open(tmp_path / "1.tar", "w") as second:
        for i in range(40):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(pictures / f"{i:02}.png")
            (tmp_path / "text").write_text(f"thing {i}")
            (first if i < 25 else second).add(pictures / f"{i:02}.png", f"{i:02}.png")
            (first if i < 25 else second).add(tmp_path / "text", f"{i:02}.txt")
            rows.append({"id": i, "image_id": i, "file_name": f"{i:02}.png", "caption": f"thing {i}"})
    lines = [f"{pictures}/{row['file_name']}\t{row['caption']}\n" for row in rows]
    (tmp_path / "pairs.tsv").write_text("".join(lines))
    (tmp_path / "coco/annotations").mkdir()
    for part in ("train2017", "val2017"):
        table = json.dumps({"images": rows, "annotations": rows})
        (tmp_path / f"coco/annotations/captions_{part}.json").write_text(table)
    flags = "--model vit_tiny --image-size 16 --vocab train --batch-size 16 --max-steps 3 --workers 0".split()
    logs = []
    for name in (f"{tmp_path}/pairs.tsv", f"{tmp_path}/{{0..1}}.tar", "coco"):
        out = tmp_path / f"run-{len(logs)}"
        assert train.main([*flags, "--data", name, "--root", str(tmp_path), "--out", str(out)]) == 0
        logs.append([{**row, "images_per_s": ""} for row in csv.DictReader(open(out / "log.csv"))])
        assert (out / "best.pt").is_file()
    assert logs[0] == logs[1] == logs[2] and all(row["zeroshot_top1"] == "" for row in logs[0])
    said = capsys.readouterr()
    assert "by the loss on 2 pictures held out" in said.out and "zero-shot" not in said.err
