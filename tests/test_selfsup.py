"""The partners against their heads and losses written by hand, their statistics against two updates, a
counting tower; momentum against its formula, hidden patches one by one, k-means against known clusters.

pytest tests/test_selfsup.py
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import augment
import slip
from losses import nt_xent
from selfsup import BRANCHES, BYOL, BEiT, MoCoV3, SimCLR, VisualTokenizer, closest, kmeans
from vit import ViT, cut


class Tower(nn.Module):
    """Counts its calls; a feature is the mean of a channel."""

    def __init__(self, width=6):
        super().__init__()
        self.width, self.calls = width, []

    def forward(self, images):
        self.calls.append(images)
        return images.mean((2, 3))  # [b, 3]


def branch(width=6, **changes):
    torch.manual_seed(0)
    return SimCLR(Tower(width), **dict(hidden=10, out=4) | changes)


def small_vit():
    torch.manual_seed(0)
    return ViT(image_size=8, patch=2, width=16, depth=1, heads=2)


def features(rows=8, width=6, shift=0.0):
    generator = torch.Generator().manual_seed(1)
    names = ("features1", "features2")
    return {n: torch.randn(rows, width, generator=generator) + shift * (n == "features2") for n in names}


def by_hand(head, x):
    """Linear, BatchNorm of this batch, ReLU; the same again; linear."""
    for linear, norm in ((head[0], head[1]), (head[3], head[4])):
        x = x @ linear.weight.T + linear.bias
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + norm.eps).sqrt()
        x = (x * norm.weight + norm.bias).clamp(min=0)
    return x @ head[6].weight.T + head[6].bias


def test_the_head_is_three_layers_with_batchnorm_after_the_first_two():
    head = branch().head
    assert [type(layer) for layer in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert all(layer.bias is not None for layer in head if isinstance(layer, nn.Linear))
    x = features()["features1"]
    torch.testing.assert_close(head(x), by_hand(head, x), rtol=1e-4, atol=1e-5)  # float32, other sums


def test_the_papers_head_has_4096_hidden_and_256_out():
    with torch.device("meta"):
        head = SimCLR(Tower(768)).head
    assert [tuple(head[i].weight.shape) for i in (0, 3, 6)] == [(4096, 768), (4096, 4096), (256, 4096)]


@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_the_loss_is_nt_xent_of_the_heads_outputs(temperature):
    model, seen = branch(temperature=temperature), features()
    loss, accuracy = model(seen)
    z1, z2 = (by_hand(model.head, seen[name]) for name in seen)
    expected = nt_xent(z1, z2, temperature)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)  # float32, other sums
    assert accuracy == expected[1] and not accuracy.requires_grad


def test_the_head_is_called_once_a_view_so_its_statistics_are_a_views_own():
    """Views far apart: one call on both together would give another mean, and a variance of thousands."""
    model, seen = branch(), features(shift=50.0)
    mean, var = torch.zeros(10), torch.ones(10)
    for name in seen:  # the first view, then the second
        x = model.head[0](seen[name])
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
    model(seen)
    norm = model.head[1]
    assert norm.num_batches_tracked == 2
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-4)  # float32, other sums
    torch.testing.assert_close(norm.running_var, var, rtol=1e-4, atol=1e-4)


def test_look_calls_the_tower_once_a_view():
    tower, chunk = Tower(), {"view1": torch.randn(5, 3, 2, 2), "view2": torch.randn(5, 3, 2, 2)}
    found = branch(width=3).look(tower, chunk)
    assert len(tower.calls) == 2
    assert tower.calls[0] is chunk["view1"] and tower.calls[1] is chunk["view2"]
    assert torch.equal(found["features1"], chunk["view1"].mean((2, 3))) and len(found) == 2
    assert torch.equal(found["features2"], chunk["view2"].mean((2, 3)))


def test_the_loss_reaches_both_views_and_every_weight_of_the_head():
    model, seen = branch(), {name: x.requires_grad_() for name, x in features().items()}
    model(seen)[0].backward()
    assert all(x.grad.abs().sum() > 0 for x in seen.values())
    assert all(p.grad is not None for p in model.parameters())


def test_after_step_moves_nothing():
    model = branch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_step(Tower(), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", BRANCHES)
def test_every_partner_has_the_methods_and_says_what_chance_is(name):
    partner = BRANCHES[name](small_vit(), 10, 4, 0.1)
    assert all(callable(getattr(partner, method)) for method in ("begin", "look", "forward", "after_step"))
    loss, accuracy, words = partner.chance(64)
    assert loss > 0 and 0 < accuracy < 1 and words


def small_batch(model):
    generator = torch.Generator().manual_seed(1)
    names = ("images", "view1", "view2")
    batch = {name: torch.randn(8, 3, 32, 32, generator=generator).double() for name in names}
    batch["tokens"] = torch.randint(1, 500, (8, 6), generator=generator)
    batch["tokens"][:, 5] = 519  # the end token
    batch["view1_mask"] = masks(8)
    model.branch.begin(lambda: batch["view2"])
    return batch


@pytest.mark.parametrize("method", [name for name, (_, partner) in slip.METHODS.items() if partner])
def test_chunks_change_neither_loss_nor_gradient_nor_statistics(method):
    found = []
    for micro_batch, recompute in ((None, False), (3, True)):
        torch.manual_seed(0)
        small = dict(vocab_size=520, text_depth=1, ssl_hidden=32, ssl_out=16)
        model = slip.build(slip.configure(method, "vit_tiny", **small)).double()
        features = model(small_batch(model), dict, micro_batch, recompute)
        loss = model.branch(features)[0]
        loss.backward()
        parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(parts | dict(model.named_buffers()) | {"loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)  # float64


# MoCo v3 and BYOL

MOMENTUM = {"mocov3": (MoCoV3, 0.99), "byol": (BYOL, 0.996)}


def momentum(name):
    torch.manual_seed(0)
    return MOMENTUM[name][0](small_vit(), hidden=10, out=4).double()


def four_features(rows=8, width=16):
    generator = torch.Generator().manual_seed(1)
    names = ("features1", "features2", "slow1", "slow2")
    return {n: torch.randn(rows, width, generator=generator, dtype=torch.float64) for n in names}


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def by_pairs(model, seen, one_pair):
    """Each view's prediction against the slow embedding of the other view, in plain loops."""
    q = [unit(model.predictor(model.projector(seen[name]))) for name in ("features1", "features2")]
    k = [unit(model.slow_projector(seen[name])) for name in ("slow2", "slow1")]
    return sum(sum(one_pair(a[i], b, i) for i in range(len(a))) / len(a) for a, b in zip(q, k, strict=True))


