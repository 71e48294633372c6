"""Fine-tuning: the whole image tower and a linear head learn a labelled set, end to end.

    python finetune.py --checkpoint runs/scenes-slip/checkpoint.pt --data scenes    # small set, a minute
    python finetune.py --checkpoint slip_base_25ep.pt --data imagenet               # the paper's recipe
    python finetune.py --checkpoint runs/scenes-slip/finetune-scenes/best.pt --evaluate

Paper: section 4.3 and appendix. The recipe is BEiT's: layer decay, drop path, mixup, cutmix, RandAugment,
random erasing. The class token's feature goes into the head. best.pt is chosen on a held-out part of the
training set. Crops are bilinear, and a picture is mixed with one of its own rank's share.
Not here: the loop, resume and chunks (loop.py), the recipe's values and the layers' groups (recipe.py).
"""

import argparse
import math
import os
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms import v2

import augment
import data
import loop
import measure
import ranks
import recipe
import sets
import slip
from vit import SIZES, ViT, count_parameters

COLUMNS = "epoch step loss train_top1 grad_norm lr images_per_s held_top1 top1".split()
FREE = {"out", "root", "workers", "device", "micro_batch", "save_every", "recompute", "evaluate"}
FLAGS = {  # the recipe's values, each a flag: type and help
    "epochs": (int, "passes over the pictures"),
    "warmup_epochs": (float, "epochs of linear warm-up"),
    "batch_size": (int, "pictures in a step, over all ranks"),
    "wd": (float, "weight decay of matrices"),
    "layer_decay": (float, "a layer's learning rate over that of the layer above it"),
    "drop_path": (float, "probability of leaving out the last block's branches; it falls to 0 at the first"),
    "mixup": (float, "alpha of mixup, 0: none"),
    "cutmix": (float, "alpha of cutmix, 0: none; a batch gets one of the two"),
    "smoothing": (float, "label smoothing"),
    "randaugment": (float, "magnitude of RandAugment, of 10, 0: none"),
    "erasing": (float, "probability of erasing a box"),
    "crop": (float, "smallest share of the picture in a crop"),
    "test_resize": (float, "short side of a test picture over the side of its centre crop"),
    "workers": (int, "processes that decode"),
}


class Classifier(nn.Module):
    """The image tower of a Config and a linear head: normalised images [B, 3, H, W] -> logits [B, K]."""

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
        features = slip.in_chunks(
            lambda chunk: {"features": self.visual(chunk["images"])},
            {"images": images},
            micro_batch,
            recompute,
            random=True,
        )["features"]  # [B, D]
        return self.head(features)


def resized(positions, side):
    """Position embeddings [1, 1 + n * n, D] -> [1, 1 + side * side, D], bicubic; the class token's stays."""
    grid = positions[:, 1:]
    grid = rearrange(grid, "one (h w) d -> one d h w", h=math.isqrt(grid.shape[1]))
    grid = rearrange(F.interpolate(grid, (side, side), mode="bicubic"), "one d h w -> one (h w) d")
    return torch.cat([positions[:, :1], grid], dim=1)


def from_pretrained(model, classes, image_size=None, drop_path=0.0):
    """A Classifier that starts with the image tower of a SLIP model; another size of picture is welcome."""
    config = replace(model.config, image_size=image_size or model.config.image_size)
    classifier, weights = Classifier(config, classes, drop_path), model.visual.state_dict()
    if config.image_size != model.config.image_size:
        weights["positions"] = resized(weights["positions"], config.image_size // config.patch)
    classifier.visual.load_state_dict(weights)
    return classifier


def load(path):
    """The Classifier in a checkpoint of a fine-tuning run, in evaluation mode; raises as slip.read does."""
    state = slip.read(path)
    if not {"head.weight", "visual.positions"} <= state.get("weights", {}).keys():
        raise ValueError(f"{path} is not fine-tuned: leave out --evaluate to fine-tune it")
    classifier = Classifier(slip.parse_config(state, path), state["run"]["args"]["classes"])
    classifier.load_state_dict(state["weights"])
    return classifier.eval()


class RandAugment(v2.RandAugment):
    """RandAugment as BEiT has it: two operations, each done one time in two, deviation 0.5 of the magnitude.

    A magnitude counts tenths of an operation's full strength, so 9 is nearly all; torchvision's default
    counts thirtieths. Here it is rounded to hundredths.
    """

    def __init__(self, magnitude):
        super().__init__(num_magnitude_bins=101)
        self.mean = magnitude

    def forward(self, image):
        self.num_ops = int((torch.rand(2) < 0.5).sum())
        drawn = self.mean + 0.5 * torch.randn(()).item()
        self.magnitude = round(10 * min(10.0, max(0.0, drawn)))
        return super().forward(image)


def strong_view(magnitude, erasing):
    """-> what is done to a crop, uint8 [3, S, S], or None. An erased box holds noise about the mean, which
    bytes cannot: then the result is normalised float.
    """
    steps = [RandAugment(magnitude)] if magnitude else []
    if erasing:
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augment.MEAN, augment.STD),
            v2.RandomErasing(erasing, value="random"),
        ]
    return v2.Compose(steps) if steps else None


