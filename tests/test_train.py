"""Pre-training as it is used: the real command on a few images must learn, resume bit for bit, and give the
same weights in chunks, with workers and for every method; `objective` against its parts.
"""

import csv
import itertools
import random
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import augment
import data
import flags
import ranks
import sets
import slip
import train
import validation
from losses import info_nce

SMALL = "--model vit_tiny --batch-size 32 --workers 0 --strong-crop 0.3".split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """The built-in set, with as many images as a test can draw."""
    monkeypatch.setattr(sets, "SCENES_COUNT", {"train": 640, "test": 240})


def run(out, *words):
    return train.main([*SMALL, "--out", str(out), *map(str, words)])


def set_up(out, *words):
    return train.set_up(flags.arguments("").parse_args([*SMALL, "--out", str(out), *map(str, words)]))


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def log(out):
    with open(out / "log.csv") as file:
        return list(csv.DictReader(file))


def same(a, b):
    return all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])


# Algorithm 1


def toy_step(method, micro_batch=None, recompute=False, ssl_scale=1.0, **batch):
    """-> (loss, stats, model) of one step in float64 on eight random rows, shared by the ranks."""
    torch.manual_seed(0)
    model = slip.build(slip.configure(method, "vit_tiny", vocab_size=520, text_depth=1, ssl_hidden=32))
    generator, model = torch.Generator().manual_seed(1), model.double().train()
    crops = torch.randint(0, 256, (4, 8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = dict(zip(("images", "view1", "view2"), crops)) | batch
    rows["tokens"] = torch.randint(1, 500, (8, 6), generator=generator)
    rows["tokens"][:, 5] = 519
    if "beit" in method:
        rows["view1_mask"] = torch.rand(8, 16, generator=generator).argsort(1) < 6
        model.branch.prepare(lambda: augment.normalise(crops.flatten(0, 1)).double())
    partner = slip.METHODS[method][1]
    settings = dict(partner=partner, micro_batch=micro_batch, recompute=recompute, ssl_scale=ssl_scale)
    settings |= dict(mask_same_class="classes" in rows, precision="fp32")
    rows = {name: ranks.share(values) for name, values in rows.items()}
    wrapped = ranks.wrap(model)  # which must live until the backward pass is over
    loss, stats = train.objective(wrapped, rows, SimpleNamespace(**settings), CPU)
    loss.backward()
    return loss.item(), {name: value.item() for name, value in stats.items()}, model


@pytest.fixture
def doubles(monkeypatch):
    """Views in float64: in float32 rounding would hide what is not exact."""
    for name in ("normalise", "strong"):
        function = getattr(augment, name)
        monkeypatch.setattr(augment, name, lambda *args, function=function: function(*args).double())


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("method", slip.METHODS)
def test_chunks_change_neither_loss_nor_gradient(doubles, method):
    whole, _, a = toy_step(method)
    chunked, _, b = toy_step(method, micro_batch=3, recompute=True)
    assert whole == pytest.approx(chunked, rel=1e-12)  # float64; sums in another order
    assert (gradients(a) - gradients(b)).norm() < 1e-8 * gradients(a).norm()
    for one, other in zip(a.buffers(), b.buffers(), strict=True):  # BatchNorm's statistics, slow copies
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_loss_is_the_weighted_sum_of_its_terms(doubles):
    loss, stats, _ = toy_step("slip", ssl_scale=0.3)
    assert loss == pytest.approx(stats["clip_loss"] + 0.3 * stats["ssl_loss"], rel=1e-12)
    assert toy_step("clip")[1]["ssl_loss"] == toy_step("simclr")[1]["clip_loss"] == 0


def test_a_scale_of_zero_gives_the_head_no_gradient(doubles):
    _, _, model = toy_step("slip", ssl_scale=0.0)
    assert all(not p.grad.any() for p in model.branch.parameters())
    assert model.image_projection.grad.any()


def test_two_language_views_are_the_mean_of_two_losses(doubles):
    first = toy_step("clip")[0]
    images2 = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    both = toy_step("clip", images2=images2)[0]
    second = toy_step("clip", images=images2)[0]
    assert both == pytest.approx((first + second) / 2, rel=1e-12)


def test_rows_of_one_class_are_no_negatives_of_each_other(doubles):
    classes = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert toy_step("clip", classes=classes)[0] < toy_step("clip")[0]


def test_the_floor_of_shared_class_names_is_that_of_a_perfect_model():
    """Two classes, a batch of four as 2 + 2 has log 2; the mean over draws is near."""
    assert validation.class_floor(4096, 1000) == pytest.approx(1.52, abs=0.05)
    embed = torch.eye(2)[[0, 0, 1, 1]]
    assert info_nce(embed, embed, 100.0)[0].item() == pytest.approx(0.6931, abs=1e-3)


# The loop


@pytest.mark.parametrize(
    "method", ["slip", *(pytest.param(m, marks=pytest.mark.slow) for m in ("clip", "simclr"))]
)
def test_overfitting_one_batch_brings_the_loss_far_below_chance(tmp_path, method):
    run(tmp_path, "--method", method, "--overfit", "--max-steps", 25, "--lr", 2e-3)
    row = log(tmp_path)[-1]
    for name, chance in [("clip_loss", 3.47), ("ssl_loss", 4.14)]:  # log 32 and log 63
        assert name not in row or float(row[name]) < 0.75 * chance, row


def test_colours_are_learned_from_class_names(tmp_path):
    run(tmp_path, "--method", "clip", "--data", "scenes-colour", "--max-steps", 50, "--lr", 2e-3)
    assert float(log(tmp_path)[-1]["zeroshot_scenes-colour"]) > 30  # chance is 12.5


@pytest.mark.slow
def test_new_names_are_learned_from_weights_and_the_old_ones_kept(tmp_path):
    """The eight colours by their names, then from these weights, at the rate of --init, by new ones."""
    words = ["--method", "clip", "--root", tmp_path, "--zeroshot"]
    run(tmp_path / "old", "--data", "scenes-colour", "--max-steps", 60, "--lr", 2e-3, *words, "scenes-colour")
    for split in ("train", "test"):
        source = sets.open_source("scenes-colour", "data", split)
        for i in range(len(source)):
            image, label = source[i]
            path = tmp_path / "names" / split / f"zq{'abcdefgh'[label]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    words = ["--data", "names", "--init", tmp_path / "old", "--max-steps", 150, *words, "scenes-colour,names"]
    run(tmp_path / "new", *words)
    after = log(tmp_path / "new")[-1]
    old, kept = (float(row["zeroshot_scenes-colour"]) for row in (log(tmp_path / "old")[-1], after))
    assert old > 80 and kept > old - 10  # at lr 1e-3 it falls by 30
    assert float(after["zeroshot_names"]) > 50  # chance is 12.5, and less before


class Killed(Exception):
    pass


def kill_at(monkeypatch, step):
    objective, count = train.objective, itertools.count(1)

    def counted(*args):
        if next(count) == step:
            raise Killed
        return objective(*args)

    monkeypatch.setattr(train, "objective", counted)


def resumed_run(tmp_path, monkeypatch, *words):
    """A run of 22 steps, and one killed at step 13 and resumed from step 10."""
    run(tmp_path / "whole", "--max-steps", 22, *words)
    with monkeypatch.context() as patch:
        kill_at(patch, 13)
        with pytest.raises(Killed):
            run(tmp_path / "killed", "--max-steps", 22, "--save-every", 5, *words)
    assert saved(tmp_path / "killed")["run"]["step"] == 10
    run(tmp_path / "killed", "--max-steps", 22, *words)
    return saved(tmp_path / "whole"), saved(tmp_path / "killed")


def test_a_killed_run_resumes_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    whole, killed = resumed_run(tmp_path, monkeypatch)
    assert same(whole, killed)
    rows = [log(tmp_path / name) for name in ("whole", "killed")]
    assert len(rows[0]) == len(rows[1]) == 2
    for a, b in zip(*rows):
        assert {**a, "images_per_s": 0} == {**b, "images_per_s": 0}


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in slip.METHODS if method != "slip"])
def test_every_method_resumes_bit_for_bit(tmp_path, monkeypatch, method):
    assert same(*resumed_run(tmp_path, monkeypatch, "--method", method, "--micro-batch", 12))


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        run(tmp_path / str(workers), "--max-steps", 4, "--workers", workers, "--zeroshot", "none")
    assert same(saved(tmp_path / "0"), saved(tmp_path / "2"))


