"""Facts of the labelled sets: class names, prompts for zero-shot transfer, captions for training, the
metric of each.

Paper: section 4.2 and appendix (prompt ensembling; ImageNet has seven prompts). The wording of the prompts
here is ours; the published ones are read from their JSON files (`read_published`).

    class name "tabby cat" x templates -> P prompts; a class may have several names
"""

import json

GENERIC = ("a photo of a {}.", "a picture of the {}.", "an image of one {}.", "there is a {} here.")
PROMPTS = {  # zero-shot templates of a set; GENERIC where none are given
    "scenes": ("a {}", "photo of a {}", "a picture of a {}", "my {}", "the {} we saw"),
    "scenes-colour": ("a {} one", "a {} thing", "photo of a {} one", "something {}"),
    "scenes-texture": ("a {} one", "a {} thing", "photo of a {} one", "something {}"),
    "scenes-heldout": ("a {}", "photo of a {}", "a picture of a {}", "my {}", "the {} we saw"),
    "imagenet": (
        "a photo of a {}.",
        "a close view of one {}.",
        "a blurred picture of the {}.",
        "several of {} in a photo.",
        "a {} drawn by hand.",
        "the {} seen from far away.",
        "a {} as in a game.",
    ),
    "fashionmnist": ("a photo of a {}.", "a {}, an article of clothing.", "a product picture of the {}."),
    "cifar10": ("a small photo of a {}.", "a blurred picture of a {}.", "a photo of the {}."),
    "cifar100": ("a small photo of a {}.", "a blurred picture of a {}.", "a photo of the {}."),
}
CAPTIONS = {  # what a class name is wrapped in for training; GENERIC_CAPTIONS where none are given
    "fashionmnist": ("a {}", "a photo of a {}", "{} for sale", "product picture: {}", "my new {}"),
}
GENERIC_CAPTIONS = ("a {}", "a photo of a {}", "a picture of the {}", "one {}", "the {}")


def prompts(name):
    return PROMPTS.get(name, GENERIC)


def captions(name):
    return CAPTIONS.get(name, GENERIC_CAPTIONS)


def read_published(path, name):
    """The entry of a set in the published `labels.json` or `templates.json`; raises ValueError or
    FileNotFoundError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file at {path}: expected a JSON of set -> list") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(table, dict) or not isinstance(table.get(name), list):
        sets = ", ".join(table) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"{path} has no list under {name!r}: found {sets}")
    for entry in table[name]:
        if not isinstance(entry, str) and not (
            isinstance(entry, list) and all(isinstance(e, str) for e in entry)
        ):
            raise ValueError(f"{path}: {name!r} holds {entry!r}, expected strings or lists of strings")
    return table[name]
