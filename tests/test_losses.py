"""The two losses against a loop-by-loop transcription in float64 (value and gradient) and against closed
forms.

pytest tests/test_losses.py
"""

import math

import pytest
import torch

from losses import info_nce, nt_xent


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def naive_info_nce(image, text, scale):
    """Both directions, pair by pair."""
    image, text = unit(image), unit(text)
    total = 0
    for i in range(len(image)):
        row = torch.stack([scale * image[i] @ text[j] for j in range(len(text))])
        column = torch.stack([scale * image[j] @ text[i] for j in range(len(image))])
        total = total + (torch.logsumexp(row, 0) - row[i]) + (torch.logsumexp(column, 0) - column[i])
    return total / (2 * len(image))


def naive_nt_xent(z1, z2, temperature):
    """For each of the 2B views: its positive against all others."""
    z, b = unit(torch.cat([z1, z2])), len(z1)
    total = 0
    for i in range(2 * b):
        others = torch.stack([z[i] @ z[k] / temperature for k in range(2 * b) if k != i])
        total = total + torch.logsumexp(others, 0) - z[i] @ z[(i + b) % (2 * b)] / temperature
    return total / (2 * b)


def pair(rows=7, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, width, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)
    ]


@pytest.mark.parametrize("rows", [2, 7])
def test_info_nce_equals_the_naive_formula_in_value_and_gradient(rows):
    image, text = pair(rows)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(loss := info_nce(image, text, scale)[0], [image, text, scale])
    theirs = torch.autograd.grad(naive := naive_info_nce(image, text, scale), [image, text, scale])
    for a, b in zip([loss, *ours], [naive, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64, a handful of sums


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_equals_the_naive_formula_in_value_and_gradient(temperature):
    z1, z2 = pair()
    ours = torch.autograd.grad(loss := nt_xent(z1, z2, temperature)[0], [z1, z2])
    theirs = torch.autograd.grad(naive := naive_nt_xent(z1, z2, temperature), [z1, z2])
    for a, b in zip([loss, *ours], [naive, *theirs], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_identical_embeddings_give_log_n():
    same = torch.ones(16, 8)
    assert info_nce(same, same, 100.0)[0].item() == pytest.approx(math.log(16), rel=1e-6)
    assert nt_xent(same, same)[0].item() == pytest.approx(math.log(31), rel=1e-6)


def test_perfect_embeddings_give_the_closed_form_and_full_accuracy():
    eye, scale = torch.eye(8), 5.0
    loss, accuracy = info_nce(eye, eye, scale)
    assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-scale)), rel=1e-5) and accuracy == 1
    loss, accuracy = nt_xent(eye, eye, 0.5)
    assert loss.item() == pytest.approx(math.log1p(14 * math.exp(-2)), rel=1e-5) and accuracy == 1


def test_the_order_of_the_batch_and_the_length_of_the_rows_do_not_matter():
    a, b = pair(rows=9)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for loss in (lambda x, y: info_nce(x, y, 10.0)[0], nt_xent):
        value = loss(a, b)[0] if loss is nt_xent else loss(a, b)
        other = loss(3 * a[shuffled], b[shuffled])
        other = other[0] if loss is nt_xent else other
        torch.testing.assert_close(value, other, rtol=1e-12, atol=0)


def test_the_two_sides_may_be_exchanged():
    a, b = pair()
    torch.testing.assert_close(info_nce(a, b, 7.0)[0], info_nce(b, a, 7.0)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(nt_xent(a, b)[0], nt_xent(b, a)[0], rtol=1e-12, atol=0)


def test_losses_are_float32_under_bf16_autocast():
    a, b = (x.detach().float() for x in pair(rows=32, width=64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = info_nce(a, b, 100.0)[0], nt_xent(a, b)[0]
    outside = info_nce(a, b, 100.0)[0], nt_xent(a, b)[0]
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(inside, outside, strict=True))


def test_bf16_embeddings_are_compared_in_float32():
    a, b = (x.detach().bfloat16() for x in pair(rows=32, width=64))
    torch.testing.assert_close(nt_xent(a, b)[0], nt_xent(a.float(), b.float())[0], rtol=0, atol=0)


def test_unequal_shapes_are_one_sentence():
    with pytest.raises(ValueError, match=r"found .*\[3, 4\].*\[2, 4\].*expected"):
        info_nce(torch.ones(3, 4), torch.ones(2, 4), 1.0)
    with pytest.raises(ValueError, match="expected equal shapes"):
        nt_xent(torch.ones(3, 4), torch.ones(3, 5))
