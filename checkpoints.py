"""Files of weights: ours and the published ones are read alike, any other is named in one sentence.

A checkpoint is {format, config, weights, tokenizer, run}, a published file {state_dict, args, ...}.
"""

import argparse
import os
import re

import torch

from vit import SIZES, interpolate_positions

FORMAT = "slip-1"
PUBLISHED = re.compile(r"(slip|clip|simclr)_vit[sbl]16", re.IGNORECASE)  # args.model
FOREIGN = {  # how a file begins, or what torch.load says of it: what it is, and what to do
    r"version https://git-lfs": "is a git LFS pointer, not the weights: type git lfs pull beside it",
    r"\s*<": "is a web page, not the weights: download the file that the page links to",
    r".{8}\{": "is a safetensors file of another program: give a checkpoint.pt or a published SLIP .pt file",
    r".*TorchScript": "is a TorchScript archive, a program: give the file of weights that it was made from",
    r"": "is not a checkpoint, is truncated, or holds more than weights and plain data",
}
RENAMES = {  # how our name begins: our words and the published ones, replaced in this order
    "visual": "class_token=cls_token positions=pos_embed projection=proj attention=attn attn.out=attn.proj "
    "mlp.0=mlp.fc1 mlp.2=mlp.fc2",
    "text": "text.= positions=positional_embedding blocks=transformer.resblocks norm1=ln_1 norm2=ln_2 "
    "norm.=ln_final. attention=attn qkv.=in_proj_ attn.out=attn.out_proj mlp.0=mlp.c_fc mlp.2=mlp.c_proj",
    "branch": "branch.head=image_mlp .0.=.layer1. .1.=.bn1. .3.=.layer2. .4.=.bn2. .6.=.layer3.",
}


def published_name(name):
    """Our name of a tensor -> its name in a published file: visual.positions -> visual.pos_embed."""
    for pair in RENAMES.get(name.split(".")[0], "").split():
        name = name.replace(*pair.split("="))
    return name


def our_names(weights, model_weights):
    """Published weights, under the names of a model's: the patches' kernel [D, 3, P, P] is folded."""
    ours = {published_name(name): name for name in model_weights}
    return {ours.get(n, n): v.flatten(1) if v.ndim == 4 else v for n, v in weights.items()}


def export(model, path):
    """Save the image tower of a slip.SLIP under timm's names; returns the lines of Python that load it."""
    config, size = model.config, SIZES[model.config.model]
    weights = {published_name(f"visual.{n}")[7:]: value for n, value in model.visual.state_dict().items()}
    kernel = weights["patch_embed.proj.weight"]  # [D, 3 P P]; in timm it is a convolution's
    weights["patch_embed.proj.weight"] = kernel.unflatten(1, (3, config.patch, config.patch))
    atomic_save(weights, path)
    sizes = f"embed_dim={size['width']}, depth={size['depth']}, num_heads={size['heads']}, num_classes=0"
    return f"""import timm, torch
tower = timm.models.VisionTransformer({config.image_size}, {config.patch}, {sizes})
tower.load_state_dict(torch.load({str(path)!r}))
features = tower.eval()(images)  # [B, 3, S, S], normalised as for ImageNet -> [B, {size["width"]}]"""


def resize_positions(weights, tower):
    """Weights, with the positions of the image towers interpolated to the patches of `tower`."""
    side = int(tower.positions.shape[1] ** 0.5)  # of 1 + side * side
    names = {"visual.positions", "branch.slow_tower.positions"} & weights.keys()
    return weights | {name: interpolate_positions(weights[name], side) for name in names}


def find_checkpoint(path):
    """A file, or a run folder -> the file; FileNotFoundError if there is none."""
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise FileNotFoundError(f"no checkpoint at {file}: give a run folder or a file of weights")
    return file


def read_checkpoint(path):
    """The dict in a checkpoint, a run folder's or a published file; its weights are float32 and without the
    prefixes that wrappers add. Raises ValueError. Windows cannot replace a mapped file."""
    path = find_checkpoint(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the published files hold one
            state = torch.load(path, map_location="cpu", mmap=os.name != "nt", weights_only=True)
    except Exception as error:  # damaged bytes break the reader in every way there is
        with open(path, "rb") as file:
            found = file.read(64).decode("latin-1") + str(error)
        sentence = next(FOREIGN[pattern] for pattern in FOREIGN if re.match(pattern, found, re.DOTALL))
        raise ValueError(f"{path} {sentence}") from None
    state = state if isinstance(state, dict) else {type(state).__name__: None}
    published = "state_dict" in state and PUBLISHED.fullmatch(str(getattr(state.get("args"), "model", "")))
    if state.get("format") != FORMAT and not published:
        names = ", ".join(map(str, state.get("state_dict", state.get("model", state))))
        raise ValueError(f"{path} is a state dict of another project or version, not of SLIP: {names[:80]}")
    part = "weights" if "format" in state else "state_dict"
    weights = {re.sub(r"(?<![^.])(module|_orig_mod)\.", "", n): value for n, value in state[part].items()}
    return state | {part: {n: v.float() if v.is_floating_point() else v for n, v in weights.items()}}


def load_weights(model, weights, path, assign=False):
    """Put the weights that lie at `path` into a model. Names and shapes must be the same: else ValueError."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit: {str(error).splitlines()[1].strip()[:160]}") from None


def atomic_save(state, path):
    """Text, or what torch.save takes, to a temporary name, then renamed: readers find the old or the new."""
    with open(f"{path}.tmp", "wb") as file:
        if isinstance(state, str):
            file.write(state.encode())
        else:
            torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before it takes the place of the last one
    os.replace(f"{path}.tmp", path)