def test_mocos_loss_is_one_way_info_nce_times_twice_its_temperature():
    model, seen = momentum("mocov3"), four_features()

    def one_pair(query, keys, i):
        logits = [torch.dot(query, key) / 0.2 for key in keys]
        return 0.4 * (torch.logsumexp(torch.stack(logits), 0) - logits[i])

    torch.testing.assert_close(model(seen)[0], by_pairs(model, seen, one_pair), rtol=1e-12, atol=0)  # float64


def test_byols_loss_is_the_squared_distance_of_unit_vectors_both_ways():
    model, seen = momentum("byol"), four_features()
    expected = by_pairs(model, seen, lambda query, keys, i: 2 - 2 * torch.dot(query, keys[i]))
    torch.testing.assert_close(model(seen)[0], expected, rtol=1e-12, atol=0)  # float64


def test_a_collapse_is_seen_in_byols_accuracy_where_its_loss_is_at_its_best():
    model = momentum("byol").eval()  # with running statistics equal features stay equal
    model.predictor = nn.Identity()
    model.slow_projector.load_state_dict(model.projector.state_dict())
    loss, accuracy = model({name: torch.ones(8, 16, dtype=torch.float64) for name in four_features()})
    assert loss.item() == pytest.approx(0, abs=1e-12) and accuracy.item() == pytest.approx(1 / 8)


