"""Evaluation: metrics against values counted by hand and naive ones in float64; neighbours that are known; a
function over a whole set, and over the shares of two ranks; what stands in results.json.

    pytest tests/test_evaluate.py
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import console
import data
import evaluate


def test_metrics_are_those_counted_by_hand():
    """Class 0 three times: at places 1, 2 and 6; class 1 once: at place 1; classes 2 to 5 never."""
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [5, 6, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [1, 6, 5, 4, 3, 2]])
    result = evaluate.metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert result["top1"] == 50 and result["top5"] == 75 and result["top1_top5"] == 62.5
    assert result["per_class"] == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_metrics_equal_naive_ones():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(400, generator=generator) ** 2 * 6).long()  # few are 5, none is 6
    scores = torch.randn(400, 7, generator=generator) + 2 * F.one_hot(labels, 7)
    places = [sum(s > row[own] for s in row) for row, own in zip(scores.tolist(), labels.tolist())]
    top1, top5 = (100 * np.mean([place < k for place in places]) for k in (1, 5))
    hits = [np.mean([p == 0 for p, own in zip(places, labels.tolist()) if own == c]) for c in range(6)]
    naive = {"top1": top1, "top5": top5, "top1_top5": (top1 + top5) / 2, "per_class": 100 * np.mean(hits)}
    assert evaluate.metrics(scores, labels) == pytest.approx(naive, rel=1e-6)  # means in float32


@pytest.mark.parametrize("decimals", [0, 6])
def test_auc_equals_a_count_of_all_pairs_ties_too(decimals):
    generator = torch.Generator().manual_seed(decimals)
    positive = torch.rand(200, generator=generator) < 0.3
    values = (torch.randn(200, generator=generator) + positive).round(decimals=decimals)
    up, down = values[positive].tolist(), values[~positive].tolist()
    naive = sum((a > b) + (a == b) / 2 for a in up for b in down) / (len(up) * len(down))
    assert evaluate.auc(values, positive) == pytest.approx(naive, rel=1e-14)  # float64


def test_auc_is_of_the_difference_of_two_scores():
    scores = torch.tensor([[5.0, 4.0], [0.0, -2.0], [9.0, 9.5], [-3.0, -3.4]])  # -1, -2, 0.5, -0.4
    labels = torch.tensor([0, 0, 1, 1])
    assert [evaluate.metrics(s, labels)["auc"] for s in (scores, -scores, torch.ones(4, 2))] == [100, 0, 50]


@pytest.mark.parametrize("metric", evaluate.METRICS)
def test_chance_is_what_random_scores_get(metric):
    classes = 2 if metric == "auc" else 8
    labels = torch.arange(40_000) % classes
    scores = torch.randn(len(labels), classes, generator=torch.Generator().manual_seed(0))
    value = evaluate.metrics(scores, labels)[metric]
    assert value == pytest.approx(evaluate.chance(metric, classes), abs=1)  # four deviations of 0.25


def test_nearest_neighbours_vote_by_their_cosines():
    """A neighbour of class 0 at cosine 1, two of class 1 at 0.6: 1 < 1.2. The lengths do not matter."""
    train = torch.tensor([[5.0, 0], [0.6, 0.8], [0.6, -0.8], [-1, 0]])
    train_labels, query, label = torch.tensor([0, 1, 1, 2]), torch.tensor([[0.1, 0]]), torch.tensor([1])
    found = {k: evaluate.knn(train, train_labels, query, label, classes=3, k=k) for k in (1, 2, 3, 20)}
    assert found == {1: 0, 2: 0, 3: 100, 20: 100}


# A function over a set


class Bad(data.Arrays):
    """Images of growing brightness, of which number 3 cannot be decoded."""

    def __getitem__(self, index):
        if index == 3:
            raise OSError("truncated")
        return super().__getitem__(index)


def grey(kind=data.Arrays):
    images = [np.full((8, 8), 30 * i, np.uint8) for i in range(7)]
    return data.Source("grey", kind(images, range(7)), list("0123456"))


def brightness(images):
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_is_applied_to_every_image_of_a_set_once(workers):
    results, *found = evaluate.apply_to_set(grey(), 8, "cpu", brightness, workers=workers, batch=2)
    assert found[0].tolist() == found[1].tolist() == [0, 1, 2, 3, 4, 5, 6] and results.diff().min() > 0.5


def test_ranks_with_equal_shares_give_what_one_gives(monkeypatch):
    """The shares of two ranks, one after the other: 7 images are padded to 8."""
    whole, parts = evaluate.apply_to_set(grey(), 8, "cpu", brightness)[0], []
    monkeypatch.setattr(evaluate.ranks, "world", lambda: 2)
    monkeypatch.setattr(evaluate.ranks, "gather", lambda rows: parts.append(rows) or rows)
    for rank in (0, 1):
        monkeypatch.setattr(evaluate.ranks, "rank", lambda rank=rank: rank)
        evaluate.apply_to_set(grey(), 8, "cpu", brightness)
    assert [len(part) for part in parts] == [4] * 6 and parts[5].tolist() == [4, 5, 6, 0]
    assert torch.equal(torch.cat([parts[0], parts[3]])[:7], whole)


def test_an_image_that_cannot_be_decoded_ends_it_or_is_left_out(capsys):
    with pytest.raises(
        console.Stop, match="1 of 7 .* first is grey number 3: an evaluation set must be whole"
    ):
        evaluate.apply_to_set(grey(Bad), 8, "cpu", brightness)
    numbers = evaluate.apply_to_set(grey(Bad), 8, "cpu", brightness, skip_bad=True)[2]
    assert numbers.tolist() == [0, 1, 2, 4, 5, 6]
    assert capsys.readouterr().err.count("warning: grey: 1 of 7 images cannot be decoded") == 1


# results.json


def test_results_are_merged_by_checkpoint_task_and_set(tmp_path, capsys):
    file = str(tmp_path / "checkpoint.pt")
    evaluate.record(file, "zeroshot", "pets", {"value": 1.0})
    evaluate.record(str(tmp_path), "zeroshot", "pets", {"value": 2.0})  # the run folder
    evaluate.record(str(tmp_path / "best.pt"), "linear", "naïve", {"value": 3.0})
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["checkpoint.pt"]["zeroshot"]["pets"].keys() == {"value", "date"}
    assert results["checkpoint.pt"]["zeroshot"]["pets"]["value"] == 2
    assert results["best.pt"]["linear"]["naïve"]["value"] == 3 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "results.json").write_text("[")
    evaluate.record(file, "zeroshot", "pets", {"value": 1.0})
    assert "the result is not noted" in capsys.readouterr().err
