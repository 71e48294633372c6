"""The paper's comparisons in miniature: trains what a table compares, tests it three ways, prints the table.

    python tables.py main                                 # CLIP, a control, SimCLR, SLIP on the scenes
    python tables.py ssl-frameworks --data fashionmnist --jobs 2
    python tables.py augmentation --data fashionmnist --with="--max-steps 1200" --rows CLIP SLIP
    python tables.py main --full                          # the commands of the real thing, to copy

Paper: section 4 (main, datasets) and the ablations of section 5. Every row is trained for the same number of
steps. A run is a folder of runs/tables/DATA/, shared by all tables; what is done is not done again.
"""

import argparse
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import loop
import ranks
import slip

RUNS = {  # row of a table: flags of train.py
    "CLIP": "--method clip",
    "CLIP + SimCLR's augmentation": "--method clip --clip-aug simclr",
    "CLIP, two views": "--method clip --clip-views 2",
    "CLIP + SimCLR's augmentation, two views": "--method clip --clip-aug simclr --clip-views 2",
    "SimCLR": "--method simclr",
    "SLIP": "--method slip",
    "SLIP (MoCo v3)": "--method slip-mocov3",
    "SLIP (BYOL)": "--method slip-byol",
    "SLIP (BEiT)": "--method slip-beit",
    "SLIP-decoupled": "--method slip --ssl-data {data}",
    "SLIP, scale 0.3": "--method slip --ssl-scale 0.3",
    "SLIP, scale 2": "--method slip --ssl-scale 2",
}
AUGMENTED = ["CLIP + SimCLR's augmentation", "CLIP, two views", "CLIP + SimCLR's augmentation, two views"]
PARTNERS = ["SLIP", "SLIP (MoCo v3)", "SLIP (BYOL)", "SLIP (BEiT)"]
TABLES = {  # name: its rows
    "main": ["CLIP", AUGMENTED[0], "SimCLR", "SLIP"],
    "ssl-frameworks": ["CLIP", *PARTNERS],
    "augmentation": ["CLIP", *AUGMENTED, "SLIP"],
    "decoupled": ["CLIP", "SLIP", "SLIP-decoupled"],
    "scale": ["CLIP", "SLIP, scale 0.3", "SLIP", "SLIP, scale 2"],
    "datasets": ["CLIP", "SLIP"],
}
PAPER = {  # ImageNet, ViT-B/16: zero-shot, linear, fine-tuned; the ablations' figures could not be verified
    "main": {
        "CLIP, YFCC15M, 25 epochs": ("37.6", "66.5", "80.5"),
        "SimCLR": ("-", "64.0", "82.5"),
        "SLIP": ("42.8", "72.1", "82.6"),
    },
    "datasets": {
        "CLIP, CC3M, 40 epochs": ("17.1", "53.3", "79.5"),
        "SLIP, CC3M": ("23.0", "65.4", "81.4"),
        "CLIP, CC12M, 35 epochs": ("36.5", "69.0", "82.1"),
        "SLIP, CC12M": ("40.7", "73.7", "83.1"),
        "CLIP, YFCC15M, 25 epochs": ("37.6", "66.5", "80.5"),
        "SLIP, YFCC15M": ("42.8", "72.1", "82.6"),
    },
}


@dataclass(frozen=True)
class Miniature:
    """A set to compare on: flags of train.py, and the sets of the three test tasks."""

    flags: str
    zeroshot: tuple
    linear: tuple
    finetune: str


MINIATURES = {
    "scenes": Miniature("", ("scenes", "scenes-heldout"), ("scenes", "scenes-texture"), "scenes"),
    "fashionmnist": Miniature(
        "--captions 1000 --max-steps 600", ("fashionmnist",), ("fashionmnist",), "fashionmnist"
    ),
}
# Any other labelled set: small pictures, a small tower, the settings of the sets above.
OTHER = (
    "--model vit_tiny --image-size 32 --vocab train --batch-size 64 --lr 1e-3 --wd 0.1 --strong-crop 0.3 "
    "--max-steps 400"
)
FINETUNE_STEPS = 300  # a third of an epoch of Fashion-MNIST
# Labelled pictures for the linear probe, at most: the features of all take longer than training.
PROBE = 10_000


def miniature(data):
    return MINIATURES.get(data) or Miniature(OTHER, (data,), (data,), data)


def slug(row):
    return re.sub("[^a-z0-9.]+", "-", row.lower()).strip("-")


