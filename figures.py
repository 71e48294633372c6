"""What is better looked at: a run in pictures, drawn from its checkpoint, its log and its data.

    pip install matplotlib
    python figures.py runs/scenes-slip                                # all, to runs/scenes-slip/figures; 13 s
    python figures.py runs/scenes-slip runs/scenes-clip --only curves  # two runs, one laid over the other
    python figures.py runs/scenes-slip --image boat.png               # views and attention of your picture

views        a picture, and what the image tower sees of it in five epochs
curves       the losses and the zero-shot accuracy after each epoch, beside chance
similarity   captions against pictures, both held out from training: does each find its own?
predictions  test pictures, and the classes which the prompts find likeliest
attention    where the class token looks in the last block
map          features of test pictures, in the plane in which the classes differ most
tokens       how captions are cut

A figure is a PNG of at most 120 KB, decided by the run and its seed. Not here: accuracies (zeroshot.py).
"""

import argparse
import csv
import io
import math
import os
import sys
import textwrap
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

import augment
import data
import loop
import measure
import ranks
import retrieval
import sets
import slip
import tasks
import zeroshot

LIMIT = 120_000  # bytes of a file
RARE = "Two kittens asleep in the café"  # words that few sets of captions know
# Okabe and Ito's colours, which every kind of eye tells apart; and still nothing is said by colour alone.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "osD^vPX<*hp>", ("-", "--", "-.", ":")
STYLE = {"font.size": 10, "axes.titlesize": 10, "figure.titlesize": 11, "text.parse_math": False}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}


class Without(Exception):
    """Why a run has no such figure, in a sentence."""


class Run:
    """A run folder, the logs of others beside its own, and its sets, opened when a figure first asks.

    `image`: a picture file instead of the sets. Raises ValueError or FileNotFoundError with one sentence.
    """

    def __init__(self, folders, root=None, image=None):
        base = os.path.commonpath([os.path.dirname(os.path.abspath(folder)) for folder in folders])
        self.logs = {os.path.relpath(folder, base): read_log(folder) for folder in folders}
        self.args = next(iter(self.logs.values()))[0]
        self.root, self.seed, self.device = root or self.args["root"], self.args["seed"], ranks.start()
        self.model = slip.load(os.path.join(folders[0], loop.CHECKPOINT)).to(self.device)
        self.own = data.Source(os.path.basename(image), [(read_own(image), "")]) if image else None

    def open(self, split):
        try:
            return self.own or sets.open_source(self.args["data"], self.root, split)
        except (ValueError, FileNotFoundError) as error:
            raise Without(error) from None

    @cached_property
    def train(self):
        """(pictures it was trained on, pictures held out from these)"""
        whole = self.open("train")
        return [data.part(whole, indices) for indices in data.holdout(len(whole), self.seed)]

    @cached_property
    def test(self):
        return self.open("test")

    def order(self, count):
        """0 to count - 1, shuffled by the seed."""
        return np.random.default_rng((self.seed, count)).permutation(count).tolist()

    def needs(self, captions=False, classes=False):
        if captions and self.model.text is None:
            raise Without(f"a {self.args['method']} model is trained without captions")
        if classes and self.test.classes is None:
            raise Without(f"{self.test.name} has captions, no classes")


