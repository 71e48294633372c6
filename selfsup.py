"""The self-supervised branch: what the image tower learns from images alone, beside the language loss.

Paper: SimCLR in Algorithm 1; the other three in the comparison of partners. `forward` has the global batch.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from losses import full_precision, unit_norm
from vit import patchify


def mlp(*widths, moco=False):
    """Linear layers, with BatchNorm and ReLU after all but the last; `moco`: no bias, BatchNorm last."""
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [nn.Linear(width, out, bias=not moco), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if moco else []))


class Branch(nn.Module):
    """Defaults of a partner. Each has chance(batch) -> what an untrained model scores: (loss, accuracy 0-1,
    the loss in words), and all but SimCLR forward(features of the global batch) -> (loss, accuracy)."""

    settings = {}  # its own defaults for fields of slip.Config

    def prepare(self, make_images): ...  # before the first step; make_images() -> normalised [n, 3, S, S]
    def after_step(self, tower, progress): ...  # after the optimizer's step; progress 0-1

    def targets(self, views):  # from a chunk's views, never recomputed -> {name: [b, ...]}
        return {}

    def features(self, tower, views):  # the tower on a chunk's views [b, 3, S, S] -> {name: [b, ...]}
        return {name: tower(views[name]) for name in ("view1", "view2")}


class SimCLR(Branch):
    """Two views of an image find each other. The head takes the tower's features, as CLIP's projection does,
    not CLIP's embedding, which need not keep what captions do not name. train.objective has the loss."""

    def __init__(self, tower, hidden=4096, out=256, temperature=0.1):
        super().__init__()
        self.head, self.temperature = mlp(tower.width, hidden, hidden, out), temperature

    def chance(self, batch):
        return math.log(2 * batch - 1), 1 / (2 * batch - 1), f"log {2 * batch - 1}"


class Momentum(Branch):
    """MoCo v3 and BYOL: one view predicts what a slow copy of tower and projector makes of the other."""

    def __init__(self, tower, projector, predictor, momentum):
        super().__init__()
        self.projector, self.predictor, self.momentum = projector, predictor, momentum
        self.slow_tower = copy.deepcopy(tower).requires_grad_(False)
        self.slow_projector = copy.deepcopy(projector).requires_grad_(False)

    def features(self, tower, views):
        slow = super().features(self.slow_tower, views)
        return super().features(tower, views) | {"slow1": slow["view1"], "slow2": slow["view2"]}

    def forward(self, features):
        q1, q2 = (self.predictor(self.projector(features[name])) for name in ("view1", "view2"))  # [B, E]
        k1, k2 = (self.slow_projector(features[name]) for name in ("slow1", "slow2"))  # [B, E], no gradient
        with torch.autocast(q1.device.type, enabled=False):
            q1, q2, k1, k2 = map(unit_norm, (q1, q2, k1, k2))
            cosines = torch.stack([q1 @ k2.T, q2 @ k1.T])  # [2, B, B]: each view with the other's slow embeds
            labels = torch.arange(len(q1), device=q1.device)
            loss = self.loss(cosines[0], labels) + self.loss(cosines[1], labels)
        return loss, (cosines.argmax(2) == labels).float().mean()

    def after_step(self, tower, progress):
        m = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2  # to 1 along half a cosine
        slow = [*self.slow_tower.parameters(), *self.slow_projector.parameters()]
        for old, new in zip(slow, [*tower.parameters(), *self.projector.parameters()], strict=True):
            old.lerp_(new.detach(), 1 - m)  # m old + (1 - m) new; BatchNorm's statistics are the copy's own


