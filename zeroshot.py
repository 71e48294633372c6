"""Zero-shot transfer: an image gets the class whose caption suits it best.

    python zeroshot.py --checkpoint F --data scenes    # the built-in test split
    python zeroshot.py --checkpoint F G --data all     # all sets, two models
    python zeroshot.py --checkpoint F --image cat.jpg --classes "a dog,a cat"
    python zeroshot.py --checkpoint F --folder photos --query "a red bus"
    python zeroshot.py --checkpoint F --data coco --retrieval

Paper: zero-shot transfer, to 26 sets, each judged by its own metric. For each class every prompt is filled
and encoded, each embedding normalised, their mean normalised again; the class with the largest cosine wins.

    names, templates -> classifier -> [K, E]        images -> encode_image -> [n, E]        cosines [n, K]

Not here: metrics (evaluate.py); class names and prompts (sets.py).
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

import console
import data
import folders
import ranks
import recipe
import sets
import slip
from device import autocast
from evaluate import METRICS, apply_to_set, chance, metrics, record
from images import Files, Source, is_image, subset
from losses import unit_norm

RETRIEVED = 5000  # most images in a retrieval; a larger set is sampled, always alike
SEEN = "  (prompt classification of classes seen in training, not zero-shot transfer)"


@torch.no_grad()
def classifier(model, names, templates, device):
    """Class names, or lists of names whose prompts are averaged, and templates with {} -> unit [K, E]."""
    means = []
    for entry in names:
        prompts = [t.replace("{}", name) for name in data.as_list(entry) for t in templates]
        means.append(embed_texts(model, prompts, device).mean(0))  # [E]
    return unit_norm(torch.stack(means))  # [K, E]


def evaluate(model, source, device, *, templates=None, workers=0):
    """Zero-shot accuracy of a model on a labelled set: evaluate.metrics. The model is in evaluation mode.
    `templates`: instead of the set's own. Raises console.Stop for an image that cannot be decoded."""
    weights = classifier(model, source.classes, templates or sets.prompts(source.name), device)  # [K, E]
    embeds, labels, _ = embed_images(model, source, device, workers)  # [n, E], [n]
    return metrics(embeds @ weights.T, labels)  # in float32: near cosines are equal in bf16


def embed_images(model, source, device, workers=0, skip_bad=False):
    """The images of a set, sharded over the ranks -> (unit embeddings [n, E], labels [n], indices [n])."""
    workers = recipe.workers(len(source)) if workers is None else workers
    size, options = model.config.image_size, dict(workers=workers, skip_bad=skip_bad)
    embeds, labels, indices = apply_to_set(source, size, device, model.encode_image, **options)
    return unit_norm(embeds), labels, indices


@torch.no_grad()
def embed_texts(model, texts, device):
    """Strings -> unit embeddings [M, E]. Every rank computes all of them."""
    with autocast(torch.device(device)):
        parts = [model.encode_text(texts[start : start + 64]) for start in range(0, len(texts), 64)]
    return unit_norm(torch.cat(parts))


def embed_pairs(model, source, device, workers=0):
    """A captioned set -> unit images [N, E], texts [M, E], and owner [M]: the image of each caption."""
    images, _, indices = embed_images(model, source, device, workers, skip_bad=True)
    captions = [data.as_list(source.label(i)) for i in indices.tolist()]
    owner = torch.tensor([i for i, group in enumerate(captions) for _ in group], device=images.device)
    return images, embed_texts(model, [text for group in captions for text in group], device), owner


def recall(images, texts, owner, ks=(1, 5, 10)):
    """Recall at k both ways: {"image to text": {k: per cent}, "text to image": {k: per cent}}.

    images [N, E], texts [M, E] of unit length, owner [M]: the image of each caption. An image finds a caption
    if any of its own is among the k nearest. Ties count as misses."""
    own = torch.arange(len(images), device=owner.device)
    ways = {"image to text": (images, own, texts, owner), "text to image": (texts, owner, images, own)}
    found = {}
    for way, (queries, query_owner, items, item_owner) in ways.items():
        places = []  # wrong items ranked before the right one
        for rows, numbers in zip(queries.split(256), query_owner.split(256)):
            cosines, right = rows @ items.T, numbers[:, None] == item_owner  # [256, items]
            best = cosines.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            places.append(((cosines >= best) & ~right).sum(1))
        found[way] = {k: 100 * (torch.cat(places) < k).float().mean().item() for k in ks}
    return found


def open_pairs(args, run_args):
    """-> (captioned set, split): --split, or what there is of "test", "val" (the run's own data), "train"."""
    source, split = sets.open_captions(args.data, args.root, "train" if args.split == "val" else args.split)
    trained, root = run_args.get("data", "other data"), run_args.get("root", "")
    own = args.data == trained and trained.split("-")[0] == "scenes"
    own = own or Path(args.root, args.data).resolve() == Path(root, trained).resolve()
    if args.split == "val" or (args.split is None and split == "train" and own):
        split, source = "val", data.holdout(source, run_args["seed"])[1] if own else ()
        if not len(source):
            raise ValueError(f"this run held out no images of {args.data}: type --split train")
    chosen = data.permutation(len(source), 0, 0)[:RETRIEVED]
    return subset(source, sorted(chosen)), split