def read_log(folder):
    """A run folder -> (the args of its training, the rows of its log.csv: none in the first epoch)."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no run folder at {folder}: type one that train.py has made, runs/NAME")
    path = os.path.join(folder, loop.CHECKPOINT)
    args = (slip.read(path).get("run") or {}).get("args", {})
    if not {"data", "method", "batch_size"} <= args.keys():
        raise ValueError(f"{path} does not say how it was trained: expected a checkpoint of train.py")
    path = os.path.join(folder, "log.csv")
    if not os.path.exists(path):
        return args, []
    with open(path, newline="", encoding="utf-8") as file:
        return args, list(csv.DictReader(file))


def read_own(path):
    try:
        return data.read_picture(path)
    except Exception as error:  # damaged files break Pillow in every way there is
        raise ValueError(f"cannot read the picture {path}: {error}") from None


# The numbers


def chances(run, column):
    """The values of a column of the logs before anything is learned, where they are known."""
    values, branch = set(), run.model.branch
    for args, _ in run.logs.values():
        language, partner = slip.METHODS[args["method"]]
        if column == "clip_loss" and language:
            values.add(math.log(args["batch_size"]))
        elif column == "ssl_loss" and branch and partner == slip.METHODS[run.args["method"]][1]:
            values.add(branch.chance(args["batch_size"])[0])
        elif column == "zeroshot_top1" and language and args["data"] == run.args["data"]:
            try:
                values.add(measure.chance("top1", len(run.test.classes)))
            except Without:  # the set is not here, the log is
                pass
    return sorted(values)


def training_views(run, source, keys):
    """n keys (epoch, index) -> what training makes of them: {view: normalised [n, 3, S, S]}, n captions.

    Hidden patches are grey. With --ssl-data the strong views are another set's: left out.
    """
    args, config, (language, partner) = run.args, run.model.config, slip.METHODS[run.args["method"]]
    views = data.Views(
        source, None, image_size=config.image_size, patch=config.patch, seed=run.seed,
        light_crop=args["light_crop"], strong_crop=args["strong_crop"], language=language,
        pair=None if args.get("ssl_data") else data.PAIRS.get(partner),
        clip_strong=augment.SIMCLR if args["clip_aug"] == "simclr" else None,
        clip_views=args.get("clip_views", 1),
    )  # fmt: skip
    batch = data.collate([views[key, key] for key in keys])
    del batch["skipped"]
    captions = batch.pop("caption", [])
    shown, side = data.device_views(batch), config.image_size // config.patch
    for name in [name for name in shown if name.endswith("_mask")]:
        mask = repeat(shown.pop(name), "n (h w) -> n 1 (h p) (w q)", h=side, p=config.patch, q=config.patch)
        view = name.removesuffix("_mask")
        shown[view] = shown[view].masked_fill(mask, 0)  # the mean of all colours
    return shown, captions


def held_out(run):
    """At most eight held-out pairs of different labels or captions -> (captions, normalised [n, 3, S, S])."""
    run.needs(captions=True)
    held, first = run.train[1], {}
    for index in run.order(len(held)):
        first.setdefault(str(held.label(index)), index)
    if len(first) < 2:
        raise Without(f"too few pictures of {held.name} were held out")
    shown, captions = training_views(run, held, [(0, index) for index in list(first.values())[:8]])
    return captions, shown["images"]


@torch.no_grad()
def cosines(model, captions, images, device):
    """B captions, normalised images [B, 3, S, S] -> [B, B]: a caption's cosines with the images are a row."""
    text_embed = retrieval.embed_texts(model, captions, device)  # [B, E]
    image_embed = retrieval.embed_images(model, images.to(device))  # [B, E]
    return (text_embed @ image_embed.T).cpu().numpy()


def likeliest(run, source, count):
    """n labelled pictures -> probabilities and classes [n, count], the likeliest first, and labels [n]."""
    model, prompts = run.model, tasks.prompts(source.name)
    weights = zeroshot.classifier(model, source.classes, prompts, run.device)  # [K, E]
    embeds, labels = measure.over(
        source, model.config.image_size, run.device, lambda x: retrieval.embed_images(model, x)
    )  # [n, E]
    scores = model.logit_scale.exp().detach() * embeds @ weights.T  # [n, K], out of autocast
    values, classes = scores.softmax(1).topk(min(count, len(source.classes)))
    return values.tolist(), classes.tolist(), labels.tolist()


