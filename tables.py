"""The paper's comparisons in miniature: trains what a table compares, tests it, prints the table.

    python tables.py scenes --jobs 2            # CLIP, its control, SimCLR, SLIP; three seeds
    python tables.py fashionmnist --root data   # captions for 1,000 pictures, self-supervision on all 60,000

Paper: tables 1 and 3. Each row is trained for the same number of steps; each run is a folder of runs/tables/,
and one that is done is not done again.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import ranks
import slip

ROWS = {  # row of the table: flags of train.py
    "CLIP": ["--method", "clip"],
    "CLIP + SimCLR's augmentation": ["--method", "clip", "--clip-aug", "simclr"],
    "SimCLR": ["--method", "simclr"],
    "SLIP": ["--method", "slip"],
}
TABLES = {  # name: (flags of train.py, zero-shot tasks, linear tasks)
    "scenes": (["--data", "scenes"], ["scenes", "scenes-heldout"], ["scenes", "scenes-texture"]),
    "scenes-few": (
        ["--data", "scenes", "--captions", "1000"],
        ["scenes", "scenes-heldout"],
        ["scenes", "scenes-texture"],
    ),
    "fashionmnist": (
        ["--data", "fashionmnist", "--captions", "1000", "--max-steps", "600"],
        ["fashionmnist"],
        ["fashionmnist"],
    ),
}


def train(name, row, seed, args):
    """One run, in a process of its own so that runs side by side do not share threads; returns its folder."""
    flags, _, _ = TABLES[name]
    out = os.path.join("runs", "tables", name, f"{row.replace(' ', '-').lower()}-{seed}")
    if not os.path.exists(os.path.join(out, "results.json")):
        command = [sys.executable, "train.py", *flags, *ROWS[row], "--seed", str(seed), "--out", out]
        command += ["--root", args.root, "--workers", "0"]
        os.makedirs(out, exist_ok=True)
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
        with open(os.path.join(out, "screen.txt"), "w") as screen:
            subprocess.run(command, check=True, env=env, stdout=screen, stderr=screen)
        measure = [sys.executable, "tables.py", name, "--measure", out, "--root", args.root]
        subprocess.run(measure, check=True, env=env)
        print(f"done: {row}, seed {seed}", flush=True)
    return out


def measure(name, out, root):
    """Zero-shot and linear accuracy of the last checkpoint of a run, written to results.json."""
    import linear
    import sets
    import zeroshot

    device = ranks.start()
    model = slip.load(os.path.join(out, "checkpoint.pt")).to(device)
    _, tasks, probes = TABLES[name]
    results = {}
    for task in tasks if model.text is not None else []:
        source = sets.open_source(task, root, "test")
        results[f"zero-shot {task}"] = zeroshot.evaluate(model, source, device)["top1"]
    for task in probes:
        results[f"linear {task}"] = linear.evaluate(model, *sets.labelled(task, root), device)[0]["top1"]
    with open(os.path.join(out, "results.json.tmp"), "w") as file:
        json.dump(results, file)
    os.replace(os.path.join(out, "results.json.tmp"), os.path.join(out, "results.json"))


def show(name, found):
    """The table in Markdown: mean and standard deviation over the seeds, per cent."""
    _, tasks, probes = TABLES[name]
    columns = [f"zero-shot {task}" for task in tasks] + [f"linear {task}" for task in probes]
    print("| | " + " | ".join(columns) + " |\n|" + " --- |" * (len(columns) + 1))
    for row, results in found.items():
        cells = []
        for column in columns:
            values = [result[column] for result in results if column in result]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        print(f"| {row} | " + " | ".join(cells) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Train and test what a table of the paper compares.")
    parser.add_argument("name", choices=TABLES, help="which table")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: %(default)s)")
    parser.add_argument("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    parser.add_argument("--measure", metavar="OUT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        parser.error(f"found --seeds {args.seeds} --jobs {args.jobs}, expected 1 or more")
    if args.measure:
        return measure(args.name, args.measure, args.root)
    with ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(row, seed) for seed in range(args.seeds) for row in ROWS]
        outs = pool.map(lambda pair: train(args.name, *pair, args), pairs)
        found = {row: [] for row in ROWS}
        for (row, _), out in zip(pairs, outs):
            with open(os.path.join(out, "results.json")) as file:
                found[row].append(json.load(file))
    show(args.name, found)


if __name__ == "__main__":
    main()
