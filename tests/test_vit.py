"""The image tower: the paper's parameter counts; patch embedding against a strided convolution; positions.

python -m pytest tests/test_vit.py
"""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from vit import SIZES, PatchEmbed, ViT, count_parameters, interpolate_positions


@pytest.mark.parametrize("name, count", [("s", 21_665_664), ("b", 85_798_656), ("l", 303_301_632)])
def test_parameter_counts_are_the_papers(name, count):
    with torch.device("meta"):
        assert count_parameters(ViT(**SIZES[f"vit_{name}16"])) == count


def test_patch_embedding_equals_a_strided_convolution():
    embed, images = PatchEmbed(8, 24).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    kernel = rearrange(embed.projection.weight, "d (c p q) -> d c p q", c=3, p=8)
    convolved = F.conv2d(images, kernel, embed.projection.bias, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), convolved, rtol=1e-12, atol=1e-12)


def test_every_patch_reaches_the_class_token():
    vit, images = ViT(image_size=28, patch=7, width=16, depth=2, heads=2), torch.randn(1, 3, 28, 28)
    (gradient,) = torch.autograd.grad(vit(images.requires_grad_())[0, 0], images)
    assert F.max_pool2d(gradient.abs(), 7).min() > 0


def test_the_feature_and_its_gradient_are_the_class_tokens_of_all_tokens():
    vit = ViT(image_size=16, patch=8, width=16, depth=3, heads=2, drop_path=0.5).double()
    images, results = torch.randn(4, 3, 16, 16, dtype=torch.float64), []
    for feature in (vit, lambda images: vit.encode(vit.patch_embed(images))[:, 0]):
        torch.manual_seed(0)  # of drop path
        features = feature(images)
        results.append([features, *torch.autograd.grad(features.square().sum(), list(vit.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)  # the same sums in float64


def test_drop_path_grows_with_depth():
    vit = ViT(image_size=16, patch=8, width=16, depth=3, heads=2, drop_path=0.5)
    assert [getattr(block.drop_path, "p", 0.0) for block in vit.blocks] == [0.0, 0.25, 0.5]


def test_positions_of_another_size_are_resized_row_by_row():
    positions = torch.arange(50.0).view(1, 50, 1)
    larger = interpolate_positions(positions, 14)
    assert larger.shape == (1, 197, 1) and larger[0, 0] == 0
    grid = larger[0, 1:, 0].view(14, 14)[4:10, 4:10]  # away from the border: two patches now for one before
    torch.testing.assert_close(grid[:, 2:] - grid[:, :-2], torch.ones(6, 4), rtol=0, atol=1e-4)


def test_vit_s_has_twelve_heads():
    assert SIZES["vit_s16"]["heads"] == 12  # as in MoCo v3; others have 6