@torch.no_grad()
def attention_weights(vit, images):
    """Normalised images [B, 3, S, S] -> softmax(q k^T / sqrt(d)) of the last block, [B, H, 1 + N, 1 + N].

    The tower's fused attention keeps them to itself: a hook takes its input, and q and k are made again.
    """
    layer, taken = vit.blocks[-1].attention, []
    with layer.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])):
        vit(images)
    q, k, _ = rearrange(layer.qkv(taken[0]), "b n (three h d) -> three b h n d", three=3, h=layer.heads)
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)


def plane(features, labels):
    """PCA of the class means: features [n, D], labels [n] -> (their centre [D], orthonormal axes [D, 2])."""
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])  # [K, D]
    centre = means.mean(0)
    return centre, torch.linalg.svd(means - centre).Vh[:2].T


def cut(tokenizer, caption, context):
    """A caption -> [(id, its text, the number of its word; None for start and end)]."""
    found, word = [], 0
    for token in tokenizer(caption, context)[0].tolist():
        if token >= tokenizer.start:
            found.append((token, "start" if token == tokenizer.start else "end", None))
        else:
            piece = tokenizer.pieces[token]  # bytes; a space ends a word
            found.append((token, piece.decode("utf-8", "backslashreplace").strip(), word))
            word += piece.endswith(b" ")
    return found


# The figures: a run -> a matplotlib Figure


def sheet(width, height, title):
    """An empty figure, in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", facecolor="white")
    figure.suptitle(textwrap.fill(title, int(11 * width)))
    return figure


def show(axis, picture, **style):
    """A picture, heat [h, w] or normalised view [3, S, S], without ticks; small ones' pixels stay squares."""
    if torch.is_tensor(picture):  # normalised
        picture = augment.denormalise(picture[None])[0].permute(1, 2, 0)
    picture = np.asarray(picture)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    return axis.imshow(picture, interpolation="nearest" if len(picture) < 96 else "antialiased", **style)


def views(run):
    seen, strong = run.train[0], run.args["clip_aug"] == "simclr"
    first_batch = data.permutation(len(seen), run.seed, 0)[: run.args["batch_size"]]
    index = int(first_batch[-1])  # one that has a caption under --captions too
    shown, captions = training_views(run, seen, [(epoch, index) for epoch in range(5)])
    kind = f"{'strong view' if strong else 'light crop'}\nfor the caption"
    names = {"images": kind, "images2": kind, "view1": "strong view 1", "view2": "strong view 2"}
    title = "A picture, and what the image tower sees of it in five epochs"
    figure = sheet(9.6, 1.5 * len(shown) + 0.9, title)
    axes = figure.subplots(len(shown), 6, squeeze=False)
    show(axes[0, 0], seen[index][0])
    told = [textwrap.fill(f"“{textwrap.shorten(text, 60)}”", 18) for text in dict.fromkeys(captions) if text]
    axes[0, 0].set_title(f"from {seen.name}")
    style = dict(ha="center", va="top", in_layout=len(shown) == 1)  # else there is room below
    axes[0, 0].text(0.5, -0.05, "\n".join(told), transform=axes[0, 0].transAxes, **style)
    for axis in axes[1:, 0]:
        axis.axis("off")
    for row, (name, pictures) in zip(axes[:, 1:], shown.items()):
        row[0].set_ylabel(names[name])
        for axis, picture in zip(row, pictures):
            show(axis, picture)
    for epoch, axis in enumerate(axes[0, 1:], 1):
        axis.set_title(f"epoch {epoch}")
    return figure


