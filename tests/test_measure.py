"""Measuring: the rows of results.csv. The rest is tested where it is used.

pytest tests/test_measure.py
"""

import csv

import data
import measure


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