def run_retrieval(args, models, device, pairs):
    for (path, (model, _)), (source, split) in zip(models.items(), pairs):
        images, texts, owner = embed_pairs(model, source, device, args.workers)
        seen = " (which the model may have seen in training)" if split == "train" else ""
        ranks.say(f"{path}: {source.name}, {split} split{seen}, {len(images):,} images")
        found = recall(images, texts, owner)
        found["chance, about"] = {k: min(100, 100 * k / len(images)) for k in found["image to text"]}
        for way, values in found.items():
            ranks.say(f"  {way:<13}   " + "  ".join(f"R@{k} {value:6.2f}%" for k, value in values.items()))
        row = {"split": split, "images": len(images), "captions": len(texts)}
        record(path, "retrieval", source.name, row | found)


def open_tasks(args):
    """-> [(labelled test set, templates)] of --data; of "all" those that can be opened."""
    chosen, tasks = console.names(args.data), []
    if args.data == "all":
        chosen = [name for name in sets.names(args.root) if sets.found(name, args.root)]
        chosen += [name for name in sets.SCENES if name != "scenes-kind"]  # which is "scenes" again
    if not chosen:
        raise ValueError(f'found --data {args.data!r}, expected sets with commas between, or "all"')
    for name in chosen:
        try:
            tasks.append(open_task(name, args))
        except (ValueError, OSError) as error:
            if args.data != "all":
                raise
            ranks.warn(f"{name} is left out: {error}")
    return tasks