def curves(run):
    empty = [name for name, (_, rows) in run.logs.items() if not rows]
    if empty:
        raise Without(f"{empty[0]} has no log.csv, which is written at the end of the first epoch")
    names = ", ".join(dict.fromkeys(args["data"] for args, _ in run.logs.values()))
    partners = dict.fromkeys(slip.METHODS[args["method"]][1] for args, _ in run.logs.values())
    partners = ", ".join(name for name in partners if name)
    unit = ", nats" if partners == "simclr" else ""
    titles = {"clip_loss": "clip_loss (InfoNCE), nats", "ssl_loss": f"ssl_loss ({partners}){unit}"}
    titles |= {"zeroshot_top1": f"zero-shot top-1 on {names}, %"}
    drawn = [n for n in titles if any(row.get(n) for _, rows in run.logs.values() for row in rows)]
    figure = sheet(3.4 * len(drawn) + 0.4, 3.6, "Training, epoch by epoch")
    axes, lines = figure.subplots(1, len(drawn), squeeze=False)[0], {}
    for axis, column in zip(axes, drawn):
        axis.margins(y=0.12)
        for i, (name, (_, rows)) in enumerate(run.logs.items()):
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                style = dict(color=COLOURS[i % 7], linestyle=DASHES[i % 4], marker=MARKERS[i % 12])
                (lines[name],) = axis.plot(*zip(*points), **style, markersize=4)
        for value in chances(run, column):
            axis.axhline(value, color="#666666", linestyle=":", linewidth=1)
            style = dict(ha="right", va="bottom", fontsize=9, transform=axis.get_yaxis_transform())
            axis.text(0.98, value, f"chance {value:.3g}", **style)
        axis.set(title=titles[column], xlabel="step", xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.25)
    names = [name for name in run.logs if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def similarity(run):
    captions, images = held_out(run)
    matrix, n = cosines(run.model, captions, images, run.device), len(captions)
    texts, pictures = ((matrix.argmax(axis) == np.arange(n)).sum() for axis in (1, 0))
    title = (
        f"Cosines of held-out pairs: {texts} captions find their picture, {pictures} pictures their caption "
    )
    title += "(framed: the pairs, bold: the largest of a row)"
    figure = sheet(0.56 * n + 2, 0.56 * n + 1.1, title)
    axis = figure.subplots()
    shade = axis.imshow(matrix, cmap="cividis").norm(matrix)
    for (row, column), value in np.ndenumerate(matrix):
        style = dict(weight="bold" if value == matrix[row].max() else "normal", fontsize=9)
        style |= dict(color="white" if shade[row, column] < 0.6 else "black", ha="center", va="center")
        axis.text(column, row, f"{value:.2f}", **style)
    for i in range(n):
        axis.bar(i, 0.92, 0.92, i - 0.46, fill=False, edgecolor=COLOURS[1], linewidth=2)
        show(axis, images[i], extent=(i - 0.46, i + 0.46, -0.6, -1.52))
    axis.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -1.55), aspect="auto")
    axis.set_yticks(range(n), [textwrap.fill(textwrap.shorten(text, 60), 22) for text in captions])
    axis.tick_params(length=0)
    return figure


def label_of(classes, label):
    """A class's name, short; the first where it has several."""
    name = classes[label] if isinstance(classes[label], str) else classes[label][0]
    return textwrap.shorten(name, 22, placeholder=" ...")


def predictions(run):
    run.needs(captions=True, classes=True)
    classes, chosen = run.test.classes, data.part(run.test, run.order(len(run.test))[:15])
    values, found, labels = likeliest(run, chosen, 3)
    rows, right = math.ceil(len(chosen) / 3), sum(k[0] == truth for k, truth in zip(found, labels))
    title = (
        f"{len(chosen)} test pictures of {run.test.name}, drawn at random: prompts name {right} of them right"
    )
    figure = sheet(9.5, 1.25 * rows + 0.5, title)
    axes = figure.subplots(rows, 6, squeeze=False, width_ratios=(1, 1.7) * 3).reshape(-1, 2)
    for axis in axes.flat:
        axis.axis("off")
    for i, (truth, (picture, bars)) in enumerate(zip(labels, axes)):
        show(picture, chosen[i][0])
        for place, (value, k) in enumerate(zip(values[i], found[i])):
            weight, blame = "bold" if k == truth else "normal", COLOURS[1] if place == 0 else "#999999"
            bars.text(0, place, f"{value:.0%} {label_of(classes, k)}", weight=weight, fontsize=9, va="bottom")
            bars.barh(place, value, 0.25, align="edge", color=COLOURS[0] if k == truth else blame)
        hit = found[i][0] == truth
        mark = "✓ right" if hit else f"✗ it is: {label_of(classes, truth)}"
        bars.text(0, -0.95, mark, fontsize=9, va="bottom", color=COLOURS[0 if hit else 1], weight="bold")
        bars.set(xlim=(0, 1), ylim=(2.4, -1.4))
    return figure


