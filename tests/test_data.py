"""Data: bad images against what replaces them, samples against themselves in another order or process, shares
of ranks against the whole batch, workers against the main process.
"""

import errno
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from text import Tokenizer

HERE = Path(__file__).parents[1]
GOOD = 12


def folder_with_a_bad_one(tmp_path, content=b""):
    """Plain colours, image i captioned "colour i", and one more."""
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


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", None])
def test_a_bad_training_image_is_replaced_by_another_pair_and_noted(tmp_path, content):
    source = folder_with_a_bad_one(tmp_path, content)
    sample = make_views(source)[(0, GOOD), (0, GOOD)]
    (line,) = sample["skipped"]
    assert line.startswith(f"{source.where(GOOD)}\t") and "Error(" in line and "\n" not in line
    number = int(sample["caption"].split()[-1])
    assert all((sample[name] == 20 * number).all() for name in ("images", "view1", "view2"))


def test_twenty_bad_images_in_a_row_are_an_error_in_one_sentence(tmp_path):
    source = data.subset(folder_with_a_bad_one(tmp_path), [GOOD, GOOD])
    with pytest.raises(ValueError, match="20 images in a row .*12.png"):
        make_views(source)[(0, 0), (0, 0)]
    views = data.LabelledViews(source, 8, 0, 0.5)
    batches = iter(data.loader(views, [[((0, 0), (0, 0))]], workers=1))
    with pytest.raises(data.Unreadable, match="20 images in a row"):  # from a worker
        next(batches)
    batches._shutdown_workers()  # at once: as garbage it would take ten seconds


def hand_over(pipe):
    data.start_worker(0)
    pipe.send(reduction.DupFd(0))
    time.sleep(60)


def test_a_worker_says_nothing_when_the_main_process_leaves_within_a_handover(capfd):
    """As a signal may find it: connected, and gone before it has said who it is."""
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=hand_over, args=(theirs,))
    worker.start()
    shared = ours.recv()
    with socket.socket(socket.AF_UNIX) as leaving:
        leaving.connect(shared._id[0])
    shared.detach()  # served after the one that left
    worker.kill()
    assert "Traceback" not in capfd.readouterr().err


def test_a_shortage_is_no_bad_image():
    class Short(data.Arrays):
        def __getitem__(self, index):
            raise OSError(errno.EMFILE, "too many open files")

    with pytest.raises(OSError, match="too many"):
        make_views(data.Source("short", Short([0], ["thing"])))[(0, 0), (0, 0)]


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


def test_a_class_is_captioned_by_its_templates_and_names_and_its_label_comes_along():
    source = plain([0, 1], ["bag", ["shoe", "boot"]])
    views = make_views(source, pair=None, templates=["a {}", "{} {0} {x}"])
    said = [{views[(e, i), (e, i)]["caption"] for e in range(60)} for i in range(2)]
    assert said[0] == {"a bag", "bag {0} {x}"}
    assert said[1] == {"a shoe", "shoe {0} {x}", "a boot", "boot {0} {x}"}
    batch = data.collate([views[(0, i), (0, i)] for i in (1, 0, 1)])
    assert batch["classes"].tolist() == [1, 0, 1] and batch["classes"].dtype == torch.int64


def test_paths_of_any_bytes_and_subsets_give_back_what_was_put_in():
    paths = ["a", "naïve café/猫.png", os.fsdecode(b"caf\xe9.jpg")]
    files = pickle.loads(pickle.dumps(data.Files(paths, [0, 1, 2])))
    assert [files.where(i) for i in range(3)] == paths
    part = data.subset(data.subset(plain(list("abcdefgh")), [7, 3, 5]), [2, 0])
    assert [part.label(i) for i in range(len(part))] == ["f", "h"] and part.where(0) == "plain number 5"
    assert part[1][0].getpixel((0, 0)) == (140, 140, 140)


