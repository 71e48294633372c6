"""The self-supervised branch: what the image tower learns from pictures alone, beside the language loss.

Paper: section 3.2 (SimCLR) and the comparison of partners: MoCo v3, BYOL, BEiT. Every partner has the same
methods, called by whoever trains:

    branch.begin(views, encoder)                    before the first step: what is learned from pictures first
    branch.look(tower, chunk) -> {name: [b, ...]}   in SLIP.forward: runs the tower on a chunk's views
    branch(features)          -> loss, accuracy     after the gather: sees the whole global batch
    branch.after_step(tower, progress)              after the optimizer's step: momentum encoders move
    branch.chance(batch)      -> loss, accuracy, words   of a branch that has learned nothing

So BatchNorm's statistics are the global batch's, for any number of chunks and ranks, without a SyncBatchNorm.
Not here: SimCLR's loss (losses.py), drawing views and masks (augment.py).
"""

import copy
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from augment import denormalise
from losses import full_precision, normalised, nt_xent
from vit import cut


def mlp(*widths, bias=True, norm_out=False):
    """Linear layers from width to width, BatchNorm and ReLU after all but the last; `norm_out`: after the
    last a BatchNorm without scale and shift.
    """
    layers = []
    for width, out in zip(widths, widths[1:]):
        layers += [nn.Linear(width, out, bias=bias), nn.BatchNorm1d(out), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([nn.BatchNorm1d(widths[-1], affine=False)] if norm_out else []))


class Branch(nn.Module):
    """What a partner need not say: it learns nothing beforehand and moves by gradient alone.

    `settings`: fields of slip.Config that are the partner's own. It is made with the tower, whose width and
    patches it needs, and the config's ssl_hidden, ssl_out, ssl_temp.
    """

    settings = {}

    def begin(self, views, encoder=None):
        """`views()` -> normalised pictures [n, 3, S, S]; `encoder`: a VisualTokenizer, or None."""

    def after_step(self, tower, progress):
        """`progress`: the share of the steps that are done, 0 to 1."""


class SimCLR(Branch):
    """Two strong views of a picture find each other. The head takes the class token's feature, not the CLIP
    embedding.
    """

    def __init__(self, tower, hidden=4096, out=256, temperature=0.1):
        super().__init__()
        self.temperature = temperature
        self.head = mlp(tower.width, hidden, hidden, out)

    def look(self, tower, chunk):
        """Views [b, 3, H, W] -> features [b, D], each."""
        return {"features1": tower(chunk["view1"]), "features2": tower(chunk["view2"])}

    def forward(self, features):
        """Features [B, D] of both views -> (loss, accuracy). The head is called once a view: its statistics
        are a view's.
        """
        z1, z2 = self.head(features["features1"]), self.head(features["features2"])  # [B, E]
        return nt_xent(z1, z2, self.temperature)

    def chance(self, batch):
        """(loss, accuracy 0-1, the loss in words) of a branch that has learned nothing."""
        return math.log(2 * batch - 1), 1 / (2 * batch - 1), f"log {2 * batch - 1}"


class Momentum(Branch):
    """What MoCo v3 and BYOL share. Tower, projector and predictor see a view and predict the embedding of the
    other view by a slow copy of tower and projector, which follows as a moving average, without gradient.
    """

    def __init__(self, tower, projector, predictor, momentum):
        super().__init__()
        self.projector, self.predictor, self.momentum = projector, predictor, momentum
        self.slow_tower = copy.deepcopy(tower).requires_grad_(False)
        self.slow_projector = copy.deepcopy(projector).requires_grad_(False)

    def look(self, tower, chunk):
        """Views [b, 3, H, W] -> features [b, D] of both by both towers."""
        features = {"features1": tower(chunk["view1"]), "features2": tower(chunk["view2"])}
        with torch.no_grad():
            slow = {"slow1": self.slow_tower(chunk["view1"]), "slow2": self.slow_tower(chunk["view2"])}
        return features | slow

    def forward(self, features):
        """Features [B, D] -> (loss, accuracy): each view predicts the other's slow embedding."""
        names = ("features1", "features2")
        q1, q2 = (self.predictor(self.projector(features[name])) for name in names)  # [B, E]
        with torch.no_grad():
            k1, k2 = self.slow_projector(features["slow1"]), self.slow_projector(features["slow2"])  # [B, E]
        with torch.autocast(q1.device.type, enabled=False):
            loss1, hits1 = self.compare(*normalised(q1, k2))
            loss2, hits2 = self.compare(*normalised(q2, k1))
        return loss1 + loss2, (hits1 + hits2) / 2

    @torch.no_grad()
    def after_step(self, tower, progress):
        """Move the copy: slow = m slow + (1 - m) quick, m from `momentum` to 1 along half a cosine.
        Parameters only: BatchNorm's statistics are the copy's own.
        """
        m = 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2
        for slow, quick in ((self.slow_tower, tower), (self.slow_projector, self.projector)):
            for mine, new in zip(slow.parameters(), quick.parameters(), strict=True):
                mine.lerp_(new, 1 - m)