def attention(run):
    test, vit, size = run.test, run.model.visual, run.model.config.image_size
    chosen = run.order(len(test))[:8]
    images = [augment.evaluation_view(test[i][0], size) for i in chosen]
    images = augment.normalise(torch.stack(images))  # [B, 3, S, S]
    weights = attention_weights(vit, images.to(run.device)).cpu()  # [B, H, 1 + N, 1 + N]
    heads, side = weights.shape[1], size // vit.patch_embed.patch
    weights = weights[:, :, 0, 1:].mean(1)  # [B, N]; what the class token gives to itself is left out
    heat = rearrange(100 * weights / weights.sum(1, keepdim=True), "b (h w) -> b h w", h=side).numpy()
    even = f"even: {100 / side**2:.3g}% a patch"
    title = f"Where the class token looks: last block, mean of {heads} heads ({even})"
    figure = sheet(1.3 * len(chosen) + 2, 3.4, title)
    axes = figure.subplots(2, len(chosen), squeeze=False)
    for i, (above, below) in enumerate(axes.T):
        show(above, images[i])
        name = label_of(test.classes, test.label(chosen[i])) if test.classes else test.name
        above.set_title(textwrap.fill(name, 14))
        drawn = show(below, heat[i], cmap="cividis", vmin=0, vmax=heat.max())
        for (y, x), value in np.ndenumerate(heat[i]):
            if side <= 4:
                style = dict(color="white" if value < 0.6 * heat.max() else "black", fontsize=8)
                below.text(x, y, f"{value:.0f}", ha="center", va="center", **style)
    figure.colorbar(drawn, ax=axes, label="% of its attention\nto the patches")
    return figure


def map_(run):
    """The plane is found on half of the pictures, and the other half drawn: else noise would part as well."""
    run.needs(classes=True)
    kinds = set(run.order(len(run.test.classes))[: len(MARKERS)])
    chosen = [i for i in run.order(len(run.test)) if run.test.label(i) in kinds]
    test, size = data.part(run.test, chosen[:960]), run.model.config.image_size
    x, labels = (result.cpu() for result in measure.over(test, size, run.device, run.model.visual))  # [n, D]
    x = F.normalize(x, dim=1)
    centre, axes = plane(x[::2], labels[::2])
    x, labels = x[1::2] - centre, labels[1::2]
    points = x @ axes  # [n / 2, 2]
    share = points.square().sum() / x.square().sum()
    title = f"Features of {len(x)} test pictures of {test.name}, in the plane in which the means of the "
    title += f"classes (taken on {len(test) - len(x)} others) differ most: {share:.0%} of the variance"
    figure = sheet(8, 5.5, title)
    axis, written = figure.subplots(), []
    axis.set(xticks=[], yticks=[])
    styles = list(zip(labels.unique().tolist(), COLOURS * 2, MARKERS))
    for k, colour, marker in styles:
        axis.scatter(*points[labels == k].T, color=colour, marker=marker, s=22, alpha=0.6, linewidths=0)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    for k, colour, _ in styles:
        x0, y0 = points[labels == k].mean(0).tolist()
        while any(abs(x0 - x1) * 7 < right - left and abs(y0 - y1) * 22 < high - low for x1, y1 in written):
            y0 += (high - low) / 100  # up, until it is clear of the names already written
        written.append((x0, y0))
        style = dict(facecolor="white", alpha=0.75, linewidth=0, pad=1)
        axis.text(x0, y0, label_of(test.classes, k), color=colour, weight="bold", ha="center", bbox=style)
    return figure