def test_the_heads_are_those_of_the_papers():
    with torch.device("meta"):
        tower = ViT(width=768, depth=1)
        moco, byol = MoCoV3(tower), BYOL(tower)
    kinds = [type(layer) for layer in moco.projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear, nn.BatchNorm1d]
    assert [type(layer) for layer in moco.predictor] == kinds[3:]
    assert not any(layer.bias is not None for layer in moco.modules() if type(layer) is nn.Linear and layer in
                   [*moco.projector, *moco.predictor])  # fmt: skip
    assert not moco.projector[-1].affine and moco.projector[1].affine
    assert (
        [type(layer) for layer in byol.projector] == kinds[3:-1] == [type(layer) for layer in byol.predictor]
    )
    assert (byol.predictor[0].in_features, byol.predictor[-1].out_features) == (256, 256)


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_slow_copy_gets_no_gradient_and_the_rest_does(name):
    torch.manual_seed(0)
    tower = small_vit()
    model = MOMENTUM[name][0](tower, hidden=10, out=4)
    chunk = {view: torch.randn(6, 3, 8, 8) for view in ("view1", "view2")}
    model(model.look(tower, chunk))[0].backward()
    slow = [n for n, _ in model.named_parameters() if n.startswith("slow_")]
    assert len(slow) == len(list(tower.parameters())) + len(list(model.projector.parameters()))
    for n, parameter in [*model.named_parameters(), *tower.named_parameters()]:
        assert (parameter.grad is None) == (n in slow) == (not parameter.requires_grad), n


@pytest.mark.parametrize("name", MOMENTUM)
def test_the_slow_copy_moves_as_the_formula_says(name):
    model, tower, start = momentum(name), small_vit().double(), MOMENTUM[name][1]
    with torch.no_grad():
        for parameter in [*tower.parameters(), *model.projector.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    pairs = [("slow_tower", tower), ("slow_projector", model.projector)]
    for progress in (0.0, 0.3, 1.0):
        m = 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2
        assert progress != 0 or m == pytest.approx(start)
        before = {n: p.clone() for n, p in model.named_parameters() if n.startswith("slow_")}
        model.after_step(tower, progress)
        for part, quick in pairs:
            for n, parameter in getattr(model, part).named_parameters():
                expected = m * before[f"{part}.{n}"] + (1 - m) * quick.get_parameter(n)
                torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-14)  # float64
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)  # m = 1: rest


# BEiT


def masks(rows=5, grid=4):
    return torch.stack(
        [torch.from_numpy(augment.block_mask(np.random.default_rng(i), grid, 0.4)) for i in range(rows)]
    )


def beit():
    tower = small_vit()
    model = BEiT(tower, out=7)
    pictures = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    model.begin(lambda: pictures)
    return tower.double(), model.double(), pictures[:5].double()


def test_the_loss_is_the_mean_cross_entropy_of_the_hidden_patches_one_by_one():
    tower, model, images = beit()
    chunk = {"view1": images, "view1_mask": masks()}
    loss, accuracy = model(model.look(tower, chunk))
    losses, hits = [], []
    for image, mask in zip(images, chunk["view1_mask"], strict=True):
        x = tower.patch_embed(image[None]).clone()
        for i in range(16):
            if mask[i]:
                x[0, i] = model.mask_token
        for i in range(16):
            if mask[i]:
                row, column = divmod(i, 4)
                pixels = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten()
                token = (model.codebook - pixels).norm(dim=1).argmin()
                logits = model.head(tower.encode(x)[0, 1 + i])
                losses.append(F.cross_entropy(logits, token))
                hits.append(float(logits.argmax() == token))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-12, atol=0)  # float64
    assert accuracy.item() == pytest.approx(sum(hits) / len(hits)) and len(hits) == 5 * 6


