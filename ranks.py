"""Ranks: one process, or many that train as one. The only file that imports torch.distributed.

Paper: implementation details (64 GPUs). The idea: features are gathered once, with gradient; from there on
every rank holds the global batch and computes the same global loss with single-process code.

    features [b, D] on each of R ranks -> gather -> [R b, D] on every rank

Why the gradient is exact: every rank computes the same loss, so the backward pass of the gather sums R equal
gradients, and the averaging of DistributedDataParallel divides by R. Projections and heads run after the
gather on the same rows everywhere: their gradients are equal, and the mean leaves them as they are.
"""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from device import choose_device

# torchrun's variables, from those that srun sets for each task of a step. A batch script has the job's
# SLURM_NTASKS too, but no ranks: only SLURM_STEP_NUM_TASKS says that this process is one of several.
SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def start(device=None):
    """Join the process group, if torchrun or srun started several ranks -> this rank's torch.device.

    `device`: "cpu", "cuda", "cuda:1", "xpu", "mps", or None for the best there is. Raises ValueError."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        env.update({ours: env[theirs] for ours, theirs in SLURM.items()})
    device = choose_device(device)
    if int(env.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        missing = " and ".join(n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in env)
        if missing:
            raise ValueError(f"WORLD_SIZE is {env['WORLD_SIZE']} but {missing} not set: start with torchrun")
        # NCCL wants a device for each rank; where ranks share one, gloo carries everything.
        shared = int(env.get("LOCAL_WORLD_SIZE", 1)) > max(1, torch.accelerator.device_count())
        nccl = device.type == "cuda" and not shared
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return device


def stop():
    """Leave the process group, when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def leave(code=0):
    """End the process with an exit code. One of many ranks ends at once: on the usual way out it may wait for
    the others for ever."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        os._exit(code or 0)
    sys.exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text, file=None):
    """Print on rank 0 only; what the terminal's encoding cannot show is replaced."""
    if rank() == 0:
        file = file or sys.stdout
        encoding = getattr(file, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)


def warn(sentence):
    """One line of warning on the standard error, from rank 0 only."""
    say(f"warning: {sentence}", file=sys.stderr)


def share(rows):
    """This rank's equal part of a batch: contiguous, so that the gather gives the batch back in its order."""
    size = len(rows) // world()
    return rows[rank() * size : (rank() + 1) * size]


class Gather(torch.autograd.Function):
    """All ranks' rows, in rank order; the backward pass sums the gradients of all ranks and keeps this rank's
    rows."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return share(gradient)


def gather(rows):
    """[b, ...] of each rank, b equal -> [B, ...] on every rank, with gradient."""
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


def unwrap(model):
    return getattr(model, "module", model)
