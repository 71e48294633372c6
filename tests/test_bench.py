"""Bench: each part runs and prints its figures."""

import pytest

import bench


@pytest.mark.slow
@pytest.mark.parametrize("part, words", [("host", "order"), ("step", "times one view")])
def test_a_part_prints_its_figures(part, words, capsys):
    bench.main([part, "--model", "vit_tiny", "--batch", "8"])
    assert words in capsys.readouterr().out
