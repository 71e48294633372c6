"""The paper's comparisons in miniature: train the rows of a table, test each three ways, print the table.

    python tables.py main                                 # CLIP, two controls, SimCLR and SLIP on the scenes
    python tables.py ssl-frameworks --data fashionmnist --jobs 2 --seeds 5
    python tables.py augmentation --with="--max-steps 600" --rows CLIP SLIP
    python tables.py main --full                          # the commands at the paper's scale, to copy

Paper: zero-shot transfer, linear classification, fine-tuning, the ablations. A row is flags of train.py
(tables.json); a run, a row with a seed, is a folder runs/tables/DATA/ROW-SEED that all tables share.
"""

import argparse
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import console
import device
import flags
import run
import sets
import slip

SPEC = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
ROWS, TABLES = SPEC["rows"], SPEC["tables"]
FINETUNE_STEPS = 600  # enough to pass the linear probe
WORDS = {"zeroshot": "zero-shot", "linear": "linear", "finetune": "fine-tuned"}
STARTED = []  # processes, which are stopped with this one


def slug(words):
    return re.sub("[^a-z0-9.]+", "-", words.lower()).strip("-")


def train_args(words):
    return flags.arguments("").parse_args(words)  # an unknown flag ends the command with code 2


def plan(data, row, seed, more=""):
    """-> (folder of a run, words of train.py's command line). The flags `more` have a folder of their own."""
    common = f"--data {data} {SPEC['flags'].get(data, '--max-steps 400')} {more}"
    steps = round(train_args(common.split()).max_steps * SPEC["lengths"].get(row, 1))
    words = f"{common} {ROWS[row].format(data=data)} --max-steps {steps} --seed {seed}".split()
    return os.path.join("runs", "tables", slug(f"{data} {more}"), f"{slug(row)}-{seed}"), words


def columns(name, data, root="data"):
    """-> [(task, set)] that a table shows; of `transfer` the labelled sets under `root` and their average."""
    zeroshot, linear = SPEC["tests"].get(data, ([data], [data]))
    if name == "transfer":
        found = [other for other in sets.names(root) if sets.found(other, root)]
        return [("zeroshot", test) for test in dict.fromkeys([*zeroshot, *found, "average"])]
    tests = [("linear", test) for test in linear] + [("finetune", data)]
    return tests if name == "uncurated" else [("zeroshot", test) for test in zeroshot] + tests


def results(out):
    """A run folder -> {(task, set): per cent} of the last checkpoint, and zero-shot's average."""
    path = Path(out) / "results.json"
    tasks = json.loads(path.read_text(encoding="utf-8")).get(run.CHECKPOINT, {}) if path.exists() else {}
    found = {(t, test): tasks[t][test] for t in WORDS if t in tasks for test in tasks[t]}
    found = {key: values.get(sets.metric(key[1]), values["top1"]) for key, values in found.items()}
    if "zeroshot" in tasks:
        found["zeroshot", "average"] = statistics.mean(found["zeroshot", test] for test in tasks["zeroshot"])
    return found


def missing(out, words, wanted):
    """-> those of the wanted [(task, set)] that a run lacks; without language it lacks no zero-shot."""
    language = slip.METHODS[train_args(words).method][0]
    return [test for test in wanted if test not in results(out) and (language or test[0] != "zeroshot")]


def make(out, words, wanted, args):
    """Train and test a run, but for what is there. Raises ValueError with one sentence."""
    os.makedirs(out, exist_ok=True)
    lock, common = os.path.join(out, "lock"), ["--root", args.root]
    common += ["--device", args.device] if args.device else []
    try:
        open(lock, "x").close()
    except FileExistsError:
        since = time.ctime(os.path.getmtime(lock))
        raise ValueError(f"another table makes it since {since}; if none does, delete {lock}") from None
    try:
        print(f"{out}: starts", flush=True)
        call(["train.py", *words, "--out", out, *common], out, args.jobs)  # resumed, or done at once
        for task, test in wanted:
            command = [f"{task}.py", "--checkpoint", out, "--data", test, *common]
            if task == "finetune":
                command += ["--max-steps", str(FINETUNE_STEPS), "--out", os.path.join(out, task), *words[-2:]]
            if missing(out, words, [(task, test)]):
                call(command, out, args.jobs)
    finally:
        os.remove(lock)


def call(words, out, jobs):
    """One command to its end, its output in OUT/screen.txt; ValueError with its last line if it fails."""
    path = os.path.join(out, "screen.txt")
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, device.cpus() // jobs))}
    with open(path, "a+", encoding="utf-8", errors="replace") as screen:
        process = subprocess.Popen([sys.executable, *words], stdout=screen, stderr=screen, env=environment)
        STARTED.append(process)
        if process.wait():
            screen.seek(0)
            raise ValueError(f"{words[0]} failed: {screen.read().strip().splitlines()[-1:]} ({path})")


