"""Zero-shot transfer: a toy encoder whose right class and image are known by construction; prompt ensembling
against a naive loop, recall against a naive sort in float64; the command on an untrained checkpoint: tables
of sets, several models, one image, a folder, captions, wrong input.
"""

import json
import shlex
import shutil
import statistics
import zlib
from pathlib import Path
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
import zeroshot

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class Toy(nn.Module):
    """A text is near the axes of the colours it names, an image near the channels it is bright in."""

    config, logit_scale = SimpleNamespace(image_size=8), torch.tensor(3.0)

    def encode_text(self, texts):
        """Texts -> [B, 3]; lengths differ, so whoever forgets to normalise is found out."""
        rows = []
        for text in texts:
            noise = np.random.default_rng(zlib.crc32(text.encode())).normal(size=3)
            rows.append(len(text) * (np.array([colour in text for colour in COLOURS]) + 0.1 * noise))
        return torch.tensor(np.array(rows), dtype=torch.float32)

    def encode_image(self, images):
        return 7 * images.mean((2, 3))  # [B, 3]


def plain(targets, classes=None):
    """Plain images, the colours in turn."""
    colours = list(COLOURS.values())
    images = [np.full((9, 11, 3), colours[i % 3], np.uint8) for i in range(len(targets))]
    return data.Source("toy", data.Arrays(images, targets), classes)


def naive(model, names, templates):
    """The paper's order, prompt by prompt: normalise, mean, normalise."""
    rows = []
    for entry in names:
        prompts = [template.replace("{}", name) for name in entry for template in templates]
        embeds = model.encode_text(prompts)
        mean = sum(embed / embed.norm() for embed in embeds) / len(prompts)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_the_pairs_that_no_caption_names_are_tested_alone():
    args = SimpleNamespace(root="data", labels=None, templates=None)
    source, _ = zeroshot.open_task("scenes-heldout", args)
    held_out = sets.scenes.build("test", 2400, 2, kinds_told=None, curated=True)["held_out"]
    assert len(source) == len(list(source)) == held_out.sum()


def test_prompt_ensembling_equals_a_naive_loop():
    words = ["red", "green", "deep blue", "{red} or green"]
    names = [[f"{words[i % 4]} {i}"] + ["blue"] * (i % 3) + ["x" * (1 + i % 50)] for i in range(40)]
    templates = ["a {}.", "{} as in a rather long sentence", "{}"] * 12  # 36 to 144 prompts, 64 at a time
    found = zeroshot.classifier(Toy(), names, templates, "cpu")
    # float32: the sum of a dozen unit vectors, made longer again where they nearly cancel
    torch.testing.assert_close(found, naive(Toy(), names, templates), rtol=0, atol=2e-6)


def test_the_toy_encoder_names_every_image():
    source, model = plain([0, 1, 2] * 3, ["red", "green", "blue"]), Toy()
    assert set(zeroshot.evaluate(model, source, "cpu").values()) == {100}
    source = plain([0, 1, 2] * 3, ["green", "blue", "red"])
    assert zeroshot.evaluate(model, source, "cpu")["top1"] == 0
    source = plain([0, 1, 2] * 3, [["a red one", "the red kind"], "green", ["blue"]])
    assert zeroshot.evaluate(model, source, "cpu", templates=["see {}", "{}!"])["top1"] == 100


def test_near_cosines_are_told_apart_under_bf16_autocast(monkeypatch):
    """Cosines 1 and 1 - 1e-4 are one number in bf16, whose next below 1 is 0.996."""
    model, axes = Toy(), {"red": (1.0, 0, 0), "reddish": (1, 0.014, 0)}
    model.encode_text = lambda texts: torch.tensor([axes[text] for text in texts])
    model.encode_image = lambda images: torch.tensor([[1.0, 0, 0]]).expand(len(images), 3)
    monkeypatch.setattr("device.precision", lambda device, asked=None: "bf16")
    source = plain([1] * 4, ["reddish", "red"])
    assert zeroshot.evaluate(model, source, torch.device("cpu"), templates=["{}"])["top1"] == 100


def test_equal_embeddings_find_nothing_and_one_good_caption_of_several_is_enough():
    found = zeroshot.recall(torch.ones(30, 1), torch.ones(60, 1), torch.arange(60) % 30)
    assert all(value == 0 for values in found.values() for value in values.values())
    texts = torch.cat([torch.eye(20), torch.eye(20).roll(1, 0)])  # the second captions suit another image
    found = zeroshot.recall(torch.eye(20), texts, torch.arange(20).repeat(2), ks=(1, 2))
    assert found["text to image"][1] == 50
    assert found["image to text"] == {1: 0, 2: 100}  # a stranger's caption is as near, and goes first


