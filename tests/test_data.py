"""Data: odd pictures against pixels known by construction, bad ones against what replaces them, samples
against themselves in another order, ranks against one process, sets made in a temporary folder.

    pytest tests/test_data.py
"""

import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import ranks
import sets
import tasks

RED, WHITE = (255, 0, 0), (255, 255, 255)
EMOJI = Path(__file__).parents[2] / "shared/data/emoji-noto.tar"


# Odd pictures


def stored(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return file


def two_pixels(mode, left, right):
    picture = Image.new(mode, (2, 1))
    picture.putpixel((0, 0), left)
    picture.putpixel((1, 0), right)
    return picture


def palette():
    picture = Image.new("P", (2, 1))
    picture.putpalette([*RED, 0, 0, 255])
    picture.putpixel((1, 0), 1)
    return picture


ODD = {  # name: (file, left pixel, right pixel) once read
    "palette": lambda: (stored(palette()), RED, (0, 0, 255)),
    "palette with a transparent entry": lambda: (stored(palette(), transparency=0), WHITE, (0, 0, 255)),
    "alpha": lambda: (stored(two_pixels("RGBA", (*RED, 128), (*RED, 0))), (255, 127, 127), WHITE),
    "grey": lambda: (stored(two_pixels("L", 7, 200)), (7, 7, 7), (200, 200, 200)),
    "grey with a transparent value": lambda: (
        stored(two_pixels("L", 7, 200), transparency=7),
        WHITE,
        (200, 200, 200),
    ),
    "grey with alpha": lambda: (stored(two_pixels("LA", (0, 255), (0, 51))), (0, 0, 0), (204, 204, 204)),
    "one bit": lambda: (stored(two_pixels("1", 0, 1)), (0, 0, 0), WHITE),
    "16 bits": lambda: (
        stored(Image.fromarray(np.array([[257 * 9, 257 * 200]], np.uint16))),
        (9, 9, 9),
        (200, 200, 200),
    ),
    "CMYK": lambda: (stored(two_pixels("CMYK", (0, 255, 255, 0), (0, 0, 0, 0)), "TIFF"), RED, WHITE),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_read_as_rgb(name):
    file, left, right = ODD[name]()
    picture = data.read_picture(file)
    assert picture.mode == "RGB" and picture.size == (2, 1)
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (left, right)


def test_rgb_with_a_transparent_colour_is_laid_on_white():
    picture = data.read_picture(stored(two_pixels("RGB", RED, (0, 0, 255)), transparency=RED))
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (WHITE, (0, 0, 255))


def test_a_cmyk_jpeg_keeps_its_colours():
    picture = data.read_picture(stored(Image.new("CMYK", (16, 16), (20, 200, 120, 0)), "JPEG", quality=95))
    assert np.abs(np.array(picture, int) - (235, 55, 135)).max() <= 3  # JPEG's rounding of a flat colour


def test_the_small_values_of_a_16_bit_picture_are_not_stretched():
    picture = data.read_picture(stored(Image.fromarray(np.full((3, 3), 2570, np.uint16))))
    assert picture.getpixel((1, 1)) == (10, 10, 10)


def test_a_picture_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    picture = data.read_picture(stored(two_pixels("RGB", RED, (0, 0, 255)), exif=exif))
    assert picture.size == (1, 2)
    assert (picture.getpixel((0, 0)), picture.getpixel((0, 1))) == (RED, (0, 0, 255))


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 255))]
    file = stored(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(file).n_frames == 2
    assert data.read_picture(file).getpixel((2, 2)) == RED


def test_a_picture_of_one_pixel_makes_every_view():
    picture = data.read_picture(stored(Image.new("L", (1, 1), 9)))
    sample = views([picture], ["dot"])[(0, 0), (0, 0)]
    assert all((sample[name] == 9).all() and sample[name].shape == (3, 8, 8) for name in ("images", "view1"))


@pytest.mark.skipif(not EMOJI.is_file(), reason=f"no {EMOJI}")
def test_real_emoji_are_laid_on_white():
    with tarfile.open(EMOJI) as tar:
        names = [name for name in tar.getnames() if name.endswith(".png")][::100]
        files = [io.BytesIO(tar.extractfile(name).read()) for name in names]
    clear = 0
    for file in files:
        pixels = np.asarray(Image.open(file).convert("RGBA"), float)
        alpha = pixels[..., 3:] / 255
        expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
        clear += (alpha == 0).sum()
        assert np.abs(np.asarray(data.read_picture(file), float) - expected).max() <= 1  # rounding to bytes
    assert len(names) == 20 and clear > 1000


# Bad pictures: a folder of plain colours, picture i captioned "colour i": a sample tells where it is from


def views(pictures, captions, other=None, seed=0, **changes):
    source = pictures if isinstance(pictures, data.Source) else data.Source("toy", List(pictures, captions))
    settings = dict(light_crop=0.5, strong_crop=0.3, language=True, pair=(augment.SIMCLR, augment.SIMCLR))
    return data.Views(source, other, image_size=8, seed=seed, **settings | changes)


class List(data.Dataset):
    def __init__(self, pictures, targets):
        self.pictures, self.targets = pictures, targets

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index], self.targets[index]


