"""The device: which one, in which precision, and how much of a batch fits.

Paper: implementation details (mixed precision; a batch of 4096 over 64 GPUs). Where the batch does not fit,
it goes through the towers in chunks whose activations are recomputed in the backward pass (slip.in_chunks).
"""

import math
import os
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def choose_device(name):
    """A device's name, or None -> torch.device with the index of this rank's own accelerator."""
    best = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name or best)
    except RuntimeError:
        raise ValueError(f"unknown --device {name!r}: expected cpu, cuda, cuda:N, xpu or mps") from None
    if device.type not in ("cpu", best):
        raise ValueError(f"--device {name} was asked for, and torch finds {best} here: type --device {best}")
    if device.type in ("cpu", "mps"):
        return torch.device(device.type)
    count = torch.accelerator.device_count()
    # With one visible device for each task (srun --gpus-per-task=1) every local rank's own is number 0.
    index = int(os.environ.get("LOCAL_RANK", 0)) % count if device.index is None else device.index
    if index >= count:
        raise ValueError(f"--device {name} was asked for, and there are {count}: the first is {best}:0")
    torch.accelerator.set_device_index(index)
    return torch.device(device.type, index)


def cpus():
    """How many CPUs this process may use: those of its task under Slurm or taskset, not those of the node."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def precision(device, asked=None):
    """ "fp32" or "bf16": what was asked for, else bf16 where the device computes in it (a T4 or V100 only
    emulates it), and fp32 on CPU and MPS."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return asked or ("bf16" if native or device.type == "xpu" else "fp32")


def autocast(device, asked=None):
    """The context of the forward pass. TF32 stays off: products are in bf16, and fp32 means fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision(device, asked) == "bf16")


def plan_chunks(model, rows, device, micro_batch=None, views=3, asked=None):
    """How a rank's rows go through the towers -> (rows of a chunk, recompute activations?, words for it).

    A block keeps 36.5 bytes of a token and of its width for the backward pass in bf16, 65 in fp32 (measured);
    a parameter takes 16 bytes with its gradient and AdamW's moments. On a CPU a chunk has at most about 3,200
    tokens, to suit the cache. Smaller ones cost more: in chunks of 16, 8 and 4 images ViT-S/16's whole step
    took 3.24, 3.46 and 3.81 times one view's."""
    tower, text = model.visual, getattr(model, "text", None)
    tokens, kept = tower.positions.shape[1], 36.5 if precision(device, asked) == "bf16" else 65
    row_bytes = kept * views * tokens * tower.width * len(tower.blocks)
    if text is not None:
        context, width = text.positions.shape
        row_bytes += 44 * context * width * len(text.blocks)
    fixed = 16 * sum(parameter.numel() for parameter in model.parameters())
    fits = max(1, int((0.9 * free_memory(device) - fixed) / row_bytes))
    chunk = min(rows, fits) if device.type != "cpu" else math.ceil(rows / math.ceil(rows * tokens / 3200))
    recompute = rows > fits
    if micro_batch and micro_batch < rows:
        chunk, recompute = micro_batch, recompute or micro_batch < chunk
    chunks = -(-rows // chunk)
    words = f"in {chunks} chunks of {chunk}" if chunks > 1 else "whole"
    return chunk, recompute, words + (", activations recomputed in the backward pass" if recompute else "")


def free_memory(device):
    """Bytes: of the GPU; on the host half of what it has, where that can be asked (not on Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return 4 * 2**30


def peak_memory():
    """Bytes: of the GPU, else of the process; 0 on Windows, which does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
