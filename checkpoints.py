"""Files of weights: ours and the published ones are read alike, any other is named in one sentence.

A checkpoint is one file, {format, config, weights, tokenizer, run}; `run` is the trainer's, plain data. A
published file is {state_dict, args, ...}. No code from a file is ever run. Not here: the model (slip.py).
"""

import argparse
import os
import re
import zipfile

import torch
from einops import rearrange

from vit import SIZES, interpolate_positions

FORMAT = "slip-1"
FOREIGN = {  # how a file begins: what it is, and what to do
    rb"\Z": "is an empty file: copy or download it again",
    rb"version https://git-lfs": "is a git LFS pointer, not the weights: type git lfs pull beside it",
    rb"(\xef\xbb\xbf)?\s*<": "is a web page, not the weights: download the file that the page links to",
    rb".{8}\{": "is a safetensors file of another program: give a checkpoint.pt or a published SLIP .pt file",
    rb"\x1f\x8b": "is compressed by gzip: unpack it first",
}
BROKEN = {  # what torch.load says: what the file is
    "TorchScript": "is a TorchScript archive, a program: give the file of weights that it was made from",
    "GLOBAL": "holds Python objects, which could run code: give a file of weights and plain data only",
    "": "is not a checkpoint, or is truncated: copy or download it again",
}
OWNERS = {  # names in a state dict: whose it is
    r"(visual\.)?transformer\.resblocks|visual\.conv1": "OpenAI's CLIP or open_clip",
    r"vision_model\.|text_model\.": "Hugging Face's transformers",
    r"cls_token|patch_embed\.proj\.": "timm",
    r"visual\.": "a model of images and captions",
}
WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod)\.")  # of DistributedDataParallel and torch.compile
RENAMES = {  # a part's prefix: the published prefix, then our words and the published ones, replaced in order
    "visual.": "visual. class_token=cls_token positions=pos_embed projection=proj attention.qkv=attn.qkv "
    "attention.out=attn.proj mlp.0=mlp.fc1 mlp.2=mlp.fc2",
    "text.": " positions=positional_embedding blocks=transformer.resblocks norm1=ln_1 norm2=ln_2 "
    "norm.=ln_final. attention.qkv.=attn.in_proj_ attention.out=attn.out_proj "
    "mlp.0=mlp.c_fc mlp.2=mlp.c_proj",
    "branch.head": "image_mlp .0.=.layer1. .1.=.bn1. .3.=.layer2. .4.=.bn2. .6.=.layer3.",
}


def published_name(name):
    """Our name of a tensor -> its name in a published file: visual.positions -> visual.pos_embed."""
    for part, rule in RENAMES.items():
        if name.startswith(part):
            prefix, *pairs = rule.split(" ")
            name = prefix + name.removeprefix(part)
            for pair in pairs:
                name = name.replace(*pair.split("="))
    return name


def our_names(weights, model_weights):
    """Published weights, under the names of a model's: the patch embedding's kernel is folded."""
    ours = {published_name(name): name for name in model_weights}
    weights = {ours.get(name, name): value for name, value in weights.items()}
    kernels = {n: v.flatten(1) for n, v in weights.items() if n.endswith("projection.weight")}  # [D, 3 P P]
    return weights | kernels


def export(model, path):
    """Save the image tower of a slip.SLIP under timm's names; returns the lines of Python that load it."""
    tower, config, size = model.visual, model.config, SIZES[model.config.model]
    weights = {published_name(f"visual.{name}")[7:]: value for name, value in tower.state_dict().items()}
    kernel = weights["patch_embed.proj.weight"]  # [D, 3 P P]; in timm it is a convolution's
    weights["patch_embed.proj.weight"] = rearrange(kernel, "d (c p q) -> d c p q", c=3, p=config.patch)
    atomic_save(weights, path)
    shape = dict(img_size=config.image_size, patch_size=config.patch, embed_dim=size["width"])
    shape |= dict(depth=size["depth"], num_heads=size["heads"])
    return f"""import timm, torch
tower = timm.create_model("vit_base_patch16_224", num_classes=0, **{shape})
tower.load_state_dict(torch.load({str(path)!r}, weights_only=True), strict=True)
features = tower.eval()(images)  # [B, 3, S, S], normalised as for ImageNet -> [B, {size["width"]}]"""


