"""Zero-shot transfer: name the class of an image by the caption that suits it best.

    python zeroshot.py --checkpoint F --data scenes                            # the built-in test split
    python zeroshot.py --checkpoint F --data all --root data                   # every set found there
    python zeroshot.py --checkpoint F G --data all --root data                 # two models side by side
    python zeroshot.py --checkpoint F --image cat.jpg --classes "a dog,a cat"  # a name for one image
    python zeroshot.py --checkpoint F --folder photos --query "a red bus"      # images for a sentence
    python zeroshot.py --checkpoint F --data coco --retrieval                  # captions and images
    python zeroshot.py --list                                                  # sets, and how to get them

Paper: zero-shot transfer. For each class every prompt is filled and encoded, each embedding normalised, their
mean normalised again; the class with the largest cosine wins.

    names, templates -> classifier -> [K, E]        images -> encode_image -> [n, E]        cosines [n, K]

Not here: metrics (evaluate.py); a table of many sets (transfer.py); class names and prompts (sets.py).
"""

import argparse
import os

import torch
import torch.nn.functional as F

import console
import data
import folders
import ranks
import recipe
import sets
import slip
import transfer
from device import autocast
from evaluate import apply_to_set, metrics, record
from images import Files, Source, is_image, read_image, subset
from transfer import split_names, synonyms

SEEN = transfer.SEEN
NO_TOKENIZER = "this checkpoint has no tokenizer: CLIP's comes with open_clip (pip install open_clip_torch)"


@torch.no_grad()
def classifier(model, names, templates, device):
    """Class names and templates with {} -> unit embeddings [K, E]. A class is a name or a list of names; the
    prompts of all of them are averaged.
    """
    groups = [
        [sets.fill_template(template, name) for name in synonyms(entry) for template in templates]
        for entry in names
    ]
    embeds = embed_texts(model, [prompt for group in groups for prompt in group], device)  # [all prompts, E]
    means = [group.mean(0) for group in embeds.split([len(group) for group in groups])]
    return F.normalize(torch.stack(means), dim=-1)


def evaluate(model, source, device, *, names=None, templates=None, workers=0):
    """Zero-shot accuracy of a model on a labelled set: {metric: per cent}, as evaluate.metrics gives them.

    `names`, `templates`: instead of the set's own. The images are sharded over the ranks; the model's mode is
    left as it was. Raises console.Stop for an image that cannot be decoded.
    """
    names, templates = names or source.classes, templates or sets.prompts(source.name)
    weights = classifier(model, names, templates, device)  # [K, E]
    embeds, labels, _ = embed_images(model, source, device, workers)  # [n, E], [n]
    return metrics(embeds @ weights.T, labels)  # in float32: near cosines are equal in bf16


def embed_images(model, source, device, workers=0, skip_bad=False):
    """The images of a set -> (unit embeddings [n, E], labels [n], indices [n]), sharded over the ranks."""

    def embed(images):
        return unit(model.encode_image(images))

    training, size = model.training, model.config.image_size
    model.eval()
    found = apply_to_set(source, size, device, embed, workers=workers, skip_bad=skip_bad)
    model.train(training)
    return found


@torch.no_grad()
def embed_texts(model, texts, device):
    """Strings -> unit embeddings [M, E], with a live line. Every rank computes all of them."""
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    if not texts:
        raise ValueError("found no text to embed, expected at least one")
    device, embeds, live = torch.device(device), [], console.Live()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # like lengths together: less padding
    for start in range(0, len(order), 64):
        live.show(f"{start:,}/{len(order):,} texts")
        tokens = model.tokenizer([texts[i] for i in order[start : start + 64]], model.config.context)
        with autocast(device):
            embeds.append(unit(model.encode_text(tokens.to(device))))  # [64, E]
    live.clear()
    return torch.cat(embeds)[torch.tensor(order).argsort()]  # in the order of `texts`


def unit(embeds):
    return F.normalize(embeds.float(), dim=-1)


# Retrieval: captions and their images


def embed_pairs(model, source, device, workers=0):
    """A captioned set -> (images [N, E], texts [M, E], owner [M]: the image of each caption), of unit length.
    Images that cannot be decoded are warned of and left out, with their captions.
    """
    images, _, indices = embed_images(model, source, device, workers, skip_bad=True)
    captions = [synonyms(source.label(i)) for i in indices.tolist()]
    owner = torch.tensor([i for i, group in enumerate(captions) for _ in group], device=images.device)
    return images, embed_texts(model, [text for group in captions for text in group], device), owner


