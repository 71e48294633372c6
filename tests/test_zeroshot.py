"""Zero-shot transfer: a toy encoder whose right class is known by construction, prompt ensembling against a
naive loop, metrics against scores counted by hand, and the command on a tiny checkpoint.

    pytest tests/test_zeroshot.py
"""

import json
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import measure
import sets
import slip
import tasks
import zeroshot
from text import Tokenizer

CPU = torch.device("cpu")
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Toy(nn.Module):
    """A text is near the axes of the colours it names, a picture near the channels it is bright in."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(image_size=8, context=77)
        self.logit_scale = torch.tensor(3.0)
        self.modes, self.longest = [], 0

    def tokenizer(self, texts, context):
        assert context == 77
        self.longest = max(self.longest, len(texts))
        codes = [[ord(letter) for letter in text] for text in texts]
        return torch.tensor([row + [0] * (max(map(len, codes)) - len(row)) for row in codes])

    def encode_text(self, tokens):
        """[B, L] -> [B, 3]; lengths differ, so whoever forgets to normalise is found out."""
        texts = ["".join(chr(code) for code in row if code) for row in tokens.tolist()]
        rows = []
        for text in texts:
            noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=3)
            rows.append(len(text) * (np.array([colour in text for colour in COLOURS]) + 0.1 * noise))
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def encode_image(self, images):
        self.modes.append(self.training)
        return 7 * images.mean((2, 3))  # [B, 3]


class Pictures(data.Dataset):
    """Plain pictures, the colours in turn."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return Image.new("RGB", (11, 9), list(COLOURS.values())[index % 3]), index % 3


def source(*classes):
    return data.Source("toy", Pictures(), list(classes))


def test_the_toy_encoder_names_every_picture():
    result = zeroshot.evaluate(Toy(), source("red", "green", "blue"), CPU)
    assert result == {"top1": 100, "top5": 100, "per_class": 100}


def test_names_in_the_wrong_order_are_wrong():
    assert zeroshot.evaluate(Toy(), source("green", "blue", "red"), CPU)["top1"] == 0
    assert zeroshot.evaluate(Toy(), source("red", "blue", "green"), CPU)["top1"] == pytest.approx(100 / 3)


def test_names_and_templates_given_replace_the_sets_own():
    names = [["a red one", "the red kind"], "green", ["blue"]]
    result = zeroshot.evaluate(Toy(), source("x", "y", "z"), CPU, names=names, templates=["see {}", "{}!"])
    assert result["top1"] == 100


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_done_in_eval_mode_and_leaves_the_mode_as_it_was(training):
    model = Toy().train(training)
    zeroshot.evaluate(model, source("red", "green", "blue"), CPU)
    assert model.training is training and not any(model.modes)


def naive(model, names, templates):
    """The paper's order, prompt by prompt: normalise, mean, normalise."""
    rows = []
    for synonyms in names:
        total = torch.zeros(3)
        prompts = [template.format(name) for name in synonyms for template in templates]
        for prompt in prompts:
            embed = model.encode_text(model.tokenizer([prompt], 77))[0]
            total += embed / embed.norm()
        mean = total / len(prompts)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("classes", [1, 3, 150])
def test_prompt_ensembling_equals_a_naive_loop(classes):
    words = ["red", "green", "deep blue", "red or green"]
    names = [[f"{words[i % 4]} {i}"] + ["blue"] * (i % 3) + ["x" * (1 + i % 50)] for i in range(classes)]
    templates = ["a {}.", "{} as in a rather long sentence", "{}"]
    model = Toy()
    found = zeroshot.classifier(model, names, templates, CPU)
    assert found.shape == (classes, 3) and model.longest <= 256  # 150 classes take several batches
    # float32: the sum of a dozen unit vectors, made longer again where they nearly cancel
    torch.testing.assert_close(found, naive(model, names, templates), rtol=0, atol=2e-6)


