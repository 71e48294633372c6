"""Data: bad images against what replaces them, samples against themselves in another order or process, shares
of ranks against the whole batch, workers against the main process.

    pytest tests/test_data.py         with signals to whole process groups: pytest -m slow tests/test_data.py
"""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
from text import Tokenizer

HERE = Path(__file__).parents[1]


# Bad images: a folder of plain colours, image i captioned "colour i": a sample tells where it is from

GOOD = 12


def folder_with_a_bad_one(tmp_path, content=b""):
    paths = [str(tmp_path / f"{i}.png") for i in range(GOOD + 1)]
    for i, path in enumerate(paths[:-1]):
        Image.new("RGB", (9, 9), (20 * i,) * 3).save(path)
    if content is not None:
        Path(paths[-1]).write_bytes(content)
    return data.Source("toy", data.Files(paths, [f"colour {i}" for i in range(GOOD + 1)]))


def make_views(source, other=None, seed=0, **changes):
    settings = dict(light_crop=0.5, strong_crop=0.3, language=True, pair=data.PAIRS["simclr"])
    return data.Views(source, other, image_size=8, seed=seed, **settings | changes)


def plain(captions, classes=None):
    """A source in memory; image i is all 20 i."""
    shades = np.arange(len(captions), dtype=np.uint8)[:, None, None, None]
    return data.Source("plain", data.Arrays(20 * shades * np.ones((9, 9, 3), np.uint8), captions), classes)


def half_a_png():
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        file := io.BytesIO(), "PNG"
    )
    return file.getvalue()[:2000]


@pytest.mark.parametrize("content", [b"", half_a_png(), b"<html>404</html>", None])
def test_a_bad_training_image_is_replaced_by_another_pair_and_noted(tmp_path, content):
    source = folder_with_a_bad_one(tmp_path, content)
    sample = make_views(source)[(0, GOOD), (0, GOOD)]
    (line,) = sample["skipped"]
    assert line.startswith(f"{source.where(GOOD)}\t") and "Error: " in line and "\n" not in line
    number = int(sample["caption"].split()[-1])
    assert all((sample[name] == 20 * number).all() for name in ("images", "view1", "view2"))
    again = [make_views(source, seed=seed)[(0, GOOD), (0, GOOD)]["caption"] for seed in (0, *range(8))]
    assert again[0] == again[1] == sample["caption"] and len(set(again)) > 1


def test_the_image_without_caption_is_replaced_too(tmp_path):
    source = folder_with_a_bad_one(tmp_path)
    sample = make_views(plain(["black"]), other=source)[(0, 0), (0, GOOD)]
    assert len(sample["skipped"]) == 1 and sample["caption"] == "black" and sample["images"].max() == 0


def test_twenty_bad_images_in_a_row_are_an_error_in_one_sentence(tmp_path):
    source = data.subset(folder_with_a_bad_one(tmp_path), [GOOD, GOOD])
    with pytest.raises(ValueError, match="20 images in a row .*12.png.*right folder"):
        make_views(source)[(0, 0), (0, 0)]
    views = data.LabelledViews(source, 8, 0, 0.5)
    with pytest.raises(ValueError, match="20 images in a row"):
        views[(0, 0), (0, 0)]
    with pytest.raises(data.Unreadable) as error:  # the same from a worker, without its traceback
        list(data.loader(views, [[((0, 0), (0, 0))]], workers=1))
    assert str(error.value).startswith("20 images in a row")