GOOD = 12


def spoilt(how, path):
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        path.write_bytes(stored(Image.fromarray(noise)).getvalue()[:2000])
    elif how == "not a picture":
        path.write_text("<html>404</html>")
    elif how == "a bomb":
        Image.new("RGB", (100, 100)).save(path)
    elif how == "missing":
        pass
    else:  # EXIF that turns the picture, and says in letters how wide it is: Pillow fails when it rewrites it
        width = struct.pack("<HHI4s", 0x0100, 2, 4, b"abc\0")
        turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + width + turned + bytes(4)
        Image.new("RGB", (8, 8)).save(path, "JPEG", exif=exif)


def folder_with(how, tmp_path):
    """12 plain pictures and a bad one, the last."""
    paths, captions = [], []
    for i in range(GOOD):
        paths.append(str(tmp_path / f"{i}.png"))
        captions.append(f"colour {i}")
        Image.new("RGB", (9, 9), (20 * i, 20 * i, 20 * i)).save(paths[-1])
    spoilt(how, bad := tmp_path / "bad.png")
    return data.Source("toy", data.Files([*paths, str(bad)], [*captions, "the bad one"])), str(bad)


BAD = {
    "empty": "UnidentifiedImageError",
    "cut short": "OSError",
    "not a picture": "UnidentifiedImageError",
    "a bomb": "DecompressionBombError",
    "missing": "FileNotFoundError",
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # a bomb half as large warns
@pytest.mark.parametrize("how", [*BAD, "EXIF that is broken"])
def test_a_bad_picture_is_replaced_by_another_pair_and_named(tmp_path, monkeypatch, how):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # what is more than twice as large is a bomb
    source, bad = folder_with(how, tmp_path)
    sample = views(source, None)[(0, GOOD), (0, GOOD)]
    (line,) = sample["skipped"]
    assert line.startswith(f"{bad}\t{BAD.get(how, '')}") and "\n" not in line
    number = int(sample["caption"].split()[-1])
    assert all((sample[name] == 20 * number).all() for name in ("images", "view1", "view2"))


def test_the_replacement_is_a_function_of_seed_epoch_and_index(tmp_path):
    source, _ = folder_with("empty", tmp_path)

    def captions(seed):
        return [views(source, None, seed=seed)[(epoch, GOOD), (epoch, GOOD)]["caption"] for epoch in range(8)]

    assert captions(0) == captions(0)
    assert captions(0) != captions(1) and len(set(captions(0))) > 1


def test_the_picture_without_caption_is_replaced_too(tmp_path):
    source, bad = folder_with("empty", tmp_path)
    sample = views([Image.new("RGB", (9, 9), RED)], ["red"], other=source)[(0, 0), (0, GOOD)]
    assert [line.split("\t")[0] for line in sample["skipped"]] == [bad]
    assert sample["caption"] == "red" and sample["view1"][0, 0, 0] % 20 == 0


def test_nothing_but_bad_pictures_is_one_sentence(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    source = data.Source("toy", data.Files([str(tmp_path / "bad.png")], ["bad"]))
    with pytest.raises(ValueError, match="20 pictures in a row cannot be read.*bad.png.*right folder"):
        views(source, None)[(0, 0), (0, 0)]


@pytest.mark.parametrize("how", ["empty", "cut short"])
def test_a_bad_picture_in_a_test_set_is_an_error_that_names_it(tmp_path, how):
    source, bad = folder_with(how, tmp_path)
    with pytest.raises(ValueError, match="a test set must be whole") as error:
        data.Labelled(source, 8)[GOOD]
    assert bad in str(error.value) and "\n" not in str(error.value)


# Samples, order, shares


def noise(count):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)) for _ in range(count)]


