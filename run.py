"""A run: its folder, log and signals. Pieces that a training loop calls; each command writes its own loop.

The resume policy:
 1. Everything random in a step is a function of (seed, step), and a sample of (seed, epoch, index). So no
    random state is saved. A resumed run is equal bit for bit on one CPU with the same ranks and chunks, and
    equal but for rounding elsewhere.
 2. One checkpoint, written to a temporary name, flushed and renamed. The same line again resumes from it.
 3. The log's rows are kept in the checkpoint, and log.csv is written anew from them: it never runs ahead.
 4. SIGTERM, SIGINT: finish the step, save, leave (SIGKILL loses what came after the last checkpoint);
    another one more than 5 s later leaves at once.
"""

import csv
import dataclasses
import io
import math
import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch

import checkpoints
import ranks
import slip
from console import Live, Stop, show_row
from device import peak_memory

CHECKPOINT, BEST, SKIPPED = "checkpoint.pt", "best.pt", "skipped.txt"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal while the only rank waits for images; `except Exception` in a reader must not catch it."""


def open_run(settings, free, columns):
    """The run of the folder settings.out, resumed if its checkpoint is there. `settings`: a dataclass of
    plain data with out, seed, steps, epoch_steps, batch_size; it must be that of the checkpoint but for the
    names in `free`. `columns`: of the log. Raises ValueError or OSError."""
    out, args, state = settings.out, dataclasses.asdict(settings), None
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, CHECKPOINT)
    if os.path.exists(path):
        state = checkpoints.read_checkpoint(path)
        if "optimizer" not in (state.get("run") or {}):
            raise ValueError(f"{path} holds a model but no run to resume: choose another --out")
        before = state["run"]["args"]
        changed = [name for name in args if name not in free and before.get(name) != args[name]]
        if changed:
            flags = [f"--{n.replace('_', '-')} was {before.get(n)} and is {args[n]}" for n in changed[:3]]
            raise ValueError(f"{out} holds another run ({', '.join(flags)}): choose another --out")
    steps = ranks.gather(torch.tensor([state["run"]["step"] if state else -1])).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the ranks see different checkpoints in --out {out}: rank 0 that of step {steps[0]}, rank "
            f"{ranks.rank()} that of {steps[ranks.rank()]} (-1: none): choose a folder on a shared disk"
        )
    return Run(settings, args, state, columns)


class Run:
    """What a loop keeps beside the model: numbers for the log, the checkpoint, what a signal asked for."""

    def __init__(self, settings, args, state, columns):
        self.out, self.args, self.state, self.columns = settings.out, args, state, columns
        self.steps, self.epoch_steps = settings.steps, settings.epoch_steps
        self.batch_size = settings.batch_size
        new = dict(step=0, rows=[], sums={}, count=0, best=None, best_step=None, seen=0, bad=0)
        new |= dict(seconds=0.0, points=[])
        saved = state["run"] if state else {}
        self.numbers = {name: saved.get(name, value) for name, value in new.items()}
        self.live, self.caught, self.caught_at, self.waiting = Live(), 0, 0.0, False
        self.skipped, self.speed, self.lr = [], 0.0, 0.0
        self.started, self.resumed_at, self.printed = time.monotonic(), self.step, False
        self.epoch_started, self.epoch_first = self.started, self.step

    @property
    def step(self):
        return self.numbers["step"]

    @property
    def rows(self):
        return self.numbers["rows"]

    @property
    def epoch_ended(self):
        """Whether an epoch's steps are done and its row is not yet written (stopped during evaluation)."""
        return self.numbers["count"] > 0 and (self.step % self.epoch_steps == 0 or self.step == self.steps)

    def batches(self, loader_for):
        """Yields (step, batch) of the steps that are left, until a signal; loader_for(steps) -> a DataLoader.

        Workers begin with both signals blocked: a signal to the whole process group must not end them before
        the step that is running."""
        before = {number: signal.signal(number, self.note_signal) for number in SIGNALS}
        mask = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
        try:
            mask(signal.SIG_BLOCK, SIGNALS)
            batches = iter(loader_for(range(self.step, self.steps)))
            mask(signal.SIG_UNBLOCK, SIGNALS)
            for step in range(self.step, self.steps):
                if self.caught:
                    return
                self.waiting = ranks.world() == 1  # several ranks agree at the end of a step
                batch = next(batches)
                self.waiting = False
                self.skipped = batch.pop("skipped", [])
                torch.manual_seed(self.args["seed"] * 1_000_003 + step)
                yield step, batch
        except Interrupted:
            return
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note_signal(self, number, frame):
        now = time.monotonic()
        if self.caught and now - self.caught_at > 5:  # torchrun repeats the first signal at once
            os._exit(128 + number)
        self.caught, self.caught_at = number, now
        if self.waiting:
            raise Interrupted

    def check_finite(self, stats, lr):
        """Raises Stop, before the optimizer's step, if the loss or the gradient is not finite."""
        if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
            path = os.path.join(self.out, CHECKPOINT)
            kept = f"the last good checkpoint is {path}" if os.path.exists(path) else "none was saved yet"
            raise Stop(
                f"loss {stats['loss']} with gradient norm {stats['grad_norm']} at step {self.step + 1}, "
                f"learning rate {lr:.2g}: stopped; {kept}; try a lower --lr or --clip-grad 1"
            )

    def record(self, stats, lr, bad_share=0.05):
        """After the optimizer's step: add the stats to the epoch's means, count bad images, show the line."""
        numbers, self.lr = self.numbers, lr
        numbers["step"], numbers["count"] = self.step + 1, numbers["count"] + 1
        for name, value in stats.items():
            numbers["sums"][name] = numbers["sums"].get(name, 0.0) + value
        if self.step % max(1, self.steps // 200) == 0:
            numbers["points"].append((self.step, stats["loss"]))
        if self.skipped:
            with open(os.path.join(self.out, SKIPPED), "a", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{name}\n" for name in self.skipped)
        bad, caught = ranks.total(torch.tensor([len(self.skipped), self.caught])).tolist()  # one for both
        self.caught = self.caught or min(caught, signal.SIGTERM)  # a sum over the ranks
        numbers["seen"], numbers["bad"] = numbers["seen"] + self.batch_size, numbers["bad"] + bad
        often = numbers["bad"] > bad_share * numbers["seen"] and numbers["seen"] >= 20 * self.batch_size
        if often or bad > self.batch_size / 2:
            what = f"{numbers['bad']} of {numbers['seen']} images" if often else f"{bad} images of one step"
            raise Stop(f"{what} cannot be read: see {os.path.join(self.out, SKIPPED)}")
        now = time.monotonic()
        self.speed = (self.step - self.epoch_first) * self.batch_size / (now - self.epoch_started)  # images/s
        left = (now - self.started) / (self.step - self.resumed_at) * (self.steps - self.step)
        shown = "  ".join(f"{name} {value:.3g}" for name, value in (stats | {"lr": lr}).items())
        left = timedelta(seconds=round(left))
        self.live.show(f"{self.step}/{self.steps}  {left} left  {self.speed:.0f} images/s  {shown}")

    def end_epoch(self, measured, score, model, hidden=()):
        """A row of the log: the epoch's means and what was measured. best.pt, if `score` is the best yet."""
        numbers = self.numbers
        means = {name: value / numbers["count"] for name, value in numbers["sums"].items()}
        means |= {"epoch": -(-self.step // self.epoch_steps), "step": self.step}
        means |= {"images_per_s": self.speed, "lr": self.lr}
        row = {name: (means | measured).get(name, "") for name in self.columns}
        numbers |= {"rows": [*self.rows, row], "sums": {}, "count": 0}
        self.live.clear()
        show_row({name: value for name, value in row.items() if name not in hidden}, not self.printed)
        self.printed, self.epoch_started, self.epoch_first = True, time.monotonic(), self.step
        if score is not None and (numbers["best"] is None or score > numbers["best"]):
            numbers |= {"best": score, "best_step": self.step}
            self.write(BEST, lambda path: slip.save(path, ranks.unwrap(model), self.summary()))

    def summary(self):
        """What a checkpoint says of its run, as plain data."""
        seconds = self.numbers["seconds"] + time.monotonic() - self.started
        cost = {"hours": seconds / 3600, "images_per_s": self.step * self.batch_size / seconds}
        cost["peak_memory_gib"] = peak_memory() / 2**30
        about = {"args": self.args, "cost": cost, "seconds": seconds, "torch": str(torch.__version__)}
        return self.numbers | about | {"date": time.strftime("%Y-%m-%d %H:%M:%S")}

    def save(self, model, optimizer):
        """checkpoint.pt and log.csv."""
        run = self.summary() | {"optimizer": optimizer.state_dict()}
        self.write(CHECKPOINT, lambda path: slip.save(path, ranks.unwrap(model), run))
        self.write("log.csv", lambda path: checkpoints.atomic_save(as_csv(self.columns, self.rows), path))

    def write(self, name, writer):
        """Rank 0 calls writer(path), which writes and renames; a full disk raises Stop; the old one stays."""
        path = os.path.join(self.out, name)
        try:
            if ranks.rank() == 0:
                writer(path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            Path(f"{path}.tmp").unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise Stop(f"cannot write {path}, the previous file is intact: {reason}") from None

    def finish(self, model, optimizer):
        """After the loop. Raises Stop, with all saved, if a signal ended it early."""
        self.live.clear()
        if self.caught and self.step < self.steps:
            self.save(model, optimizer)
            sentence = f"stopped by a signal after step {self.step}, saved: the same line resumes from here"
            raise Stop(sentence, 128 + self.caught)


def length(args, values, images, most=0.1):
    """-> {batch_size, epoch_steps, steps, warmup_steps} of a run over so many images: as typed (`args`), else
    by the recipe (`values`), its warm-up at most the share `most` of the steps. Raises ValueError."""
    world = ranks.world()
    batch = args.batch_size or min(values["batch_size"], images // world * world)
    if not 0 < batch <= images or batch % world:
        raise ValueError(
            f"found --batch-size {batch}, expected at most the {images} images, a multiple of {world} ranks"
        )
    epoch_steps = images // batch
    steps = args.max_steps or values["epochs"] * epoch_steps
    warmup = values["warmup_epochs"] * epoch_steps
    if args.warmup_epochs is None:
        warmup = min(warmup, most * steps)
    elif warmup > steps:
        typed = f"--warmup-epochs {args.warmup_epochs:g}"
        raise ValueError(f"{typed} are {warmup:g} steps of {steps}: type fewer")
    return dict(batch_size=batch, epoch_steps=epoch_steps, steps=steps, warmup_steps=warmup)


def as_csv(columns, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
