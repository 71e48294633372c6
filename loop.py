"""The loop: steps, the log, the live line, and checkpoints from which a killed run goes on as if nothing
had happened.

Shared by train.py, finetune.py and linear.py, which bring their own model, batches and loss.

    fit(model, optimizer, batches, loss_of, ...): for each step: rate, batch, loss, backward, update, save

The resume policy:
 1. Everything random in a step is a function of (seed, step): samples by (seed, epoch, index), drop path and
    mixup by a generator seeded anew at each step. So a checkpoint's random state is its step. Bit for bit
    that holds on one machine with the same ranks and chunks; with others but for rounding.
 2. A checkpoint is written to a temporary name, flushed, renamed; the one before is kept beside it.
 3. The same line again goes on from the newest whole checkpoint; a torn one is named, the previous one used.
 4. The log's rows are kept in the checkpoint and log.csv is rewritten from them: it never runs ahead.
 5. SIGTERM and SIGINT end the step that is running, save, and leave.
"""

import contextlib
import csv
import io
import math
import os
import signal
import sys
import time

import torch

import ranks
import slip

CHECKPOINT, PREVIOUS, BEST = "checkpoint.pt", "checkpoint.previous.pt", "best.pt"


class Stop(Exception):
    """The run cannot go on; the message is one sentence for the user, `code` the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def resume(out, args, free):
    """The state to go on from in the folder `out`, or None for a new run; made if it is not there.

    `args`: the run's arguments as plain data; they must be those of the checkpoint, except the names in
    `free`. Raises ValueError or OSError with one sentence.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"--out {out} is a file, expected a folder or a new name")
    os.makedirs(out, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"no permission to write in --out {out}: choose another folder")
    for name in (CHECKPOINT, PREVIOUS):
        path = os.path.join(out, name)
        if not os.path.exists(path):
            continue
        try:
            state = slip.read(path)
            if not isinstance(state.get("run"), dict) or "optimizer" not in state["run"]:
                raise ValueError(f"{path} holds a model but no run to go on from")
        except ValueError as error:
            if name == PREVIOUS:
                raise
            if not os.path.exists(os.path.join(out, PREVIOUS)):
                raise ValueError(
                    f"{error}; nothing older is in {out}: choose another --out or remove the file"
                ) from None
            ranks.warn(f"{error}; going on from {PREVIOUS}")
            if ranks.rank() == 0:
                os.replace(path, f"{path}.torn")  # else the next save would put it in place of the whole one
            continue
        then = state["run"]["args"]
        changed = [n for n in args if n not in free and then.get(n) != args[n]]
        if changed:
            told = ", ".join(
                f"--{n.replace('_', '-')} was {then.get(n)} and is {args[n]}" for n in changed[:3]
            )
            raise ValueError(f"{out} holds another run ({told}): choose another --out to start anew")
        return state
    return None


def unwrapped(model):
    return model.module if hasattr(model, "module") else model


def save(out, model, run, keep=True):
    """Rank 0 writes the checkpoint; the one before is kept, unless it is of the same step."""
    if ranks.rank():
        return
    path, previous = os.path.join(out, CHECKPOINT), os.path.join(out, PREVIOUS)
    fresh = f"{path}.new"
    with writing(path, fresh, f"{fresh}.tmp"):
        slip.save(fresh, unwrapped(model), run)
        if keep and os.path.exists(path):
            os.replace(path, previous)
        os.replace(fresh, path)


@contextlib.contextmanager
def writing(path, *leftovers):
    """Turn a full disk while `path` is written into a Stop, and clear up."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        for leftover in leftovers:
            if os.path.lexists(leftover):
                os.remove(leftover)
        reason = f"{error}".splitlines()[0][:100]
        raise Stop(
            f"cannot write {path} ({reason}): the last checkpoint is whole; free some space and start again"
        ) from None


def write_log(out, rows):
    """log.csv, as a whole, atomically."""
    if ranks.rank() or not rows:
        return
    path = os.path.join(out, "log.csv")
    with writing(path, f"{path}.tmp"):
        write_csv(path, list(rows[0]), rows)


def write_csv(path, columns, rows):
    """Rows (dicts) as a CSV of these columns, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path, text):
    """Write to a temporary name and rename: a reader finds the old file or the new one, whole."""
    with open(f"{path}.tmp", "w", newline="", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}.tmp", path)