def same(a, b):
    assert a.keys() == b.keys()
    return all(np.array_equal(np.asarray(a[name]), np.asarray(b[name])) for name in a)


def test_a_sample_does_not_depend_on_other_samples_or_their_order():
    captions = [[f"{word} {i}" for word in ("a", "the", "my")] for i in range(6)]
    keys = [((epoch, i), (epoch, i)) for epoch in range(2) for i in range(6)]
    dataset = views(noise(6), captions)
    forward = {key: dataset[key] for key in keys}
    backward = {key: views(noise(6), captions)[key] for key in reversed(keys)}
    assert all(same(forward[key], backward[key]) for key in keys)


def test_epoch_index_and_seed_each_change_a_sample():
    pictures, key = noise(2), ((0, 0), (0, 0))
    first = views(pictures, ["a", "a"])[key]
    others = [views(pictures[:1] * 2, ["a", "a"])[k] for k in [((1, 0), (1, 0)), ((0, 1), (0, 1))]]
    others.append(views(pictures, ["a", "a"], seed=1)[key])
    for other in others:
        assert not any(np.array_equal(first[n], other[n]) for n in ("images", "view1", "view2_params"))
    assert not np.array_equal(first["view1"], first["view2"])


def test_the_strong_views_of_another_picture_do_not_depend_on_the_caption_beside_it():
    other = data.Source("toy", List(noise(4), "abcd"))
    dataset = views(noise(6), ["a"] * 6, other=other)
    first, second = dataset[(0, 0), (3, 2)], dataset[(5, 1), (3, 2)]
    names = ("view1", "view2", "view1_params", "view2_params")
    assert all(np.array_equal(first[name], second[name]) for name in names)
    assert not np.array_equal(first["images"], second["images"])


def test_the_caption_does_not_change_with_self_supervision():
    """So the ablation CLIP against SLIP sees the same pairs and the same light crops."""
    captions = [[f"{word} {i}" for word in ("a", "the", "my")] for i in range(6)]
    both, alone = views(noise(6), captions), views(noise(6), captions, pair=None)
    for i in range(6):
        one, other = both[(0, i), (0, i)], alone[(0, i), (0, i)]
        assert one["caption"] == other["caption"] and torch.equal(one["images"], other["images"])
        assert not {"view1", "view2"} & other.keys()


def test_beit_has_one_view_and_hides_patches_of_it():
    dataset = views(noise(3), "abc", pair=data.PAIRS["beit"], patch=2)
    names = ["caption", "images", "skipped", "view1", "view1_mask", "view1_params"]
    samples = [dataset[(epoch, 0), (epoch, 0)] for epoch in range(3)]
    assert sorted(samples[0]) == names
    grid = samples[0]["view1"].shape[1] // 2
    assert all(sample["view1_mask"].sum() == round(0.4 * grid**2) for sample in samples)
    assert not np.array_equal(samples[0]["view1_mask"], samples[1]["view1_mask"])
    ready = data.device_views(
        {n: v for n, v in data.collate(samples).items() if n not in ("caption", "skipped")}
    )
    assert ready["view1_mask"].dtype == torch.bool and ready["view1_mask"].shape == (3, grid**2)


