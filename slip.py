"""SLIP the model: an image tower, a text tower, a projection of each to the joint space, a self-supervised
branch.

Paper: figure 1, section 3. CLIP is SLIP without the branch, SimCLR is SLIP without the language.

    SLIP.forward: views and tokens in, features out (these are gathered); projections and heads stand outside
    it, but for BEiT's, which needs the patches
    images [B, 3, 224, 224] -> encode_image -> [B, 512]        tokens [B, L] -> encode_text -> [B, 512]

`python slip.py FILE` prints what a checkpoint holds. `load(FILE)` reads ours and the published weight files.
Not here: losses (losses.py), the loop (loop.py), data of any kind.
"""

import argparse
import math
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, fields

import torch
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from selfsup import BRANCHES
from text import TextTransformer, Tokenizer
from vit import SIZES, ViT, count_parameters

FORMAT = "slip-1"
METHODS = {  # method: (has the language loss, self-supervised partner)
    "slip": (True, "simclr"),
    "clip": (True, None),
    "simclr": (False, "simclr"),
    "slip-mocov3": (True, "mocov3"),
    "slip-byol": (True, "byol"),
    "slip-beit": (True, "beit"),
    "mocov3": (False, "mocov3"),
    "byol": (False, "byol"),
    "beit": (False, "beit"),
}
PUBLISHED = {  # size in the name of a model (SLIP_VITB16): ours; the last two are in no weight file
    "VITS16": "vit_s16",
    "VITB16": "vit_b16",
    "VITL16": "vit_l16",
    "TINY": "vit_tiny",
    "VITTI16": "vit_ti16",
}
TEXT = {  # text tower, joint space and SSL head beside our small towers; the paper's three have Config's
    "vit_tiny": dict(text_width=128, text_depth=2, text_heads=4, embed=128, ssl_hidden=512, ssl_out=128),
    "vit_ti16": dict(text_width=256, text_depth=6, text_heads=4, ssl_hidden=1024),
}


@dataclass(frozen=True)
class Config:
    """All that is needed to build the model again: plain data, travels in the checkpoint."""

    method: str = "slip"
    model: str = "vit_b16"
    image_size: int = 224
    patch: int = 16
    vocab_size: int = 49408
    context: int = 77
    text_width: int = 512
    text_depth: int = 12
    text_heads: int = 8
    embed: int = 512
    ssl_hidden: int = 4096
    ssl_out: int = 256
    ssl_temp: float = 0.1


def configure(method, model, **changes):
    """The Config of a method and a size (names as in train.py); `changes` are fields of it, None leaves the
    default.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if model not in SIZES:
        raise ValueError(f"unknown model {model!r}: expected one of {', '.join(SIZES)}")
    settings = {"patch": SIZES[model]["patch"], "image_size": 32 if model == "vit_tiny" else 224} | TEXT.get(
        model, {}
    )
    partner = METHODS[method][1]
    settings |= BRANCHES[partner].settings if partner else {}
    settings |= {name: value for name, value in changes.items() if value is not None}
    return Config(method=method, model=model, **settings)


def build(name):
    """A new model from a name (SLIP_VITB16, clip_vits16, SIMCLR_TINY; any case) or from a Config."""
    if isinstance(name, Config):
        return SLIP(name)
    method, _, size = name.upper().partition("_")
    if method.lower() not in METHODS or size not in PUBLISHED:
        raise ValueError(
            f"unknown model {name!r}: expected METHOD_SIZE with METHOD one of "
            f"{', '.join(m.upper() for m in METHODS)} and SIZE one of {', '.join(PUBLISHED)}"
        )
    return SLIP(configure(method.lower(), PUBLISHED[size]))


def in_chunks(apply, batch, micro_batch=None, recompute=False, random=False):
    """Apply a function, dict of rows -> {name: features [b, ...]}, to a batch, `micro_batch` rows at a time.

    Under `recompute` only the features of a chunk are kept; its activations are made again in the backward
    pass: the gradient is that of the whole batch, but for rounding. `random`: it draws (drop path), and must
    draw the same when it runs again.
    """
    rows, parts = len(next(iter(batch.values()))), []
    for start in range(0, rows, micro_batch or rows):
        chunk = {name: value[start : start + (micro_batch or rows)] for name, value in batch.items()}
        if recompute and torch.is_grad_enabled():
            parts.append(checkpoint(apply, chunk, use_reentrant=False, preserve_rng_state=random))
        else:
            parts.append(apply(chunk))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class SLIP(nn.Module):
    """The towers and heads of a Config; parts which its method has no use for are None."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer = config, None
        language, partner = METHODS[config.method]
        size = SIZES[config.model] | {"patch": config.patch}
        self.visual = ViT(image_size=config.image_size, **size)
        self.text = self.branch = None
        if language:
            self.text = TextTransformer(
                config.vocab_size, config.context, config.text_width, config.text_depth, config.text_heads
            )
            width = self.visual.width
            self.image_projection = nn.Parameter(torch.randn(width, config.embed) * width**-0.5)  # W_i [D, E]
            self.text_projection = nn.Parameter(  # W_t [D, E]
                torch.randn(config.text_width, config.embed) * config.text_width**-0.5
            )
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the logarithm of the scale
        if partner:
            self.branch = BRANCHES[partner](self.visual, config.ssl_hidden, config.ssl_out, config.ssl_temp)

    def encode_image(self, images):
        """Normalised images [B, 3, H, W] -> embeddings [B, E], not of unit length."""
        self.needs_language("encode_image")
        return self.visual(images) @ self.image_projection

    def encode_text(self, tokens):
        """Token ids [B, L], each row ended by the end token -> embeddings [B, E], not of unit length."""
        self.needs_language("encode_text")
        return self.text(tokens) @ self.text_projection

    def needs_language(self, what):
        if self.text is None:
            raise ValueError(f"a {self.config.method} model was trained without captions: it has no {what}")

    def forward(self, batch, prepare, micro_batch=None, recompute=False):
        """A batch (a dict of rows on the device) -> {name: features [B, ...]}, in chunks (in_chunks).

        `prepare` turns a chunk of the host's uint8 crops into normalised views.
        """
        return in_chunks(lambda chunk: self.towers(chunk, prepare), batch, micro_batch, recompute)

    def towers(self, chunk, prepare):
        """One chunk through every tower which the method has."""
        chunk, features = prepare(chunk), {}
        if self.text is not None:
            features["image_features"] = self.visual(chunk["images"])  # [b, D]
            features["text_features"] = self.text(chunk["tokens"])  # [b, D]
            if "images2" in chunk:  # the ablation of two views for the language loss
                features["image_features2"] = self.visual(chunk["images2"])  # [b, D]
        if self.branch is not None:
            features |= self.branch.look(self.visual, chunk)  # [b, D] each (BEiT: [b])
        return features


