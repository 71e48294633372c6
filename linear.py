"""Linear classification: how much of a set's classes can be read off the frozen features by a linear layer.

    python linear.py --checkpoint runs/scenes-slip/checkpoint.pt --data scenes    # L-BFGS, seconds

Paper: section 4.3. The image tower is frozen and in evaluation mode; its feature before any projection goes
in. Fast path: features are extracted once, logistic regression by L-BFGS, its weight decay chosen on a
validation part of the training set, then fitted to all of it.
"""

import argparse

import torch
import torch.nn.functional as F

import measure
import ranks
import sets
import slip

DECAYS = [10.0**power for power in range(-6, 1)]  # swept weight decays of the fast path


def fit(features, labels, classes, decay, steps=200):
    """Multinomial logistic regression by L-BFGS: mean cross entropy + decay/2 |W|^2 -> (W [K, D], b [K])."""
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def probe(train, train_labels, test, test_labels, classes):
    """Features [n, D], labels [n] of both splits -> (test metrics, the chosen decay)."""
    mean, std = train.mean(0), train.std(0) + 1e-6  # of the training features
    train, test = (train - mean) / std, (test - mean) / std
    chosen = torch.rand(len(train), generator=torch.Generator().manual_seed(0)) < 0.8
    chosen = chosen.to(train.device)
    accuracies = []
    for decay in DECAYS:
        weight, bias = fit(train[chosen], train_labels[chosen], classes, decay, steps=60)
        guess = (train[~chosen] @ weight.T + bias).argmax(1)
        accuracies.append((guess == train_labels[~chosen]).float().mean().item())
    decay = DECAYS[max(range(len(DECAYS)), key=accuracies.__getitem__)]
    weight, bias = fit(train, train_labels, classes, decay)
    return measure.metrics(test @ weight.T + bias, test_labels), decay


def labelled(name, root, split):
    """The labelled form of a set: for the built-in scenes the kind of thing."""
    return sets.open_source("scenes-kind" if name == "scenes" else name, root, split)


def evaluate(model, name, root, device, workers=0):
    """Fast linear probe of a model on the set `name`: ({"top1", ...}, decay)."""
    model.eval()
    size = model.config.image_size
    train, test = (labelled(name, root, split) for split in ("train", "test"))
    features = [measure.over(source, size, device, model.visual, workers=workers) for source in (train, test)]
    return probe(*features[0], *features[1], len(train.classes))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Linear classification on frozen features.")
    parser.add_argument(
        "--checkpoint", required=True, help="a run's checkpoint.pt or a published weight file"
    )
    parser.add_argument("--data", default="scenes", help="the labelled set (default: %(default)s)")
    parser.add_argument("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    args = parser.parse_args(argv)
    try:
        device = ranks.start(args.device)
        model = slip.load(args.checkpoint).to(device)
        train, test = (labelled(args.data, args.root, split) for split in ("train", "test"))
        if train.classes is None or train.classes != test.classes:
            raise ValueError(
                f"{args.data} has other classes for training ({train.classes}) than for testing "
                f"({test.classes})"
            )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    result, decay = evaluate(model, args.data, args.root, device, args.workers)
    ranks.say(f"{args.data}: linear top-1 {result['top1']:.2f}%, mean per class {result['per_class']:.2f}%")
    ranks.say(
        f"  fast path: features once, L-BFGS, weight decay {decay:g} chosen on a fifth of the training set"
    )
    measure.record(args.checkpoint, "linear", test, f"L-BFGS, decay {decay:g}", "top1", result["top1"])
    ranks.stop()
    return 0


if __name__ == "__main__":
    ranks.leave(main())
