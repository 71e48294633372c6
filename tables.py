"""The paper's comparisons in miniature: train the rows of a table, test each three ways, print the table.

    python tables.py main [--full]     # --full: print the commands at the paper's scale instead

A row is flags of train.py (tables.json); a run is a row with a seed, in runs/tables/DATA/ROW-SEED.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import console
import flags
import sets
import slip

SPEC = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ROWS, TABLES = SPEC["rows"], SPEC["tables"]
WORDS = {"zeroshot": "zero-shot", "linear": "linear", "finetune": "fine-tuned"}


def slug(words):
    return re.sub("[^a-z0-9.]+", "-", words.lower()).strip("-")


def plan(data, row, seed, more=""):
    """-> (folder of a run, words of train.py's command line). The flags `more` have a folder of their own."""
    common = f"--data {data} {SPEC['flags'].get(data, '--max-steps 400')} {more}"
    steps = flags.arguments("").parse_args(common.split()).max_steps * SPEC["lengths"].get(row, 1)
    words = f"{common} {ROWS[row].format(data=data)} --max-steps {round(steps)} --seed {seed}".split()
    return os.path.join("runs", "tables", slug(f"{data} {more}"), f"{slug(row)}-{seed}"), words


def columns(name, data, root="data"):
    """-> [(task, set)] that a table shows; of `transfer` the labelled sets under `root` and their average."""
    tests = [("zeroshot", test) for test in SPEC["zeroshot"].get(data, [data])]
    if name == "transfer":
        others = [test for test in sets.names(root) if test != data and sets.found(test, root)]
        return tests + [("zeroshot", test) for test in [*others, "average"]]
    return tests if name == "told" else tests + [("linear", data), ("finetune", data)]


def results(out):
    """A run folder -> {(task, set): per cent} of the last checkpoint, and each task's average."""
    path = Path(out, "results.json")
    tasks = json.loads(path.read_text(encoding="utf-8"))["checkpoint.pt"] if path.exists() else {}
    found = {}
    for task in WORDS.keys() & tasks.keys():
        found |= {(task, test): values[sets.metric(test)] for test, values in tasks[task].items()}
        found[task, "average"] = statistics.mean(found[task, test] for test in tasks[task])
    return found


def missing(out, words, wanted):
    """-> those of the wanted [(task, set)] that a run lacks; without language zero-shot is not wanted."""
    language = slip.METHODS[flags.arguments("").parse_args(words).method][0]
    there = [*results(out), ("zeroshot", "average")]
    return [test for test in wanted if test not in there and (language or test[0] != "zeroshot")]


def make(out, words, wanted, args):
    """Train and test a run, but for what is there -> "ends", or in a sentence what went wrong."""
    common = ["--root", args.root] + (["--device", args.device] if args.device else [])
    commands = [[sys.executable, "train.py", *words, "--out", out, *common]]  # resumed, or done at once
    for task, test in missing(out, words, wanted):
        more = SPEC["finetune"].split() + words[-2:] if task == "finetune" else []
        commands.append([sys.executable, f"{task}.py", "--checkpoint", out, "--data", test, *more, *common])
    os.makedirs(out, exist_ok=True)
    try:
        open(f"{out}/lock", "x").close()
    except FileExistsError:
        return f"another table makes it; if none does, delete {out}/lock"
    try:
        with open(f"{out}/screen.txt", "a") as screen:
            for command in commands:
                subprocess.run(command, stdout=screen, stderr=screen, check=True)
        return "ends"
    except subprocess.CalledProcessError:
        return f"{command[1]} failed: see {out}/screen.txt"
    finally:
        os.remove(f"{out}/lock")


def mean_and_deviation(values):
    """Per cent of n seeds -> "82.1 ± 0.5 (3)": mean, standard deviation, n."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})" if values else "-"


def difference(ours, theirs):
    """Two samples -> "+25.1 ± 1.2": difference of the means, its standard error."""
    if min(len(ours), len(theirs)) < 2:
        return "-"
    error = sum(statistics.variance(values) / len(values) for values in (ours, theirs)) ** 0.5
    return f"{statistics.mean(ours) - statistics.mean(theirs):+.1f} ± {error:.1f}"


def table(name, data, wanted, found):
    """The table and its differences in Markdown. `found`: {row: [{(task, set): per cent} of each seed]}."""
    samples = {row: [[seed[t] for seed in found[row] if t in seed] for t in wanted] for row in found}
    pairs = [("SLIP", row) for row in found if row != "SLIP"]
    if "SLIP" not in found:
        pairs = [p for p in zip(TABLES[name][1::2], TABLES[name][::2]) if found.keys() >= set(p)]
    head = [f"{name}, {data}: mean ± deviation (n)", *(f"{WORDS[task]} {test}" for task, test in wanted)]
    rows = [head, ["---"] * len(head)]
    rows += [[row, *map(mean_and_deviation, samples[row])] for row in found]
    rows += [[f"{a} - {b}, ± standard error", *map(difference, samples[a], samples[b])] for a, b in pairs]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def full(name):
    """The commands of a table at the paper's scale, for eight GPUs, as text."""
    scale = dict(data=["yfcc15m"], models=["vit_b16"], rows=TABLES[name], lengths=[1])
    lines = []
    for data, model, row, length in itertools.product(*(scale | SPEC["full"].get(name, {})).values()):
        epochs = round(SPEC["epochs"][data] * length * SPEC["lengths"].get(row, 1))
        words = f"--data {data} --model {model} {ROWS[row].format(data=data)} --epochs {epochs}"
        lines.append(f"torchrun --nproc_per_node=8 train.py {words} --out runs/{slug(words)}")
    return "\n".join(lines + SPEC["full_tests"])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train and test what a table of the paper compares.")
    add = parser.add_argument
    add("name", choices=TABLES, metavar="TABLE", help="%(choices)s")
    add("--data", default="scenes", help="labelled set to compare on (default: %(default)s)")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help="these rows only (default: the table's)")
    add("--with", dest="more", default="", metavar="FLAGS", help="more flags of train.py for every row")
    add("--seeds", type=console.positive_int, default=3, help="runs of each row (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--device", help="as in train.py (default: the best at hand)")
    add("--full", action="store_true", help="print the commands at the paper's scale instead")
    args = parser.parse_args(argv)
    if args.full:
        return print(full(args.name))
    if not sets.found(args.data, args.root):
        console.fail(parser, f"no labelled set {args.data}: {sets.how_to_get(args.data, args.root)}")
    rows, seeds = args.rows or TABLES[args.name], range(args.seeds)
    wanted = columns(args.name, args.data, args.root)
    plans = {(row, seed): plan(args.data, row, seed, args.more) for seed in seeds for row in rows}
    todo = [planned for planned in plans.values() if missing(*planned, wanted)]
    ended, start = [], time.monotonic()
    for out, words in todo:
        print(f"{out}: starts", flush=True)
        ended.append(make(out, words, wanted, args))
        left = (time.monotonic() - start) / len(ended) * (len(todo) - len(ended)) / 60
        print(f"{out}: {ended[-1]}; about {left:.0f} minutes left for the table", flush=True)
    found = {row: [results(plans[row, seed][0]) for seed in seeds] for row in rows}
    print("", table(args.name, args.data, wanted, found), "", *SPEC["paper"], sep="\n")
    return 0 if set(ended) <= {"ends"} else 1


if __name__ == "__main__":
    sys.exit(console.guarded(main))