def test_what_is_hidden_is_not_seen():
    tower, model, images = beit()
    mask = masks()
    other = images.clone()
    x = cut(other, 2)
    x[mask] += 1.0
    other = x.view(5, 4, 4, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(5, 3, 8, 8)
    model.tokens = lambda images: torch.zeros(
        len(images), 16, dtype=torch.long
    )  # the same answer asked of both
    found = [model.look(tower, {"view1": view, "view1_mask": mask})["token_loss"] for view in (images, other)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_codebook_is_learned_once_and_kept_in_the_weights():
    _, model, _ = beit()
    before = model.state_dict()["codebook"].clone()
    model.begin(lambda: pytest.fail("learned again"))
    assert torch.equal(model.codebook, before) and before.any()


def test_visual_tokens_are_the_same_under_bf16_autocast():
    model = BEiT(small_vit(), out=200)
    pictures = 2 + 0.3 * torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(2))  # bright
    model.begin(lambda: pictures)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.tokens(pictures)
        assert not torch.equal(closest(cut(pictures, 2), model.codebook), found)  # it would matter
    assert torch.equal(found, model.tokens(pictures))


def test_kmeans_finds_clusters_that_are_known():
    generator = torch.Generator().manual_seed(3)
    centres = 100 * torch.eye(6)
    points = centres.repeat(50, 1) + torch.randn(300, 6, generator=generator)
    codes = kmeans(points, 30, rounds=20)  # so many that each cluster has some at the start
    labels = closest(points, codes)
    for i, code in enumerate(codes):  # settled: each is the mean of those that are nearest to it
        torch.testing.assert_close(code, points[labels == i].mean(0), rtol=1e-5, atol=1e-4)  # float32
    for i in range(6):  # no code stands between two clusters
        assert not set(labels[i::6].tolist()) & {
            int(label) for j in range(6) if j != i for label in labels[j::6]
        }
    assert torch.equal(codes, kmeans(points, 30, rounds=20))
    distances = torch.cdist(points.double(), codes.double())
    assert torch.equal(labels, distances.argmin(1))
    with pytest.raises(ValueError, match="found 300 patches, expected 301 or more"):
        kmeans(points, 301)


class Encoder(nn.Module):
    """A token for each 4 x 4 pixels: the brightest of three channels, or none of them."""

    def forward(self, x):
        return torch.cat([F.avg_pool2d(x, 4), torch.full_like(x[:, :1, ::4, ::4], 0.25)], dim=1)


def scripted(path, module):
    torch.jit.save(torch.jit.script(module), path)
    return str(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_file_gives_the_visual_tokens_at_the_size_that_fits(tmp_path):
    tokenizer = VisualTokenizer(scripted(tmp_path / "encoder.pt", Encoder()), 8, 2)
    assert (tokenizer.size, tokenizer.side) == (4, 16)  # 4 x 4 tokens of 4 x 4 pixels
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    pictures = (255 * colours).byte()[:, :, None, None].expand(4, 3, 8, 8)
    tokens = tokenizer(augment.normalise(pictures))
    assert torch.equal(tokens, torch.arange(4)[:, None].expand(4, 16))
    model = BEiT(small_vit(), out=4)
    model.begin(lambda: pytest.fail("a codebook was learned"), tokenizer)
    assert torch.equal(model.tokens(augment.normalise(pictures)), tokens)


class Wide(nn.Module):
    """With weights, and on no other device than they are."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 4, 4)

    def forward(self, x):
        return self.convolution(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_visual_tokenizer_goes_to_the_device_of_the_pictures(tmp_path):
    tokenizer = VisualTokenizer(scripted(tmp_path / "encoder.pt", Wide()), 8, 2)
    tokenizer.encoder = Wide()  # a scripted one can go to a GPU, not to this device of shapes alone
    assert tokenizer(torch.zeros(2, 3, 8, 8, device="meta")).device.type == "meta"


class Fixed(nn.Module):
    def forward(self, x):
        if x.shape[-1] != 224:
            raise ValueError("pictures of 224 pixels are wanted")
        return x


class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class One(nn.Module):
    def forward(self, x):
        return x.mean((1, 2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_file_that_is_no_encoder_is_one_sentence(tmp_path):
    (tmp_path / "text.pt").write_text("no program")
    with pytest.raises(FileNotFoundError, match="wants a TorchScript encoder"):
        VisualTokenizer(str(tmp_path / "nothere.pt"), 8, 2)
    with pytest.raises(ValueError, match="is no TorchScript encoder"):
        VisualTokenizer(str(tmp_path / "text.pt"), 8, 2)
    with pytest.raises(ValueError, match="no TorchScript encoder.*224 pixels are wanted$"):
        VisualTokenizer(scripted(tmp_path / "fixed.pt", Fixed()), 8, 2)
    with pytest.raises(ValueError, match=r"expected \[1, K, 4, 4\]"):
        VisualTokenizer(scripted(tmp_path / "flat.pt", Flat()), 8, 2)
    with pytest.raises(ValueError, match=r"gives \[1\] for"):
        VisualTokenizer(scripted(tmp_path / "one.pt", One()), 8, 2)
