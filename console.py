"""The console: what a person types and sees. Flag types, the live line, one sentence for what ends a command.

Bad input is one sentence and exit code 2. What ends a run (Stop, a signal, a full disk, no memory, a lost
rank) is one sentence and another code. Anything else is a bug and keeps its traceback, on each rank.
"""

import argparse
import math
import os
import shutil
import sys
import time
import traceback
import warnings

import torch

import ranks

WORKERS_DIED = "start the same line again with fewer --workers, or give docker --shm-size=16g or --ipc=host"
LOST_PEER = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "peer")
warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # no line of the source


class Stop(Exception):
    """The run cannot go on; the message is one sentence for the user, `code` the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def guarded(work):
    """Run `work()` -> exit code."""
    code = 1
    try:
        return work() or 0
    except Stop as stop:
        sentence, code = str(stop), stop.code
    except KeyboardInterrupt:
        sentence, code = "stopped", 130
    except BrokenPipeError:  # | head
        sys.stdout = open(os.devnull, "w")
        return 141
    except RuntimeError as error:
        reason = f"{error}\n".splitlines()[0][:150]
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:  # of a GPU, a CPU
            sentence = f"out of memory: type a smaller --micro-batch ({reason})"
        elif "DataLoader worker" in reason or "DataLoader timed out" in reason:
            sentence = f"a data worker died or stands still ({reason}): {WORKERS_DIED}"
        elif ranks.world() > 1 and any(words in reason.lower() for words in LOST_PEER):
            sentence = f"another rank is gone ({reason}): the same line resumes from the last checkpoint"
        elif ranks.world() > 1:
            sentence = traceback.format_exc()
        else:
            raise
    print(f"\n{sentence}", file=sys.stderr, flush=True)
    if ranks.world() > 1 and code == 1:
        ranks.leave(1)  # the others may wait for this rank in a collective
    return code


def fail(parser, error):
    """Bad input: one sentence, without the usage lines, and exit code 2."""
    if isinstance(error, BrokenPipeError):  # | head
        raise error
    parser.exit(2, f"{parser.prog}: {error}\n")


class Live:
    """One line that is overwritten on a terminal, and fits it; in a pipe a plain line every `seconds`."""

    def __init__(self, seconds=15):
        self.terminal, self.seconds, self.last = sys.stdout.isatty(), seconds, time.monotonic()

    def show(self, line):
        now = time.monotonic()
        if ranks.rank() or now - self.last < (0.2 if self.terminal else self.seconds):
            return
        self.last = now
        if self.terminal:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            ranks.say(line)

    def clear(self):
        if self.terminal and not ranks.rank():
            print("\r\033[K", end="", flush=True)


def show_row(row, first):
    """A row of the log as a line of a table, under its head."""
    cells = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in row.items()}
    if first:
        ranks.say(" ".join(f"{name:>5}" for name in cells))
    ranks.say(" ".join(f"{cell:>{max(len(name), 5)}}" for name, cell in cells.items()))


def names(text):
    """ "a dog, a cat," -> ["a dog", "a cat"]: what is typed with commas between; also a type for argparse."""
    return [name.strip() for name in text.split(",") if name.strip()]


def number(kind, low, high, words):
    """A type for argparse: a number in a range, else its own one sentence."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"found {text}, expected {words}")
        return value

    return convert


positive_int = number(int, 1, math.inf, "a whole number above 0")
natural = number(int, 0, 2**40, "a whole number, 0 or more")
positive_float = number(float, 1e-300, 1e300, "a number above 0")
not_negative = number(float, 0, 1e300, "a number, 0 or more")
share = number(float, 0, 1, "a number from 0 to 1")