def test_the_logit_scale_is_clamped_after_the_step(tmp_path):
    model, the_run, *rest = set_up(tmp_path, "--max-steps", 1, "--zeroshot", "none")
    model.logit_scale.data.fill_(7.0)
    train.train(model, the_run, *rest)
    assert model.logit_scale.item() == pytest.approx(4.6052, abs=1e-6)  # float32


def test_best_is_chosen_by_held_out_recall_and_the_log_shows_it(tmp_path, capsys):
    run(tmp_path, "--method", "clip", "--max-steps", 38, "--lr", 1e-3)
    rows = log(tmp_path)
    best = max(rows, key=lambda row: float(row["val_r1"]))
    assert saved(tmp_path)["run"]["best_step"] == int(best["step"]) and float(rows[0]["val_loss"]) > 0
    page = capsys.readouterr().out
    assert f"best.pt: step {best['step']}" in page and "rough" in page  # 32 held-out pairs
    assert "images/s over" in page and saved(tmp_path)["run"]["cost"]["peak_memory_gib"] > 0.05
    assert slip.read_checkpoint(tmp_path / "best.pt")["run"]["step"] == int(best["step"])


def test_a_run_without_language_logs_its_neighbours(tmp_path):
    run(tmp_path, "--method", "simclr", "--max-steps", 30)
    assert [row for row in log(tmp_path)[0] if row.startswith("clip")] == []
    assert float(log(tmp_path)[-1]["knn_top1"]) > 0  # of 32 images: measured, not good


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, capsys):
    assert run(tmp_path, "--max-steps", 40, "--lr", 1e30, "--warmup-epochs", 0) == 1
    message = capsys.readouterr().err
    assert "at step" in message and "learning rate" in message and "none was saved yet" in message


