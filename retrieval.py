"""Retrieval: pictures and sentences in the joint space, and which of them are nearest to one another.

Paper: section 3.1, CLIP's space; zero-shot transfer (zeroshot.py) is the retrieval of a class's sentence.

    sentences -> embed_texts -> [M, E]     source -> embed_pictures -> [N, E]     of unit length: a product
    search: the pictures nearest to a sentence     recall: how often the right one is among the k nearest

Not here: the command line (zeroshot.py).
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

import data
import loop
import measure
import ranks

NO_TOKENIZER = "this checkpoint has no tokenizer: CLIP's comes with open_clip (pip install open_clip_torch)"
BLOCK = 1 << 24  # cosines at once: 64 MB


@torch.no_grad()
def embed_texts(model, texts, device):
    """Strings -> unit embeddings [M, E], with a live line."""
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    embeds, live = [], loop.Live()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: less padding
    for start in range(0, len(order), 64):
        live.show(f"{start:,}/{len(order):,} sentences")
        tokens = model.tokenizer([texts[i] for i in order[start : start + 64]], model.config.context)
        embeds.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1))  # [64, E]
    live.clear()
    return torch.cat(embeds)[torch.tensor(order).argsort()]  # in the order of `texts`


def embed_images(model, images):
    """Normalised views [B, 3, S, S] -> unit embeddings [B, E]."""
    return F.normalize(model.encode_image(images), dim=-1)


class Numbered(Dataset):
    """A source's pictures, each with its number, or with -1 if it cannot be read."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        try:
            return self.source[index][0], index
        except Exception:  # damaged files break Pillow in every way there is
            return Image.new("RGB", (1, 1)), -1


def embed_pictures(model, source, device, workers=0):
    """The readable pictures of a source -> (unit embeddings [N, E], their numbers [N]), with a warning."""
    embeds, numbers = measure.over(
        data.Source(source.name, Numbered(source)),
        model.config.image_size,
        device,
        lambda images: embed_images(model, images),
        workers=workers,
    )
    kept = numbers >= 0
    bad = sorted(set(range(len(source))) - set(numbers[kept].tolist()))
    if bad:
        ranks.warn(f"{len(bad):,} of {len(source):,} pictures cannot be read: {fault(source, bad[0])}")
    if len(bad) == len(source):
        raise loop.Stop(f"no picture of {source.name} can be read")
    return embeds[kept], numbers[kept]


def fault(source, index):
    """Why an item cannot be read; a worker does not hand that over."""
    try:
        source[index]
    except Exception as error:
        return f"{source.where(index)} ({type(error).__name__}: {error})"
    return source.where(index)


# A sentence and a folder


def open_pictures(folder):
    """The pictures in a folder, and in those below it, as a source without labels."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no folder at {folder}")
    paths = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in data.SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no pictures in {folder}: expected {', '.join(data.SUFFIXES[:4])}")
    return data.Source(str(folder), data.Files(paths, np.zeros(len(paths), int)))


def search(model, source, query, device, workers=0):
    """The pictures of a source for a sentence, the nearest first: [(cosine, path)]."""
    text = embed_texts(model, [query], device)[0]
    embeds, numbers = embed_pictures(model, source, device, workers)
    cosines, order = (embeds @ text).sort(descending=True, stable=True)
    return [(c, source.where(i)) for c, i in zip(cosines.tolist(), numbers[order].tolist())]


# Captions and their pictures


def recall(images, texts, owner, ks=(1, 5, 10)):
    """Recall at k both ways: {"image to text": {k: per cent}, "text to image": {k: per cent}}.

    images [N, E], texts [M, E] of unit length, owner [M]: the picture of each caption. A caption finds its
    picture if that is among the k nearest; a picture finds a caption if any of its own is. A stranger as near
    as the right one goes before it, so that equal embeddings find nothing.
    """
    rows = max(1, BLOCK // max(len(images), len(texts)))
    places = {"image to text": [], "text to image": []}  # how many strangers go before the right one
    for numbers in torch.arange(len(images), device=owner.device).split(rows):
        cosines = images[numbers] @ texts.T  # [rows, M]
        mine = owner == numbers[:, None]
        best = cosines.masked_fill(~mine, -torch.inf).amax(1, keepdim=True)
        places["image to text"].append(((cosines >= best) & ~mine).sum(1))
    for numbers in torch.arange(len(texts), device=owner.device).split(rows):
        cosines = texts[numbers] @ images.T  # [rows, N]
        right = cosines.gather(1, owner[numbers, None])
        places["text to image"].append((cosines >= right).sum(1) - 1)
    return {
        way: {k: 100 * (torch.cat(found) < k).double().mean().item() for k in ks}
        for way, found in places.items()
    }


def evaluate(model, source, device, workers=0):
    """Retrieval among all pictures and captions of a source -> (recall, pictures, captions)."""
    images, numbers = embed_pictures(model, source, device, workers)
    captions = [source.label(i) for i in numbers.tolist()]
    captions = [[target] if isinstance(target, str) else target for target in captions]
    owner = torch.tensor([i for i, group in enumerate(captions) for _ in group], device=device)
    texts = embed_texts(model, [caption for group in captions for caption in group], device)
    return recall(images, texts, owner), len(images), len(texts)
