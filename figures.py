"""Figures: a run drawn from its checkpoint and data, or a table of tables.py. It needs matplotlib.

python figures.py runs/a runs/b --only curves --out curves.png      # one run laid over the other
"""

import argparse
import os
import re
import textwrap

import numpy as np
import torch

import augment
import console
import data
import sets
import slip
import tables

try:
    from matplotlib.figure import Figure
except ImportError:
    Figure = None  # main says so

NO_TICKS = dict(subplot_kw=dict(xticks=[], yticks=[]))
PANELS = ("loss", "clip_loss", "ssl_loss", "val_top1", "val_r1", "knn_top1", "zeroshot_")  # of the curves


class Run:
    """A run folder or a checkpoint: its model, flags, log and images."""

    def __init__(self, path):
        file = slip.find_checkpoint(path)
        self.folder = os.path.dirname(os.path.abspath(file))
        self.model, self.record = slip.load(file), slip.read_checkpoint(file).get("run") or {}
        self.args = self.record.get("args", {})
        if "method" not in self.args:
            raise ValueError(f"{file} does not say how it was trained: expected a checkpoint of train.py")

    def images(self, held):
        """The images it was trained on (held=0), or those held out from these (held=1)."""
        whole = sets.open_source(self.args["data"], self.args["root"], "train")
        return data.holdout(whole, self.args["seed"])[held]

    def column(self, name):
        """-> [(step, value)] of a column of the log, one for each epoch; of the loss about 200."""
        rows = [(row["step"], row[name]) for row in self.record["rows"] if row.get(name, "") != ""]
        return self.record.get("points") or rows if name == "loss" else rows


def sheet(title, rows, columns, width, height, **settings):
    """-> (figure of so many inches, its axes [rows, columns])."""
    figure = Figure((width, height), layout="constrained")
    figure.suptitle(title, wrap=True)
    return figure, figure.subplots(rows, columns, squeeze=False, **settings)


def views(run, *_):
    """The first image, and what the image tower sees of it in five epochs."""
    source, args, config = run.images(0), run.args, run.model.config
    settings = {name: args[name] for name in ("seed", "light_crop", "strong_crop", "clip_views")}
    settings |= dict(image_size=config.image_size, patch=config.patch, language=run.model.text is not None)
    settings["pair"] = data.PAIRS.get(slip.METHODS[args["method"]][1])
    settings["clip_strong"] = augment.SIMCLR if args["clip_aug"] == "simclr" else None
    samples = data.Views(source, None, templates=sets.caption_templates(source.name), **settings)
    batch = data.collate([samples[(epoch, 0), (epoch, 0)] for epoch in range(5)])
    seen = run.model.make_views({name: rows for name, rows in batch.items() if torch.is_tensor(rows)})
    seen = {name: seen[name] for name in ("images", "images2", "view1", "view2") if name in seen}
    title = f"An image, and its views in five epochs: {batch.get('caption', [''])[0]}"
    figure, axes = sheet(title, len(seen), 6, 9.6, 1.6 * len(seen) + 0.8, **NO_TICKS)
    for row, (name, view) in zip(axes, seen.items()):
        row[0].set_ylabel(name)
        for axis, image in zip(row, [source[0][0], *augment.denormalise(view).movedim(1, 3).numpy()]):
            axis.imshow(image)
    return figure


def curves(*runs):
    """Losses, and what was measured after each epoch, in per cent; the runs laid over each other."""
    names = dict.fromkeys(["loss", *(name for run in runs for row in run.record["rows"] for name in row)])
    names = [name for name in names if name.startswith(PANELS) and any(run.column(name) for run in runs)]
    figure, axes = sheet("Training", 1, len(names), 3.2 * len(names) + 0.4, 3.7)
    for axis, name in zip(axes[0], names):
        for i, run in enumerate(runs):
            steps, values = np.reshape(run.column(name), (-1, 2)).T
            axis.plot(steps, values, f"C{i}.-", label=textwrap.fill(os.path.basename(run.folder), 28))
        test, root = name.removeprefix("zeroshot_"), runs[0].args["root"]
        if name != test and sets.found(test, root):
            chance = 100 / len(sets.open_source(test, root, "test").classes)
            axis.axhline(chance, color="gray", linestyle=":")
            where = dict(xycoords=("axes fraction", "data"), ha="right", va="top")
            axis.annotate(f"chance {chance:.3g}", (1, chance), **where)
        axis.set(title=name, xlabel="step", xlim=(0, None), ylim=(0, 1.2 * axis.dataLim.ymax or 1))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def similarity(run, *_):
    """Captions against images, both held out from training: does each find its own?"""
    held = run.images(1)
    different = {str(held.label(index)): index for index in range(len(held))}
    images, targets = zip(*(held[index] for index in list(different.values())[:8]))
    entries = targets if held.classes is None else [held.classes[target] for target in targets]
    captions = [data.as_list(entry)[0] for entry in entries]
    text_embed, image_embed = run.model.encode_text(captions), run.model.encode_image(list(images))  # [n, E]
    cosines = torch.cosine_similarity(text_embed[:, None], image_embed, dim=2)  # [n, n]
    n, right = len(captions), (cosines.argmax(1) == torch.arange(len(captions))).sum()
    title = f"Cosines of held-out pairs: {right} of {n} captions find their image"
    figure, axes = sheet(title, 1, 1, 0.56 * n + 2, 0.56 * n + 1.1)
    axes[0, 0].imshow(cosines.numpy(), cmap="Blues", alpha=0.6)
    for (row, column), value in np.ndenumerate(cosines):
        axes[0, 0].text(column, row, f"{value:.2f}", ha="center", va="center")
    for i, image in enumerate(images):
        axes[0, 0].imshow(image, extent=(i - 0.46, i + 0.46, -0.6, -1.52))
    axes[0, 0].set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -1.55), xticks=[], aspect="auto")
    axes[0, 0].set_yticks(range(n), [textwrap.fill(textwrap.shorten(c, 60), 22) for c in captions])
    return figure


