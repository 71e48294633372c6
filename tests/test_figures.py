"""Figures of untrained runs: what is drawn, the numbers behind it beside naive versions, what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import scenes
import sets
import slip
import tables
from text import Tokenizer

matplotlib = pytest.importorskip("matplotlib")
figures = pytest.importorskip("figures")
VIEWS = dict(seed=0, light_crop=0.5, strong_crop=0.3, clip_views=1, clip_aug="light")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of eight steps without an epoch: "slip" and "simclr"; of few built-in images."""
    where = tmp_path_factory.mktemp("runs")
    tokenizer = Tokenizer.train(scenes.build("train", 480)["captions"], 600)
    for method in ("slip", "simclr"):
        torch.manual_seed(0)
        model = slip.build(slip.configure(method, "vit_tiny", vocab_size=tokenizer.vocab_size))
        model.tokenizer = tokenizer if model.text is not None else None
        (where / method).mkdir()
        args = VIEWS | dict(method=method, data="scenes", root="data")
        run = dict(args=args, rows=[], points=[(i, 8.0 - i / 8) for i in range(8)])
        slip.save(str(where / method / "checkpoint.pt"), model, run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sets, "SCENES_COUNT", {"train": 480, "test": 120})
        yield where


def test_one_command_draws_every_figure(folder):
    figures.main([str(folder / "slip")])
    for name in figures.FIGURES:
        pixels = np.asarray(Image.open(folder / f"slip/figures/{name}.png").convert("RGB")).astype(int)
        assert pixels.std() > 10  # something is on it
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges > 250).all()  # white all around: no text is cut off


def test_without_language_what_needs_captions_is_left_out(folder, refused):
    figures.main([str(folder / "simclr")])
    assert set(os.listdir(folder / "simclr/figures")) == {"views.png", "curves.png"}
    assert "without captions" in refused(figures.main, [f"{folder}/simclr", "--only", "similarity"])


def test_curves_overlay_the_points_of_several_runs_beside_chance(folder, tmp_path):
    out = tmp_path / "both.png"
    paths = [str(folder / "slip"), str(folder / "simclr/checkpoint.pt")]
    figures.main([*paths, "--only", "curves", "--out", str(out)])
    runs = [figures.Run(str(folder / name)) for name in ("slip", "simclr")]
    runs[0].record["rows"] = [dict(step=8, clip_loss=4.0, zeroshot_scenes=20.0, val_r1="")]
    panels = {axis.get_title(): axis for axis in figures.curves(*runs).axes}
    assert out.exists() and list(panels) == ["loss", "clip_loss", "zeroshot_scenes"]
    assert [line.get_xdata().tolist() for line in panels["loss"].lines] == [list(range(8))] * 2
    assert panels["zeroshot_scenes"].lines[-1].get_ydata()[0] == pytest.approx(100 / 12)


def test_similarity_shows_the_cosines_of_held_out_pairs(folder):
    run, source = figures.Run(str(folder / "slip")), sets.open_source("scenes", "data", "train")
    chosen = list(data.holdout(source, 0)[1])[:8]
    embeds = [(run.model.encode_text(text), run.model.encode_image(image)) for image, text in chosen]
    cosines = [[torch.cosine_similarity(text, image).item() for _, image in embeds] for text, _ in embeds]
    right = sum(row.index(max(row)) == i for i, row in enumerate(cosines))
    found = [text.get_text() for text in figures.similarity(run).findobj(matplotlib.text.Text)]
    assert {f"{cosine:.2f}" for row in cosines for cosine in row} <= set(found)
    assert f"Cosines of held-out pairs: {right} of 8 captions find their image" in found


def test_a_table_is_drawn_from_its_results(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "type python tables.py" in refused(figures.main, ["--table", "main"])
    assert "no checkpoint" in refused(figures.main, ["none"])
    for place, row in (*enumerate(tables.TABLES["main"]), *enumerate(tables.TABLES["told"])):
        for seed in (0, 1):
            out = tables.plan("scenes", row, seed, "--wd 1")[0]
            os.makedirs(out)
            tasks = {"checkpoint.pt": {"zeroshot": {"scenes": {"top1": 10.0 * place + seed}}}}
            Path(out, "results.json").write_text(json.dumps(tasks))
    figures.main(["--table", "main", "--with", "--wd 1"])
    axis = figures.table("main", "scenes", "--wd 1").axes[0]
    assert [bar.get_width() for bar in axis.patches] == [10.0 * k + 0.5 for k in range(5)]
    # Rows that differ by a number are the points of a curve.
    axis = figures.table("told", "scenes", "--wd 1").axes[0]
    assert axis.get_xlabel() == "% named" and axis.get_legend_handles_labels()[1] == ["SLIP", "CLIP"]
    assert axis.lines[0].get_xydata().tolist() == [[10, 10.5], [20, 30.5], [30, 50.5], [50, 70.5], [75, 90.5]]
