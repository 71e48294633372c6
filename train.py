"""Pre-training: one vision transformer, the sum of two losses. Paper: Algorithm 1, which is `objective`.

python train.py                                      # the built-in scenes, minutes on a laptop
python train.py --method clip --data fashionmnist     # another method, another set
python train.py --data imagenet --epochs 25           # the paper's hyper-parameters; class names as captions
torchrun --nproc_per_node=8 train.py --data yfcc15m   # the paper's data, on eight GPUs

Not here: the loop (loop.py), the views (data.py, augment.py), the recipe's values (recipe.py).
"""

import argparse
import dataclasses
import math
import os
from pathlib import Path

import torch

import data
import loop
import ranks
import recipe
import sets
import slip
import zeroshot
from losses import info_nce
from selfsup import VisualTokenizer
from text import Tokenizer
from vit import SIZES, ViT, count_parameters

COLUMNS = "epoch step loss clip_loss ssl_loss clip_acc ssl_acc logit_scale grad_norm lr images_per_s".split()
COLUMNS += ["zeroshot_top1"]
# Flags that say where and how fast, not what: they may change when a run goes on.
FREE = {"out", "root", "workers", "device", "micro_batch", "save_every", "recompute", "compile"}


def objective(model, features, ssl_scale):
    """Algorithm 1 on the features of the global batch, [B, D] each (BEiT's: [B]) -> (loss, what to log).
    CLIP, SimCLR: a term is missing.
    """
    loss, stats = 0.0, {}
    if model.text is not None:
        image_embed = features["image_features"] @ model.image_projection  # [B, E]: f_i W_i
        text_embed = features["text_features"] @ model.text_projection  # [B, E]: f_t W_t
        scale = model.logit_scale.exp()  # the learned temperature is its inverse
        clip_loss, clip_acc = info_nce(image_embed, text_embed, scale)
        if "image_features2" in features:  # --clip-views 2
            second, _ = info_nce(features["image_features2"] @ model.image_projection, text_embed, scale)
            clip_loss = (clip_loss + second) / 2
        loss = clip_loss
        stats |= dict(clip_loss=clip_loss, clip_acc=100 * clip_acc, logit_scale=scale)
    if model.branch is not None:
        ssl_loss, ssl_acc = model.branch(features)  # h(f_1), h(f_2), NT-Xent
        stats |= dict(ssl_loss=ssl_loss, ssl_acc=100 * ssl_acc)
        loss = ssl_loss if model.text is None else clip_loss + ssl_scale * ssl_loss
    return loss, {name: value.detach() for name, value in stats.items()}


def step_loss(model, args, device):
    """-> loss_of(batch of the host): to the device, through the towers in chunks, gathered across ranks,
    the objective.
    """
    inner, told = loop.unwrapped(model), False

    def loss_of(batch):
        nonlocal told
        rows = len(next(iter(batch.values())))
        if "caption" in batch:
            if not told and len(set(batch["caption"])) < rows / 2:
                told = True
                ranks.warn(
                    "most captions of a batch are equal, so right pairs are punished: vary the captions"
                )
            batch["tokens"] = inner.tokenizer(batch.pop("caption"), inner.config.context)  # [b, L]
        batch = {n: v if n.endswith("_params") else v.to(device, non_blocking=True) for n, v in batch.items()}
        micro_batch, recompute = args.micro_batch or rows, args.recompute
        with ranks.autocast(device, args.precision):
            features = model(batch, data.device_views, micro_batch, recompute)
            features = {name: ranks.gather(value) for name, value in features.items()}  # [B, D] each
            return objective(inner, features, args.ssl_scale)

    return loss_of


def finish_step(model, progress):
    """After the optimizer: the logit scale stays within 1 to 100, and what has no gradient moves."""
    if model.text is not None:
        model.logit_scale.data.clamp_(0, 4.6052)  # its logarithm; published so, log 100 is 4.60517
    if model.branch is not None:
        model.branch.after_step(model.visual, progress)


