"""The table of zero-shot transfer: many labelled sets, one model or several side by side.

Paper: zero-shot transfer to 26 sets, each judged by its own metric; the average over them.

    --data, --labels, --templates -> open_tasks -> [(test set, templates)] -> run_table -> lines, results.json

Not here: what is measured on a set (zeroshot.py), the metrics (evaluate.py), the sets (sets.py).
"""

import shlex
import statistics

import console
import ranks
import sets
from evaluate import METRICS, chance, record
from images import Source

SEEN = "  (prompt classification of classes seen in training, not zero-shot transfer)"


def split_names(names):
    """ "a dog, a cat" -> its names."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def open_tasks(args):
    """-> (tasks, {set: why it is left out}), the latter None, and a set that cannot be opened a ValueError
    or OSError, unless --data has "all".
    """
    chosen, left_out = split_names(args.data), None
    if "all" in chosen:
        built_in = [name for name in sets.SCENES if name != "scenes-kind"]  # which is "scenes" again
        there = [name for name in sets.names(args.root) if sets.found(name, args.root)]
        chosen, left_out = [*there, *built_in, *(name for name in chosen if name != "all")], {}
    if not chosen:
        raise ValueError(f"--data {args.data!r} names no set: python zeroshot.py --list shows them")
    tasks = [attempt(open_task, name, left_out, name, args) for name in dict.fromkeys(chosen)]
    return [task for task in tasks if task is not None], left_out


def attempt(work, name, left_out, *args):
    """work(*args), or None where it fails and sets may be left out."""
    try:
        return work(*args)
    except (ValueError, OSError, console.Stop) as error:
        if left_out is None:
            raise
        left_out[name] = str(error)
        ranks.warn(f"{name} is left out: {error}")


def open_task(name, args):
    """-> (labelled test set, templates), with the names and templates asked for. Of "all" sets, one that a
    published file does not know is asked in our words.
    """
    source, templates = sets.open_source(name, args.root, "test"), sets.prompts(name)
    if source.classes is None:
        line = ["--checkpoint", *args.checkpoint, "--data", name, "--root", args.root, "--retrieval"]
        raise ValueError(f"{name} has captions, no classes: type python zeroshot.py {shlex.join(line)}")
    names, everything = source.classes, "all" in split_names(args.data)
    if args.labels:
        names = sets.read_published(args.labels, name, names if everything else None)
    if args.templates and "{}" in args.templates[0]:
        templates = args.templates
    elif args.templates:
        templates = sets.read_published(args.templates[0], name, templates if everything else None)
    if len(names) != len(source.classes):
        raise ValueError(f"{args.labels} names {len(names)} classes, {name} has {len(source.classes)}")
    if not templates or not all("{}" in template for template in templates):
        raise ValueError(f"--templates for {name}: found {templates}, expected a {{}} in each")
    if sets.metric(name) == "auc" and len(names) != 2:
        raise ValueError(f"{name} is judged by ROC AUC, which wants two classes: found {len(names)}")
    return Source(name, source.items, names), templates


def seen_share(run_args, classes):
    """The share (0-1) of classes that a run was trained on by name: its captions were class names, and one of
    the class's is among them, in whatever capitals.
    """
    known = {name.lower() for entry in run_args.get("class_names") or [] for name in synonyms(entry)}
    return sum(any(name.lower() in known for name in synonyms(entry)) for entry in classes) / len(classes)


def synonyms(entry):
    """The names of a class."""
    return [entry] if isinstance(entry, str) else entry


def run_table(models, tasks, left_out, measure):
    """Measure the sets on every model, print and note what comes out.

    `models`: {path: (model, args of its run)}; measure(model, source, templates) -> {metric: per cent}.
    """
    heads, values, seen = ["value"], {}, {}
    if len(models) > 1:
        heads = [f"[{number}]" for number in range(1, len(models) + 1)]
        ranks.say("\n".join(f"{head} {path}" for head, path in zip(heads, models)))
    width = max((len(source.name) for source, _ in tasks), default=3)
    cells = "".join(f"  {head:>6} " for head in heads)
    ranks.say(f"{'set':<{width}}  images  classes  {'metric':<20}{cells}  chance")
    for source, templates in tasks:
        found = [
            attempt(measure, source.name, left_out, model, source, templates) for model, _ in models.values()
        ]
        if None in found:
            continue
        metric, count, shares = sets.metric(source.name), len(source.classes), []
        row = {"metric": metric, "chance": chance(metric, count), "images": len(source), "classes": count}
        for (path, (_, run_args)), result in zip(models.items(), found):
            shares.append(seen_share(run_args, source.classes))
            noted = {"value": result[metric], "seen": shares[-1], "prompts": len(templates)}
            record(path, "zeroshot", source.name, row | noted | result)
        values[source.name] = [*(result[metric] for result in found), row["chance"]]
        seen |= {source.name: max(shares)} if any(shares) else {}
        cells = "".join(
            f"  {result[metric]:>6.2f}{'*' if share else ' '}" for result, share in zip(found, shares)
        )
        line = f"{source.name:<{width}}  {len(source):>6}  {count:>7}  {METRICS[metric]:<20}{cells}"
        ranks.say(f"{line}  {row['chance']:>6.2f}")
    if seen:
        ranks.say(f"*{SEEN}: " + ", ".join(f"{share:.0%} of {name}" for name, share in seen.items()))
    if not values:
        raise console.Stop("no set could be measured")
    if len(values) > 1 or left_out:
        sum_up(values, left_out)


def sum_up(values, left_out):
    """The plain averages, and on how many sets each model is the best. `values`: {set: [models, chance]}."""
    paper = [row for name, row in values.items() if name in sets.PAPER]
    parts = {
        f"{len(paper)} of the paper's {len(sets.PAPER)}": paper,
        f"all {len(values)}": list(values.values()),
    }
    for words, rows in parts.items():
        if not rows:
            continue
        *means, guess = (statistics.mean(column) for column in zip(*rows))
        line = f"average of {words} sets: {', '.join(f'{mean:.2f}' for mean in means)} (chance {guess:.2f})"
        if len(means) > 1:
            wins = [sum(row[i] == max(row[:-1]) for row in rows) for i in range(len(means))]
            line += f"; the best on {', '.join(map(str, wins))}"
        ranks.say(line)
    if left_out:
        ranks.say(f"left out, and not in the averages: {', '.join(left_out)}")


def show_list(root):
    """Every labelled set, whether it is there, and how to get it."""
    ranks.say(f"{'set':<20}  there  {'metric':<20}  how to get it")
    for name in sets.names(root):
        there, metric = "yes" if sets.found(name, root) else "-", METRICS[sets.metric(name)]
        ranks.say(f"{name:<20}  {there:<5}  {metric:<20}  {sets.how_to_get(name, root)}")
    ranks.say(f"The first {len(sets.PAPER)} are the paper's; built in: {', '.join(sets.SCENES)}.")
    ranks.say(
        f"Your own: {root}/NAME/test/<class>/*.jpg; names: a classes.txt of folder<TAB>name beside test."
    )


def fetch(names, root):
    """Download sets, one after another -> exit code."""
    failed = {}
    for name in names:
        attempt(sets.download, name, failed, name, root)
        if name not in failed:
            ranks.say(f"{name} is there, under {root}")
    return 1 if failed else 0
