"""Zero-shot transfer: name the class of a picture by the caption that fits it best.

    python zeroshot.py --checkpoint F --data scenes                            # the built-in test split
    python zeroshot.py --checkpoint F --data all --root data                   # every set found there
    python zeroshot.py --checkpoint F --image cat.jpg --classes "a dog,a cat"  # a name for one picture
    python zeroshot.py --checkpoint F --folder photos --query "a red bus"      # pictures for a sentence
    python zeroshot.py --checkpoint F --data coco --retrieval                  # captions and pictures
    python zeroshot.py --list                                                  # sets, and how to get them

Paper: section 4.2 and appendix. For each class every prompt is filled and encoded, each embedding
normalised, their mean normalised again; a picture's class is the one of largest cosine.
Not here: metrics (measure.py), what --query and --retrieval do (retrieval.py), the sets (sets.py).
"""

import argparse
import functools
import json
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import augment
import data
import loop
import measure
import ranks
import retrieval
import sets
import slip
import tasks

SEEN = "  (prompt classification of classes seen in training, not zero-shot transfer)"
TABLE = "zeroshot.json"


@torch.no_grad()
def classifier(model, names, templates, device):
    """Class names (a string, or a list of names, each) and templates with {} -> unit embeddings [K, E]."""
    names = [[name] if isinstance(name, str) else list(name) for name in names]
    texts = [
        template.replace("{}", name) for synonyms in names for name in synonyms for template in templates
    ]
    embeds = retrieval.embed_texts(model, texts, device)  # [all prompts, E]
    groups = embeds.split([len(synonyms) * len(templates) for synonyms in names])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


def evaluate(model, source, device, *, names=None, templates=None, workers=0):
    """Zero-shot accuracy of a model on a labelled source, per cent, by every metric of measure.metrics.
    Leaves the model's mode as it was.
    """
    training, size = model.training, model.config.image_size
    model.eval()
    templates = templates or tasks.prompts(source.name)
    weights = classifier(model, names or source.classes, templates, device)  # [K, E]
    embeds, labels = measure.over(
        source, size, device, lambda x: retrieval.embed_images(model, x), workers=workers
    )  # [n, E]
    model.train(training)
    return measure.metrics(embeds @ weights.T, labels)  # out of autocast: bf16 makes near cosines equal


def name_picture(model, path, names, templates, device):
    """Probabilities of the names for one picture file, the likeliest first: [(probability, name)]."""
    try:
        picture = data.read_picture(path)
    except Exception as error:  # damaged files break Pillow in every way there is
        raise ValueError(f"cannot read the picture {path}: {error}") from None
    view = augment.evaluation_view(picture, model.config.image_size)
    with torch.no_grad():
        embed = retrieval.embed_images(model, augment.normalise(view[None].to(device)))  # [1, E]
        logits = model.logit_scale.exp() * embed @ classifier(model, names, templates, device).T  # [1, K]
    return sorted(zip(logits.softmax(1)[0].tolist(), names), reverse=True)


