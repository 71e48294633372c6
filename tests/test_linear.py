"""The linear probe: on features that a plane separates and on noise, L-BFGS at its minimum, the paper's SGD
against it, an encoder left as it was, and the command on a tiny checkpoint.

    pytest tests/test_linear.py
"""

import re

import pytest
import torch
import torch.nn.functional as F

import data
import linear
import loop
import measure
import sets
import slip

CPU = torch.device("cpu")


def clusters(rows, classes, apart, width=6):
    """Gaussians of deviation 1 around points `apart` from one another -> (features, labels)."""
    generator = torch.Generator().manual_seed(rows)
    labels = torch.arange(rows) % classes
    centres = apart / 2**0.5 * torch.eye(classes, width)
    return centres[labels] + torch.randn(rows, width, generator=generator), labels


def test_the_probe_separates_what_a_plane_separates():
    result, _ = linear.probe(*clusters(300, 4, apart=14), *clusters(200, 4, apart=14), 4)
    assert result["top1"] == 100 and result["per_class"] == 100  # a miss is seven deviations away


def test_noise_stays_at_chance():
    result, _ = linear.probe(*clusters(400, 4, apart=0), *clusters(1000, 4, apart=0), 4)
    assert result["top1"] == pytest.approx(25, abs=6)  # four deviations of 1000 guesses


def test_the_scale_and_place_of_a_feature_do_not_matter():
    train, test = clusters(200, 3, apart=3), clusters(100, 3, apart=3)
    stretch, shift = torch.tensor([1e3, 1e-3, 1.0, 7.0, 0.1, 30.0]), torch.arange(6.0)
    moved = [(x * stretch + shift, labels) for x, labels in (train, test)]
    plain, stretched = linear.probe(*train, *test, 3), linear.probe(*moved[0], *moved[1], 3)
    assert stretched[0]["top1"] == pytest.approx(plain[0]["top1"], abs=2)  # two of 100 near the border


def test_a_feature_that_never_changes_does_no_harm():
    train, test = ((F.pad(x, (0, 1), value=3.0), y) for x, y in (clusters(120, 3, 12), clusters(60, 3, 12)))
    assert linear.probe(*train, *test, 3)[0]["top1"] == 100


@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_lbfgs_ends_at_the_minimum(decay):
    """The loss is convex: where its gradient is zero is the one minimum."""
    features, labels = clusters(300, 4, apart=2)
    weight, bias = (p.requires_grad_() for p in linear.fit(features, labels, 4, decay))
    loss = F.cross_entropy(features @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
    loss.backward()
    assert loss < 1.2  # log 4 = 1.39 at the start
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-3  # 0.2 at the start


def test_more_decay_makes_smaller_weights():
    features, labels = clusters(200, 3, apart=3)
    norms = [linear.fit(features, labels, 3, decay)[0].norm() for decay in linear.DECAYS]
    assert all(a > b for a, b in zip(norms, norms[1:], strict=False))


def test_the_decay_is_chosen_without_the_test_set():
    train, test = clusters(200, 3, apart=2), clusters(90, 3, apart=2)
    chosen = linear.probe(*train, *test, 3)[1]
    assert chosen in linear.DECAYS
    assert linear.probe(*train, test[0], test[1].flip(0), 3)[1] == chosen


# The encoder and the command


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 120, "test": 60})
    sets.drawn.cache_clear()
    yield
    sets.drawn.cache_clear()


def tiny(method):
    torch.manual_seed(0)
    return slip.build(slip.configure(method, "vit_tiny", vocab_size=520, text_depth=1, ssl_hidden=32))