def nearest(similarity):
    """Share of rows [B, B] whose largest entry is the one on the diagonal."""
    return (similarity.argmax(1) == torch.arange(len(similarity), device=similarity.device)).float().mean()


class MoCoV3(Momentum):
    """A view finds the slow embedding of the other view among the batch's (Chen, Xie, He 2021,
    arXiv 2104.02057, algorithm 1): InfoNCE in one direction, times 2T.
    """

    settings = {"ssl_temp": 0.2}

    def __init__(self, tower, hidden=4096, out=256, temperature=0.2, momentum=0.99):
        projector = mlp(tower.width, hidden, hidden, out, bias=False, norm_out=True)
        predictor = mlp(out, hidden, out, bias=False, norm_out=True)
        super().__init__(tower, projector, predictor, momentum)
        self.temperature = temperature

    def compare(self, q, k):
        similarity = q @ k.T  # [B, B]
        labels = torch.arange(len(q), device=q.device)
        loss = 2 * self.temperature * F.cross_entropy(similarity / self.temperature, labels)
        return loss, nearest(similarity).detach()

    def chance(self, batch):
        factor = 4 * self.temperature
        return factor * math.log(batch), 1 / batch, f"{factor:g} log {batch}"


class BYOL(Momentum):
    """A view predicts the slow embedding of the other view, without negatives (Grill et al. 2020,
    arXiv 2006.07733, equation 2): squared distance of unit vectors. The temperature has no part in it.
    """

    def __init__(self, tower, hidden=4096, out=256, temperature=None, momentum=0.996):
        super().__init__(tower, mlp(tower.width, hidden, out), mlp(out, hidden, out), momentum)

    def compare(self, q, k):
        loss = (q - k).square().sum(dim=1).mean()  # 2 - 2 cos
        return loss, nearest(q @ k.T).detach()  # in no loss: shows a collapse, where the loss does not

    def chance(self, batch):
        return 4.0, 1 / batch, "2 + 2, right angles"


class BEiT(Branch):
    """Some patches are hidden, and the tower says which visual token stands in each (Bao et al. 2022,
    arXiv 2106.08254). The tokens come from a codebook: k-means over patches, learned in `begin`, or a
    VisualTokenizer, as the paper took DALL-E's.
    """

    settings = {"ssl_out": 512}  # visual tokens of the built-in codebook

    def __init__(self, tower, hidden=None, out=512, temperature=None):
        super().__init__()
        self.patch = tower.patch_embed.patch
        if tower.patch_embed.num_patches == 1:
            raise ValueError("BEiT hides patches, found one: type a smaller --patch or a larger --image-size")
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(tower.width), std=0.02))
        self.head = nn.Linear(tower.width, out)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.encoder = None
        self.register_buffer("codebook", torch.zeros(out, 3 * self.patch**2))

    def begin(self, views, encoder=None):
        self.encoder = encoder
        if encoder is None and not self.codebook.any():  # a run that goes on has it in its checkpoint
            points = cut(views(), self.patch).flatten(0, 1)  # [n N, 3 P P]
            self.codebook.copy_(kmeans(points, len(self.codebook)))

    @torch.no_grad()
    def tokens(self, images):
        """Normalised views [b, 3, H, W] -> a visual token for each patch, [b, N]."""
        with torch.autocast(images.device.type, enabled=False):  # in bf16 one patch in 13 changed its token
            return self.encoder(images) if self.encoder else closest(cut(images, self.patch), self.codebook)

    def look(self, tower, chunk):
        """View [b, 3, H, W] and mask [b, N] -> for each picture the sum of its hidden patches' losses, of
        those told right, and their number: [b] each.
        """
        images, mask = chunk["view1"], chunk["view1_mask"]
        patches = tower.patch_embed(images)  # [b, N, D]
        masked = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)  # [b, N, D]
        logits = self.head(tower.encode(masked)[:, 1:][mask])  # [M, K]: M hidden patches, K codes
        labels, rows = self.tokens(images)[mask], mask.nonzero()[:, 0]  # [M]: its token, its picture
        with torch.autocast(images.device.type, enabled=False):
            losses = F.cross_entropy(full_precision(logits), labels, reduction="none")
        zeros = losses.new_zeros(len(images))  # [b]
        hits = (logits.argmax(1) == labels).to(losses.dtype)
        sums = {"token_loss": zeros.index_add(0, rows, losses), "token_hits": zeros.index_add(0, rows, hits)}
        return sums | {"token_count": mask.sum(1).to(losses.dtype)}

    def forward(self, features):
        """Sums of the pictures [B] -> (loss, accuracy), means over all hidden patches of the batch."""
        count = features["token_count"].sum()
        return features["token_loss"].sum() / count, (features["token_hits"].sum() / count).detach()

    def chance(self, batch):
        codes = len(self.codebook)
        return math.log(codes), 1 / codes, f"log {codes}"