def test_a_bad_evaluation_image_is_an_error_that_names_it(tmp_path):
    source = folder_with_a_bad_one(tmp_path)
    with pytest.raises(
        data.Unreadable, match="cannot read .*12.png .*: an evaluation set must be whole"
    ) as error:
        data.EvaluationViews(source, 8)[GOOD]
    assert "\n" not in str(error.value)
    view, caption = data.EvaluationViews(source, 8)[3]
    assert view.shape == (3, 8, 8) and (view == 60).all() and caption == "colour 3"


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "many"), OSError(errno.ENOMEM, ""), MemoryError()])
def test_a_shortage_is_no_bad_image(error):
    class Short(data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise error

    source = data.Source("short", Short(), ["thing"])
    samples = (make_views(source), data.LabelledViews(source, 8, 0, 0.5), data.EvaluationViews(source, 8))
    for views in samples:
        with pytest.raises(type(error)):
            views[0 if isinstance(views, data.EvaluationViews) else ((0, 0), (0, 0))]


# Samples


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    source = plain([[f"caption {i}.{k}" for k in range(3)] for i in range(5)])
    views = make_views(source, other=plain([""] * 7), pair=data.PAIRS["beit"], patch=2)
    keys = [((epoch, i), (epoch, i + 2)) for epoch in range(2) for i in range(5)]
    samples = [views[key] for key in keys]
    again = pickle.loads(pickle.dumps(views))  # as a worker that is started anew gets it
    for key, sample in reversed(list(zip(keys, samples))):
        other = again[key]
        assert list(other) == list(sample)
        assert all(np.array_equal(np.asarray(other[name]), np.asarray(sample[name])) for name in sample)
    assert samples[0]["view1_mask"].sum() == round(0.4 * 16)
    params = [tuple(sample["view1_params"]) for sample in samples]
    assert len(set(params)) == len(params)


def test_views_are_those_of_the_losses():
    source = plain(["a", "b"])
    names = ["images", "view1", "view1_params", "view2", "view2_params"]
    assert [n for n in make_views(source)[(0, 1), (0, 1)] if n not in ("skipped", "caption")] == names
    assert list(make_views(source, pair=None)[(0, 1), (0, 1)]) == ["skipped", "caption", "images"]
    assert list(make_views(source, language=False)[(0, 1), (0, 1)]) == ["skipped", *names[1:]]
    both = make_views(source, pair=None, clip_strong=augment.SIMCLR, clip_views=2)[(0, 1), (0, 1)]
    assert list(both)[2:] == ["images", "images_params", "images2", "images2_params"]


def test_a_class_is_captioned_by_its_templates_and_names_and_its_label_comes_along():
    source = plain([0, 1], ["bag", ["shoe", "boot"]])
    views = make_views(source, pair=None, templates=["a {}", "{} {0} {x}"])
    said = [{views[(e, i), (e, i)]["caption"] for e in range(60)} for i in range(2)]
    assert said[0] == {"a bag", "bag {0} {x}"}
    assert said[1] == {"a shoe", "shoe {0} {x}", "a boot", "boot {0} {x}"}
    batch = data.collate([views[(0, i), (0, i)] for i in (1, 0, 1)])
    assert batch["classes"].tolist() == [1, 0, 1] and batch["classes"].dtype == torch.int64


def test_labelled_views_leave_the_generator_of_the_caller_alone():
    def noisy(image):
        return image + torch.rand(image.shape)

    views = data.LabelledViews(plain([4, 5], list("abcdef")), 8, 0, 0.5, noisy)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (views[(0, 1), (0, 1)] for _ in range(2))
    assert torch.equal(first["images"], second["images"]) and first["labels"] == 5
    assert not torch.equal(first["images"], views[(1, 1), (1, 1)]["images"])
    assert torch.equal(before, torch.get_rng_state())


def test_strings_and_subsets_give_back_what_was_put_in():
    strings = ["", "a", "naïve café", "猫", "🏠", "line\nbreak", os.fsdecode(b"caf\xe9.jpg"), ""]
    kept = pickle.loads(pickle.dumps(data.Strings(strings)))
    assert [kept[i] for i in range(len(kept))] == strings and len(data.Strings([])) == 0
    part = data.subset(data.subset(plain(list("abcdefgh")), [7, 3, 5]), [2, 0])
    assert [part.label(i) for i in range(len(part))] == ["f", "h"] and part.where(0) == "plain number 5"
    assert part[1][0].getpixel((0, 0)) == (140, 140, 140) and len(part) == len(part.items) == 2


# Order and batches


@pytest.mark.parametrize("other_count", [None, 31])
def test_ranks_share_batches_that_are_permutations_in_each_epoch(other_count):
    def batches(steps, share=lambda rows: rows):
        return list(data.Batches(23, other_count, 6, 0, steps, share))

    whole = batches(range(9))
    for epoch in range(3):
        keys = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key, _ in batch]
        assert {e for e, _ in keys} == {epoch} and len(set(keys)) == 18
    others = [key for batch in whole[:5] for _, key in batch]
    assert len(set(others)) == 30 and (other_count is None) == (
        others == [k for b in whole[:5] for k, _ in b]
    )
    halves = [batches(range(9), lambda rows, r=r: rows[3 * r : 3 * r + 3]) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    assert batches(range(4, 9)) == whole[4:]  # a resumed run gets the batches it would have got


def test_an_epochs_order_is_drawn_once(monkeypatch):
    drawn = []
    generator = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or generator(seed))
    data.permutation.cache_clear()
    list(data.Batches(40, 50, 5, 0, range(8), np.asarray))
    assert drawn == [(0, 0), (1, 0)]