def open_task(name, args):
    """-> (labelled test set, templates), with the names and templates asked for."""
    source, templates = sets.open_source(name, args.root, "test"), sets.prompts(name)
    if source.classes is None:
        raise ValueError(f"{name} has captions, no classes: add --retrieval")
    names = read_published(args.labels, name) if args.labels else source.classes
    if args.templates:
        typed = "{}" in args.templates[0]
        templates = args.templates if typed else read_published(args.templates[0], name)
    if len(names) != len(source.classes):
        raise ValueError(f"{args.labels} names {len(names)} classes, {name} has {len(source.classes)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"--templates for {name}: found {templates}, expected a {{}} in each")
    return Source(name, source.items, names, source.indices), templates


def read_published(path, name):
    """The entry of a set in the published labels.json or templates.json. Raises ValueError or OSError."""
    try:
        table = json.loads(folders.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get(name), list):
        raise ValueError(f"{path} has no list under {name!r}: found {str(table):.60}")
    return table[name]


def seen_share(run_args, classes):
    """The share (0-1) of classes by whose names, in whatever capitals, a run's images were captioned."""
    known = {name.lower() for entry in run_args.get("class_names") or [] for name in data.as_list(entry)}
    named = [any(name.lower() in known for name in data.as_list(entry)) for entry in classes]
    return sum(named) / len(named)


def run_table(args, models, device, tasks):
    """Measure the sets on every model; print and note what comes out. `models`: {path: (model, run args)}."""
    heads, values, seen = [f"[{number}] " for number in range(1, len(models) + 1)], {}, []
    ranks.say("\n".join(head + path for head, path in zip(heads, models)))
    say_line("set", "images", "classes", "metric", [*heads, "chance "])
    for source, templates in tasks:
        name, metric = source.name, sets.metric(source.name)
        options = dict(templates=templates, workers=args.workers)
        try:
            results = [evaluate(model, source, device, **options) for model, _ in models.values()]
        except console.Stop as error:  # an image that cannot be decoded
            if args.data != "all":
                raise
            ranks.warn(f"{name} is left out: {error}")
            continue
        row = dict(metric=metric, images=len(source), classes=len(source.classes), prompts=len(templates))
        row["chance"] = chance(metric, row["classes"])
        shares = [seen_share(run_args, source.classes) for _, run_args in models.values()]
        for path, result, share in zip(models, results, shares):
            record(path, "zeroshot", name, row | result | {"value": result[metric], "seen": share})
        values[name] = [*(result[metric] for result in results), row["chance"]]
        cells = [f"{result[metric]:.2f}{'*' if share else ' '}" for result, share in zip(results, shares)]
        say_line(name, row["images"], row["classes"], METRICS[metric], [*cells, f"{row['chance']:.2f} "])
        seen += [f"{max(shares):.0%} of {name}"] if any(shares) else []
    for words, names in (("the paper's", sets.PAPER), ("all", values)):
        rows = [values[name] for name in names if name in values]
        if len(rows) > 1:
            means = [f"{statistics.mean(column):.2f} " for column in zip(*rows)]
            wins = [f"{sum(row[i] == max(row) for row in rows)} " for i in range(len(means))]
            say_line(f"average of {words}", len(rows), "", "", means)
            say_line("best on", "", "", "", wins)
    if seen:
        ranks.say(f"*{SEEN}: {', '.join(seen)}")


def say_line(name, images, classes, metric, cells):
    ranks.say(f"{name:<22}{images:>7}{classes:>9}  {metric:<20}" + "".join(f"{cell:>9}" for cell in cells))


def show_list(root):
    """Every labelled set, whether it is there, and how to get it."""
    ranks.say(f"{'set':<20}  there  {'metric':<20}  how to get it")
    for name in sets.names(root):
        there, metric = "yes" if sets.found(name, root) else "-", METRICS[sets.metric(name)]
        ranks.say(f"{name:<20}  {there:<5}  {metric:<20}  {sets.how_to_get(name, root)}")
    ranks.say(f"The first {len(sets.PAPER)} are the paper's; built in: {', '.join(sets.SCENES)}.")


def run_image(args, model, device, image):
    """The typed names with their probabilities, the likeliest first."""
    embed = unit_norm(model.encode_image(model.preprocess(image).to(device)))  # [1, E]
    logits = model.logit_scale.exp() * embed @ classifier(model, args.classes, ["{}"], device).T  # [1, K]
    for probability, name in sorted(zip(logits.softmax(1)[0].tolist(), args.classes), reverse=True):
        ranks.say(f"{probability:6.1%}  {name}")


def run_query(args, model, device):
    """The images in a folder, and below it, that are nearest to a sentence, with their cosines."""
    paths = [path for path in folders.walk(args.folder) if is_image(path)]
    source = Source(args.folder, Files(paths, [""] * len(paths)))
    embeds, _, indices = embed_images(model, source, device, args.workers, skip_bad=True)
    cosines, order = (embeds @ embed_texts(model, [args.query], device)[0]).sort(descending=True)
    for cosine, index in zip(cosines.tolist()[: args.top], indices[order].tolist()):
        ranks.say(f"{cosine:6.3f}  {source.where(index)}")


def arguments():
    about, examples = __doc__.split("\n\n")[:2]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=examples, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="FILE", help="run folders, checkpoints or published weight files")
    add("--data", default="scenes", help='sets with commas between, or "all" (default: %(default)s)')
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--labels", metavar="JSON", help="published labels.json, read under the name of the set")
    add("--templates", nargs="+", help='published templates.json, or prompts, as "a drawing of a {}"')
    add("--list", action="store_true", help="show every set, whether it is there, and how to get it")
    add("--download", action="store_true", help="fetch sets of --data that torchvision has")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--image", metavar="FILE", help="name one image, with --classes")
    only("--folder", metavar="DIR", help="rank the images of a folder for a sentence, with --query")
    only("--retrieval", action="store_true", help="recall at 1, 5 and 10 both ways on a captioned set")
    add("--classes", type=console.names, help='with --image: the names to choose from, as "a dog,a cat"')
    add("--query", metavar="TEXT", help='with --folder: the sentence, as "a red bus"')
    add("--top", type=console.positive_int, default=5, help="with --query: how many (default: %(default)s)")
    add("--split", choices=("train", "val", "test"), help="with --retrieval; val: what the run held out")
    add("--workers", type=console.natural, help="processes that decode (default: none for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    return parser


def set_up(args):
    """Open what is asked for -> (function that does the work, its arguments). Raises ValueError, OSError."""
    if args.list:
        return show_list, (args.root,)
    if args.download:
        for name in map(str.strip, args.data.split(",")):
            sets.download(name, args.root)
        return ranks.say, (f"{args.data}: there, under {args.root}",)
    if not args.checkpoint:
        raise ValueError("--checkpoint is missing: a run folder, its checkpoint.pt or published weights")
    if bool(args.folder) != bool(args.query) or bool(args.image) != bool(args.classes):
        raise ValueError('type both: --image FILE --classes "a dog,a cat"; --folder DIR --query "a bus"')
    if len(args.checkpoint) > 1 and (args.image or args.folder):
        raise ValueError(f"--image and --folder take one --checkpoint: found {len(args.checkpoint)}")
    device, models = ranks.start(args.device), {}
    for path in map(slip.find_checkpoint, args.checkpoint):
        model = slip.load(path).to(device)
        model.encode_text("")  # raises where there is no language, or no tokenizer
        models[path] = (model, (slip.read_checkpoint(path).get("run") or {}).get("args", {}))
    if args.image:
        image, _ = data.readable(Source("", Files([args.image], [""])), 0, [])
        return run_image, (args, model, device, image)
    if args.folder:
        return run_query, (args, model, device)
    if args.retrieval:
        pairs = [open_pairs(args, run_args) for _, run_args in models.values()]
        return run_retrieval, (args, models, device, pairs)
    return run_table, (args, models, device, open_tasks(args))


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)

    def command():
        try:
            work, inputs = set_up(args)
        except (ValueError, OSError) as error:
            console.fail(parser, error)
        work(*inputs)
        ranks.stop()

    return console.guarded(command)


if __name__ == "__main__":
    ranks.leave(main())
