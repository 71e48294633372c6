"""The figures of tiny runs, the numbers behind them against naive versions, what is refused, the schematic.

pytest tests/test_figures.py

The numbers: attention against a loop that also makes the block's output, cosines and likeliest classes one at
a time, chance against the losses themselves, the plane against a covariance's eigenvectors. Where matplotlib
is not installed, the tests that draw are skipped.
"""

import importlib.util
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import figures
import scenes
import sets
import slip
import tasks
import train
from losses import info_nce, nt_xent
from text import Tokenizer
from vit import ViT

draws = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")
FLAGS = "--max-steps 2 --batch-size 32 --device cpu --workers 0".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    small = {split: scenes.build(split, count) for split, count in {"train": 480, "test": 120}.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "drawn", small.get)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with runs of two steps: "slip", "simclr", "slip-beit"."""
    folder = tmp_path_factory.mktemp("runs")
    for method in ("slip", "simclr", "slip-beit"):
        assert train.main([*FLAGS, "--method", method, "--out", str(folder / method)]) == 0
    return folder


@pytest.fixture
def copy(runs, tmp_path):
    """A run folder of slip that a test may spoil."""
    return Path(shutil.copytree(runs / "slip", tmp_path / "copy", ignore=shutil.ignore_patterns("figures")))


def refused(capsys, *words):
    """The one sentence that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        figures.main([str(word) for word in words])
    message = capsys.readouterr().err.split("error: ")[1]
    assert end.value.code == 2 and message.count("\n") == 1
    return message


# The files


@draws
def test_one_command_draws_every_figure_and_again_the_same(runs, capsys):
    assert figures.main([str(runs / "slip"), str(runs / "simclr")]) == 0
    told = capsys.readouterr().out
    drawn = {path.stem: path.read_bytes() for path in (runs / "slip/figures").iterdir()}
    assert drawn.keys() == set(figures.FIGURES)  # and nothing temporary
    figures.main([str(runs / "slip"), "--only", "views", "map"])
    for name in ("views", "map"):
        assert (runs / "slip/figures" / f"{name}.png").read_bytes() == drawn[name]
    for name in drawn:
        path = runs / "slip/figures" / f"{name}.png"
        picture = Image.open(path)
        assert str(path) in told and path.stat().st_size <= figures.LIMIT
        assert picture.format == "PNG" and 300 < min(picture.size) <= max(picture.size) < 2000
        pixels = np.asarray(picture.convert("RGB")).astype(int)
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge > 250).all() for edge in edges)  # white all around: no text is cut off
        assert pixels.std() > 10  # something is on it


@draws
def test_a_run_without_captions_leaves_out_what_needs_them(runs, capsys):
    assert figures.main([str(runs / "simclr")]) == 0
    told = capsys.readouterr().out
    drawn = {path.stem for path in (runs / "simclr/figures").iterdir()}
    assert drawn == {"views", "curves", "attention", "map"}
    for name in set(figures.FIGURES) - drawn:
        assert f"no {name}: a simclr model is trained without captions" in told
    assert "no tokens: a simclr model" in refused(capsys, runs / "simclr", "--only", "tokens")


@draws
def test_a_picture_of_ones_own_is_drawn_beside_the_others(copy, tmp_path):
    augment.drawn_picture().save(tmp_path / "my boat.jpg")
    assert figures.main([str(copy), "--image", str(tmp_path / "my boat.jpg")]) == 0
    drawn = {path.name for path in (copy / "figures").iterdir()}
    assert drawn == {"views-my boat.png", "attention-my boat.png"}


