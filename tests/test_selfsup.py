"""The partners against heads and losses written by hand in float64, momentum against its formula, masked
patches one by one, k-means against known clusters: pytest tests/test_selfsup.py
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import augment
import train
from losses import nt_xent
from selfsup import BRANCHES, BYOL, BEiT, MoCoV3, SimCLR, kmeans
from vit import ViT, patchify

MOMENTUM = {"mocov3": 0.99, "byol": 0.996}


def small_vit():
    torch.manual_seed(0)
    return ViT(image_size=8, patch=2, width=16, depth=1, heads=2).double()


def branch(name):
    return BRANCHES[name](small_vit(), hidden=10, out=4).double()


def features(shift=0.0):
    generator = torch.Generator().manual_seed(1)
    names = ("view1", "view2", "slow1", "slow2")
    found = {n: torch.randn(8, 16, generator=generator, dtype=torch.float64) for n in names}
    return found | {"view2": found["view2"] + shift}


def by_hand(head, x):
    """Linear, BatchNorm of this batch, ReLU; the same again; linear."""
    for linear, norm in ((head[0], head[1]), (head[3], head[4])):
        x = x @ linear.weight.T + linear.bias
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()
        x = (x * norm.weight + norm.bias).clamp(min=0)
    return x @ head[6].weight.T + head[6].bias


def test_the_heads_are_those_of_their_papers():
    layer = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    with torch.device("meta"):
        simclr, moco, byol = (partner(ViT(width=768, depth=1)) for partner in (SimCLR, MoCoV3, BYOL))
    assert [tuple(simclr.head[i].weight.shape) for i in (0, 3, 6)] == [(4096, 768), (4096, 4096), (256, 4096)]
    assert [type(part) for part in simclr.head] == layer * 2 + layer[:1]
    assert [type(part) for part in moco.projector] == layer * 2 + layer[:2]
    assert [type(part) for part in moco.predictor] == layer + layer[:2]
    assert [type(part) for part in byol.projector] == layer + layer[:1] == [type(p) for p in byol.predictor]
    for model, biased in ((simclr, True), (moco, False), (byol, True)):
        heads = [part for n, part in model.named_modules() if "tower" not in n and type(part) is nn.Linear]
        assert {part.bias is not None for part in heads} == {biased}


def loss_in_training(branch, found):
    """SimCLR's (loss, accuracy 0-1) of features that are known, by the lines of train.objective."""
    settings = dict(partner="simclr", ssl_scale=1, precision="fp32", mask_same_class=False)
    settings = SimpleNamespace(**settings, micro_batch=None, recompute=False)
    net = nn.Module()
    net.text, net.branch, net.forward = None, branch, lambda *_: found
    _, stats = train.objective(net, {}, settings, torch.device("cpu"))
    return stats["ssl_loss"], stats["ssl_acc"] / 100


def test_simclrs_loss_is_nt_xent_of_the_heads_outputs():
    model, found = branch("simclr"), features()
    model.temperature = 0.7
    loss, accuracy = loss_in_training(model, found)
    z1, z2 = (by_hand(model.head, found[name]) for name in ("view1", "view2"))
    expected = nt_xent(z1, z2, 0.7)
    torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=0)  # float64
    assert accuracy == expected[1] and not accuracy.requires_grad


def test_the_head_is_called_once_a_view_so_its_statistics_are_a_views_own():
    """Views far apart: one call on both together would give another mean, and a variance of thousands."""
    model, found = branch("simclr"), features(shift=50.0)
    mean, var = 0, 1
    for name in ("view1", "view2"):
        x = model.head[0](found[name])
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    loss_in_training(model, found)
    torch.testing.assert_close(model.head[1].running_mean, mean, rtol=1e-10, atol=1e-12)  # float64
    torch.testing.assert_close(model.head[1].running_var, var, rtol=1e-10, atol=1e-12)


CHANCE = {"simclr": (math.log(127), 1 / 127), "mocov3": (0.8 * math.log(64), 1 / 64)}
CHANCE |= {"byol": (4, 1 / 64), "beit": (math.log(4), 1 / 4)}


@pytest.mark.parametrize("name", BRANCHES)
def test_chance_is_that_of_equal_or_of_unrelated_embeds(name):
    assert branch(name).chance(64)[:2] == pytest.approx(CHANCE[name]) and branch(name).chance(64)[2]


def by_pairs(model, found, one_pair):
    """Each view's prediction against the slow embed of the other view, in plain loops."""
    q = [F.normalize(model.predictor(model.projector(found[name]))) for name in ("view1", "view2")]
    k = [F.normalize(model.slow_projector(found[name])) for name in ("slow2", "slow1")]
    return sum(sum(one_pair(a[i], b, i) for i in range(len(a))) / len(a) for a, b in zip(q, k, strict=True))