BRANCHES = {"simclr": SimCLR, "mocov3": MoCoV3, "byol": BYOL, "beit": BEiT}


# Visual tokens


def closest(points, codes):
    """The nearest of codes [K, C] for points [..., C], by Euclidean distance -> [...]."""
    return (codes.square().sum(1) - 2 * points @ codes.T).argmin(-1)


def kmeans(points, count, rounds=10, most=50_000):
    """Lloyd's algorithm on at most `most` of points [n, C], begun at some of them -> codes [count, C].

    Drawn from a generator of its own, so every rank finds the same. Where many points are equal (black
    corners), some codes begin equal; the later ones are then nobody's nearest.
    """
    generator = torch.Generator().manual_seed(0)
    points = points[torch.randperm(len(points), generator=generator)[:most]]
    if len(points) < count:
        raise ValueError(
            f"found {len(points)} patches, expected {count} or more for as many visual tokens: type a "
            "smaller --patch, more pictures, or --visual-tokenizer FILE"
        )
    codes = points[:count].clone()
    for _ in range(rounds):
        labels = torch.cat([closest(part, codes) for part in points.split(8192)])  # [n]
        sums = torch.zeros_like(codes).index_add_(0, labels, points)  # [K, C]
        sizes = torch.bincount(labels, minlength=count)[:, None]  # [K, 1]
        codes = torch.where(sizes > 0, sums / sizes.clamp(min=1), codes)  # one that nobody is near stays
    return codes


class VisualTokenizer:
    """A TorchScript file that turns pictures [b, 3, H, W] in [0, 1] into logits [b, K, h, w], such as
    DALL-E's encoder with its own scaling of pixels inside. The file is a program: loading it runs it.

    Pictures are resized so that h w tokens come out, one for each of the tower's patches. Raises ValueError
    or FileNotFoundError with one sentence.
    """

    def __init__(self, path, image_size, patch):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no file at {path}: --visual-tokenizer wants a TorchScript encoder")
        grid = image_size // patch
        try:
            self.encoder = torch.jit.load(path, map_location="cpu").eval()
            self.side = image_size * grid // self.logits(torch.zeros(1, 3, image_size, image_size)).shape[-1]
            found = self.logits(torch.zeros(1, 3, self.side, self.side)).shape
        except (RuntimeError, IndexError, AttributeError, ZeroDivisionError, torch.jit.Error) as error:
            lines = f"{error}".strip().splitlines()  # what a program raises itself stands last
            reason = lines[-1 if isinstance(error, torch.jit.Error) else 0][:120]
            raise ValueError(
                f"{path} is no TorchScript encoder of {image_size}-pixel pictures: {reason}"
            ) from None
        if len(found) != 4 or found[2:] != (grid, grid):
            raise ValueError(
                f"{path} gives {list(found)} for {self.side} pixels, expected [1, K, {grid}, {grid}]"
            )
        self.size = found[1]

    @torch.no_grad()
    def logits(self, images):
        return self.encoder(images)

    def __call__(self, images):
        """Normalised views [b, 3, H, W] -> visual tokens [b, N]."""
        self.encoder.to(images.device)  # no part of the model, which is moved as a whole
        pictures = F.interpolate(denormalise(images), (self.side, self.side), mode="bilinear", antialias=True)
        return self.logits(pictures.float()).argmax(1).flatten(1)  # [b, h w]