@draws
def test_a_figure_that_is_too_large_is_drawn_coarser(tmp_path, monkeypatch):
    figure, noise = figures.sheet(1, 1, ""), np.random.default_rng(0)
    figures.show(figure.subplots(), noise.integers(0, 256, (100, 100, 3), dtype=np.uint8))
    figures.save(figure, tmp_path / "noise.png")
    free = (tmp_path / "noise.png").stat().st_size
    monkeypatch.setattr(figures, "LIMIT", free // 5)
    figures.save(figure, tmp_path / "noise.png")
    assert free // 20 < (tmp_path / "noise.png").stat().st_size <= free // 5


def test_training_ends_with_the_lines_to_go_on_with(tmp_path, capsys):
    """A model without language is not sent to zeroshot.py, which would refuse it."""
    for method, command, other in [
        ("clip", "zeroshot.py", "linear.py"),
        ("simclr", "linear.py", "zeroshot.py"),
    ]:
        out = tmp_path / method
        train.main([*FLAGS, "--max-steps", "1", "--method", method, "--out", str(out)])
        told = capsys.readouterr().out
        assert f"python {command} --checkpoint {out}/checkpoint.pt --data scenes" in told
        assert other not in told and told.endswith(f"python figures.py {out}\n")


# The numbers


def test_attention_is_a_distribution_that_makes_the_output_of_the_block():
    torch.manual_seed(0)
    vit = ViT(image_size=16, patch=8, width=24, depth=2, heads=3).double().eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    weights, layer, seen = figures.attention_weights(vit, images), vit.blocks[-1].attention, []
    with layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))):
        vit(images)
    ((x, output),) = seen
    q, k, v = layer.qkv(x).split(24, dim=-1)  # [2, 5, 24] each; a head has 8 columns
    naive = torch.zeros(2, 3, 5, 5, dtype=torch.float64)
    for b, head, i in np.ndindex(2, 3, 5):
        columns = slice(8 * head, 8 * head + 8)
        scores = torch.stack([q[b, i, columns] @ k[b, j, columns] / 8**0.5 for j in range(5)])
        naive[b, head, i] = scores.exp() / scores.exp().sum()
    exact = dict(rtol=1e-12, atol=1e-14)  # float64
    torch.testing.assert_close(weights, naive, **exact)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64), **exact)
    mixed = torch.cat([weights[:, h] @ v[..., 8 * h : 8 * h + 8] for h in range(3)], dim=-1)  # [2, 5, 24]
    torch.testing.assert_close(layer.out(mixed), output, rtol=1e-10, atol=1e-12)
    assert not layer._forward_pre_hooks  # the tower is left as it was


