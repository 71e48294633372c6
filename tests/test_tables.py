"""Tables: every line they type is one that train.py, linear.py or finetune.py takes; means and deviations by
hand; what is done is not done again.

pytest tests/test_tables.py            # and: pytest -m slow tests/test_tables.py
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time

import pytest

import finetune
import linear
import slip
import tables
import train
import zeroshot


def typed(*flags):
    return train.arguments().parse_args(shlex.split(" ".join(flags)))


def test_every_row_of_every_table_is_a_line_that_train_takes():
    assert set(sum(tables.TABLES.values(), [])) <= tables.RUNS.keys()
    for row, flags in tables.RUNS.items():
        for data in ("scenes", "fashionmnist", "mine"):
            args = typed("--data", data, tables.miniature(data).flags, flags.format(data=data))
            assert (args.method == "clip") == row.startswith("CLIP") and args.method in slip.METHODS
    methods = {typed(tables.RUNS[row]).method for row in tables.TABLES["ssl-frameworks"]}
    assert methods == {method for method, (language, _) in slip.METHODS.items() if language}


def test_two_rows_never_share_a_folder():
    folders = {tables.folder("scenes", row, seed) for row in tables.RUNS for seed in range(3)}
    assert len(folders) == 3 * len(tables.RUNS)
    assert os.path.join("runs", "tables", "scenes", "clip-simclr-s-augmentation-two-views-2") in folders


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_lines_of_the_real_thing_can_be_typed(capsys, name):
    tables.full(name)
    outs = []
    for line in capsys.readouterr().out.splitlines():
        words = shlex.split(line, comments=True)
        if "train.py" in words:
            args = typed(*words[words.index("train.py") + 1 :])
            outs.append(args.out)
            assert args.data in ("yfcc15m", "cc3m", "cc12m") and args.epochs and args.model in slip.SIZES
        for file, command in (("linear.py", linear), ("finetune.py", finetune), ("zeroshot.py", zeroshot)):
            if file in words:
                command.arguments().parse_args(words[words.index(file) + 1 :])
    sizes = {"main": 3 * (4 + 4), "datasets": 3 * 2}.get(name, len(tables.TABLES[name]))
    assert len(set(outs)) == len(outs) == sizes


def test_a_cell_is_mean_and_deviation_over_the_seeds(capsys):
    found = [{"linear mine": value, "fine-tuned mine": value / 2} for value in (50.0, 51.0, 54.0)]
    tables.show("main", "mine", {"SimCLR": found})
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    tables.show("main", "mine", {"SimCLR": [*found[:2], {}]})  # one has failed
    assert "50.5 ± 0.7 (n = 2)" in capsys.readouterr().out
    assert row[0] == "| SimCLR" and row[1] == "-"  # no zero-shot without language
    assert row[2] == f"{statistics.mean((50, 51, 54)):.1f} ± {statistics.stdev((50, 51, 54)):.1f}"
    assert row[3].startswith("25.8 ± 1.0")


def test_the_papers_figures_stand_under_the_table(capsys):
    tables.show_paper("main")
    assert "| SLIP | 42.8 | 72.1 | 82.6 |" in capsys.readouterr().out
    assert tables.PAPER.keys() <= {"main", "datasets"}  # no others could be verified


def test_a_run_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tables.folder("scenes", "CLIP", 0)
    os.makedirs(out)
    done = {"zero-shot scenes": 80.0, "fine-tuned scenes": 90.0}
    with open(os.path.join(out, "results.json"), "w") as file:
        json.dump(done, file)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    args = tables.argparse.Namespace(jobs=1, root="data", flags="")
    assert tables.train("scenes", "CLIP", 0, args) == done


def test_longer_runs_have_a_folder_and_the_last_word():
    longer = tables.settings("fashionmnist", "SLIP, scale 2", 0, "--max-steps 1200 --captions 0")[0]
    args = typed(longer)
    assert (args.max_steps, args.captions, args.ssl_scale) == (1200, 0, 2)
    assert tables.folder("mine", "CLIP", 0, "--max-steps 1200") == "runs/tables/mine-max-steps-1200/clip-0"


def test_results_of_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "check", lambda names, root: None)
    tables.main(["main", "--seeds", "1", "--rows", "CLIP", "SLIP"])
    tables.main(["main", "--seeds", "1", "--rows", "CLIP"])  # the same settings
    assert not os.path.exists(tables.folder("scenes", "SimCLR", 0))
    monkeypatch.setattr(tables, "FINETUNE_STEPS", 301)
    with pytest.raises(SystemExit) as end:
        tables.main(["main", "--seeds", "1"])
    sentence = capsys.readouterr().err
    assert end.value.code == 2 and "for 300 steps" in sentence and "expected" in sentence


def test_a_run_that_fails_is_told_at_once_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no train.py is
    monkeypatch.setattr(tables, "check", lambda names, root: None)
    assert tables.main(["decoupled", "--seeds", "1"]) == 1
    out = capsys.readouterr().out
    assert (
        out.count("failed: train.py for ") == 3
        and "No such file" in out
        and "| SLIP-decoupled | - | - |" in out
    )
    assert "train.py" in open(os.path.join(tables.folder("scenes", "CLIP", 0), "screen.txt")).read()


def test_a_table_that_is_stopped_stops_its_runs_and_begins_no_other(tmp_path):
    """Else the same line, typed again, would write beside them into the same folders."""
    (tmp_path / "train.py").write_text(  # obeys as a run does that is at its end
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "open('pid', 'w').write(f'{os.getpid()}'); time.sleep(60)"
    )
    (tmp_path / "finetune.py").write_text("open('began', 'w')")
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    program = "import sys, tables; tables.check = lambda *_: None; sys.exit(tables.main(['main']))"
    table = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert table.poll() is None
        time.sleep(0.1)
    table.terminate()
    out = table.communicate(timeout=30)[0]
    assert table.returncode == 143 and out.count("stopped: train.py") == 1 and "goes on from here" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not (tmp_path / "began").exists()


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("main --seeds 0", "expected 1 or more"),
        ("main --data nothere", "nothere"),
        ("nothere", "invalid choice"),
        ("main --data coco", "coco has captions, no classes"),
        ("decoupled --data fashionmnist", "SLIP is decoupled already"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_exit_2(capsys, tmp_path, flags, sentence):
    (tmp_path / "coco/annotations").mkdir(parents=True)
    table = {"images": [{"id": 1, "file_name": "1.jpg"}]}
    table |= {"annotations": [{"image_id": 1, "caption": "a boat"}]}
    for part in ("train", "val"):
        (tmp_path / f"coco/annotations/captions_{part}2017.json").write_text(json.dumps(table))
    with pytest.raises(SystemExit) as end:
        tables.main([*flags.split(), "--root", str(tmp_path)])
    assert end.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
def test_a_table_is_made_from_nothing(tmp_path, monkeypatch):
    """The whole of `main`, one seed, runs of a few steps: trained, fine-tuned, tested, printed, resumed."""
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    for name in os.listdir("."):
        if name.endswith(".py"):
            os.symlink(os.path.abspath(name), tmp_path / name)
    few = "import tables, sys; tables.MINIATURES['scenes'] = tables.Miniature("
    few += "'--max-steps 3', ('scenes',), ('scenes',), 'scenes'); tables.FINETUNE_STEPS = 2;"
    few += " tables.main(sys.argv[1:])"
    command = [sys.executable, "-c", few, "main", "--seeds", "1", "--jobs", "2"]
    first, second = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert first.count("done: ") == 4 and "done: " not in second
    assert first.split("\n\n", 1)[1] == second.split("\n", 1)[1]  # the same table
    assert "| SimCLR | - | " in first
