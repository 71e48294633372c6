"""The two losses whose sum is SLIP: InfoNCE between pictures and captions, NT-Xent between two views
of a picture.

Paper: Algorithm 1, sections 3.1 and 3.2; Radford et al. 2021 (CLIP), Chen et al. 2020 (SimCLR).

    image_embed, text_embed [B, E] -> similarity [B, B] -> cross entropy of rows and of columns -> scalar
    z1, z2 [B, E] -> similarity [2B, 2B] without its diagonal -> cross entropy -> scalar

Not here: ranks. The features are gathered first (ranks.py), so a batch is always the global batch.
Everything is float32, also under autocast: bf16 has 8 bits for the similarities, which are scaled by
up to 100.
"""

import argparse
import math

import torch
import torch.nn.functional as F


def full_precision(x):
    return x.float() if x.dtype.itemsize < 4 else x


def normalised(*embeds):
    return [F.normalize(full_precision(embed), dim=-1) for embed in embeds]


def info_nce(image_embed, text_embed, logit_scale):
    """CLIP's loss: each picture finds its caption among the batch's, each caption its picture; the mean of
    the two.

    image_embed, text_embed: [B, E], not normalised, row i belongs to row i. logit_scale: scalar, the factor
    itself (not its logarithm). Returns (loss, accuracy): scalars; the accuracy, 0-1, is that of both
    directions. Chance: log B and 1/B.
    """
    if image_embed.shape != text_embed.shape:
        raise ValueError(
            f"found embeds of {list(image_embed.shape)} and {list(text_embed.shape)}, expected equal shapes"
        )
    with torch.autocast(image_embed.device.type, enabled=False):
        image_embed, text_embed = normalised(image_embed, text_embed)
        logits = logit_scale * image_embed @ text_embed.T  # [B, B]
        labels = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    hits = (logits.argmax(1) == labels).float().mean() + (logits.argmax(0) == labels).float().mean()
    return loss, hits.detach() / 2


def nt_xent(z1, z2, temperature=0.1):
    """SimCLR's loss: each view finds the other view of its picture among the 2B - 1 other views of the batch.

    z1, z2: [B, E], not normalised, two views of the same pictures. Returns (loss, accuracy): means over all
    2B anchors; the accuracy is 0-1. Chance: log(2B - 1) and 1/(2B - 1).
    """
    if z1.shape != z2.shape:
        raise ValueError(f"found views of {list(z1.shape)} and {list(z2.shape)}, expected equal shapes")
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat(normalised(z1, z2))  # [2B, E]
        logits = z @ z.T / temperature  # [2B, 2B]
        logits = logits.masked_fill(
            torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf
        )  # not itself
        labels = torch.arange(len(z), device=z.device).roll(len(z1))  # the other view of i stands at i + B
        loss = F.cross_entropy(logits, labels)
    return loss, (logits.argmax(1) == labels).float().mean().detach()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Both losses on perfect, random and collapsed embeddings, beside the theory's values."
    )
    parser.add_argument("--batch-size", type=int, default=256, help="pictures in the batch (default: 256)")
    args = parser.parse_args(argv)
    if not 2 <= args.batch_size <= 4096:
        parser.error(f"found --batch-size {args.batch_size}, expected 2 to 4096")
    b = args.batch_size
    torch.manual_seed(0)
    perfect, random, other = torch.eye(b), torch.randn(b, 4096), torch.randn(b, 4096)
    collapsed = torch.ones(b, 8)
    scale = 1 / 0.07
    # Rows at right angles: one logit of 1/0.07 (NT-Xent: 1/0.1) among others of 0.
    info, ntxent = math.log1p((b - 1) * math.exp(-scale)), math.log1p((2 * b - 2) * math.exp(-10))
    print(
        f"batch of {b}, scale 1/0.07, temperature 0.1                   InfoNCE   theory    NT-Xent   theory"
    )
    for name, left, right, clip_theory, ssl_theory in [
        ("perfect: pairs equal, all else at right angles", perfect, perfect, info, ntxent),
        ("collapsed: every embedding the same", collapsed, collapsed, math.log(b), math.log(2 * b - 1)),
        (
            "random: nothing learned (theory: all logits equal)",
            random,
            other,
            math.log(b),
            math.log(2 * b - 1),
        ),
    ]:
        clip_loss, ssl_loss = info_nce(left, right, scale)[0], nt_xent(left, right)[0]
        print(f"{name:<55} {clip_loss:9.4f} {clip_theory:8.4f}  {ssl_loss:9.4f} {ssl_theory:8.4f}")


if __name__ == "__main__":
    main()