def test_the_plane_is_centred_and_holds_most_of_what_the_means_differ_by():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 20 + [0, 1, 2, 3] * 10)  # a class counts once, however large it is
    x = 3 * torch.randn(4, 7, generator=generator, dtype=torch.float64)[labels] + 5
    x += torch.randn(60, 7, generator=generator, dtype=torch.float64)
    centre, axes = figures.plane(x, labels)
    means = torch.stack([x[labels == k].mean(0) for k in range(4)])
    points = (means - centre) @ axes
    zero = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(points.mean(0), zero, rtol=0, atol=1e-12)
    torch.testing.assert_close(axes.T @ axes, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    largest = torch.linalg.eigvalsh((means - means.mean(0)).T @ (means - means.mean(0))).flip(0)[:2]
    torch.testing.assert_close(points.square().sum(0), largest, rtol=1e-10, atol=0)


def test_the_matrix_holds_the_cosine_of_each_caption_and_picture(runs):
    run = figures.Run([runs / "slip"])
    captions, images = figures.held_out(run)
    matrix = figures.cosines(run.model, captions, images, CPU)
    assert matrix.shape == (8, 8) and len(set(captions)) == 8
    with torch.no_grad():
        for row, column in [(0, 0), (3, 7), (6, 2)]:
            text = run.model.encode_text(run.model.tokenizer(captions[row]))[0].double()
            image = run.model.encode_image(images[column : column + 1])[0].double()
            cosine = text @ image / (text @ text).sqrt() / (image @ image).sqrt()
            assert matrix[row, column] == pytest.approx(cosine.item(), abs=1e-5)  # float32


@pytest.mark.parametrize("method", ["slip", "simclr", "slip-beit"])
def test_views_are_those_of_training_and_what_is_hidden_from_the_tower_is_grey(runs, method):
    args = train.arguments().parse_args([*FLAGS, "--method", method, "--out", str(runs / method)])
    _, _, _, views, held = train.set_up(args)
    run = figures.Run([runs / method])
    assert [len(part) for part in run.train] == [456, 24]  # 5% of 480 are held out
    assert [run.train[1].label(i) for i in range(24)] == [held.label(i) for i in range(24)]
    shown, captions = figures.training_views(run, run.train[0], [(4, 17), (0, 3)])
    batch = data.collate([views[(4, 17), (4, 17)], views[(0, 3), (0, 3)]])
    assert captions == batch.pop("caption", []) and not batch.pop("skipped")
    trained = data.device_views(batch)
    if method == "slip-beit":
        hidden = trained.pop("view1_mask")  # [2, 16], of 8 x 8 pixels
        assert hidden.any(1).all()
        for row, patch in hidden.nonzero().tolist():
            top, left = 8 * (patch // 4), 8 * (patch % 4)
            trained["view1"][row, :, top : top + 8, left : left + 8] = 0
    assert shown.keys() == trained.keys()
    assert all(torch.equal(shown[name], trained[name]) for name in trained)


def test_the_pairs_of_the_matrix_are_held_out(runs):
    run = figures.Run([runs / "slip"])
    labels = {run.train[1].label(i) for i in range(24)}
    assert set(figures.held_out(run)[0]) <= labels


def test_the_likeliest_classes_are_those_of_one_picture_at_a_time(runs):
    run = figures.Run([runs / "slip"])
    chosen, model = data.part(run.test, [5, 80, 33]), run.model
    values, classes, labels = figures.likeliest(run, chosen, 3)
    assert labels == [run.test.label(i) for i in (5, 80, 33)]
    with torch.no_grad():
        for i in range(3):
            image = model.encode_image(augment.normalise(augment.evaluation_view(chosen[i][0], 32)[None]))[0]
            logits = []
            for name in run.test.classes:
                texts = [prompt.format(name) for prompt in tasks.prompts("scenes")]
                embeds = [model.encode_text(model.tokenizer(text))[0] for text in texts]
                mean = sum(embed / embed.norm() for embed in embeds)
                logits.append(model.logit_scale.exp() * image @ mean / image.norm() / mean.norm())
            naive = torch.stack(logits).softmax(0).sort(descending=True)
            assert classes[i] == naive.indices[:3].tolist()
            assert values[i] == pytest.approx(naive.values[:3].tolist(), abs=1e-5)  # float32


def test_chance_is_the_loss_of_equal_embeddings(runs):
    run, equal = figures.Run([runs / "slip", runs / "simclr"]), torch.ones(32, 8)
    clip_loss, ssl_loss = info_nce(equal, equal, 10)[0].item(), nt_xent(equal, equal)[0].item()
    assert figures.chances(run, "clip_loss") == pytest.approx([clip_loss], rel=1e-6)  # float32
    assert figures.chances(run, "ssl_loss") == pytest.approx([ssl_loss], rel=1e-6)  # once for both runs
    assert figures.chances(run, "zeroshot_top1") == [100 / 12]
    assert figures.chances(figures.Run([runs / "simclr"]), "clip_loss") == []
    run.logs["beit"] = (run.args | {"method": "beit"}, [])  # another partner's loss: chance unknown
    assert figures.chances(run, "ssl_loss") == pytest.approx([ssl_loss], rel=1e-6)
    run.logs["other"] = (run.args | {"data": "cifar10", "batch_size": 2}, [])  # another set: chance unknown
    assert figures.chances(run, "zeroshot_top1") == [100 / 12] and len(figures.chances(run, "clip_loss")) == 2


def test_a_caption_is_cut_into_pieces_that_make_it_up():
    tokenizer = Tokenizer.train(["a red boat", "a red cup"] * 3, 530)
    found = figures.cut(tokenizer, "A red é", 77)
    assert [token for token, _, _ in found] == tokenizer("A red é")[0].tolist()
    assert [piece for _, piece, _ in found] == ["start", "a", "red", r"\xc3", r"\xa9", "end"]
    assert [word for _, _, word in found] == [None, 0, 1, 2, 2, None]
    assert len(figures.cut(tokenizer, "a red boat " * 40, 20)) == 20


# What is refused, in one sentence


@draws
def test_what_is_no_run_folder_is_refused(runs, copy, tmp_path, capsys):
    assert "no run folder at" in refused(capsys, tmp_path / "nothere")
    assert "no checkpoint at" in refused(capsys, tmp_path)
    assert "no run folder at" in refused(capsys, runs / "slip", tmp_path / "nothere", "--only", "curves")
    slip.save(copy / "checkpoint.pt", slip.build(slip.configure("simclr", "vit_tiny")))
    assert "does not say how it was trained" in refused(capsys, copy)
    (copy / "checkpoint.pt").write_bytes(b"torn")
    assert "cannot be read as a checkpoint" in refused(capsys, copy)


@draws
def test_a_run_in_its_first_epoch_has_no_curves(copy, capsys):
    (copy / "log.csv").unlink()
    assert "no curves: copy has no log.csv" in refused(capsys, copy, "--only", "curves")


@draws
def test_a_set_that_is_not_here_costs_its_figures_only(copy, capsys, monkeypatch):
    monkeypatch.setattr(sets, "open_source", lambda name, root, split: open_nothing(name, root))
    assert figures.main([str(copy), "--root", "elsewhere"]) == 0
    told = capsys.readouterr().out
    assert "no views: no scenes under elsewhere" in told and "no map: no scenes under elsewhere" in told
    assert [path.name for path in (copy / "figures").iterdir()] == ["curves.png"]


def open_nothing(name, root):
    raise FileNotFoundError(f"no {name} under {root}")


@draws
def test_captions_without_classes_have_no_map(runs):
    run = figures.Run([runs / "slip"])
    run.test = data.Source("pairs", run.test.items)
    with pytest.raises(figures.Without, match="pairs has captions, no classes"):
        figures.map_(run)
    assert len(figures.attention(run).axes) == 17  # eight pictures, their attention, the scale


@draws
def test_a_wrong_flag_is_refused(runs, tmp_path, capsys):
    assert "invalid choice: 'atention'" in refused(capsys, runs / "slip", "--only", "atention")
    assert "cannot read the picture" in refused(capsys, runs / "slip", "--image", tmp_path / "nothere.png")
    words = [runs / "slip", "--image", "boat.png", "--only", "map"]
    assert "--image is for views and attention" in refused(capsys, *words)


def test_without_matplotlib_one_sentence_says_what_to_install(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import then fails as if it were not installed
    assert refused(capsys, runs / "slip").endswith("not installed: pip install matplotlib\n")


# The pictures in the repository

PICTURES = Path(__file__).parents[1] / "figures"


def test_the_schematic_says_what_the_code_says():
    source = (PICTURES / "schematic.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(source)
    tags = [node.tag.split("}")[1] for node in root.iter()]
    assert len(source.encode()) < 15_000 and "prefers-color-scheme: dark" in source
    assert tags[1:3] == ["title", "desc"]  # for screen readers
    assert not {"script", "image", "foreignObject"} & set(tags)  # it fetches and runs nothing
    seen = " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text"))
    assert "loss = clip_loss + ssl_scale * ssl_loss" in seen
    files = set(re.findall(r"\w+\.py", seen))
    assert files == {"augment.py", "vit.py", "text.py", "slip.py", "selfsup.py", "losses.py", "train.py"}
    code = "".join((PICTURES.parent / name).read_text(encoding="utf-8") for name in files)
    words = "image_features text_features features1 features2 image_embed text_embed z1 z2 head W_i W_t"
    for word in [*words.split(), "InfoNCE", "NT-Xent", "light crop", "strong view"]:
        assert word in seen and word in code, word


def test_the_pictures_are_small():
    pictures = sorted(PICTURES.glob("*.png"))
    assert len(pictures) == 4 and all(path.stat().st_size <= figures.LIMIT for path in pictures)