def table(name, dataset, more="", root="data"):
    """The runs of a table, mean and deviation over the seeds, a panel for each test: bars; or curves, where
    rows differ by a number, as "SLIP, 30% named" does."""
    panels = {}
    for row in tables.TABLES[name]:
        seeds = [tables.results(tables.plan(dataset, row, seed, more)[0]) for seed in range(20)]
        for task, test in tables.columns(name, dataset, root):
            values = [seed[task, test] for seed in seeds if (task, test) in seed]
            if values:
                bar = np.mean(values), np.std(values, ddof=min(1, len(values) - 1))
                panels.setdefault(f"{tables.WORDS[task]} {test}", {})[row] = bar
    if not panels:
        raise ValueError(f"no results in runs/tables: type python tables.py {name} --data {dataset}")
    title = f"{name}, {dataset}: mean and deviation over seeds, %"
    figure, axes = sheet(title, 1, len(panels), 2.4 * len(panels) + 2.4, 4, sharey=True)
    for axis, (heading, panel) in zip(axes[0], panels.items()):
        axis.set_title(textwrap.fill(heading, 22))
        lines = {}  # name: [(number, mean, deviation)]
        for row, (mean, deviation) in panel.items():
            if point := re.fullmatch(r"(.+), (\d+)(% | x )(.+)", row):
                lines.setdefault(point[1], []).append((int(point[2]), mean, deviation))
                axis.set(xlabel=f"{point[3]}{point[4]}".strip(), ylim=(0, 100))
            else:
                axis.barh(row, mean, xerr=deviation, capsize=3, color="C0" if "SLIP" in row else "C1")
                axis.text(1, row, f"{mean:.1f}", va="center")
        for name, points in sorted(lines.items(), reverse=True):  # SLIP first and blue, as its bars
            axis.errorbar(*zip(*points), marker="o", capsize=3, label=name)
        axis.yaxis.set_inverted(not lines)
    if lines:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


FIGURES = dict(views=views, curves=curves, similarity=similarity)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw what a run has learned, or a table.")
    add = parser.add_argument
    add("runs", nargs="*", default=["runs/scenes-slip"], help="run folders (default: runs/scenes-slip)")
    add("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help="these (default: all)")
    add("--table", choices=tables.TABLES, metavar="TABLE", help="of tables.py, not runs: %(choices)s")
    add("--data", default="scenes", help="with --table: the set (default: %(default)s)")
    add("--with", dest="more", default="", metavar="FLAGS", help="with --table: as in tables.py")
    add("--root", default="data", help="with --table: the folder of the sets (default: %(default)s)")
    add("--out", metavar="FILE", help="the .png of one figure (default: FIGURE.png in RUN/figures)")
    args = parser.parse_args(argv)
    if args.out and not args.table and len(args.only or FIGURES) > 1:
        console.fail(parser, "--out is the file of one figure: type --only with one name")
    if Figure is None:
        console.fail(parser, "figures are drawn with matplotlib: type pip install matplotlib")
    try:
        runs = [] if args.table else [Run(path) for path in args.runs]
        folder = os.path.join(runs[0].folder, "figures") if runs else "runs/tables"
        names = [args.table] if args.table else args.only
        if not names:  # similarity wants held-out captions
            names = list(FIGURES) if runs[0].model.text and len(runs[0].images(1)) else ["views", "curves"]
        for name in names:
            figure = table(name, args.data, args.more, args.root) if args.table else FIGURES[name](*runs)
            os.makedirs(folder, exist_ok=True)
            path = args.out or os.path.join(folder, f"{name}.png")
            figure.savefig(path)
            print(path, flush=True)
    except (ValueError, OSError) as error:
        console.fail(parser, error)


if __name__ == "__main__":
    raise SystemExit(console.guarded(main))
