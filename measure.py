"""Measuring: a function over every picture of a labelled set, and what its scores are worth.

Paper: section 4 and appendix (accuracy; the mean per class where classes are uneven; ROC AUC of memes).

    source -> evaluation views [B, 3, S, S] -> apply -> results [n, ...], labels [n]
    scores [n, K], labels [n] -> per cent

Shared by the test tasks, sharded over the ranks without counting a picture twice. Which metric a set
is judged by stands in tasks.py.
"""

import csv
import os
import time

import torch
from torch.utils.data import DataLoader, Subset

import augment
import data
import loop
import ranks


@torch.no_grad()
def over(source, image_size, device, apply, *, resize=None, workers=0, batch=256):
    """Apply a function to the evaluation views of a source, sharded over the ranks: (results [n, ...],
    labels [n]) of all, with a live line. Raises loop.Stop, on every rank, for a picture that cannot be read.
    """
    indices = ranks.mine(range(len(source)))
    loader = DataLoader(  # a rank without a picture looks at one, for the shapes, and keeps nothing of it
        Subset(data.Labelled(source, image_size, resize), indices or [0]),
        batch,
        num_workers=workers,
        worker_init_fn=data.one_thread,
    )
    results, labels, done, bad = [], [], 0, None
    live, begun = loop.Live(), time.monotonic()
    try:
        for images, targets in loader:
            with ranks.autocast(device):
                results.append(apply(augment.normalise(images.to(device))).float())
            labels.append(targets.to(device))
            done = min(done + len(targets) * ranks.world(), len(source))
            speed = done / (time.monotonic() - begun)
            live.show(f"{source.name}  {done:,}/{len(source):,} pictures  {speed:.0f}/s")
    except data.Unreadable as error:
        bad = str(error).rpartition("Unreadable: ")[2].strip()  # without the traceback of a worker
    live.clear()
    if ranks.total(torch.tensor(int(bad is not None), device=device)):  # the others would wait in the gather
        raise loop.Stop(bad or "another rank found a picture that cannot be read")
    results, labels = (torch.cat(part)[: len(indices)] for part in (results, labels))
    return ranks.gather(results), ranks.gather(labels)


METRICS = {  # what `metrics` gives: how it is called
    "top1": "accuracy",
    "top5": "top-5 accuracy",
    "per_class": "mean per class",
    "top1_top5": "mean of top-1, top-5",
    "auc": "ROC AUC",
}


def metrics(scores, labels):
    """Scores [n, K] and labels [n] -> {name of METRICS: per cent}; "auc" of two classes only."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices  # [n, 5]
    hits = top == labels[:, None]
    first = hits[:, 0].float()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    right = torch.bincount(labels, weights=first, minlength=scores.shape[1])
    seen = counts > 0
    top1, top5 = first.mean().item(), hits.any(1).float().mean().item()
    shares = {"top1": top1, "top5": top5, "top1_top5": (top1 + top5) / 2}
    shares["per_class"] = (right[seen] / counts[seen]).mean().item()
    if scores.shape[1] == 2:
        shares["auc"] = auc(scores[:, 1] - scores[:, 0], labels == 1)
    return {name: 100 * share for name, share in shares.items()}


def chance(metric, classes):
    """What guessing gives, in per cent."""
    top1, top5 = 100 / classes, 100 * min(5, classes) / classes
    return {"top1_top5": (top1 + top5) / 2, "top5": top5, "auc": 50.0}.get(metric, top1)


def auc(values, positive):
    """The share of (positive, negative) pairs in which the positive has the larger value, a tie counting
    half; not a number without both kinds. values [n], positive bool [n].

    Exact: from ranks, equal values sharing their mean rank.
    """
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1).double() / 2)[places]  # from 1
    up = int(positive.sum())
    return ((rank[positive].sum() - up * (up + 1) / 2) / (up * (len(values) - up))).item()


RESULTS = "results.csv"
COLUMNS = ("date", "checkpoint", "task", "data", "how", "metric", "value", "pictures", "classes")


def record(checkpoint, task, source, how, metric, value):
    """Append a row to results.csv in the checkpoint's folder, which a reader finds whole at any moment.

    `task`: zeroshot, retrieval, linear, finetune. `how`: what else decided the number, in words. `value`: per
    cent.
    """
    if ranks.rank():
        return
    path = os.path.join(os.path.dirname(checkpoint), RESULTS)
    date = time.strftime("%Y-%m-%d %H:%M:%S")
    values = (date, os.path.basename(checkpoint), task, source.name, how, metric, f"{value:.4f}", len(source))
    row = dict(zip(COLUMNS, (*values, len(source.classes or [])), strict=True))
    try:
        append(path, row)
    except (OSError, ValueError, csv.Error) as error:
        ranks.warn(f"the result is not noted, {path} cannot be written ({error})")


def append(path, row):
    """A row more in a CSV of COLUMNS, written whole to a temporary name and renamed."""
    rows = []
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as file:
            rows = [{n: old.get(n, "") for n in COLUMNS} for old in csv.DictReader(file)]
    loop.write_csv(path, COLUMNS, [*rows, row])
