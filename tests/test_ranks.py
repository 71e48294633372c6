"""Ranks: the same step on 1, 2 and 4 gloo processes gives one loss and one gradient; a gather that would not
is caught; Slurm's variables; folders that differ; device and memory.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import device
import ranks
import slip

ROOT = Path(__file__).parents[1]
WORKER = """
import sys, torch, torch.distributed as dist
import augment, ranks
from test_train import toy_step

out, methods = sys.argv[1:]
ranks.start("cpu")
for name in ("normalise", "strong"):  # float64: only the order of sums differs
    setattr(augment, name, lambda *a, f=getattr(augment, name): f(*a).double())


def no_gradient(rows):  # as torch's all_gather: the rows of other ranks have no gradient
    parts = [torch.empty_like(rows) for _ in range(ranks.world())]
    dist.all_gather(parts, rows.detach())
    parts[ranks.rank()] = rows
    return torch.cat(parts)


def one_step(method):
    if method == "broken":  # the last of all
        ranks.gather, method = no_gradient, "clip"
    loss, _, model = toy_step(method, micro_batch=3, recompute=True)
    if model.branch is not None:
        with torch.no_grad():
            model.visual.positions += 1.0  # as if the optimizer had made a step
        model.branch.after_step(model.visual, 0.5)
    state = {n: p.data if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"loss": torch.tensor(loss, dtype=torch.float64)} | state | dict(model.named_buffers())


found = {method: one_step(method) for method in methods.split(",")}
if ranks.rank() == 0:
    torch.save(found, out)
ranks.stop()
ranks.leave()
"""


def launch(processes, script, *arguments, timeout=120):
    """Run a script's text on gloo processes, as torchrun would -> [(exit code, errors)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(processes), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    started = []
    for rank in range(processes):
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-c", script, *arguments]
        started.append(subprocess.Popen(command, env=own, stderr=subprocess.PIPE, text=True))
    heard = [process.communicate(timeout=timeout)[1] for process in started]
    return [(process.returncode, errors) for process, errors in zip(started, heard)]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """-> gradients(processes, methods): {method: loss, gradients, buffers after one step}."""
    folder, known = tmp_path_factory.mktemp("ranks"), {}

    def step(processes, methods):
        key = (processes, methods)
        if key not in known:
            path = folder / f"{processes}-{methods}"
            ended = launch(processes, WORKER, str(path), methods)
            assert [code for code, _ in ended] == [0] * processes
            known[key] = torch.load(path, weights_only=True)
        return known[key]

    return step


def farthest(a, b):
    """Largest difference, relative to the largest entry of each tensor; a bias before a BatchNorm has no
    gradient but noise.
    """
    names = [n for n in a if a[n].is_floating_point() and a[n].abs().max() > 1e-9]
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max()).item() for n in names)


ALL = ",".join(slip.METHODS)


@pytest.mark.parametrize("methods", ["slip,clip", pytest.param(ALL, marks=pytest.mark.slow)])
def test_two_processes_match_one(gradients, methods):
    one, two = gradients(1, methods), gradients(2, methods + ",broken")
    for method in one:  # float64; sums over BatchNorm and softmax in another order
        assert farthest(one[method], two[method]) < 1e-8, method


@pytest.mark.slow
def test_four_processes_match_one(gradients):
    assert farthest(gradients(1, ALL)["slip"], gradients(4, "slip")["slip"]) < 1e-8


def test_a_gather_without_gradient_would_be_caught(gradients):
    one, broken = gradients(1, "slip,clip")["clip"], gradients(2, "slip,clip,broken")["broken"]
    assert abs(one["loss"] - broken["loss"]) < 1e-9  # the same loss ...
    assert farthest(one, broken) > 0.1  # ... and another gradient


def test_ranks_that_see_different_folders_say_so(tmp_path):
    """Rank 0's folder holds a checkpoint, rank 1's none, as on disks of two nodes."""
    script = """
import os, sys, torch, types
import ranks, run, slip
from dataclasses import make_dataclass
ranks.start("cpu")
out = os.path.join(sys.argv[1], str(ranks.rank()))
values = dict(out=out, seed=0, steps=4, epoch_steps=2, batch_size=2)
settings = make_dataclass("Settings", values, frozen=True)(**values)
if ranks.rank() == 0:
    os.makedirs(out)
    model = slip.build(slip.configure("simclr", "vit_tiny"))
    slip.save(os.path.join(out, "checkpoint.pt"), model, dict(step=3, args=values, optimizer={}))
try:
    run.open_run(settings, {"out"}, [])
except ValueError as error:
    print(error, file=sys.stderr)
    ranks.leave(2)
"""
    for code, heard in launch(2, script, str(tmp_path), timeout=60):
        assert code == 2 and "the ranks see different checkpoints" in heard


@pytest.mark.slow
def test_an_error_on_one_of_two_ranks_keeps_its_traceback():
    script = """
import console, ranks, torch
ranks.start("cpu")
def work():
    if ranks.rank() == 1:
        raise RuntimeError("an honest bug")
    ranks.total(torch.ones(1))
ranks.leave(console.guarded(work))
"""
    (lost, told), (broken, trace) = launch(2, script, timeout=90)
    assert broken == 1 and "Traceback" in trace and "an honest bug" in trace
    assert lost == 1 and "another rank is gone" in told and "Traceback" not in told


@pytest.mark.parametrize("name, sentence", [("tpu", "expected cpu, cuda"), ("cuda:99", "--device cuda:99")])
def test_a_device_that_is_not_there_is_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        ranks.start(name)


def test_a_batch_script_has_tasks_but_no_ranks(monkeypatch):
    """Only the variables of a step say that there are ranks."""
    for name, value in {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.start("cpu").type == "cpu" and ranks.world() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="WORLD_SIZE is 4 but MASTER_ADDR and MASTER_PORT not set"):
        ranks.start("cpu")


def test_one_visible_device_for_each_task_is_number_0(monkeypatch):
    fake = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: fake)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.choose_device(None) == torch.device("cuda:0")


def test_cpus_are_those_of_the_task(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5, 7}, raising=False)
    assert device.cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS and Windows
    assert device.cpus() == os.cpu_count()


def test_what_a_terminal_cannot_show_is_replaced(tmp_path):
    with open(tmp_path / "ascii", "w", encoding="ascii") as file:
        ranks.say("a 猫 and a boat", file=file)
    assert (tmp_path / "ascii").read_text() == "a ? and a boat\n"


def test_memory_is_counted_by_the_methods_own_views_and_precision(monkeypatch):
    monkeypatch.delattr(os, "sysconf")  # as on Windows
    model = slip.build(slip.configure("simclr", "vit_tiny"))
    cpu = torch.device("cpu")
    chunk, again, words = device.plan_chunks(model, 64, cpu, views=2)
    assert (chunk, again, words) == (64, False, "whole")
    assert device.plan_chunks(model, 64, cpu, micro_batch=16)[:2] == (16, True)
