"""Ranks: gradients and weights of 1, 2 and 4 gloo processes against one another, and a gather that must be
caught.

pytest tests/test_ranks.py
"""

import os
import socket
import subprocess
import sys

import pytest
import torch

import slip

WORKER = """
import sys, torch, torch.distributed as dist
import ranks, slip, train

out, methods, broken = sys.argv[1:]
ranks.start("cpu")
if broken == "broken":  # what the published CLIP loss does: gathered without gradient, own rows put back
    def no_gradient(rows):
        parts = [torch.empty_like(rows) for _ in range(ranks.world())]
        dist.all_gather(parts, rows.detach())
        parts[ranks.rank()] = rows
        return torch.cat(parts)
    ranks.gather = no_gradient


def one_step(method):
    torch.manual_seed(0)
    small = dict(vocab_size=520, text_depth=1, ssl_hidden=32, ssl_out=16)
    model = slip.build(slip.configure(method, "vit_tiny", **small)).double()
    generator = torch.Generator().manual_seed(1)
    names = ("images", "view1", "view2")
    batch = {n: torch.randn(8, 3, 32, 32, generator=generator).double() for n in names}
    if "beit" in method:
        model.branch.begin(lambda: batch["view2"])
        batch["view1_mask"] = torch.rand(8, 16, generator=generator) < 0.4
    batch["tokens"] = torch.randint(1, 500, (8, 6), generator=generator)
    batch["tokens"][:, 5] = 519
    wrapped = ranks.wrap(model)
    features = wrapped({n: ranks.mine(v) for n, v in batch.items()}, dict, 3, True)
    loss, _ = train.objective(model, {n: ranks.gather(v) for n, v in features.items()}, 1.0)
    loss.backward()
    if model.branch is not None:
        with torch.no_grad():
            model.visual.positions += 1.0  # as if the optimizer had made a step
        model.branch.after_step(model.visual, 0.5)
    state = {n: p.data if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach()} | state | dict(model.named_buffers())


found = {method: one_step(method) for method in methods.split(",")}
if ranks.rank() == 0:
    torch.save(found, out)
ranks.stop()
ranks.leave()
"""


def launch(processes, script, *arguments):
    """Run a script's text on gloo processes, as torchrun would; returns when all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(processes)
    ]
    assert [process.wait(timeout=120) for process in running] == [0] * processes


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """-> gradients(processes, methods, broken): {method: loss, gradients and buffers of one backward pass and
    what moves after it}; each run once.
    """
    folder, known = tmp_path_factory.mktemp("ranks"), {}

    def run(processes, methods, broken="whole"):
        key = (processes, methods, broken)
        if key not in known:
            path = folder / "-".join(map(str, key))
            launch(processes, WORKER, str(path), methods, broken)
            known[key] = torch.load(path, weights_only=True)
        return known[key]

    return run


def farthest(a, b):
    """Largest difference, relative to the largest entry of each tensor; a bias before a BatchNorm has no
    gradient but noise.
    """
    floats = [n for n in a if a[n].is_floating_point() and a[n].abs().max() > 1e-9]
    return max(((a[n] - b[n]).abs().max() / a[n].abs().max()).item() for n in floats)


ALL = ",".join(slip.METHODS)


@pytest.mark.parametrize("processes, methods", [(2, ALL), (3, "slip"), (4, "slip")])
def test_processes_match_one_in_loss_gradient_and_batchnorm(gradients, processes, methods):
    # with three, 8 rows are shared as 3, 3, 2
    one, many = gradients(1, ALL)["slip"], gradients(processes, methods)["slip"]
    assert one.keys() == many.keys()
    assert farthest(one, many) < 1e-8  # float64; sums over BatchNorm and softmax in another order


@pytest.mark.parametrize("method", [method for method in slip.METHODS if method != "slip"])
def test_two_processes_match_one_with_every_method(gradients, method):
    one, two = (gradients(processes, ALL)[method] for processes in (1, 2))
    assert one.keys() == two.keys() and farthest(one, two) < 1e-8  # as above


def test_a_gather_without_gradient_would_be_caught(gradients):
    one, broken = gradients(1, ALL)["clip"], gradients(2, "clip", "broken")["clip"]
    assert abs(one["loss"] - broken["loss"]) < 1e-9  # the same loss ...
    assert farthest(one, broken) > 0.1  # ... and another gradient


def test_shares_cover_a_batch_in_order(monkeypatch):
    import ranks

    rows, shares = list(range(11)), []
    monkeypatch.setattr(ranks, "world", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.mine(rows))
    assert sum(shares, []) == rows and {len(share) for share in shares} == {2, 3}


@pytest.mark.parametrize("device, sentence", [("tpu", "expected cpu, cuda"), ("cuda:99", "cuda")])
def test_a_device_that_is_not_there_is_one_sentence(device, sentence):
    import ranks

    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=sentence):
        ranks.start(device)
