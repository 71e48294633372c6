"""Evaluation: a frozen model over every image of a set, and the metrics of its scores.

Paper: zero-shot transfer and the appendix (accuracy; the mean per class where classes are uneven; ROC AUC of
the memes). The k nearest neighbours are not in the paper: they show what a run without language learns.

    source -> evaluation views [B, 3, S, S] -> function -> results [n, ...], labels [n]
    scores [n, K], labels [n] -> per cent (which metric a set is judged by: sets.metric)
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import augment
import checkpoints
import console
import data
import ranks
from device import autocast
from losses import unit_norm

METRICS = {  # the keys of `metrics`: what they are called in a table
    "top1": "accuracy",
    "top5": "top-5 accuracy",
    "per_class": "mean per class",
    "top1_top5": "mean of top-1, top-5",
    "auc": "ROC AUC",
}


@dataclass(eq=False)
class EvaluationViews(Dataset):
    """Evaluation samples: (uint8 view [3, S, S], label or -1 without classes, index, or -1 - index for an
    image that cannot be decoded)."""

    source: data.Source
    image_size: int
    resize: int | None = None  # of the short side, pixels; None: image_size

    def __getitem__(self, index):
        try:
            image, label = data.readable(self.source, index, [])
            view = augment.evaluation_view(image, self.image_size, self.resize)
            return view, label if self.source.classes else -1, index
        except data.Unreadable:
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), -1, -1 - index


@torch.no_grad()
def apply_to_set(source, image_size, device, function, *, resize=None, workers=0, batch=256, skip_bad=False):
    """A function of normalised evaluation views [B, 3, S, S], applied to a set, sharded, under autocast ->
    (results float32 [n, ...], labels [n], indices of the images [n]), the same on every rank. An image that
    cannot be decoded raises console.Stop; under `skip_bad` it is left out with a warning."""
    device, count = torch.device(device), len(source)
    if count == 0:
        raise console.Stop(f"{source.name} has no images", 2)
    own = ranks.share([*range(count), *[0] * (-count % ranks.world())])  # the gather wants equal shares
    views = EvaluationViews(source, image_size, resize)
    loader = DataLoader(views, batch, sampler=own, num_workers=workers, worker_init_fn=data.start_worker)
    parts, live = [], console.Live()
    for images, labels, numbers in loader:
        with autocast(device):
            result = function(augment.normalise(images.to(device)))
        parts.append((result.float(), labels.to(device), numbers.to(device)))
        live.show(f"{source.name}  {min(len(parts) * batch, len(own)):,}/{len(own):,} images")
    live.clear()
    results, labels, numbers = (ranks.gather(torch.cat(part))[:count] for part in zip(*parts))
    kept = numbers >= 0
    if not kept.all():
        bad = (-1 - numbers[~kept]).tolist()
        found = f"{len(bad):,} of {count:,} images cannot be decoded, the first is {source.where(bad[0])}"
        if not (skip_bad and kept.any()):
            raise console.Stop(f"{source.name}: {found}: an evaluation set must be whole")
        ranks.warn(f"{source.name}: {found}; they are left out")
    return results[kept], labels[kept], numbers[kept]


def metrics(scores, labels):
    """Scores [n, K] and labels [n] -> {name in METRICS: per cent}; "auc" only for two classes."""
    top = scores.topk(min(5, scores.shape[1]), dim=1).indices  # [n, 5]
    hits = (top == labels[:, None]).float()
    top1, top5 = hits[:, 0].mean().item(), hits.sum(1).mean().item()
    per_class = torch.stack([hits[labels == k, 0].mean() for k in labels.unique()]).mean().item()
    shares = dict(top1=top1, top5=top5, top1_top5=(top1 + top5) / 2, per_class=per_class)
    if scores.shape[1] == 2:
        shares["auc"] = auc(scores[:, 1] - scores[:, 0], labels == 1)
    return {name: 100 * share for name, share in shares.items()}


def chance(metric, classes):
    """What guessing gives, in per cent."""
    top1, top5 = 100 / classes, 100 * min(5, classes) / classes
    return {"top1_top5": (top1 + top5) / 2, "top5": top5, "auc": 50.0}.get(metric, top1)


def auc(values, positive):
    """The share (0-1) of pairs, one positive and one not, in the right order, a tie counting half.
    values [n], positive bool [n]."""
    values, positive = values.cpu(), positive.cpu()  # not every device has float64
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    rank = (counts.cumsum(0) - (counts - 1).double() / 2)[places]  # from 1
    up = int(positive.sum())
    return ((rank[positive].sum() - up * (up + 1) / 2) / (up * (len(values) - up))).item()


def knn(train_features, train_labels, features, labels, classes, k=20):
    """Top-1 accuracy, per cent, of a vote of the k nearest training images, each weighted by its cosine.
    train_features [m, D], train_labels [m], features [n, D], labels [n], so many `classes`."""
    train_features, features = unit_norm(train_features), unit_norm(features)
    cosines, places = (features @ train_features.T).topk(min(k, len(train_features)), dim=1)  # [n, k]
    votes = cosines.new_zeros(len(features), classes).scatter_add_(1, train_labels[places], cosines)
    return 100 * (votes.argmax(1) == labels).float().mean().item()


def logistic_regression(features, labels, classes, decay):
    """The minimum of mean cross entropy + decay/2 |W|^2, features [n, D] float64 -> (W [K, D], b [K]). L-BFGS
    works on V = W C, C C^T = mean of x x^T + decay I: correlated features then take a tenth of the steps."""
    moment = features.T @ features / len(features)  # [D, D]
    inverse = torch.linalg.inv(torch.linalg.cholesky(moment + decay * torch.eye(len(moment))))
    scaled, bias = features.new_zeros(classes, len(moment)), features.new_zeros(classes)
    variables = scaled.requires_grad_(), bias.requires_grad_()
    options = dict(max_iter=5000, tolerance_grad=1e-6, tolerance_change=0)
    optimizer = torch.optim.LBFGS(variables, line_search_fn="strong_wolfe", **options)

    def loss():
        optimizer.zero_grad()
        weight = scaled @ inverse
        value = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (scaled @ inverse).detach(), bias.detach()


def record(checkpoint, task, name, values):
    """Note a dict of plain data in results.json, beside the file of a checkpoint."""
    if ranks.rank():
        return
    path, file = Path(checkpoint), Path(checkpoint).with_name("results.json")
    dated = values | {"date": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        results.setdefault(path.name, {}).setdefault(task, {})[name] = dated
        checkpoints.atomic_save(json.dumps(results, indent=1) + "\n", file)
    except (OSError, ValueError, AttributeError) as error:  # a folder of others; a file that is no such table
        ranks.warn(f"the result is not noted, {file} cannot be read or written ({error})")
