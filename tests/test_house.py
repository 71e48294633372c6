"""The house rules, read from the files with ast: who may import whom, what a file has, what none is called.

pytest tests/test_house.py
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
TESTS = {path.stem: path for path in sorted((ROOT / "tests").glob("*.py"))}
PACKAGES = {"torch", "torchvision", "einops", "numpy", "pytest"}

# file: which of ours it may import. Everything may be imported by the commands and the studies, but what
# NOT_BY_OTHERS says.
ALONE = dict.fromkeys(["vit", "losses", "augment", "ranks", "recipe", "tasks", "scenes"], set())
CONCEPTS = ALONE | {
    "text": {"vit"},
    "selfsup": {"augment", "losses", "vit"},
    "slip": {"vit", "text", "selfsup"},
    "data": {"augment", "tasks"},
    "captioned": {"data"},
    "sets": {"data", "captioned", "tasks", "scenes"},
    "measure": {"augment", "data", "loop", "ranks"},
    "loop": {"ranks", "slip"},
    "retrieval": {"data", "measure", "loop", "ranks"},
}
TABLE = CONCEPTS | {
    "zeroshot": set(CONCEPTS),
    "linear": set(CONCEPTS),
    "finetune": set(CONCEPTS),
    "train": {*CONCEPTS, "zeroshot", "linear", "finetune"},
}
STUDIES = {"bench", "tables", "figures"}


def imports(source, everywhere=True):
    """The modules a file imports: {"os", "torch.nn", "vit"}; with `everywhere` inside functions too."""
    tree, names = ast.parse(source), set()
    for node in ast.walk(tree) if everywhere else top(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def top(tree):
    """The statements that run when a file is imported, those under if, try and with among them."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from top(node)


def roots(names):
    return {name.split(".")[0] for name in names}


def read(path):
    return path.read_text(encoding="utf-8")


def attribute(node):
    """torch.distributed.x as a dotted name; what is no such chain gives an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    before = attribute(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def uses_distributed(source):
    used = {attribute(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return any((name + ".").startswith("torch.distributed.") for name in imports(source) | used)


def unsafe_loads(source):
    """Line numbers of calls of torch.load without weights_only=True."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and attribute(node.func) == "torch.load":
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            lines += [node.lineno] if given.get("weights_only") is not True else []
    return lines


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_the_table_allows(name):
    ours = roots(imports(read(FILES[name]))) & FILES.keys()
    assert name in TABLE or name in STUDIES, f"{name}.py has no row in the table of tests/test_house.py"
    allowed = TABLE.get(name, TABLE.keys())
    assert ours <= allowed, f"{name}.py imports {', '.join(sorted(ours - allowed))}"


def test_nothing_imports_training():
    """A script that runs as __main__ and is imported again would be loaded twice; bench.py times its step."""
    assert [name for name, path in FILES.items() if "train" in roots(imports(read(path)))] == ["bench"]


def test_no_file_needs_the_studies():
    assert not [name for name, path in FILES.items() if STUDIES & roots(imports(read(path)))]


def test_only_figures_draws():
    assert [n for n, path in FILES.items() if "matplotlib" in roots(imports(read(path)))] == ["figures"]


def test_only_ranks_knows_torch_distributed():
    assert [name for name, path in FILES.items() if uses_distributed(read(path))] == ["ranks"]


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS.values()], ids=lambda path: path.name)
def test_a_file_opens_with_a_docstring(path):
    text = ast.get_docstring(ast.parse(read(path)))
    assert text and len(text.splitlines()) >= 3  # a sentence and what is typed, or what goes in and out


@pytest.mark.parametrize("path", TESTS.values(), ids=lambda path: path.name)
def test_a_file_of_tests_says_the_line_to_run_it(path):
    if path.name.startswith("test_"):
        assert f"pytest tests/{path.name}" in ast.get_docstring(ast.parse(read(path)))


def test_no_file_is_a_drawer():
    names = {path.stem for path in ROOT.rglob("*.py") if not path.relative_to(ROOT).parts[0].startswith(".")}
    assert not names & {"utils", "util", "common", "misc", "helpers", "helper", "tools"}


def test_weights_are_always_loaded_without_running_code():
    found = {path.name: unsafe_loads(read(path)) for path in [*FILES.values(), *TESTS.values()]}
    assert not {name: lines for name, lines in found.items() if lines}


def test_requirements_are_the_five_packages():
    lines = [line.split("#")[0].strip() for line in read(ROOT / "requirements.txt").splitlines()]
    names = [re.split(r"[<>=!~\[; ]", line)[0] for line in lines if line]
    assert sorted(names) == sorted(PACKAGES)


@pytest.mark.parametrize("path", [*FILES.values(), *TESTS.values()], ids=lambda path: path.name)
def test_nothing_else_must_be_installed(path):
    known = {*sys.stdlib_module_names, *PACKAGES, *FILES, "PIL"}  # PIL comes with torchvision
    known -= {"pytest"} if path.parent == ROOT else set()
    assert roots(imports(read(path), everywhere=False)) <= known


# The readers above, on what they must find.


def test_imports_are_found_wherever_they_stand():
    source = "import os.path\nif 1:\n    from vit import ViT\ndef f():\n    import train\n"
    assert imports(source) == {"os.path", "vit", "vit.ViT", "train"}
    assert imports(source, everywhere=False) == {"os.path", "vit", "vit.ViT"}


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed import get_rank", True),
        ("import torch\nprint(torch.distributed.get_rank())", True),
        ("import torch\nd = torch.distributed", True),
        ("import torch\ntorch.distributions.Normal(0, 1)", False),
    ],
)
def test_every_way_to_torch_distributed_is_found(source, found):
    assert uses_distributed(source) is found


def test_loads_that_may_run_code_are_found():
    calls = ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)"]
    assert unsafe_loads("\n".join(calls)) == [1, 2, 3]
    assert not unsafe_loads("torch.load(f, weights_only=True)\njson.load(f)")
