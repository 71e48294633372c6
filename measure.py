"""Measuring: a function over every picture of a labelled set, and what its scores are worth.

Paper: section 4 (accuracy, and the mean per class where the classes are uneven).

    source -> evaluation views [B, 3, S, S] -> apply -> results [n, ...], labels [n]
    scores [n, K], labels [n] -> per cent

Shared by the three test tasks, sharded over the ranks without counting a picture twice.
"""

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
