"""Measuring: metrics against scores counted by hand and naive ones in float64; a function over a set, its
live line and a bad picture; the rows of results.csv.

    pytest tests/test_measure.py
"""

import csv
import functools

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import loop
import measure

CPU = torch.device("cpu")


def test_metrics_are_those_counted_by_hand():
    """Class 0 three times: ranks 1, 2 and 6; class 1 once: rank 1; class 5 never."""
    scores = torch.tensor(
        [
            [6.0, 5, 4, 3, 2, 1],
            [5.0, 6, 4, 3, 2, 1],
            [1.0, 6, 5, 4, 3, 2],
            [1.0, 6, 5, 4, 3, 2],
        ]
    )
    result = measure.metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert result["top1"] == 50 and result["top5"] == 75
    assert result["per_class"] == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_fewer_than_five_classes_have_a_top_5_of_all():
    result = measure.metrics(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([0, 1]))
    assert (result["top1"], result["top5"], result["per_class"]) == (50, 100, 50)


def uneven(rows=400, classes=7):
    """Random scores that favour the right class, and labels of which few are 5 and none is 6."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(rows, generator=generator) ** 2 * (classes - 1)).long()
    return torch.randn(rows, classes, generator=generator) + 2 * F.one_hot(labels, classes), labels


def naive(scores, labels):
    scores, labels = scores.double().tolist(), labels.tolist()
    places = [sum(other > row[label] for other in row) for row, label in zip(scores, labels)]
    top1, top5 = (100 * sum(place < k for place in places) / len(places) for k in (1, 5))
    means = []
    for label in set(labels):
        hits = [place == 0 for place, own in zip(places, labels) if own == label]
        means.append(sum(hits) / len(hits))
    per_class = 100 * sum(means) / len(means)
    return {"top1": top1, "top5": top5, "top1_top5": (top1 + top5) / 2, "per_class": per_class}


def test_metrics_equal_naive_ones():
    result = measure.metrics(*uneven())
    assert result == pytest.approx(naive(*uneven()), rel=1e-6)  # means in float32
    assert len(set(result.values())) == 4 and all(10 < value < 99 for value in result.values())


def naive_auc(values, positive):
    """Pair by pair: a positive above a negative counts 1, beside it a half."""
    up = [v for v, p in zip(values.tolist(), positive.tolist()) if p]
    down = [v for v, p in zip(values.tolist(), positive.tolist()) if not p]
    return sum((a > b) + (a == b) / 2 for a in up for b in down) / (len(up) * len(down))


@pytest.mark.parametrize("decimals", [0, 1, 6])
def test_auc_equals_a_count_of_all_pairs_ties_too(decimals):
    generator = torch.Generator().manual_seed(decimals)
    positive = torch.rand(300, generator=generator) < 0.3
    values = (torch.randn(300, generator=generator) + positive).round(decimals=decimals)
    assert (len(values.unique()) < 20) == (decimals == 0)
    assert measure.auc(values, positive) == pytest.approx(naive_auc(values, positive), rel=1e-14)  # float64


def test_auc_is_of_the_difference_of_the_two_scores():
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[5.0, 4.0], [0.0, -2.0], [9.0, 9.5], [-3.0, -3.4]])  # differences -1, -2, 0.5, -0.4
    found = [measure.metrics(scores, labels)["auc"] for scores in (apart, apart.flip(1), torch.ones(4, 2))]
    assert found == [100, 0, 50]
    assert "auc" not in measure.metrics(torch.ones(4, 3), labels)


@pytest.mark.parametrize("metric", measure.METRICS)
def test_chance_is_what_random_scores_get(metric):
    classes = 2 if metric == "auc" else 8
    labels = torch.arange(40_000) % classes
    scores = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(0))
    value = measure.metrics(scores, labels)[metric]
    assert value == pytest.approx(measure.chance(metric, classes), abs=1)  # four deviations of 0.25


# Over a set


class Plain(data.Dataset):
    def __init__(self, bad=None):
        self.bad = bad

    def __len__(self):
        return 5

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("cut short")
        return Image.new("RGB", (9, 9), (50 * index, 0, 0)), index


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_is_applied_to_every_picture_with_a_live_line(monkeypatch, capsys, workers):
    monkeypatch.setattr(loop, "Live", functools.partial(loop.Live, seconds=0))
    source, red = data.Source("plain", Plain()), lambda images: images[:, :1].mean((2, 3))
    results, labels = measure.over(source, 8, CPU, red, workers=workers, batch=2)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert results.shape == (5, 1) and torch.diff(results[:, 0]).min() > 0
    shown = [line.split("pictures")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["plain  2/5 ", "plain  4/5 ", "plain  5/5 "]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_picture_is_one_sentence_from_a_worker_too(workers):
    with pytest.raises(loop.Stop) as error:
        measure.over(data.Source("plain", Plain(3)), 8, CPU, lambda images: images, workers=workers, batch=2)
    assert str(error.value) == "cannot read plain number 3 (cut short): a test set must be whole"


def test_a_rank_without_a_picture_gives_no_row(monkeypatch):
    monkeypatch.setattr(measure.ranks, "mine", lambda rows: rows[:0])
    results, labels = measure.over(data.Source("plain", Plain()), 8, CPU, lambda images: images.mean((2, 3)))
    assert results.shape == (0, 3) and labels.shape == (0,)


def test_a_fault_of_the_function_keeps_its_traceback():
    def faulty(images):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug") as error:
        measure.over(data.Source("plain", Plain()), 8, CPU, faulty)
    assert error.traceback[-1].name == "faulty"


# results.csv


def test_each_result_is_one_row_more_and_the_earlier_ones_stay(tmp_path):
    source = data.Source("pets", data.Arrays([[[0]]] * 3, [0, 1, 1]), ["cat", "dog"])
    for how, value in [("4 prompts", 12.5), ("a comma, and a naïve word", 100.0)]:
        measure.record(str(tmp_path / "checkpoint.pt"), "zeroshot", source, how, "top1", value)
    with open(tmp_path / measure.RESULTS, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["how"] for row in rows] == ["4 prompts", "a comma, and a naïve word"]
    assert [float(row["value"]) for row in rows] == [12.5, 100.0]
    assert {(row["checkpoint"], row["data"], row["pictures"], row["classes"]) for row in rows} == {
        ("checkpoint.pt", "pets", "3", "2")
    }
    assert [path.name for path in tmp_path.iterdir()] == [measure.RESULTS]  # nothing temporary is left


def test_a_folder_that_cannot_be_written_costs_the_row_and_not_the_result(tmp_path, capsys):
    source = data.Source("pets", data.Arrays([], []), ["cat", "dog"])
    measure.record(str(tmp_path / "gone/checkpoint.pt"), "zeroshot", source, "4 prompts", "top1", 12.5)
    assert "the result is not noted" in capsys.readouterr().err
    (tmp_path / measure.RESULTS).write_bytes(b"\xff\xfe")  # saved by a spreadsheet, as UTF-16
    measure.record(str(tmp_path / "checkpoint.pt"), "zeroshot", source, "4 prompts", "top1", 12.5)
    assert "the result is not noted" in capsys.readouterr().err
