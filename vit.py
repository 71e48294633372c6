"""The image tower: a vision transformer turns a picture into one feature, that of its class token.

Paper: section 4 and appendix (ViT-S/16 with 12 heads as in MoCo v3, ViT-B/16, ViT-L/16); Dosovitskiy et al.
2021.

    images [B, 3, 224, 224] -> patches [B, 196, 768] -> tokens [B, 197, D] -> features [B, D]

Not here: the projection to the joint space (slip.py), the projection head of SimCLR (selfsup.py), drawing
views (augment.py).
"""

import argparse

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.ops import StochasticDepth

SIZES = {  # name: width, depth, heads, patch
    "vit_tiny": dict(width=128, depth=4, heads=4, patch=8),  # for 32-pixel pictures on a laptop
    "vit_ti16": dict(width=192, depth=12, heads=3, patch=16),
    "vit_s16": dict(width=384, depth=12, heads=12, patch=16),  # 12 heads, not 6: MoCo v3's ViT-S
    "vit_b16": dict(width=768, depth=12, heads=12, patch=16),
    "vit_l16": dict(width=1024, depth=24, heads=16, patch=16),
}


def cut(images, patch):
    """Pictures [B, 3, H, W] -> squares [B, N, 3 P P], with N = (H / P) * (W / P), row by row."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


class PatchEmbed(nn.Module):
    """Cut a picture into squares and project each: a strided convolution, written as the matrix product it
    is.
    """

    def __init__(self, image_size, patch, width):
        super().__init__()
        if image_size % patch or image_size < patch:
            raise ValueError(
                f"an image size of {image_size} is not a multiple of the patch size {patch}: "
                f"type --image-size {max(1, round(image_size / patch)) * patch}, or another --patch"
            )
        self.image_size, self.patch = image_size, patch
        self.num_patches = (image_size // patch) ** 2
        self.projection = nn.Linear(3 * patch * patch, width)

    def forward(self, images):
        """[B, 3, H, W] -> [B, N, D]."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            found = "x".join(map(str, images.shape[-2:]))
            raise ValueError(
                f"found pictures of {found} pixels, expected {self.image_size}x{self.image_size}"
            )
        return self.projection(cut(images, self.patch))


class Attention(nn.Module):
    """Multi-head self-attention; with `causal` a token sees itself and those before it."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        """[B, N, D] -> [B, N, D]."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        # softmax(q k^T / sqrt(d)) v: [B, H, N, d] each
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """A pre-norm transformer block, shared by both towers: x + attention(norm(x)), then x + mlp(norm(x)).

    `drop_path` drops a whole residual branch for a whole sample with that probability (fine-tuning only).
    """

    def __init__(self, width, heads, *, causal=False, activation=nn.GELU, eps=1e-6, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation(), nn.Linear(4 * width, width))
        self.drop_path = StochasticDepth(drop_path, "row") if drop_path else nn.Identity()

    def forward(self, x):
        """[B, N, D] -> [B, N, D]."""
        x = x + self.drop_path(self.attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """The tower. `drop_path` grows linearly from 0 at the first block to its value at the last."""

    def __init__(self, *, image_size=224, patch=16, width=768, depth=12, heads=12, drop_path=0.0):
        super().__init__()
        self.width = width
        self.patch_embed = PatchEmbed(image_size, patch, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, drop_path=rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for parameter in [self.class_token, self.positions]:
            nn.init.trunc_normal_(parameter, std=0.02)
        # The paper's 0.02 suits its widths; a narrow tower starts too quiet. At width 128 a classifier of the
        # built-in scenes was at 49% after 200 steps of 64, and at 66% with 1 / sqrt(width).
        std = 0.02 if width >= 384 else width**-0.5
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def encode(self, patches):
        """Embedded patches [B, N, D] -> tokens [B, 1 + N, D]; the class token is the first (BEiT masks
        before this).
        """
        class_token = self.class_token.expand(len(patches), -1, -1)  # [B, 1, D]
        x = torch.cat([class_token, patches], dim=1) + self.positions  # [B, 1 + N, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images):
        """Normalised images [B, 3, H, W] -> features [B, D], the class token's."""
        return self.encode(self.patch_embed(images))[:, 0]


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Follow one picture through the image tower, shape by shape."
    )
    parser.add_argument(
        "--model", default="vit_b16", choices=SIZES, help="size of the tower (default: %(default)s)"
    )
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of the picture, pixels (default: 224)"
    )
    args = parser.parse_args(argv)
    try:
        vit = ViT(image_size=args.image_size, **SIZES[args.model]).eval()
    except ValueError as error:
        parser.error(str(error))
    images = torch.randn(2, 3, args.image_size, args.image_size)
    with torch.no_grad():
        patches = vit.patch_embed(images)
        tokens = vit.encode(patches)
    print(f"{args.model}: {count_parameters(vit):,} parameters, {len(vit.blocks)} blocks")
    print(f"  images      {list(images.shape)}   a batch of pictures")
    print(f"  patches     {list(patches.shape)}   each square of {vit.patch_embed.patch} pixels, projected")
    print(
        f"  tokens      {list(tokens.shape)}   the class token in front, positions added, through the blocks"
    )
    print(f"  features    {list(tokens[:, 0].shape)}   the class token alone: what the losses are made of")
    kernel = rearrange(
        vit.patch_embed.projection.weight, "d (c p q) -> d c p q", c=3, p=vit.patch_embed.patch
    )
    convolved = F.conv2d(images, kernel, vit.patch_embed.projection.bias, stride=vit.patch_embed.patch)
    difference = (rearrange(convolved, "b d h w -> b (h w) d") - patches).abs().max().item()
    print(f"  the patch embedding against a strided convolution: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