def mixer(mixup, cutmix, classes):
    """-> mix(images [B, 3, H, W], labels [B]) -> (images, targets [B, K] that sum to 1)."""
    kinds = [
        kind(alpha=alpha, num_classes=classes)
        for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        if alpha
    ]
    return v2.RandomChoice(kinds) if kinds else lambda x, y: (x, F.one_hot(y, classes).float())


def step_loss(model, args, device):
    """-> loss_of(batch of the host): mixed, through the tower in chunks, logits gathered across ranks."""
    mix = mixer(args.mixup, args.cutmix, len(args.classes))

    def loss_of(batch):
        # The loop seeded by the step: each rank draws its own. A picture is mixed with one of its rank's.
        torch.manual_seed(torch.initial_seed() + (ranks.rank() << 40))
        batch = data.device_views({n: v.to(device, non_blocking=True) for n, v in batch.items()})
        images, targets = mix(batch["images"], batch["labels"])  # [b, 3, S, S], [b, K]
        with ranks.autocast(device, args.precision):
            logits = model(images, args.micro_batch, args.recompute)  # [b, K]
        logits, targets = ranks.gather(logits.float()), ranks.gather(targets)  # [B, K]
        hits = (logits.argmax(1) == targets.argmax(1)).float().mean()
        return F.cross_entropy(logits, targets, label_smoothing=args.smoothing), {"train_top1": 100 * hits}

    return loss_of


def evaluate(model, source, device, test_resize=1.0, workers=0):
    """{"top1", "top5", "per_class"} of a Classifier on a source, per cent; leaves its mode as it was."""
    training, size = model.training, model.config.image_size
    model.eval()
    resize = round(size * test_resize)
    scores, labels = measure.over(source, size, device, model, resize=resize, workers=workers)
    model.train(training)
    return measure.metrics(scores, labels)