def mean_and_deviation(values):
    """Per cent of n seeds -> "82.1 ± 0.5 (3)": mean, standard deviation, n."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation} ({len(values)})" if values else "-"


def difference(ours, theirs):
    """Two samples -> "+25.1 ± 1.2": difference of the means, its standard error (from two values each)."""
    if not ours or not theirs:
        return "-"
    delta = f"{statistics.mean(ours) - statistics.mean(theirs):+.1f}"
    if min(len(ours), len(theirs)) < 2:
        return delta
    return f"{delta} ± {math.sqrt(sum(statistics.variance(x) / len(x) for x in (ours, theirs))):.1f}"


def table(name, data, wanted, found):
    """The table and its differences in Markdown. `found`: {row: [{(task, set): per cent} of each seed]}."""
    samples = {row: [[seed[t] for seed in found[row] if t in seed] for t in wanted] for row in found}
    pairs = [("SLIP", row) for row in found if row != "SLIP"]
    if "SLIP" not in found:
        pairs = [p for p in zip(TABLES[name][1::2], TABLES[name][::2]) if found.keys() >= set(p)]
    rows = [[f"{name}, {data}: mean ± deviation (n)", *(f"{WORDS[task]} {test}" for task, test in wanted)]]
    rows += [["---"] * len(rows[0])]
    rows += [[row, *map(mean_and_deviation, samples[row])] for row in found]
    rows += [["**difference ± standard error**", *[""] * len(wanted)]]
    rows += [[f"{a} - {b}", *map(difference, samples[a], samples[b])] for a, b in pairs]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    if name == "transfer" and pairs:
        wins = [cell[0] == "+" for cell in rows[-1][1:-1] if cell != "-"]
        lines.append(f"\nSLIP wins on {sum(wins)} of {len(wins)} sets.")
    return "\n".join(lines)


def full(name):
    """The commands of a table at the paper's scale, for eight GPUs, as text."""
    scale = dict(data=["yfcc15m"], models=["vit_b16"], rows=TABLES[name], lengths=[1])
    start, lines, tests = "torchrun --nproc_per_node=8", [], "all" if name == "transfer" else "imagenet"
    for data, model, row, length in itertools.product(*(scale | SPEC["full"].get(name, {})).values()):
        epochs = round(SPEC["epochs"][data] * length * SPEC["lengths"].get(row, 1))
        words = f"--data {data} --model {model} {ROWS[row].format(data=data)} --epochs {epochs}"
        lines.append(f"{start} train.py {words} --out runs/full/{data}-{model}-{slug(row)}-{epochs}")
    lines.append("# and for each of them, OUT its folder (zeroshot.py not for a method without language):")
    for test in (f"zeroshot.py --data {tests}", "linear.py --recipe sgd --data imagenet", "finetune.py"):
        lines.append(f"{start} {test} --checkpoint OUT")
    return "\n".join(lines)


def arguments():
    parser = argparse.ArgumentParser(description="Train and test what a table of the paper compares.")
    add = parser.add_argument
    add("name", choices=TABLES, help="which table")
    add("--data", default="scenes", help="labelled sets to compare on, by commas (default: %(default)s)")
    add("--rows", nargs="+", choices=ROWS, metavar="ROW", help="these rows only (default: the table's)")
    add("--with", dest="more", default="", metavar="FLAGS", help="more flags of train.py for every row")
    add("--seeds", type=console.positive_int, default=3, help="runs of each row (default: %(default)s)")
    add("--jobs", type=console.positive_int, default=1, help="runs side by side (default: %(default)s)")
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--device", help="as in train.py (default: the best at hand)")
    add("--full", action="store_true", help="print the commands at the paper's scale instead")
    return parser


def main(argv=None):
    args = arguments().parse_args(argv)
    if args.full:
        print(full(args.name))
        return 0
    names, rows, seeds = args.data.split(","), args.rows or TABLES[args.name], range(args.seeds)
    wanted = {data: columns(args.name, data, args.root) for data in names}
    plans = {key: plan(*key, args.more) for key in itertools.product(names, rows, seeds)}
    todo = [key for key in plans if missing(*plans[key], wanted[key[0]])]
    todo.sort(key=lambda key: key[2])  # every row of a seed before the next seed
    ended, start = [], time.monotonic()

    def work(key):
        sentence = "ends"
        try:
            make(*plans[key], wanted[key[0]], args)
        except ValueError as error:
            sentence = error
        ended.append(key)
        left = (time.monotonic() - start) / len(ended) * (len(todo) - len(ended)) / 60
        print(f"{plans[key][0]}: {sentence}; about {left:.0f} minutes left for the table", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(work, todo))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in STARTED:
                process.terminate()
            print("stopped; what was trained is kept, and the same line goes on")
            return 143
    for data in names:
        found = {row: [results(plans[data, row, seed][0]) for seed in seeds] for row in rows}
        print("", table(args.name, data, wanted[data], found), sep="\n")
    print("", *(SPEC["paper"] if args.name in ("main", "datasets") else []), sep="\n")
    return 1 if any(missing(*plans[key], wanted[key[0]]) for key in todo) else 0


if __name__ == "__main__":
    sys.exit(main())
