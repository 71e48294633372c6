"""The recipe: the paper's implementation details as one table, parameter groups, learning rate of a step.

A flag left out on the command line takes its value from here.

    recipe(method, data, images) -> {lr, wd, batch_size, epochs, ...}     (step, steps) -> learning rate
    finetune(model, data) and LINEAR: the same for the two other test tasks
"""

import math

import device

WORKERS = max(1, min(8, device.cpus() - 1))  # processes that decode, on each rank
SMALL_SET = 20_000  # images: fewer are decoded in the main process and get the small recipe
# The paper's pre-training: AdamW, one warm-up epoch, cosine; lr and wd are each method's own. None: the
# model's value. light_crop, strong_crop: the smallest share of the image in CLIP's crop and in a strong view.
PAPER = dict(model="vit_b16", image_size=None, patch=None, ssl_temp=None, vocab="clip", workers=WORKERS)
PAPER |= dict(epochs=25, batch_size=4096, warmup_epochs=1.0, ssl_scale=1.0, light_crop=0.5, strong_crop=0.08)
PAPER |= dict(mask_same_class=False)
BETAS, EPS, START_LR, END_LR = (0.9, 0.98), 1e-8, 1e-6, 1e-5
METHOD = {  # method: lr, wd at batch 4096; another --batch-size leaves them as they are: set --lr with it
    "slip": dict(lr=3e-3, wd=0.1),
    "clip": dict(lr=5e-4, wd=0.5),
    "simclr": dict(lr=3.2e-3, wd=0.1),
}
for partner in ("mocov3", "byol", "beit"):  # not published: slip-X takes SLIP's values, X SimCLR's
    METHOD |= {f"slip-{partner}": METHOD["slip"], partner: METHOD["simclr"]}
PAPER_SETS = {"cc3m": dict(epochs=40), "cc12m": dict(epochs=35)}
# Sets of fewer than 20,000 images, and those below: ours, for two CPU cores.
SMALL = dict(model="vit_tiny", epochs=25, batch_size=64, lr=1e-3, wd=0.1)
SMALL |= dict(strong_crop=0.3, vocab="train", workers=0, mask_same_class=True)
SMALL_SETS = {
    "scenes": dict(epochs=10),
    "fashionmnist": dict(epochs=1, image_size=28, patch=7),
    "cifar10": dict(epochs=10, strong_crop=0.2),
    "cifar100": dict(epochs=20, strong_crop=0.2),
}
# From trained weights (--init) on pairs of one's own: a small rate, so that what the weights know stays.
FROM_WEIGHTS = dict(lr=3e-5, wd=0.1, epochs=10, batch_size=64, warmup_epochs=1.0)

# Fine-tuning (BEiT's recipe): the defaults for imagenet. lr belongs to the batch size beside it; another
# batch size scales it in proportion. randaugment: the magnitude, whose deviation is 0.5. test_resize: the
# short side of a test image over the side of its centre crop.
FINETUNE = dict(epochs=100, warmup_epochs=20.0, batch_size=1024, lr=4e-3, wd=0.05, layer_decay=0.65)
FINETUNE |= dict(drop_path=0.1, mixup=0.8, cutmix=1.0, smoothing=0.1, randaugment=9.0, erasing=0.25)
FINETUNE |= dict(crop=0.08, test_resize=256 / 224)
FINETUNE_SIZE = {
    "vit_s16": dict(drop_path=0.0),
    "vit_l16": dict(layer_decay=0.75, epochs=50, warmup_epochs=5.0),
}
FINETUNE_END_LR = 1e-6
# Everywhere else: ours, for little images and two CPU cores; lr, layer decay and crop were chosen on the
# held-out part of Fashion-MNIST's training images (300 steps, SLIP).
FINETUNE_SMALL = FINETUNE | dict(epochs=5, warmup_epochs=0.5, batch_size=64, lr=2e-3, drop_path=0.0)
FINETUNE_SMALL |= dict(mixup=0.0, cutmix=0.0, randaugment=0.0, erasing=0.0, crop=0.9, test_resize=1.0)
FINETUNE_SETS = {"fashionmnist": dict(epochs=1, warmup_epochs=0.1), "cifar10": dict(epochs=10)}
# Linear classification. The rate is MoCo v3's rule, 0.1 x batch / 256; the published script divides the batch
# by the ranks first: a bug, not taken.
LINEAR = dict(epochs=90, batch_size=1024, lr=0.1, lr_batch=256)
LINEAR |= dict(momentum=0.9, crop=0.08, test_resize=256 / 224)


def recipe(method, data, images, name=None):
    """The values of the flags which the paper, or a small set, decides. `images`: how many the set has;
    `name`: "paper" or "small", None for what suits the set."""
    data = "scenes" if data.startswith("scenes") else data
    small = data in SMALL_SETS or images < SMALL_SET
    name = name or ("small" if small else "paper")
    own = SMALL | SMALL_SETS.get(data, {}) if name == "small" else PAPER_SETS.get(data, {})
    return PAPER | {"recipe": name} | METHOD[method] | own


def workers(images):
    """How many processes decode a set of so many images, on each rank."""
    return WORKERS if images >= SMALL_SET else 0


def finetune(model, data):
    """The values of fine-tuning's flags for a size of vit.SIZES and a set: the paper's for imagenet."""
    if data != "imagenet":
        return FINETUNE_SMALL | FINETUNE_SETS.get(data, {})
    return FINETUNE | FINETUNE_SIZE.get(model, {})


def parameter_groups(model, wd):
    """Two groups for the optimizer: parameters of two dimensions and more decay (class token and positions
    too); biases, LayerNorm, BatchNorm and the logit scale do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": wd},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def layer_groups(model, depth, wd, decay):
    """Groups for fine-tuning: a layer's learning rate is `decay` times that of the layer above it.

    Layer 0: patch embedding, class token, positions; i + 1: block i; depth + 1: the last norm and the head,
    whose `lr_scale` is 1. No weight decay for 1-d parameters, class token and positions, as in BEiT's code.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith("visual.blocks."):
            layer = int(name.split(".")[2]) + 1
        elif name.startswith(("visual.patch_embed.", "visual.class_token", "visual.positions")):
            layer = 0
        spared = parameter.ndim < 2 or name in ("visual.class_token", "visual.positions")
        scale = decay ** (depth + 1 - layer)
        empty = {"params": [], "weight_decay": 0.0 if spared else wd, "lr_scale": scale}
        groups.setdefault((layer, spared), empty)["params"].append(parameter)
    return list(groups.values())


def learning_rate(step, steps, warmup, peak, end=END_LR):
    """Linear from START_LR over `warmup` steps, then a cosine from `peak` that reaches `end` at the last of
    `steps`; neither end is above the peak."""
    start, end = min(START_LR, peak), min(end, peak)
    if step < warmup:
        return start + (peak - start) * step / warmup
    done = (step - warmup) / max(1, steps - 1 - warmup)
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, done))) / 2
