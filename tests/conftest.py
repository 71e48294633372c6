"""Shared by all tests: one thread, and a small valid checkpoint that has learned nothing."""

import pytest
import torch

import scenes
import slip
from text import Tokenizer

torch.set_num_threads(1)


@pytest.fixture
def refused(capsys):
    """refused(command, ...) -> what is said before the exit with code 2."""

    def said(command, *given):
        with pytest.raises(SystemExit) as end:
            command(*given)
        message = capsys.readouterr().err
        assert end.value.code == 2 and "Traceback" not in message
        return message

    return said


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Path of a run's checkpoint.pt: SLIP vit_tiny with a tokenizer learned on a few built-in captions."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(scenes.build("train", 64, 0)["captions"], 600)
    model = slip.build(slip.configure("slip", "vit_tiny", vocab_size=tokenizer.vocab_size, text_depth=1))
    model.tokenizer = tokenizer
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    args = dict(method="slip", model="vit_tiny", data="scenes", root="data", seed=0, class_names=None)
    slip.save(str(path), model, dict(args=args, step=1, rows=[]))
    return str(path)