def recall(images, texts, owner, ks=(1, 5, 10)):
    """Recall at k both ways: {"image to text": {k: per cent}, "text to image": {k: per cent}}.

    images [N, E], texts [M, E] of unit length, owner [M]: the image of each caption. A caption finds its
    image if that is among the k nearest; an image finds a caption if any of its own is. A stranger as near as
    the right one goes before it, so that equal embeddings find nothing.
    """
    own = torch.arange(len(images), device=owner.device)
    ways = {"image to text": (images, own, texts, owner), "text to image": (texts, owner, images, own)}
    found = {}
    for way, (queries, query_owner, items, item_owner) in ways.items():
        places = []  # how many strangers go before the right one
        for rows, numbers in zip(queries.split(256), query_owner.split(256)):
            cosines, right = rows @ items.T, numbers[:, None] == item_owner  # [256, items]
            best = cosines.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
            places.append(((cosines >= best) & ~right).sum(1))
        found[way] = {k: 100 * (torch.cat(places) < k).float().mean().item() for k in ks}
    return found


def open_pairs(args, run_args):
    """-> (captioned set, its split): "test" where there is one; else "val", what the run held out of its own
    data; else "train".
    """
    split, name, trained = args.split, args.data, run_args.get("data") or "other data"
    source, there = sets.open_captions(name, args.root, "train" if split == "val" else split)
    same = name == trained and (name in sets.SCENES or same_file(args.root, run_args["root"]))
    same = same or same_file(name, trained)
    split = split or ("val" if same and there == "train" else there)
    if split == "val":
        held = data.holdout(len(source), run_args["seed"])[1] if same else ()
        if len(held) == 0:
            raise ValueError(f"this run, on {trained}, held nothing of {name} out: type --split train")
        source = subset(source, held)
    if len(source) > args.images:
        source = subset(source, sorted(data.permutation(len(source), 0, 0)[: args.images]))
    return source, split


def same_file(a, b):
    return os.path.exists(a) and os.path.realpath(a) == os.path.realpath(b)


def run_retrieval(args, models, device, pairs):
    for (path, (model, _)), (source, split) in zip(models.items(), pairs):
        images, texts, owner = embed_pairs(model, source, device, workers_for(source, args))
        row = {"split": split, "images": len(images), "captions": len(texts)}
        ranks.say(f"{path}, {source.name}: {split} split, {len(images):,} images, {len(texts):,} captions")
        for way, values in recall(images, texts, owner).items():
            ranks.say(f"  {way}   " + "  ".join(f"R@{k} {value:6.2f}%" for k, value in values.items()))
            row |= {f"{way} R@{k}": value for k, value in values.items()}
        guess = "  ".join(f"R@{k} {min(100, 100 * k / len(images)):6.2f}%" for k in values)
        ranks.say(f"  chance, about   {guess}")
        record(path, "retrieval", source.name, row)
        if split == "train":
            ranks.say("  (the training split: the model may have seen these images in training)")


# One image, a folder


def open_image(path):
    """An image file -> RGB PIL image. Raises ValueError with one sentence."""
    try:
        return read_image(path)
    except Exception as error:  # damaged files break Pillow in every way there is
        raise ValueError(f"cannot decode the image {path}: {error}") from None


@torch.no_grad()
def name_image(model, image, names, device):
    """The names with their probabilities for a PIL image, the likeliest first: [(probability, name)]."""
    embed = unit(model.encode_image(model.preprocess(image).to(device)))  # [1, E]
    logits = model.logit_scale.exp() * embed @ classifier(model, names, ["{}"], device).T  # [1, K]
    return sorted(zip(logits.softmax(1)[0].tolist(), names), reverse=True)


def run_image(args, model, device, image):
    for probability, name in name_image(model, image, split_names(args.classes), device):
        ranks.say(f"{probability:6.1%}  {name}")


def open_folder(folder):
    """The images in a folder, and in those below it, as a set without captions."""
    paths = [path for path in folders.walk(folder) if is_image(path)]
    if not paths:
        raise FileNotFoundError(f"no images in {folder}: expected a folder of .jpg, .png and the like")
    return Source(folder, Files(paths, [""] * len(paths)))