class MoCoV3(Momentum):
    """InfoNCE in one direction, times 2T (Chen, Xie, He 2021, arXiv 2104.02057, algorithm 1)."""

    settings = {"ssl_temp": 0.2}

    def __init__(self, tower, hidden=4096, out=256, temperature=0.2, momentum=0.99):
        projector = mlp(tower.width, hidden, hidden, out, moco=True)
        super().__init__(tower, projector, mlp(out, hidden, out, moco=True), momentum)
        self.temperature = temperature

    def loss(self, cosines, labels):
        return 2 * self.temperature * F.cross_entropy(cosines / self.temperature, labels)

    def chance(self, batch):
        return 4 * self.temperature * math.log(batch), 1 / batch, f"{4 * self.temperature:g} log {batch}"


class BYOL(Momentum):
    """Squared distance of unit vectors, no negatives (Grill et al. 2020, arXiv 2006.07733, equation 2)."""

    def __init__(self, tower, hidden=4096, out=256, temperature=None, momentum=0.996):
        super().__init__(tower, mlp(tower.width, hidden, out), mlp(out, hidden, out), momentum)

    def loss(self, cosines, labels):
        return (2 - 2 * cosines.diagonal()).mean()  # a collapse shows in the accuracy, not here

    def chance(self, batch):
        return 4.0, 1 / batch, "2 + 2, right angles"


class BEiT(Branch):
    """Predict visual tokens (theirs: DALL-E's) of masked patches (Bao et al. 2022, arXiv 2106.08254)."""

    settings = {"ssl_out": 512}  # a visual token is the nearest of so many k-means centres

    def __init__(self, tower, hidden=None, out=512, temperature=None):
        super().__init__()
        self.patch = tower.patch_embed.patch
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(tower.width), std=0.02))
        self.head = nn.Linear(tower.width, out)
        self.register_buffer("codebook", torch.zeros(out, 3 * self.patch**2))

    def prepare(self, make_images):
        if not self.codebook.any():  # a resumed run has it in its checkpoint
            self.codebook.copy_(kmeans(patchify(make_images(), self.patch).flatten(0, 1), len(self.codebook)))

    def targets(self, views):
        patches = patchify(views["view1"], self.patch).flatten(0, 1)  # [b N, 3 P P]; float32 in autocast too
        return {"view1_tokens": torch.cdist(patches, self.codebook).argmin(1).view(len(views["view1"]), -1)}

    def features(self, tower, views):
        """View, mask bool [b, N], visual tokens [b, N] -> losses and hits [b, M] of the M masked patches."""
        mask, patches = views["view1_mask"], tower.patch_embed(views["view1"])  # [b, N], [b, N, D]
        masked = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)  # [b, N, D]
        labels = views["view1_tokens"][mask].view(len(mask), -1)  # [b, M]
        logits = self.head(tower.encode(masked)[:, 1:][mask]).view(*labels.shape, -1)  # [b, M, K]
        losses = F.cross_entropy(full_precision(logits).mT, labels, reduction="none")  # [b, M]
        return {"token_loss": losses, "token_hits": (logits.argmax(-1) == labels).to(losses.dtype)}

    def forward(self, features):
        return features["token_loss"].mean(), features["token_hits"].mean().detach()

    def chance(self, batch):
        return math.log(len(self.codebook)), 1 / len(self.codebook), f"log {len(self.codebook)}"


BRANCHES = {"simclr": SimCLR, "mocov3": MoCoV3, "byol": BYOL, "beit": BEiT}


def kmeans(points, count, rounds=10, most=50_000):
    """Lloyd's algorithm on at most `most` of points [n, C], started from some of them -> codes [count, C]."""
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:most]]
    codes = points[torch.arange(count) % len(points)]  # with fewer points there are equal codes
    for _ in range(rounds):
        labels = torch.cat([torch.cdist(part, codes).argmin(1) for part in points.split(8192)])  # [n]
        sums = torch.zeros_like(codes).index_add_(0, labels, points)  # [K, C]
        sizes = torch.bincount(labels, minlength=count)[:, None]  # [K, 1]
        codes = torch.where(sizes > 0, sums / sizes, codes)  # one that nobody is near stays
    return codes