def arguments():
    parser = argparse.ArgumentParser(
        description="Train SLIP, CLIP, or self-supervision alone. A flag left out takes the recipe's value "
        "for the method and the data (recipe.py): for imagenet the paper's. The same line again goes on with "
        "a stopped run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n")[1],
    )
    flags_of_the_model(parser.add_argument_group("what is trained"))
    flags_of_the_pictures(parser.add_argument_group("on what"))
    flags_of_the_run(parser.add_argument_group("how"))
    where = parser.add_argument_group("where")
    where.add_argument(
        "--out", help="run folder: checkpoint.pt, best.pt, log.csv (default: runs/DATA-METHOD)"
    )
    where.add_argument("--save-every", type=int, metavar="STEPS", help="checkpoints within an epoch as well")
    where.add_argument("--workers", type=int, help="processes that decode (small sets: 0)")
    where.add_argument("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    where.add_argument(
        "--precision", choices=["fp32", "bf16"], help="default: bf16 autocast on CUDA, fp32 on the CPU"
    )
    where.add_argument(
        "--compile", action="store_true", help="torch.compile the image towers: slower to start"
    )
    return parser


def flags_of_the_model(what):
    what.add_argument(
        "--method", default="slip", choices=slip.METHODS, help="the objective (default: %(default)s)"
    )
    what.add_argument("--model", help=f"image tower: {', '.join(SIZES)} (default: the recipe's)")
    what.add_argument("--image-size", type=int, help="side of the views, pixels")
    what.add_argument("--patch", type=int, help="side of a patch, pixels (default: the model's)")
    what.add_argument("--vocab", help="train: merges learned on the captions; clip: CLIP's; or CLIP's file")
    what.add_argument("--ssl-scale", type=float, help="weight of the self-supervised loss (the paper: 1)")
    what.add_argument("--ssl-temp", type=float, help="temperature of its softmax (SimCLR: 0.1, MoCo v3: 0.2)")
    what.add_argument(
        "--freeze-patches",
        action="store_true",
        help="the patch embedding stays as drawn, as MoCo v3 can have it",
    )
    what.add_argument(
        "--visual-tokenizer",
        metavar="FILE",
        help="BEiT's visual tokens from a TorchScript encoder of pictures in [0, 1] -> logits [b, K, h, w] "
        "(default: k-means over patches). The file is a program: take it only from whom you trust",
    )


def flags_of_the_pictures(pictures):
    pictures.add_argument(
        "--data",
        default="scenes",
        help="scenes (built in), imagenet or another set of python zeroshot.py --list, coco, cc3m, cc12m, "
        "redcaps, yfcc15m, flickr8k, flickr30k, sbu, a table FILE.tsv, .csv or .jsonl of path and caption, "
        "shards as '{00000..00331}.tar', or a folder under --root with train/<class name>/, or with x.jpg "
        "and x.txt (default: %(default)s)",
    )
    pictures.add_argument("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    pictures.add_argument(
        "--captions",
        type=int,
        metavar="N",
        help="captions for N pictures only (0: for all); self-supervision sees all",
    )
    pictures.add_argument(
        "--clip-aug",
        choices=["light", "simclr"],
        default="light",
        help="the language loss's view: the light crop, or SimCLR's strong view",
    )
    pictures.add_argument(
        "--clip-views", type=int, choices=[1, 2], default=1, help="views in the language loss (default: 1)"
    )
    pictures.add_argument(
        "--ssl-data", metavar="NAME", help="draw the self-supervised pictures from this set (SLIP-decoupled)"
    )
    pictures.add_argument(
        "--light-crop", type=float, help="smallest share of the picture in a light crop (the paper: 0.5)"
    )
    pictures.add_argument("--strong-crop", type=float, help="the same in a strong view (the paper: 0.08)")


def flags_of_the_run(how):
    how.add_argument("--epochs", type=int, help="passes over the pictures")
    how.add_argument("--max-steps", type=int, help="end, and the cosine with it, after so many steps")
    how.add_argument("--batch-size", type=int, help="pictures in a step, over all ranks")
    how.add_argument(
        "--micro-batch", type=int, help="rows that go through the towers at once; same gradient, less memory"
    )
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--wd", type=float, help="weight decay of matrices")
    how.add_argument("--warmup-epochs", type=float, help="epochs of linear warm-up (the paper: 1)")
    how.add_argument(
        "--clip-grad", type=float, help="largest norm of the gradient (default, and the paper: no limit)"
    )
    how.add_argument("--overfit", action="store_true", help="one batch again and again: does anything learn?")
    how.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")


