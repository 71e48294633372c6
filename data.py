"""Data: where pictures with captions or labels come from, in which order, and what is done about bad ones.

Paper: section 4.1 (YFCC15M, CC3M, CC12M). A class-labelled set is captioned here by drawing a template.

    Source: source[i] -> (PIL picture, label or caption)                   (sets.py opens one by its name)
    Views(...)[(epoch, index), (epoch, index)] -> uint8 crops [3, S, S], parameters of strong views, caption

A sample is a pure function of (seed, epoch, index): workers, ranks and restarts change nothing. The host
decodes and crops; `device_views` does the arithmetic on the batch. Not here: colour maths (augment.py),
class names and prompts (tasks.py).
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

import augment
import tasks

BAD_SHARE = 0.05  # more unreadable pictures than this is an error
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
PAIRS = {  # self-supervised partner -> its strong views
    "simclr": (augment.SIMCLR, augment.SIMCLR),
    "mocov3": (augment.MOCOV3_1, augment.MOCOV3_2),
    "byol": (augment.BYOL_1, augment.BYOL_2),
    "beit": (augment.BEIT,),
}


@dataclass
class Source:
    """A set: items[i] -> (PIL RGB picture, label), or (picture, caption or list of captions) where
    `classes` is None.
    """

    name: str
    items: Dataset
    classes: list | None = None  # class names; an entry may be a list of names

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def label(self, index):
        """The label alone, without decoding where the items know a way."""
        return self.items.label(index) if hasattr(self.items, "label") else self.items[index][1]

    def where(self, index):
        """What to call an item in a list of bad ones."""
        return self.items.where(index) if hasattr(self.items, "where") else f"{self.name} number {index}"


def read_picture(file):
    """Any readable picture -> RGB: turned as its EXIF says, transparent parts on white, 16 bits to 8, the
    first frame.
    """
    with Image.open(file) as picture:
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bits and more: PIL would clip them at 255
        values = np.asarray(picture, np.float64)
        return Image.fromarray((values / max(values.max(), 65535) * 255).round().astype(np.uint8)).convert(
            "RGB"
        )
    if picture.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


class Strings:
    """Many strings as two arrays: forked workers share the memory, where Python objects would be copied one
    by one.
    """

    def __init__(self, strings):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        return (
            self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")
        )


class Arrays(Dataset):
    """Pictures in memory, uint8 [n, H, W, 3] or [n, H, W], with a label or caption each."""

    def __init__(self, images, targets):
        self.images, self.targets = np.asarray(images), targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]).convert("RGB"), self.label(index)

    def label(self, index):
        target = self.targets[index]
        return target if isinstance(target, str) else int(target)


class Files(Dataset):
    """Pictures in files, with a label or caption each."""

    def __init__(self, paths, targets):
        self.paths = Strings(paths)
        self.targets = targets  # targets[i]: a label, a caption or a list of captions

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return read_picture(self.paths[index]), self.label(index)

    def label(self, index):
        target = self.targets[index]
        return target if isinstance(target, (str, list)) else int(target)

    def where(self, index):
        return self.paths[index]


class Part(Dataset):
    """Some of a set's items, by their indices."""

    def __init__(self, source, indices):
        self.source, self.indices = source, np.asarray(indices)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.source[int(self.indices[index])]

    def label(self, index):
        return self.source.label(int(self.indices[index]))

    def where(self, index):
        return self.source.where(int(self.indices[index]))


def part(source, indices):
    return Source(source.name, Part(source, indices), source.classes)


# The order and the samples


