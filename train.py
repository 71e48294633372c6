"""Pre-training: one vision transformer, the sum of two losses. Paper: Algorithm 1, which is `objective`.

python train.py                                      # built-in images, minutes
python train.py --data imagenet --epochs 25          # the paper's values
torchrun --nproc_per_node=8 train.py --data yfcc15m  # its data, on eight GPUs

Left to others: the towers (vit.py, text.py), their views in chunks (slip.py), the losses (losses.py), the
samples (data.py), the run's folder (run.py), the paper's values (recipe.py).
"""

import dataclasses
import math
import os
import shlex

import torch

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
import validation
import zeroshot
from losses import info_nce, nt_xent
from vit import ViT, count_parameters

COLUMNS = "epoch step loss clip_loss ssl_loss clip_acc ssl_acc logit_scale grad_norm lr images_per_s".split()
HIDDEN = {"logit_scale", "grad_norm", "lr", "val_loss"}  # in log.csv, not in the table on the screen
CLIP_ONLY, SSL_ONLY = {"clip_loss", "clip_acc", "logit_scale"}, {"ssl_loss", "ssl_acc"}


def objective(model, batch, settings, device):
    """Algorithm 1 on a batch -> (loss, {name: scalar for the log}). CLIP and SimCLR lack one of the terms."""
    net = ranks.unwrap(model)
    clip_loss = clip_acc = ssl_loss = ssl_acc = torch.zeros((), device=device)
    same = ranks.gather(batch["classes"]) if settings.mask_same_class else None
    with devices.autocast(device, settings.precision):
        features = model(batch, settings.micro_batch, settings.recompute)  # the towers, in chunks: [b, D]
        f = {name: ranks.gather(rows) for name, rows in features.items()}  # the global batch's: [B, D]
        if net.text is not None:
            image_embed = f["image"] @ net.image_projection  # f_i W_i: [B, E]
            text_embed = f["text"] @ net.text_projection  # f_t W_t: [B, E]
            clip_loss, clip_acc = info_nce(image_embed, text_embed, net.logit_scale.exp(), same)
        if "image2" in f:  # --clip-views 2; clip_acc stays the first's
            image_embed = f["image2"] @ net.image_projection
            clip_loss = (clip_loss + info_nce(image_embed, text_embed, net.logit_scale.exp(), same)[0]) / 2
        if settings.partner == "simclr":
            z1, z2 = net.branch.head(f["view1"]), net.branch.head(f["view2"])  # h(f_1), h(f_2): [B, E]
            ssl_loss, ssl_acc = nt_xent(z1, z2, net.branch.temperature)
        elif settings.partner:
            ssl_loss, ssl_acc = net.branch(f)
        loss = clip_loss + settings.ssl_scale * ssl_loss
    return loss, dict(
        loss=loss, clip_loss=clip_loss, ssl_loss=ssl_loss, clip_acc=100 * clip_acc, ssl_acc=100 * ssl_acc
    )


