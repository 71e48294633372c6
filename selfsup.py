"""The self-supervised branch: what the image tower learns from images alone, beside the language loss.

Paper: SimCLR in Algorithm 1; MoCo v3, BYOL and BEiT take its place in the comparison of partners. Each has

    prepare(make_images)             before the first step; make_images() -> normalised [n, 3, S, S]
    targets(views)                   from a chunk's views, never in the backward pass -> {name: [b, ...]}
    features(tower, views)           in SLIP.forward: the tower on a chunk's views -> {name: [b, ...]}
    forward(features)                after the gather, on the whole global batch -> (loss, accuracy 0-1)
    after_step(tower, progress)      after the optimizer's step, progress 0-1: the momentum encoder moves
    chance(batch)                    (loss, accuracy, the loss in words) of a branch that has learned nothing

So BatchNorm sees the global batch for any chunks and ranks. NT-Xent is in losses.py, masks in augment.py.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from losses import full_precision, nt_xent, unit_norm
from vit import patchify


def mlp(*widths, bias=True, norm_out=False):
    """Linear layers, with BatchNorm and ReLU after all but the last; `norm_out`: BatchNorm after the last."""
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [nn.Linear(width, out, bias=bias), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if norm_out else []))


class Branch(nn.Module):
    """What a partner does unless it says otherwise: both views through the tower, and nothing else."""

    settings = {}  # its own defaults for fields of slip.Config

    def prepare(self, make_images): ...
    def after_step(self, tower, progress): ...

    def targets(self, views):
        return {}

    def features(self, tower, views):
        """Views [b, 3, H, W] -> features [b, D] of both."""
        return {"view1": tower(views["view1"]), "view2": tower(views["view2"])}


class SimCLR(Branch):
    """Two views of an image find each other. The head takes the tower's feature, not CLIP's embedding."""

    def __init__(self, tower, hidden=4096, out=256, temperature=0.1):
        super().__init__()
        self.head, self.temperature = mlp(tower.width, hidden, hidden, out), temperature

    def forward(self, features):
        """The head is called once for each view, so that BatchNorm's statistics are those of one view."""
        z1, z2 = self.head(features["view1"]), self.head(features["view2"])  # [B, E]
        return nt_xent(z1, z2, self.temperature)

    def chance(self, batch):
        return math.log(2 * batch - 1), 1 / (2 * batch - 1), f"log {2 * batch - 1}"


class Momentum(Branch):
    """MoCo v3 and BYOL: one view predicts the other's embedding by a slow copy of tower and projector."""

    def __init__(self, tower, projector, predictor, momentum):
        super().__init__()
        self.projector, self.predictor, self.momentum = projector, predictor, momentum
        self.slow_tower = copy.deepcopy(tower).requires_grad_(False)
        self.slow_projector = copy.deepcopy(projector).requires_grad_(False)

    def features(self, tower, views):
        """Views [b, 3, H, W] -> features [b, D] of both, by the tower and by its slow copy."""
        fast = super().features(tower, views)
        return fast | {"slow1": self.slow_tower(views["view1"]), "slow2": self.slow_tower(views["view2"])}

    def forward(self, features):
        q1, q2 = (self.predictor(self.projector(features[name])) for name in ("view1", "view2"))  # [B, E]
        k1, k2 = (self.slow_projector(features[name]) for name in ("slow1", "slow2"))  # [B, E], no gradient
        labels, loss, accuracy = torch.arange(len(q1), device=q1.device), 0, 0
        with torch.autocast(q1.device.type, enabled=False):
            for q, k in (unit_norm(q1, k2), unit_norm(q2, k1)):
                cosines = q @ k.T  # [B, B]
                loss = loss + self.loss(cosines, labels)
                accuracy = accuracy + (cosines.argmax(1) == labels).float().mean() / 2
        return loss, accuracy

    @torch.no_grad()
    def after_step(self, tower, progress):
        m = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2  # to 1 along half a cosine
        for slow, fast in ((self.slow_tower, tower), (self.slow_projector, self.projector)):
            for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
                old.lerp_(new, 1 - m)  # m old + (1 - m) new; BatchNorm's statistics are the copy's own