def test_a_second_view_for_the_language_loss_is_drawn_anew_and_the_first_stays():
    one, two = views(noise(2), "ab"), views(noise(2), "ab", clip_views=2)
    first, both = one[(0, 1), (0, 1)], two[(0, 1), (0, 1)]
    assert torch.equal(first["images"], both["images"]) and not torch.equal(both["images"], both["images2"])
    assert first["caption"] == both["caption"] and torch.equal(first["view1"], both["view1"])


def test_self_supervision_alone_reads_no_caption():
    sample = views(noise(1), ["a"], language=False)[(0, 0), (0, 0)]
    assert sorted(sample) == ["skipped", "view1", "view1_params", "view2", "view2_params"]


def test_clip_may_see_a_strong_view():
    dataset = views(noise(1), ["a"], pair=None, clip_strong=augment.SIMCLR)
    batch = data.collate([dataset[(e, 0), (e, 0)] for e in range(3)])
    ready = data.device_views({name: batch[name] for name in ("images", "images_params")})
    assert torch.equal(ready["images"], augment.strong(batch["images"], batch["images_params"]))


def test_a_class_is_captioned_by_its_templates_and_names():
    source = data.Source("fashionmnist", List(noise(2), [0, 1]), ["bag", ["shoe", "boot"]])
    said = [{views(source, None)[(e, i), (e, i)]["caption"] for e in range(80)} for i in range(2)]
    templates = tasks.captions("fashionmnist")
    assert said[0] == {template.format("bag") for template in templates}
    assert said[1] == {template.format(name) for template in templates for name in ("shoe", "boot")}


def test_one_of_several_captions_is_drawn_each_epoch():
    dataset = views(noise(1), [["title", "description"]], pair=None)
    said = [dataset[(e, 0), (e, 0)]["caption"] for e in range(100)]
    assert 30 <= said.count("title") <= 70  # a fair coin leaves this once in 30,000 times


def test_collate_stacks_views_and_lists_captions_and_bad_pictures():
    samples = [
        {"skipped": list("ab"[:i]), "caption": str(i), "images": torch.full((3, 2, 2), i)} for i in (1, 2)
    ]
    batch = data.collate(samples)
    assert batch["skipped"] == ["a", "a", "b"] and batch["caption"] == ["1", "2"]
    assert batch["images"].shape == (2, 3, 2, 2)


def test_the_device_makes_light_and_strong_views_and_leaves_tokens_alone():
    rng = np.random.default_rng(0)
    crops = torch.from_numpy(rng.integers(0, 255, (4, 3, 8, 8), dtype=np.uint8))
    params = torch.from_numpy(np.stack([augment.draw(rng, augment.SIMCLR) for _ in range(4)]))
    chunk = {"images": crops, "view1": crops, "view1_params": params, "tokens": torch.ones(4, 2).long()}
    ready = data.device_views(chunk)
    assert list(ready) == ["images", "view1", "tokens"] and torch.equal(ready["tokens"], chunk["tokens"])
    assert torch.equal(ready["images"], augment.normalise(crops))
    assert torch.equal(ready["view1"], augment.strong(crops, params))


@pytest.mark.parametrize("count, batch", [(23, 5), (20, 5), (7, 7)])
def test_an_epoch_is_a_permutation_with_its_last_part_dropped(count, batch):
    steps, seen = count // batch, []
    for epoch in range(3):
        batches = [data.order(count, batch, 0, epoch * steps + i) for i in range(steps)]
        assert {e for e, _ in batches} == {epoch} and all(len(b) == batch for _, b in batches)
        indices = np.concatenate([b for _, b in batches])
        assert len(set(indices)) == steps * batch and set(indices) <= set(range(count))
        seen.append(indices.tolist())
    assert len(set(map(tuple, seen))) == 3
    assert data.order(count, batch, 0, 0)[1].tolist() != data.order(count, batch, 1, 0)[1].tolist()


@pytest.mark.parametrize("other_count", [None, 31])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_cut_the_same_global_batch(monkeypatch, world, other_count):
    whole = list(data.Batches(23, other_count, 7, 0, range(2, 9), list))
    monkeypatch.setattr(ranks, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        batches = data.Batches(23, other_count, 7, 0, range(2, 9), ranks.mine)
        assert len(batches) == 7
        shares.append(list(batches))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == whole


def test_two_sets_each_keep_their_own_epochs():
    batches = list(data.Batches(8, 20, 4, 0, range(5), list))
    epochs = [(batch[0][0][0], batch[0][1][0]) for batch in batches]
    assert epochs == [(0, 0), (0, 0), (1, 0), (1, 0), (2, 0)]  # 2 steps an epoch, and 5
    others = [key[1][1] for batch in batches for key in batch]
    assert sorted(others) == list(range(20))
    assert all(key[0] == key[1] for batch in data.Batches(8, None, 4, 0, range(5), list) for key in batch)


def test_a_run_that_goes_on_gets_the_batches_it_would_have_got():
    whole = list(data.Batches(23, None, 7, 0, range(9), list))
    assert whole[4:] == list(data.Batches(23, None, 7, 0, range(4, 9), list))


@pytest.mark.parametrize("count", [1, 19, 20, 7777, 100_000])
def test_what_is_held_out_is_disjoint_and_at_most_a_twentieth(count):
    rest, held = data.holdout(count, seed=0)
    assert sorted([*rest, *held]) == list(range(count))
    assert len(held) == min(2000, count // 20)
    assert np.array_equal(data.holdout(count, seed=0)[1], held)


def test_a_part_of_a_part_keeps_pictures_labels_and_names(tmp_path):
    source, _ = folder_with("empty", tmp_path)
    some = data.part(data.part(source, [7, 3, 5]), [2, 0])
    assert [some.label(i) for i in range(len(some))] == ["colour 5", "colour 7"]
    assert some[1][0].getpixel((0, 0)) == (140, 140, 140) and some.where(0).endswith("5.png")


def test_strings_give_back_what_was_put_in():
    strings = ["", "a", "naïve café", "猫", "🏠", "line\nbreak", os.fsdecode(b"caf\xe9.jpg"), ""]
    kept = data.Strings(strings)
    assert [kept[i] for i in range(len(kept))] == strings
    assert len(data.Strings([])) == 0


# Sets in folders


def fill(folder, *names, count=1):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (10 * i, 0, 0)).save(folder / name / f"{i}.JPEG")


def test_a_folder_of_classes_is_a_set(tmp_path):
    """One that torchvision knows in another layout, too."""
    fill(tmp_path / "pets/train", "tabby_cat", "dog", count=2)
    fill(tmp_path / "pets/val", "tabby_cat", "dog")
    (tmp_path / "pets/train/dog/notes.txt").write_text("no picture")
    (tmp_path / "pets/train/dog/more").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pets/train/dog/more/0.PNG")
    train = sets.open_source("pets", tmp_path, "train")
    assert train.classes == ["dog", "tabby cat"]
    assert [train.label(i) for i in range(len(train))] == [0, 0, 0, 1, 1]
    assert train[4][0].mode == "RGB" and train[4][1] == 1
    assert len(sets.open_source("pets", tmp_path, "test")) == 2  # val, where there is no test


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    fill(tmp_path / "pets/train", "dog")
    os.rename(tmp_path / "pets/train/dog/0.JPEG", os.fsencode(tmp_path / "pets/train/dog") + b"/caf\xe9.JPEG")
    assert sets.open_source("pets", tmp_path)[0][0].size == (4, 4)


@pytest.mark.parametrize("below", ["", "imagenet"])
def test_folders_of_imagenet_may_be_words(tmp_path, below):
    for split in ("train", "val"):
        fill(tmp_path / below / split, "great-white_shark", "axolotl")
    for split in ("train", "test"):
        source = sets.open_source("imagenet", tmp_path, split)
        assert source.classes == ["axolotl", "great white shark"] and source.label(1) == 1


def imagenet(tmp_path, mapping=None):
    fill(tmp_path / "val", "n01440764", "n02123045")
    if mapping is not None:
        (tmp_path / "LOC_synset_mapping.txt").write_text(mapping, encoding="utf-8")
    return sets.open_source("imagenet", tmp_path, "test")


def test_imagenets_mapping_names_the_folders(tmp_path):
    mapping = "n02123045 tabby, tabby cat\nn09999999 of no folder\n\nn01440764 tench, Tinca tinca\n"
    assert imagenet(tmp_path, mapping).classes == ["tench", "tabby"]


def test_a_folder_without_a_line_in_the_mapping_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no line for n02123045.*1 missing.*add"):
        imagenet(tmp_path, "n01440764 tench, Tinca tinca\n")


def test_wordnet_ids_without_a_mapping_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="n01440764.*add .*LOC_synset_mapping"):
        imagenet(tmp_path)


