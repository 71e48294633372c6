"""Linear classification: how much of a set's classes can be read off the frozen features by a linear layer.

    python linear.py --checkpoint runs/scenes-slip/checkpoint.pt --data scenes    # L-BFGS, seconds
    python linear.py --checkpoint slip_base_25ep.pt --data imagenet --recipe sgd    # the paper's 90 epochs

Paper: section 4.3. The image tower is frozen and in evaluation mode; its feature before any projection goes
in. Fast path: features are extracted once, logistic regression by L-BFGS, its weight decay chosen on a
validation part of the training set, then fitted to all of it. The paper's path: SGD on random crops.
"""

import argparse
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import data
import loop
import measure
import ranks
import recipe
import sets
import slip

COLUMNS = "epoch step loss train_top1 grad_norm lr images_per_s top1 per_class".split()
FREE = {"out", "root", "workers", "device", "save_every"}
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
    accuracies, live = [], loop.Live()
    for decay in DECAYS:
        live.show(f"trying weight decay {decay:g}")
        weight, bias = fit(train[chosen], train_labels[chosen], classes, decay, steps=60)
        guess = (train[~chosen] @ weight.T + bias).argmax(1)
        accuracies.append((guess == train_labels[~chosen]).float().mean().item())
    live.clear()
    decay = DECAYS[max(range(len(DECAYS)), key=accuracies.__getitem__)]
    weight, bias = fit(train, train_labels, classes, decay)
    return measure.metrics(test @ weight.T + bias, test_labels), decay


def extract(model, source, device, workers=0, resize=None):
    """(features [n, D] of the frozen tower on the evaluation views, labels [n])."""
    size = model.config.image_size
    return measure.over(source, size, device, model.visual, resize=resize, workers=workers)


def evaluate(model, train, test, device, workers=0):
    """Fast linear probe of a model on both splits of a labelled set: ({"top1", ...}, decay)."""
    model.eval()
    features = [extract(model, source, device, workers) for source in (train, test)]
    return probe(*features[0], *features[1], len(train.classes))


# The paper's path


class Head(nn.Module):
    """Features [B, D] -> logits [B, K]; with what slip.save asks of a model."""

    def __init__(self, config, width, classes):
        super().__init__()
        self.config, self.tokenizer = config, None
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, features):
        return self.head(features)