def guarded(work):
    """Run `work()` -> exit code. What ends a run is one sentence; a bug keeps its traceback."""
    try:
        work()
        return 0
    except Stop as stop:
        sentence, code = str(stop), stop.code
    except RuntimeError as error:
        reason = f"{error}\n".splitlines()[0][:150]
        if "DataLoader worker" in reason:
            sentence = f"a data worker died ({reason}): start the same line again, with fewer --workers"
        elif ranks.world() > 1:
            sentence = f"a rank is gone ({reason}): the same line again goes on from the last checkpoint"
            print(f"\n{sentence}", file=sys.stderr, flush=True)
            ranks.leave(1)  # what is left of the process group may wait on the usual way out
        else:
            raise
        code = 1
    print(f"\n{sentence}", file=sys.stderr, flush=True)
    return code


class Live:
    """One line that is overwritten on a terminal; in a pipe a plain line every `seconds`."""

    def __init__(self, seconds=15):
        self.terminal, self.seconds, self.last = sys.stdout.isatty(), seconds, time.monotonic()

    def show(self, line):
        now = time.monotonic()
        if ranks.rank() or now - self.last < (0.2 if self.terminal else self.seconds):
            return
        self.last = now
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)

    def clear(self):
        if self.terminal and not ranks.rank():
            print("\r\033[K", end="", flush=True)