def test_a_thousand_wordnet_ids_are_imagenets_classes(tmp_path):
    names = sets.imagenet_names(tmp_path, [f"n{i:08}" for i in range(1000)])
    assert len(names) == 1000 and (names[0], names[999]) == ("tench", "toilet tissue")


@pytest.mark.parametrize(
    "name, split, sentence",
    [
        ("imagenet", "train", "no ImageNet at .*train: put .*<wnid>"),
        ("imagenet", "test", "no ImageNet at .*val"),
        ("fashionmnist", "train", "no FashionMNIST under .*: type .* --download --data fashion"),
        ("cub200", "test", "no cub200 under .*: put its pictures .Caltech-UCSD Birds"),
        ("cifar10", "test", "no CIFAR10 under"),
        ("nothere", "train", "unknown --data 'nothere': expected a set that .* --list shows, .* folder"),
        ("scenes-nothere", "train", "unknown --data 'scenes-nothere'"),
        ("scenes", "val", "unknown split 'val': expected train or test"),
        ("halfset", "test", "no test split in .*halfset"),
        ("emptyset", "train", "no pictures under"),
    ],
)
def test_a_set_that_is_not_there_is_one_sentence(tmp_path, name, split, sentence):
    fill(tmp_path / "halfset/train", "dog")
    (tmp_path / "emptyset/train/dog").mkdir(parents=True)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        sets.open_source(name, tmp_path, split)
    assert "\n" not in str(error.value)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 40, "test": 60})
    sets.drawn.cache_clear()
    yield
    sets.drawn.cache_clear()


def test_scenes_are_captioned_for_training_and_labelled_for_testing(few_scenes):
    train, test = sets.open_source("scenes"), sets.open_source("scenes", split="test")
    assert train.classes is None and isinstance(train[0][1], str) and train[0][0].size == (32, 32)
    assert len(test.classes) == 12 and isinstance(test[0][1], int)
    assert [sets.open_source(f"scenes-{n}", split="test").classes[0] for n in ("colour", "texture")] == [
        "red",
        "plain",
    ]


def test_the_held_out_scenes_are_pairs_that_training_never_names(few_scenes):
    held = sets.open_source("scenes-heldout", split="test")
    named = {held.classes[held.label(i)] for i in range(len(held))}
    assert 0 < len(held) < 60 and len(held.classes) == 96
    pairs = {f"{colour} {kind}" for kind, colour in sets.scenes.HELD_OUT.items()}
    assert named <= pairs