def tokens(run):
    """x counts letters, y lines of boxes."""
    tokenizer, y, centred = run.model.tokenizer, 0.0, dict(ha="center", va="center")
    longest = sorted(held_out(run)[0], key=len)[-3:]
    figure = sheet(
        8.5,
        1,
        "How captions are cut: a token is a box with its id, a tint is a word; rare words go in pieces",
    )
    axis = figure.subplots()
    for caption in [*longest, RARE]:
        told = textwrap.shorten(caption, 80, placeholder=" ...")
        axis.text(0.2, y + 0.3, told, va="center", style="italic")
        x, y = 0, y + 0.55
        for token, piece, word in cut(tokenizer, caption, run.model.config.context):
            width = max(len(piece), len(str(token))) + 2
            if x + width > 84:
                x, y = 0, y + 1
            tint = "#dddddd" if word is None else ("#bfe3f7", "#fbdcb0")[word % 2]
            axis.bar(x + width / 2, 0.9, width - 0.4, y, color=tint)
            axis.text(x + width / 2, y + 0.3, piece, family="monospace", **centred)
            axis.text(x + width / 2, y + 0.66, token, color="#444444", fontsize=8, **centred)
            x += width
        y += 1.3
    axis.set(xlim=(0, 84), ylim=(y, 0))
    axis.axis("off")
    figure.set_size_inches(8.5, 0.42 * y + 0.4)
    return figure


FIGURES = dict(views=views, curves=curves, similarity=similarity, predictions=predictions)
FIGURES |= dict(attention=attention, map=map_, tokens=tokens)
OF_A_PICTURE = ("views", "attention")  # what --image draws


def save(figure, path):
    """Write a figure as PNG of at most LIMIT bytes: of 256 colours, and coarser, where it must be."""
    for dpi, colours in ((150, None), (150, 256), (110, 256), (75, 256), (50, 256)):
        drawn, packed = io.BytesIO(), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi)
        picture = Image.open(drawn).convert("RGB")
        picture = picture.quantize(colours, kmeans=3) if colours else picture  # without k-means, dull
        picture.save(packed, "png", optimize=True)
        if packed.tell() <= LIMIT:
            break
    with open(f"{path}.tmp", "wb") as file:
        file.write(packed.getvalue())
    os.replace(f"{path}.tmp", path)
    print(f"{path}  {packed.tell() / 1000:.0f} KB", flush=True)


def arguments():
    parser = argparse.ArgumentParser(
        description="Draw what a run has learned.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n", 1)[1],
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder; of more, the curves are drawn")
    parser.add_argument("--only", nargs="+", choices=FIGURES, metavar="FIGURE", help="these (default: all)")
    parser.add_argument("--image", metavar="F", help="draw views and attention of this picture")
    parser.add_argument("--root", help="folder that holds the sets (default: the run's)")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    asked = args.only or (OF_A_PICTURE if args.image else FIGURES)
    try:
        import matplotlib
    except ImportError:
        parser.error("figures.py draws with matplotlib, which is not installed: pip install matplotlib")
    try:
        if args.image and set(asked) - set(OF_A_PICTURE):
            raise ValueError(f"--image is for {' and '.join(OF_A_PICTURE)}: leave out --only, or name these")
        run = Run(args.runs, args.root, args.image)
        out = os.path.join(args.runs[0], "figures")
        os.makedirs(out, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    ending = f"-{os.path.splitext(run.own.name)[0]}" if run.own else ""
    for name in asked:
        try:
            with matplotlib.rc_context(STYLE):
                save(FIGURES[name](run), os.path.join(out, f"{name}{ending}.png"))
        except (Without, loop.Stop) as why:
            if args.only:
                parser.error(f"no {name}: {why}")
            print(f"no {name}: {why}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
