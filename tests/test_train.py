"""Training as it is used: the real command on small settings must learn, resume bit for bit, and not mind
chunks or workers.

pytest tests/test_train.py            # and: pytest -m slow tests/test_train.py
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import scenes
import sets
import slip
import train
import zeroshot

SMALL = "--model vit_tiny --batch-size 32 --warmup-epochs 0.1 --workers 0 --strong-crop 0.3".split()


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """The built-in set, cut to what a test can draw, and one thread: small products gain nothing by a
    second.
    """
    small = {split: scenes.build(split, count) for split, count in {"train": 640, "test": 240}.items()}
    monkeypatch.setattr(sets, "drawn", small.get)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out, *flags):
    return train.main([*SMALL, "--out", str(out), *map(str, flags)])


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["weights"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def farthest(a, b):
    """Largest distance of a tensor, relative to its length; without what has no gradient in theory.

    The keys' part of qkv.bias changes no output, nor does a bias before a BatchNorm (in SimCLR alone the
    tower's last is one). Their gradient is rounding noise, which AdamW scales up to whole steps.
    """
    idle, distances = ["head.0.bias", "head.3.bias", "running_mean"], []
    idle += [] if "text_projection" in a else ["visual.norm.bias"]
    for name in a:
        if a[name].is_floating_point() and not name.endswith(tuple(idle)):
            x, y = a[name], b[name]
            if name.endswith("qkv.bias"):
                x, y = (torch.cat([v.chunk(3)[0], v.chunk(3)[2]]) for v in (x, y))
            distances.append(((x - y).norm() / x.norm().clamp(min=1e-12)).item())
    return max(distances)


@pytest.mark.parametrize("method", ["slip", "clip", "simclr"])
def test_overfitting_one_batch_brings_the_loss_far_below_chance(tmp_path, method):
    run(tmp_path, "--method", method, "--overfit", "--max-steps", 40, "--lr", 2e-3)
    row = list(csv.DictReader(open(tmp_path / "log.csv")))[-1]
    for name, chance in [("clip_loss", 3.47), ("ssl_loss", 4.14)]:
        assert row[name] == "" or float(row[name]) < 0.75 * chance, row  # log 32 and log 63


def test_colours_are_learned_from_captions(tmp_path):
    run(tmp_path, "--method", "clip", "--max-steps", 80, "--lr", 2e-3)
    model = slip.load(tmp_path / "checkpoint.pt")
    result = zeroshot.evaluate(model, sets.open_source("scenes-colour", split="test"), torch.device("cpu"))
    assert result["top1"] > 35  # chance is 12.5; several seeds gave 55 to 75


def test_a_stopped_run_goes_on_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    flags = ["--max-steps", 30]
    run(tmp_path / "whole", *flags)
    step_loss = train.step_loss

    def kill_at_step_13(model, args, device):
        loss_of, count = step_loss(model, args, device), [0]

        def counted(batch):
            count[0] += 1
            if count[0] == 13:
                raise KeyboardInterrupt
            return loss_of(batch)

        return counted

    monkeypatch.setattr(train, "step_loss", kill_at_step_13)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", *flags, "--save-every", 5)
    monkeypatch.setattr(train, "step_loss", step_loss)
    assert torch.load(tmp_path / "broken/checkpoint.pt", weights_only=True)["run"]["step"] == 10
    run(tmp_path / "broken", *flags, "--workers", 2)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    rows = [list(csv.DictReader(open(tmp_path / name / "log.csv"))) for name in ("whole", "broken")]
    assert len(rows[0]) == len(rows[1]) == 2
    for whole, broken in zip(*rows, strict=True):
        assert {**whole, "images_per_s": 0} == {**broken, "images_per_s": 0}


@pytest.mark.parametrize("method", ["slip", "clip", "simclr"])
def test_chunks_change_nothing(tmp_path, monkeypatch, method):
    """In float64: in float32 AdamW makes whole steps of rounding, and a ReLU at its kink may turn."""
    build, views = slip.build, data.device_views
    monkeypatch.setattr(slip, "build", lambda config: build(config).double())
    monkeypatch.setattr(data, "device_views", lambda chunk: doubled(views(chunk)))
    monkeypatch.setattr(train.Evaluation, "__call__", lambda self: ({"zeroshot_top1": None}, None))
    monkeypatch.setattr(train, "report", lambda *_: None)  # which test in float32
    for micro_batch in (32, 16, 4):
        run(tmp_path / str(micro_batch), "--method", method, "--max-steps", 10, "--micro-batch", micro_batch)
    whole = weights(tmp_path / "32")
    assert all(value.dtype == torch.float64 for value in whole.values() if value.is_floating_point())
    for micro_batch in (16, 4):
        assert farthest(whole, weights(tmp_path / str(micro_batch))) < 1e-9  # sums in another order


def doubled(chunk):
    return {name: value.double() if value.is_floating_point() else value for name, value in chunk.items()}


@pytest.mark.parametrize(
    "method", [method for method in slip.METHODS if method not in ("slip", "clip", "simclr")]
)
def test_the_other_partners_train_and_go_on_bit_for_bit(tmp_path, monkeypatch, method):
    flags = ["--method", method, "--batch-size", 16, "--max-steps", 10, "--micro-batch", 8, "--save-every", 4]
    run(tmp_path / "whole", *flags)
    order = data.order

    def kill_at_step_6(count, batch, seed, step):
        if step == 6:
            raise KeyboardInterrupt
        return order(count, batch, seed, step)

    monkeypatch.setattr(data, "order", kill_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", *flags)
    monkeypatch.setattr(data, "order", order)
    run(tmp_path / "broken", *flags)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    rows = [float(row["ssl_loss"]) for row in csv.DictReader(open(tmp_path / "whole/log.csv"))]
    run(tmp_path / "first", *flags[:4], "--max-steps", 1)  # the mean of ten steps against the first
    assert rows[-1] < 0.99 * float(next(csv.DictReader(open(tmp_path / "first/log.csv")))["ssl_loss"])


@pytest.mark.parametrize("method, start", [("mocov3", 0.99), ("slip-byol", 0.996)])
def test_a_step_moves_the_momentum_encoder_by_the_share_of_the_run_that_is_done(method, start):
    small = dict(vocab_size=520, text_depth=1) if "slip" in method else {}
    model = slip.build(slip.configure(method, "vit_tiny", ssl_hidden=32, ssl_out=16, **small))
    model.visual.positions.data += 1.0
    before, m = model.branch.slow_tower.positions.clone(), 1 - (1 - start) / 2  # half way
    train.finish_step(model, 0.5)
    expected = m * before + (1 - m) * model.visual.positions
    torch.testing.assert_close(model.branch.slow_tower.positions, expected, rtol=1e-6, atol=1e-7)  # float32


def test_a_run_moves_the_momentum_encoder_but_for_its_last_step(tmp_path):
    run(tmp_path / "one", "--method", "byol", "--max-steps", 1)  # m is 1 at the end of a run
    run(tmp_path / "two", "--method", "byol", "--max-steps", 2)
    one, two = (weights(tmp_path / name)["branch.slow_tower.positions"] for name in ("one", "two"))
    torch.manual_seed(0)
    assert torch.equal(one, slip.build(slip.configure("byol", "vit_tiny")).branch.slow_tower.positions)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "flags, pair, clip_strong, temperature, codes",
    [
        ("slip", "simclr", None, 0.1, 128),
        ("slip --ssl-temp 0.5 --clip-aug simclr", "simclr", data.augment.SIMCLR, 0.5, 128),
        ("slip-mocov3", "mocov3", None, 0.2, 128),
        ("mocov3 --ssl-temp 0.3", "mocov3", None, 0.3, 128),
        ("slip-byol", "byol", None, None, 128),
        ("slip-beit", "beit", None, None, 512),
    ],
)
def test_flags_reach_the_views_and_the_branch(tmp_path, flags, pair, clip_strong, temperature, codes):
    args = train.arguments().parse_args([*SMALL, "--out", str(tmp_path), "--method", *flags.split()])
    _, model, _, views, _ = train.set_up(args)
    assert views.pair == data.PAIRS[pair] and views.clip_strong == clip_strong
    assert getattr(model.branch, "temperature", None) == temperature and model.config.ssl_out == codes


class Bright(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 8)  # which of three channels is the brightest


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_beit_trains_and_goes_on_with_a_visual_tokenizer_from_a_file(tmp_path, capsys):
    torch.jit.save(torch.jit.script(Bright()), tmp_path / "encoder.pt")
    flags = ["--method", "beit", "--visual-tokenizer", tmp_path / "encoder.pt", "--max-steps", 3]
    run(tmp_path / "run", *flags)
    assert "ssl_loss 1.10 = log 3" in capsys.readouterr().out
    assert weights(tmp_path / "run")["branch.head.weight"].shape == (3, 128)
    run(tmp_path / "run", *flags)
    assert "going on from step 3" in capsys.readouterr().out


def test_two_views_for_the_language_loss_are_the_mean_of_two_losses():
    model = slip.build(slip.configure("clip", "vit_tiny", vocab_size=520, text_depth=1))
    names = ("image_features", "image_features2", "text_features")
    features = {name: torch.randn(8, 128) for name in names}
    first = (
        features["image_features"] @ model.image_projection,
        features["text_features"] @ model.text_projection,
    )
    second = features["image_features2"] @ model.image_projection, first[1]
    expected = sum(train.info_nce(*pair, model.logit_scale.exp())[0] for pair in (first, second)) / 2
    torch.testing.assert_close(train.objective(model, features, 1.0)[0], expected)


def test_a_run_of_two_language_views_over_frozen_patches_leaves_the_patches_alone(tmp_path):
    flags = ["--method", "clip", "--clip-views", 2, "--clip-aug", "simclr", "--freeze-patches"]
    for steps in (1, 3):
        run(tmp_path / str(steps), *flags, "--max-steps", steps)
    a, b = weights(tmp_path / "1"), weights(tmp_path / "3")
    same_names = {name for name in a if torch.equal(a[name], b[name])}
    assert {name for name in a if name.startswith("visual.patch_embed.")} <= same_names
    assert "visual.positions" not in same_names


def test_weights_that_do_not_fit_are_one_sentence_and_exit_2(tmp_path, capsys):
    run(tmp_path, "--max-steps", 1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state["weights"]["branch.head.6.weight"] = torch.zeros(3, 4096)  # of another file by the same name
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--max-steps", 1)
    assert end.value.code == 2 and "branch.head.6.weight has shape [3, 4096]" in capsys.readouterr().err


def test_beits_codebook_is_learned_from_all_pictures_where_few_have_captions(tmp_path):
    flags = [*SMALL, "--out", str(tmp_path), "--method", "slip-beit", "--captions", "64"]
    _, model, _, views, _ = train.set_up(train.arguments().parse_args(flags))
    assert len(train.some_views(views)) == len(views.other) == 608 and len(train.some_views(views, 100)) == 87
    assert model.branch.codebook.any()


def test_self_supervision_may_have_a_set_of_its_own(tmp_path):
    args = train.arguments().parse_args([*SMALL, "--out", str(tmp_path), "--ssl-data", "scenes-kind"])
    _, _, _, views, _ = train.set_up(args)
    assert (views.captioned.name, views.other.name) == ("scenes", "scenes-kind")
    assert len(views.other) == 608  # without the pictures that choose best.pt, should it be the same set
    sample = views[(0, 3), (0, 5)]
    settings = dict(image_size=32, seed=0, light_crop=0.5, strong_crop=0.3, pair=data.PAIRS["simclr"])
    alone = data.Views(views.other, None, language=False, **settings)
    assert torch.equal(
        sample["view1"], alone[(0, 5), (0, 5)]["view1"]
    )  # picture 5 of the other set, beside caption 3


def test_the_page_names_the_set_of_self_supervision(tmp_path, capsys):
    run(tmp_path, "--ssl-data", "scenes-kind", "--max-steps", 1)
    page = capsys.readouterr().out
    assert "scenes: 608 pictures, self-supervision on 608 of scenes-kind; 19 steps" in page


def test_the_log_has_its_columns_and_the_checkpoint_its_arguments(tmp_path):
    run(tmp_path, "--max-steps", 4, "--ssl-scale", 0.5)
    (row,) = csv.DictReader(open(tmp_path / "log.csv"))
    wanted = "epoch step loss clip_loss ssl_loss clip_acc ssl_acc logit_scale lr images_per_s zeroshot_top1"
    assert [name for name in row if name != "grad_norm"] == wanted.split()
    assert float(row["loss"]) == pytest.approx(
        float(row["clip_loss"]) + 0.5 * float(row["ssl_loss"]), rel=1e-3
    )
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    args = saved["run"]["args"]
    assert (args["ssl_scale"], args["ssl_temp"], args["lr"], args["seed"]) == (0.5, 0.1, 1e-3, 0)
    assert saved["tokenizer"] and saved["run"]["versions"]["torch"]


@pytest.mark.parametrize("value, kept", [(7.0, 4.6052), (-0.5, 0.0), (2.0, 2.0)])
def test_the_logit_scale_is_clamped_after_the_step(value, kept):
    model = slip.build(slip.configure("clip", "vit_tiny", vocab_size=520, text_depth=1))
    model.logit_scale.data.fill_(value)
    train.finish_step(model, 0.5)
    assert model.logit_scale.item() == pytest.approx(kept, abs=1e-6)  # float32


def test_a_scale_of_zero_gives_the_head_no_gradient():
    model = slip.build(slip.configure("slip", "vit_tiny", vocab_size=520, text_depth=1)).train()
    features = {n: torch.randn(8, 128, requires_grad=True) for n in
                ("image_features", "text_features", "features1", "features2")}  # fmt: skip
    train.objective(model, features, 0.0)[0].backward()
    assert all(not parameter.grad.any() for parameter in model.branch.parameters())
    assert not features["features1"].grad.any() and features["image_features"].grad.any()


def test_captions_for_some_pictures_leave_self_supervision_on_all(tmp_path):
    args = train.arguments().parse_args([*SMALL, "--out", str(tmp_path), "--captions", "64"])
    _, _, _, views, _ = train.set_up(args)
    assert len(views.captioned) == 64 and len(views.other) == 608


def test_a_torn_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    run(tmp_path, "--max-steps", 8, "--save-every", 3)
    (tmp_path / "checkpoint.pt").write_bytes(b"torn")
    run(tmp_path, "--max-steps", 8, "--save-every", 3)
    heard = capsys.readouterr()
    assert "checkpoint.pt" in heard.err and "going on from checkpoint.previous.pt" in heard.err
    assert "going on from step 6" in heard.out
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["run"]["step"] == 8


def test_a_loss_that_is_not_finite_stops_the_run_and_says_where(tmp_path, capsys):
    assert run(tmp_path, "--max-steps", 40, "--lr", 1e30, "--warmup-epochs", 0) == 1
    message = capsys.readouterr().err
    assert "at step" in message and "learning rate" in message and "no checkpoint was written yet" in message


WRONG = [
    ("--method moco", "invalid choice"),
    ("--data nothere", "unknown --data 'nothere'"),
    ("--data imagenet", "put its training pictures in"),
    ("--data fashionmnist", "zeroshot.py --download"),
    ("--data scenes-nothere", "unknown --data"),
    ("--model resnet50", "unknown model 'resnet50'"),
    ("--batch-size 0", "found --batch-size 0"),
    ("--batch-size 1", "type 2 or more"),
    ("--batch-size 100000", "608 or less"),
    ("--image-size 30", "not a multiple of the patch size 8"),
    ("--patch 7", "not a multiple of the patch size 7"),
    ("--epochs 0", "more than 0"),
    ("--max-steps -3", "more than 0"),
    ("--micro-batch 0", "more than 0"),
    ("--lr -1", "more than 0"),
    ("--light-crop 2", "expected a share"),
    ("--captions 100000", "608 pictures to train on"),
    ("--vocab nothere.gz", "nothere.gz"),
    ("--device tpu", "unknown --device"),
    ("--ssl-scale -1", "cannot be negative"),
    ("--epochs many", "invalid int value"),
    ("--seed -1", "cannot be negative"),
    ("--visual-tokenizer encoder.pt", "type --method slip-beit, not slip"),
    ("--method clip --ssl-scale 2", "type --method slip, not clip"),
    ("--method beit --visual-tokenizer nothere.pt", "no file at nothere.pt"),
    ("--method clip --ssl-data scenes", "type --method slip, not clip"),
    ("--method simclr --clip-views 2", "simclr has none"),
    ("--ssl-data nothere", "unknown --data 'nothere'"),
    ("--ssl-temp 0", "found --ssl-temp 0.0, expected more than 0"),
    ("--method byol --ssl-temp 0.5", "byol has no such temperature"),
    ("--method beit --image-size 8", "BEiT hides patches, found one"),
]


@pytest.mark.parametrize("flags, sentence", WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_command_line_is_one_sentence_and_exit_2(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out", "--root", tmp_path / "root", *flags.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and sentence in message and "Traceback" not in message
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_another_run_in_the_folder_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, "--max-steps", 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit):
        run(tmp_path, "--max-steps", 2, "--lr", 5e-3)
    assert "--lr was 0.001 and is 0.005" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_out_that_is_a_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as end:
        run(tmp_path / "out")
    assert end.value.code == 2 and "is a file" in capsys.readouterr().err


@pytest.mark.slow
def test_ten_kills_at_random_moments_end_in_the_same_weights(tmp_path):
    """SIGKILL, resumed by the same line each time; the final weights are those of an unbroken run, bit for
    bit.
    """
    flags = [*SMALL, "--max-steps", "500", "--save-every", "5"]
    command = [sys.executable, "train.py", *flags, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    dice, kills = random.Random(0), 0
    while kills < 10:
        process = subprocess.Popen([*command, str(tmp_path / "broken")], stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=dice.uniform(5, 9))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run([*command, str(tmp_path / "broken")], check=True, stdout=subprocess.DEVNULL)
    assert kills == 10 and same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def distributed(processes, port, out, *flags):
    """Start train.py on so many gloo processes, as torchrun would."""
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *SMALL, "--out", str(out), *map(str, flags)]
    return [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.mark.slow
def test_the_losses_of_twenty_steps_do_not_depend_on_the_ranks_and_a_run_goes_on_with_others(tmp_path):
    """1, 2 and 4 processes; and 10 steps on two processes, the other 10 on one."""

    def go(processes, out, *flags):
        started = distributed(processes, 29700 + processes, tmp_path / out, *flags, "--max-steps", 20)
        assert [process.wait(timeout=300) for process in started] == [0] * processes

    for processes in (1, 2, 4):
        go(processes, str(processes))
    halfway = distributed(2, 29708, tmp_path / "moved", "--max-steps", 20, "--save-every", 5)
    while not (tmp_path / "moved/checkpoint.pt").exists():
        time.sleep(0.05)
    for process in halfway:
        process.kill()
    assert torch.load(tmp_path / "moved/checkpoint.pt", weights_only=True)["run"]["step"] < 20
    go(1, "moved")
    one = weights(tmp_path / "1")
    for other in ("2", "4", "moved"):
        rows = [list(csv.DictReader(open(tmp_path / run / "log.csv"))) for run in ("1", other)]
        for a, b in zip(*rows, strict=True):
            for name in ("clip_loss", "ssl_loss"):
                assert float(a[name]) == pytest.approx(
                    float(b[name]), rel=1e-4
                )  # fp32, sums in another order
        assert farthest(one, weights(tmp_path / other)) < 1e-4


@pytest.mark.slow
def test_memory_grows_with_the_pictures_not_with_the_activations(tmp_path):
    """Peak memory of a step at batch 1024 against 64, both in chunks of 16, 96-pixel views (145 tokens).

    What is used counts, not what glibc keeps: told to give back blocks over 64 KB (without that, 2.4 times).
    """
    flags = "--image-size 96 --max-steps 1 --micro-batch 16 --overfit".split()
    script = (
        "import sys, resource, train, zeroshot, data, scenes;"
        "train.Evaluation.__call__ = lambda self: ({}, None); train.report = lambda *a: None;"
        "code = train.main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {}
    for batch in (64, 1024):
        command = [sys.executable, "-c", script, *SMALL, "--out", str(tmp_path / str(batch)), *flags]
        run = subprocess.run(
            [*command, "--batch-size", str(batch)], env=env, capture_output=True, text=True, check=True
        )
        code, peaks[batch] = map(int, run.stdout.splitlines()[-1].split())
        assert code == 0
    pictures = 1024 * 3 * 3 * 96 * 96 / 1024  # KiB: three uint8 views
    assert peaks[1024] - pictures <= 1.25 * peaks[64], peaks


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_within_a_minute(tmp_path):
    ranks = distributed(2, 29871, tmp_path, "--max-steps", 2000)
    time.sleep(25)
    ranks[1].kill()
    _, message = ranks[0].communicate(timeout=60)
    assert "a rank is gone" in message and "Traceback" not in message and ranks[0].returncode == 1, message


@pytest.mark.slow
def test_a_dead_worker_is_an_error_and_not_a_hang(tmp_path):
    command = [sys.executable, "train.py", *SMALL, "--max-steps", "5000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        [*command, "--workers", "2"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    time.sleep(20)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1 and "a data worker died" in message and "Traceback" not in message


@pytest.mark.slow
def test_a_compiled_tower_trains_alike(tmp_path):
    for name, flags in [("plain", []), ("compiled", ["--compile"])]:
        run(tmp_path / name, "--max-steps", 5, *flags)
    assert (
        farthest(weights(tmp_path / "plain"), weights(tmp_path / "compiled")) < 1e-3
    )  # fused kernels round alike