def cosine_by_epoch(step, epoch_steps, epochs, peak):
    """The learning rate of a step: the same for a whole epoch, never quite 0."""
    return peak * (1 + math.cos(math.pi * (step // epoch_steps) / epochs)) / 2


def set_up_sgd(args, model, train):
    """Resolve the flags and open the run folder: (head, state); raises ValueError or OSError."""
    values = recipe.LINEAR
    args.epochs = values["epochs"] if args.epochs is None else args.epochs
    args.batch_size = values["batch_size"] if args.batch_size is None else args.batch_size
    if args.epochs < 1 or not ranks.world() <= args.batch_size <= len(train) or args.seed < 0:
        raise ValueError(
            f"found --epochs {args.epochs} --batch-size {args.batch_size} --seed {args.seed}, expected 1 or "
            f"more, {ranks.world()} (the ranks) to {len(train)} (the pictures), 0 or more"
        )
    args.lr = values["lr"] * args.batch_size / values["lr_batch"] if args.lr is None else args.lr
    if args.lr <= 0 or (args.save_every is not None and args.save_every <= 0):
        raise ValueError(f"found --lr {args.lr} --save-every {args.save_every}, expected more than 0")
    args.epoch_steps = len(train) // args.batch_size
    args.out = args.out or os.path.join(os.path.dirname(args.checkpoint), f"linear-{args.data}")
    torch.manual_seed(args.seed)
    head = Head(model.config, model.visual.width, len(train.classes))
    state = loop.resume(args.out, vars(args), FREE)
    if state:
        slip.fill(head, state["weights"], args.out)
    return head, state


def sgd(args, model, train, test, head, state, device):
    """The paper's SGD on random crops -> rows of the log. The encoder is in evaluation mode and stays."""
    size, resize = model.config.image_size, recipe.LINEAR["test_resize"]
    views = data.LabelledViews(train, size, args.seed, recipe.LINEAR["crop"])
    wrapped = ranks.wrap(head.to(device))
    optimizer = torch.optim.SGD(wrapped.parameters(), args.lr, momentum=recipe.LINEAR["momentum"])
    scored, labels = extract(model, test, device, args.workers, round(size * resize))  # frozen: once will do

    def tower(chunk):
        return {"features": model.visual(chunk["images"])}

    def loss_of(batch):
        batch = data.device_views({n: v.to(device, non_blocking=True) for n, v in batch.items()})
        with torch.no_grad(), ranks.autocast(device):
            features = slip.in_chunks(tower, {"images": batch["images"]}, 256)["features"]  # [b, D]
        logits = ranks.gather(wrapped(features.float()))  # [B, K]
        targets = ranks.gather(batch["labels"])  # [B]
        hits = (logits.argmax(1) == targets).float().mean()
        return F.cross_entropy(logits, targets), {"train_top1": 100 * hits}

    def batches(steps):
        sampler = data.Batches(len(views), None, args.batch_size, args.seed, steps, ranks.mine)
        return data.loader(views, sampler, args.workers, pin=device.type == "cuda")

    @torch.no_grad()
    def after_epoch():
        return measure.metrics(head(scored), labels), None

    return loop.fit(
        wrapped, optimizer, batches, loss_of, out=args.out, args=vars(args), state=state,
        steps=args.epochs * args.epoch_steps, epoch_steps=args.epoch_steps, batch_size=args.batch_size,
        columns=COLUMNS, after_step=lambda step: None, after_epoch=after_epoch, save_every=args.save_every,
        rate=lambda step: cosine_by_epoch(step, args.epoch_steps, args.epochs, args.lr),
        bad_share=data.BAD_SHARE,
    )  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(
        description="Linear classification on frozen features. The fast path (features once, L-BFGS, weight "
        "decay swept) is the default, seconds instead of hours; --recipe sgd is the paper's 90 epochs of SGD "
        "on crops. The same line again goes on with a stopped run of it."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's checkpoint.pt or a published weight file")
    add("--data", default="scenes", help="the labelled set (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--recipe", choices=["fast", "sgd"], default="fast", help="default: %(default)s")
    add("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    paper = parser.add_argument_group("with --recipe sgd")
    add = paper.add_argument
    add("--epochs", type=int, help="passes over the pictures (default: 90)")
    add("--batch-size", type=int, help="pictures in a step, over all ranks (default: 1024)")
    add("--lr", type=float, help="first learning rate (default: 0.1 x batch / 256, MoCo v3's rule)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: linear-DATA in the checkpoint's)")
    add("--save-every", type=int, metavar="STEPS", help="checkpoints within an epoch as well")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.workers < 0:
            raise ValueError(f"found --workers {args.workers}, expected 0 or more")
        device = ranks.start(args.device)
        model = slip.load(args.checkpoint).to(device)
        train, test = sets.labelled(args.data, args.root)
        if args.recipe == "sgd":
            head, state = set_up_sgd(args, model, train)
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def work():
        if args.recipe == "sgd":
            result = sgd(args, model, train, test, head, state, device)[-1]
            how = f"SGD, {args.epochs} epochs of crops, batch {args.batch_size}, lr {args.lr:g}"
        else:
            result, decay = evaluate(model, train, test, device, args.workers)
            how = f"L-BFGS on features extracted once, weight decay {decay:g} chosen on a fifth"
        top1, per_class = result["top1"], result["per_class"]
        ranks.say(f"{args.data}: linear top-1 {top1:.2f}%, mean per class {per_class:.2f}%")
        ranks.say(f"  {args.recipe} path: {how}")
        measure.record(args.checkpoint, "linear", test, how, "top1", top1)

    code = loop.guarded(work)
    if code == 0:
        ranks.stop()
    return code


if __name__ == "__main__":
    ranks.leave(main())