def folder(data, row, seed, flags=""):
    """Flags typed by --with have a folder of their own."""
    return os.path.join("runs", "tables", "-".join(filter(None, [data, slug(flags)])), f"{slug(row)}-{seed}")


def settings(data, row, seed, flags=""):
    """What makes a result: train.py's flags, in which the last word counts, and what the tests take."""
    line = f"--data {data} {miniature(data).flags} {flags} {RUNS[row].format(data=data)} --seed {seed}"
    return " ".join(line.split()), f"fine-tuned for {FINETUNE_STEPS} steps, linear on {PROBE} pictures"


def results(out):
    path = os.path.join(out, "results.json")
    if not os.path.exists(path):
        return {}
    with open(path) as file:
        return json.load(file)


# Processes that are stopped with this one (the same line, typed again, would meet them), and that it is so.
RUNNING, STOPPED = set(), threading.Event()


def train(data, row, seed, args):
    """One row, one seed: trained and tested in processes of their own, so that runs side by side do not share
    threads; what is done already is left out. Returns {column: per cent}, without what has failed.
    """
    out, mini = folder(data, row, seed, args.flags), miniature(data)
    made_by = settings(data, row, seed, args.flags)
    os.makedirs(out, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    common = ["--root", args.root, "--workers", "0"]

    def run(*flags):
        with open(os.path.join(out, "screen.txt"), "a") as screen:
            command = [sys.executable, *flags, *common]
            process = subprocess.Popen(command, env=env, stdout=screen, stderr=screen)
        RUNNING.add(process)
        if STOPPED.is_set():  # meanwhile
            process.terminate()
        code = process.wait()
        RUNNING.discard(process)
        if code or STOPPED.is_set():
            raise subprocess.CalledProcessError(code, command)

    checkpoint, tuned = os.path.join(out, "checkpoint.pt"), os.path.join(out, "finetune")
    done = results(out)
    if done:
        return done
    try:
        loop.write_text(os.path.join(out, "settings.txt"), "; ".join(made_by) + "\n")
        run("train.py", *made_by[0].split(), "--out", out)
        flags = f"--data {mini.finetune} --max-steps {FINETUNE_STEPS} --seed {seed}".split()
        run("finetune.py", "--checkpoint", checkpoint, *flags, "--out", tuned)
        run("tables.py", "main", "--data", data, "--measure", out)
        print(f"done: {row} on {data}, seed {seed}", flush=True)
    except subprocess.CalledProcessError as error:
        word = "stopped" if STOPPED.is_set() else "failed"
        with open(os.path.join(out, "screen.txt"), errors="replace") as screen:
            last = screen.read().strip().rpartition("\n")[2]
        print(f"{word}: {error.cmd[1]} for {row} on {data}, seed {seed}: {last} ({screen.name})", flush=True)
    return results(out)


def measure(name, out, root):
    """Zero-shot and linear accuracy of a run's last checkpoint, with what fine-tuning's log says, in
    results.json.
    """
    import data
    import linear
    import sets
    import zeroshot

    device, mini = ranks.start(), miniature(name)
    model = slip.load(os.path.join(out, "checkpoint.pt")).to(device)
    found = {}
    for task in mini.zeroshot if model.text is not None else []:
        source = sets.open_source(task, root, "test")
        found[f"zero-shot {task}"] = zeroshot.evaluate(model, source, device)["top1"]
    for task in mini.linear:
        train, test = sets.labelled(task, root)
        train = data.part(train, data.permutation(len(train), 0, 0)[:PROBE])
        found[f"linear {task}"] = linear.evaluate(model, train, test, device)[0]["top1"]
    with open(os.path.join(out, "finetune", "log.csv")) as file:
        found[f"fine-tuned {mini.finetune}"] = float(list(csv.DictReader(file))[-1]["top1"])
    loop.write_text(os.path.join(out, "results.json"), json.dumps(found))


def show(name, data, found):
    """The table in Markdown: mean and standard deviation over the seeds, per cent."""
    mini = miniature(data)
    columns = [f"zero-shot {task}" for task in mini.zeroshot] + [f"linear {task}" for task in mini.linear]
    columns.append(f"fine-tuned {mini.finetune}")
    print(f"\n| {name} | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for row, runs in found.items():
        cells = []
        for column in columns:
            values = [result[column] for result in runs if column in result]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            few = f" (n = {len(values)})" if len(values) < len(runs) else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}{few}" if values else "-")
        print(f"| {row} | " + " | ".join(cells) + " |")


def show_paper(name):
    print("\n| the paper, ImageNet, ViT-B/16 | zero-shot | linear | fine-tuned |\n|" + " --- |" * 4)
    for row, figures in PAPER[name].items():
        print(f"| {row} | " + " | ".join(figures) + " |")


def full(name):
    """The commands of a table at the paper's scale, for eight GPUs; of main also every size and schedule."""
    sizes = ["vit_s16", "vit_b16", "vit_l16"] if name == "main" else ["vit_b16"]
    longer = [(row, length) for row in ("CLIP", "SLIP") for length in (50, 100)] if name == "main" else []
    for data in ["cc3m", "cc12m", "yfcc15m"] if name == "datasets" else ["yfcc15m"]:
        epochs = {"cc3m": 40, "cc12m": 35}.get(data, 25)
        for size in sizes:
            for row, length in [*((row, epochs) for row in TABLES[name]), *longer]:
                out = f"runs/full/{data}-{size}-{slug(row)}-{length}"
                what = f"--data {data} --model {size} {RUNS[row].format(data=data)} --epochs {length}"
                what += " --visual-tokenizer DALLE.pt" if row == "SLIP (BEiT)" else ""
                print(f"torchrun --nproc_per_node=8 train.py {what} --out {out}")
    print("# and for each of them, OUT its folder (zeroshot.py not for SimCLR):")
    for test in ("zeroshot.py", "linear.py --recipe sgd", "finetune.py"):
        print(f"torchrun --nproc_per_node=8 {test} --checkpoint OUT/checkpoint.pt --data imagenet")


def arguments():
    parser = argparse.ArgumentParser(
        description="Train and test what a table of the paper compares, in miniature.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="rows:\n" + "\n".join(f"  {name}: {'; '.join(rows)}" for name, rows in TABLES.items()),
    )
    parser.add_argument("name", choices=TABLES, help="which table")
    parser.add_argument(
        "--data",
        help="labelled sets to compare on, by commas (default: scenes; of datasets: scenes,fashionmnist)",
    )
    parser.add_argument(
        "--rows", nargs="+", choices=RUNS, metavar="ROW", help="these rows only (default: the table's)"
    )
    parser.add_argument(
        "--with",
        dest="flags",
        default="",
        metavar="FLAGS",
        help='more flags of train.py for every row, as in --with="--max-steps 1200"; a folder of their own',
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    parser.add_argument("--full", action="store_true", help="print the commands of the paper's scale instead")
    parser.add_argument("--workers", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="OUT", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    if args.full:
        return full(args.name)
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"found --seeds {args.seeds} --jobs {args.jobs}, expected 1 or more")
    if args.measure:
        return measure(args.data, args.measure, args.root)
    names = args.data or ("scenes,fashionmnist" if args.name == "datasets" else "scenes")
    names, rows = list(dict.fromkeys(names.split(","))), args.rows or TABLES[args.name]
    wanted = [(data, row, seed) for seed in range(args.seeds) for data in names for row in rows]
    try:
        few = [data for data in names if "--captions" in miniature(data).flags]
        if args.name == "decoupled" and few and "--captions" not in args.flags:
            raise ValueError(
                f"{few[0]} has few captions here, so SLIP is decoupled already: type another --data, or give "
                'all pictures a caption, --with="--captions 0"'
            )
        check(names, args.root)
        for run in wanted:
            check_settings(folder(*run, args.flags), "; ".join(settings(*run, args.flags)))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(args.jobs)
    try:
        done = dict(zip(wanted, pool.map(lambda run: train(*run, args), wanted), strict=True))
    except KeyboardInterrupt:
        STOPPED.set()
        for process in list(RUNNING):
            process.terminate()
        pool.shutdown(cancel_futures=True)
        print("stopped, saved: the same line goes on from here")
        return 143
    for data in names:
        show(args.name, data, {row: [done[data, row, seed] for seed in range(args.seeds)] for row in rows})
    if args.name in PAPER:
        show_paper(args.name)
    return 0 if all(done.values()) else 1


def check(names, root):
    """Every set is there, before hours are spent on another."""
    import sets

    for data in names:
        for task in miniature(data).zeroshot:
            sets.open_source(task, root, "test")
        for task in (*miniature(data).linear, miniature(data).finetune):
            sets.labelled(task, root)


def check_settings(out, expected):
    """A folder is of the settings that are asked for: no table mixes two."""
    path = os.path.join(out, "settings.txt")
    if os.path.exists(path):
        with open(path) as file:
            found = file.read().strip()
        if found != expected:
            raise ValueError(f"{out} was made by {found!r}, expected {expected!r}: move that folder away")


if __name__ == "__main__":
    sys.exit(main())