def check(args):
    """Values that no set or model could make right."""
    for name in (
        "epochs",
        "max_steps",
        "micro_batch",
        "save_every",
        "lr",
        "image_size",
        "patch",
        "clip_grad",
        "ssl_temp",
    ):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"found --{name.replace('_', '-')} {value}, expected more than 0")
    if args.batch_size < 2:
        raise ValueError(f"found --batch-size {args.batch_size}: a contrastive loss compares, type 2 or more")
    language, partner = slip.METHODS[args.method]
    if args.visual_tokenizer and partner != "beit":
        raise ValueError(f"--visual-tokenizer is BEiT's: type --method slip-beit, not {args.method}")
    if args.ssl_temp and partner not in ("simclr", "mocov3"):
        raise ValueError(f"--ssl-temp is SimCLR's and MoCo v3's: {args.method} has no such temperature")
    if args.ssl_data and not (language and partner):
        raise ValueError(f"--ssl-data is for two losses: type --method slip, not {args.method}")
    if (args.clip_views > 1 or args.clip_aug != "light") and not language:
        raise ValueError(f"--clip-views and --clip-aug are the language loss's: {args.method} has none")
    if min(args.workers, args.seed, args.wd, args.ssl_scale, args.captions or 0) < 0:
        raise ValueError("--workers, --seed, --wd, --ssl-scale and --captions cannot be negative")
    for name in ("light_crop", "strong_crop"):
        if not 0 < getattr(args, name) <= 1:
            raise ValueError(
                f"found --{name.replace('_', '-')} {getattr(args, name)}, expected a share between 0 and 1"
            )


def make_tokenizer(vocab, source, optional):
    """-> (vocab, the tokenizer of it), merges learned on the captions of `source` if "train" says so.

    `optional`: nobody asked for CLIP's vocabulary, so where it is not installed one is learned.
    """
    if vocab != "train":
        try:
            return vocab, Tokenizer.clip(None if vocab == "clip" else vocab)
        except FileNotFoundError as error:
            if not optional:
                raise
            ranks.warn(f"{error}; learning a vocabulary on the captions instead")
    return "train", learn_vocabulary(source)


