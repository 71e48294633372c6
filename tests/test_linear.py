"""The linear probe: logistic regression at its minimum against closed forms, the same for any number of
threads; an encoder left as it was, the paper's SGD, and the command.
"""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import linear
import sets
import slip

CPU = torch.device("cpu")


def clusters(rows, classes, apart, width=6):
    """Gaussians of deviation 1 around points `apart` from one another -> (features, labels)."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % classes
    centres = apart / 2**0.5 * torch.eye(classes, width)
    return centres[labels] + torch.randn(rows, width, generator=generator), labels


def test_the_scale_and_place_of_a_feature_do_not_matter_and_a_constant_one_does_no_harm():
    train, test = clusters(200, 3, apart=3), clusters(300, 3, apart=3)
    stretch, shift = torch.tensor([1e3, 1e-2, 1.0, 7.0, 0.1, 30.0]), torch.arange(6.0)
    moved = [(F.pad(x * stretch + shift, (0, 1), value=3.0), y) for x, y in (train, test)]
    plain, stretched = linear.probe(*train, *test, 3), linear.probe(*moved[0], *moved[1], 3)
    assert stretched[1] == plain[1]
    assert stretched[0]["top1"] == pytest.approx(plain[0]["top1"], abs=0.7)  # two of 300 near the border


@pytest.mark.parametrize("decay", [1e-4, 1e-2, 1.0])
def test_the_gradient_is_zero_at_the_minimum(decay):
    """The loss is strictly convex in W: it has one minimum, where its gradient is zero."""
    features, labels = clusters(300, 4, apart=2)
    features = (features @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).double()
    weight, bias = (p.requires_grad_() for p in evaluate.logistic_regression(features, labels, 4, decay))
    loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
    loss.backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-5  # 0.2 at the start


def test_two_points_have_the_minimum_that_calculus_gives():
    """x = +-1, one class each: W = (-w, w) with 2 w decay = 1 / (1 + exp(2 w)) * 2 / 2."""
    points, labels = torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0, 1])
    weight, bias = evaluate.logistic_regression(points, labels, 2, 0.1)
    w = weight[1, 0].item()
    assert weight[0, 0].item() == pytest.approx(-w) and bias[0].item() == pytest.approx(bias[1].item())
    assert 0.1 * w == pytest.approx(1 / (1 + np.exp(2 * w)), rel=1e-4)


def test_threads_and_a_millionth_of_noise_leave_the_accuracy_within_0_3():
    """Correlated features of which early stopping would depend on rounding: condition number 1e4."""
    (train, train_labels), (test, test_labels) = (clusters(n, 4, apart=2, width=12) for n in (500, 400))
    blend = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    blend = blend * torch.logspace(0, -2, 12) @ blend.T
    accuracies, decays = [], []
    for threads, noise in ((1, 0), (2, 0), (1, 1e-6)):
        torch.set_num_threads(threads)
        shaken = [x @ blend * (1 + noise * torch.randn_like(x)) for x in (train, test)]
        result, decay = linear.probe(shaken[0], train_labels, shaken[1], test_labels, 4)
        accuracies.append(result["top1"])
        decays.append(decay)
    torch.set_num_threads(1)
    assert max(accuracies) - min(accuracies) <= 0.3 and len(set(decays)) == 1
    assert min(accuracies) > 50  # chance is 25


def test_of_decays_that_tie_the_largest_is_chosen_without_the_test_set():
    train, test = clusters(300, 3, apart=14), clusters(90, 3, apart=14)
    assert linear.probe(*train, *test, 3)[1] == linear.DECAYS[0] == 1  # every decay separates these
    assert linear.probe(*train, test[0], test[1].flip(0), 3)[1] == 1


# The encoder and the command


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 120, "test": 60})


def run(checkpoint, *words):
    return linear.main(["--checkpoint", str(checkpoint), "--device", "cpu", *map(str, words)])


def test_the_probe_gets_the_towers_feature_and_leaves_the_encoder_as_it_was(checkpoint, monkeypatch):
    model, parts = slip.load(checkpoint), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(linear, "probe", lambda *given: parts.extend(given) or ({}, 0))
    linear.probe_model(model.train(), *sets.labelled("scenes"), CPU)
    train, _, test, labels, classes = parts
    assert (train.shape, test.shape, classes) == ((120, 128), (60, 128), 12)
    source = sets.open_source("scenes-kind", split="test")
    assert labels.tolist() == [source.label(i) for i in range(60)]
    torch.testing.assert_close(test[7], model.visual(model.preprocess(source[7][0]))[0], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command_on_a_run_folder_prints_and_records_colour_above_chance(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(linear, "DECAYS", linear.DECAYS[::4])
    folder = checkpoint.removesuffix("checkpoint.pt")
    assert run(folder, "--data", "scenes-colour") == 0
    top1 = float(re.search(r"scenes-colour: linear top-1 ([\d.]+)%", capsys.readouterr().out)[1])
    assert top1 > 20  # even an untrained tower shows colour; chance is 12.5
    with open(f"{folder}/results.json") as file:
        found = json.load(file)["checkpoint.pt"]["linear"]["scenes-colour"]["top1"]
    assert found == pytest.approx(top1, abs=0.01)


def test_sgd_learns_colour_at_another_image_size(checkpoint, tmp_path, capsys):
    words = "--data scenes-colour --recipe sgd --batch-size 30 --epochs 8 --lr 0.3 --image-size 48".split()
    assert run(checkpoint, *words, "--out", tmp_path) == 0
    top1 = float(re.search(r"linear top-1 ([\d.]+)%.*SGD, 8 epochs, batch 30", capsys.readouterr().out)[1])
    assert top1 > 40  # 60 test images, chance 12.5: six deviations


def test_a_head_starts_small_and_its_first_rate_is_a_tenth_of_the_batch_over_256(checkpoint, tmp_path):
    words = f"--checkpoint {checkpoint} --recipe sgd --out {tmp_path}".split()
    args, model = linear.arguments().parse_args(words), slip.load(checkpoint)
    head, settings, _ = linear.set_up(args, checkpoint, model, sets.labelled("scenes")[0])
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1) and not head.bias.any()
    assert settings.batch_size == 120 and settings.lr == pytest.approx(0.1 * 120 / 256)
    assert settings.steps == settings.epochs == 90


def test_an_unreadable_training_image_is_left_out_and_a_test_image_ends_the_command(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name, grey in (("cat", 40), ("dog", 200)):
        for i in range(6):
            path = tmp_path / f"data/pets/{'train' if i < 4 else 'test'}/{name}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (grey + i, 0, 0)).save(path)
    (tmp_path / "data/pets/train/dog/0.png").write_bytes(b"")
    assert run(checkpoint, "--data", "pets") == 0
    out, err = capsys.readouterr()
    assert "linear top-1 100.00%" in out and "1 of 8 images" in err and "left out" in err
    (tmp_path / "data/pets/test/dog/5.png").write_bytes(b"")
    assert run(checkpoint, "--data", "pets") == 1
    assert "must be whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--data nothere", "unknown --data 'nothere'"),
        ("--recipe sgd --batch-size 999", "found --batch-size 999, expected at most the 120 images"),
        ("--workers -1", "argument --workers: found -1, expected a whole number, 0 or more"),
        ("--checkpoint nothere", "no checkpoint at nothere"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(checkpoint, refused, words, sentence):
    assert sentence in refused(run, checkpoint, *words.split())
