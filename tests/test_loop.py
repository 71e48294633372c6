"""The loop with a toy model of ten weights: stopped and resumed against unbroken, the files of a run on a
full disk, torn and foreign ones, the learning rate of each group, and the count of bad pictures.

    pytest tests/test_loop.py
"""

import csv
import errno
import os
import signal

import pytest
import torch
from torch import nn

import loop
import slip

ARGS = {"seed": 0, "lr": 0.1, "workers": 0, "out": "somewhere"}
COLUMNS = ["epoch", "step", "loss", "drawn", "lr", "score"]


class Toy(nn.Linear):
    """What slip.save asks of a model, and no more."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(4, 2)
        self.config, self.tokenizer = slip.Config(), None


class Run:
    """A run of 10 steps, 4 an epoch; what it saw is kept."""

    def __init__(self, out, model=None, **changes):
        self.out, self.model, self.rates, self.scores = str(out), model or Toy(), [], [1.0, 3.0, 2.0]
        groups = [{"params": [self.model.weight], "lr_scale": 0.5}, {"params": [self.model.bias]}]
        self.optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
        self.args = dict(ARGS)
        self.settings = dict(
            steps=10, epoch_steps=4, batch_size=8, columns=COLUMNS, rate=lambda step: 0.1 / (1 + step)
        )
        self.settings |= changes

    def batches(self, steps):
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            yield {"x": x, "step": step, "skipped": self.bad(step)}

    def bad(self, step):
        return []

    def loss_of(self, batch):
        drawn = torch.rand(())  # what drop path or mixup would draw
        return (self.model(batch["x"]) - drawn).square().mean(), {"drawn": drawn}

    def after_step(self, step):
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])

    def after_epoch(self):
        return {"score": self.scores[0]}, self.scores.pop(0)

    def go(self, free=("workers",)):
        state = loop.resume(self.out, self.args, set(free))
        if state:
            self.model.load_state_dict(state["weights"])
            self.scores = self.scores[len(state["run"]["rows"]) :]
        return loop.fit(
            self.model,
            self.optimizer,
            self.batches,
            self.loss_of,
            out=self.out,
            args=self.args,
            state=state,
            after_step=self.after_step,
            after_epoch=self.after_epoch,
            **self.settings,
        )


def saved(out, name=loop.CHECKPOINT):
    return slip.read(os.path.join(out, name))


def same(a, b):
    return all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


# Steps


def test_a_run_ends_with_its_rows_in_log_and_checkpoint(tmp_path):
    rows = Run(tmp_path).go()
    assert [(row["epoch"], row["step"], row["score"]) for row in rows] == [
        (1, 4, 1.0),
        (2, 8, 3.0),
        (3, 10, 2.0),
    ]
    assert all(list(row) == COLUMNS for row in rows)
    with open(tmp_path / "log.csv") as file:
        assert list(csv.DictReader(file)) == [{n: str(v) for n, v in row.items()} for row in rows]
    run = saved(tmp_path)["run"]
    assert (run["step"], run["rows"], run["args"]) == (10, rows, ARGS) and "torch" in run["versions"]


def test_a_row_is_the_mean_of_its_epoch(tmp_path):
    run, drawn = Run(tmp_path), []
    loss_of = run.loss_of
    run.loss_of = lambda batch: (result := loss_of(batch), drawn.append(result[1]["drawn"].item()))[0]
    rows = run.go()
    for row, part in zip(rows, (drawn[:4], drawn[4:8], drawn[8:]), strict=True):
        assert row["drawn"] == pytest.approx(sum(part) / len(part), abs=1e-5)  # five digits are written


def test_each_group_has_its_own_share_of_the_learning_rate(tmp_path):
    run = Run(tmp_path)
    run.go()
    expected = [[0.5 * 0.1 / (1 + step), 0.1 / (1 + step)] for step in range(10)]
    assert run.rates == [pytest.approx(pair) for pair in expected]


def test_the_best_is_kept_beside_the_last(tmp_path):
    Run(tmp_path).go()
    assert saved(tmp_path, loop.BEST)["run"]["step"] == 8 and saved(tmp_path)["run"]["best"] == 3
    assert not same(saved(tmp_path, loop.BEST), saved(tmp_path))


def test_an_evaluation_that_stops_loses_no_step_and_is_made_up_for(tmp_path):
    whole = Run(tmp_path / "whole")
    rows = whole.go()
    broken = Run(tmp_path / "broken")
    evaluate, calls = broken.after_epoch, []

    def second_is_stopped():
        calls.append(1)
        if len(calls) == 2:
            raise loop.Stop("a test picture cannot be read")
        return evaluate()

    broken.after_epoch = second_is_stopped
    with pytest.raises(loop.Stop):
        broken.go()
    assert saved(tmp_path / "broken")["run"]["step"] == 8  # the end of the second epoch
    again = Run(tmp_path / "broken")
    assert again.go() == rows and again.rates == whole.rates[8:]
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "broken"))


def test_the_norm_of_the_gradient_is_limited_if_asked(tmp_path):
    run = Run(tmp_path, steps=1, clip=0.01, rate=lambda step: 1.0)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in run.model.parameters()])
    run.go()
    after = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)  # torch adds 1e-6 to the norm


def test_a_loss_that_is_not_finite_leaves_weights_and_checkpoint_as_they_were(tmp_path):
    run = Run(tmp_path, save_every=2)
    loss_of = run.loss_of
    run.loss_of = lambda batch: (loss_of(batch)[0] * (float("nan") if batch["step"] == 3 else 1), {})
    with pytest.raises(loop.Stop, match="loss nan .* at step 4, .*last good checkpoint is .*checkpoint.pt"):
        run.go()
    assert saved(tmp_path)["run"]["step"] == 2 and all(p.isfinite().all() for p in run.model.parameters())


# Going on


@pytest.mark.parametrize("steps_done", [1, 4, 7])
def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path, steps_done):
    Run(tmp_path / "whole").go()
    broken = Run(tmp_path / "broken", save_every=1)
    loss_of = broken.loss_of

    def cut(batch):
        if batch["step"] == steps_done:
            raise KeyboardInterrupt
        return loss_of(batch)

    broken.loss_of = cut
    with pytest.raises(KeyboardInterrupt):
        broken.go()
    again = Run(tmp_path / "broken")
    rows = again.go()
    assert len(again.rates) == 10 - steps_done and len(rows) == 3
    assert same(saved(tmp_path / "whole"), saved(tmp_path / "broken"))
    assert rows == saved(tmp_path / "whole")["run"]["rows"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, number):
    run, before = Run(tmp_path), signal.getsignal(number)
    loss_of = run.loss_of

    def signalled(batch):
        if batch["step"] == 2:
            os.kill(os.getpid(), number)
        return loss_of(batch)

    run.loss_of = signalled
    with pytest.raises(loop.Stop, match="stopped by a signal after step 3, saved") as stop:
        run.go()
    assert stop.value.code == 143 and saved(tmp_path)["run"]["step"] == 3
    assert signal.getsignal(number) is before


def test_a_run_that_is_over_has_nothing_more_to_do(tmp_path):
    rows, again = Run(tmp_path).go(), Run(tmp_path)
    assert again.go() == rows and again.rates == []


def test_a_new_folder_is_a_new_run(tmp_path):
    assert loop.resume(str(tmp_path / "a/b"), ARGS, set()) is None and (tmp_path / "a/b").is_dir()


def test_the_arguments_of_another_run_are_refused(tmp_path):
    Run(tmp_path).go()
    other = ARGS | {"lr": 0.2, "workers": 9}
    with pytest.raises(ValueError, match=r"another run \(--lr was 0.1 and is 0.2\): choose another --out"):
        loop.resume(str(tmp_path), other, {"workers"})
    assert loop.resume(str(tmp_path), ARGS | {"workers": 9}, {"workers"})["run"]["step"] == 10
    with pytest.raises(ValueError, match="--new-flag was None and is 1"):
        loop.resume(str(tmp_path), ARGS | {"new_flag": 1}, set())


@pytest.mark.parametrize("content", [b"", b"torn", b"PK\x03\x04torn"])
def test_a_foreign_or_torn_file_alone_is_refused_and_left_alone(tmp_path, content):
    (tmp_path / loop.CHECKPOINT).write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint.pt.*nothing older is in") as error:
        loop.resume(str(tmp_path), ARGS, set())
    assert "\n" not in str(error.value)
    assert (tmp_path / loop.CHECKPOINT).read_bytes() == content


def test_a_model_without_a_run_is_refused(tmp_path):
    slip.save(tmp_path / loop.CHECKPOINT, Toy(), {"args": ARGS})
    with pytest.raises(ValueError, match="holds a model but no run to go on from"):
        loop.resume(str(tmp_path), ARGS, set())


def test_another_files_objects_are_refused(tmp_path):
    torch.save({"format": slip.FORMAT, "run": {"optimizer": Run}}, tmp_path / loop.CHECKPOINT)
    with pytest.raises(ValueError, match="not a checkpoint, or holds objects"):
        loop.resume(str(tmp_path), ARGS, set())


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        loop.resume(str(tmp_path / "file"), ARGS, set())


# Saving


def test_the_checkpoint_before_is_kept(tmp_path):
    for step in (1, 2, 3):
        loop.save(str(tmp_path), Toy(), {"step": step})
    assert saved(tmp_path)["run"] == {"step": 3} and saved(tmp_path, loop.PREVIOUS)["run"] == {"step": 2}
    assert sorted(os.listdir(tmp_path)) == sorted([loop.CHECKPOINT, loop.PREVIOUS])


def test_a_torn_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    Run(tmp_path, save_every=3).go()
    (tmp_path / loop.CHECKPOINT).write_bytes(b"torn")
    assert loop.resume(str(tmp_path), ARGS, set())["run"]["step"] == 9
    assert "going on from checkpoint.previous.pt" in capsys.readouterr().err


def test_a_torn_checkpoint_does_not_take_the_place_of_the_whole_one(tmp_path):
    Run(tmp_path, save_every=3).go()
    (tmp_path / loop.CHECKPOINT).write_bytes(b"torn")
    state = loop.resume(str(tmp_path), ARGS, set())
    loop.save(str(tmp_path), Toy(), state["run"])
    assert saved(tmp_path, loop.PREVIOUS)["run"]["step"] == 9


def half_written(error):
    def save(state, file):
        file.write(b"half of it")
        raise error

    return save


@pytest.mark.parametrize("how", ["device", "OSError", "RuntimeError"])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, how):
    loop.save(str(tmp_path), Toy(), {"step": 1})
    loop.save(str(tmp_path), Toy(), {"step": 2})
    if how == "device":  # which is always full: the real thing
        os.symlink("/dev/full", tmp_path / f"{loop.CHECKPOINT}.new.tmp")
    elif how == "OSError":
        monkeypatch.setattr(torch, "save", half_written(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
    else:  # torch's own words
        monkeypatch.setattr(torch, "save", half_written(RuntimeError("unexpected pos 64 vs 0\nat line 7")))
    with pytest.raises(loop.Stop, match="cannot write .*last checkpoint is whole") as stop:
        loop.save(str(tmp_path), Toy(), {"step": 3})
    assert stop.value.code == 1 and "\n" not in str(stop.value)
    assert sorted(os.listdir(tmp_path)) == sorted([loop.CHECKPOINT, loop.PREVIOUS])
    assert (saved(tmp_path)["run"], saved(tmp_path, loop.PREVIOUS)["run"]) == ({"step": 2}, {"step": 1})


@pytest.mark.parametrize("name", [loop.BEST, "log.csv"])
def test_a_full_disk_at_the_other_files_stops_the_run_too(tmp_path, name):
    os.symlink("/dev/full", tmp_path / f"{name}.tmp")
    with pytest.raises(loop.Stop, match=f"cannot write .*{name}"):
        Run(tmp_path).go()
    assert f"{name}.tmp" not in os.listdir(tmp_path)


def test_the_log_is_written_as_a_whole_or_not_at_all(tmp_path):
    rows = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": ""}]
    loop.write_log(str(tmp_path), rows)
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.5\n2,\n"
    assert os.listdir(tmp_path) == ["log.csv"]
    (tmp_path / "log.csv.tmp").symlink_to("/dev/full")
    with pytest.raises(loop.Stop):
        loop.write_log(str(tmp_path), rows * 9)
    assert (tmp_path / "log.csv").read_text() == "epoch,loss\n1,0.5\n2,\n"


def test_no_rows_make_no_log(tmp_path):
    loop.write_log(str(tmp_path), [])
    assert not os.listdir(tmp_path)


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.ranks, "rank", lambda: 1)
    loop.save(str(tmp_path), Toy(), {})
    loop.write_log(str(tmp_path), [{"epoch": 1}])
    assert not os.listdir(tmp_path)


# Bad pictures


def count(tmp_path, *bad, batch_size=10, share=0.05):
    run = {"seen": 0, "bad": 0}
    for number in bad:
        loop.count_bad(run, [f"{i}.jpg\tbroken" for i in range(number)], batch_size, share, str(tmp_path))
    return run


def test_bad_pictures_are_counted_and_named(tmp_path):
    assert count(tmp_path, 0, 2, 1) == {"seen": 30, "bad": 3}
    lines = (tmp_path / "skipped.txt").read_text().splitlines()
    assert lines == ["0.jpg\tbroken", "1.jpg\tbroken", "0.jpg\tbroken"]


def test_no_bad_picture_makes_no_file(tmp_path):
    count(tmp_path, *[0] * 30)
    assert not os.listdir(tmp_path)


def test_too_large_a_share_stops_after_twenty_batches(tmp_path):
    assert count(tmp_path, *[1] * 19)["bad"] == 19  # a tenth, but of few
    with pytest.raises(loop.Stop, match="20 of 200 pictures cannot be read: see .*skipped.txt"):
        count(tmp_path, *[1] * 20)
    assert count(tmp_path, *[0, 1] * 20)["bad"] == 20  # just 5%


def test_a_batch_with_more_bad_than_good_stops_at_once(tmp_path):
    count(tmp_path, 5)
    with pytest.raises(loop.Stop, match="6 of the 10 pictures of a step"):
        count(tmp_path, 6)


def test_the_share_is_that_of_the_whole_run_over_a_resume(tmp_path):
    run = Run(tmp_path, bad_share=0.5)
    run.bad = lambda step: ["a.jpg\tbroken"] * (step % 2)
    run.settings["steps"] = 4
    run.go()
    again = Run(tmp_path, bad_share=0.5)
    again.bad = run.bad
    again.go()
    assert (saved(tmp_path)["run"]["seen"], saved(tmp_path)["run"]["bad"]) == (80, 5)


# What is shown


def test_a_pipe_gets_plain_lines(capsys):
    live = loop.Live(seconds=0)
    live.show("step 1")
    live.clear()
    loop.Live(seconds=60).show("too soon")
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.parametrize("seconds, words", [(0.9, "0m00s"), (61, "1m01s"), (3599, "59m59s"), (7380, "2h03m")])
def test_time_is_spelled(seconds, words):
    assert loop.spell(seconds) == words


def test_a_stop_is_one_sentence_and_a_bug_keeps_its_traceback(capsys):
    def ends(error):
        raise error

    assert loop.guarded(lambda: None) == 0
    assert loop.guarded(lambda: ends(loop.Stop("no more", 143))) == 143
    assert capsys.readouterr().err == "\nno more\n"
    with pytest.raises(RuntimeError, match="a bug"):
        loop.guarded(lambda: ends(RuntimeError("a bug")))
