"""SLIP the model: an image tower, a text tower, a projection of each to the joint space, an SSL branch.

Paper: Algorithm 1. CLIP is SLIP without the branch, SimCLR is SLIP without the language.

    images [B, 3, 224, 224] -> encode_image -> [B, 512]        tokens [B, L] -> encode_text -> [B, 512]

    python slip.py FILE [--export OUT]     # summarise a checkpoint, or write its image tower for timm
"""

import argparse
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import augment
import checkpoints
from checkpoints import find_checkpoint, load_weights, read_checkpoint
from selfsup import BRANCHES, Branch
from text import TextTransformer, Tokenizer
from vit import SIZES, ViT, count_parameters

# method: (has the language loss, self-supervised partner)
METHODS = {"slip": (True, "simclr"), "clip": (True, None), "simclr": (False, "simclr")}
for name in ("mocov3", "byol", "beit"):
    METHODS |= {f"slip-{name}": (True, name), name: (False, name)}
HEADS = {  # text tower, joint space and SSL head of our two small models; the others have Config's
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
    """The Config of a method and a size; `changes` are fields of it, None leaves the default."""
    settings = {"patch": SIZES[model]["patch"], "image_size": 32 if model == "vit_tiny" else 224}
    settings |= HEADS.get(model, {}) | BRANCHES.get(METHODS[method][1], Branch).settings
    settings |= {name: value for name, value in changes.items() if value is not None}
    return Config(method=method, model=model, **settings)


def build(name):
    """A new model of a Config, or of a published name: SLIP_VITB16, clip_vits16, in any case."""
    if isinstance(name, str):
        name = configure(*name.lower().replace("vit", "vit_").split("_", 1))
    return SLIP(name)


def in_chunks(function, batch, micro_batch=None, recompute=False, random=False, prepare=dict):
    """Apply `function`, dict of rows -> {name: features [b, ...]}, to a batch, `micro_batch` rows at a time.
    Unlike gradient accumulation, one loss sees all rows. `prepare` comes first, once. `recompute`:
    activations are computed again in the backward pass; `random`: drop path is then drawn the same."""
    if recompute and torch.is_grad_enabled():
        function = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=random)
    size, parts = micro_batch or len(next(iter(batch.values()))), []
    for rows in zip(*(value.split(size) for value in batch.values())):
        parts.append(function(prepare(dict(zip(batch, rows)))))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class SLIP(nn.Module):
    """The towers and heads of a Config; `text` and `branch` are None where its method has none."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer = config, None
        language, partner = METHODS[config.method]
        self.visual = ViT(image_size=config.image_size, **SIZES[config.model] | {"patch": config.patch})
        self.text = self.branch = None
        if language:
            wide, text_width = self.visual.width, config.text_width
            size = (config.vocab_size, config.context, text_width, config.text_depth, config.text_heads)
            self.text = TextTransformer(*size)
            self.image_projection = nn.Parameter(torch.randn(wide, config.embed) * wide**-0.5)  # W_i [D, E]
            self.text_projection = nn.Parameter(torch.randn(text_width, config.embed) * text_width**-0.5)
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # the logarithm of the scale
        if partner:
            self.branch = BRANCHES[partner](self.visual, config.ssl_hidden, config.ssl_out, config.ssl_temp)

    def check(self, what, inputs):
        if self.text is None:
            raise ValueError(f"a {self.config.method} model was trained without captions: it has no {what}")
        if isinstance(inputs, list) and not inputs:
            raise ValueError(f"{what} found an empty list, expected one input or more")

    def preprocess(self, image):
        """A PIL image -> its normalised evaluation view [1, 3, S, S]."""
        return augment.normalise(augment.evaluation_view(image.convert("RGB"), self.config.image_size)[None])

    def encode_image(self, images):
        """Normalised images [B, 3, S, S], a PIL image or a list of them -> embeds [B, E], not normalised."""
        self.check("encode_image", images)
        if not isinstance(images, torch.Tensor):
            images = images if isinstance(images, list) else [images]
            images = torch.cat([self.preprocess(image) for image in images])
        return self.visual(images.to(self.image_projection.device)) @ self.image_projection

    def encode_text(self, tokens):
        """Token ids [B, L], a caption or a list of them -> embeds [B, E], not normalised."""
        self.check("encode_text", tokens)
        if not isinstance(tokens, torch.Tensor):
            if self.tokenizer is None:
                raise ValueError("found no tokenizer: pip install --no-deps open_clip_torch brings CLIP's")
            tokens = self.tokenizer(tokens, self.config.context)
        return self.text(tokens.to(self.text_projection.device)) @ self.text_projection

    def forward(self, batch, micro_batch=None, recompute=False):
        """A rank's rows -> {name: features [b, ...]}, in chunks: "image", "text", "image2", the branch's.
        Rows: uint8 crops [b, 3, S, S] "images", "images2", "view1", "view2"; "tokens" [b, L]; on the host
        "NAME_params" [b, 13] of strong views; for BEiT "view1_mask", bool [b, N]."""
        return in_chunks(self.towers, batch, micro_batch, recompute, prepare=self.make_views)

    def make_views(self, chunk):
        """A chunk's crops -> normalised views, in the precision of autocast, and the branch's targets."""
        views = {name: rows for name, rows in chunk.items() if name in ("tokens", "view1_mask")}
        for name in ("images", "images2", "view1", "view2"):
            if f"{name}_params" in chunk:
                views[name] = augment.strong(chunk[name], chunk[f"{name}_params"])
            elif name in chunk:
                views[name] = augment.normalise(chunk[name])
        views |= self.branch.targets(views) if self.branch is not None else {}
        kind = self.visual.class_token.device.type
        if torch.is_autocast_enabled(kind):
            kept = torch.get_autocast_dtype(kind)
            views = {n: view.to(kept) if view.is_floating_point() else view for n, view in views.items()}
        return views

    def towers(self, views):
        """The views of a chunk through every tower of the method -> {name: features [b, ...]}."""
        features = {}
        if self.text is not None:
            features |= {"image": self.visual(views["images"]), "text": self.text(views["tokens"])}  # [b, D]
            features |= {"image2": self.visual(views["images2"])} if "images2" in views else {}  # [b, D]
        return features | (self.branch.features(self.visual, views) if self.branch is not None else {})


def save(path, model, run=None):
    """Save a model, its tokenizer and the plain data `run`, renamed into place."""
    state = {"format": checkpoints.FORMAT, "config": asdict(model.config), "weights": model.state_dict()}
    state |= {"tokenizer": model.tokenizer and model.tokenizer.state(), "run": run}
    checkpoints.atomic_save(state, path)


def unpack(path):
    """A checkpoint, ours or a published file -> (Config, weights under our names, Tokenizer or None)."""
    state, tokenizer = read_checkpoint(path), None
    if "format" in state:
        tokenizer = Tokenizer(state["tokenizer"]["merges"]) if state["tokenizer"] else None
        try:
            return configure(**state["config"]), state["weights"], tokenizer
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} does not fit this version of slip.py: {error}") from None
    with torch.device("meta"):
        model = build(state["args"].model)
    with suppress(FileNotFoundError):  # encode_text asks for the vocabulary; encode_image works without
        tokenizer = Tokenizer.clip() if model.text is not None else None
    return model.config, checkpoints.our_names(state["state_dict"], model.state_dict()), tokenizer


def load(path, image_size=None):
    """The model of a checkpoint or a published file, for use: on the CPU, float32, without gradients."""
    if not isinstance(image_size, int | None):
        raise ValueError(f"found image_size={image_size!r}: to choose a device, type load(path).to(device)")
    config, weights, tokenizer = unpack(path)
    if weights.keys() & {"head.weight", "weight"}:  # of finetune.py, of linear.py
        raise ValueError(f"{path} holds a classifier, no SLIP: type the run that it began with")
    with torch.device("meta"):  # nothing is drawn only to be overwritten
        model = SLIP(replace(config, image_size=image_size or config.image_size))
    load_weights(model, checkpoints.resize_positions(weights, model.visual), path, assign=True)
    model.tokenizer = tokenizer
    return model.requires_grad_(False).eval()


def initialise(model, other):
    """Copy what fits of a SLIP of another method or image size -> (tensors taken, names of new parts).
    The text tower and the joint space come only if both have the same tokenizer."""
    weights, tokenizer = other.state_dict(), other.tokenizer
    if other.config.model != model.config.model:
        raise ValueError(f"--init holds a {other.config.model}, expected {model.config.model}")
    same = tokenizer and model.tokenizer and tokenizer.merges == model.tokenizer.merges
    if not same:
        weights = {n: value for n, value in weights.items() if n.startswith(("visual", "branch"))}
    slow = {f"branch.slow_tower.{n[7:]}": v for n, v in weights.items() if n.startswith("visual.")}
    weights = checkpoints.resize_positions(slow | weights, model.visual)  # a new momentum encoder is a copy
    own = model.state_dict()
    taken = {n: value for n, value in weights.items() if n in own and own[n].shape == value.shape}
    model.load_state_dict(taken, strict=False)
    return len(taken), list(dict.fromkeys(".".join(n.split(".")[:2]) for n in own if n not in taken))


def describe(path):
    """A page about a checkpoint: the model, its parts, how it was trained, and what that cost."""
    model, run = load(path), read_checkpoint(path).get("run") or {}
    lines = {name: f"{count_parameters(part):,} parameters" for name, part in model.named_children()}
    lines |= asdict(model.config) | run.get("args", {})
    lines |= {n: run[n] for n in ("step", "best", "best_step", "torch", "date", "cost") if n in run}
    return "\n".join([str(find_checkpoint(path)), *(f"  {n:<18} {value}" for n, value in lines.items())])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Summarise a checkpoint, or hand its image tower on.")
    parser.add_argument("file", help="a run folder, its checkpoint.pt or a published weight file")
    parser.add_argument("--export", metavar="OUT", help="write the image tower, under the names of timm")
    args = parser.parse_args(argv)
    try:
        print(checkpoints.export(load(args.file), args.export) if args.export else describe(args.file))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