@pytest.mark.parametrize("other_count", [None, 31])
def test_ranks_share_batches_that_are_permutations_in_each_epoch(other_count):
    def batches(steps, share=lambda rows: rows):
        return list(data.Batches(23, other_count, 6, 0, steps, share))

    whole = batches(range(9))
    for epoch in range(3):
        keys = [key for batch in whole[3 * epoch : 3 * epoch + 3] for key, _ in batch]
        assert {e for e, _ in keys} == {epoch} and len(set(keys)) == 18
    others = [key for batch in whole[:5] for _, key in batch]
    same = others == [key for batch in whole[:5] for key, _ in batch]
    assert len(set(others)) == 30 and same == (other_count is None)
    halves = [batches(range(9), lambda rows, r=r: rows[3 * r : 3 * r + 3]) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    assert batches(range(4, 9)) == whole[4:]  # a resumed run gets the batches it would have got


@pytest.mark.parametrize("count", [19, 7777, 100_000])
def test_what_is_held_out_is_disjoint_and_at_most_a_twentieth(count):
    source = data.Source("numbers", range(count))
    rest, held = (part.indices for part in data.holdout(source, seed=0))
    assert sorted([*rest, *held]) == list(range(count)) and len(held) == min(2000, count // 20)
    assert np.array_equal(data.holdout(source, seed=0)[1].indices, held)


def test_workers_tokenise_and_batches_are_those_of_the_main_process():
    source = plain([f"a boat number {i}" for i in range(9)])
    tokenizer, views = Tokenizer.train(["a boat"], 520), make_views(source)
    sampler = data.Batches(9, None, 3, 0, range(6), np.asarray)
    alone, worked = (list(data.loader(views, sampler, n, tokenizer=tokenizer)) for n in (0, 2))
    for batch, other in zip(alone, worked, strict=True):
        assert list(batch) == list(other) and "caption" not in batch and len(batch["tokens"]) == 3
        assert all(torch.equal(batch[name], other[name]) for name in batch if name != "skipped")
    labels = [source.label(i) for (_, i), _ in next(iter(sampler))]
    assert torch.equal(alone[0]["tokens"], tokenizer(labels))


def test_batches_on_their_way_fit_in_memory(monkeypatch):
    def plan(free, workers, batch):
        usage = type("", (), {"free": free << 20})
        monkeypatch.setattr(data.os.path, "isdir", lambda path: free > 0)
        monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage)
        return data.plan_prefetch(workers, batch << 20)

    assert plan(64_000, 8, 100) == plan(0, 8, 100) == (8, 2)
    assert plan(64_000, 8, 1850) == plan(0, 8, 1850) == (8, 1)  # 4096 rows: 17 batches would be 31 GB
    with pytest.warns(UserWarning, match="short: 3 workers.*--shm-size"):
        assert plan(12_000, 8, 1850) == (3, 1)


MAIN = """
import multiprocessing, sys, time
import torch
import data

class Slow(data.Dataset):
    image_size = 8
    def __getitem__(self, key):
        time.sleep(0.2)
        return {"images": torch.zeros(3, 8, 8), "skipped": []}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    for batch in data.loader(Slow(), [[i] for i in range(1000)], 2):
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        if sys.argv[2] == "an error":
            raise RuntimeError("an error")
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("end", ["an error", "a kill"])
def test_workers_ignore_signals_and_end_with_their_parent(tmp_path, method, end):
    (tmp_path / "main.py").write_text(MAIN)
    command = [sys.executable, str(tmp_path / "main.py"), method, end]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(HERE)}, **quiet)
    workers = [int(pid) for pid in process.stdout.readline().split()]
    if end == "a kill":
        process.stdout.readline()  # the second batch is of the second worker: both are on their way
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
        assert len(process.stdout.readline().split()) == 2
        process.kill()
    _, heard = process.communicate(timeout=60)  # until the workers, which hold the pipe, have ended
    assert process.returncode == (1 if end == "an error" else -signal.SIGKILL), heard
