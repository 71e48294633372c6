"""Fine-tuning: the whole image tower and a linear head learn a labelled set, end to end.

    python finetune.py --checkpoint runs/scenes-slip --data scenes       # a small set, minutes
    python finetune.py --checkpoint slip_base_25ep.pt --data imagenet    # the paper's recipe
    python finetune.py --checkpoint runs/scenes-slip/finetune-scenes/best.pt --evaluate

Paper: end-to-end fine-tuning. The recipe is BEiT's: layer decay, drop path, mixup, cutmix, RandAugment,
random erasing. The class token's feature [B, D] goes into the head. best.pt is chosen on a held-out part of
the training set. An image is mixed with one of its own rank's. Left to others: the model and the augmentation
(classifier.py), values and layers' rates (recipe.py), the run's folder (run.py).
"""

import argparse
import math
import os

import torch
import torch.nn.functional as F

import augment
import console
import data
import device as devices
import flags
import ranks
import recipe
import run as runs
import sets
import slip
from classifier import from_pretrained, load, mix, strong_view
from evaluate import METRICS, apply_to_set, metrics, record
from vit import count_parameters

COLUMNS = ["epoch", "step", "loss", "train_top1", "grad_norm", "images_per_s", "held_top1", *METRICS]
HIDDEN = {"grad_norm", "top5", "top1_top5", "auc"}  # in log.csv, not in the table on the screen
# Flags that may change on resume; they do not affect the result.
FREE = {"out", "root", "workers", "device", "micro_batch", "save_every", "recompute", "evaluate"}
LARGER = console.number(float, 1, 100, "1 or more: the centre crop must fit in")
VALUES = {  # flags whose default is the recipe's
    "epochs": (console.positive_int, "passes over the images"),
    "warmup_epochs": (console.not_negative, "epochs of linear warm-up"),
    "batch_size": (console.positive_int, "images in a step, over all ranks"),
    "wd": (console.not_negative, "weight decay of matrices"),
    "layer_decay": (console.positive_float, "a layer's learning rate over that of the layer above it"),
    "drop_path": (console.share, "probability of skipping the last block's branches; 0 at the first block"),
    "mixup": (console.not_negative, "alpha of mixup, 0: none"),
    "cutmix": (console.not_negative, "alpha of cutmix, 0: none; a batch gets one of the two"),
    "smoothing": (console.share, "label smoothing"),
    "randaugment": (console.not_negative, "magnitude of RandAugment, of 10, 0: none"),
    "erasing": (console.share, "probability of erasing a box"),
    "crop": (console.share, "smallest share of the image in a crop"),
    "test_resize": (LARGER, "short side of a test image over the side of its centre crop"),
}


def objective(model, batch, settings, device):
    """Soft cross entropy on a mixed batch -> (loss, {name: scalar for the log})."""
    # The loop seeded by the step, the same on all ranks.
    torch.manual_seed(torch.initial_seed() + (ranks.rank() << 40))
    images = augment.normalise(batch["images"]) if batch["images"].dtype == torch.uint8 else batch["images"]
    classes = len(settings.classes)
    images, targets = mix(images, batch["labels"], classes, settings.mixup, settings.cutmix)
    with devices.autocast(device, settings.precision):
        logits = model(images, settings.micro_batch, settings.recompute)  # [b, K]
    logits, targets = ranks.gather(logits.float()), ranks.gather(targets)  # [B, K]
    loss = F.cross_entropy(logits, targets, label_smoothing=settings.smoothing)
    hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
    return loss, {"loss": loss, "train_top1": 100 * hits}


def evaluate(model, source, device, test_resize=1.0, workers=0):
    """metrics of a Classifier on a source; leaves its mode as it was."""
    training, size = model.training, model.config.image_size
    model.eval()
    resize = round(size * test_resize)
    scores, labels, _ = apply_to_set(source, size, device, model, resize=resize, workers=workers)
    model.train(training)
    return metrics(scores, labels)


