"""Linear classification: how well a linear layer tells a set's classes apart by the frozen features.

    python linear.py --checkpoint runs/scenes-slip --data scenes                    # L-BFGS, seconds
    python linear.py --checkpoint slip_base_25ep.pt --data imagenet --recipe sgd    # the paper's 90 epochs

Paper: linear classification. The image tower is frozen and in evaluation mode; the layer takes its features
[B, D], before any projection. The fast recipe solves logistic regression on the features of one view of each
image to its minimum, whatever the number of threads; the paper's is SGD on random crops.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import augment
import console
import data
import ranks
import recipe
import run as runs
import sets
import slip
from device import autocast
from evaluate import METRICS, apply_to_set, logistic_regression, metrics, record

COLUMNS = ["epoch", "step", "loss", "grad_norm", "images_per_s", *METRICS]
DECAYS = [10.0**power for power in range(0, -7, -1)]  # weight decays of the fast recipe


def probe(train, train_labels, test, test_labels, classes):
    """Features [n, D] and labels [n] of both splits -> (metrics of the test split, weight decay): the
    largest within half a standard error of the best accuracy on a held-out fifth of the training images."""
    mean, std = train.double().mean(0), train.double().std(0) + 1e-6
    train, test = (train - mean) / std, (test - mean) / std
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train, labels, held = train[order], train_labels[order], max(1, len(train) // 5)
    shares = {}  # of the held-out images that are right
    for decay in DECAYS:
        weight, bias = logistic_regression(train[held:], labels[held:], classes, decay)
        shares[decay] = metrics(train[:held] @ weight.T + bias, labels[:held])["top1"] / 100
    best = max(shares.values())
    enough = best - math.sqrt(best * (1 - best) / held) / 2
    decay = max(decay for decay, share in shares.items() if share >= enough)
    weight, bias = logistic_regression(train, labels, classes, decay)
    return metrics(test @ weight.T + bias, test_labels), decay


def probe_model(model, train, test, device, workers=0):
    """The fast recipe on both splits of a labelled set -> (metrics of the test split, weight decay). Training
    images that cannot be decoded are left out with a warning; of the test split they raise Stop."""
    given = (model.config.image_size, device, model.visual)
    parts = apply_to_set(train, *given, workers=workers, skip_bad=True)[:2]
    parts += apply_to_set(test, *given, workers=workers)[:2]
    # On the CPU: on a GPU the many small steps in float64 are slower, and mps has no float64.
    return probe(*(part.cpu() for part in parts), len(train.classes))


def set_up(args, path, model, train):
    """-> (head: features [B, D] -> logits [B, K], settings, run). Raises ValueError or OSError."""
    values = vars(args) | dict(checkpoint=path, image_size=model.config.image_size)
    values |= runs.length(args, recipe.LINEAR | dict(epochs=args.epochs, warmup_epochs=0), len(train))
    values["lr"] = args.lr or recipe.LINEAR["lr"] * values["batch_size"] / recipe.LINEAR["lr_batch"]
    values["out"] = args.out or str(Path(path).with_name(f"linear-{Path(args.data).stem}"))
    settings = dataclasses.make_dataclass("Settings", values, frozen=True)(**values)
    torch.manual_seed(args.seed)
    head = torch.nn.Linear(model.visual.width, len(train.classes))
    torch.nn.init.normal_(head.weight, std=0.01)
    torch.nn.init.zeros_(head.bias)
    head.config, head.tokenizer = model.config, None  # for slip.save
    run = runs.open_run(settings, {"out", "root", "workers", "device"}, COLUMNS)
    if run.state:
        slip.load_weights(head, run.state["weights"], settings.out)
    return head, settings, run


def sgd(model, head, settings, run, train, test, device, workers):
    """The loop: random crops, the frozen tower, cross entropy -> metrics of the test split."""
    size, paper, wrapped = model.config.image_size, recipe.LINEAR, ranks.wrap(head.to(device))
    optimizer = torch.optim.SGD(head.parameters(), settings.lr, momentum=paper["momentum"])
    if run.state:
        optimizer.load_state_dict(run.state["run"]["optimizer"])
    resize = round(size * paper["test_resize"])
    features, targets, _ = apply_to_set(test, size, device, model.visual, resize=resize, workers=workers)
    views = data.LabelledViews(train, size, settings.seed, paper["crop"])

    def loader_for(steps):
        sampler = data.Batches(len(train), None, settings.batch_size, settings.seed, steps)
        return data.loader(views, sampler, workers, pin=device.type == "cuda")

    for step, batch in run.batches(loader_for):
        done = step // settings.epoch_steps / settings.epochs  # the same for a whole epoch
        optimizer.param_groups[0]["lr"] = lr = settings.lr * (1 + math.cos(math.pi * done)) / 2
        images, labels = (batch[name].to(device, non_blocking=True) for name in ("images", "labels"))
        with torch.no_grad(), autocast(device):
            frozen = model.visual(augment.normalise(images)).float()  # [b, D]
        logits, labels = ranks.gather(wrapped(frozen)), ranks.gather(labels)  # [B, K], [B]
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(head.parameters(), math.inf)
        stats = dict(loss=loss.item(), grad_norm=grad_norm.item())
        run.check_finite(stats, lr)
        optimizer.step()
        run.record(stats, lr)
        if run.epoch_ended:
            run.end_epoch(metrics(head(features).detach(), targets), None, head)
            run.save(head, optimizer)
    run.finish(head, optimizer)
    return {name: run.rows[-1][name] for name in METRICS if run.rows[-1][name] != ""}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    count, natural, add = console.positive_int, console.natural, parser.add_argument
    add("--checkpoint", required=True, help="a run folder, its checkpoint.pt or a published weight file")
    add("--data", default="scenes", help="the labelled set (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--recipe", choices=["fast", "sgd"], default="fast", help="default: %(default)s")
    add("--image-size", type=count, help="side of the views, pixels (default: the model's)")
    add("--workers", type=natural, help="processes that decode (default: 0 for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    add = parser.add_argument_group("with --recipe sgd").add_argument
    add("--epochs", type=count, default=recipe.LINEAR["epochs"], help="passes over the images (default: 90)")
    add("--batch-size", type=count, help="images in a step, over all ranks (default: 1024)")
    add("--lr", type=console.positive_float, help="first rate (default: 0.1 x batch / 256, MoCo v3's rule)")
    add("--seed", type=natural, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: linear-DATA beside the checkpoint)")
    parser.set_defaults(max_steps=None, warmup_epochs=None)  # for run.length
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)

    def command():
        try:
            device, path = ranks.start(args.device), slip.find_checkpoint(args.checkpoint)
            model = slip.load(path, args.image_size).to(device)
            train, test = sets.labelled(args.data, args.root)
            workers = recipe.workers(len(train)) if args.workers is None else args.workers
            prepared = set_up(args, path, model, train) if args.recipe == "sgd" else None
        except (ValueError, OSError) as error:
            console.fail(parser, error)
        if prepared:
            result = sgd(model, *prepared, train, test, device, workers)
            how = "SGD, {epochs} epochs, batch {batch_size}, lr {lr:g}".format(**vars(prepared[1]))
        else:
            result, decay = probe_model(model, train, test, device, workers)
            how = f"L-BFGS, weight decay {decay:g}"
        top1, per_class = result["top1"], result["per_class"]
        ranks.say(f"{args.data}: linear top-1 {top1:.2f}%, mean per class {per_class:.2f}% ({how})")
        record(path, "linear", args.data, result | {"how": how})
        ranks.stop()

    return console.guarded(command)


if __name__ == "__main__":
    ranks.leave(main())