@pytest.mark.parametrize("method", ["slip", "simclr"])
def test_the_encoder_is_left_bit_for_bit_as_it_was(method):
    model = tiny(method).train()
    with torch.no_grad():  # statistics that are not the initial ones
        model.branch({name: torch.randn(16, 128) for name in ("features1", "features2")})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    linear.evaluate(model, *sets.labelled("scenes-colour"), CPU)
    assert "branch.head.1.running_mean" in before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_probe_sees_the_towers_feature_before_any_projection(monkeypatch):
    model, seen = tiny("slip").eval(), []
    monkeypatch.setattr(linear, "probe", lambda *parts: seen.extend(parts) or ({}, 0))
    linear.evaluate(model, *sets.labelled("scenes"), CPU)
    train, train_labels, test, test_labels, classes = seen
    assert (train.shape, test.shape, classes) == ((120, 128), (60, 128), 12)
    source = sets.open_source("scenes-kind", split="test")
    assert test_labels.tolist() == [source.label(i) for i in range(60)]
    view = data.augment.normalise(data.Labelled(source, 32)[7][0][None])
    with torch.no_grad():
        torch.testing.assert_close(test[7], model.visual(view)[0], rtol=1e-4, atol=1e-5)  # another batch size


def test_colour_is_read_off_even_an_untrained_tower():
    result, _ = linear.evaluate(tiny("simclr"), *sets.labelled("scenes-colour"), CPU)
    assert result["top1"] > 20  # chance is 12.5


# The paper's path


def sgd(tmp_path, *flags):
    """The command on "scenes-colour" with the paper's path: 120 pictures, batches of 30."""
    flags = ["--data", "scenes-colour", "--recipe", "sgd", "--batch-size", "30", "--device", "cpu", *flags]
    return linear.main(["--checkpoint", str(tmp_path / "m.pt"), *flags])


def test_a_head_starts_small():
    head = linear.Head(slip.Config(), 500, 400).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02) and not head.bias.any()


def test_the_rate_is_a_cosine_of_the_epoch():
    rates = [linear.cosine_by_epoch(step, 3, 4, 0.4) for step in range(12)]
    halves = [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5)]
    assert rates == pytest.approx([rate for rate in halves for _ in range(3)])


def test_the_first_rate_is_a_tenth_of_the_batch_over_256(tmp_path, capsys):
    slip.save(tmp_path / "m.pt", tiny("simclr"))
    sgd(tmp_path, "--epochs", "1")
    page = capsys.readouterr().out
    assert "sgd path: SGD, 1 epochs of crops, batch 30, lr 0.0117188" in page  # 0.1 x 30 / 256
    assert "linear,scenes-colour,SGD, 1" in (tmp_path / measure.RESULTS).read_text().replace('"', "")