class MoCoV3(Momentum):
    """InfoNCE in one direction, times 2T (Chen, Xie, He 2021, arXiv 2104.02057, algorithm 1)."""

    settings = {"ssl_temp": 0.2}

    def __init__(self, tower, hidden=4096, out=256, temperature=0.2, momentum=0.99):
        projector = mlp(tower.width, hidden, hidden, out, bias=False, norm_out=True)
        super().__init__(tower, projector, mlp(out, hidden, out, bias=False, norm_out=True), momentum)
        self.temperature = temperature

    def loss(self, cosines, labels):
        return 2 * self.temperature * F.cross_entropy(cosines / self.temperature, labels)

    def chance(self, batch):
        factor = 4 * self.temperature
        return factor * math.log(batch), 1 / batch, f"{factor:g} log {batch}"


class BYOL(Momentum):
    """Squared distance of unit vectors, no negatives (Grill et al. 2020, arXiv 2006.07733, equation 2)."""

    def __init__(self, tower, hidden=4096, out=256, temperature=None, momentum=0.996):
        super().__init__(tower, mlp(tower.width, hidden, out), mlp(out, hidden, out), momentum)

    def loss(self, cosines, labels):
        return (2 - 2 * cosines.diagonal()).mean()  # a collapse shows in the accuracy, not here

    def chance(self, batch):
        return 4.0, 1 / batch, "2 + 2, right angles"


class BEiT(Branch):
    """Predict the visual tokens of masked patches (Bao et al. 2022, arXiv 2106.08254, with DALL-E's)."""

    settings = {"ssl_out": 512}  # visual tokens: the nearest of so many patches, found by k-means

    def __init__(self, tower, hidden=None, out=512, temperature=None):
        super().__init__()
        self.patch = tower.patch_embed.patch
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(tower.width), std=0.02))
        self.head = nn.Linear(tower.width, out)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("codebook", torch.zeros(out, 3 * self.patch**2))

    def prepare(self, make_images):
        if not self.codebook.any():  # a resumed run has it in its checkpoint
            points = patchify(make_images(), self.patch).flatten(0, 1)  # [n N, 3 P P]
            self.codebook.copy_(kmeans(points, len(self.codebook)))

    def targets(self, views):
        """View [b, 3, H, W] -> the visual token of each patch [b, N]; in bf16 one in 13 would be another."""
        with torch.autocast(views["view1"].device.type, enabled=False):
            return {"view1_tokens": nearest(patchify(views["view1"], self.patch), self.codebook)}

    def features(self, tower, views):
        """View, mask bool [b, N], visual tokens [b, N] -> losses and hits [b, M] of the M masked patches."""
        mask, patches = views["view1_mask"], tower.patch_embed(views["view1"])  # [b, N], [b, N, D]
        masked = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)  # [b, N, D]
        logits = self.head(tower.encode(masked)[:, 1:][mask])  # [b M, K]: K visual tokens
        labels = views["view1_tokens"][mask]  # [b M]
        losses = F.cross_entropy(full_precision(logits), labels, reduction="none")
        hits = (logits.argmax(1) == labels).to(losses.dtype)
        return {"token_loss": losses.view(len(mask), -1), "token_hits": hits.view(len(mask), -1)}

    def forward(self, features):
        return features["token_loss"].mean(), features["token_hits"].mean().detach()

    def chance(self, batch):
        return math.log(len(self.codebook)), 1 / len(self.codebook), f"log {len(self.codebook)}"


BRANCHES = {"simclr": SimCLR, "mocov3": MoCoV3, "byol": BYOL, "beit": BEiT}


def nearest(points, codes):
    """The nearest of codes [K, C] for points [..., C], by Euclidean distance -> int64 [...]."""
    return (codes.square().sum(1) - 2 * points @ codes.T).argmin(-1)


def kmeans(points, count, rounds=10, most=50_000):
    """Lloyd's algorithm on at most `most` of points [n, C], started from some of them -> codes [count, C]."""
    if len(points) < count:
        raise ValueError(f"found {len(points)} patches, expected {count} or more: give more images")
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:most]]
    codes = points[:count].clone()
    for _ in range(rounds):
        labels = torch.cat([nearest(part, codes) for part in points.split(8192)])  # [n]
        sums = torch.zeros_like(codes).index_add_(0, labels, points)  # [K, C]
        sizes = torch.bincount(labels, minlength=count)[:, None]  # [K, 1]
        codes = torch.where(sizes > 0, sums / sizes.clamp(min=1), codes)  # one that nobody is near stays
    return codes
