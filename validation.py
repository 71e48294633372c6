"""Validation: what is measured after each epoch of pre-training, and the score by which best.pt is chosen.

Left to others: prompts and recall (zeroshot.py), metrics and neighbours (evaluate.py).
"""

import numpy as np
import torch

import console
import data
import evaluate
import sets
import zeroshot
from losses import info_nce


class Validation:
    """After each epoch: labelled test sets by zero-shot, for the log only; and a score on the held-out part
    of the training set, by which best.pt is chosen: zero-shot accuracy where it has classes, recall at 1
    where it has captions, k nearest neighbours without language."""

    def __init__(self, settings, model, device, kept, held):
        self.settings, self.model, self.device, self.held = settings, model, device, held
        self.tests, self.kept = {}, kept
        if model.text is not None:
            self.columns = ["val_top1"] if held.classes else ["val_loss", "val_r1"]
            for name in self.test_names():
                source = self.tests[f"zeroshot_{name}"] = sets.open_source(name, settings.root, "test")
                if source.classes is None:
                    raise ValueError(f"--zeroshot {name} has captions, no classes: type a labelled set")
        else:
            if settings.data == "scenes":  # captions, but labelled as well
                kinds = sets.open_source("scenes-kind", settings.root, "train")
                self.kept, self.held = data.holdout(kinds, settings.seed)
            self.columns = ["knn_top1"] if self.held.classes else []
        self.columns += self.tests

    def test_names(self):
        """What --zeroshot names, or where nothing was typed the set itself, or imagenet, if it is there."""
        settings, name = self.settings, "imagenet"
        if settings.zeroshot is not None:
            return [name for name in console.names(settings.zeroshot) if name != "none"]
        if settings.data.startswith(("scenes-told", "scenes-uncurated")):
            name = "scenes"
        elif self.held.classes or settings.data == "scenes":
            name = settings.data
        return [name] if sets.found(name, settings.root) else []

    def __call__(self):
        model, device, workers = self.model, self.device, self.settings.workers
        training, columns, score = model.training, {}, None
        model.eval()
        for column, source in self.tests.items():
            columns[column] = zeroshot.evaluate(model, source, device, workers=workers)["top1"]
        if "val_top1" in self.columns and len(self.held):
            score = columns["val_top1"] = zeroshot.evaluate(model, self.held, device, workers=workers)["top1"]
        elif "val_r1" in self.columns and len(self.held) > 1:
            images, texts, owner = zeroshot.embed_pairs(model, self.held, device, workers)
            found = zeroshot.recall(images, texts, owner, ks=(1,))
            score = columns["val_r1"] = sum(values[1] for values in found.values()) / 2
            columns["val_loss"] = held_loss(images, texts, owner, model.logit_scale.exp())
        elif "knn_top1" in self.columns and len(self.held):
            score = columns["knn_top1"] = self.neighbours(workers)
        model.train(training)
        return columns, score

    def neighbours(self, workers):
        """k-NN accuracy of the held-out part, at most 2,000 images, among at most 5,000 others."""
        parts = []
        for source, most in ((self.kept, 5000), (self.held, 2000)):
            source = data.subset(source, data.permutation(len(source), 0, 0)[:most])
            size = self.model.config.image_size
            parts += evaluate.apply_to_set(source, size, self.device, self.model.visual, workers=workers)[:2]
        return evaluate.knn(*parts, classes=len(self.held.classes))


def held_loss(images, texts, owner, scale, batch=256):
    """InfoNCE of held-out pairs, an image with its first caption, in batches of at most 256."""
    first = torch.searchsorted(owner.cpu(), torch.arange(len(images))).to(texts.device)
    parts = torch.arange(len(images), device=images.device).split(batch)
    losses = [info_nce(images[part], texts[first[part]], scale)[0].item() for part in parts]
    return sum(losses) / len(losses)


def class_floor(batch, classes):
    """The least InfoNCE, in nats, if captions name only the class: the mean of log(rows of the class)."""
    counts = np.random.default_rng(0).multinomial(batch, [1 / classes] * classes, size=20)  # [20, K]
    return float((counts * np.log(np.maximum(counts, 1))).sum(1).mean() / batch)
