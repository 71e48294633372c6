"""The README against the repository: flags that exist, files and tests that exist, Algorithm 1 as it stands
in train.py, the Python that it shows.
"""

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + CHINESE, flags=re.S)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind in ("bash", "sh")
    for line in text.splitlines()
]


def scripts():
    for command in COMMANDS:
        found = re.search(r"(\w+\.py)\b(.*)", command.rstrip("\\"))
        if found:
            yield found[1], shlex.split(found[2])


@pytest.mark.parametrize("name", sorted({name for name, _ in scripts()}))
def test_every_flag_of_a_command_is_in_its_help(name, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(name.removesuffix(".py")).main(["--help"])
    assert "python train.py --data imagenet --epochs 25" in COMMANDS
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    for script, words in scripts():
        if script == name:
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def test_every_file_and_test_that_is_named_exists():
    for name in re.findall(r"`((?:tests/)?\w+\.py)`", README + CHINESE):
        assert (ROOT / name).is_file(), name
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name


def test_every_file_is_in_the_reading_order():
    assert all(f"`{path.name}`" in README for path in ROOT.glob("*.py"))


def test_algorithm_1_is_the_code_of_train():
    (shown,) = [text for kind, text in BLOCKS if kind == "python" and "info_nce(" in text and text in README]
    assert len(shown.splitlines()) <= 20
    assert textwrap.indent(textwrap.dedent(shown), " " * 8) in (ROOT / "train.py").read_text(encoding="utf-8")


def test_the_python_that_is_shown_runs(tmp_path, monkeypatch, checkpoint):
    (code,) = [text for kind, text in BLOCKS if kind == "python" and "slip.load(" in text and text in README]
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for path in ("photos/00002-blue-mushroom.png", "photos/b.png"):
        Image.new("RGB", (40, 40), "red").save(path)
    code = re.sub(r'slip\.load\("[^"]*"\)', f"slip.load({checkpoint!r})", code)
    exec(compile(code, "README", "exec"), {})
    assert np.load("photos.npy").shape[0] == 2
