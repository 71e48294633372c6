"""Zero-shot transfer: a toy encoder whose right class is known by construction, prompt ensembling against a
naive loop; the command on a tiny checkpoint: tables of sets, a folder, captions, wrong input.

    pytest tests/test_zeroshot.py
"""

import csv
import json
import shutil
import statistics
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
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
    assert result == {"top1": 100, "top5": 100, "top1_top5": 100, "per_class": 100}


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


def test_near_cosines_are_told_apart_under_bf16_autocast(monkeypatch):
    """Cosines 1 and 1 - 1e-4 are one number in bf16, whose next below 1 is 0.996."""
    model = Toy()
    axes = {"red": (1, 0, 0), "reddish": (1, 0.014, 0)}
    model.tokenizer = lambda texts, context: torch.tensor([axes[text] for text in texts])
    model.encode_text = lambda tokens: tokens
    model.encode_image = lambda images: torch.tensor([[1.0, 0, 0]]).expand(len(images), 3)
    monkeypatch.setattr(zeroshot.ranks, "precision", lambda device, asked=None: "bf16")
    classes = ["reddish", "red"]
    red = data.Source("toy", data.Arrays(np.zeros((4, 8, 8, 3), np.uint8), [1] * 4), classes)
    result = zeroshot.evaluate(model, red, CPU, templates=["{}"])
    assert result["top1"] == 100


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
    (folder / "nameless.json").write_text(json.dumps({"scenes": ["{} here", "a photo"]}))
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
    [("scenes", 12, "8.33"), ("scenes-colour", 8, "12.50"), ("scenes-heldout", 96, "1.04")],
)
def test_the_command_tells_accuracy_and_chance(checkpoints, capsys, name, count, chance):
    assert command(checkpoints, f"--checkpoint slip.pt --data {name}") == 0
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["set", "pictures", "classes", "metric", "value", "chance"]
    assert (row[0], row[2], row[3], row[5]) == (name, str(count), "accuracy", chance)
    result = zeroshot.evaluate(slip.load(checkpoints / "slip.pt"), sets.open_source(name, split="test"), CPU)
    assert row[4] == f"{result['top1']:.2f}"


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
    ("--checkpoint slip.pt --image red.png", '--image FILE --classes "a dog,a cat"'),
    ("--checkpoint slip.pt --classes a,b", "go together: --image FILE --classes"),
    ("--checkpoint slip.pt --query bus", "--folder DIR --query"),
    ("--checkpoint slip.pt --folder nothere", "--folder DIR --query"),
    ("--checkpoint slip.pt --folder nothere --query bus", "no folder at nothere"),
    ("--checkpoint slip.pt --folder . --image red.png", "not allowed with"),
    ("--checkpoint slip.pt --folder . --query bus --top 0", "--top 0"),
    ("--checkpoint slip.pt --retrieval --data scenes-colour", "scenes-colour has classes, no captions"),
    ("--checkpoint slip.pt --retrieval --data coco", "no captions at"),
    ("--checkpoint slip.pt --retrieval --pictures 0", "--pictures 0"),
    ("--checkpoint slip.pt --data coco", "no captions at"),
    ("--checkpoint slip.pt --data ,", "no set found under"),
    ("--checkpoint slip.pt --data all", "no set found under"),
    ("--checkpoint slip.pt --data all --labels torn.json", "is not JSON"),
    ("--checkpoint slip.pt --templates nameless.json", "the templates of scenes want a {}"),
    ("--checkpoint slip.pt --workers -1", "--workers -1"),
    ("--download --data all", "--download wants sets by name"),
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


# Tables of sets, in class folders: test_sets.py has the formats


