"""The two losses against a loop-by-loop transcription in float64, in value and gradient, and against closed
forms.

    python -m pytest tests/test_losses.py
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from losses import info_nce, nt_xent


def naive_info_nce(image, text, scale, same):
    """Both directions, pair by pair; `same` takes the other rows of a class out of the denominator."""
    image, text, rows = normalize(image), normalize(text), range(len(image))
    total = 0
    for i in rows:
        kept = [j for j in rows if j == i or same[j] != same[i]]
        to_texts = torch.stack([scale * image[i] @ text[j] for j in kept])
        to_images = torch.stack([scale * image[j] @ text[i] for j in kept])
        total = total + to_texts.logsumexp(0) + to_images.logsumexp(0) - 2 * scale * image[i] @ text[i]
    return total / (2 * len(image))


def naive_nt_xent(z1, z2, temperature):
    """For each of the 2B views: its positive against all others."""
    z, b = normalize(torch.cat([z1, z2])), len(z1)
    total = 0
    for i in range(2 * b):
        others = torch.stack([z[i] @ z[k] / temperature for k in range(2 * b) if k != i])
        total = total + others.logsumexp(0) - z[i] @ z[(i + b) % (2 * b)] / temperature
    return total / (2 * b)


def pair(rows=7, width=5):
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(2, rows, width, dtype=torch.float64, generator=generator)
    return [z[0].requires_grad_(), z[1].requires_grad_()]


def assert_equal_in_value_and_gradient(ours, theirs, inputs):
    ours, theirs = ([loss, *torch.autograd.grad(loss, inputs)] for loss in (ours, theirs))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64, a handful of sums


@pytest.mark.parametrize("same", [None, [0, 1, 0, 2, 1, 0, 3], [4] * 7])
def test_info_nce_equals_the_naive_formula_in_value_and_gradient(same):
    image, text = pair()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ours = info_nce(image, text, scale, None if same is None else torch.tensor(same))[0]
    theirs = naive_info_nce(image, text, scale, same or range(7))
    assert_equal_in_value_and_gradient(ours, theirs, [image, text, scale])


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nt_xent_equals_the_naive_formula_in_value_and_gradient(temperature):
    z1, z2 = pair()
    ours, theirs = nt_xent(z1, z2, temperature)[0], naive_nt_xent(z1, z2, temperature)
    assert_equal_in_value_and_gradient(ours, theirs, [z1, z2])


def test_identical_embeddings_give_log_n():
    rows = torch.ones(16, 8)
    assert info_nce(rows, rows, 100.0)[0].item() == pytest.approx(math.log(16), rel=1e-6)
    assert nt_xent(rows, rows)[0].item() == pytest.approx(math.log(31), rel=1e-6)


def test_perfect_embeddings_give_the_closed_form_and_full_accuracy():
    loss, accuracy = info_nce(torch.eye(8), torch.eye(8), 5.0)
    assert loss.item() == pytest.approx(math.log1p(7 * math.exp(-5)), rel=1e-5) and accuracy == 1
    loss, accuracy = nt_xent(torch.eye(8), torch.eye(8), 0.5)
    assert loss.item() == pytest.approx(math.log1p(14 * math.exp(-2)), rel=1e-5) and accuracy == 1


def test_rows_of_one_class_are_not_each_others_negatives():
    """Rows a, a, b at right angles for a and b: of three logits, row 1 and 2 keep two, row 3 keeps three.
    Without `same` the first two rows cannot be told apart and the loss cannot go below 2/3 log 2."""
    rows, scale = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), 10.0
    loss, accuracy = info_nce(rows, rows, scale, torch.tensor([5, 5, 9]))
    by_hand = (2 * math.log1p(math.exp(-scale)) + math.log1p(2 * math.exp(-scale))) / 3
    assert loss.item() == pytest.approx(by_hand, rel=1e-2) and accuracy == 1  # 6e-5: rounding of 10 is 1e-6
    plain, accuracy = info_nce(rows, rows, scale)
    assert plain.item() > 2 / 3 * math.log(2) and accuracy.item() == pytest.approx(2 / 3)


def test_the_order_of_the_batch_the_sides_and_the_length_of_the_rows_do_not_matter():
    a, b = pair(rows=9)
    shuffled = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for loss in (lambda x, y: info_nce(x, y, 10.0)[0], lambda x, y: nt_xent(x, y)[0]):
        torch.testing.assert_close(loss(a, b), loss(3 * b[shuffled], a[shuffled]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_losses_are_float32_under_bf16_autocast_and_for_bf16_embeddings(stored):
    a, b = (x.detach().to(stored) for x in pair(rows=32, width=64))
    expected = info_nce(a.float(), b.float(), 100.0)[0], nt_xent(a.float(), b.float())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = info_nce(a, b, 100.0)[0], nt_xent(a, b)[0]
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(found, expected))


def test_unequal_shapes_are_one_sentence():
    with pytest.raises(ValueError, match=r"found .*\[3, 4\].*\[2, 4\].*expected"):
        info_nce(torch.ones(3, 4), torch.ones(2, 4), 1.0)
    with pytest.raises(ValueError, match="expected equal shapes"):
        nt_xent(torch.ones(3, 4), torch.ones(3, 5))