def learn_vocabulary(source):
    """A tokenizer whose merges are learned on the captions of a source, or its class names in templates."""
    if source.classes is None:
        step = -(-len(source) // 1_000_000)  # of a larger set at most a million, spread over it
        targets = [source.label(i) for i in range(0, len(source), step)]
        return Tokenizer.train([c for t in targets for c in ([t] if isinstance(t, str) else t)])
    names = [n for entry in source.classes for n in ([entry] if isinstance(entry, str) else entry)]
    templates = data.tasks.captions(source.name)
    return Tokenizer.train(
        [template.format(name) for template in templates for name in names for _ in range(2)]
    )


def set_up(args):
    """Resolve every flag, open everything; raises ValueError or OSError with one sentence, before anything
    is written.
    """
    typed_vocab, (language, partner) = args.vocab, slip.METHODS[args.method]
    if args.ssl_scale is not None and not (language and partner):
        raise ValueError(f"--ssl-scale weighs two losses: type --method slip, not {args.method}")
    for name, value in recipe.recipe(args.method, args.data).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check(args)
    args.out = args.out or os.path.join("runs", f"{Path(args.data).stem}-{args.method}")
    device = ranks.start(args.device)
    captioned, other, held = open_pictures(args, language)
    model, encoder = make_model(args, captioned, optional=typed_vocab is None)
    state = loop.resume(args.out, vars(args), FREE)
    if state:
        slip.fill(model, state["weights"], args.out)
    views = data.Views(
        captioned, other, image_size=args.image_size, seed=args.seed, light_crop=args.light_crop,
        strong_crop=args.strong_crop, language=language, pair=data.PAIRS[partner] if partner else None,
        patch=args.patch, clip_strong=data.augment.SIMCLR if args.clip_aug == "simclr" else None,
        clip_views=args.clip_views,
    )  # fmt: skip
    if model.branch is not None:
        model.branch.begin(lambda: some_views(views), encoder)
    return device, model.to(device), state, views, held


def open_pictures(args, language):
    """-> (captioned pictures, others for self-supervision or None, those held out), and the length of the
    run.
    """
    whole = sets.open_source(args.data, args.root, "train")
    kept, held = data.holdout(len(whole), args.seed)
    source, held = data.part(whole, kept), data.part(whole, held)
    captioned, other = source, None
    if args.captions and language:
        if args.captions > len(source):
            raise ValueError(
                f"found --captions {args.captions}, {args.data} has {len(source)} pictures to train on"
            )
        captioned = data.part(source, data.permutation(len(source), args.seed, 0)[: args.captions])
        other = source
    if args.ssl_data:
        other = sets.open_source(args.ssl_data, args.root, "train")
        other = data.part(other, data.holdout(len(other), args.seed)[0])  # the same set has the same held out
    smallest = min(len(captioned), len(source if other is None else other))
    if args.batch_size > smallest:
        raise ValueError(
            f"found --batch-size {args.batch_size}, there are {smallest} pictures: type {smallest} or less"
        )
    if ranks.world() > args.batch_size:
        raise ValueError(f"{ranks.world()} ranks cannot share a batch of {args.batch_size}")
    args.captioned_by = "captions" if captioned.classes is None else "class names"
    args.epoch_steps = len(source) // args.batch_size
    args.steps = args.max_steps or args.epochs * args.epoch_steps
    return captioned, other, held


def make_model(args, captioned, optional):
    """-> (a new model with its tokenizer, BEiT's visual tokenizer or None). `optional`: the vocabulary."""
    tokenizer = encoder = None
    if slip.METHODS[args.method][0]:
        args.vocab, tokenizer = make_tokenizer(args.vocab, captioned, optional)
    config = slip.configure(
        args.method, args.model, image_size=args.image_size, patch=args.patch, ssl_temp=args.ssl_temp,
        vocab_size=tokenizer.vocab_size if tokenizer else None,
    )  # fmt: skip
    if args.visual_tokenizer:
        encoder = VisualTokenizer(args.visual_tokenizer, config.image_size, config.patch)
        config = dataclasses.replace(config, ssl_out=encoder.size)
    args.image_size, args.patch, args.ssl_temp = config.image_size, config.patch, config.ssl_temp
    torch.manual_seed(args.seed)
    model = slip.build(config)
    model.tokenizer = tokenizer
    model.visual.patch_embed.requires_grad_(not args.freeze_patches)
    return model, encoder


def some_views(views, most=1000):
    """Normalised strong crops of at most so many pictures [n, 3, S, S], their colours as they are."""
    source = views.captioned if views.other is None else views.other
    keys = [(0, i) for i in range(0, len(source), -(-len(source) // most))]
    keys = [(key if views.other is None else (0, 0), key) for key in keys]
    return data.augment.normalise(torch.stack([views[key]["view1"] for key in keys]))


def announce(args, model, device, views, state, test, batch):
    """What was resolved, and what chance looks like."""
    b = args.batch_size
    ranks.say(
        f"{args.method} {args.model}: {count_parameters(model):,} parameters, "
        f"{args.image_size} px, patch {args.patch}"
    )
    seen = f"{args.data}: {len(views.captioned):,} pictures"
    if args.ssl_data:
        seen += f", self-supervision on {len(views.other):,} of {args.ssl_data}"
    elif views.other is not None:
        seen = f"{args.data}: {len(views.other):,} pictures, captions for {len(views.captioned):,} of them"
    ranks.say(f"{seen}; {args.epoch_steps} steps an epoch")
    ranks.say(
        f"{batch}; {args.steps} steps, lr {args.lr:g}, wd {args.wd:g}; "
        f"{device}, {ranks.precision(device, args.precision)}"
    )
    chance = []
    if model.text is not None:
        chance.append(f"clip_loss {math.log(b):.2f} = log {b}, clip_acc {100 / b:.2f}%")
    if model.branch is not None:
        ssl_loss, ssl_acc, formula = model.branch.chance(b)
        chance.append(f"ssl_loss {ssl_loss:.2f} = {formula}, ssl_acc {100 * ssl_acc:.2f}%")
    if model.text is not None and test is not None:
        chance.append(f"zeroshot_top1 {100 / len(test.classes):.1f}% of {len(test.classes)} classes")
    ranks.say(f"chance: {'; '.join(chance)}")
    if state:
        ranks.say(f"going on from step {state['run']['step']} of {args.out}")
    if b < 32 and any(isinstance(module, torch.nn.BatchNorm1d) for module in model.modules()):
        ranks.warn(f"BatchNorm's statistics over a batch of {b} are rough: type --batch-size 32 or more")


class Evaluation:
    """After each epoch: zero-shot on the test split for the log; on the held-out part of the training set
    for best.pt, or InfoNCE there where it has captions and no classes.
    """

    def __init__(self, args, model, device, held):
        self.args, self.model, self.device, self.held, self.test = args, model, device, held, None
        if held.classes is None and args.data not in sets.SCENES:  # captions have no classes to choose from
            if model.text is not None:
                ranks.say(
                    f"{args.data} has captions: best.pt is chosen by the loss on {len(held):,} pictures held "
                    "out, and there is no zero-shot column"
                )
            return
        try:
            self.test = sets.open_source(args.data, args.root, "test")
        except (ValueError, FileNotFoundError) as error:
            ranks.warn(f"no zero-shot column in the log: {error}")

    def __call__(self):
        if self.model.text is None:
            return {}, None
        columns, score = {}, None
        if self.test is not None:
            columns["zeroshot_top1"] = zeroshot.evaluate(self.model, self.test, self.device)["top1"]
        if len(self.held) and self.held.classes is not None:
            score = zeroshot.evaluate(self.model, self.held, self.device)["top1"]
        elif len(self.held) > 1:
            score = -self.held_loss()
        return columns, score

    @torch.no_grad()
    def held_loss(self):
        """InfoNCE of the held-out pictures and captions, in batches of at most 256."""
        training, losses = self.model.training, []
        self.model.eval()
        views = data.Views(self.held, None, image_size=self.args.image_size, seed=0, light_crop=1.0,
                           strong_crop=1.0, language=True, pair=None)  # fmt: skip
        for start in range(0, len(self.held) - 1, 256):
            keys = [((0, i), (0, i)) for i in range(start, min(start + 256, len(self.held)))]
            batch = data.collate([views[key] for key in keys])
            image_embed = self.model.encode_image(data.augment.normalise(batch["images"].to(self.device)))
            text_embed = self.model.encode_text(self.model.tokenizer(batch["caption"]).to(self.device))
            losses.append(info_nce(image_embed, text_embed, self.model.logit_scale.exp())[0].item())
        self.model.train(training)
        return sum(losses) / len(losses)


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        device, model, state, views, held = set_up(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    batch = loop.plan_chunks(args, model, device, views=args.clip_views + 2)
    evaluation = Evaluation(args, model, device, held)
    announce(args, model, device, views, state, evaluation.test, batch)
    if args.compile:  # block by block: BEiT does not call the tower as a whole; a text's length changes
        for block in (b for tower in model.modules() if isinstance(tower, ViT) for b in tower.blocks):
            block.compile()
    optimizer = torch.optim.AdamW(
        recipe.parameter_groups(model, args.wd), lr=args.lr, betas=recipe.BETAS, eps=recipe.EPS, fused=True
    )
    wrapped = ranks.wrap(model.train())
    warmup = min(args.warmup_epochs * args.epoch_steps, args.steps / 10)

    def batches(steps):
        steps = [0] * len(steps) if args.overfit else steps
        other = len(views.other) if views.other is not None else None
        sampler = data.Batches(len(views.captioned), other, args.batch_size, args.seed, steps, ranks.mine)
        return data.loader(views, sampler, args.workers, pin=device.type == "cuda")

    def work():
        rows = loop.fit(
            wrapped, optimizer, batches, step_loss(wrapped, args, device), out=args.out, args=vars(args),
            state=state, steps=args.steps, epoch_steps=args.epoch_steps, batch_size=args.batch_size,
            columns=COLUMNS, rate=lambda step: recipe.learning_rate(step, args.steps, warmup, args.lr),
            after_step=lambda step: finish_step(model, (step + 1) / args.steps), after_epoch=evaluation,
            save_every=args.save_every, clip=args.clip_grad, bad_share=data.BAD_SHARE,
        )  # fmt: skip
        report(args, model, device, evaluation.test, rows[-1]["zeroshot_top1"])

    code = loop.guarded(work)
    if code == 0:
        ranks.stop()
    return code


def report(args, model, device, test, known):
    """The end of a run: zero-shot on every task of the set, and where to go from here. `known`: the top-1 of
    `test` from the log, "" if it was not measured.
    """
    names = ["scenes", "scenes-colour", "scenes-heldout"] if args.data == "scenes" else [args.data]
    for name in names if model.text is not None and test is not None else []:
        source, top1 = test, known
        if name != args.data or known == "":
            source = sets.open_source(name, args.root, "test")
            top1 = zeroshot.evaluate(model, source, device)["top1"]
        ranks.say(
            f"{name}: zero-shot top-1 {top1:.1f}% of {len(source.classes)} classes "
            f"(chance {100 / len(source.classes):.1f}%)"
        )
    if model.text is not None and args.captioned_by == "class names":
        ranks.say(zeroshot.SEEN)
    path = os.path.join(args.out, loop.CHECKPOINT)
    name = args.data if test is not None else "SET"
    command = "zeroshot" if model.text is not None else "linear"
    ranks.say(f"saved {path}; try: python {command}.py --checkpoint {path} --data {name}")
    ranks.say(f"and, to look at it: python figures.py {args.out}")


if __name__ == "__main__":
    ranks.leave(main())
