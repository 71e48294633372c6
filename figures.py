"""What is better looked at: a run in pictures, drawn from its checkpoint, its log and its data.

    pip install matplotlib
    python figures.py runs/scenes-slip                                # all, to runs/scenes-slip/figures; 13 s
    python figures.py runs/scenes-slip runs/scenes-clip --only curves   # two runs, one laid over the other
    python figures.py runs/scenes-slip --image boat.png               # views and attention of your own picture

views        a picture, and what the image tower sees of it in five epochs
curves       the losses and the zero-shot accuracy at each epoch, beside chance
similarity   captions against pictures that were held out from training: does each find its own?
predictions  test pictures, and the classes which prompts find likeliest
attention    where the class token looks in the last block
map          features of test pictures, in the plane in which the classes differ most
tokens       how captions are cut

A figure is a PNG of at most 120 KB, decided by the run and its seed. Not here: accuracies (zeroshot.py, linear.py).
"""

import argparse
import csv
import io
import math
import os
import sys
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

import augment
import data
import loop
import measure
import ranks
import sets
import slip
import tasks
import zeroshot

LIMIT = 120_000  # bytes of a file
OF_A_PICTURE = ("views", "attention")  # what --image draws
RARE = "Two kittens asleep in the café"  # words that few captions know
# Okabe and Ito's colours, which every kind of eye tells apart; and still nothing is said by colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX<*hp>", ("-", "--", "-.", ":")
STYLE = {"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 11, "text.parse_math": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


@dataclass
class Run:
    """What a run folder leads to. A set that is not on this machine is None."""

    model: slip.SLIP
    args: dict  # of train.py
    logs: dict  # name of a run -> (its args, the rows of its log); this run's first
    seen: data.Source | None  # pictures it was trained on
    held: data.Source | None  # held out from these
    test: data.Source | None
    absent: dict  # "train" or "test" -> why it is None
    device: torch.device

    def order(self, count):
        """0 to count - 1, shuffled by the run's seed."""
        return np.random.default_rng((self.args["seed"], count)).permutation(count).tolist()


def open_run(folders, root=None):
    """The run in folders[0], with the logs of all. Raises ValueError or FileNotFoundError with one sentence."""
    base = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
    logs = {os.path.relpath(folder, base): read_log(folder) for folder in folders}
    args, device = next(iter(logs.values()))[0], ranks.start()
    model = slip.load(os.path.join(folders[0], loop.CHECKPOINT)).to(device)
    found, absent = {"train": None, "test": None}, {}
    for split in found:
        try:
            found[split] = sets.open_source(args["data"], root or args["root"], split)
        except (ValueError, FileNotFoundError) as error:
            absent[split] = str(error)
    seen = held = found["train"]
    if seen is not None:
        seen, held = (data.part(seen, indices) for indices in data.holdout(len(seen), args["seed"]))
    return Run(model, args, logs, seen, held, found["test"], absent, device)


def read_log(folder):
    """A run folder -> (the args of its training, the rows of its log.csv: none in the first epoch)."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no run folder at {folder}: type what train.py calls --out, runs/NAME")
    path = os.path.join(folder, loop.CHECKPOINT)
    args = (slip.read(path).get("run") or {}).get("args", {})
    if not {"data", "method", "batch_size"} <= args.keys():
        raise ValueError(f"{path} does not say how it was trained: expected a checkpoint of train.py")
    path = os.path.join(folder, "log.csv")
    if not os.path.exists(path):
        return args, []
    with open(path, newline="", encoding="utf-8") as file:
        return args, list(csv.DictReader(file))


def lacks(run, name):
    """Why a run has no figure of this name, in words, or None if it has."""
    test = run.test
    if name in ("similarity", "predictions", "tokens") and run.model.text is None:
        return f"a {run.model.config.method} model learns without captions"
    if name in ("views", "similarity", "tokens") and run.seen is None:
        return run.absent["train"]
    if name in ("similarity", "tokens") and len(run.held) < 2:
        return "the set is too small to hold pictures out"
    if name in ("predictions", "attention", "map") and test is None:
        return run.absent["test"]
    if name in ("predictions", "map") and test.classes is None:
        return f"{test.name} has captions, no classes"
    if name == "map" and len(test) < 2 * len(test.classes):
        return f"{test.name} has fewer than two test pictures a class"
    empty = [folder for folder, (_, rows) in run.logs.items() if not rows]
    if name == "curves" and empty:
        return f"{empty[0]} has no log.csv: it is written at the end of the first epoch"
    return None


# The numbers


def chance(column, args, test):
    """What a column of the log is before anything is learned, or None where no number is known."""
    language, partner = slip.METHODS[args["method"]]
    if column == "clip_loss":
        return math.log(args["batch_size"]) if language else None
    if column == "ssl_loss":
        return math.log(2 * args["batch_size"] - 1) if partner == "simclr" else None
    return 100 / len(test.classes) if test is not None and test.classes else None


def views_of(run, index, epochs):
    """A training picture -> (name of a view -> normalised [epochs, 3, S, S], the epochs' captions)."""
    args, config = run.args, run.model.config
    language, partner = slip.METHODS[config.method]
    views = data.Views(
        run.seen, None, image_size=config.image_size, seed=args["seed"], light_crop=args["light_crop"],
        strong_crop=args["strong_crop"], language=language, pair=data.PAIRS[partner] if partner else None,
        clip_strong=augment.SIMCLR if args["clip_aug"] == "simclr" else None,
    )  # fmt: skip
    batch = data.collate([views[(epoch, index), (epoch, index)] for epoch in range(epochs)])
    del batch["skipped"]
    captions = batch.pop("caption", [])
    return data.device_views(batch), captions


def held_out(run, count):
    """Caption -> uint8 view [3, S, S] of held-out pictures, no two captions alike."""
    views = data.Views(
        run.held, None, image_size=run.model.config.image_size, seed=run.args["seed"], light_crop=1.0,
        strong_crop=1.0, language=True, pair=None,
    )  # fmt: skip
    found = {}
    for index in run.order(len(run.held))[: 10 * count]:
        sample = views[(0, index), (0, index)]
        found.setdefault(sample["caption"], sample["images"])
    return dict(list(found.items())[:count])


@torch.no_grad()
def cosines(model, captions, images, device):
    """B captions, uint8 images [B, 3, S, S] -> [B, B], a row for each caption, a column for each picture."""
    tokens = model.tokenizer(captions, model.config.context).to(device)
    image_embed = F.normalize(model.encode_image(augment.normalise(images.to(device))), dim=-1)  # [B, E]
    text_embed = F.normalize(model.encode_text(tokens), dim=-1)  # [B, E]
    return (text_embed @ image_embed.T).cpu().numpy()


@torch.no_grad()
def likeliest(run, source, count):
    """n labelled pictures -> probabilities, classes [n, count] from the likeliest on, labels [n]."""
    prompts = tasks.prompts(source.name)
    weights = zeroshot.classifier(run.model, source.classes, prompts, run.device)  # [K, E]
    logits, labels = measure.over(
        source,
        run.model.config.image_size,
        run.device,
        lambda x: run.model.logit_scale.exp() * F.normalize(run.model.encode_image(x), dim=-1) @ weights.T,
    )
    top = logits.softmax(1).topk(min(count, len(source.classes)))
    return top.values.cpu(), top.indices.cpu(), labels.cpu()


@torch.no_grad()
def attention_weights(vit, images):
    """Normalised images [B, 3, S, S] -> softmax(q k^T / sqrt(d)) of the last block, [B, H, 1 + N, 1 + N].

    The tower's fused attention keeps them to itself: a hook takes its input, and q and k are made again.
    """
    layer, taken = vit.blocks[-1].attention, []
    with layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])):
        vit(images)
    q, k, _ = rearrange(layer.qkv(taken[0]), "b n (three h d) -> three b h n d", three=3, h=layer.heads)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def some_of_each(run, classes, each):
    """Indices of test pictures: `each` of so many classes, drawn by the seed, in the order of the classes."""
    found = {label: [] for label in sorted(run.order(len(run.test.classes))[:classes])}
    for index in run.order(len(run.test)):
        kind = found.get(run.test.label(index))
        if kind is not None and len(kind) < each:
            kind.append(index)
    return [index for indices in found.values() for index in indices]


def plane(features, labels):
    """PCA of the class means: features [n, D], labels [n] -> (their centre [D], orthonormal axes [D, 2])."""
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])  # [K, D]
    centre = means.mean(0)
    return centre, torch.linalg.svd(means - centre).Vh[:2].T


def cut(tokenizer, caption, context):
    """A caption -> [(id, its piece of text, number of the word or None for start and end)]."""
    pieces, word = [], 0
    for token in tokenizer(caption, context)[0].tolist():
        if token >= tokenizer.start:
            pieces.append((token, "start" if token == tokenizer.start else "end", None))
            continue
        piece = tokenizer.pieces[token]  # bytes; a space ends a word
        pieces.append((token, piece.decode("utf-8", "backslashreplace").strip(), word))
        word += piece.endswith(b" ")
    return pieces