@pytest.mark.parametrize("count", [1, 19, 20, 7777, 100_000])
def test_what_is_held_out_is_disjoint_and_at_most_a_twentieth(count):
    rest, held = data.holdout(count, seed=0)
    assert sorted([*rest, *held]) == list(range(count)) and len(held) == min(2000, count // 20)
    assert np.array_equal(data.holdout(count, seed=0)[1], held)


def test_workers_tokenise_and_batches_are_those_of_the_main_process():
    source = plain([f"a boat number {i}" for i in range(9)])
    tokenizer, views = Tokenizer.train(["a boat"], 520), make_views(source)
    sampler = data.Batches(9, None, 3, 0, range(6), np.asarray)
    alone, worked = (list(data.loader(views, sampler, n, tokenizer=tokenizer, context=12)) for n in (0, 2))
    for batch, other in zip(alone, worked, strict=True):
        assert list(batch) == list(other) and "caption" not in batch and batch["tokens"].shape == (3, 12)
        assert all(torch.equal(batch[name], other[name]) for name in batch if name != "skipped")
    labels = [source.label(i) for (_, i), _ in next(iter(sampler))]
    assert torch.equal(alone[0]["tokens"], tokenizer(labels, 12))


def test_batches_on_their_way_fit_in_memory(monkeypatch):
    def plan(free, workers, batch):
        usage = type("", (), {"free": free << 20})
        monkeypatch.setattr(data.os.path, "isdir", lambda path: free > 0)
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
        return data.plan_prefetch(workers, batch << 20)

    assert plan(64_000, 8, 100) == (8, 2) and plan(0, 8, 100) == (8, 2)
    assert plan(64_000, 8, 1850) == plan(0, 8, 1850) == (8, 1)  # 4096 rows: 17 batches would be 31 GB
    assert plan(64_000, 0, 1850)[0] == 0
    with pytest.warns(UserWarning, match="room for 3 batches of 1,850 MiB.*--shm-size"):
        assert plan(12_000, 8, 1850) == (3, 1)
    with pytest.warns(UserWarning, match="not 8"):
        assert plan(64, 8, 1850)[0] == 0  # docker's 64 MB


GROUP = """
import os, signal, sys, time
import multiprocessing
import torch
import data

class Slow(data.Dataset):
    image_size = 8
    def __getitem__(self, key):
        time.sleep(0.2)
        return {"images": torch.zeros(3, 8, 8), "skipped": []}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    asked = []
    for name in ("SIGTERM", "SIGINT"):
        signal.signal(getattr(signal, name), lambda number, frame: asked.append(number))
    for batch in data.loader(Slow(), [[i] for i in range(100)], 2):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if asked:
            print("saved", flush=True)
            sys.exit(128 + asked[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_whole_group_is_answered_by_the_main_process(tmp_path, method, stop):
    (tmp_path / "main.py").write_text(GROUP)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), method],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        start_new_session=True,
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    if stop == signal.SIGKILL:  # to the main process alone: its workers end with it
        process.kill()
    else:
        os.killpg(process.pid, stop)
    said, _ = process.communicate(timeout=60)
    assert ("saved" in said, process.returncode) == (
        (False, -stop) if stop == signal.SIGKILL else (True, 128 + stop)
    )
    for _ in range(150):
        if not any(Path(f"/proc/{pid}").exists() for pid in workers):
            break
        signal.sigtimedwait([], 0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