def search(model, source, query, device, workers=0):
    """The images of a set for a sentence, the nearest first: [(cosine, path)]."""
    text = embed_texts(model, [query], device)[0]
    embeds, _, indices = embed_images(model, source, device, workers, skip_bad=True)
    cosines, order = (embeds @ text).sort(descending=True, stable=True)
    return [(c, source.where(i)) for c, i in zip(cosines.tolist(), indices[order].tolist())]


def run_query(args, model, device, source):
    for cosine, path in search(model, source, args.query, device, workers_for(source, args))[: args.top]:
        ranks.say(f"{cosine:6.3f}  {path}")


# The command


def arguments():
    about, examples = __doc__.split("\n\n")[:2]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=examples, formatter_class=raw)
    add = parser.add_argument
    add("--checkpoint", nargs="+", metavar="FILE", help="run folders, checkpoints or published weight files")
    add("--data", default="scenes", help='sets with commas between, or "all" (default: %(default)s)')
    add("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    add("--labels", metavar="JSON", help="published labels.json, read under the name of the set")
    add("--templates", nargs="+", help='published templates.json, or prompts, as "a drawing of a {}"')
    add("--list", action="store_true", help="show every set, whether it is there, and how to get it")
    add("--download", action="store_true", help="fetch the sets of --data which torchvision can")
    only = parser.add_mutually_exclusive_group().add_argument
    only("--image", metavar="FILE", help="name one image, with --classes")
    only("--folder", metavar="DIR", help="rank the images of a folder for a sentence, with --query")
    only("--retrieval", action="store_true", help="recall at 1, 5 and 10 both ways on a captioned set")
    add("--classes", help='with --image: the names to choose from, as "a dog,a cat"')
    add("--query", metavar="TEXT", help='with --folder: the sentence, as "a red bus"')
    add("--top", type=console.positive_int, default=5, help="with --query: how many (default: %(default)s)")
    split = "with --retrieval; val: what the run held out of its data (default: test, else val, else train)"
    add("--split", choices=("train", "val", "test"), help=split)
    images = "with --retrieval: N images of a larger set, always the same (default: %(default)s)"
    add("--images", type=console.positive_int, default=5000, metavar="N", help=images)
    add("--workers", type=console.natural, help="processes that decode (default: none for small sets)")
    add("--device", help="cpu, cuda, cuda:N, xpu or mps (default: the best there is)")
    return parser


def workers_for(source, args):
    return recipe.workers(len(source)) if args.workers is None else args.workers


def set_up(args):
    """Open what is asked for -> a function that does the work. Raises ValueError or OSError."""
    if args.list:
        return lambda: transfer.show_list(args.root)
    if args.download:
        if "all" in split_names(args.data):
            raise ValueError("--download wants sets by name in --data: all are hundreds of gigabytes")
        return lambda: transfer.fetch(split_names(args.data), args.root)
    if not args.checkpoint:
        raise ValueError("--checkpoint is missing: a run folder, its checkpoint.pt or published weights")
    if bool(args.folder) != bool(args.query) or bool(args.image) != bool(split_names(args.classes)):
        raise ValueError('go together: --image FILE --classes "a dog,a cat"; --folder DIR --query "a bus"')
    if len(args.checkpoint) > 1 and (args.image or args.folder):
        raise ValueError(f"--image and --folder take one --checkpoint: found {len(args.checkpoint)}")
    device, models = ranks.start(args.device), {}
    for path in map(slip.find_checkpoint, args.checkpoint):
        model = slip.load(path).to(device)
        model.needs_language("zero-shot transfer")
        if model.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        models[path] = (model, (slip.read_checkpoint(path).get("run") or {}).get("args", {}))
    if args.image:
        image = open_image(args.image)
        return lambda: run_image(args, model, device, image)
    if args.folder:
        source = open_folder(args.folder)
        return lambda: run_query(args, model, device, source)
    if args.retrieval:
        pairs = [open_pairs(args, run_args) for _, run_args in models.values()]
        return lambda: run_retrieval(args, models, device, pairs)
    tasks, left_out = transfer.open_tasks(args)

    def measure(model, source, templates):
        return evaluate(model, source, device, templates=templates, workers=workers_for(source, args))

    return lambda: transfer.run_table(models, tasks, left_out, measure)


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)

    def command():
        try:
            work = set_up(args)
        except (ValueError, OSError) as error:
            console.fail(parser, error)
        code = work()
        ranks.stop()
        return code

    return console.guarded(command)


if __name__ == "__main__":
    ranks.leave(main())