def test_mocos_loss_is_one_way_info_nce_times_twice_its_temperature():
    model = branch("mocov3")

    def one_pair(query, keys, i):
        logits = [torch.dot(query, key) / 0.2 for key in keys]
        return 0.4 * (torch.logsumexp(torch.stack(logits), 0) - logits[i])

    expected = by_pairs(model, features(), one_pair)
    torch.testing.assert_close(model(features())[0], expected, rtol=1e-12, atol=0)  # float64


def test_byols_loss_is_the_squared_distance_of_unit_vectors_both_ways():
    model = branch("byol")
    expected = by_pairs(model, features(), lambda query, keys, i: (query - keys[i]).square().sum())
    torch.testing.assert_close(model(features())[0], expected, rtol=1e-12, atol=0)  # float64


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_slow_copy_gets_no_gradient_and_everything_else_does(name):
    tower, model = small_vit(), branch(name)
    views = {view: torch.randn(6, 3, 8, 8, dtype=torch.float64) for view in ("view1", "view2")}
    model(model.features(tower, views))[0].backward()
    slow = [n for n, _ in model.named_parameters() if n.startswith("slow_")]
    assert len(slow) == len(list(tower.parameters())) + len(list(model.projector.parameters()))
    for n, parameter in [*model.named_parameters(), *tower.named_parameters()]:
        assert (parameter.grad is None) == (n in slow) == (not parameter.requires_grad), n


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_slow_copy_moves_as_the_formula_says(name):
    model, tower, start = branch(name), small_vit(), MOMENTUM[name]
    with torch.no_grad():
        for parameter in [*tower.parameters(), *model.projector.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    for progress in (0.3, 1.0):
        m = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
        before = {n: p.clone() for n, p in model.named_parameters() if n.startswith("slow_")}
        model.after_step(tower, progress)
        for part, fast in (("slow_tower", tower), ("slow_projector", model.projector)):
            for n, parameter in getattr(model, part).named_parameters():
                expected = m * before[f"{part}.{n}"] + (1 - m) * fast.get_parameter(n)
                torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14)  # float64


def beit():
    """A tower, its branch with a codebook of 7, five images, and masks that hide 6 of 16 patches."""
    model = BEiT(small_vit(), out=7).double()
    images = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model.prepare(lambda: images)
    model.prepare(lambda: pytest.fail("a codebook that is there is learned again"))
    masks = np.stack([augment.block_mask(np.random.default_rng(i), 4, 0.4) for i in range(5)])
    return small_vit(), model, images[:5], torch.from_numpy(masks)


def test_beits_loss_is_the_mean_cross_entropy_of_the_masked_patches_one_by_one():
    tower, model, images, masks = beit()
    views = {"view1": images, "view1_mask": masks}
    loss, accuracy = model(model.features(tower, views | model.targets(views)))
    losses, hits = [], []
    for image, mask in zip(images, masks, strict=True):
        x = tower.patch_embed(image[None]).clone()
        x[0, mask] = model.mask_token
        for i in mask.nonzero().flatten().tolist():
            row, column = divmod(i, 4)
            pixels = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
            token = (model.codebook - pixels).norm(dim=1).argmin()
            logits = model.head(tower.encode(x)[0, 1 + i])
            losses.append(F.cross_entropy(logits, token))
            hits.append(float(logits.argmax() == token))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)  # float64
    assert accuracy.item() == pytest.approx(sum(hits) / len(hits)) and len(hits) == 5 * 6


def test_visual_tokens_are_the_same_under_bf16_autocast():
    model = BEiT(small_vit(), out=200)
    images = 2 + 0.3 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))  # bright
    model.prepare(lambda: images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = model.targets({"view1": images})["view1_tokens"]
        products = patchify(images, 2) @ model.codebook.T  # in bf16: it would matter
    distances = model.codebook.square().sum(1) - 2 * products.float()
    assert not torch.equal(distances.argmin(-1), tokens)
    assert torch.equal(tokens, model.targets({"view1": images})["view1_tokens"])


def test_kmeans_finds_clusters_that_are_known():
    generator = torch.Generator().manual_seed(3)
    points = 100 * torch.eye(6).repeat(50, 1) + torch.randn(300, 6, generator=generator)
    codes = kmeans(points, 30, rounds=20)  # so many that each cluster has some at the start
    labels = torch.cdist(points.double(), codes.double()).argmin(1)
    for i, code in enumerate(codes):  # converged: each is the mean of those that are nearest to it
        torch.testing.assert_close(code, points[labels == i].mean(0), rtol=1e-5, atol=1e-4)  # float32
    assert sum(len(set(labels[i::6].tolist())) for i in range(6)) == 30  # no code serves two clusters
    few = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))  # fewer than codes: some are equal
    assert {tuple(code) for code in kmeans(few, 7).tolist()} == {tuple(point) for point in few.tolist()}