@pytest.fixture
def root(tmp_path):
    """Five sets in class folders, of which one has a picture that cannot be read, and one no pictures."""
    folders = {"hateful_memes/test": 2, "mushrooms/val": 3, "kinetics700_frames/val": 8, "pets/test": 2}
    for folder, classes in folders.items():
        for label in range(classes):
            (tmp_path / folder / f"kind {label}").mkdir(parents=True)
            Image.new("RGB", (9, 7), (30 * label, 0, 90)).save(tmp_path / folder / f"kind {label}/0.png")
    (tmp_path / "dtd/test/banded").mkdir(parents=True)
    (tmp_path / "dtd/test/banded/0.png").write_bytes(b"")
    (tmp_path / "cub200/test/auk").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def run(tmp_path_factory, root):
    """run(*words) -> exit code, on a checkpoint in a folder of its own: run.folder."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = slip.build(slip.configure("clip", "vit_tiny", vocab_size=520, text_depth=1))
    model.tokenizer = Tokenizer.train(["a photo of a face", "a road sign"] * 3, 520)
    slip.save(folder / "m.pt", model, {"args": {"data": "pets", "captioned_by": "class names"}})
    words = ["--checkpoint", str(folder / "m.pt"), "--root", str(root), "--device", "cpu"]

    def run(*more):
        return zeroshot.main([*words, *more])

    run.folder = folder
    return run


def table(run):
    return json.loads((run.folder / zeroshot.TABLE).read_text(encoding="utf-8"))


SOUND = ["hateful_memes", "kinetics700_frames", "pets"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_all_sets_that_are_found_make_one_table(run, capsys, workers):
    assert run("--data", "all,scenes", "--workers", workers) == 0
    page, errors = capsys.readouterr()
    found = table(run)
    rows = found["sets"]
    assert sorted(rows) == sorted([*SOUND, "mushrooms", "scenes"])
    for name, row in rows.items():
        (line,) = [line.split() for line in page.splitlines() if line.split()[0] == name]
        assert line[1:3] == [str(row["pictures"]), str(row["classes"])]
        assert f"{row['value']:.2f}" in line and f"{row['chance']:.2f}" in line
        assert ("*" in line) == row["seen_in_training"] == (name == "pets")
        assert row["value"] == row[row["metric"]]
    metrics = {name: row["metric"] for name, row in rows.items() if row["metric"] != "top1"}
    assert metrics == {"hateful_memes": "auc", "kinetics700_frames": "top1_top5", "pets": "per_class"}
    for key, names in (("paper", SOUND), ("all", list(rows))):
        mean = statistics.mean(rows[name]["value"] for name in names)
        assert found["averages"][key]["value"] == pytest.approx(mean, rel=1e-12)  # float64
        assert f"sets: {mean:.2f} (chance " in page
    assert "average of 3 of the paper's 26 sets" in page and "average of all 5 sets" in page
    assert zeroshot.SEEN in page
    told = errors.splitlines()
    assert len(told) == 2 and "cub200 is left out: no pictures under" in told[0]
    assert "dtd is left out: cannot read" in told[1] and list(found["left_out"]) == ["cub200", "dtd"]
    with open(run.folder / "results.csv", newline="") as file:
        noted = {row["data"]: row["value"] for row in csv.DictReader(file)}
    assert noted == {name: f"{row['value']:.4f}" for name, row in rows.items()}


def test_a_list_of_sets_makes_a_table_and_one_set_leaves_that_of_many(run, capsys):
    assert run("--data", "mushrooms, pets,mushrooms") == 0
    assert list(table(run)["sets"]) == ["mushrooms", "pets"]
    assert "average of 1 of the paper's 26 sets" in capsys.readouterr().out
    assert run("--data", "kinetics700_frames") == 0
    assert list(table(run)["sets"]) == ["mushrooms", "pets"] and "average" not in capsys.readouterr().out


@pytest.mark.parametrize("name, code, why", [("cub200", 2, "no pictures under"), ("dtd", 1, "cannot read")])
def test_a_damaged_set_that_was_named_ends_the_run(run, capsys, name, code, why):
    try:
        ended = run("--data", f"mushrooms,{name}")
    except SystemExit as end:
        ended = end.code
    message = capsys.readouterr().err.strip().split("error: ")[-1]
    assert ended == code and message.startswith(why) and "\n" not in message


def test_no_set_that_can_be_measured_is_one_sentence(run, root, capsys):
    for name in (*SOUND, "mushrooms"):
        shutil.rmtree(root / name)
    assert run("--data", "all") == 1
    assert capsys.readouterr().err.endswith("no set could be measured\n")


def test_memes_of_three_kinds_have_no_roc_curve(run, root, capsys):
    (root / "hateful_memes/test/third").mkdir()
    with pytest.raises(SystemExit):
        run("--data", "hateful_memes")
    assert "ROC AUC, which wants two classes: found 3" in capsys.readouterr().err


def test_published_names_and_prompts_are_taken_where_a_file_has_them(run, root):
    content = {"labels": {"pets": ["a cat", "a dog"]}, "templates": {"pets": ["{}."], "mushrooms": ["{}!"]}}
    words = ["--data", "all"]
    for kind, named in content.items():
        (root / f"{kind}.json").write_text(json.dumps(named))
        words += [f"--{kind}", str(root / f"{kind}.json")]
    assert run(*words) == 0
    how = {name: row["how"] for name, row in table(run)["sets"].items()}
    assert how["pets"] == "1 published prompts, published names"
    assert (how["mushrooms"], how["hateful_memes"]) == ("1 published prompts", "3 prompts")


def test_a_table_that_cannot_be_written_is_shown_all_the_same(run, capsys):
    (run.folder / f"{zeroshot.TABLE}.tmp").mkdir()
    assert run("--data", "mushrooms,pets") == 0
    page, errors = capsys.readouterr()
    assert "average of all 2 sets" in page and "the table is not noted" in errors


def test_the_list_shows_every_set_and_whether_it_is_there(root, capsys):
    assert zeroshot.main(["--list", "--root", str(root)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert set(tasks.PAPER) <= rows.keys()
    there = {name for name in sets.names(root) if rows[name].split()[1] == "yes"}
    assert there == {*SOUND, "mushrooms", "dtd", "cub200"}
    assert "--download --data food101" in rows["food101"] and "kaggle" in rows["fer2013"]
    assert "ROC AUC" in rows["hateful_memes"] and "scenes-heldout" in rows["The"]


def test_a_download_that_fails_names_the_set(tmp_path, monkeypatch, capsys):
    def dead(url, *args, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", dead)
    (tmp_path / "country211").mkdir()
    words = ["--download", "--data", "dtd,country211,cub200", "--root", str(tmp_path)]
    for split in ("train", "test"):
        (tmp_path / "country211" / split / "AD").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "country211" / split / "AD/0.jpg")
    assert zeroshot.main(words) == 1
    page, errors = capsys.readouterr()
    assert page == f"country211 is there, under {tmp_path}\n"
    assert "dtd was not downloaded" in errors and "cub200 cannot be downloaded" in errors


# A folder, a captioned set


def test_the_command_ranks_a_folder_for_a_sentence(checkpoints, tmp_path, capsys):
    for name, colour in COLOURS.items():
        Image.new("RGB", (9, 7), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    words = ["--checkpoint", str(checkpoints / "slip.pt"), "--folder", str(tmp_path), "--query", "a red boat"]
    assert zeroshot.main([*words, "--top", "2"]) == 0
    page, errors = capsys.readouterr()
    first, second = (line.split() for line in page.splitlines())
    assert float(first[0]) >= float(second[0]) and first[1].startswith(str(tmp_path))
    assert errors.count("\n") == 1 and "1 of 4 pictures cannot be read" in errors


def test_the_command_tells_recalls_both_ways(checkpoints, capsys):
    (checkpoints / "results.csv").unlink(missing_ok=True)
    assert command(checkpoints, "--checkpoint slip.pt --retrieval --pictures 30") == 0
    page = capsys.readouterr().out.splitlines()
    how = "train split, 30 of 40 pictures, 30 captions"
    assert page[0] == f"scenes: {how}" and "may have seen" in page[4]
    assert [line.split()[:3] for line in page[1:3]] == [["image", "to", "text"], ["text", "to", "image"]]
    assert page[3].split()[2:] == ["R@1", "3.33%", "R@5", "16.67%", "R@10", "33.33%"]
    with open(checkpoints / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["metric"] for row in rows[:3]] == [f"image to text R@{k}" for k in (1, 5, 10)]
    assert {(row["task"], row["data"], row["how"], row["pictures"]) for row in rows} == {
        ("retrieval", "scenes", how, "30")
    }


def test_a_captioned_set_is_told_to_type_retrieval(checkpoints, tmp_path, capsys):
    captions = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(captions))
    (tmp_path / "pairs.tsv").write_text("path\tcaption\na.jpg\ta boat\n")
    for name in ("coco", str(tmp_path / "pairs.tsv")):
        with pytest.raises(SystemExit) as end:
            zeroshot.main(
                ["--checkpoint", str(checkpoints / "slip.pt"), "--data", name, "--root", str(tmp_path)]
            )
        assert end.value.code == 2 and "--retrieval" in capsys.readouterr().err
