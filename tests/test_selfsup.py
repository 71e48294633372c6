"""The SimCLR branch against its head written by hand, its statistics against two updates, a counting tower.

pytest tests/test_selfsup.py
"""

import pytest
import torch
from torch import nn

from losses import nt_xent
from selfsup import BRANCHES, SimCLR


def branch(**changes):
    torch.manual_seed(0)
    return SimCLR(**dict(width=6, hidden=10, out=4) | changes)


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
        head = SimCLR(768).head
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


class Tower(nn.Module):
    """Counts its calls; a feature is the mean of a channel."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, images):
        self.calls.append(images)
        return images.mean((2, 3))  # [b, 3]


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
def test_every_partner_has_the_three_methods_and_names_its_views(name):
    partner = BRANCHES[name](6, 10, 4, 0.1)
    assert all(callable(getattr(partner, method)) for method in ("look", "forward", "after_step"))
    assert partner.views