def order(count, batch, seed, step):
    """The batch of a step: (epoch, indices [batch]). An epoch is a permutation of the set, its last part
    dropped.
    """
    epoch, position = divmod(step, count // batch)
    return epoch, permutation(count, seed, epoch)[position * batch : (position + 1) * batch]


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


class Batches:
    """A sampler: for each step this rank's keys, ((epoch, index) of the captioned, (epoch, index) of the
    other picture).

    Where `other_count` is None both are the same picture. `mine` cuts a rank's share from the global batch
    (ranks.mine).
    """

    def __init__(self, count, other_count, batch, seed, steps, mine):
        self.count, self.other_count, self.batch, self.seed = count, other_count, batch, seed
        self.steps, self.mine = steps, mine

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        for step in self.steps:
            epoch, indices = order(self.count, self.batch, self.seed, step)
            keys = [(epoch, int(i)) for i in indices]
            others = keys
            if self.other_count is not None:
                epoch, indices = order(self.other_count, self.batch, self.seed + 1, step)
                others = [(epoch, int(i)) for i in indices]
            yield self.mine(list(zip(keys, others)))


class Views(Dataset):
    """Training samples: a light crop with its caption, and the strong crops of the same or of another
    picture.

    `captioned` and `other` are Sources, `other` None if both losses see the same picture. `clip_strong`: the
    recipe of a strong view for the language loss (the ablation "CLIP + augmentation"), None for the light
    crop; `clip_views`: how many of them. `pair`: None without self-supervision. `patch`: side of a patch in
    pixels, for what hides some.
    """

    def __init__(
        self, captioned, other, *, image_size, seed, light_crop, strong_crop, language, pair, patch=None,
        clip_strong=None, clip_views=1,
    ):  # fmt: skip
        self.captioned, self.other = captioned, other
        self.image_size, self.patch, self.seed = image_size, patch, seed
        self.light_crop, self.strong_crop = light_crop, strong_crop
        self.language, self.pair = language, pair
        self.clip_strong, self.clip_views = clip_strong, clip_views
        self.templates = tasks.captions(captioned.name)

    def __getitem__(self, key):
        (epoch, index), other = key
        sample = {"skipped": []}
        if self.language:
            rng = np.random.default_rng((self.seed, epoch, index))
            picture, target = readable(self.captioned, index, rng, sample["skipped"])
            sample["caption"] = self.caption(target, rng)
            for name in ("images", "images2")[: self.clip_views]:
                self.add_view(sample, name, picture, rng, self.clip_strong)
        if self.pair is not None:
            rng = np.random.default_rng((self.seed, other[0], other[1], 1))
            if self.other is not None or not self.language:
                picture, _ = readable(self.other or self.captioned, other[1], rng, sample["skipped"])
            for name, strong in zip(("view1", "view2"), self.pair):
                self.add_view(sample, name, picture, rng, strong)
        return sample

    def add_view(self, sample, name, picture, rng, strong):
        smallest = self.light_crop if strong is None else self.strong_crop
        box = augment.crop_box(rng, *picture.size, (smallest, 1.0))
        sample[name] = augment.crop(picture, box, self.image_size)  # uint8 [3, S, S]
        if strong is not None:
            sample[f"{name}_params"] = augment.draw(rng, strong)
            if strong.masked:
                grid = self.image_size // self.patch
                sample[f"{name}_mask"] = augment.block_mask(rng, grid, strong.masked)  # [N]

    def caption(self, target, rng):
        if self.captioned.classes is None:
            return target if isinstance(target, str) else target[rng.integers(len(target))]
        name = self.captioned.classes[target]
        name = name if isinstance(name, str) else name[rng.integers(len(name))]
        return self.templates[rng.integers(len(self.templates))].format(name)


def readable(source, index, rng, skipped):
    """The item, or, if its picture is bad, another one drawn from the sample's own generator."""
    for _ in range(20):
        try:
            return source[index]
        except Exception as error:  # damaged files break Pillow in every way there is
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:100]
            skipped.append(f"{source.where(index)}\t{reason}")
            index = int(rng.integers(len(source)))
    raise ValueError(
        f"20 pictures in a row cannot be read, the last is {skipped[-1]}: is this the right folder?"
    )


class LabelledViews(Dataset):
    """Training samples of a labelled source: a random crop of at least the share `crop` of the picture,
    mirrored one time in two, then `transform`; with its label.

    `transform`: uint8 [3, S, S] -> a tensor of that shape, uint8 or normalised float; it may draw from
    torch's generator, which is set from (seed, epoch, index).
    """

    def __init__(self, source, image_size, seed, crop, transform=None):
        self.source, self.image_size, self.seed = source, image_size, seed
        self.crop, self.transform = crop, transform

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        (epoch, index), _ = key
        rng, skipped = np.random.default_rng((self.seed, epoch, index)), []
        picture, label = readable(self.source, index, rng, skipped)
        box = augment.crop_box(rng, *picture.size, (self.crop, 1.0))
        image = augment.crop(picture, box, self.image_size)  # uint8 [3, S, S]
        if rng.random() < 0.5:
            image = image.flip(2)
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):  # the caller's generator is left as it was
                torch.default_generator.manual_seed(int(rng.integers(2**63)))
                image = self.transform(image)
        return {"images": image, "labels": label, "skipped": skipped}


def collate(samples):
    """Samples -> one batch: tensors stacked, strings and names of bad pictures in lists."""
    batch = {"skipped": [line for sample in samples for line in sample.pop("skipped")]}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        batch[name] = values if name == "caption" else torch.stack([torch.as_tensor(v) for v in values])
    return batch


def device_views(chunk):
    """The device's part for a chunk of uint8 crops: strong views where there are parameters, else
    normalisation.
    """
    ready = {}
    for name, value in chunk.items():
        if name.endswith("_params"):
            continue
        if value.dtype == torch.uint8:
            params = chunk.get(f"{name}_params")
            value = augment.normalise(value) if params is None else augment.strong(value, params)
        ready[name] = value
    return ready


def one_thread(_):
    torch.set_num_threads(1)


def loader(dataset, batches, workers, pin=False):
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=one_thread,
    )


class Unreadable(ValueError):
    """A picture that must be read cannot be."""


class Labelled(Dataset):
    """Evaluation samples: (uint8 evaluation view, label); every picture counts, so a bad one is an error."""

    def __init__(self, source, image_size, resize=None):
        self.source, self.image_size, self.resize = source, image_size, resize

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            picture, label = self.source[index]
        except Exception as error:
            raise Unreadable(
                f"cannot read {self.source.where(index)} ({error}): a test set must be whole"
            ) from None
        return augment.evaluation_view(picture, self.image_size, self.resize), label


def holdout(count, seed):
    """Split a training set's indices: (the rest, 5% but at most 2,000 held out to choose the best
    checkpoint by).
    """
    shuffled = np.random.default_rng((seed, count, 5)).permutation(count)
    held = min(2000, count // 20)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])