def arguments():
    parser = argparse.ArgumentParser(
        description="Fine-tune the image tower of a checkpoint on a labelled set. A flag left out takes the "
        "recipe's value (recipe.py): the paper's for imagenet, small ones elsewhere. The same line again "
        "goes on with a stopped run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n")[1],
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run's checkpoint.pt or a published weight file")
    add("--data", help="the labelled set (default: scenes; with --evaluate that of the run)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--image-size", type=int, help="side of the pictures, pixels (default: the checkpoint's)")
    add("--evaluate", action="store_true", help="only test a fine-tuned checkpoint")
    for name, (kind, told) in FLAGS.items():
        add(f"--{name.replace('_', '-')}", type=kind, help=told)
    add("--lr", type=float, help="peak rate of the head (default: the recipe's, in proportion to the batch)")
    add("--max-steps", type=int, help="end, and the cosine with it, after so many steps")
    add("--clip-grad", type=float, help="largest norm of the gradient (default: no limit)")
    add("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    add("--out", help="run folder (default: finetune-DATA in the checkpoint's)")
    add("--save-every", type=int, metavar="STEPS", help="checkpoints within an epoch as well")
    add("--micro-batch", type=int, help="rows that go through the tower at once; less memory")
    add("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 autocast on CUDA, fp32 on the CPU")
    return parser


def check(args, pictures):
    """Values that no set or model could make right."""
    names = "epochs max_steps batch_size micro_batch save_every lr layer_decay image_size crop clip_grad"
    for name in names.split():
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise ValueError(f"found --{name.replace('_', '-')} {getattr(args, name)}, expected more than 0")
    for name in "drop_path smoothing erasing crop".split():
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"found --{name.replace('_', '-')} {getattr(args, name)}, expected 0 to 1")
    for name in "workers seed wd mixup cutmix warmup_epochs randaugment".split():
        if getattr(args, name) < 0:
            raise ValueError(f"found --{name.replace('_', '-')} {getattr(args, name)}, expected 0 or more")
    if args.test_resize < 1:
        raise ValueError(
            f"found --test-resize {args.test_resize}, expected 1 or more: a centre crop must fit"
        )
    if not ranks.world() <= args.batch_size <= pictures:
        raise ValueError(
            f"found --batch-size {args.batch_size}, expected {ranks.world()} (the ranks) "
            f"to {pictures} (the pictures)"
        )


def set_up(args):
    """Resolve every flag, open everything; raises ValueError or OSError with one sentence."""
    device = ranks.start(args.device)
    pretrained = slip.load(args.checkpoint)
    args.data = args.data or "scenes"
    values = recipe.finetune(pretrained.config.model, args.data)
    for name in FLAGS:
        setattr(args, name, values[name] if getattr(args, name) is None else getattr(args, name))
    args.lr = values["lr"] * args.batch_size / values["batch_size"] if args.lr is None else args.lr
    train, test = sets.labelled(args.data, args.root)
    kept, held = data.holdout(len(train), args.seed)
    train, held = data.part(train, kept), data.part(train, held)
    check(args, len(train))
    args.out = args.out or os.path.join(os.path.dirname(args.checkpoint), f"finetune-{args.data}")
    args.classes, args.epoch_steps = train.classes, len(train) // args.batch_size
    args.steps = args.max_steps or args.epochs * args.epoch_steps
    torch.manual_seed(args.seed)
    model = from_pretrained(pretrained, args.classes, args.image_size, args.drop_path)
    args.image_size = model.config.image_size
    state = loop.resume(args.out, vars(args), FREE)
    if state:
        slip.fill(model, state["weights"], args.out)
    transform = strong_view(args.randaugment, args.erasing)
    views = data.LabelledViews(train, args.image_size, args.seed, args.crop, transform)
    return device, model.to(device).train(), state, views, held, test


def announce(args, model, device, state, batch):
    classes = len(args.classes)
    ranks.say(f"fine-tuning {args.checkpoint}: {model.config.model}, {count_parameters(model):,} parameters")
    ranks.say(
        f"{args.data}: {args.epoch_steps} steps an epoch, {classes} classes (chance {100 / classes:.1f}%); "
        f"{device}, {ranks.precision(device, args.precision)}"
    )
    rates = f"lr {args.lr:g}, wd {args.wd:g}, layer decay {args.layer_decay:g}"
    ranks.say(f"{batch}; {args.steps} steps, {rates}")
    if state:
        ranks.say(f"going on from step {state['run']['step']} of {args.out}")


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    if args.evaluate:
        return test_only(parser, args)
    try:
        device, model, state, views, held, test = set_up(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    announce(args, model, device, state, loop.plan_chunks(args, model, device, views=1))
    groups = recipe.layer_groups(model, len(model.visual.blocks), args.wd, args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    wrapped = ranks.wrap(model)
    warmup = min(args.warmup_epochs * args.epoch_steps, args.steps / 5)

    def batches(steps):
        sampler = data.Batches(len(views), None, args.batch_size, args.seed, steps, ranks.mine)
        return data.loader(views, sampler, args.workers, pin=device.type == "cuda")

    def after_epoch():
        parts = {"held_top1": held, "top1": test}
        if not len(held):  # of fewer than 20 pictures nothing is held out, and no best.pt chosen
            del parts["held_top1"]
        found = {
            name: evaluate(model, source, device, args.test_resize, args.workers)["top1"]
            for name, source in parts.items()
        }
        return found, found.get("held_top1")

    def work():
        rows = loop.fit(
            wrapped, optimizer, batches, step_loss(wrapped, args, device),
            out=args.out, args=vars(args), state=state, steps=args.steps, epoch_steps=args.epoch_steps,
            batch_size=args.batch_size, columns=COLUMNS, after_epoch=after_epoch,
            after_step=lambda step: None, rate=lambda step: recipe.learning_rate(
                step, args.steps, warmup, args.lr, end=recipe.FINETUNE_END_LR),
            save_every=args.save_every, clip=args.clip_grad, bad_share=data.BAD_SHARE,
        )  # fmt: skip
        report(args, rows, test)

    code = loop.guarded(work)
    if code == 0:
        ranks.stop()
    return code


def report(args, rows, test):
    """Last and best on the test split, printed and in results.csv beside the source checkpoint."""
    told = [("last", rows[-1])]
    if rows[-1]["held_top1"] != "":
        told.append(("best on the held-out part", max(rows, key=lambda row: row["held_top1"])))  # as best.pt
    for word, row in told:
        ranks.say(f"{args.data}: fine-tuned top-1 {row['top1']:.2f}%, {word}, after epoch {row['epoch']}")
        how = f"{word}, epoch {row['epoch']}, {row['step']} steps, lr {args.lr:g}, batch {args.batch_size}"
        measure.record(args.checkpoint, "finetune", test, how, "top1", row["top1"])
    ranks.say(f"saved {os.path.join(args.out, loop.CHECKPOINT)}")


def test_only(parser, args):
    """--evaluate: a fine-tuned checkpoint on the test split."""
    try:
        if args.workers and args.workers < 0:
            raise ValueError(f"found --workers {args.workers}, expected 0 or more")
        device = ranks.start(args.device)
        model = load(args.checkpoint).to(device)
        then = slip.read(args.checkpoint)["run"]["args"]
        _, test = sets.labelled(args.data or then["data"], args.root)
        if test.classes != model.classes:
            raise ValueError(f"{args.checkpoint} names other classes than {test.name}")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def work():
        result = evaluate(model, test, device, then["test_resize"], args.workers or 0)
        ranks.say(
            f"{test.name}: fine-tuned top-1 {result['top1']:.2f}%, mean per class {result['per_class']:.2f}%"
        )
        measure.record(args.checkpoint, "finetune", test, "evaluated", "top1", result["top1"])

    code = loop.guarded(work)
    if code == 0:
        ranks.stop()
    return code


if __name__ == "__main__":
    ranks.leave(main())
