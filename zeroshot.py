"""Zero-shot transfer: name the class of a picture by the caption that fits it best.

    python zeroshot.py --checkpoint runs/scenes-slip/checkpoint.pt --data scenes    # the built-in test split
    python zeroshot.py --checkpoint F --image cat.jpg --classes "a dog,a cat"         # one picture

Paper: section 4.2. For each class every prompt is filled and encoded, each embedding normalised, their mean
normalised again; a picture's class is the one of largest cosine.
"""

import argparse

import torch
import torch.nn.functional as F

import augment
import data
import measure
import ranks
import sets
import slip
import tasks

NO_TOKENIZER = "this checkpoint has no tokenizer: CLIP's comes with open_clip (pip install open_clip_torch)"

SEEN = "  (prompt classification of classes seen in training, not zero-shot transfer)"


@torch.no_grad()
def classifier(model, names, templates, device):
    """Class names (a string, or a list of names, each) and templates with {} -> unit embeddings [K, E]."""
    if model.tokenizer is None:
        raise ValueError(NO_TOKENIZER)
    names = [[name] if isinstance(name, str) else list(name) for name in names]
    texts = [
        template.replace("{}", name) for synonyms in names for name in synonyms for template in templates
    ]
    embeds = []
    order = sorted(
        range(len(texts)), key=lambda i: len(texts[i])
    )  # like lengths together: less padding to work through
    for start in range(0, len(order), 64):
        tokens = model.tokenizer([texts[i] for i in order[start : start + 64]], model.config.context)
        embeds.append(F.normalize(model.encode_text(tokens.to(device)).float(), dim=-1))  # [64, E]
    embeds = torch.cat(embeds)[torch.tensor(order).argsort()]  # [all prompts, E], in the order of `texts`
    groups = embeds.split([len(synonyms) * len(templates) for synonyms in names])
    return F.normalize(torch.stack([group.mean(0) for group in groups]), dim=-1)


def evaluate(model, source, device, *, names=None, templates=None, workers=0):
    """Zero-shot accuracy of a model on a labelled source: {"top1", "top5", "per_class"}, per cent. Leaves
    its mode as it was.
    """
    training = model.training
    model.eval()
    weights = classifier(
        model, names or source.classes, templates or tasks.prompts(source.name), device
    )  # [K, E]
    scores, labels = measure.over(
        source,
        model.config.image_size,
        device,
        lambda x: F.normalize(model.encode_image(x), dim=-1) @ weights.T,
        workers=workers,
    )
    model.train(training)
    return measure.metrics(scores, labels)


def name_picture(model, path, names, templates, device):
    """Probabilities of the names for one picture file, the likeliest first: [(probability, name)]."""
    try:
        picture = data.read_picture(path)
    except Exception as error:  # damaged files break Pillow in every way there is
        raise ValueError(f"cannot read the picture {path}: {error}") from None
    view = augment.evaluation_view(picture, model.config.image_size)
    with torch.no_grad():
        embed = F.normalize(model.encode_image(augment.normalise(view[None].to(device))), dim=-1)  # [1, E]
        logits = model.logit_scale.exp() * embed @ classifier(model, names, templates, device).T  # [1, K]
    return sorted(zip(logits.softmax(1)[0].tolist(), names), reverse=True)


def arguments():
    parser = argparse.ArgumentParser(description="Zero-shot transfer of a trained or published model.")
    parser.add_argument(
        "--checkpoint", required=True, help="a run's checkpoint.pt or a published weight file"
    )
    parser.add_argument("--data", default="scenes", help="the labelled set (default: %(default)s)")
    parser.add_argument("--root", default="data", help="folder that holds the sets (default: %(default)s)")
    parser.add_argument("--labels", help="published labels.json, read under the name of the set")
    parser.add_argument("--templates", help="published templates.json, read under the name of the set")
    parser.add_argument("--image", help="name one picture instead of testing on a set")
    parser.add_argument("--classes", help='with --image: the names to choose from, as "a dog,a cat"')
    parser.add_argument("--workers", type=int, default=0, help="processes that decode (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the best at hand)")
    return parser


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        device = ranks.start(args.device)
        model = slip.load(args.checkpoint).to(device)
        model.needs_language("zero-shot transfer")
        if model.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        if args.image:
            names = [name.strip() for name in (args.classes or "").split(",") if name.strip()]
            if not names:
                raise ValueError('--image wants names to choose from: type --classes "a dog,a cat"')
            found = name_picture(model, args.image, names, ("{}",), device)
        else:
            source = sets.open_source(args.data, args.root, "test")
            names = tasks.read_published(args.labels, args.data) if args.labels else source.classes
            templates = (
                tasks.read_published(args.templates, args.data)
                if args.templates
                else tasks.prompts(args.data)
            )
            if len(names) != len(source.classes):
                raise ValueError(
                    f"{args.labels} names {len(names)} classes, {args.data} has {len(source.classes)}"
                )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.image:
        for probability, name in found:
            print(f"{probability:6.1%}  {name}")
        return 0
    result = evaluate(model, source, device, names=names, templates=templates, workers=args.workers)
    ranks.say(
        f"{args.data}: {len(source):,} test pictures, {len(names)} classes (chance {100 / len(names):.1f}%)"
    )
    ranks.say(
        f"  top-1 {result['top1']:.2f}%   top-5 {result['top5']:.2f}%   "
        f"mean per class {result['per_class']:.2f}%"
    )
    measure.record(args.checkpoint, "zeroshot", source, f"{len(templates)} prompts", "top1", result["top1"])
    trained = (slip.read(args.checkpoint).get("run") or {}).get("args", {})
    if trained.get("data") == args.data and trained.get("captioned_by") == "class names":
        ranks.say(SEEN)
    ranks.stop()
    return 0


if __name__ == "__main__":
    ranks.leave(main())
