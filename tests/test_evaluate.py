"""Evaluation: metrics against values counted by hand, AUC against all pairs; neighbours that are known; a
function over a whole set, and over the shares of two ranks; what stands in results.json.
"""

import json

import numpy as np
import pytest
import torch

import console
import data
import evaluate


def test_metrics_are_those_counted_by_hand():
    """Class 0 three times: at places 1, 2 and 6; class 1 once: at place 1; classes 2 to 5 never."""
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [5, 6, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2], [1, 6, 5, 4, 3, 2]])
    result = evaluate.metrics(scores, torch.tensor([0, 0, 0, 1]))
    assert result["top1"] == 50 and result["top5"] == 75 and result["top1_top5"] == 62.5
    assert result["per_class"] == pytest.approx(100 * (1 / 3 + 1) / 2)


def test_auc_equals_a_count_of_all_pairs_ties_too():
    generator = torch.Generator().manual_seed(0)
    positive = torch.rand(200, generator=generator) < 0.3
    values = (torch.randn(200, generator=generator) + positive).round(decimals=1)
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


def test_a_function_is_applied_to_every_image_once_by_one_rank_or_by_two(monkeypatch):
    """The shares of two ranks, one after the other: 7 images are padded to 8."""
    whole, *found = evaluate.apply_to_set(grey(), 8, "cpu", brightness, workers=1, batch=2)
    assert found[0].tolist() == found[1].tolist() == [0, 1, 2, 3, 4, 5, 6] and whole.diff().min() > 0.5
    parts = []
    monkeypatch.setattr(evaluate.ranks, "world", lambda: 2)
    monkeypatch.setattr(evaluate.ranks, "gather", lambda rows: parts.append(rows) or rows)
    for rank in (0, 1):
        monkeypatch.setattr(evaluate.ranks, "rank", lambda rank=rank: rank)
        evaluate.apply_to_set(grey(), 8, "cpu", brightness)
    assert [len(part) for part in parts] == [4] * 6 and parts[5].tolist() == [4, 5, 6, 0]
    assert torch.equal(torch.cat([parts[0], parts[3]])[:7], whole)


def test_an_image_that_cannot_be_decoded_ends_it_or_is_left_out(capsys):
    with pytest.raises(console.Stop, match="1 of 7 .* first is grey number 3: .* must be whole"):
        evaluate.apply_to_set(grey(Bad), 8, "cpu", brightness)
    numbers = evaluate.apply_to_set(grey(Bad), 8, "cpu", brightness, skip_bad=True)[2]
    assert numbers.tolist() == [0, 1, 2, 4, 5, 6]
    assert capsys.readouterr().err.count("warning: grey: 1 of 7 images cannot be decoded") == 1


def test_results_are_merged_by_checkpoint_task_and_set(tmp_path, capsys):
    file = str(tmp_path / "checkpoint.pt")
    evaluate.record(file, "zeroshot", "pets", {"value": 1.0})
    evaluate.record(file, "zeroshot", "pets", {"value": 2.0})
    evaluate.record(str(tmp_path / "best.pt"), "linear", "naïve", {"value": 3.0})
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["checkpoint.pt"]["zeroshot"]["pets"].keys() == {"value", "date"}
    assert results["checkpoint.pt"]["zeroshot"]["pets"]["value"] == 2
    assert results["best.pt"]["linear"]["naïve"]["value"] == 3 and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "results.json.tmp").mkdir()  # cannot be written
    for broken in ("", "[1]", "{}"):
        (tmp_path / "results.json").write_text(broken)
        evaluate.record(file, "zeroshot", "pets", {"value": 1.0})
        assert "the result is not noted" in capsys.readouterr().err
