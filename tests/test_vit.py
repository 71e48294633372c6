"""The image tower: shapes and parameter counts of the paper's sizes, the patch embedding against a strided
convolution.

pytest tests/test_vit.py
"""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from vit import SIZES, Attention, PatchEmbed, ViT, count_parameters


@pytest.mark.parametrize(
    "name, count", [("vit_s16", 21_665_664), ("vit_b16", 85_798_656), ("vit_l16", 303_301_632)]
)
def test_parameter_counts_are_the_papers(name, count):
    with torch.device("meta"):
        assert count_parameters(ViT(**SIZES[name])) == count


def test_vit_s_has_twelve_heads():
    assert SIZES["vit_s16"]["heads"] == 12


def test_patch_embedding_equals_a_strided_convolution():
    embed = PatchEmbed(32, 8, 24).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    kernel = rearrange(embed.projection.weight, "d (c p q) -> d c p q", c=3, p=8)
    convolved = F.conv2d(images, kernel, embed.projection.bias, stride=8)
    torch.testing.assert_close(
        embed(images), rearrange(convolved, "b d h w -> b (h w) d"), rtol=1e-12, atol=1e-12
    )


def test_attention_equals_softmax_of_scaled_products():
    attention = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)  # sqrt(4) = 2
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("image_size, patch", [(32, 8), (28, 7), (48, 16)])
def test_any_image_size_and_patch(image_size, patch):
    vit = ViT(image_size=image_size, patch=patch, width=16, depth=2, heads=2)
    images = torch.randn(3, 3, image_size, image_size)
    assert vit.encode(vit.patch_embed(images)).shape == (3, 1 + (image_size // patch) ** 2, 16)
    assert vit(images).shape == (3, 16)


def test_the_feature_is_the_class_tokens_and_every_patch_reaches_it():
    vit = ViT(image_size=16, patch=8, width=16, depth=2, heads=2).eval()
    images = torch.randn(1, 3, 16, 16, requires_grad=True)
    torch.testing.assert_close(vit(images), vit.encode(vit.patch_embed(images))[:, 0])
    (gradient,) = torch.autograd.grad(vit(images).sum() + vit(images).square().sum(), images)
    assert (rearrange(gradient, "b c (h p) (w q) -> (b h w) (c p q)", p=8, q=8).abs().amax(1) > 0).all()


def test_drop_path_is_off_in_evaluation_and_grows_with_depth():
    vit = ViT(image_size=16, patch=8, width=16, depth=3, heads=2, drop_path=0.5)
    assert [getattr(block.drop_path, "p", 0.0) for block in vit.blocks] == [0.0, 0.25, 0.5]
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.eval()(images), vit(images))


def test_wrong_sizes_are_one_sentence():
    with pytest.raises(ValueError, match="30 is not a multiple of the patch size 8.*--image-size 32"):
        ViT(image_size=30, patch=8, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="found pictures of 24x24 pixels, expected 16x16"):
        ViT(image_size=16, patch=8, width=16, depth=1, heads=2)(torch.randn(1, 3, 24, 24))