def train(model, run, settings, device, views, held, test):
    """The loop, to the last step or to a signal."""
    wrapped = ranks.wrap(model.train())
    groups = recipe.layer_groups(model, len(model.visual.blocks), settings.wd, settings.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=True)
    if run.state:
        optimizer.load_state_dict(run.state["run"]["optimizer"])

    def loader_for(steps):
        keys = (len(views.source), None, settings.batch_size, settings.seed, steps, ranks.share)
        return data.loader(views, data.Batches(*keys), settings.workers, pin=device.type == "cuda")

    def end_epoch():
        run.save(model, optimizer)  # before an evaluation, which may be long
        options, score = (device, settings.test_resize, settings.workers), None
        measured = evaluate(model, test, *options)
        if len(held):  # of fewer than 20 images nothing is held out, and no best.pt is chosen
            score = measured["held_top1"] = evaluate(model, held, *options)["top1"]
        run.end_epoch(measured, score, model, HIDDEN)
        run.save(model, optimizer)

    if run.epoch_ended:  # the run was stopped while it was evaluated
        end_epoch()
    for step, batch in run.batches(loader_for):
        schedule = (settings.steps, settings.warmup_steps, settings.lr)
        lr = recipe.learning_rate(step, *schedule, end=recipe.FINETUNE_END_LR)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        batch = {name: rows.to(device, non_blocking=True) for name, rows in batch.items()}
        loss, stats = objective(wrapped, batch, settings, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = settings.clip_grad or math.inf
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        stats = {name: value.item() for name, value in stats.items()}
        run.check_finite(stats, lr)
        optimizer.step()
        run.record(stats, lr)
        if run.epoch_ended:
            end_epoch()
        elif run.must_save:
            run.save(model, optimizer)
    run.finish(model, optimizer)


def resolve(args, path, config, images):
    """-> {flag: value}: what was typed, else the recipe's. Raises ValueError."""
    own, world = recipe.finetune(config.model, args.data), ranks.world()
    values = own | {name: value for name, value in vars(args).items() if value is not None or name not in own}
    batch = args.batch_size or min(own["batch_size"], images // world * world)
    if not 0 < batch <= images or batch % world:
        raise ValueError(f"found --batch-size {batch}, expected 1 to {images}, a multiple of {world} ranks")
    epoch_steps = images // batch
    steps = args.max_steps or values["epochs"] * epoch_steps
    warmup_steps = values["warmup_epochs"] * epoch_steps
    if args.warmup_epochs is None:
        warmup_steps = min(warmup_steps, steps / 5)  # a recipe's warm-up suits its length
    elif warmup_steps > steps:
        raise ValueError(f"--warmup-epochs {args.warmup_epochs:g} is more than the run's {steps} steps")
    values |= dict(batch_size=batch, epoch_steps=epoch_steps, steps=steps, warmup_steps=warmup_steps)
    values |= dict(checkpoint=path, image_size=config.image_size)
    values["lr"] = args.lr or own["lr"] * batch / own["batch_size"]
    values["workers"] = recipe.workers(images) if args.workers is None else args.workers
    values["out"] = args.out or os.path.join(os.path.dirname(path), f"finetune-{args.data}")
    return values


def set_up(args):
    """Open what is asked for -> a function that does the work. Raises ValueError or OSError."""
    device, path = ranks.start(args.device), slip.find_checkpoint(args.checkpoint)
    pretrained = slip.load(path, args.image_size)
    whole, test = sets.labelled(args.data, args.root)
    source, held = (data.subset(whole, part) for part in data.holdout(len(whole), args.seed))
    values = resolve(args, path, pretrained.config, len(source)) | {"classes": whole.classes}
    torch.manual_seed(args.seed)
    model = from_pretrained(pretrained, whole.classes, values["drop_path"])
    rows = values["batch_size"] // ranks.world()
    plan = devices.plan_chunks(model, rows, device, args.micro_batch, 1, args.precision)
    values["micro_batch"], values["recompute"], chunks = plan
    settings = flags.freeze(values)
    run = runs.open_run(settings, FREE, COLUMNS)
    if run.state:
        slip.load_weights(model, run.state["weights"], settings.out)
    transform = strong_view(settings.randaugment, settings.erasing)
    views = data.LabelledViews(source, settings.image_size, settings.seed, settings.crop, transform)

    def work():
        announce(settings, model, device, run, chunks)
        train(model.to(device), run, settings, device, views, held, test)
        report(settings, run)

    return work


def announce(settings, model, device, run, chunks):
    chance = 100 / len(settings.classes)
    ranks.say(
        f"fine-tuning {settings.checkpoint}: {model.config.model}, {count_parameters(model):,} parameters, "
        f"on {settings.data}: {len(settings.classes)} classes (chance {chance:.1f}%)"
    )
    ranks.say(
        f"{settings.steps} steps of {settings.batch_size}, {chunks}, {settings.epoch_steps} an epoch, "
        f"{settings.warmup_steps:.0f} of warm-up; lr {settings.lr:g}, wd {settings.wd:g}, layer decay "
        f"{settings.layer_decay:g}; {device}, {devices.precision(device, settings.precision)}"
    )
    if run.state:
        ranks.say(f"resumed at step {run.step} of {run.out}")


def report(settings, run):
    """Last and best on the test split, printed and in results.json beside the source checkpoint."""
    rows, how = run.numbers["rows"], dict(steps=settings.steps, lr=settings.lr)
    found = {name: rows[-1][name] for name in METRICS if rows[-1][name] != ""}
    ranks.say(f"{settings.data}: fine-tuned top-1 {found['top1']:.2f}%, last step")
    if rows[-1]["held_top1"] != "":
        best = max(rows, key=lambda row: row["held_top1"])  # the first of equals, as best.pt
        ranks.say(f"{settings.data}: fine-tuned top-1 {best['top1']:.2f}%, best.pt, step {best['step']}")
        how |= {"best_top1": best["top1"], "best_step": best["step"]}
    record(settings.checkpoint, "finetune", settings.data, found | how)
    ranks.say(f"saved {os.path.join(settings.out, runs.CHECKPOINT)}")


def test_only(args):
    """--evaluate: a fine-tuned checkpoint on a test split -> as set_up."""
    device, path = ranks.start(args.device), slip.find_checkpoint(args.checkpoint)
    model, then = load(path, args.image_size).to(device), slip.read_checkpoint(path)["run"]["args"]
    name = args.data or then["data"]
    _, test = sets.labelled(name, args.root or then["root"])
    if test.classes != model.classes:
        raise ValueError(f"{path} names other classes than {name}")
    workers = recipe.workers(len(test)) if args.workers is None else args.workers

    def work():
        found = evaluate(model, test, device, then["test_resize"], workers)
        ranks.say("{}: fine-tuned top-1 {top1:.2f}%, mean per class {per_class:.2f}%".format(name, **found))
        record(path, "finetune", name, found)

    return work


def arguments():
    parser = argparse.ArgumentParser(
        description="Fine-tune the image tower of a checkpoint on a labelled set. A flag left out takes the "
        "recipe's value (recipe.py): the paper's for imagenet, small ones elsewhere. The same line again "
        "resumes a stopped run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n")[1],
    )
    count, natural, number = console.positive_int, console.natural, console.positive_float
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run folder, its checkpoint.pt or a published weight file")
    add("--data", help="the labelled set (default: scenes; with --evaluate that of the run)")
    add("--root", help="folder that holds the sets (default: data; with --evaluate that of the run)")
    add("--image-size", type=count, help="side of the images, pixels (default: the checkpoint's)")
    add("--evaluate", action="store_true", help="only test a fine-tuned checkpoint")
    for name, (kind, words) in VALUES.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=words)
    add("--lr", type=number, help="peak rate of the head (default: the recipe's, in proportion to the batch)")
    add("--max-steps", type=count, help="end, and the cosine with it, after so many steps")
    add("--clip-grad", type=number, help="largest norm of the gradient (default: no limit)")
    add("--seed", type=natural, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: finetune-DATA beside the checkpoint)")
    add("--save-every", type=count, metavar="STEPS", help="checkpoints within an epoch as well")
    add("--micro-batch", type=count, help="rows that go through the tower at once; less memory")
    add("--workers", type=natural, help="processes that decode (default: 0 for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where the device computes in it")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    if not args.evaluate:
        args.data, args.root = args.data or "scenes", args.root or "data"

    def command():
        try:
            work = test_only(args) if args.evaluate else set_up(args)
        except (ValueError, OSError) as error:
            console.fail(parser, error)
        work()
        ranks.stop()

    return console.guarded(command)


if __name__ == "__main__":
    ranks.leave(main())
