"""Measuring: a function over every picture of a labelled set, and what its scores are worth.

Paper: section 4 (accuracy, and the mean per class where the classes are uneven).

    source -> evaluation views [B, 3, S, S] -> apply -> results [n, ...], labels [n]
    scores [n, K], labels [n] -> per cent

Shared by the three test tasks, sharded over the ranks without counting a picture twice.
"""

import csv
import os
import time

import torch
from torch.utils.data import DataLoader, Subset

import augment
import data
import ranks


@torch.no_grad()
def over(source, image_size, device, apply, *, resize=None, workers=0, batch=256):
    """Apply a function to the evaluation views of a source, sharded over the ranks: (results [n, ...],
    labels [n]) of all.
    """
    indices = ranks.mine(range(len(source)))
    loader = DataLoader(
        Subset(data.Labelled(source, image_size, resize), indices),
        batch,
        num_workers=workers,
        worker_init_fn=data.one_thread,
    )
    results, labels = [], []
    for images, targets in loader:
        with ranks.autocast(device):
            results.append(apply(augment.normalise(images.to(device))).float())
        labels.append(targets.to(device))
    return ranks.gather(torch.cat(results)), ranks.gather(torch.cat(labels))


def metrics(scores, labels):
    """Scores [n, K] and labels [n] -> top-1, top-5 and mean per class, in per cent."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices  # [n, 5]
    hits = top == labels[:, None]
    first = hits[:, 0].float()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    right = torch.bincount(labels, weights=first, minlength=scores.shape[1])
    seen = counts > 0
    return {
        "top1": 100 * first.mean().item(),
        "top5": 100 * hits.any(1).float().mean().item(),
        "per_class": 100 * (right[seen] / counts[seen]).mean().item(),
    }


RESULTS = "results.csv"
COLUMNS = ("date", "checkpoint", "task", "data", "how", "metric", "value", "pictures", "classes")


def record(checkpoint, task, source, how, metric, value):
    """Append a row to results.csv in the checkpoint's folder, which a reader finds whole at any moment.

    `task`: zeroshot, linear or finetune. `how`: what else decided the number, in words. `value`: per cent.
    """
    if ranks.rank():
        return
    path = os.path.join(os.path.dirname(checkpoint), RESULTS)
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (date, os.path.basename(checkpoint), task, source.name, how, metric, f"{value:.4f}", len(source))
    row = dict(zip(COLUMNS, (*values, len(source.classes or [])), strict=True))
    try:
        append(path, row)
    except OSError as error:
        ranks.warn(f"the result is not noted, {path} cannot be written ({error})")


def append(path, row):
    """A row more in a CSV of COLUMNS, written whole to a temporary name and renamed."""
    rows = []
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, row])
    os.replace(f"{path}.tmp", path)
