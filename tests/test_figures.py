"""Figures of untrained runs: what is drawn, the numbers behind it beside naive versions, what is refused.

pytest tests/test_figures.py            # and: pytest -m slow tests/test_figures.py
"""

import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import console
import data
import figures
import scenes
import sets
import slip
import tables
from text import Tokenizer

matplotlib = pytest.importorskip("matplotlib")
ARGS = dict(
    model="vit_tiny", data="scenes", root="data", seed=0, batch_size=64, clip_views=1, clip_aug="light"
)
ARGS |= dict(light_crop=0.5, strong_crop=0.3, ssl_data=None, class_names=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of eight steps without an epoch: "slip", "simclr" and "slip-beit"; of few built-in images."""
    small = {split: scenes.build(split, count) for split, count in {"train": 480, "test": 120}.items()}
    tokenizer, where = Tokenizer.train(small["train"]["captions"], 600), tmp_path_factory.mktemp("runs")
    for method in ("slip", "simclr", "slip-beit"):
        torch.manual_seed(0)
        model = slip.build(slip.configure(method, "vit_tiny", vocab_size=tokenizer.vocab_size))
        model.tokenizer = tokenizer if model.text is not None else None
        (where / method).mkdir()
        run = dict(
            args=ARGS | {"method": method}, step=8, rows=[], points=[(i, 8.0 - i / 8) for i in range(8)]
        )
        slip.save(str(where / method / "checkpoint.pt"), model, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "drawn", small.get)
        yield where


def refused(capsys, *words):
    """The one sentence that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        figures.main([str(word) for word in words])
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.count("\n") == 1
    return message


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_one_command_draws_every_figure_in_small_files(folder):
    assert figures.main([str(folder / "slip")]) == 0
    for name in figures.FIGURES:
        path = folder / "slip/figures" / f"{name}.png"
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert path.stat().st_size < 300_000 and pixels.std() > 10  # something is on it
        edges = [pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
        assert all((edge > 250).all() for edge in edges)  # white all around: no text is cut off
    assert {path.stem for path in (folder / "slip/figures").iterdir()} == figures.FIGURES.keys()


def test_without_language_what_needs_captions_is_left_out(folder, capsys):
    for name in ("similarity", "predictions"):
        assert "no language" in refused(capsys, folder / "simclr", "--only", name)


def test_curves_overlay_the_points_of_several_runs_into_one_file(folder, tmp_path, capsys):
    out = tmp_path / "both.png"
    words = [folder / "slip", folder / "simclr/checkpoint.pt", "--only", "curves", "--out", out]
    assert figures.main([str(word) for word in words]) == 0 and out.exists()
    runs = [figures.Run(str(folder / name)) for name in ("slip", "simclr")]
    figure = figures.curves(*runs)
    assert [line.get_xdata().tolist() for line in figure.axes[0].lines] == [list(range(8))] * 2
    assert {"slip", "simclr", "loss at each step"} <= set(texts(figure))
    assert "choose the figure" in refused(capsys, folder / "slip", "--out", "all.png")


def test_chance_is_drawn_below_the_title_at_its_closed_form(folder):
    run = figures.Run(str(folder / "slip"))
    row = dict(step=8, clip_loss=4.0, ssl_loss=5.0, zeroshot_scenes=20.0, val_r1="")
    run.record = run.record | {"rows": [row]}
    figure = figures.curves(run)
    drawn = {axis.get_title(): axis for axis in figure.axes}
    expected = {"clip_loss, nats": math.log(64), "ssl_loss": math.log(127), "zeroshot scenes, %": 100 / 12}
    for title, value in expected.items():
        low, high = drawn[title].get_ylim()
        assert value == pytest.approx(drawn[title].lines[-1].get_ydata()[0]) and value < 0.9 * high
    assert "val r1, %" not in drawn  # an empty column


def test_similarity_counts_the_right_pairs(folder):
    run = figures.Run(str(folder / "slip"))
    captions, images = figures.held_out(run)
    with torch.no_grad():
        pairs = [
            (run.model.encode_text(text), run.model.encode_image(image[None]))
            for text in captions
            for image in images
        ]
    cosines = (
        torch.stack([torch.cosine_similarity(*pair)[0] for pair in pairs]).view(len(captions), -1).tolist()
    )
    found = texts(figures.similarity(run))
    assert [word for word in found if re.fullmatch(r"-?\d\.\d\d", word)] == [
        f"{c:.2f}" for row in cosines for c in row
    ]
    right = sum(row.index(max(row)) == i for i, row in enumerate(cosines))
    assert any(f"{right} captions find their" in word.replace("\n", " ") for word in found)
    held = data.holdout(480, 0)[1]
    assert set(captions) <= {sets.open_source("scenes", "data", "train").label(i) for i in held}


def test_predictions_name_the_class_of_the_largest_cosine(folder):
    run = figures.Run(str(folder / "slip"))
    test = run.open("test")
    index = run.order(len(test))[0]
    with torch.no_grad():
        image = run.model.encode_image(test[index][0])
        names = [
            [template.replace("{}", name) for template in sets.prompts("scenes")] for name in test.classes
        ]
        weights = [
            torch.nn.functional.normalize(run.model.encode_text(group), dim=1).mean(0) for group in names
        ]
    best = test.classes[int(torch.cosine_similarity(image, torch.stack(weights)).argmax())]
    assert figures.predictions(run).axes[0].get_title().replace("\n", " ").startswith(best)


def test_views_are_those_of_training_and_hidden_patches_are_grey(folder):
    run = figures.Run(str(folder / "slip-beit"))
    shown, captions = figures.training_views(run, run.part(0), [(0, 3), (1, 3)])
    assert list(shown) == ["images", "view1"] and len(captions) == 2
    squares = augment.denormalise(shown["view1"]).unfold(2, 8, 8).unfold(3, 8, 8)  # [2, 3, 4, 4, 8, 8]
    mean = torch.tensor(augment.MEAN).view(1, 3, 1, 1, 1, 1)
    assert ((squares - mean).abs().amax((1, 4, 5)) < 1e-6).sum() >= 2 * 4  # of 16 patches about 0.4


@pytest.mark.parametrize("name", ["main", "told"])
def test_a_table_is_drawn_from_its_results(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "type python tables.py" in refused(capsys, "--table", name)
    for place, row in enumerate(tables.TABLES[name]):
        for seed in (0, 1):
            out = tables.plan("scenes", row, seed)[0]
            os.makedirs(out)
            values = {"zeroshot": {"scenes": {"top1": 10.0 * place + seed}}}
            Path(out, "results.json").write_text(json.dumps({"checkpoint.pt": values}))
    assert figures.main(["--table", name]) == 0 and Path("runs/tables", f"{name}.png").exists()
    figure = figures.table(name, "scenes")
    if name == "told":
        assert figure.axes[0].lines[0].get_xdata().tolist() == [10, 20, 30, 50, 75]
    else:
        assert [bar.get_width() for bar in figure.axes[0].patches] == [10.0 * k + 0.5 for k in range(5)]


def test_wrong_input_is_one_sentence(tmp_path, capsys, checkpoint):
    assert "no checkpoint" in refused(capsys, tmp_path / "none")
    assert "one of them" in refused(capsys)
    run = figures.Run(checkpoint)
    with pytest.raises(console.Stop, match="no step"):
        figures.curves(run)


def test_the_schematic_is_well_formed():
    path = Path(__file__).parents[1] / "figures/schematic.svg"
    words = " ".join(ElementTree.parse(path).getroot().itertext())
    assert "clip_loss" in words and "ssl_loss" in words