# Flags


def test_an_explicit_warm_up_is_obeyed_and_one_that_exceeds_the_run_refused(tmp_path, refused):
    settings = set_up(tmp_path, "--max-steps", 40, "--warmup-epochs", 1)[2]
    assert settings.warmup_steps == settings.epoch_steps == 19
    with pytest.raises(AttributeError):
        settings.lr = 1.0  # made once
    assert "19 steps of 10" in refused(run, tmp_path, "--max-steps", 10, "--warmup-epochs", 1)


def test_flags_reach_the_views_and_the_branch(tmp_path):
    views = set_up(tmp_path / "a", "--ssl-temp", 0.5, "--clip-aug", "simclr", "--clip-views", 2)[4]
    assert views.pair == data.PAIRS["simclr"] and views.clip_strong == augment.SIMCLR
    model, _, _, _, views, _ = set_up(tmp_path / "b", "--method", "slip-mocov3", "--captions", 64)
    assert model.branch.temperature == 0.2 and views.pair == data.PAIRS["mocov3"]
    assert (len(views.captioned), len(views.other)) == (64, 608)
    views = set_up(tmp_path / "c", "--ssl-data", "scenes-kind")[4]
    assert (views.captioned.name, views.other.name, len(views.other)) == ("scenes", "scenes-kind", 608)


def test_a_run_begins_from_the_weights_of_another(tmp_path):
    run(tmp_path / "slip", "--max-steps", 2, "--zeroshot", "none")
    words = ["--init", tmp_path / "slip", "--method"]
    model, _, settings, *_ = set_up(tmp_path / "clip", *words, "clip")
    before = saved(tmp_path / "slip")["weights"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert settings.lr == 3e-5 and model.tokenizer.vocab_size == model.config.vocab_size
    simclr = set_up(tmp_path / "larger", *words, "simclr", "--image-size", 48)[0]
    assert torch.equal(simclr.branch.head[0].weight, before["branch.head.0.weight"])
    assert simclr.visual.positions.shape == (1, 37, 128)
    finer = set_up(tmp_path / "finer", *words, "clip", "--image-size", 28, "--patch", 7)[0]
    assert finer.visual.positions.shape == (1, 17, 128)
    words += ["clip", "--captions", 64, "--vocab", "train"]
    own = set_up(tmp_path / "own", *words)[0].tokenizer
    assert own.merges != model.tokenizer.merges  # a typed vocabulary is obeyed


def test_a_run_goes_on_with_its_own_vocabulary(tmp_path, refused):
    words = ["--max-steps", 2, "--zeroshot", "none"]
    run(tmp_path / "old", *words)
    begun = ["--init", tmp_path / "old", "--captions", 64, *words, "--vocab", "train"]
    run(tmp_path / "new", *begun)
    before = saved(tmp_path / "new")
    assert "type --vocab and --data as before" in refused(run, tmp_path / "new", *begun[:-2])
    run(tmp_path / "new", *begun)
    assert same(before, saved(tmp_path / "new"))


def test_captions_are_no_zero_shot_set(tmp_path, refused):
    (tmp_path / "both").mkdir()
    (tmp_path / "both/a.jpg").touch()
    (tmp_path / "both/both-test.tsv").write_text("path\tcaption\na.jpg\ta boat\n")
    words = ("--root", tmp_path, "--zeroshot", "both")
    assert "--zeroshot both has captions, no classes" in refused(run, tmp_path / "run", *words)


WRONG = [
    ("--batch-size 0", "found 0, expected a whole number above 0"),
    ("--batch-size 1", "a contrastive loss compares"),
    ("--image-size 30", "not a multiple of the patch size 8"),
    ("--captions 100000", "there are 608 images"),
    ("--method clip --ssl-scale 2", "type --method slip, not clip"),
    ("--method simclr --clip-views 2", "simclr has none"),
    ("--method byol --ssl-temp 0.5", "byol has no such temperature"),
    ("--init nothere.pt", "nothere.pt"),
    ("--zeroshot nothere", "nothere"),
]


@pytest.mark.parametrize("words, sentence", WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_command_line_is_one_sentence_and_exit_2(tmp_path, refused, words, sentence):
    assert sentence in refused(run, tmp_path / "out", "--root", tmp_path / "root", *words.split())
    assert not (tmp_path / "out/checkpoint.pt").exists()


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_in_the_same_weights(tmp_path):
    """SIGKILL, resumed by the same line each time."""
    words = [*SMALL, "--max-steps", "200", "--save-every", "5", "--zeroshot", "none"]
    command = [sys.executable, "train.py", *words, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    dice, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(5, 9))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, str(tmp_path / "killed")], check=True, stdout=subprocess.DEVNULL)
    assert kills > 3 and same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))
