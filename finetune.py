"""Fine-tuning: image tower and linear head learn a labelled set, end to end.

    python finetune.py --checkpoint runs/scenes-slip --data scenes
    python finetune.py --checkpoint slip_base_25ep.pt --data imagenet

Paper: end-to-end fine-tuning. The recipe is BEiT's: layer decay, drop path, mixup, cutmix, RandAugment,
random erasing. The class token's feature [B, D] goes into the head. best.pt is chosen on a held-out part of
the training set. An image is mixed with one of its own rank's. Left to others: values and layers' rates
(recipe.py), the run's folder (run.py).
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import augment
import console
import data
import device as devices
import ranks
import recipe
import run as runs
import sets
import slip
from evaluate import METRICS, apply_to_set, metrics, record
from vit import SIZES, ViT

COLUMNS = ["epoch", "step", "loss", "train_top1", "grad_norm", "images_per_s", "held_top1", *METRICS]
HIDDEN = {"grad_norm", "top5", "top1_top5", "auc"}  # in log.csv, not in the table on the screen
# Flags that may change on resume: the same run, though perhaps not to the last bit.
FREE = {"out", "root", "workers", "device", "micro_batch", "recompute"}


class Classifier(nn.Module):
    """The image tower of a Config and a linear head: normalised images [B, 3, S, S] -> logits [B, K]."""

    def __init__(self, config, classes, drop_path=0.0):
        super().__init__()
        self.config, self.tokenizer, self.classes = config, None, classes
        size = SIZES[config.model] | {"patch": config.patch}
        self.visual = ViT(image_size=config.image_size, drop_path=drop_path, **size)
        self.head = nn.Linear(self.visual.width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # BEiT's 0.02, times its 0.001: starts at chance
        nn.init.zeros_(self.head.bias)

    def forward(self, images, micro_batch=None, recompute=False):
        """In chunks. Drop path is drawn for each chunk: with it, and only then, their size matters."""

        def tower(chunk):
            return {"image": self.visual(chunk["images"])}  # [b, D]

        features = slip.in_chunks(tower, {"images": images}, micro_batch, recompute, random=True)
        return self.head(features["image"])


class RandAugment(v2.RandAugment):
    """BEiT's: two operations, each done one time in two, at a magnitude, of 10, with a deviation of 0.5."""

    def __init__(self, magnitude):
        super().__init__(num_magnitude_bins=101)  # tenths, so that the deviation shows
        self.mean = magnitude

    def forward(self, image):
        self.num_ops = int((torch.rand(2) < 0.5).sum())
        drawn = self.mean + 0.5 * torch.randn(()).item()
        self.magnitude = round(10 * min(10.0, max(0.0, drawn)))
        return super().forward(image)


def strong_view(magnitude, erasing):
    """-> what is done to a crop, uint8 [3, S, S]. After erasing the result is normalised float: an erased box
    holds noise about the mean, which bytes cannot."""
    steps = [RandAugment(magnitude)] if magnitude else []
    if erasing:
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(augment.MEAN, augment.STD)]
        steps += [v2.RandomErasing(erasing, value="random")]
    return v2.Compose(steps) if steps else None


