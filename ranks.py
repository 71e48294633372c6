"""Ranks: one process, or many that train as one. The only file that knows torch.distributed; it chooses
device and precision.

Paper: section 4 (64 GPUs, mixed precision). The idea: gather the features once, with gradient; from there
on every rank holds the global batch and computes the same global loss with single-process code.

    features [b, D] on each of R ranks -> gather -> [B, D] on every rank, B the sum of the b

Why the gradient is exact: every rank computes the same loss, so the backward of the gather sums R equal
gradients, and the averaging of DistributedDataParallel divides by R. Projections and heads run after the
gather on the same rows everywhere: their gradients are equal, and the mean leaves them as they are.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def start(device=None, minutes=30):
    """Join the process group if there is one to join (torchrun, Slurm, or RANK and WORLD_SIZE set); give
    this rank's device.

    `device`: "cpu", "cuda", "cuda:1", or None for the best at hand. Raises ValueError with one sentence.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
            env["SLURM_PROCID"],
            env["SLURM_NTASKS"],
            env["SLURM_LOCALID"],
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown --device {device!r}: expected cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device} was asked for, and torch finds no GPU here: type --device cpu")
    if device == "cuda":
        device = f"cuda:{env.get('LOCAL_RANK', 0)}"
    if int(env.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise ValueError(
                f"WORLD_SIZE is {env['WORLD_SIZE']} but {' and '.join(missing)} not set: start with torchrun"
            )
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    return torch.device(device)


def stop():
    """Leave the process group, when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(code=0):
    """End the process with an exit code; call it last.

    One of many ranks ends at once: gloo's threads may still hold tensors, and an exit was once aborted,
    it seems because the interpreter was taken down under them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(*words, **options):
    """Print, on rank 0 only."""
    if rank() == 0:
        print(*words, flush=True, **options)


def warn(sentence):
    """One line of warning on the standard error, from rank 0 only."""
    if rank() == 0:
        print(f"warning: {sentence}", file=sys.stderr, flush=True)


def mine(rows):
    """This rank's share of a batch: a contiguous part, so that the gather gives the batch back in its
    order.
    """
    share, rest = divmod(len(rows), world())
    begin = rank() * share + min(rank(), rest)
    return rows[begin : begin + share + (rank() < rest)]


class Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; the backward sums the gradients of all ranks and keeps this rank's
    rows.
    """

    @staticmethod
    def forward(ctx, rows):
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.zeros_like(count) for _ in range(world())]
        dist.all_gather(counts, count)
        ctx.counts = [int(c) for c in counts]
        padded = rows.new_zeros(
            max(ctx.counts), *rows.shape[1:]
        )  # [max b, ...]: collectives want equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, ctx.counts)])

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(ctx.counts)[rank()]


def gather(rows):
    """[b, ...] of each rank -> [B, ...] on every rank, with gradient."""
    return rows if world() == 1 else Gather.apply(rows.contiguous())


def total(value):
    """The sum over ranks of a tensor (no gradient)."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def wrap(model):
    """The model, to be called in training: its gradients are averaged over the ranks in the backward pass."""
    if world() == 1:
        return model
    # No device_ids: with them DDP moves every input to the GPU, also what must stay on the host.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def precision(device, asked=None):
    """ "fp32" or "bf16": what was asked for, else bf16 on CUDA and fp32 on the CPU."""
    return asked or ("bf16" if device.type == "cuda" else "fp32")


def autocast(device, asked=None):
    """The context of the forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision(device, asked) == "bf16")
