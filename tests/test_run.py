"""A run's folder with a toy model of ten weights: stopped and resumed against unbroken, full disks, torn and
foreign files, signals to whole process groups; the console's sentences.
"""

import csv
import errno
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import console
import run as runs
import scenes
import slip

COLUMNS = ["epoch", "step", "loss", "drawn", "lr", "score"]


@dataclass(frozen=True)
class Settings:
    out: str
    seed: int = 0
    lr: float = 0.1
    steps: int = 10
    epoch_steps: int = 4
    batch_size: int = 8
    save_every: int | None = None
    workers: int = 0


class Toy(nn.Linear):
    """What slip.save asks of a model, and no more."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(4, 2)
        self.config, self.tokenizer = slip.Config(), None


def batches(steps):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        yield {"x": x, "skipped": []}


def train(out, loader_for=batches, scores=(1.0, 3.0, 2.0), on_step=lambda step: None, **changes):
    """A loop of the shape of train.train -> (model, run)."""
    model, run = Toy(), runs.open_run(Settings(str(out), **changes), {"workers", "save_every"}, COLUMNS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if run.state:
        model.load_state_dict(run.state["weights"])
        optimizer.load_state_dict(run.state["run"]["optimizer"])

    def end_epoch():
        run.save(model, optimizer)
        score = scores[len(run.rows)]
        run.end_epoch({"score": score}, score, model)
        run.save(model, optimizer)

    if run.epoch_ended:
        end_epoch()
    for step, batch in run.batches(loader_for):
        drawn = torch.rand(())  # what drop path or mixup would draw
        loss = (model(batch["x"]) - drawn).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record({"loss": loss.item(), "drawn": drawn.item()}, 0.1)
        on_step(step)
        if run.epoch_ended:
            end_epoch()
        elif run.args["save_every"] and run.step % run.args["save_every"] == 0:
            run.save(model, optimizer)
    run.finish(model, optimizer)
    return model, run


def test_a_run_ends_with_its_rows_in_log_and_checkpoint(tmp_path):
    _, run = train(tmp_path)
    assert [(r["epoch"], r["step"], r["score"]) for r in run.rows] == [(1, 4, 1.0), (2, 8, 3.0), (3, 10, 2.0)]
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["4", "8", "10"]
    assert {row["lr"] for row in run.rows} == {0.1}
    saved = slip.read_checkpoint(tmp_path / "checkpoint.pt")["run"]
    assert (saved["step"], saved["rows"], saved["best_step"]) == (10, run.rows, 8)
    assert slip.read_checkpoint(tmp_path / "best.pt")["run"]["step"] == 8


def test_a_row_is_the_mean_of_its_epoch(tmp_path, monkeypatch):
    monkeypatch.delattr(signal, "pthread_sigmask")  # as on Windows
    drawn = [torch.manual_seed(step) and torch.rand(()).item() for step in range(10)]
    for row, part in zip(train(tmp_path)[1].rows, (drawn[:4], drawn[4:8], drawn[8:])):
        assert row["drawn"] == pytest.approx(sum(part) / len(part), rel=1e-6)  # float32


@pytest.mark.parametrize("step", range(10))
def test_a_signal_after_any_step_loses_nothing(tmp_path, step):
    def on_step(done):
        if done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train(tmp_path / "whole")[0]
    if step < 9:
        with pytest.raises(console.Stop, match=f"after step {step + 1}, saved") as stop:
            train(tmp_path / "stopped", on_step=on_step)
        assert stop.value.code == 143
    model, run = train(tmp_path / "stopped")
    assert torch.equal(model.weight, whole.weight) and len(run.rows) == 3


def test_a_signal_while_the_run_waits_for_slow_images_is_obeyed(tmp_path):
    def slow(steps):
        for step, batch in zip(steps, batches(steps)):
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)
            yield batch

    with pytest.raises(console.Stop, match="after step 3, saved") as stop:
        train(tmp_path, slow)
    assert stop.value.code == 130


def test_an_evaluation_that_was_killed_is_made_on_resume(tmp_path):
    with pytest.raises(IndexError):
        train(tmp_path, scores=[1.0])
    assert len(train(tmp_path)[1].rows) == 3


def test_flags_that_change_are_named_and_free_ones_may(tmp_path):
    train(tmp_path)
    train(tmp_path, workers=2, save_every=3)
    with pytest.raises(ValueError, match="--lr was 0.1 and is 0.2.*choose another --out"):
        train(tmp_path, lr=0.2)


def test_a_torn_checkpoint_and_one_without_a_run_are_refused(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match="checkpoint.pt"):
        train(tmp_path)
    slip.save(tmp_path / "checkpoint.pt", Toy())
    with pytest.raises(ValueError, match="no run to resume"):
        train(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    def full(state, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_step(step):
        if step == 5:
            monkeypatch.setattr(torch, "save", full)

    with pytest.raises(console.Stop, match="No space left"):
        train(tmp_path, on_step=on_step)
    monkeypatch.undo()
    assert slip.read_checkpoint(tmp_path / "checkpoint.pt")["run"]["step"] == 4
    assert not list(tmp_path.glob("*.tmp"))


def test_many_bad_images_end_the_run_and_a_few_are_noted(tmp_path):
    def loader(count):
        return lambda steps: (batch | {"skipped": ["a.jpg"] * count} for batch in batches(steps))

    train(tmp_path / "few", loader(1))
    assert (tmp_path / "few/skipped.txt").read_text() == "a.jpg\n" * 10
    with pytest.raises(console.Stop, match="5 images of one step cannot be read"):
        train(tmp_path / "many", loader(5))


def test_errors_are_one_sentence_and_a_bug_keeps_its_traceback(capsys):
    def fails(error):
        def work():
            raise error

        return work

    assert console.guarded(fails(console.Stop("enough", 7))) == 7
    assert console.guarded(fails(KeyboardInterrupt())) == 130
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")):
        assert console.guarded(fails(error)) == 1
    assert console.guarded(fails(RuntimeError("DataLoader worker (pid 1) is killed"))) == 1
    assert console.guarded(lambda: console.fail(None, BrokenPipeError())) == 141  # | head
    heard = capsys.readouterr().err
    assert "enough" in heard and "--micro-batch" in heard and "--shm-size" in heard
    with pytest.raises(RuntimeError, match="a bug"):
        console.guarded(fails(RuntimeError("a bug")))


def test_the_live_line_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    live = console.Live(0)
    live.last = -1
    live.show("x" * 200)
    assert capsys.readouterr().out == "\r\033[K" + "x" * 39


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_wrong_number_is_argparses_own_sentence(text):
    with pytest.raises(console.argparse.ArgumentTypeError, match=f"found {text}, expected a whole number"):
        console.positive_int(text)


def stop_group(tmp_path, *words, method="fork", number=signal.SIGTERM):
    """train.py in a process group of its own, signalled after its first checkpoint -> (code, errors)."""
    script = f"import multiprocessing as m; m.set_start_method('{method}'); import train, ranks; "
    script += "import sys; ranks.leave(train.main(sys.argv[1:]))"
    flags = "--max-steps 100000 --save-every 2 --workers 2 --zeroshot none --batch-size 32 --out".split()
    command = [sys.executable, *(words or ["-c", f"if __name__ == '__main__':\n {script}"]), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([*command, str(tmp_path)], start_new_session=True, env=env, **quiet)
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, heard = process.communicate(timeout=60)
    return process.returncode, heard


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_saves_and_leaves(tmp_path, method, number):
    code, heard = stop_group(tmp_path, method=method, number=number)
    assert code == 128 + number and "saved" in heard and "Traceback" not in heard, heard


@pytest.mark.slow
def test_a_signal_to_torchrun_and_two_ranks_saves_and_leaves(tmp_path):
    words = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29655", "train.py"]
    _, heard = stop_group(tmp_path, *words)
    assert "stopped by a signal after step" in heard, heard  # torchrun's own words come after


LESS = """
import multiprocessing, os, signal, sys
for module, names in {os: "sysconf pread sched_getaffinity", signal: "pthread_sigmask"}.items():
    for name in names.split():
        delattr(module, name)
sys.modules["resource"] = None
multiprocessing.set_start_method("%s", force=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method, what", [("spawn", ""), ("spawn", "pairs.tsv"), ("forkserver", "0.tar")])
def test_a_run_needs_nothing_that_windows_or_macos_lack(tmp_path, method, what):
    (tmp_path / "sitecustomize.py").write_text(LESS % method)  # in the workers too
    scenes.main(["--out", f"{tmp_path}/photos", "--count", "40"])
    files = sorted((tmp_path / "photos").iterdir())  # png, txt, png, txt, ...
    rows = [f"photos/{image.name}\t{text.read_text()}" for image, text in zip(files[::2], files[1::2])]
    (tmp_path / "pairs.tsv").write_text("path\tcaption\n" + "".join(rows))
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for file in files:
            shard.add(file, file.name)
    words = f"train.py --max-steps 3 --batch-size 16 --workers 1 --zeroshot none --out {tmp_path}/run".split()
    words += "--image-size 32 --patch 8".split()
    words += ["--data", tmp_path / what] if what else []
    subprocess.run([sys.executable, *words], env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["run"]["step"] == 3