class Signals:
    """SIGTERM and SIGINT are noted, and obeyed by all ranks at the end of the step."""

    def __enter__(self):
        self.caught, self.before = 0, {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        self.caught = number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def chunk_rows(model, rows, device, views=3):
    """(rows of a chunk, whether activations must be made again): what fits the device, and on a CPU its
    cache. `views`: how many of a row go through the image tower.

    A block keeps about 34 numbers of a token's width for the backward pass (its own arithmetic: qkv,
    attention, MLP). On a CPU, chunks of 16, 8 and 4 pictures of ViT-S/16 took 3.24, 3.46 and 3.81 times one
    view's time for a whole step (bench.py), so none is smaller than these 16 pictures, 3,200 tokens.
    """
    tower = unwrapped(model).visual
    tokens = tower.positions.shape[1]
    bytes_each = tokens * tower.width * len(tower.blocks) * 34 * (2 if device.type == "cuda" else 4) * views
    if device.type == "cuda":
        fits = max(1, int(0.6 * torch.cuda.mem_get_info(device)[0] / bytes_each))
        return min(rows, fits), rows > fits
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    chunks = math.ceil(rows * tokens / 3200)
    return math.ceil(rows / min(rows, chunks)), rows * bytes_each > 0.4 * memory


def plan_chunks(args, model, device, views=3):
    """Set `micro_batch` and `recompute`: what fits the device, unless a smaller chunk was asked for to save
    memory. Returns the words for it.
    """
    share = len(ranks.mine(range(args.batch_size)))
    rows, args.recompute = chunk_rows(model, share, device, views)
    if args.micro_batch and args.micro_batch >= share:
        ranks.warn(f"--micro-batch {args.micro_batch} holds a rank's whole share of {share}: leave it out")
    elif args.micro_batch:
        args.recompute = args.recompute or args.micro_batch < rows
    args.micro_batch = min(args.micro_batch or rows, share)
    chunks = -(-share // args.micro_batch)
    again = ", activations made again in the backward pass" if args.recompute else ""
    return f"batch {args.batch_size} = {ranks.world()} ranks x {chunks} chunks of {args.micro_batch}{again}"


def spell(seconds):
    minutes = int(seconds) // 60
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{int(seconds) % 60:02d}s"


def fit(
    model, optimizer, batches, loss_of, *, out, args, state, steps, epoch_steps, batch_size, columns, rate,
    after_step, after_epoch, save_every=None, clip=None, bad_share=1.0,
):  # fmt: skip
    """Train to `steps`, starting after `state` (of `resume`); returns the rows of the log.

    batches(steps) -> an iterator of the batches of these steps. loss_of(batch) -> (loss, {name: scalar
    tensor}). rate(step) -> learning rate. after_step(step). after_epoch() -> (more columns, score to choose
    the best by or None). `args` are saved with the checkpoint. `bad_share`: a larger share of bad pictures
    ends the run. Raises Stop.
    """
    run = state["run"] if state else dict(step=0, rows=[], sums={}, count=0, best=None, seen=0, bad=0)
    run = {name: value for name, value in run.items() if name != "optimizer"}
    run |= {"args": args, "versions": versions()}
    if state:
        optimizer.load_state_dict(state["run"]["optimizer"])
    first, pace = run["step"], Pace(run["step"], steps, batch_size, args["workers"])

    def checkpoint(keep=True):
        date = time.strftime("%Y-%m-%d %H:%M:%S")
        save(out, model, run | {"optimizer": optimizer.state_dict(), "date": date}, keep)
        write_log(out, run["rows"])

    def end_epoch(done):
        pace.live.clear()
        measured, score = after_epoch()
        measured |= {"epoch": -(-done // epoch_steps), "step": done, "lr": rate(done - 1)}
        add_row(run, columns, measured | {"images_per_s": pace.speed}, first_row=pace.epochs == 0)
        keep_best(out, model, run, score)
        pace.begin_epoch(done)
        checkpoint(keep=False)

    if run["count"] and (first % epoch_steps == 0 or first == steps):
        end_epoch(first)  # which was stopped while it was evaluated
    with Signals() as signals:
        stream = iter(batches(range(first, steps)))
        for step in range(first, steps):
            batch = pace.wait_for(stream)
            count_bad(run, batch.pop("skipped", ()), batch_size, bad_share, out)
            torch.manual_seed(args["seed"] * 1_000_003 + step)
            stats = learn(optimizer, loss_of, batch, rate(step), clip, step, out)
            after_step(step)
            run |= {"step": step + 1, "count": run["count"] + 1}
            for name, value in stats.items():
                run["sums"][name] = run["sums"].get(name, 0.0) + value
            pace.show(step, stats, rate(step))

            ended = (step + 1) % epoch_steps == 0 or step + 1 == steps
            caught = signals.caught if ranks.world() == 1 else int(ranks.total(torch.tensor(signals.caught)))
            if ended or caught or (save_every and (step + 1) % save_every == 0):
                checkpoint()  # before an evaluation, which may be long, or stop
            if ended:
                end_epoch(step + 1)
            if caught and step + 1 < steps:
                pace.live.clear()
                raise Stop(
                    f"stopped by a signal after step {step + 1}, saved: the same line goes on from here", 143
                )
    return run["rows"]


def learn(optimizer, loss_of, batch, lr, clip, step, out):
    """One step of the optimizer -> {name: number}. Weights stay as they were if the loss is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    loss, stats = loss_of(batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stats["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    stats = {"loss": loss.item()} | {name: float(value) for name, value in stats.items()}
    if not (math.isfinite(stats["loss"]) and math.isfinite(stats["grad_norm"])):
        whole, told = os.path.join(out, CHECKPOINT), "no checkpoint was written yet"
        if os.path.exists(whole):
            told = f"the last good checkpoint is {whole}"
        raise Stop(
            f"loss {stats['loss']} with gradient norm {stats['grad_norm']} at step {step + 1}, "
            f"learning rate {lr:.2g}: stopped; {told}; try a lower --lr or --clip-grad 1"
        )
    optimizer.step()
    return stats


def add_row(run, columns, measured, first_row):
    """The means of the epoch and what was measured, as a row of the log, shown."""
    means = {name: value / run["count"] for name, value in run["sums"].items()}
    row = {name: (means | measured).get(name, "") for name in columns}
    row = {n: round(v, 5) if isinstance(v, float) and n != "lr" else v for n, v in row.items()}
    run |= {"rows": [*run["rows"], row], "sums": {}, "count": 0}
    show_row(row, first_row)


def keep_best(out, model, run, score):
    """best.pt, if the score is the highest so far."""
    if score is None or (run["best"] is not None and score <= run["best"]):
        return
    run["best"] = score
    path = os.path.join(out, BEST)
    with writing(path, f"{path}.tmp"):
        if ranks.rank() == 0:
            slip.save(path, unwrapped(model), {"args": run["args"], "step": run["step"]})


class Pace:
    """How fast it goes, what waits for pictures, how much is left: the live line."""

    def __init__(self, first, steps, batch_size, workers):
        self.first, self.steps, self.batch_size, self.workers = first, steps, batch_size, workers
        self.live, self.begun, self.waited, self.told = Live(), time.monotonic(), 0.0, False
        self.speed, self.epochs = 0.0, -1
        self.begin_epoch(first)

    def begin_epoch(self, step):
        self.epoch_begun, self.epoch_first, self.epochs = time.monotonic(), step, self.epochs + 1

    def wait_for(self, stream):
        begun = time.monotonic()
        batch = next(stream)
        self.waited += time.monotonic() - begun
        return batch

    def show(self, step, stats, lr):
        now, done = time.monotonic(), step + 1 - self.first
        share = self.waited / (now - self.begun)
        self.speed = (step + 1 - self.epoch_first) * self.batch_size / (now - self.epoch_begun)  # images/s
        left = spell((now - self.begun) / done * (self.steps - step - 1))
        shown = "  ".join(f"{name} {value:.3g}" for name, value in stats.items())
        pace = f"{self.speed:.0f} images/s  wait {share:.0%}  {left} left"
        self.live.show(f"step {step + 1}/{self.steps}  {shown}  lr {lr:.1e}  {pace}")
        if share > 0.1 and done >= 20 and not self.told:
            self.told = True
            ranks.warn(f"{share:.0%} of the time waits for pictures: type --workers {self.workers + 2}")


def count_bad(run, names, batch_size, bad_share, out):
    """Bad pictures: named in skipped.txt, counted; too many end the run."""
    bad = len(names)
    if names:
        with open(os.path.join(out, "skipped.txt"), "a", encoding="utf-8", errors="replace") as file:
            file.write("".join(f"{name}\n" for name in names))
    if ranks.world() > 1:
        bad = int(ranks.total(torch.tensor(bad)))
    run["seen"], run["bad"] = run["seen"] + batch_size, run["bad"] + bad
    many, most = run["bad"] > bad_share * run["seen"] and run["seen"] >= 20 * batch_size, bad > batch_size / 2
    if many or most:
        what = (
            f"{run['bad']} of {run['seen']} pictures"
            if many
            else f"{bad} of the {batch_size} pictures of a step"
        )
        raise Stop(f"{what} cannot be read: see {os.path.join(out, 'skipped.txt')}")


def show_row(row, first_row):
    """A row of the log as a line of a table, under its head."""
    cells = {n: f"{v:.3g}" if isinstance(v, float) else str(v) for n, v in row.items()}
    widths = {n: max(len(n), 8) for n in cells}
    if first_row:
        ranks.say("  ".join(f"{n:>{widths[n]}}" for n in cells))
    ranks.say("  ".join(f"{cells[n]:>{widths[n]}}" for n in cells))


def versions():
    import torchvision

    return {
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }
