"""Fine-tuning: its parts against closed forms and naive float64 references; the command on images of one
colour each must learn, resume bit for bit, and be tested again with what the run recorded.
"""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import finetune
import images
import slip

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}
SMALL = "--data colours --epochs 2 --batch-size 16 --device cpu".split()
STRONG = "--drop-path 0.3 --mixup 0.8 --cutmix 1 --randaugment 9 --erasing 0.5 --crop 0.5".split()
CPU = torch.device("cpu")


def small_classifier(drop_path=0.0, classes=5):
    torch.manual_seed(1)
    source = slip.build(slip.configure("simclr", "vit_tiny", ssl_hidden=32))
    model = finetune.Classifier(source.config, [str(i) for i in range(classes)], drop_path)
    torch.nn.init.normal_(model.head.weight)  # not the small one, so that the tower has a gradient
    return model


@pytest.fixture
def colours(checkpoint, tmp_path, monkeypatch):
    """A run folder with an untrained checkpoint, and a labelled folder of images of nearly one colour."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 26), ("test", 10)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "sets/colours" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    slip.save("checkpoint.pt", slip.load(checkpoint))
    return tmp_path


def run(*words):
    return finetune.main(["--checkpoint", ".", "--root", "sets", *SMALL, *map(str, words)])


def weights(path):
    return slip.read_checkpoint(path)["weights"]


# The model


def test_the_guess_at_the_start_is_chance():
    model = finetune.Classifier(slip.configure("simclr", "vit_tiny"), list("abcd"), drop_path=0.1).eval()
    guesses = model(torch.randn(3, 3, 32, 32)).softmax(1)
    torch.testing.assert_close(guesses, torch.full((3, 4), 0.25), atol=1e-3, rtol=0)


def gradients(model, micro_batch, recompute):
    torch.manual_seed(2)
    x = torch.randn(7, 3, 32, 32, dtype=torch.float64)
    model.zero_grad()
    model(x, micro_batch, recompute).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_chunks_change_nothing_and_recomputing_draws_the_same_drop_path():
    model = small_classifier().double().train()
    whole, chunked = gradients(model, None, False), gradients(model, 3, True)
    for name in whole:  # sums in another order
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-10, atol=1e-12)
    model = small_classifier(drop_path=0.5).double().train()
    kept, again = gradients(model, 3, False), gradients(model, 3, True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


# Views, mixing, loss


@pytest.mark.parametrize("mixup, cutmix", [(0, 0), (0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_sum_to_one_and_follow_the_images(mixup, cutmix):
    labels, mixed = torch.tensor([0, 1, 2, 3, 4, 0]), 0
    views = labels.view(6, 1, 1, 1).expand(6, 3, 8, 8).float()
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = finetune.mix(views, labels, 5, mixup, cutmix)
        torch.testing.assert_close(y.sum(1), torch.ones(6))
        # An image whose pixels are its label: the mean pixel is the expected label.
        torch.testing.assert_close(x.mean((1, 2, 3)), y @ torch.arange(5.0))
        mixed += (y.max(1).values < 1).any().item()
    assert mixed == 0 if not mixup and not cutmix else mixed > 4


def test_the_loss_is_soft_cross_entropy_with_smoothed_targets():
    settings = dict(mixup=0.8, cutmix=1.0, smoothing=0.1, classes=list("abcde"), precision=None)
    settings = SimpleNamespace(**settings, micro_batch=None, recompute=False)
    model = small_classifier().train()
    batch = {"images": torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)}
    batch["labels"] = torch.tensor([0, 1, 2, 3, 4, 0])
    torch.manual_seed(5)
    loss, _ = finetune.objective(model, batch, settings, CPU)
    torch.manual_seed(5)
    x, y = finetune.mix(augment.normalise(batch["images"]), batch["labels"], 5, 0.8, 1.0)
    logits, y = model(x).detach().double(), 0.9 * y.double() + 0.1 / 5
    naive = -sum(y[i, k] * (logits[i, k] - logits[i].exp().sum().log()) for i in range(6) for k in range(5))
    assert loss.item() == pytest.approx(naive.item() / 6, rel=1e-5)  # float32


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_view_is_a_function_of_seed_epoch_and_index(erasing):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
    source = images.Source("noise", images.Arrays(pixels, [0, 1]), ["a", "b"])
    views = data.LabelledViews(source, 32, 7, 0.3, finetune.strong_view(9.0, erasing))
    keys = [(epoch, index) for epoch in (0, 1) for index in (0, 1)]
    first = [views[key, key] for key in keys]
    for key, sample in reversed(list(zip(keys, first))):  # in another order
        assert torch.equal(views[key, key]["images"], sample["images"]) and sample["labels"] == key[1]
    assert not any(torch.equal(a["images"], b["images"]) for i, a in enumerate(first) for b in first[:i])
    assert {sample["images"].dtype for sample in first} == {torch.float32 if erasing else torch.uint8}


def test_randaugment_draws_its_magnitude_and_does_an_operation_one_time_in_two():
    transform, drawn = finetune.RandAugment(9.0), []
    torch.manual_seed(0)
    for _ in range(400):
        transform(torch.zeros(3, 4, 4, dtype=torch.uint8))
        drawn.append((transform.magnitude, transform.num_ops))
    magnitudes, counts = torch.tensor(drawn, dtype=torch.float64).unbind(1)
    assert magnitudes.max() <= 100 and magnitudes.median() == pytest.approx(90, abs=1)  # hundredths
    assert magnitudes.std() == pytest.approx(5, abs=0.7)  # its top 2.3% are cut
    shares = [(counts == n).double().mean().item() for n in (0, 1, 2)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.1)


# The command


def test_a_run_learns_and_notes_last_and_best(colours, capsys):
    assert run("--lr", "2e-3") == 0
    page = capsys.readouterr().out
    assert "chance 25.0%" in page and "best.pt, step" in page
    with open("finetune-colours/log.csv") as file:
        log = list(csv.DictReader(file))
    assert float(log[-1]["top1"]) > 80  # 40 images of 4 classes: chance is 25, its deviation 7
    with open("results.json") as file:
        found = json.load(file)["checkpoint.pt"]["finetune"]["colours"]
    assert found["top1"] == pytest.approx(float(log[-1]["top1"]), abs=1e-3)
    assert found["best_top1"] > 80
    tuned = slip.read_checkpoint("finetune-colours")["weights"]["visual.blocks.0.mlp.0.weight"]
    before = slip.read_checkpoint("checkpoint.pt")["weights"]["visual.blocks.0.mlp.0.weight"]
    assert 0 < (tuned - before).norm() < 0.5 * before.norm()  # it began at the checkpoint's tower
    with pytest.raises(ValueError, match="holds a classifier, no SLIP: type the run that it began with"):
        slip.load("finetune-colours")


def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(colours, monkeypatch):
    run(*STRONG, "--out", "whole")
    record = finetune.runs.Run.record

    def record_and_interrupt(self, *given):
        record(self, *given)
        self.caught = 15 if self.step == 3 else 0

    monkeypatch.setattr(finetune.runs.Run, "record", record_and_interrupt)
    assert run(*STRONG, "--out", "broken") == 143
    monkeypatch.setattr(finetune.runs.Run, "record", record)
    assert slip.read_checkpoint("broken")["run"]["step"] == 3  # of 6 in an epoch
    assert run(*STRONG, "--out", "broken") == 0
    whole, broken = weights("whole"), weights("broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not torch.equal(whole["visual.class_token"], weights(".")["visual.class_token"])


def test_warmup_is_obeyed_and_rates_follow_the_batch(colours, capsys):
    assert run("--max-steps", 2, "--warmup-epochs", 0.3, "--batch-size", 32, "--image-size", 48) == 0
    page = capsys.readouterr().out
    assert "2 steps of 32" in page and "1 of warm-up; lr 0.001" in page  # 0.3 x 3 steps; 2e-3 at 64
    assert weights("finetune-colours")["visual.positions"].shape == (1, 1 + 36, 128)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--data nothere", "unknown --data 'nothere'"),
        ("--batch-size 999", "found --batch-size 999, expected at most the 99 images"),
        ("--max-steps 3 --warmup-epochs 1", "steps of 3: type fewer"),
        ("--crop 2", "argument --crop: found 2, expected a number from 0 to 1"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(colours, refused, words, sentence):
    assert sentence in refused(run, *words.split())
    assert not (colours / "finetune-colours").exists()