def test_a_name_alone_is_a_list_of_one_and_braces_in_it_are_letters():
    model = Toy()
    alone = zeroshot.classifier(model, ["red", "{green}"], ["a {}"], CPU)
    torch.testing.assert_close(alone, zeroshot.classifier(model, [["red"], ["{green}"]], ["a {}"], CPU))
    expected = naive(model, [["red"], ["{green}"]], ["a {}"])
    torch.testing.assert_close(alone, expected, rtol=0, atol=2e-6)  # float32


def test_a_model_without_tokenizer_says_where_to_get_one():
    model = Toy()
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer.*pip install"):
        zeroshot.classifier(model, ["red"], ["{}"], CPU)


def test_metrics_are_those_counted_by_hand():
    """Class 0 three times: ranks 1, 2 and 6; class 1 once: rank 1; class 5 never."""
    scores = torch.tensor(
        [
            [6.0, 5, 4, 3, 2, 1],
            [5.0, 6, 4, 3, 2, 1],
            [1.0, 6, 5, 4, 3, 2],
            [1.0, 6, 5, 4, 3, 2],
        ]
    )
    result = measure.metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert result["top1"] == 50 and result["top5"] == 75
    assert result["per_class"] == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_fewer_than_five_classes_have_a_top_5_of_all():
    result = measure.metrics(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0, 1]))
    assert (result["top1"], result["top5"], result["per_class"]) == (50, 100, 50)


def test_one_picture_is_named_with_probabilities(tmp_path):
    Image.new("RGB", (30, 20), COLOURS["green"]).save(tmp_path / "leaf.png")
    found = zeroshot.name_picture(Toy(), tmp_path / "leaf.png", list(COLOURS), ("{}",), CPU)
    assert found[0][1] == "green" and sorted(name for _, name in found) == sorted(COLOURS)
    assert sum(probability for probability, _ in found) == pytest.approx(1)
    view = F.normalize(Toy().encode_image(_view(COLOURS["green"])), dim=-1)
    logits = Toy().logit_scale.exp() * view @ naive(Toy(), [[name] for name in COLOURS], ["{}"]).T
    expected = dict(zip(COLOURS, logits.softmax(1)[0].tolist(), strict=True))
    assert {name: probability for probability, name in found} == pytest.approx(expected, rel=1e-4)  # float32


def _view(colour):
    return zeroshot.augment.normalise(
        torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].repeat(1, 1, 8, 8)
    )


# The command, on a tiny checkpoint and few pictures


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for method in ("slip", "simclr"):
        torch.manual_seed(0)
        model = slip.build(slip.configure(method, "vit_tiny", vocab_size=600, text_depth=1))
        if model.text is not None:
            captions = [
                template.format(kind) for template in tasks.PROMPTS["scenes"] for kind in sets.scenes.KINDS
            ]
            model.tokenizer = Tokenizer.train(captions * 2, 600)
        slip.save(folder / f"{method}.pt", model)
    Image.new("RGB", (40, 30), COLOURS["red"]).save(folder / "red.png")
    (folder / "text.png").write_text("not a picture")
    kinds = list(sets.scenes.KINDS)
    labels = {"scenes": kinds, "three": kinds[:3], "scenes-colour": kinds}
    (folder / "labels.json").write_text(json.dumps(labels))
    (folder / "lists.json").write_text(json.dumps({"scenes": [[kind] for kind in kinds]}))
    (folder / "templates.json").write_text(json.dumps({"scenes": tasks.prompts("scenes")}))
    (folder / "torn.json").write_text('{"scenes": [')
    (folder / "numbers.json").write_text(json.dumps({"scenes": list(range(12))}))
    slip.save(
        folder / "mute.pt", slip.build(slip.configure("clip", "vit_tiny", vocab_size=600, text_depth=1))
    )
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 49 kB
    Image.MAX_IMAGE_PIXELS = limit
    return folder


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 40, "test": 96})
    sets.drawn.cache_clear()
    yield
    sets.drawn.cache_clear()


def command(folder, flags):
    words = [
        str(folder / word) if word.endswith((".pt", ".png", ".json")) else word for word in flags.split()
    ]
    return zeroshot.main([*words, "--device", "cpu", "--root", str(folder / "nothere")])