def train(model, run, settings, device, views, watch):
    """The loop, to the last step or to a signal."""
    wrapped = ranks.wrap(model.train())
    groups = recipe.parameter_groups(model, settings.wd)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=recipe.BETAS, eps=recipe.EPS, fused=True)
    if run.state:
        optimizer.load_state_dict(run.state["run"]["optimizer"])

    def loader_for(steps):
        steps = [0] * len(steps) if settings.overfit else steps
        other = None if views.other is None else len(views.other)
        sampler = data.Batches(len(views.captioned), other, settings.batch_size, settings.seed, steps)
        pin = device.type == "cuda"
        return data.loader(views, sampler, settings.workers, tokenizer=model.tokenizer, pin=pin)

    def end_epoch():
        run.save(model, optimizer)  # before an evaluation, which may be long
        run.end_epoch(*watch(), model, HIDDEN)
        run.save(model, optimizer)

    if run.epoch_ended:  # the run was stopped while it was evaluated
        end_epoch()
    for step, batch in run.batches(loader_for):
        lr = recipe.learning_rate(step, settings.steps, settings.warmup_steps, settings.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = {n: v if n.endswith("_params") else v.to(device, non_blocking=True) for n, v in batch.items()}
        loss, stats = objective(wrapped, batch, settings, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = settings.clip_grad or math.inf
        stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        stats = {name: value.item() for name, value in stats.items() if name in run.columns}
        run.check_finite(stats, lr)
        optimizer.step()
        if model.text is not None:
            model.logit_scale.data.clamp_(0, 4.6052)  # the logarithm of at most 100, as published
            stats["logit_scale"] = model.logit_scale.exp().item()
        if model.branch is not None:
            model.branch.after_step(model.visual, (step + 1) / settings.steps)
        run.record(stats, lr)
        if run.epoch_ended:
            end_epoch()
        elif settings.save_every and run.step % settings.save_every == 0:
            run.save(model, optimizer)
    run.finish(model, optimizer)


# Before the loop: open everything, then write. After it: report.


def set_up(args):
    """-> the arguments of `train`, in their order. Raises ValueError or OSError with one sentence."""
    flags.check(args)
    device = ranks.start(args.device)
    whole = sets.open_source(args.data, args.root, "train")
    weights = slip.load(args.init) if args.init else None
    kept, held = data.holdout(whole, args.seed)
    values = flags.resolve(args, whole, kept, weights and weights.config)
    captioned, other = choose_images(values, kept)
    tokenizer = weights.tokenizer if weights and not args.vocab else None
    model = make_model(values, captioned, tokenizer, optional=args.vocab is None)
    rows, crops = values["batch_size"] // ranks.world(), values["clip_views"] * (model.text is not None)
    crops += 2 * (model.branch is not None)
    plan = devices.plan_chunks(model, rows, device, args.micro_batch, crops, args.precision)
    values["micro_batch"], values["recompute"], chunks = plan
    settings = dataclasses.make_dataclass("Settings", values, frozen=True)(**values)
    watch = validation.Validation(settings, model, device, kept, held)
    absent = (CLIP_ONLY if model.text is None else set()) | (SSL_ONLY if model.branch is None else set())
    columns = [name for name in [*COLUMNS, *watch.columns] if name not in absent]
    run = runs.open_run(settings, flags.FREE, columns)
    if run.state:
        if run.state["tokenizer"] != (model.tokenizer and model.tokenizer.state()):
            raise ValueError(f"{run.out} holds a run with other merges: type --vocab and --data as before")
        slip.load_weights(model, run.state["weights"], settings.out)
    elif weights:
        taken, new = slip.initialise(model, weights)
        ranks.say(f"{taken} tensors from {args.init}; new are {', '.join(new[:4]) or 'none'}")
    copied = ("image_size", "patch", "seed", "light_crop", "strong_crop", "clip_views")
    views = data.Views(
        captioned,
        other,
        language=model.text is not None,
        pair=data.PAIRS.get(settings.partner),
        clip_strong=augment.SIMCLR if settings.clip_aug == "simclr" else None,
        templates=sets.caption_templates(captioned.name),
        **{name: values[name] for name in copied},
    )
    if model.branch is not None:
        model.branch.prepare(lambda: sample_views(views))
    announce(settings, model, device, views, run, chunks, watch)
    return model.to(device), run, settings, device, views, watch


def choose_images(values, source):
    """-> (captioned images, those of self-supervision or None if they are the same)."""
    captioned, other, seed = source, None, values["seed"]
    if values["captions"] and slip.METHODS[values["method"]][0]:
        if values["captions"] > len(source):
            raise ValueError(f"found --captions {values['captions']}, there are {len(source)} images")
        captioned = data.subset(source, data.permutation(len(source), seed, 0)[: values["captions"]])
        other = source if slip.METHODS[values["method"]][1] else None
    if values["ssl_data"]:
        other = sets.open_source(values["ssl_data"], values["root"], "train")
        other = data.holdout(other, seed)[0]  # the same set has the same held out
    smallest = min(len(captioned), len(other or captioned))
    if values["batch_size"] > smallest:
        raise ValueError(f"found --batch-size {values['batch_size']}, expected at most {smallest} (images)")
    return captioned, other


def make_model(values, captioned, tokenizer, optional):
    """A new model with its tokenizer; the sizes that it decides are noted in `values`."""
    if slip.METHODS[values["method"]][0]:
        tokenizer = tokenizer or flags.tokenizer(values["vocab"], captioned, optional)
    sizes = {name: values[name] for name in ("image_size", "patch", "ssl_temp")}
    vocab_size = tokenizer.vocab_size if tokenizer else None
    torch.manual_seed(values["seed"])
    model = slip.build(slip.configure(values["method"], values["model"], vocab_size=vocab_size, **sizes))
    model.tokenizer = tokenizer
    values |= {name: getattr(model.config, name) for name in sizes}
    return model


def sample_views(views, most=1000):
    """Normalised strong crops of at most so many images [n, 3, S, S], their colours as they are: BEiT's
    visual tokens are learned on them."""
    source = views.captioned if views.other is None else views.other
    keys = [(0, i) for i in range(0, len(source), -(-len(source) // most))]
    keys = [(key if views.other is None else (0, 0), key) for key in keys]
    return augment.normalise(torch.stack([views[key]["view1"] for key in keys]))


def announce(settings, model, device, views, run, chunks, watch):
    """What was resolved, and what chance looks like."""
    batch, chance = settings.batch_size, []
    ranks.say(
        f"{settings.method} {settings.model}: {count_parameters(model):,} parameters, "
        f"{settings.image_size} px, patch {settings.patch}"
    )
    images = f"{settings.data}: {len(views.captioned):,} images"
    if views.other is not None:
        images += f" with captions, {len(views.other):,} for self-supervision"
    ranks.say(f"{images}; {settings.epoch_steps} steps an epoch; {settings.recipe} recipe")
    several = f" on {ranks.world()} ranks" if ranks.world() > 1 else ""
    ranks.say(
        f"{settings.steps} steps of {batch}{several}, {chunks}; lr {settings.lr:g}, wd {settings.wd:g}; "
        f"{device}, {devices.precision(device, settings.precision)}"
    )
    if model.text is not None:
        chance.append(f"clip_loss {math.log(batch):.2f} = log {batch}")
        if settings.class_names and not settings.mask_same_class:
            floor = validation.class_floor(batch, len(settings.class_names))
            chance[0] += f" (at best {floor:.2f}: images of a batch share class names)"
    if model.branch is not None:
        ssl_loss, _, words = model.branch.chance(batch)
        chance.append(f"ssl_loss {ssl_loss:.2f} = {words}")
    for column, source in watch.tests.items():
        chance.append(f"{column} {100 / len(source.classes):.1f}%")
    ranks.say(f"chance: {'; '.join(chance)}")
    if run.state:
        ranks.say(f"resumed at step {run.step} of {run.out}")


def report(settings, run, watch):
    """The last figures of a run, its cost, and the commands to go on with."""
    numbers, row = run.summary(), run.rows[-1]
    for column, source in watch.tests.items():
        chance = f"(chance {100 / len(source.classes):.1f}%)"
        share = zeroshot.seen_share(vars(settings), source.classes)
        seen = f"{zeroshot.SEEN}, {share:.0%} of them" if share else ""
        top1 = f"top-1 {row[column]:.1f}% of {len(source.classes)} classes by their prompts"
        ranks.say(f"{source.name}: {top1} {chance}{seen}")
    if numbers["best_step"]:
        rough = " (a rough choice: fewer than 100 images)" if len(watch.held) < 100 else ""
        ranks.say(f"best.pt: step {numbers['best_step']}, chosen on held-out training images{rough}")
    cost = "{images_per_s:.0f} images/s over {hours:.2f} hours, {peak_memory_gib:.1f} GiB at the peak"
    ranks.say(cost.format(**numbers["cost"]))
    path = shlex.quote(os.path.join(settings.out, runs.CHECKPOINT))
    language, captioned = "clip_loss" in run.columns, not watch.held.classes
    name = "scenes" if captioned and not language else settings.data  # captions are no labels
    command = f"python {'zeroshot' if language else 'linear'}.py --checkpoint {path} --data "
    command += f"{shlex.quote(name)} --root {shlex.quote(settings.root)}"
    if language and captioned and not name.startswith("scenes"):
        command += " --retrieval" if len(watch.held) else " --retrieval --split train"
    ranks.say(f"saved {path}; try: {command}")
    ranks.say(f"and, to look at it: python figures.py {shlex.quote(settings.out)}")


def main(argv=None):
    parser = flags.arguments(__doc__.split("\n\n")[1])
    args = parser.parse_args(argv)
    try:
        model, run, settings, device, views, watch = set_up(args)
    except (ValueError, OSError) as error:
        console.fail(parser, error)
    if settings.compile:  # block by block: BEiT does not call the tower as a whole; a text's length changes
        for block in (b for tower in model.modules() if isinstance(tower, ViT) for b in tower.blocks):
            block.compile()

    def work():
        train(model, run, settings, device, views, watch)
        report(settings, run, watch)
        ranks.stop()

    return console.guarded(work)


if __name__ == "__main__":
    ranks.leave(console.guarded(main))
