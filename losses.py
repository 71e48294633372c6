"""The two losses whose sum is SLIP: InfoNCE between images and captions, NT-Xent between views of an image.

Paper: Algorithm 1; InfoNCE as in CLIP (Radford et al. 2021), NT-Xent as in SimCLR (Chen et al. 2020).

    image_embed, text_embed [B, E] -> similarity [B, B] -> cross entropy of rows and of columns -> scalar
    z1, z2 [B, E] -> similarity [2B, 2B] without its diagonal -> cross entropy -> scalar

Left to others: ranks. Features are gathered first (ranks.py), so a batch is always the global batch.
All is float32 or float64, under autocast too: bf16 has 8 bits for similarities that are scaled by up to 100.
"""

import math

import torch
import torch.nn.functional as F


def full_precision(x):
    return x.float() if x.dtype.itemsize < 4 else x


def unit_norm(embeds):
    """Embeds [..., E] of any precision -> rows of length 1, float32 or float64."""
    return F.normalize(full_precision(embeds), dim=-1)


def info_nce(image_embed, text_embed, logit_scale, same=None):
    """CLIP's loss: each image finds its caption among the batch's, each caption its image; mean of the two.

    image_embed, text_embed: [B, E], not normalised, row i belongs to row i. logit_scale: scalar, the factor
    itself, not its logarithm. same: class ids, int64 [B], for captions that are class names: rows of an equal
    id are then not each other's negatives (the paper has no such thing). Returns (loss, accuracy), scalars;
    the accuracy, 0-1, is that of both directions. Chance without `same`: log B and 1 / B."""
    if image_embed.shape != text_embed.shape:
        raise ValueError(f"found embeds of {image_embed.shape} and {text_embed.shape}, expected equal shapes")
    with torch.autocast(image_embed.device.type, enabled=False):
        image_embed, text_embed = unit_norm(image_embed), unit_norm(text_embed)
        logits = logit_scale * image_embed @ text_embed.T  # [B, B]
        labels = torch.arange(len(logits), device=logits.device)
        if same is not None:
            other_row = labels[:, None] != labels
            logits = logits.masked_fill((same[:, None] == same) & other_row, -math.inf)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    hits = (logits.argmax(1) == labels).float().mean() + (logits.argmax(0) == labels).float().mean()
    return loss, hits / 2


def nt_xent(z1, z2, temperature=0.1):
    """SimCLR's loss: each view finds the other view of its image among the 2B - 1 other views of the batch.

    z1, z2: [B, E], not normalised, two views of the same images. Returns (loss, accuracy): means over all
    2B views; the accuracy is 0-1. Chance: log(2B - 1) and 1 / (2B - 1)."""
    if z1.shape != z2.shape:
        raise ValueError(f"found views of {list(z1.shape)} and {list(z2.shape)}, expected equal shapes")
    with torch.autocast(z1.device.type, enabled=False):
        z = unit_norm(torch.cat([z1, z2]))  # [2B, E]
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        logits = (z @ z.T / temperature).masked_fill(itself, -math.inf)  # [2B, 2B]
        labels = torch.arange(len(z), device=z.device).roll(len(z1))  # the other view of i stands at i + B
        loss = F.cross_entropy(logits, labels)
    return loss, (logits.argmax(1) == labels).float().mean()
