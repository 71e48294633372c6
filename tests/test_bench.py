"""Bench: each part runs and prints its figures, and what it counts is what a step multiplies.

pytest tests/test_bench.py             # and: pytest -m slow tests/test_bench.py
"""

import pytest
import torch

import bench

CPU = torch.device("cpu")


def test_the_median_leaves_the_first_call_out(monkeypatch):
    clock = iter([0.0, 100.0, 100.0, 101.0, 200.0, 203.0, 300.0, 302.0])  # 100, 1, 3, 2
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.seconds(lambda: None) == 2.0


def test_an_unknown_part_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["speed", "--device", "cpu"])
    assert end.value.code == 2 and "expected any of step, input" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("part, words", [("input", "PIL transforms"), ("host", "order")])
def test_a_part_prints_its_figures(part, words, capsys):
    bench.main([part, "--device", "cpu"])
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_prints_its_ratio_rate_and_memory(capsys):
    bench.main(["step", "--model", "vit_tiny", "--batch", "8", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "images/s" in out and "times one view" in out and "GiB" in out
