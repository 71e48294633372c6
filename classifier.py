"""A classifier: the image tower with a linear head, and BEiT's augmentation for fine-tuning it.

    images [B, 3, S, S] -> strong_view (each, on the host) -> mix (of a batch) -> Classifier -> logits [B, K]

Paper: end-to-end fine-tuning, by BEiT's recipe. Left to others: the loop (finetune.py), the recipe's values
and the layers' learning rates (recipe.py).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

import augment
import checkpoints
import slip
from vit import SIZES, ViT


class Classifier(nn.Module):
    """The image tower of a Config and a linear head: normalised images [B, 3, S, S] -> logits [B, K]."""

    def __init__(self, config, classes, drop_path=0.0):
        super().__init__()
        self.config, self.tokenizer, self.classes = config, None, classes
        size = SIZES[config.model] | {"patch": config.patch}
        self.visual = ViT(image_size=config.image_size, drop_path=drop_path, **size)
        self.head = nn.Linear(self.visual.width, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # BEiT's 0.02, times its 0.001: starts at chance
        nn.init.zeros_(self.head.bias)

    def forward(self, images, micro_batch=None, recompute=False):
        """In chunks. Drop path is drawn for each chunk: with it, and only then, their size matters."""

        def tower(chunk):
            return {"image": self.visual(chunk["images"])}  # [b, D]

        features = slip.in_chunks(tower, {"images": images}, micro_batch, recompute, random=True)
        return self.head(features["image"])


def from_pretrained(model, classes, drop_path=0.0):
    """A Classifier that starts with the image tower of a SLIP model."""
    classifier = Classifier(model.config, classes, drop_path)
    classifier.visual.load_state_dict(model.visual.state_dict())
    return classifier


def load(path, image_size=None):
    """The Classifier in a fine-tuning run, in evaluation mode; positions are interpolated for another
    `image_size`, in pixels. Raises ValueError or FileNotFoundError.
    """
    state = slip.read_checkpoint(path)
    if not {"head.weight", "visual.positions"} <= state.get("weights", {}).keys():
        raise ValueError(f"{path} is not fine-tuned: leave out --evaluate to fine-tune it")
    config = slip.parse_config(state, path)
    config = replace(config, image_size=image_size or config.image_size)
    classifier = Classifier(config, state["run"]["args"]["classes"])
    slip.load_weights(classifier, checkpoints.resize_positions(state["weights"], classifier.visual), path)
    return classifier.eval()


class RandAugment(v2.RandAugment):
    """RandAugment as BEiT has it: two operations, each done one time in two, deviation 0.5 of the magnitude.

    A magnitude counts tenths of an operation's full strength; torchvision's default counts thirtieths. Here
    it is rounded to hundredths.
    """

    def __init__(self, magnitude):
        super().__init__(num_magnitude_bins=101)
        self.mean = magnitude

    def forward(self, image):
        self.num_ops = int((torch.rand(2) < 0.5).sum())
        drawn = self.mean + 0.5 * torch.randn(()).item()
        self.magnitude = round(10 * min(10.0, max(0.0, drawn)))
        return super().forward(image)


def strong_view(magnitude, erasing):
    """-> what is done to a crop, uint8 [3, S, S], or None. An erased box holds noise about the mean, which
    bytes cannot: then the result is normalised float.
    """
    steps = [RandAugment(magnitude)] if magnitude else []
    if erasing:
        steps += [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augment.MEAN, augment.STD),
            v2.RandomErasing(erasing, value="random"),
        ]
    return v2.Compose(steps) if steps else None


def mix(images, labels, classes, mixup, cutmix):
    """Images [B, 3, S, S], labels [B] -> mixed images, targets [B, K] that sum to 1."""
    kinds = [kind for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    if not kinds:
        return images, F.one_hot(labels, classes).float()
    kind = kinds[int(torch.randint(len(kinds), ()))]
    return kind(alpha=mixup if kind is v2.MixUp else cutmix, num_classes=classes)(images, labels)