def mix(images, labels, classes, mixup, cutmix):
    """Images [B, 3, S, S], labels [B] -> mixed images, targets [B, K] that sum to 1."""
    kinds = [kind(alpha=a, num_classes=classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
    if not kinds:
        return images, F.one_hot(labels, classes).float()
    return kinds[int(torch.randint(len(kinds), ()))](images, labels)


def objective(model, batch, settings, device):
    """Soft cross entropy on a mixed batch -> (loss, {name: scalar for the log})."""
    torch.manual_seed(torch.initial_seed() + (ranks.rank() << 40))  # the step's seed is that of all ranks
    images = augment.normalise(batch["images"]) if batch["images"].dtype == torch.uint8 else batch["images"]
    classes = len(settings.classes)
    images, targets = mix(images, batch["labels"], classes, settings.mixup, settings.cutmix)
    with devices.autocast(device, settings.precision):
        logits = model(images, settings.micro_batch, settings.recompute)  # [b, K]
    logits, targets = ranks.gather(logits.float()), ranks.gather(targets)  # [B, K]
    loss = F.cross_entropy(logits, targets, label_smoothing=settings.smoothing)
    hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
    return loss, {"loss": loss, "train_top1": 100 * hits}


def measure(model, source, device, test_resize=1.0, workers=0):
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
        sampler = data.Batches(len(views.source), None, settings.batch_size, settings.seed, steps)
        return data.loader(views, sampler, settings.workers, pin=device.type == "cuda")

    def end_epoch():
        run.save(model, optimizer)  # before an evaluation, which may be long
        options = (device, settings.test_resize, settings.workers)
        measured, score = measure(model, test, *options), None
        if len(held):  # of fewer than 20 images nothing is held out, and no best.pt is chosen
            score = measured["held_top1"] = measure(model, held, *options)["top1"]
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
    run.finish(model, optimizer)


def resolve(args, path, config, images):
    """-> {flag: value}: what was typed, else the recipe's. Raises ValueError."""
    own = recipe.finetune(config.model, args.data)
    values = own | {name: value for name, value in vars(args).items() if value is not None or name not in own}
    values |= runs.length(args, values, images, most=0.2)
    values |= dict(checkpoint=path, image_size=config.image_size)
    values["lr"] = args.lr or own["lr"] * values["batch_size"] / own["batch_size"]
    values["workers"] = recipe.workers(images) if args.workers is None else args.workers
    values["out"] = args.out or str(Path(path).with_name(f"finetune-{Path(args.data).stem}"))
    return values


def set_up(args):
    """Open what is asked for -> a function that does the work. Raises ValueError or OSError."""
    device, path = ranks.start(args.device), slip.find_checkpoint(args.checkpoint)
    pretrained = slip.load(path, args.image_size)
    whole, test = sets.labelled(args.data, args.root)
    source, held = data.holdout(whole, args.seed)
    values = resolve(args, path, pretrained.config, len(source)) | {"classes": whole.classes}
    torch.manual_seed(args.seed)
    model = Classifier(pretrained.config, whole.classes, values["drop_path"])
    model.visual.load_state_dict(pretrained.visual.state_dict())
    rows = values["batch_size"] // ranks.world()
    plan = devices.plan_chunks(model, rows, device, args.micro_batch, 1, args.precision)
    values["micro_batch"], values["recompute"], chunks = plan
    settings = dataclasses.make_dataclass("Settings", values, frozen=True)(**values)
    run = runs.open_run(settings, FREE, COLUMNS)
    if run.state:
        slip.load_weights(model, run.state["weights"], settings.out)
    transform = strong_view(settings.randaugment, settings.erasing)
    views = data.LabelledViews(source, settings.image_size, settings.seed, settings.crop, transform)

    def work():
        chance = 100 / len(whole.classes)
        ranks.say(f"{settings.data}: {len(whole.classes)} classes (chance {chance:.1f}%), {chunks}")
        ranks.say("{steps} steps of {batch_size}, {warmup_steps:.0f} of warm-up; lr {lr:g}".format(**values))
        if run.state:
            ranks.say(f"resumed at step {run.step} of {run.out}")
        train(model.to(device), run, settings, device, views, held, test)
        report(settings, run)
        ranks.stop()

    return work


def report(settings, run):
    """Last and best on the test split, printed and in results.json beside the source checkpoint."""
    last, how = run.rows[-1], dict(steps=settings.steps, lr=settings.lr)
    ranks.say(f"{settings.data}: fine-tuned top-1 {last['top1']:.2f}%, last step")
    if last["held_top1"] != "":
        best = max(run.rows, key=lambda row: row["held_top1"])  # the first of equals, as best.pt
        ranks.say(f"{settings.data}: fine-tuned top-1 {best['top1']:.2f}%, best.pt, step {best['step']}")
        how |= {"best_top1": best["top1"], "best_step": best["step"]}
    found = {name: last[name] for name in METRICS if last[name] != ""}
    record(settings.checkpoint, "finetune", settings.data, found | how)


def arguments():
    words = __doc__.split("\n\n")
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=words[0], epilog=words[1], formatter_class=kind)
    count, natural, number = console.positive_int, console.natural, console.positive_float
    not_negative, share, add = console.not_negative, console.share, parser.add_argument
    add("--checkpoint", required=True, help="a run folder, its checkpoint.pt or a published weight file")
    add("--data", default="scenes", help="the labelled set (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--image-size", type=count, help="side of the images, pixels (default: the checkpoint's)")
    add("--epochs", type=count, help="passes over the images; this and what follows: default the recipe's")
    add("--warmup-epochs", type=not_negative, help="epochs of linear warm-up")
    add("--batch-size", type=count, help="images in a step, over all ranks")
    add("--wd", type=not_negative, help="weight decay of matrices")
    add("--drop-path", type=share, help="probability of skipping the last block's branches")
    add("--mixup", type=not_negative, help="alpha of mixup, 0: none")
    add("--cutmix", type=not_negative, help="alpha of cutmix, 0: none; a batch gets one of the two")
    add("--randaugment", type=not_negative, help="magnitude of RandAugment, of 10, 0: none")
    add("--erasing", type=share, help="probability of erasing a box")
    add("--crop", type=share, help="smallest share of the image in a crop")
    add("--lr", type=number, help="peak rate of the head (default: the recipe's, in proportion to the batch)")
    add("--max-steps", type=count, help="end, and the cosine with it, after so many steps")
    add("--clip-grad", type=number, help="largest norm of the gradient (default: no limit)")
    add("--seed", type=natural, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: finetune-DATA beside the checkpoint)")
    add("--micro-batch", type=count, help="rows that go through the tower at once; less memory")
    add("--workers", type=natural, help="processes that decode (default: 0 for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where the device computes in it")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        work = set_up(args)
    except (ValueError, OSError) as error:
        console.fail(parser, error)
    return console.guarded(work)


if __name__ == "__main__":
    ranks.leave(console.guarded(main))
