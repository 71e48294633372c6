"""Logistic regression on features, at its minimum: the fast recipe of linear classification.

    features [n, D], labels [n] of both splits -> probe -> accuracy on the test split, weight decay

The loss is convex: run to its minimum in float64, it gives one answer, whatever the number of threads, where
an early stop would not. Paper: linear classification, for which it used SGD (linear.py).
"""

import math

import torch
import torch.nn.functional as F

from evaluate import metrics

DECAYS = [10.0**power for power in range(0, -7, -1)]  # weight decays of the fast recipe
GRADIENT = 1e-6  # its largest entry when L-BFGS has converged


def logistic_regression(features, labels, classes, decay, start=None):
    """The minimum of mean cross entropy + decay/2 |W|^2, features [n, D] float64 -> (W [K, D], b [K]).

    `start`: (W, b) to start from. L-BFGS works on V = W C, C C^T a bound of the curvature at the start: that
    of a row x with probabilities p is (diag(p) - p p^T) times x x^T, at most (1 - |p|^2) x x^T. So correlated
    features take a tenth of the steps.
    """
    count, width = features.shape
    weight, bias = start or (features.new_zeros(classes, width), features.new_zeros(classes))
    bounds = 1 - (features @ weight.T + bias).softmax(1).square().sum(1, keepdim=True)  # [n, 1]
    curvature = (bounds * features).T @ features / count + decay * torch.eye(width).to(features)  # [D, D]
    factor = torch.linalg.cholesky(curvature)  # C [D, D]
    inverse = torch.linalg.inv(factor)
    variables = scaled, bias = (weight @ factor).requires_grad_(), bias.clone().requires_grad_()
    options = dict(max_iter=5000, tolerance_grad=GRADIENT, tolerance_change=0)
    optimizer = torch.optim.LBFGS(variables, line_search_fn="strong_wolfe", **options)

    def loss():
        optimizer.zero_grad()
        value = decay / 2 * (scaled @ inverse).square().sum()
        value.backward()
        for rows, targets in zip(features.split(65536), labels.split(65536)):  # less memory for logits
            logits = rows @ (scaled @ inverse).T + bias
            part = F.cross_entropy(logits, targets, reduction="sum") / count
            part.backward()
            value = value + part
        return value.detach()

    optimizer.step(loss)
    return (scaled @ inverse).detach(), bias.detach()


def probe(train, train_labels, test, test_labels, classes):
    """Features [n, D] and labels [n] of both splits -> (metrics of the test split, the chosen decay).

    On a held-out fifth of the training images the largest decay wins that is within half a standard error of
    the best; they are tried from the largest down, until two more have not changed the choice.
    """
    if train.device.type == "mps":  # has no float64
        train, train_labels, test, test_labels = (x.cpu() for x in (train, train_labels, test, test_labels))
    train, test = train.double(), test.double()
    mean, std = train.mean(0), train.std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).to(train.device)
    train, labels, held = train[order], train_labels[order], max(1, len(train) // 5)
    tried, solution = [], None
    for decay in DECAYS:
        solution = logistic_regression(train[held:], labels[held:], classes, decay, solution)
        guesses = (train[:held] @ solution[0].T + solution[1]).argmax(1)
        tried.append(((guesses == labels[:held]).double().mean().item(), decay, solution))
        best = max(accuracy for accuracy, *_ in tried)
        enough = best - math.sqrt(best * (1 - best) / held) / 2
        choice = next(i for i, row in enumerate(tried) if row[0] >= enough)
        if len(tried) > choice + 2:
            break
    _, decay, solution = tried[choice]
    weight, bias = logistic_regression(train, labels, classes, decay, solution)
    return metrics(test @ weight.T + bias, test_labels), decay
