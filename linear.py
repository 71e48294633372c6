"""Linear classification: how well a linear layer tells a set's classes apart by the frozen features.

    python linear.py --checkpoint runs/scenes-slip --data scenes                    # L-BFGS, seconds
    python linear.py --checkpoint slip_base_25ep.pt --data imagenet --recipe sgd    # the paper's 90 epochs

Paper: linear classification. The image tower is frozen and in evaluation mode; the layer takes its features
[B, D], before any projection. The fast recipe takes the features of one view of each image to the minimum of
logistic regression (probe.py); the paper's is SGD on random crops.
"""

import argparse
import math
import os
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

import augment
import console
import data
import flags
import ranks
import recipe
import run as runs
import sets
import slip
from device import autocast
from evaluate import METRICS, apply_to_set, metrics, record
from probe import probe

COLUMNS = ["epoch", "step", "loss", "train_top1", "grad_norm", "images_per_s", *METRICS]
HIDDEN = {"grad_norm", "top5", "top1_top5", "auc"}  # in log.csv, not in the table on the screen


def extract(model, source, device, **options):
    """(features [n, D] of the frozen tower, labels [n]); options as of evaluate.apply_to_set."""
    return apply_to_set(source, model.config.image_size, device, model.visual, **options)[:2]


def evaluate(model, train, test, device, workers=0):
    """The fast recipe on both splits of a labelled set -> (metrics of the test split, weight decay).

    Training images that cannot be decoded are left out with a warning; of the test split they raise Stop.
    """
    model.eval()
    features = extract(model, train, device, workers=workers, skip_bad=True)
    return probe(*features, *extract(model, test, device, workers=workers), len(train.classes))


# The paper's recipe


def set_up(args, path, model, train):
    """-> (head: features [B, D] -> logits [B, K], settings, run). Raises ValueError or OSError."""
    values, world = vars(args) | {"epochs": args.epochs or recipe.LINEAR["epochs"]}, ranks.world()
    batch = args.batch_size or min(recipe.LINEAR["batch_size"], len(train) // world * world)
    if not 0 < batch <= len(train) or batch % world:
        raise ValueError(
            f"found --batch-size {batch}, expected 1 to {len(train)}, a multiple of {world} ranks"
        )
    values["lr"] = args.lr or recipe.LINEAR["lr"] * batch / recipe.LINEAR["lr_batch"]
    steps = values["epochs"] * (len(train) // batch)
    values |= dict(batch_size=batch, epoch_steps=len(train) // batch, steps=steps)
    values["out"] = args.out or os.path.join(os.path.dirname(path), f"linear-{args.data}")
    settings = flags.freeze(values | dict(checkpoint=path, image_size=model.config.image_size))
    torch.manual_seed(args.seed)
    head = nn.Sequential(OrderedDict(head=nn.Linear(model.visual.width, len(train.classes))))
    nn.init.normal_(head.head.weight, std=0.01)
    nn.init.zeros_(head.head.bias)
    head.config, head.tokenizer = model.config, None  # for slip.save
    run = runs.open_run(settings, {"out", "root", "workers", "device"}, COLUMNS)
    if run.state:
        slip.load_weights(head, run.state["weights"], settings.out)
    return head, settings, run


def sgd(model, head, settings, run, train, test, device, workers):
    """The loop: random crops, the frozen tower, cross entropy -> metrics of the test split."""
    size, wrapped = model.config.image_size, ranks.wrap(head.to(device))
    optimizer = torch.optim.SGD(head.parameters(), settings.lr, momentum=recipe.LINEAR["momentum"])
    if run.state:
        optimizer.load_state_dict(run.state["run"]["optimizer"])
    resize = round(size * recipe.LINEAR["test_resize"])
    test_features, test_labels = extract(model, test, device, workers=workers, resize=resize)
    views = data.LabelledViews(train, size, settings.seed, recipe.LINEAR["crop"])

    def loader_for(steps):
        sampler = data.Batches(len(train), None, settings.batch_size, settings.seed, steps, ranks.share)
        return data.loader(views, sampler, workers, pin=device.type == "cuda")

    def end_epoch():
        run.end_epoch(metrics(head(test_features).detach(), test_labels), None, head, HIDDEN)
        run.save(head, optimizer)

    def features(chunk):
        return {"image": model.visual(augment.normalise(chunk["images"]))}

    if run.epoch_ended:
        end_epoch()
    for step, batch in run.batches(loader_for):
        done = step // settings.epoch_steps / settings.epochs  # the same for a whole epoch
        optimizer.param_groups[0]["lr"] = lr = settings.lr * (1 + math.cos(math.pi * done)) / 2
        images, labels = (batch[name].to(device, non_blocking=True) for name in ("images", "labels"))
        with torch.no_grad(), autocast(device):
            frozen = slip.in_chunks(features, {"images": images}, 256)["image"].float()  # [b, D]
        logits, targets = ranks.gather(wrapped(frozen)), ranks.gather(labels)  # [B, K], [B]
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(head.parameters(), math.inf)
        hits = (logits.argmax(1) == targets).float().mean()
        stats = dict(loss=loss.item(), train_top1=100 * hits.item(), grad_norm=grad_norm.item())
        run.check_finite(stats, lr)
        optimizer.step()
        run.record(stats, lr)
        if run.epoch_ended:
            end_epoch()
    run.finish(head, optimizer)
    return {name: value for name, value in run.numbers["rows"][-1].items() if name in METRICS and value != ""}


def arguments():
    parser = argparse.ArgumentParser(
        description="Linear classification on frozen features. The fast recipe takes seconds instead of "
        "hours; the paper's is --recipe sgd. The same line again resumes a stopped run of it."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run folder, its checkpoint.pt or a published weight file")
    add("--data", default="scenes", help="the labelled set (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--recipe", choices=["fast", "sgd"], default="fast", help="default: %(default)s")
    add("--image-size", type=console.positive_int, help="side of the views, pixels (default: the model's)")
    add("--workers", type=console.natural, help="processes that decode (default: 0 for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    add = parser.add_argument_group("with --recipe sgd").add_argument
    add("--epochs", type=console.positive_int, help="passes over the images (default: 90)")
    add("--batch-size", type=console.positive_int, help="images in a step, over all ranks (default: 1024)")
    add("--lr", type=console.positive_float, help="first rate (default: 0.1 x batch / 256, MoCo v3's rule)")
    add("--seed", type=console.natural, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: linear-DATA beside the checkpoint)")
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
            settings = prepared[1]
            result = sgd(model, *prepared, train, test, device, workers)
            how = f"SGD, {settings.epochs} epochs, batch {settings.batch_size}, lr {settings.lr:g}"
        else:
            result, decay = evaluate(model, train, test, device, workers)
            how = f"L-BFGS, weight decay {decay:g}"
        top1, per_class = result["top1"], result["per_class"]
        ranks.say(f"{args.data}: linear top-1 {top1:.2f}%, mean per class {per_class:.2f}% ({how})")
        record(path, "linear", args.data, result | {"how": how})
        ranks.stop()

    return console.guarded(command)


if __name__ == "__main__":
    ranks.leave(main())
