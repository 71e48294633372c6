"""The recipe: the paper's implementation details as one table, the parameter groups, the learning rate of a
step.

Paper: section 4 and appendix. A flag left out on the command line takes its value from here.

    (method, data) -> {lr, wd, batch_size, epochs, model, ...}        (step, steps) -> learning rate
"""

import math
import os

# The paper's pre-training: AdamW, one warm-up epoch, cosine; lr and wd are each method's own.
PAPER = dict(
    model="vit_b16",
    image_size=None,  # the model's own
    epochs=25,
    batch_size=4096,
    warmup_epochs=1.0,
    ssl_scale=1.0,
    ssl_temp=0.1,
    light_crop=0.5,  # smallest share of the picture in CLIP's crop
    strong_crop=0.08,  # and in a self-supervised view
    vocab="clip",
    workers=min(8, (os.cpu_count() or 2) - 1),
)
BETAS, EPS, START_LR, END_LR = (0.9, 0.98), 1e-8, 1e-6, 1e-5
METHOD = {  # method: lr, wd at batch 4096
    "slip": dict(lr=3e-3, wd=0.1),
    "clip": dict(lr=5e-4, wd=0.5),
    "simclr": dict(lr=3.2e-3, wd=0.1),
}
# What a set changes. The small ones are ours, for two CPU cores.
SCENES = ("scenes", "scenes-kind", "scenes-colour", "scenes-texture")
SMALL = dict(model="vit_tiny", batch_size=64, vocab="train", lr=1e-3, wd=0.1, workers=0)
SETS = {
    **{name: SMALL | dict(epochs=10, strong_crop=0.3) for name in SCENES},
    "fashionmnist": SMALL | dict(epochs=1, image_size=28, patch=7, strong_crop=0.3),
    "cifar10": SMALL | dict(epochs=10, strong_crop=0.2),
    "cifar100": SMALL | dict(epochs=20, strong_crop=0.2),
    "cc3m": dict(epochs=40),
    "cc12m": dict(epochs=35),
}


def recipe(method, data):
    """The values of all flags which the paper, or a small set, decides; raises ValueError for an unknown
    method.
    """
    if method not in METHOD:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHOD)}")
    return PAPER | {"patch": None} | METHOD[method] | SETS.get(data, {})


def parameter_groups(model, wd):
    """Two groups for the optimizer: matrices decay; biases, LayerNorm, BatchNorm and other 1-d parameters
    do not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def learning_rate(step, steps, warmup, peak, start=START_LR, end=END_LR):
    """Linear from `start` over `warmup` steps, then a cosine from `peak` that reaches `end` at the last of
    `steps`.
    """
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2