def typed(names):
    """ "a dog, a cat" -> its names."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


# A table of sets


@dataclass
class Task:
    """A labelled set with what it is asked: the names of its classes, and prompts."""

    source: data.Source
    names: list
    templates: list
    metric: str  # of measure.METRICS
    how: str  # in words, for the row in results.csv


def open_task(name, args, lenient):
    """`lenient`: a set that a published file does not know is asked in our words."""
    source, prompts = sets.open_source(name, args.root, "test"), tasks.prompts(name)
    if source.classes is None:
        raise ValueError(f"{name} has captions, no classes: type --retrieval")
    names, templates = (
        tasks.read_published(path, name, ours if lenient else None) if path else ours
        for path, ours in ((args.labels, source.classes), (args.templates, prompts))
    )
    if len(names) != len(source.classes):
        raise ValueError(f"{args.labels} names {len(names)} classes, {name} has {len(source.classes)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"{args.templates}: the templates of {name} want a {{}} for the name in each")
    metric = tasks.metric(name)
    if metric == "auc" and len(names) != 2:
        raise ValueError(f"{name} is judged by ROC AUC, which wants two classes: found {len(names)}")
    how = f"{len(templates)} {'prompts' if templates is prompts else 'published prompts'}"
    how += "" if names is source.classes else ", published names"
    return Task(source, names, templates, metric, how)


def open_tasks(args):
    """-> (tasks, {set: why it is left out}), the latter None if none may be: "all" was not typed."""
    chosen, left_out = typed(args.data), None
    if "all" in chosen:
        left_out = {}
        there = [name for name in sets.names(args.root) if sets.found(name, args.root)]
        chosen = there + [name for name in chosen if name != "all"]
        for path in filter(None, (args.labels, args.templates)):
            tasks.read_published(path, "", ())  # a torn file must not look like sets left out
    if not chosen:
        raise ValueError(f"--data {args.data}: no set found under {args.root}, --list tells how to get one")
    opened = []
    for name in dict.fromkeys(chosen):
        try:
            opened.append(open_task(name, args, left_out is not None))
        except (ValueError, OSError) as error:
            if left_out is None:
                raise
            leave_out(left_out, name, error)
    return opened, left_out


def leave_out(left_out, name, error):
    left_out[name] = str(error)
    ranks.warn(f"{name} is left out: {error}")


def run_table(args, model, device, opened, left_out):
    """Measure the tasks, print and note what comes out."""
    trained = (slip.read(args.checkpoint).get("run") or {}).get("args", {})
    seen = trained.get("data") if trained.get("captioned_by") == "class names" else None
    rows, width = {}, max([len(task.source.name) for task in opened], default=3)
    ranks.say(f"{'set':<{width}}  pictures  classes  {'metric':<20}  value  chance")
    for task in opened:
        name, pictures, classes = task.source.name, len(task.source), len(task.names)
        asked = {"names": task.names, "templates": task.templates, "workers": args.workers}
        try:
            result = evaluate(model, task.source, device, **asked)
        except loop.Stop as stop:
            if left_out is None:
                raise
            leave_out(left_out, name, stop)
            continue
        row = {"metric": task.metric, "value": result[task.metric]}
        row |= {"chance": measure.chance(task.metric, classes), "seen_in_training": name == seen}
        ranks.say(
            f"{name:<{width}}  {pictures:>8,}  {classes:>7,}  {measure.METRICS[task.metric]:<20}  "
            f"{row['value']:>5.2f}  {row['chance']:>6.2f}{' *' if name == seen else ''}"
        )
        measure.record(args.checkpoint, "zeroshot", task.source, task.how, task.metric, row["value"])
        rows[name] = row | {"pictures": pictures, "classes": classes, "how": task.how} | result
    if seen in rows:
        ranks.say(f"*{SEEN}")
    if not rows:
        raise loop.Stop("no set could be measured")
    if len(rows) > 1 or left_out:
        sum_up(args.checkpoint, rows, left_out or {})


def sum_up(checkpoint, rows, left_out):
    """The plain averages, and the table as JSON beside the checkpoint."""
    paper = [name for name in rows if name in tasks.PAPER]
    averages = {}
    for key, words, names in (
        ("paper", f"{len(paper)} of the paper's {len(tasks.PAPER)}", paper),
        ("all", f"all {len(rows)}", list(rows)),
    ):
        if names:
            value, chance = (statistics.mean(rows[name][k] for name in names) for k in ("value", "chance"))
            averages[key] = {"value": value, "chance": chance, "sets": len(names)}
            ranks.say(f"average of {words} sets: {value:.2f} (chance {chance:.2f})")
    if left_out:
        ranks.say(f"left out, and not in the averages: {', '.join(left_out)}")
    path = os.path.join(os.path.dirname(checkpoint), TABLE)
    table = {"checkpoint": os.path.basename(checkpoint), "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    table |= {"averages": averages, "left_out": left_out, "sets": rows}
    if ranks.rank() == 0:
        try:
            loop.write_text(path, json.dumps(table, indent=1))
        except OSError as error:
            ranks.warn(f"the table is not noted, {path} cannot be written ({error})")


# A folder, a captioned set


def run_query(args, model, device, source):
    for cosine, path in retrieval.search(model, source, args.query, device, args.workers)[: args.top]:
        path = os.fsencode(path).decode("utf-8", "replace")  # a name that any terminal can print
        ranks.say(f"{cosine:6.3f}  {path}")


def run_retrieval(args, model, device, source, split):
    whole = len(source)
    if whole > args.pictures:
        source = data.part(source, sorted(data.permutation(whole, 0, 0)[: args.pictures]))
    found, pictures, captions = retrieval.evaluate(model, source, device, args.workers)
    how = f"{split} split, {pictures:,} of {whole:,} pictures, {captions:,} captions"
    ranks.say(f"{source.name}: {how}")
    for way, values in found.items():
        ranks.say(f"  {way}  " + "  ".join(f"R@{k} {value:6.2f}%" for k, value in values.items()))
        for k, value in values.items():
            measure.record(args.checkpoint, "retrieval", source, how, f"{way} R@{k}", value)
    chance = "  ".join(f"R@{k} {min(100, 100 * k / pictures):6.2f}%" for k in values)
    ranks.say(f"  chance, about  {chance}")
    if split == "train":
        ranks.say("  (no test split has captions: the model may have seen these pictures in training)")


# The command


def arguments():
    parser = argparse.ArgumentParser(
        description="Zero-shot transfer of a trained or published model: a table of sets, or one of "
        "the other uses below.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=__doc__.split("\n\n")[1],
    )
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="a run's checkpoint.pt or a published weight file")
    add("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    add("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    add = parser.add_argument_group("on which sets").add_argument
    add("--data", default="scenes", metavar="SETS", help='names with commas between, or "all": those found '
        "under --root (default: %(default)s)")  # fmt: skip
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--labels", metavar="JSON", help="published labels.json, read under the name of the set")
    add("--templates", metavar="JSON", help="published templates.json, read likewise")
    add("--list", action="store_true", help="show every set, whether it is there, and how to get it")
    add("--download", action="store_true", help="fetch the sets of --data which torchvision can")
    group = parser.add_argument_group("instead of a table")
    add = group.add_mutually_exclusive_group().add_argument
    add("--image", metavar="FILE", help="name one picture, with --classes")
    add("--folder", metavar="DIR", help="rank the pictures of a folder for a sentence, with --query")
    add("--retrieval", action="store_true", help="recall at 1, 5 and 10 both ways on a captioned set")
    add = group.add_argument
    add("--classes", help='the names to choose from, as "a dog,a cat"')
    add("--query", metavar="TEXT", help='the sentence, as "a red bus"')
    add("--top", type=int, default=5, help="with --query: how many (default: %(default)s)")
    add("--pictures", type=int, default=5000, metavar="N", help="with --retrieval: N pictures of a larger "
        "set, always the same; more are harder (default: %(default)s)")  # fmt: skip
    return parser


def show_list(root):
    """-> exit code."""
    print(f"{'set':<20}  there  {'metric':<20}  how to get it")
    for name in sets.names(root):
        there, metric = "yes" if sets.found(name, root) else "-", measure.METRICS[tasks.metric(name)]
        print(f"{name:<20}  {there:<5}  {metric:<20}  {sets.how_to_get(name, root)}")
    print(f"The first {len(tasks.PAPER)} are the paper's; built in: {', '.join(sets.SCENES)}.")
    print(f"Your own: {root}/NAME/test/<class>/*.jpg; names: a classes.txt of folder<TAB>name beside test.")
    return 0


def fetch(chosen, root):
    """Download sets, one after another -> exit code."""
    if "all" in chosen:
        raise ValueError("--download wants sets by name in --data: all of them are hundreds of gigabytes")
    code = 0
    for name in chosen:
        try:
            sets.download(name, root)
            print(f"{name} is there, under {root}")
        except ValueError as error:
            ranks.warn(str(error))
            code = 1
    return code


def set_up(args):
    """Open what is asked for -> a function that does the work. Raises ValueError or OSError."""
    if not args.checkpoint:
        raise ValueError("--checkpoint FILE is missing: a run's checkpoint.pt or a published weight file")
    if args.workers < 0 or args.top < 1 or args.pictures < 1:
        found = f"--workers {args.workers} --top {args.top} --pictures {args.pictures}"
        raise ValueError(f"found {found}, expected 0 or more, 1 or more, 1 or more")
    if bool(args.folder) != bool(args.query) or bool(args.image) != bool(typed(args.classes)):
        raise ValueError('go together: --image FILE --classes "a dog,a cat"; --folder DIR --query "a bus"')
    device = ranks.start(args.device)
    model = slip.load(args.checkpoint).to(device)
    model.needs_language("zero-shot transfer")
    if model.tokenizer is None:
        raise ValueError(retrieval.NO_TOKENIZER)
    if args.image:
        found = name_picture(model, args.image, typed(args.classes), ("{}",), device)
        return lambda: ranks.say("\n".join(f"{share:6.1%}  {name}" for share, name in found))
    if args.folder:
        return functools.partial(run_query, args, model, device, retrieval.open_pictures(args.folder))
    if args.retrieval:
        return functools.partial(
            run_retrieval, args, model, device, *sets.open_captions(args.data, args.root)
        )
    return functools.partial(run_table, args, model, device, *open_tasks(args))


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        if args.list:
            return show_list(args.root)
        if args.download:
            return fetch(typed(args.data), args.root)
        work = set_up(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    code = loop.guarded(work)
    if code == 0:
        ranks.stop()
    return code


if __name__ == "__main__":
    ranks.leave(main())
