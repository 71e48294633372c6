"""Figures: a run drawn from its checkpoint and its data, and the tables of tables.py as bars or curves.

    pip install matplotlib
    python figures.py runs/scenes-slip                     # all four, to runs/scenes-slip/figures
    python figures.py runs/a runs/b --only curves --out curves.png      # one run laid over the other
    python figures.py --table main                         # to runs/tables/main.png

views        an image, and what the image tower sees of it in five epochs
curves       the loss at each step; losses and accuracies after each epoch, beside chance
similarity   captions against images, both held out from training: does each find its own?
predictions  test images, and the classes that the prompts find likeliest

Left to others: accuracies (zeroshot.py), tables (tables.py).
"""

import argparse
import io
import math
import os
import re
import statistics
import sys
import textwrap

import numpy as np
import torch
from einops import repeat
from PIL import Image

import augment
import console
import data
import ranks
import sets
import slip
import tables
import zeroshot

# Okabe and Ito's colours, which every kind of eye tells apart; and nothing is said by colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX<*hp>", ("-", "--", "-.", ":")
STYLE = {"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 11, "text.parse_math": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
VIEWS = {"images": "for the caption", "images2": "for the caption", "view1": "strong 1", "view2": "strong 2"}
LOSSES = {"loss": "loss at each step", "clip_loss": "clip_loss, nats", "ssl_loss": "ssl_loss"}


class Run:
    """A run folder or a checkpoint: its model, flags and log. Raises ValueError or FileNotFoundError."""

    def __init__(self, path, root=None):
        file = slip.find_checkpoint(path)
        self.folder = os.path.dirname(os.path.abspath(file))
        self.name = os.path.basename(self.folder)
        self.record = slip.read_checkpoint(file).get("run") or {}
        self.args = self.record.get("args", {})
        if not {"data", "method", "seed"} <= self.args.keys():
            raise ValueError(f"{file} does not say how it was trained: expected a checkpoint of train.py")
        self.language, self.partner = slip.METHODS[self.args["method"]]
        self.root, self.seed = root or self.args["root"], self.args["seed"]
        self.device = ranks.start()
        self.model = slip.load(file).to(self.device)

    def open(self, split, name=None):
        try:
            return sets.open_source(name or self.args["data"], self.root, split)
        except (ValueError, FileNotFoundError) as error:
            raise console.Stop(str(error)) from None

    def part(self, held):
        """The images it was trained on (0) or those held out from these (1)."""
        whole = self.open("train")
        return data.subset(whole, data.holdout(len(whole), self.seed)[held])

    def order(self, count):
        """0 to count - 1, shuffled by the seed."""
        return data.permutation(count, self.seed, 0).tolist()

    def column(self, name):
        """-> [(step, value)] of a column of the log; of "loss" the points that the checkpoint keeps."""
        rows = [(row["step"], row[name]) for row in self.record.get("rows", []) if row.get(name, "") != ""]
        return self.record.get("points") or rows if name == "loss" else rows

    def chance(self, column):
        """The value of a column before anything is learned; None where it is not known."""
        if column == "clip_loss":
            return math.log(self.args["batch_size"])
        if column == "ssl_loss":
            return self.model.branch.chance(self.args["batch_size"])[0]
        if column.startswith("zeroshot_"):
            name = column.removeprefix("zeroshot_")
            return 100 / len(self.open("test", name).classes) if sets.found(name, self.root) else None
        return None


def training_views(run, source, keys):
    """n keys (epoch, index) -> what training makes of them: {view: normalised [n, 3, S, S]}, n captions.

    Hidden patches are grey. With --ssl-data the strong views are another set's, and left out.
    """
    args, config = run.args, run.model.config
    settings = {name: args[name] for name in ("light_crop", "strong_crop", "clip_views")}
    settings |= dict(image_size=config.image_size, patch=config.patch, seed=run.seed, language=run.language)
    settings["pair"] = data.PAIRS[run.partner] if run.partner and not args["ssl_data"] else None
    settings["clip_strong"] = augment.SIMCLR if args["clip_aug"] == "simclr" else None
    views = data.Views(source, None, templates=sets.caption_templates(source.name), **settings)
    batch = data.collate([views[key, key] for key in keys])
    rows = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    rows |= {name: rows[name].to(run.device) for name in rows if not name.endswith("_params")}
    shown = {name: value.cpu() for name, value in run.model.make_views(rows).items()}
    if "view1_mask" in shown:
        grid = dict(h=config.image_size // config.patch, p=config.patch, q=config.patch)
        mask = repeat(shown["view1_mask"], "n (h w) -> n 1 (h p) (w q)", **grid)
        shown["view1"] = shown["view1"].masked_fill(mask, 0)  # the mean of all colours
    return {name: shown[name] for name in VIEWS if name in shown}, batch.get("caption", [])


# The figures: each returns one of matplotlib's


def sheet(width, height, title):
    """An empty figure, in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor="white")
    figure.suptitle(textwrap.fill(title, int(11 * width)))
    return figure


def show(axis, image, **style):
    """An image or a normalised view [3, S, S], without ticks; the pixels of small ones stay squares."""
    if torch.is_tensor(image):
        image = augment.denormalise(image[None])[0].permute(1, 2, 0)
    image = np.asarray(image)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.imshow(image, interpolation="nearest" if len(image) < 96 else "antialiased", **style)


def views(run):
    seen = run.part(0)
    index = run.order(len(seen))[0]
    shown, captions = training_views(run, seen, [(epoch, index) for epoch in range(5)])
    title = "An image, and what the image tower sees of it in five epochs"
    figure = sheet(9.6, 1.5 * len(shown) + 1.2, title)
    axes = figure.subplots(len(shown), 6, squeeze=False)
    show(axes[0, 0], seen[index][0])
    axes[0, 0].set_title(os.path.basename(seen.name))
    captions = [textwrap.fill(textwrap.shorten(caption, 60), 18) for caption in dict.fromkeys(captions)]
    axes[0, 0].set_xlabel("\n".join(captions), in_layout=len(shown) == 1)  # else there is room below
    for axis in axes[1:, 0]:
        axis.axis("off")
    for row, (name, images) in zip(axes[:, 1:], shown.items()):
        row[0].set_ylabel(VIEWS[name])
        for axis, image in zip(row, images):
            show(axis, image)
    return figure


def curves(*runs):
    """The runs laid over each other: a panel for each column that one of them has."""
    measured = [column for run in runs for row in run.record.get("rows", []) for column in row]
    measured = [name for name in measured if name.startswith(("zeroshot_", "val_top1", "val_r1", "knn_"))]
    columns = [c for c in dict.fromkeys([*LOSSES, *measured]) if any(run.column(c) for run in runs)]
    if not columns:
        raise console.Stop(f"{runs[0].name} has no step in its log yet")
    figure, lines = sheet(3.2 * len(columns) + 0.4, 3.7, "Training"), {}
    for axis, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
        drawn = [run for run in runs if run.column(column)]
        for run in drawn:
            i, points = runs.index(run), run.column(column)
            style = dict(color=COLOURS[i % 7], linestyle=DASHES[i % 4])
            style |= dict(marker=MARKERS[i % 12], markersize=4) if len(points) < 40 else {}
            (lines[textwrap.fill(run.name, 28)],) = axis.plot(*zip(*points), **style)
        chances = {run.chance(column) for run in drawn} - {None}
        for value in chances:
            axis.axhline(value, color="#666666", linestyle=":", linewidth=1)
            style = dict(transform=axis.get_yaxis_transform(), va="bottom")
            axis.text(0.6, value, f"chance {value:.3g}", **style)
        top = 1.2 * max([value for run in drawn for _, value in run.column(column)] + list(chances))
        title = textwrap.fill(LOSSES.get(column, f"{column.replace('_', ' ')}, %"), 28)
        axis.set(title=title, xlabel="step", xlim=(0, None), ylim=(0, top or 1))
        axis.grid(alpha=0.25)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    return figure


def held_out(run):
    """At most eight held-out pairs of different captions or labels -> (captions, normalised [n, 3, S, S])."""
    held, first = run.part(1), {}
    for index in run.order(len(held)):
        first.setdefault(str(held.label(index)), index)
    if len(first) < 2 or not run.language:
        raise console.Stop(f"{run.name} has no language, or held out too few images of {held.name}")
    shown, captions = training_views(run, held, [(0, index) for index in list(first.values())[:8]])
    return captions, shown["images"]


@torch.no_grad()
def similarity(run):
    captions, images = held_out(run)
    text_embed = zeroshot.embed_texts(run.model, captions, run.device)  # [n, E]
    image_embed = zeroshot.unit(run.model.encode_image(images.to(run.device)))  # [n, E]
    matrix, n = (text_embed @ image_embed.T).cpu().numpy(), len(captions)  # a caption's cosines are a row
    texts, found = ((matrix.argmax(axis) == np.arange(n)).sum() for axis in (1, 0))
    title = f"Cosines of held-out pairs: {texts} captions find their image, {found} images their caption"
    figure = sheet(0.56 * n + 2, 0.56 * n + 1.1, f"{title} (framed: the pairs)")
    axis = figure.subplots()
    shade = axis.imshow(matrix, cmap="cividis").norm(matrix)
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if shade[row, column] < 0.6 else "black"
        axis.text(column, row, f"{value:.2f}", color=colour, ha="center", va="center", fontsize=9)
    for i in range(n):
        axis.bar(i, 0.92, 0.92, i - 0.46, fill=False, edgecolor=COLOURS[1], linewidth=2)
        show(axis, images[i], extent=(i - 0.46, i + 0.46, -0.6, -1.52))
    axis.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -1.55), aspect="auto")
    axis.set_yticks(range(n), [textwrap.fill(textwrap.shorten(text, 60), 22) for text in captions])
    return figure


@torch.no_grad()
def predictions(run):
    test = run.open("test", "scenes" if run.args["data"].startswith("scenes-") else None)
    if test.classes is None or not run.language:
        raise console.Stop(f"{run.name} has no language, or {test.name} no classes")
    chosen = data.subset(test, run.order(len(test))[:18])
    names = [name if isinstance(name, str) else name[0] for name in test.classes]
    weights = zeroshot.classifier(run.model, test.classes, sets.prompts(test.name), run.device)  # [K, E]
    embeds, labels, _ = zeroshot.embed_images(run.model, chosen, run.device)  # [n, E], [n]
    values, found = (run.model.logit_scale.exp() * embeds @ weights.T).softmax(1).max(1)  # [n]
    title = f"{len(chosen)} test images of {test.name}, drawn at random: prompts name "
    figure = sheet(9.6, 5.8, f"{title}{(found == labels).sum()} of them right")
    rows = zip(figure.subplots(3, 6).flat, values.tolist(), found.tolist(), labels.tolist())
    for i, (axis, value, k, truth) in enumerate(rows):
        show(axis, chosen[i][0])
        words = f"{names[k]} {value:.0%} " + ("✓" if k == truth else f"✗ it is {names[truth]}")
        axis.set_title(textwrap.fill(words, 20), fontsize=9, color=COLOURS[0 if k == truth else 1])
    return figure


def table(name, dataset):
    """The runs of a table: a panel for each test, mean and standard deviation over the seeds as bars;
    of `told` as curves of CLIP and SLIP over the share of the captions that name the kind.
    """
    panels = {}
    for row in tables.TABLES[name]:
        seeds = [tables.results(tables.plan(dataset, row, seed)[0]) for seed in range(20)]
        for test in tables.columns(name, dataset):
            values = [seed[test] for seed in seeds if test in seed]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                panels.setdefault(test, {})[row] = statistics.mean(values), spread
    if not panels:
        raise console.Stop(f"no results of it in runs/tables: type python tables.py {name} --data {dataset}")
    height = 3.6 if name == "told" else 0.36 * len(tables.TABLES[name]) + 1.5
    figure = sheet(2.4 * len(panels) + 2.4, height, f"{name}, {dataset}: mean and deviation over seeds, %")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=name != "told")[0]
    for axis, ((task, test), panel) in zip(axes, panels.items()):
        axis.set_title(textwrap.fill(f"{tables.WORDS[task]} {test}", 22))
        for i, method in enumerate(("CLIP", "SLIP") if name == "told" else ()):
            points = {int(re.search(r"(\d+)%", row)[1]): panel[row] for row in panel if method in row}
            style = dict(color=COLOURS[i], marker=MARKERS[i], linestyle=DASHES[i], capsize=3)
            axis.errorbar(list(points), *zip(*points.values()), label=method, **style)
            axis.legend(frameon=False)
            axis.set(xlabel="captions that name the kind, %", ylim=(0, None))
        for row, (mean, deviation) in panel.items() if name != "told" else ():
            axis.barh(row, mean, xerr=deviation, capsize=3, color=COLOURS[5 if "SLIP" in row else 4])
            axis.text(1, row, f"{mean:.1f}", va="center", fontsize=9)
    axes[0].yaxis.set_inverted(name != "told")
    return figure


FIGURES = dict(views=views, curves=curves, similarity=similarity, predictions=predictions)


def save(figure, path):
    """A PNG of 256 colours, 100 pixels to the inch: under 300 KB."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(256, kmeans=3).save(f"{path}.tmp", "png", optimize=True)
    os.replace(f"{path}.tmp", path)
    print(path, flush=True)


def arguments():
    parser = argparse.ArgumentParser(description="Draw what a run has learned, or a table.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="run folder or checkpoint; all in curves, else the first")
    add("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help="these (default: all)")
    add("--table", choices=tables.TABLES, help="a table of tables.py instead of runs")
    add("--data", default="scenes", help="with --table: the set (default: %(default)s)")
    add("--out", metavar="PATH", help="a folder or, of one figure, a .png (default: RUN/figures)")
    add("--root", help="folder that holds the sets (default: the run's)")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        import matplotlib
    except ImportError:
        console.fail(parser, "matplotlib is not installed: pip install matplotlib")
    names = [args.table] if args.table else args.only or list(FIGURES)
    try:
        if bool(args.table) == bool(args.runs):
            raise ValueError("expected a run folder (runs/NAME) or --table NAME, one of them")
        runs = [Run(path, args.root) for path in args.runs]
        out = args.out or ("runs/tables" if args.table else os.path.join(runs[0].folder, "figures"))
        if out.endswith(".png") and len(names) > 1:
            raise ValueError(f"--out {out} is one image: choose the figure by --only")
    except (ValueError, OSError) as error:
        console.fail(parser, error)
    matplotlib.rcParams.update(STYLE)
    for name in names:
        try:
            if args.table:
                figure = table(name, args.data)
            else:
                figure = FIGURES[name](*(runs if name == "curves" else runs[:1]))
            save(figure, out if out.endswith(".png") else os.path.join(out, f"{name}.png"))
        except console.Stop as why:
            if args.only or args.table:
                console.fail(parser, f"no {name}: {why}")
            print(f"no {name}: {why}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
