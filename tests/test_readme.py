"""The README against the repository: flags that exist, files and tests that exist, the Python that it shows.

pytest tests/test_readme.py
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import slip
from text import Tokenizer

README = Path("README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    line.split("#")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()
]
COMMANDS += [
    part for line in re.findall(r"^\|.*`(.*train\.py.*?)`", README, flags=re.M) for part in line.split(";")
]


def scripts():
    for command in COMMANDS:
        found = re.search(r"(\w+\.py)\b(.*)", command)
        if found:
            yield found[1], shlex.split(found[2].replace("\\|", "|"))


def test_there_are_commands_to_check():
    assert len(list(scripts())) >= 10 and "python train.py --data imagenet --epochs 25" in COMMANDS


@pytest.mark.parametrize("name", sorted({name for name, _ in scripts()}))
def test_every_flag_of_a_command_is_in_its_help(name):
    run = subprocess.run([sys.executable, name, "--help"], capture_output=True, text=True, check=True)
    known = set(re.findall(r"--[a-z][a-z-]*", run.stdout))
    for script, words in scripts():
        if script == name:
            assert {word for word in words if word.startswith("--")} <= known


def test_every_file_and_test_that_is_named_exists():
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", README):
        assert Path(name).is_file(), name
    tests = "".join(path.read_text() for path in Path("tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_the_python_that_is_shown_runs(tmp_path, monkeypatch, capsys):
    (code,) = [text for kind, text in BLOCKS if kind == "python"]
    model = slip.build(slip.configure("slip", "vit_tiny", vocab_size=520, text_depth=1))
    model.tokenizer = Tokenizer.train(["a red boat", "a cup"] * 3, 520)
    monkeypatch.chdir(tmp_path)
    Path("runs/scenes-slip").mkdir(parents=True)
    slip.save("runs/scenes-slip/checkpoint.pt", model)
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save("boat.png")
    exec(code, {})
    assert "tensor([" in capsys.readouterr().out


def test_the_chinese_one_has_the_same_commands_figures_and_numbers():
    chinese = Path("README.zh-CN.md").read_text(encoding="utf-8")

    def commands(text):
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
        return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]

    assert commands(chinese) == commands(README)
    for pattern in (r"\]\((figures/[\w.]+)\)", r"[\d.]+±[\d.]+", r"`(test_\w+)`"):
        assert re.findall(pattern, chinese) == re.findall(pattern, README)


def test_it_is_at_most_200_lines():
    assert len(README.splitlines()) <= 200
