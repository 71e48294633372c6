"""The flags of train.py: what they are called, which go together, and their values.

Paper: implementation details. A flag that is not typed takes its value from the recipe (recipe.py).
"""

import argparse
import os
from pathlib import Path

import console
import data
import ranks
import recipe
import run as runs
import sets
import slip
from text import Tokenizer
from vit import SIZES

# Flags that may change on resume: the same run, though perhaps not to the last bit.
FREE = set("out root workers device micro_batch save_every recompute compile".split())
DATA = """scenes (built in); a set of python zeroshot.py --list; coco, cc3m, cc12m, yfcc15m; a table of path
and caption; shards 'DIR/{00000..00331}.tar'; a folder with train/<class>/, or with x.jpg and x.txt"""
TESTS = "test sets to measure after each epoch, by commas, or none (default: the set itself, or imagenet)"


def arguments(examples):
    parser = argparse.ArgumentParser(
        description="Train SLIP, CLIP, or self-supervision alone. A flag left out takes the\n"
        "recipe's value for the method and the data (recipe.py): for imagenet the\n"
        "paper's. The same line again resumes a stopped run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=examples,
    )
    count, natural, share = console.positive_int, console.natural, console.share
    number, not_negative = console.positive_float, console.not_negative
    add = parser.add_argument_group("what is trained").add_argument
    words = dict(metavar="METHOD", help="%(choices)s (default: %(default)s)")
    add("--method", default="slip", choices=slip.METHODS, **words)
    add("--model", choices=SIZES, help="image tower (default: the recipe's)")
    add("--image-size", type=count, help="side of the views, pixels")
    add("--patch", type=count, help="side of a patch, pixels (default: the model's)")
    add("--vocab", help="train: merges learned on the captions; clip: CLIP's; or CLIP's file")
    add("--init", metavar="FILE", help="start from the weights of a checkpoint, ours or published")
    add("--ssl-scale", type=not_negative, help="weight of the self-supervised loss (the paper: 1)")
    add("--ssl-temp", type=number, help="temperature of its softmax (SimCLR: 0.1, MoCo v3: 0.2)")
    add = parser.add_argument_group("on what").add_argument
    add("--data", default="scenes", help=DATA)
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--captions", type=natural, metavar="N", help="captions for N images only (0: for all)")
    same = "images of one class name are not negatives (small recipe: yes; paper: no)"
    add("--mask-same-class", action=argparse.BooleanOptionalAction, help=same)
    add("--clip-aug", choices=["light", "simclr"], default="light", help="the language loss's view")
    add("--clip-views", type=int, choices=[1, 2], default=1, help="views in the language loss (default: 1)")
    add("--ssl-data", metavar="NAME", help="draw the self-supervised images from this set (SLIP-decoupled)")
    add("--light-crop", type=share, help="smallest share of the image in a light crop (the paper: 0.5)")
    add("--strong-crop", type=share, help="the same in a strong view (the paper: 0.08)")
    add = parser.add_argument_group("how").add_argument
    small = f"other defaults (default: small for fewer than {recipe.SMALL_SET:,} images and known small sets)"
    add("--recipe", choices=["paper", "small"], help=small)
    add("--epochs", type=count, help="passes over the images")
    add("--max-steps", type=count, help="end, and the cosine with it, after so many steps")
    add("--batch-size", type=count, help="images in a step, over all ranks")
    add("--micro-batch", type=count, help="rows that go through the towers at once, with the same gradient")
    add("--lr", type=number, help="peak learning rate")
    add("--wd", type=not_negative, help="weight decay of matrices")
    add("--warmup-epochs", type=not_negative, help="epochs of linear warm-up (the paper: 1)")
    add("--clip-grad", type=number, help="largest norm of the gradient (default, and the paper: no limit)")
    add("--overfit", action="store_true", help="one batch again and again: does anything learn?")
    add("--seed", type=natural, default=0, help="of everything random (default: %(default)s)")
    add = parser.add_argument_group("where").add_argument
    add("--out", help="run folder: checkpoint.pt, best.pt, log.csv (default: runs/DATA-METHOD)")
    add("--zeroshot", metavar="NAMES", help=TESTS)
    add("--save-every", type=count, metavar="STEPS", help="checkpoints within an epoch as well")
    add("--workers", type=natural, help="processes that decode (small sets: 0)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where the device computes in it")
    add("--compile", action="store_true", help="torch.compile the blocks: slower to start")
    return parser


def check(args):
    """Flags that do not go together; a student's mistakes, each with what to type."""
    language, partner = slip.METHODS[args.method]
    if (args.ssl_scale is not None or args.ssl_data) and not (language and partner):
        raise ValueError(f"--ssl-scale, --ssl-data are for two losses: type --method slip, not {args.method}")
    if args.ssl_temp and partner not in ("simclr", "mocov3"):
        raise ValueError(f"--ssl-temp is SimCLR's and MoCo v3's: {args.method} has no such temperature")
    if (args.clip_views > 1 or args.clip_aug != "light") and not language:
        raise ValueError(f"--clip-views and --clip-aug are the language loss's: {args.method} has none")


def resolve(args, whole, kept, config):
    """-> {flag: value}: what was typed, else the weights' own sizes (--init), else the recipe's; and what
    follows from them: steps, warmup_steps, partner, class_names. `kept`: `whole` without what is held out."""
    values = recipe.recipe(args.method, args.data, len(whole), args.recipe)
    if config:
        values |= recipe.FROM_WEIGHTS
        values |= {name: getattr(config, name) for name in ("model", "image_size", "patch")}
    values |= {name: value for name, value in vars(args).items() if value is not None or name not in values}
    values |= runs.length(args, values, len(kept))
    if values["batch_size"] < 2:
        raise ValueError("found --batch-size 1: a contrastive loss compares, type 2 or more")
    language, partner = slip.METHODS[args.method]
    values["partner"] = partner
    values["out"] = args.out or os.path.join("runs", f"{Path(args.data).stem}-{args.method}")
    values["class_names"] = whole.classes if language else None
    values["mask_same_class"] = bool(values["mask_same_class"] and values["class_names"])
    if args.mask_same_class and not values["mask_same_class"]:
        raise ValueError("--mask-same-class is for class names as captions, and this run has none")
    return values


def tokenizer(vocab, source, optional):
    """The Tokenizer of --vocab. `optional`: nobody typed it, so where CLIP's is not installed one is learned
    on the captions of `source`, or on its class names in templates."""
    if vocab != "train":
        try:
            return Tokenizer.clip(None if vocab == "clip" else vocab)
        except FileNotFoundError as error:
            if not optional:
                raise
            ranks.warn(f"{error}; unlike the paper's, this run's vocabulary is learned on the captions")
    if source.classes is not None:
        names = [name for entry in source.classes for name in data.as_list(entry)]
        templates = sets.caption_templates(source.name)
        return Tokenizer.train([t.replace("{}", name) for t in templates for name in 2 * names])
    indices = range(0, len(source), -(-len(source) // 1_000_000))  # at most a million, spread over the set
    return Tokenizer.train([caption for i in indices for caption in data.as_list(source.label(i))])