def test_recall_equals_a_naive_sort():
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
    owner = torch.cat([torch.arange(300), torch.randint(300, (400,), generator=generator)])
    texts = F.normalize(images[owner] + 0.5 * torch.randn(700, 8, generator=generator), dim=1)
    found, cosines = zeroshot.recall(images, texts, owner), images.double() @ texts.double().T
    by_image = owner[cosines.argsort(1, descending=True)] == torch.arange(300)[:, None]
    by_text = cosines.T.argsort(1, descending=True) == owner[:, None]
    for way, hits in (("image to text", by_image), ("text to image", by_text)):
        naive_recall = {k: 100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}
        assert found[way] == pytest.approx(naive_recall, rel=1e-6)  # means in float32


def test_every_caption_of_an_image_is_embedded_and_bad_images_are_left_out(monkeypatch, capsys):
    source = plain(["red", ["so green"], ["blue", "very blue"], "red"])
    source.items.images = source.items.images[:3]  # the fourth is an IndexError
    monkeypatch.setattr(data.Arrays, "__len__", lambda items: len(items.targets))
    images, texts, owner = zeroshot.embed_pairs(Toy(), source, "cpu")
    assert owner.tolist() == [0, 1, 2, 2] and images.argmax(1).tolist() == [0, 1, 2]
    assert all(values == {1: 100} for values in zeroshot.recall(images, texts, owner, ks=(1,)).values())
    assert "toy: 1 of 4 images cannot be decoded" in capsys.readouterr().err


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
    """run(line) -> exit code, beside a run folder and six sets in class folders, of which two are damaged."""
    folders = {"hateful_memes/test": 2, "mushrooms/val": 3, "kinetics700_frames/val": 8, "pets/test": 2}
    for folder, classes in folders.items():
        for label in range(classes):
            (tmp_path / folder / f"kind {label}").mkdir(parents=True)
            Image.new("RGB", (9, 7), (30 * label, 0, 90)).save(tmp_path / folder / f"kind {label}/0.png")
    (tmp_path / "dtd/test/banded").mkdir(parents=True)
    (tmp_path / "dtd/test/banded/0.png").write_bytes(b"")
    (tmp_path / "cub200/test/auk").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    shutil.copy(checkpoint, tmp_path / "run/checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 80, "test": 36})
    return lambda line: zeroshot.main([*shlex.split(line), "--device", "cpu", "--root", "."])


def results(folder="run"):
    return json.loads(Path(f"{folder}/results.json").read_text(encoding="utf-8"))["checkpoint.pt"]


def test_all_sets_that_are_found_make_one_table(run, capsys):
    assert run("--checkpoint run --data all") == 0
    page, errors = capsys.readouterr()
    rows, metrics = results()["zeroshot"], {"hateful_memes": "auc", "kinetics700_frames": "top1_top5"}
    sound = ["hateful_memes", "kinetics700_frames", "pets", "mushrooms"]
    assert sorted(rows) == sorted([*sound, *(name for name in sets.SCENES if name != "scenes-kind")])
    for name, row in rows.items():
        (line,) = [line.split() for line in page.splitlines() if line.split()[0] == name]
        assert line[1:3] == [str(row["images"]), str(row["classes"])]
        assert line[-2:] == [f"{row['value']:.2f}", f"{row['chance']:.2f}"]
        assert row["metric"] == (metrics | {"pets": "per_class"}).get(name, "top1")
        assert row["value"] == row[row["metric"]]
    averages = {line.split()[2]: line.split() for line in page.splitlines() if line.startswith("average")}
    mean = statistics.mean(rows[name]["value"] for name in sound[:3])
    assert averages["the"][4:6] == ["3", f"{mean:.2f}"] and averages["all"][3] == str(len(rows))
    assert "cub200 is left out" in errors and "dtd: 1 of 1 images cannot be decoded" in errors
    assert run("--checkpoint run --data mushrooms,dtd") == 1  # named, such a set ends the command


def test_two_checkpoints_stand_side_by_side_and_seen_classes_are_marked(run, capsys):
    model = slip.load("run")
    Path("other").mkdir()
    torch.nn.init.normal_(model.image_projection, generator=torch.Generator().manual_seed(1))
    slip.save("other/checkpoint.pt", model, {"args": {"class_names": ["Kind 1", ["boat", "KIND 7"]]}})
    assert run("--checkpoint run other/checkpoint.pt --data kinetics700_frames,mushrooms") == 0
    page = capsys.readouterr().out
    first, second = (results(name)["zeroshot"] for name in ("run", "other"))
    for name, share in (("kinetics700_frames", 2 / 8), ("mushrooms", 1 / 3)):
        cells = f"{first[name]['value']:>8.2f} {second[name]['value']:>8.2f}*"
        assert cells in page and second[name]["seen"] == pytest.approx(share) and first[name]["seen"] == 0
    assert f"{zeroshot.SEEN}: 25% of kinetics700_frames, 33% of mushrooms" in page
    rows = [(first[n]["value"], second[n]["value"], first[n]["chance"]) for n in first]
    wins = [str(sum(row[i] == max(row) for row in rows)) for i in range(3)]
    assert page.split("best on")[1].split()[:3] == wins


def test_names_and_prompts_may_be_published_or_typed(run, capsys):
    kinds = list(sets.open_source("scenes", split="test").classes)
    Path("l.json").write_text(json.dumps({"scenes": [[kind] for kind in kinds]}))
    Path("t.json").write_text(json.dumps({"scenes": sets.prompts("scenes")}))
    prompts = shlex.join(sets.prompts("scenes"))
    for more in ("", "--labels l.json --templates t.json", f"--templates {prompts}"):
        assert run(f"--checkpoint run {more}") == 0
    first, *others = (line for line in capsys.readouterr().out.splitlines() if line.startswith("scenes"))
    assert [first, first] == others


def test_one_image_and_the_images_of_a_folder(run, capsys):
    assert run('--checkpoint run --image "pets/test/kind 1/0.png" --classes "a dog, a red boat,a cat"') == 0
    lines = [line.split("%  ") for line in capsys.readouterr().out.splitlines()]
    assert sorted(name for _, name in lines) == ["a cat", "a dog", "a red boat"]
    assert run('--checkpoint run --folder . --query "a red boat" --top 3') == 0
    page, errors = capsys.readouterr()
    cosines = [float(line.split()[0]) for line in page.splitlines()]
    assert len(cosines) == 3 and cosines == sorted(cosines, reverse=True) and "1 of 16 images" in errors


def test_retrieval_takes_what_the_run_held_out_of_its_own_data(run, capsys):
    assert run("--checkpoint run --retrieval") == 0
    page, row = capsys.readouterr().out, results()["retrieval"]["scenes"]
    assert "scenes, val split, 4 images" in page and "R@1  25.00%  R@5 100.00%" in page
    assert (row["split"], row["captions"]) == ("val", 4) and 0 <= row["image to text"]["1"] <= 100
    flags = SimpleNamespace(split=None, data="scenes", root="elsewhere")
    pairs, split = zeroshot.open_pairs(flags, {"data": "scenes", "root": ".", "seed": 7})
    held = data.holdout(sets.open_captions("scenes", ".")[0], 7)[1]
    assert split == "val" and [pairs.label(i) for i in range(4)] == [held.label(i) for i in range(4)]
    assert run("--checkpoint run --retrieval --split train") == 0
    assert "train split (which the model may have seen" in capsys.readouterr().out


WRONG = {
    "": "--checkpoint is missing",
    "--checkpoint run run --folder . --query bus": "take one --checkpoint",
    "--checkpoint run --image dtd/test/banded/0.png --classes red,blue": "cannot identify image file",
    "--checkpoint run --image dtd/test/banded/0.png --classes ,": "type both",
    "--checkpoint run --data mushrooms,cub200": "cub200",
    "--checkpoint run --templates '{} here' 'a photo'": "expected a {} in each",
    "--checkpoint run --labels l.json": "names 1 classes, scenes has 12",
    "--download --data cub200": "cub200 cannot be downloaded",
    "--checkpoint run --data pairs.tsv": "--retrieval",
    "--checkpoint run --data ,": "expected sets with commas between",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_sentence_and_exit_2(run, refused, line):
    Path("l.json").write_text('{"scenes": ["one"]}')
    Path("pairs.tsv").write_text("path\tcaption\na.jpg\ta boat\n")
    message = refused(run, line)
    assert WRONG[line] in message and message.count("\n") == 1


def test_the_list_shows_every_set(run, capsys):
    assert run("--list") == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(sets.PAPER) <= rows.keys() and rows["pets"][1] == "yes" and rows["food101"][1] == "-"