# The checkpoint: one file, {format, config, weights, tokenizer, run}; `run` is the trainer's, plain data.


def write(state, path):
    """Write to a temporary name, flush to the disk, rename: a reader sees the old file or the new one,
    never half of one.
    """
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save(path, model, run=None):
    """Save a model, its tokenizer and the plain data `run`, atomically."""
    tokenizer = model.tokenizer.state() if model.tokenizer is not None else None
    weights = model.state_dict()
    write(
        dict(format=FORMAT, config=asdict(model.config), weights=weights, tokenizer=tokenizer, run=run), path
    )


def read(path):
    """The dict in a checkpoint, ours or a published one, memory-mapped; never runs code from the file.

    Raises FileNotFoundError or ValueError with one sentence.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"no checkpoint at {path}: give the checkpoint.pt of a run folder or a published weight file"
        )
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # the published files hold their arguments so
            mmap = zipfile.is_zipfile(path)  # files of torch before 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is not a checkpoint, or holds objects other than weights and plain data: refused"
        ) from None
    except Exception as error:  # foreign bytes break the reader in every way there is
        reason = str(error).split("\n")[0][:120]
        raise ValueError(f"{path} cannot be read as a checkpoint, it may be torn ({reason})") from None
    if not isinstance(state, dict) or not ({"format", "state_dict"} & state.keys()):
        raise ValueError(
            f"{path} is not a checkpoint of this project (no 'format') nor a published one (no 'state_dict')"
        )
    if "format" in state and state["format"] != FORMAT:
        raise ValueError(f"{path} has format {state['format']!r}, expected {FORMAT!r}")
    return state


def load(path):
    """The model of a checkpoint in evaluation mode on the CPU, with its tokenizer as `model.tokenizer`.

    Takes our checkpoints and the published weight files; for these the tokenizer is CLIP's if its
    vocabulary is installed, else None. Raises FileNotFoundError or ValueError with one sentence.
    """
    state = read(path)
    ours = "format" in state
    config, weights = (parse_config(state, path), state["weights"]) if ours else rename_published(state, path)
    if "head.weight" in weights:
        raise ValueError(
            f"{path} is a classifier, not a model of pictures and captions: give the checkpoint "
            f"it was made from; finetune.py --evaluate tests a fine-tuned one"
        )
    with torch.device("meta"):  # nothing is drawn only to be overwritten
        model = SLIP(config)
    fill(model, weights, path, assign=True)
    if ours and state["tokenizer"]:
        model.tokenizer = Tokenizer.from_state(state["tokenizer"])
    elif not ours and model.text is not None:
        try:
            model.tokenizer = Tokenizer.clip()
        except FileNotFoundError:
            pass  # whoever needs words says so; encode_image works without
    return model.eval()


def parse_config(state, path):
    known = {field.name for field in fields(Config)}
    if set(state["config"]) != known or not {"weights", "tokenizer", "run"} <= state.keys():
        wrong = sorted(set(state["config"]) ^ known) or "parts missing"
        raise ValueError(f"{path} does not fit this version of slip.py: its config differs in {wrong}")
    return Config(**state["config"])


def fill(model, weights, path, assign=False):
    """Put the weights that lie at `path` into a model. Names and shapes must be the same, one by one: else
    ValueError with one sentence.
    """
    found = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    if missing or unknown:
        word, names = ("lacks", missing) if missing else ("holds the unknown", unknown)
        raise ValueError(f"{path} {word} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else ""))
    if wrong:
        name = wrong[0]
        raise ValueError(f"{path}: {name} has shape {list(found[name])}, expected {list(expected[name])}")
    model.load_state_dict(weights, assign=assign)


RENAMES = [  # ours -> published, in order
    (r"^visual\.class_token$", "visual.cls_token"),
    (r"^visual\.positions$", "visual.pos_embed"),
    (r"^visual\.patch_embed\.projection", "visual.patch_embed.proj"),
    (r"^(visual\.blocks\.\d+)\.attention\.qkv", r"\1.attn.qkv"),
    (r"^(visual\.blocks\.\d+)\.attention\.out", r"\1.attn.proj"),
    (r"^(visual\.blocks\.\d+)\.mlp\.0", r"\1.mlp.fc1"),
    (r"^(visual\.blocks\.\d+)\.mlp\.2", r"\1.mlp.fc2"),
    (r"^text\.token_embedding", "token_embedding"),
    (r"^text\.positions$", "positional_embedding"),
    (r"^text\.norm", "ln_final"),
    (r"^text\.blocks\.(\d+)\.norm(\d)", r"transformer.resblocks.\1.ln_\2"),
    (r"^text\.blocks\.(\d+)\.attention\.qkv\.", r"transformer.resblocks.\1.attn.in_proj_"),
    (r"^text\.blocks\.(\d+)\.attention\.out", r"transformer.resblocks.\1.attn.out_proj"),
    (r"^text\.blocks\.(\d+)\.mlp\.0", r"transformer.resblocks.\1.mlp.c_fc"),
    (r"^text\.blocks\.(\d+)\.mlp\.2", r"transformer.resblocks.\1.mlp.c_proj"),
    (r"^branch\.head\.0", "image_mlp.layer1"),
    (r"^branch\.head\.1", "image_mlp.bn1"),
    (r"^branch\.head\.3", "image_mlp.layer2"),
    (r"^branch\.head\.4", "image_mlp.bn2"),
    (r"^branch\.head\.6", "image_mlp.layer3"),
]


def published_name(name):
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def rename_published(state, path):
    """A published file's dict -> (Config, weights under our names)."""
    name = str(getattr(state.get("args"), "model", "")).upper()
    method, _, size = name.partition("_")
    if method.lower() not in METHODS or size not in PUBLISHED:
        raise ValueError(
            f"{path}: its args.model is {name or 'missing'!r}, expected a name such as SLIP_VITB16"
        )
    config = configure(method.lower(), PUBLISHED[size])
    theirs = {key.removeprefix("module."): value for key, value in state["state_dict"].items()}
    with torch.device("meta"):
        ours = {published_name(key): key for key in SLIP(config).state_dict()}  # published name -> our name
    weights = {ours.get(key, key): value for key, value in theirs.items()}
    kernel = weights.get("visual.patch_embed.projection.weight")
    if kernel is not None and kernel.ndim == 4:  # a convolution's kernel is our matrix, folded
        weights["visual.patch_embed.projection.weight"] = rearrange(kernel, "d c p q -> d (c p q)")
    return config, weights


def describe(path):
    """A page about a checkpoint: what was run, with everything that decided its course."""
    state, model = read(path), load(path)
    parts = {"image tower": model.visual, "text tower": model.text, "branch": model.branch}
    lines = [f"{path}: {model.config.method} {model.config.model}, {count_parameters(model):,} parameters"]
    lines += [
        f"  {name:<18} {count_parameters(part):,} parameters"
        for name, part in parts.items()
        if part is not None
    ]
    lines += [f"  {name:<18} {value}" for name, value in asdict(model.config).items()]
    lines += (
        [f"  {'tokenizer':<18} {model.tokenizer.vocab_size:,} ids"] if model.tokenizer is not None else []
    )
    run = state.get("run") or {}
    for name, value in run.get("args", {}).items():
        lines.append(f"  --{name.replace('_', '-'):<16} {value}")
    for name in ("step", "epoch", "versions", "date"):
        if name in run:
            lines.append(f"  {name:<18} {run[name]}")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Print what a checkpoint holds: model, sizes, and how it was trained."
    )
    parser.add_argument("file", help="a run's checkpoint.pt or a published weight file")
    args = parser.parse_args(argv)
    try:
        print(describe(args.file))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