def resize_positions(weights, tower):
    """Weights, with the positions of the image towers interpolated to the patches of `tower`."""
    side = round(tower.patch_embed.num_patches**0.5)
    names = {"visual.positions", "branch.slow_tower.positions"} & weights.keys()
    names = [name for name in names if weights[name].shape[1] != 1 + side * side]
    return weights | {name: interpolate_positions(weights[name], side) for name in names}


def find_checkpoint(path):
    """A file, or a run folder -> the file; FileNotFoundError if there is none."""
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"no checkpoint at {file}: give a run folder, its checkpoint or a weight file"
        )
    return file


def read_checkpoint(path):
    """The dict in a checkpoint, a run folder's or a published file; its weights are float32 and without the
    prefixes that wrappers add. Raises FileNotFoundError or ValueError with one sentence.
    """
    path = find_checkpoint(path)
    with open(path, "rb") as file:
        start = file.read(512)
    for pattern, sentence in FOREIGN.items():
        if re.match(pattern, start, re.DOTALL):
            raise ValueError(f"{path} {sentence}")
    mmap = zipfile.is_zipfile(path) and os.name != "nt"  # Windows cannot replace a file that is mapped
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the published files hold one
            state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # damaged bytes break the reader in every way there is
        sentence = next(sentence for word, sentence in BROKEN.items() if word in str(error))
        raise ValueError(f"{path} {sentence}") from None
    state = state if isinstance(state, dict) else {type(state).__name__: None}
    if not ("format" in state or "state_dict" in state and hasattr(state.get("args"), "model")):
        raise ValueError(f"{path} {whose(state)}: give a checkpoint.pt of train.py or a published SLIP file")
    if state.get("format", FORMAT) != FORMAT:
        raise ValueError(f"{path} has format {state['format']!r}, expected {FORMAT!r}")
    part = "weights" if "format" in state else "state_dict"
    weights = {WRAPPERS.sub("", name): value for name, value in state.get(part, {}).items()}
    return state | {part: {n: v.float() if v.is_floating_point() else v for n, v in weights.items()}}


def whose(state):
    """What a loaded object is, in words, if it is no checkpoint of this project."""
    for part in ("state_dict", "model"):
        state = state[part] if isinstance(state.get(part), dict) else state
    if not any(isinstance(value, torch.Tensor) for value in state.values()):
        return f"holds no weights, but {', '.join(map(str, state))[:60]}"
    names = [WRAPPERS.sub("", str(name)) for name in state]
    owners = (owner for word, owner in OWNERS.items() if any(re.match(word, name) for name in names))
    return f"is a state dict of {next(owners, 'another project')} ({len(names)} entries, {names[0]} first)"


def load_weights(model, weights, path, assign=False):
    """Put the weights that lie at `path` into a model. Names and shapes must be the same: else ValueError."""
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reason = str(error).split("\n")[1].strip()[:160]
        raise ValueError(f"{path} does not fit the model that was asked for: {reason}") from None


def load_fitting(model, weights):
    """Put in what fits by name and shape -> (number of tensors taken, names of what is new)."""
    own = model.state_dict()
    taken = {name: v for name, v in weights.items() if name in own and own[name].shape == v.shape}
    model.load_state_dict(taken, strict=False)
    parts = {name: re.match(r"(branch\.)?\w+", name)[0] for name in own}
    known = {parts[name] for name in taken}
    new = [name if parts[name] in known else parts[name] for name in own if name not in taken]
    return len(taken), list(dict.fromkeys(new))


def atomic_save(state, path):
    """torch.save to a temporary name, flushed and renamed: a reader finds the old file or the new one."""
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
