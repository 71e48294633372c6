"""Data: images with captions or labels, in which order they come, and what is done about bad ones.

Paper: the pre-training data and the views in "implementation details".

    Views(...)[(epoch, index), (epoch, index)] -> uint8 crops [3, S, S], parameters of strong views, caption
    loader(...) -> batches: crops [b, 3, S, S], tokens [b, L]

A sample is a function of (seed, epoch, index): workers, ranks and restarts change nothing.
Not here: files (images.py), colours (augment.py), names and prompts (sets.py).
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import augment
import ranks
from images import Arrays, Files, Source, is_shortage, subset  # noqa: F401

PAIRS = {  # self-supervised partner -> its strong views
    "simclr": (augment.SIMCLR, augment.SIMCLR),
    "mocov3": (augment.MOCOV3_1, augment.MOCOV3_2),
    "byol": (augment.BYOL_1, augment.BYOL_2),
    "beit": (augment.BEIT,),
}


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    """The order of a set in an epoch, int64 [count]; not to be written to."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def holdout(source, seed):
    """A training set -> (what to train on, 5% but at most 2,000 images to choose a checkpoint by)."""
    shuffled = np.random.default_rng((seed, len(source), 5)).permutation(len(source))
    held = min(2000, len(source) // 20)
    return subset(source, np.sort(shuffled[held:])), subset(source, np.sort(shuffled[:held]))


@dataclass(eq=False)
class Batches:
    """A sampler: for each of `steps` this rank's keys, ((epoch, index) of the captioned image, (epoch, index)
    of the other). An epoch is a permutation of the set without its last incomplete batch."""

    count: int
    other_count: int | None  # None: both are the same image
    batch: int  # of all ranks together
    seed: int
    steps: range
    share: callable = ranks.share  # rows of the global batch -> this rank's

    def __iter__(self):
        for step in self.steps:
            keys = others = self.keys(self.count, self.seed, step)
            if self.other_count is not None:
                others = self.keys(self.other_count, self.seed + 1, step)
            yield list(zip(keys, others))

    def keys(self, count, seed, step):
        epoch, position = divmod(step, count // self.batch)
        indices = self.share(permutation(count, seed, epoch)[position * self.batch :][: self.batch])
        return [(epoch, index) for index in indices.tolist()]


class Unreadable(ValueError):
    """An image that must be decoded cannot be."""


def readable(source, index, skipped, rng=None):
    """The item. If its image is bad, another one, drawn from the sample's own generator, if it has one."""
    for _ in range(20):
        try:
            return source[index]
        except Exception as error:  # damaged files break Pillow in every way there is
            if is_shortage(error):
                raise
            skipped.append(f"{source.where(index)}\t{error!r:.200}")
        if rng is None:
            break
        index = int(rng.integers(len(source)))
    raise Unreadable(f"{len(skipped)} images in a row cannot be read, the last is {skipped[-1]}")


def as_list(entry):
    """The names of a class, the captions of an image."""
    return [entry] if isinstance(entry, str) else entry


@dataclass(eq=False)
class Views(Dataset):
    """Training samples: a light crop with its caption, and strong crops of the same or of another image."""

    captioned: Source
    other: Source | None  # of the self-supervised images; None: the captioned ones
    _: KW_ONLY
    image_size: int
    seed: int
    light_crop: float  # the smallest share of the image in a light crop, 0-1
    strong_crop: float
    language: bool  # whether there is a language loss
    pair: tuple | None  # recipes of the strong views; None: no self-supervision
    patch: int | None = None  # side in pixels, where patches are hidden
    clip_strong: augment.Strong | None = None  # recipe of the language loss's view; None: a light crop
    clip_views: int = 1  # of the language loss
    templates: list | None = None  # captions with {} for the class name

    def __getitem__(self, key):
        (epoch, index), other = key
        sample = {"skipped": []}
        if self.language:
            rng = np.random.default_rng((self.seed, epoch, index))
            image, target = readable(self.captioned, index, sample["skipped"], rng)
            sample["caption"] = self.caption(target, rng)
            if self.captioned.classes is not None:
                sample["classes"] = target
            for name in ("images", "images2")[: self.clip_views]:
                self.add_view(sample, name, image, rng, self.clip_strong)
        if self.pair is not None:
            rng = np.random.default_rng((self.seed, *other, 1))
            if self.other is not None or not self.language:
                image, _ = readable(self.other or self.captioned, other[1], sample["skipped"], rng)
            for name, strong in zip(("view1", "view2"), self.pair):
                self.add_view(sample, name, image, rng, strong)
        return sample

    def add_view(self, sample, name, image, rng, strong):
        smallest = self.light_crop if strong is None else self.strong_crop
        box = augment.crop_box(rng, *image.size, (smallest, 1.0))
        sample[name] = augment.crop(image, box, self.image_size)  # uint8 [3, S, S]
        if strong is not None:
            sample[f"{name}_params"] = augment.draw(rng, strong)
            if strong.masked:
                sample[f"{name}_mask"] = augment.block_mask(rng, self.image_size // self.patch, strong.masked)

    def caption(self, target, rng):
        """One of the captions or, for a label, one of the templates with one of the class's names."""
        options = target if self.captioned.classes is None else self.captioned.classes[target]
        name = options if isinstance(options, str) else options[rng.integers(len(options))]
        if self.captioned.classes is None or not self.templates:
            return name
        return self.templates[rng.integers(len(self.templates))].replace("{}", name)  # other braces stand


@dataclass(eq=False)
class LabelledViews(Dataset):
    """Training samples of a labelled source: a random crop, mirrored one time in two, then `transform`."""

    source: Source
    image_size: int
    seed: int
    crop: float  # the smallest share of the image, 0-1
    transform: callable = None  # uint8 [3, S, S] -> such a tensor, or float; draws from torch's generator

    def __getitem__(self, key):
        (epoch, index), _ = key
        rng, skipped = np.random.default_rng((self.seed, epoch, index)), []
        image, label = readable(self.source, index, skipped, rng)
        box = augment.crop_box(rng, *image.size, (self.crop, 1.0))
        view = augment.crop(image, box, self.image_size)  # uint8 [3, S, S]
        if rng.random() < 0.5:
            view = view.flip(2)
        if self.transform is not None:
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            view = self.transform(view)
        return {"images": view, "labels": label, "skipped": skipped}


def collate(samples, tokenizer=None):
    """Samples -> a batch: tensors stacked; captions, or with a tokenizer "tokens" int64 [b, L]."""
    batch = {"skipped": [line for sample in samples for line in sample.pop("skipped")]}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        batch[name] = values if name == "caption" else torch.stack([torch.as_tensor(v) for v in values])
    if tokenizer is not None and "caption" in batch:
        batch["tokens"] = tokenizer(batch.pop("caption"))
    return batch


def start_worker(_):
    """Ignore signals to the whole process group: the worker ends when the main process does, however."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Else multiprocessing's own thread prints a traceback when the main process leaves before it is served.
    sys.excepthook = lambda *_: None
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()  # torch would watch the fork server, which outlives it
    os._exit(1)


@atexit.register
def kill_workers():
    """At exit Python sends leftover workers SIGTERM, which they ignore, and waits: they are killed first."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where torch would report the first that is killed
    for process in multiprocessing.active_children():
        process.kill()


def plan_prefetch(workers, batch_bytes):
    """-> (workers, batches that each loads ahead): 2 if they fit in 4 GiB and half of /dev/shm, else 1."""
    room = 4 << 30
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if free < workers * batch_bytes:
            workers = free // batch_bytes
            warnings.warn(f"shared memory is short: {workers} workers (docker: --shm-size=16g)", stacklevel=2)
        room = min(room, free)
    return workers, 2 if 2 * workers * batch_bytes <= room else 1


def loader(dataset, sampler, workers, *, tokenizer=None, pin=False):
    """A DataLoader; the sampler gives lists of keys. A batch that takes longer than 300 s is an error."""
    batch_bytes = len(next(iter(sampler), ())) * 12 * dataset.image_size**2  # four views, or one of floats
    workers, ahead = plan_prefetch(workers, batch_bytes)
    several = dict(timeout=300, prefetch_factor=ahead, worker_init_fn=start_worker) if workers else {}
    several["collate_fn"] = functools.partial(collate, tokenizer=tokenizer)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, pin_memory=pin, **several)
