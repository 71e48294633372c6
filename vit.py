"""The image tower: a vision transformer turns an image into one feature, that of its class token.

Paper: implementation details; the architecture is that of Dosovitskiy et al. 2021. Left to others: the
projection to the joint space (slip.py), SimCLR's head (selfsup.py), views (augment.py).

    images [B, 3, 224, 224] -> patches [B, 196, 768] -> tokens [B, 197, D] -> features [B, D]
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth

SIZES = {
    "vit_tiny": dict(width=128, depth=4, heads=4, patch=8),  # for images of 32 pixels on a laptop
    "vit_ti16": dict(width=192, depth=12, heads=3, patch=16),
    "vit_s16": dict(width=384, depth=12, heads=12, patch=16),  # 12 heads, not 6: MoCo v3's ViT-S
    "vit_b16": dict(width=768, depth=12, heads=12, patch=16),
    "vit_l16": dict(width=1024, depth=24, heads=16, patch=16),
}


def patchify(images, patch):
    """Images [B, 3, H, W] -> patches [B, N, 3 P P], with N = (H / P) * (W / P), row by row."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


class PatchEmbed(nn.Module):
    """Patches, each projected to the width: a strided convolution, written as the matrix product it is."""

    def __init__(self, patch, width):
        super().__init__()
        self.patch = patch
        self.projection = nn.Linear(3 * patch * patch, width)

    def forward(self, images):  # [B, 3, S, S] -> [B, N, D]
        return self.projection(patchify(images, self.patch))


class Attention(nn.Module):
    """Multi-head self-attention; with `causal` a token sees itself and those before it."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):  # [B, N, D]
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # softmax(q k^T / sqrt(d)) v
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block, for both towers; a sample skips a sublayer with rate `drop_path`.
    Of the last block's output one token is used, the one at `index`: its MLP need not see the others (a step
    of SLIP vit_tiny then takes 0.83 of the time)."""

    def __init__(self, width, heads, *, causal=False, activation=nn.GELU, eps=1e-6, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x, index=...):  # [B, N, D] -> [B, N, D], or the one token at `index`, [B, D]
        x = x[index] + self.drop_path(self.attention(self.norm1(x))[index])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """The tower. `drop_path` grows linearly from 0 at the first block to its value at the last."""

    def __init__(self, *, image_size=224, patch=16, width=768, depth=12, heads=12, drop_path=0.0):
        super().__init__()
        if image_size % patch:
            raise ValueError(f"an image size of {image_size} is not a multiple of the patch size {patch}")
        self.width = width
        self.patch_embed = PatchEmbed(patch, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch) ** 2, width))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(width, heads, drop_path=rate) for rate in rates))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        std = 0.02 if width >= 384 else width**-0.5  # a narrow tower learns faster from larger weights
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def encode(self, patches, index=...):
        """Embedded patches [B, N, D] (BEiT masks them before) -> tokens [B, 1 + N, D], class token first; or
        the one token at `index`, [B, D]."""
        x = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1)  # [B, 1 + N, D]
        return self.norm(self.blocks[-1](self.blocks[:-1](x + self.positions), index))

    def forward(self, images):
        """Normalised images [B, 3, S, S] -> features [B, D], the class token's."""
        return self.encode(self.patch_embed(images), (slice(None), 0))  # at [:, 0]


def interpolate_positions(positions, side):
    """Positions [1, 1 + n * n, D] -> [1, 1 + side * side, D], bicubic; the class token's stays."""
    grid = rearrange(positions[:, 1:], "b (h w) d -> b d h w", h=int(positions.shape[1] ** 0.5))
    grid = F.interpolate(grid, (side, side), mode="bicubic")
    return torch.cat([positions[:, :1], rearrange(grid, "b d h w -> b (h w) d")], dim=1)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())