def test_sgd_comes_near_the_fast_path_and_leaves_the_encoder_bit_for_bit(tmp_path):
    slip.save(tmp_path / "m.pt", tiny("simclr"))
    sets_of = sets.labelled("scenes-colour")
    model = slip.load(tmp_path / "m.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = linear.arguments().parse_args(["--checkpoint", str(tmp_path / "m.pt"), "--recipe", "sgd"])
    args.data, args.batch_size, args.epochs, args.lr = "scenes-colour", 30, 25, 0.2
    head, state = linear.set_up_sgd(args, model, sets_of[0])
    rows = linear.sgd(args, model, *sets_of, head, state, CPU)
    fast, _ = linear.evaluate(model, *sets.labelled("scenes-colour"), CPU)
    assert rows[-1]["top1"] > max(25, fast["top1"] - 15)  # 60 test pictures, chance 12.5: two deviations
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "branch.head.1.running_mean" in before and all(p.grad is None for p in model.parameters())


def test_the_test_view_is_a_short_side_of_256_for_a_centre_of_224(tmp_path, monkeypatch):
    slip.save(tmp_path / "m.pt", tiny("simclr"))
    extract, seen = linear.extract, []
    monkeypatch.setattr(linear, "extract", lambda *args: seen.append(args[-1]) or extract(*args))
    sgd(tmp_path, "--epochs", "1")
    assert seen == [37]  # 32 x 256 / 224 = 36.6


def test_a_stopped_probe_goes_on_bit_for_bit(tmp_path, monkeypatch):
    slip.save(tmp_path / "m.pt", tiny("simclr"))
    sgd(tmp_path, "--epochs", "3", "--out", str(tmp_path / "whole"))
    save = loop.save

    def stop_after_five(out, model, run, keep=True):
        save(out, model, run)
        if run["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", stop_after_five)
    flags = ["--epochs", "3", "--save-every", "1", "--out", str(tmp_path / "broken")]
    with pytest.raises(KeyboardInterrupt):
        sgd(tmp_path, *flags)
    monkeypatch.setattr(loop, "save", save)
    sgd(tmp_path, *flags)
    whole, broken = (slip.read(tmp_path / name / loop.CHECKPOINT)["weights"] for name in ("whole", "broken"))
    assert torch.equal(whole["head.weight"], broken["head.weight"]) and whole["head.weight"].shape == (8, 128)


@pytest.mark.parametrize("method", ["clip", "simclr"])
def test_the_command_tells_accuracy_and_decay(tmp_path, capsys, method):
    slip.save(tmp_path / "m.pt", tiny(method))
    assert linear.main(["--checkpoint", str(tmp_path / "m.pt"), "--device", "cpu"]) == 0
    page = capsys.readouterr().out
    assert 0 <= float(re.search(r"scenes: linear top-1 ([\d.]+)%", page)[1]) <= 100
    assert float(re.search(r"fast path: L-BFGS .* weight decay (\S+) chosen", page)[1]) in linear.DECAYS
    assert 'linear,scenes-kind,"L-BFGS' in (tmp_path / measure.RESULTS).read_text()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--checkpoint nothere.pt", "no checkpoint at nothere.pt"),
        ("--checkpoint m.pt --data nothere", "unknown --data 'nothere'"),
        ("--checkpoint m.pt --data cifar10", "no CIFAR10 under"),
        ("--checkpoint m.pt --device tpu", "unknown --device 'tpu'"),
        (
            "--checkpoint m.pt --recipe sgd",
            "found --epochs 90 --batch-size 1024 --seed 0, expected 1 or more, 1",
        ),
        ("--checkpoint m.pt --recipe sgd --batch-size 60 --epochs 0", "found --epochs 0"),
        ("--checkpoint m.pt --recipe sgd --batch-size 60 --lr -1", "found --lr -1.0"),
        ("--checkpoint m.pt --workers -1", "found --workers -1"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(tmp_path, monkeypatch, capsys, flags, sentence):
    monkeypatch.chdir(tmp_path)
    slip.save("m.pt", tiny("simclr"))
    with pytest.raises(SystemExit) as end:
        linear.main(flags.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert end.value.code == 2 and sentence in message and message.count("\n") == 1


def test_a_test_split_of_other_classes_is_refused(tmp_path, monkeypatch, capsys):
    """A class that is missing in test/ would shift the labels of those after it, in silence."""
    monkeypatch.chdir(tmp_path)
    for folder in ("train/cat", "train/dog", "train/emu", "test/dog", "test/emu"):
        (tmp_path / "data/pets" / folder).mkdir(parents=True)
        for i in range(4):
            data.Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"data/pets/{folder}/{i}.png")
    slip.save("m.pt", tiny("simclr"))
    with pytest.raises(SystemExit) as end:
        linear.main("--checkpoint m.pt --data pets".split())
    assert end.value.code == 2 and "cat" in capsys.readouterr().err


def test_a_test_picture_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for path in ("train/cat/0", "train/cat/1", "train/dog/0", "train/dog/1", "test/cat/0", "test/dog/0"):
        (tmp_path / f"data/pets/{path}").parent.mkdir(parents=True, exist_ok=True)
        data.Image.new("RGB", (8, 8)).save(tmp_path / f"data/pets/{path}.png")
    (tmp_path / "data/pets/test/dog/0.png").write_bytes(b"")
    slip.save("m.pt", tiny("simclr"))
    assert linear.main("--checkpoint m.pt --data pets --device cpu".split()) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("cannot read data/pets/test/dog/0.png") and "\n" not in message
