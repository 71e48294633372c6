"""Evaluation: a frozen model over every image of a set, and what its scores are worth.

Paper: zero-shot transfer and the appendix (accuracy; the mean per class where classes are uneven; ROC AUC of
the memes). The k nearest neighbours are not in the paper: they show what a run without language learns.

    source -> evaluation views [B, 3, S, S] -> function -> results [n, ...], labels [n]
    scores [n, K], labels [n] -> per cent (which metric a set is judged by: sets.metric)
"""

import json
import os
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import augment
import console
import data
import ranks
import run
from device import autocast

METRICS = {  # the keys of `metrics`: what they are called in a table
    "top1": "accuracy",
    "top5": "top-5 accuracy",
    "per_class": "mean per class",
    "top1_top5": "mean of top-1, top-5",
    "auc": "ROC AUC",
}
RESULTS = "results.json"


class Numbered(data.EvaluationViews):
    """(view, label or -1 without classes, index, or -1 - index for an image that cannot be decoded)."""

    def __getitem__(self, index):
        try:
            view, label = super().__getitem__(index)
        except data.Unreadable:
            side = self.image_size
            view, label, index = torch.zeros(3, side, side, dtype=torch.uint8), -1, -1 - index
        return view, -1 if self.source.classes is None else label, index


@torch.no_grad()
def apply_to_set(source, image_size, device, function, *, resize=None, workers=0, batch=256, skip_bad=False):
    """Apply a function to a set's normalised evaluation views [B, 3, S, S], sharded, under autocast
    -> (results float32 [n, ...], labels [n], indices of the images [n]), the same on every rank.

    Raises console.Stop if an image cannot be decoded; under `skip_bad` a warning says so and it is left out.
    """
    device, count = torch.device(device), len(source)
    if count == 0:
        raise console.Stop(f"{source.name} has no images")
    own = ranks.share([*range(count), *[0] * (-count % ranks.world())])  # the gather wants equal shares
    views = Numbered(source, image_size, resize)
    loader = DataLoader(views, batch, sampler=own, num_workers=workers, worker_init_fn=data.start_worker)
    parts, done, live = [], 0, console.Live()
    for images, labels, numbers in loader:
        with autocast(device):
            result = function(augment.normalise(images.to(device)))
        parts.append((result.float(), labels.to(device), numbers.to(device)))
        done = min(done + len(labels) * ranks.world(), count)
        live.show(f"{source.name}  {done:,}/{count:,} images")
    live.clear()
    results, labels, numbers = (ranks.gather(torch.cat(part))[:count] for part in zip(*parts))
    kept = numbers >= 0
    if not kept.all():
        bad = (-1 - numbers[~kept]).tolist()
        found = f"{len(bad):,} of {count:,} images cannot be decoded, the first is {source.where(bad[0])}"
        if not skip_bad or len(bad) == count:
            raise console.Stop(f"{source.name}: {found}: an evaluation set must be whole")
        ranks.warn(f"{source.name}: {found}; they are left out")
    return results[kept], labels[kept], numbers[kept]


def metrics(scores, labels):
    """Scores [n, K] and labels [n] -> {name in METRICS: per cent}; "auc" only for two classes."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices  # [n, 5]
    hits = top == labels[:, None]
    first = hits[:, 0].float()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    right = torch.bincount(labels, weights=first, minlength=scores.shape[1])
    present = counts > 0
    top1, top5 = first.mean().item(), hits.any(1).float().mean().item()
    shares = {"top1": top1, "top5": top5, "top1_top5": (top1 + top5) / 2}
    shares["per_class"] = (right[present] / counts[present]).mean().item()
    if scores.shape[1] == 2:
        shares["auc"] = auc(scores[:, 1] - scores[:, 0], labels == 1)
    return {name: 100 * share for name, share in shares.items()}


def chance(metric, classes):
    """What guessing gives, in per cent."""
    top1, top5 = 100 / classes, 100 * min(5, classes) / classes
    return {"top1_top5": (top1 + top5) / 2, "top5": top5, "auc": 50.0}.get(metric, top1)


def auc(values, positive):
    """The share (0-1) of (positive, negative) pairs whose positive has the larger value, a tie counting half.
    values [n], positive bool [n] of both kinds. Exact: equal values share their mean rank.
    """
    values, positive = values.cpu(), positive.cpu()  # not every device has float64
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1).double() / 2)[places]  # from 1
    up = int(positive.sum())
    return ((rank[positive].sum() - up * (up + 1) / 2) / (up * (len(values) - up))).item()


def knn(train_features, train_labels, features, labels, classes, k=20):
    """Top-1 accuracy, per cent, of a vote of the k nearest training images, each vote weighted by its cosine.

    train_features [m, D], train_labels [m], features [n, D], labels [n]. `classes`: how many there are.
    """
    nearest = F.normalize(train_features.float(), dim=1)  # [m, D]
    right = 0
    for rows, own in zip(features.float().split(1024), labels.split(1024)):
        cosines, places = (F.normalize(rows, dim=1) @ nearest.T).topk(min(k, len(nearest)), dim=1)  # [b, k]
        votes = cosines.new_zeros(len(rows), classes).scatter_add_(1, train_labels[places], cosines)
        right += (votes.argmax(1) == own).sum().item()
    return 100 * right / len(labels)


def record(checkpoint, task, name, values):
    """Put a result, a dict of plain data, into results.json beside a checkpoint (a file, or its run folder):
    {file: {task: {name of the set: values and date}}}. It replaces an earlier one of the same names.
    """
    if ranks.rank():
        return
    folder, file = os.path.split(
        os.path.join(checkpoint, run.CHECKPOINT) if os.path.isdir(checkpoint) else checkpoint
    )
    path, results = os.path.join(folder, RESULTS), {}
    try:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as lines:
                results = json.load(lines)
        values = values | {"date": time.strftime("%Y-%m-%d %H:%M:%S")}
        results.setdefault(file, {}).setdefault(task, {})[name] = values
        run.write_text(path, json.dumps(results, indent=1) + "\n")
    except (OSError, ValueError, AttributeError) as error:  # a full disk; no JSON, or another's
        ranks.warn(f"the result is not noted, {path} cannot be written ({error})")
