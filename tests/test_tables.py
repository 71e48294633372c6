"""Tables: means, deviations and standard errors by hand; every line that a table types is one that a command
takes; what is done is not done again.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import finetune
import flags
import linear
import sets
import tables
import zeroshot


def parsed(words):
    return flags.arguments("").parse_args(words)


def test_a_cell_has_the_deviation_and_a_difference_the_standard_error():
    assert tables.mean_and_deviation([50.0, 51.0, 54.0]) == "51.7 ± 2.1 (3)"  # variance 13/3
    assert tables.mean_and_deviation([50.0]) == "50.0 (1)"
    # 51 2/3 - 21; the variance 13/3 over 3 seeds and 2 over 2: the root of 13/9 + 1
    assert tables.difference([50.0, 51.0, 54.0], [20.0, 22.0]) == "+30.7 ± 1.6"
    assert tables.difference([20.0], [22.0, 24.0]) == "-"


def test_the_table_compares_slip_with_each_other_row_in_each_column():
    wanted = [("zeroshot", "scenes"), ("linear", "scenes")]
    found = {"CLIP": [{wanted[0]: 20.0}, {wanted[0]: 22.0}], "SLIP": [{wanted[0]: 50.0, wanted[1]: 90.0}] * 2}
    lines = tables.table("main", "scenes", wanted, found).splitlines()
    assert "| CLIP | 21.0 ± 1.4 (2) | - |" in lines and "| SLIP | 50.0 ± 0.0 (2) | 90.0 ± 0.0 (2) |" in lines
    assert "| SLIP - CLIP, ± standard error | +29.0 ± 1.0 | - |" in lines


def test_tables_without_a_slip_row_compare_pairs():
    found = {row: [{("zeroshot", "a"): 10.0 * i}] * 2 for i, row in enumerate(tables.TABLES["told"])}
    assert tables.table("told", "scenes", [("zeroshot", "a")], found).count("+10.0 ± 0.0") == 5


def test_every_row_is_a_line_that_train_takes_with_a_folder_of_its_own():
    assert {row for rows in tables.TABLES.values() for row in rows} == tables.ROWS.keys()
    plans = {row: tables.plan("scenes", row, 3) for row in tables.ROWS}
    assert all(parsed(words).method[:4] == row[:4].lower() for row, (_, words) in plans.items())
    assert len({out for out, _ in plans.values()}) == len(tables.ROWS)


def test_the_longer_rows_take_their_factor_of_the_steps():
    factors = {"CLIP": 1, "CLIP, as long as SLIP takes": 2.4, "SLIP, vit_tiny, 4 x the steps": 4}
    for row, factor in factors.items():
        assert parsed(tables.plan("scenes", row, 0)[1]).max_steps == round(1089 * factor)
        out, words = tables.plan("scenes", row, 0, "--max-steps 100")
        assert parsed(words).max_steps == 100 * factor and "max-steps-100" in out


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_commands_at_the_papers_scale_can_be_typed(name):
    commands = {"linear.py": linear, "finetune.py": finetune, "zeroshot.py": zeroshot}
    outs = []
    for line in tables.full(name).splitlines():
        words = shlex.split(line, comments=True)[2:]
        if words[:1] == ["train.py"]:
            args = parsed(words[1:])
            outs.append(args.out)
        elif words:
            commands[words[0]].arguments().parse_args(words[1:])
    expected = {"main": 15, "sizes": 18, "datasets": 6, "uncurated": 4, "told": 0}
    assert len(set(outs)) == len(outs) == expected.get(name, len(tables.TABLES[name]))


def test_what_is_done_is_not_done_again_and_the_table_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a command was started"))
    for row, method in (("CLIP", 20.0), ("SLIP", 50.0)):
        tests, out = {test: {"top1": method} for test in sets.SCENES}, tables.plan("scenes", row, 0)[0]
        os.makedirs(out)
        Path(out, "results.json").write_text(json.dumps({"checkpoint.pt": {t: tests for t in tables.WORDS}}))
    assert tables.main(["main", "--rows", "CLIP", "SLIP", "--seeds", "1"]) == 0
    out = capsys.readouterr().out
    assert "| SLIP | 50.0 (1) | 50.0 (1) |" in out and "| 37.6 / 42.8 |" in out  # and the paper's figures


def test_a_run_that_another_table_makes_is_left_to_it(tmp_path):
    (tmp_path / "lock").touch()
    args = SimpleNamespace(root="data", device="cpu")
    assert "another table makes it" in tables.make(str(tmp_path), ["--method", "clip"], [], args)


def test_an_unknown_flag_ends_the_command_before_any_folder_is_made(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert "--nonsense" in refused(tables.main, ["main", "--with=--max-step 5 --nonsense"])
    assert not os.listdir(tmp_path)


def test_a_run_that_fails_is_said_at_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no train.py
    assert tables.main(["datasets", "--seeds", "1", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.count("train.py failed") == 2 and "0 minutes left" in out and "| SLIP | - |" in out


@pytest.mark.slow
def test_a_table_of_a_few_steps_has_a_number_in_every_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(tables.SPEC, "finetune", "--max-steps 2")
    plan = tables.plan
    monkeypatch.setattr(tables, "plan", lambda *key: (str(tmp_path / key[1]), plan(*key)[1]))
    few = ["--seeds", "1", "--with=--max-steps 3", "--device", "cpu"]
    assert tables.main(["main", "--rows", "SimCLR", "SLIP", *few]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| S")]
    assert rows[0].count("(1)") == 2 and rows[1].count("(1)") == 5  # SimCLR has no zero-shot