@pytest.mark.parametrize(
    "name, count, chance",
    [("scenes", 12, "8.3"), ("scenes-colour", 8, "12.5"), ("scenes-heldout", 96, "1.0")],
)
def test_the_command_tells_accuracy_and_chance(checkpoints, capsys, name, count, chance):
    assert command(checkpoints, f"--checkpoint slip.pt --data {name}") == 0
    page = capsys.readouterr().out
    assert f"{count} classes (chance {chance}%)" in page
    top1, top5 = (float(re.search(rf"{what} ([\d.]+)%", page)[1]) for what in ("top-1", "top-5"))
    assert 0 <= top1 <= top5 <= 100


@pytest.mark.parametrize("labels", ["labels.json", "lists.json"])
def test_published_names_and_prompts_that_are_ours_give_our_figures(checkpoints, capsys, labels):
    command(checkpoints, "--checkpoint slip.pt")
    command(checkpoints, f"--checkpoint slip.pt --labels {labels} --templates templates.json")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[:2] == lines[2:]


def test_the_command_names_one_picture(checkpoints, capsys):
    picture = ["--image", str(checkpoints / "red.png"), "--classes", "a dog, a red boat,,a cat"]
    assert zeroshot.main(["--checkpoint", str(checkpoints / "slip.pt"), "--device", "cpu", *picture]) == 0
    lines = [line.split("%") for line in capsys.readouterr().out.splitlines()]
    assert {name.strip() for _, name in lines} == {"a dog", "a red boat", "a cat"}
    shares = [float(share) for share, _ in lines]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(
        100, abs=0.2
    )  # rounded to 0.1


WRONG = [
    ("--checkpoint nothere.pt", "no checkpoint at"),
    ("--checkpoint red.png", "red.png"),
    ("--checkpoint simclr.pt", "trained without captions"),
    ("--checkpoint simclr.pt --image red.png --classes red,blue", "trained without captions"),
    ("--checkpoint slip.pt --image red.png", '--classes "a dog,a cat"'),
    ("--checkpoint slip.pt --image nothere.png --classes red,blue", "nothere.png"),
    ("--checkpoint slip.pt --image text.png --classes red,blue", "text.png"),
    ("--checkpoint slip.pt --data nothere", "unknown --data 'nothere'"),
    ("--checkpoint slip.pt --data imagenet", "no ImageNet"),
    ("--checkpoint slip.pt --labels nothere.json", "no file at"),
    ("--checkpoint slip.pt --labels torn.json", "is not JSON"),
    ("--checkpoint slip.pt --templates torn.json", "is not JSON"),
    ("--checkpoint slip.pt --templates labels.json --data scenes-texture", "no list under 'scenes-texture'"),
    (
        "--checkpoint slip.pt --labels labels.json --data scenes-colour",
        "names 12 classes, scenes-colour has 8",
    ),
    ("--checkpoint slip.pt --workers many", "invalid int value"),
    ("", "--checkpoint"),
    ("--checkpoint mute.pt", "has no tokenizer"),
    ("--checkpoint slip.pt --image bomb.png --classes red,blue", "bomb"),
    ("--checkpoint slip.pt --image red.png --classes ,", "--classes"),
    ("--checkpoint slip.pt --labels numbers.json", "numbers.json"),
    ("--checkpoint slip.pt --templates numbers.json", "numbers.json"),
]


@pytest.mark.parametrize("flags, sentence", WRONG)
def test_wrong_input_is_one_sentence_and_exit_2(checkpoints, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        command(checkpoints, flags)
    message = capsys.readouterr().err.split("error: ")[1]
    assert end.value.code == 2 and sentence in message and message.count("\n") == 1


def test_a_device_that_is_not_there_is_one_sentence(checkpoints, capsys):
    with pytest.raises(SystemExit) as end:
        zeroshot.main(["--checkpoint", str(checkpoints / "slip.pt"), "--device", "tpu"])
    assert end.value.code == 2 and "unknown --device 'tpu'" in capsys.readouterr().err
