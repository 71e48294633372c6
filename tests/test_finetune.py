"""Fine-tuning: its parts against closed forms and naive float64 references; the command on pictures of one
colour each must learn, go on bit for bit, and take every kind of checkpoint.

    pytest tests/test_finetune.py
"""

import argparse
import csv

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import finetune
import slip

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}
SMALL = "--data colours --epochs 2 --batch-size 16 --device cpu".split()
STRONG = "--drop-path 0.3 --mixup 0.8 --cutmix 1 --randaugment 9 --erasing 0.5 --crop 0.5".split()


def tiny(method="simclr"):
    torch.manual_seed(0)
    return slip.build(slip.configure(method, "vit_tiny", vocab_size=520, text_depth=1, ssl_hidden=32))


def classifier(drop_path=0.0, classes=5, **sizes):
    torch.manual_seed(1)
    model = finetune.from_pretrained(tiny(), [str(i) for i in range(classes)], drop_path=drop_path, **sizes)
    torch.nn.init.normal_(model.head.weight)  # not the small one, so that the tower has a gradient
    return model


@pytest.fixture
def colours(tmp_path, monkeypatch):
    """A checkpoint m.pt and a labelled folder of pictures, each of nearly one colour."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 26), ("test", 10)):
        for name, colour in COLOURS.items():
            folder = tmp_path / "data/colours" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 25, (32, 32, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    slip.save(tmp_path / "m.pt", tiny())
    return tmp_path


def run(*flags):
    return finetune.main(["--checkpoint", "m.pt", *SMALL, *flags])


def weights(path):
    return slip.read(path)["weights"]


# The model


def test_drop_path_grows_from_none_to_its_value_at_the_last_block():
    paths = [block.drop_path for block in classifier(drop_path=0.3).visual.blocks]
    assert isinstance(paths[0], torch.nn.Identity)
    assert [path.p for path in paths[1:]] == pytest.approx([0.1, 0.2, 0.3])


def test_the_tower_is_the_checkpoints_and_the_guess_at_the_start_is_chance():
    source, x = tiny(), torch.randn(3, 3, 32, 32)
    model = finetune.from_pretrained(source, list("abcd"), drop_path=0.1).eval()
    assert torch.equal(model.visual(x), source.visual(x))
    torch.testing.assert_close(model(x).softmax(1), torch.full((3, 4), 0.25), atol=1e-3, rtol=0)


def gradients(model, micro_batch, recompute):
    torch.manual_seed(2)
    x = torch.randn(7, 3, 32, 32, dtype=torch.float64)
    model.zero_grad()
    torch.manual_seed(3)
    model(x, micro_batch, recompute).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("micro_batch, recompute", [(3, False), (3, True), (1, True)])
def test_without_drop_path_chunks_change_nothing(micro_batch, recompute):
    model = classifier().double().train()
    whole, chunked = gradients(model, None, False), gradients(model, micro_batch, recompute)
    for name in whole:  # sums in another order
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-10, atol=1e-12)


def test_with_drop_path_making_activations_again_draws_the_same():
    model = classifier(drop_path=0.5).double().train()
    kept, again = gradients(model, 3, False), gradients(model, 3, True)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_positions_of_the_same_size_stay_and_a_ramp_of_rows_stays_one():
    positions = torch.randn(1, 1 + 16, 8)
    assert torch.equal(finetune.resized(positions, 4), positions)
    rows = torch.arange(8.0).view(1, 8, 1, 1).expand(1, 8, 8, 1).reshape(1, 64, 1)  # the row of each place
    wide = finetune.resized(torch.cat([torch.full((1, 1, 1), 99.0), rows], 1), 16)
    assert wide.shape == (1, 1 + 256, 1) and wide[0, 0] == 99
    inner = wide[0, 1:].view(16, 16)[4:12]  # away from the border
    line = ((torch.arange(4.0, 12) + 0.5) / 2 - 0.5)[:, None].expand(8, 16)
    torch.testing.assert_close(inner, line, atol=0.05, rtol=0)  # torch's cubic bends a line by 3/64


def test_a_larger_picture_goes_through():
    model = classifier(image_size=48)
    assert model.config.image_size == 48 and model(torch.randn(2, 3, 48, 48)).shape == (2, 5)


# Views, mixing, loss


@pytest.mark.parametrize("mixup, cutmix", [(0, 0), (0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_targets_sum_to_one_and_follow_the_pictures(mixup, cutmix):
    labels, mixed = torch.tensor([0, 1, 2, 3, 4, 0]), 0
    images = labels.view(6, 1, 1, 1).expand(6, 3, 8, 8).float()
    mix = finetune.mixer(mixup, cutmix, 5)
    for seed in range(8):
        torch.manual_seed(seed)
        x, y = mix(images, labels)
        torch.testing.assert_close(y.sum(1), torch.ones(6))
        # A picture whose pixels are its label: the mean pixel is the expected label.
        torch.testing.assert_close(x.mean((1, 2, 3)), y @ torch.arange(5.0))
        mixed += (y.max(1).values < 1).any().item()
    assert mixed == 0 if not mixup and not cutmix else mixed > 4


def test_the_loss_is_soft_cross_entropy_with_smoothed_targets():
    args = argparse.Namespace(
        mixup=0.8, cutmix=1.0, smoothing=0.1, classes=list("abcde"), precision=None, micro_batch=None,
        recompute=False,
    )  # fmt: skip
    model = classifier().train()
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    torch.manual_seed(5)
    loss, stats = finetune.step_loss(model, args, torch.device("cpu"))({"images": images, "labels": labels})
    torch.manual_seed(5)
    x, y = finetune.mixer(0.8, 1.0, 5)(augment.normalise(images), labels)
    logits, y = model(x).detach().double(), 0.9 * y.double() + 0.1 / 5
    naive = (
        -sum(y[i, k] * (logits[i, k] - logits[i].exp().sum().log()) for i in range(6) for k in range(5)) / 6
    )
    assert loss.item() == pytest.approx(naive.item(), rel=1e-5)  # float32
    assert 0 <= stats["train_top1"] <= 100


def source(pictures=4):
    rng = np.random.default_rng(0)
    return data.Source(
        "noise", data.Arrays(rng.integers(0, 256, (pictures, 40, 40, 3), np.uint8), [0, 1, 2, 3])
    )


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_a_view_is_a_function_of_seed_epoch_and_index_and_leaves_torchs_generator(erasing):
    views = data.LabelledViews(source(), 32, 7, 0.3, finetune.strong_view(9.0, erasing))
    keys = [(epoch, index) for epoch in (0, 1) for index in (0, 1)]
    torch.manual_seed(0)
    first = [views[key, key] for key in keys]
    after = torch.rand(())
    torch.manual_seed(0)
    assert torch.rand(()) == after
    for key, sample in reversed(list(zip(keys, first))):  # in another order, from another state
        assert torch.equal(views[key, key]["images"], sample["images"]) and sample["labels"] == key[1]
    assert not any(torch.equal(a["images"], b["images"]) for i, a in enumerate(first) for b in first[:i])
    assert {sample["images"].dtype for sample in first} == {torch.float32 if erasing else torch.uint8}


def test_half_of_the_views_are_mirrored():
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (1, 32, 1))  # brighter to the right
    views = data.LabelledViews(data.Source("ramp", data.Arrays(ramp, [0])), 32, 0, 1.0)
    images = [views[(epoch, 0), (epoch, 0)]["images"].float() for epoch in range(200)]
    mirrored = sum((image[..., 0] > image[..., -1]).all().item() for image in images)
    assert 70 < mirrored < 130  # four deviations of 200 throws


def test_erasing_puts_noise_in_a_box_of_the_normalised_picture():
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    view = finetune.strong_view(0, 1.0)(image)
    changed = (view - augment.normalise(image[None])[0]).abs().amax(0) > 1e-4  # torchvision divides once
    rows, columns = changed.any(1).sum().item(), changed.any(0).sum().item()
    assert 0.01 < rows * columns / 32**2 < 0.4 and changed.sum() > 0.95 * rows * columns  # 0.02 to 0.33


def test_randaugment_draws_its_magnitude_and_does_an_operation_one_time_in_two():
    transform, drawn = finetune.RandAugment(9.0), []
    torch.manual_seed(0)
    for _ in range(400):
        transform(torch.zeros(3, 4, 4, dtype=torch.uint8))
        drawn.append((transform.magnitude, transform.num_ops))
    magnitudes, counts = torch.tensor(drawn, dtype=torch.float64).unbind(1)
    assert magnitudes.max() <= 100 and magnitudes.median() == pytest.approx(90, abs=1)  # hundredths
    assert magnitudes.std() == pytest.approx(5, abs=0.7)  # its top 2.3% are cut
    assert [(counts == n).double().mean().item() for n in (0, 1, 2)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=0.1
    )


# The command


def test_a_run_learns_and_leaves_results_that_can_be_tested_again(colours, capsys):
    assert run("--lr", "2e-3") == 0
    page = capsys.readouterr().out
    assert "vit_tiny" in page and "chance 25.0%" in page and "best on the held-out part" in page
    log = list(csv.DictReader(open("finetune-colours/log.csv")))
    assert float(log[-1]["top1"]) > 80  # 40 pictures of 4 classes: chance is 25, its deviation 7
    rows = list(csv.DictReader(open("results.csv")))
    assert [(row["checkpoint"], row["task"], row["data"]) for row in rows] == [
        ("m.pt", "finetune", "colours")
    ] * 2
    assert float(rows[0]["value"]) == float(log[-1]["top1"]) and rows[0]["how"].startswith("last")
    best = max(log, key=lambda row: float(row["held_top1"]))
    assert float(rows[1]["value"]) == float(best["top1"]) and rows[1]["how"].startswith("best")
    for name, told in (("checkpoint.pt", rows[0]), ("best.pt", rows[1])):
        assert (
            finetune.main(["--checkpoint", f"finetune-colours/{name}", "--evaluate", "--device", "cpu"]) == 0
        )
        assert f"colours: fine-tuned top-1 {float(told['value']):.2f}%" in capsys.readouterr().out
    assert finetune.load("finetune-colours/best.pt").classes == sorted(COLOURS)


def test_a_stopped_run_goes_on_bit_for_bit(colours, monkeypatch):
    run(*STRONG, "--out", "whole")
    step_loss = finetune.step_loss

    def cut_short(model, args, device):
        loss_of, steps = step_loss(model, args, device), iter(range(4))

        def cut(batch):
            if next(steps) == 3:
                raise KeyboardInterrupt
            return loss_of(batch)

        return cut

    monkeypatch.setattr(finetune, "step_loss", cut_short)
    with pytest.raises(KeyboardInterrupt):
        run(*STRONG, "--out", "broken", "--save-every", "1")
    assert slip.read("broken/checkpoint.pt")["run"]["step"] == 3
    monkeypatch.setattr(finetune, "step_loss", step_loss)
    run(*STRONG, "--out", "broken", "--save-every", "1")
    whole, broken = weights("whole/checkpoint.pt"), weights("broken/checkpoint.pt")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not torch.equal(whole["visual.class_token"], weights("m.pt")["visual.class_token"])


def test_of_few_pictures_none_is_held_out_and_no_best_is_told(colours, capsys):
    for picture in colours.glob("data/colours/train/*/*.png"):
        if int(picture.stem) > 3:
            picture.unlink()
    run("--max-steps", "1")  # 16 pictures
    page = capsys.readouterr().out
    assert "top-1" in page and "best" not in page and not (colours / "finetune-colours/best.pt").exists()


def test_the_learning_rate_is_in_proportion_to_the_batch(colours, capsys):
    run("--max-steps", "1", "--batch-size", "32")
    assert ", lr 0.001, " in capsys.readouterr().out  # 2e-3 at 64


def test_a_published_file_is_fine_tuned(colours, monkeypatch):
    monkeypatch.setitem(slip.SIZES, "vit_s16", dict(width=48, depth=2, heads=12, patch=16))
    monkeypatch.setitem(slip.TEXT, "vit_s16", dict(text_width=32, text_depth=1, text_heads=4, ssl_hidden=16))
    torch.manual_seed(0)
    state = slip.build("CLIP_VITS16").state_dict()
    state["visual.patch_embed.projection.weight"] = state["visual.patch_embed.projection.weight"].view(
        48, 3, 16, 16
    )
    published = {"module." + slip.published_name(name): value for name, value in state.items()}
    torch.save({"state_dict": published, "args": argparse.Namespace(model="CLIP_VITS16")}, "published.pt")
    flags = ["--checkpoint", "published.pt", "--image-size", "64", "--max-steps", "1"]
    assert finetune.main([*SMALL, *flags]) == 0
    tuned = weights("finetune-colours/checkpoint.pt")
    assert tuned["visual.positions"].shape == (1, 17, 48) and tuned["head.weight"].shape == (4, 48)


def test_a_fine_tuned_file_is_no_model_of_captions(colours, capsys):
    run("--max-steps", "1")
    with pytest.raises(ValueError, match="is a classifier.*finetune.py --evaluate") as error:
        slip.load("finetune-colours/checkpoint.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--checkpoint nothere.pt", "no checkpoint at nothere.pt"),
        ("--data nothere", "unknown --data 'nothere'"),
        ("--batch-size 999", "found --batch-size 999, expected 1 (the ranks) to 99 (the pictures)"),
        ("--lr 0", "found --lr 0.0, expected more than 0"),
        ("--crop 2", "found --crop 2.0, expected 0 to 1"),
        ("--mixup -1", "found --mixup -1.0, expected 0 or more"),
        ("--clip-grad -1", "found --clip-grad -1.0, expected more than 0"),
        ("--evaluate --workers -1", "found --workers -1, expected 0 or more"),
        ("--test-resize 0.9", "found --test-resize 0.9, expected 1 or more"),
        ("--image-size 33", "not a multiple of the patch size 8"),
        ("--evaluate", "m.pt is not fine-tuned: leave out --evaluate"),
        ("--device tpu", "unknown --device 'tpu'"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(colours, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        run(*flags.split())
    message = capsys.readouterr().err.split("error: ")[1]
    assert end.value.code == 2 and sentence in message and message.count("\n") == 1
    assert not (colours / "finetune-colours").exists()
