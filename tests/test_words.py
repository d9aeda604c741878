"Make does what is typed: its words reach the notebook, and a mistyped one is refused before any work."
import dataclasses
import os
import shutil
import subprocess
import sys

import pytest

import words
from lfdm.parameters import Parameters
from tree import ROOT, copy_tree

MAKE = shutil.which("make")
with_make = pytest.mark.skipif(not MAKE, reason="no make")


def make(*command, cwd=ROOT, **env):
    "What make would do: nothing is set up or run."
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")} | env
    return subprocess.run([MAKE, *command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("typed", [
    {}, {"target": "v", "epochs": "5"}, {"weighting": "sigmoid(k=3)"}, {"args": "-p target v -k 'a b'"},
    {"study": "a\\b", "out": "$x $(y) \"quoted\" it's"}], ids=str)
@with_make
def test_what_is_typed_arrives(typed, tmp_path):
    "Through make's quoting and the shell's, whatever is in a value."
    (tmp_path / "Makefile").write_text(
        "QUOTED = '$(subst ','\\'',$(1))'\n"
        f"all: ; @'{sys.executable}' -c 'import sys; sys.stdout.write(sys.argv[1])' "
        "$(call QUOTED,$(MAKEOVERRIDES))\n")
    assert "QUOTED = '$(subst ','\\'',$(1))'" in (ROOT / "Makefile").read_text()
    given = [f"{name}={value}" for name, value in typed.items()]
    done = make("-s", *given, cwd=tmp_path, target="environment")
    assert done.returncode == 0 and words.parse(done.stdout) == typed, done


def test_the_words_of_train_are_the_parameters():
    fields = [field.name for field in dataclasses.fields(Parameters)]
    assert sorted(words.parameters(words.TRAIN)) == sorted([*fields, "study"])


def test_every_study_takes_its_parameters_and_a_scale():
    for name in words.studies():
        assert {"scale", "name"} <= {*words.words_of("study", name)}, name


@pytest.mark.parametrize("command, says", [
    ("trian", "unknown target 'trian'. Did you mean 'train'? Valid: help, setup, "),
    ("train epoch=5", "unknown word of `make train`: 'epoch'. Did you mean 'epochs'? Valid: dataset, "),
    ("figures scael=quick", "unknown word of `make figures`: 'scael'. Did you mean 'scale'? Valid: scale"),
    ("figures scale=quik", "unknown scale 'quik'. Did you mean 'quick'? Valid: full, quick"),
    ("study", "which study? make study name=likelihood. There are: decisions, "),
    ("study name=likelyhood", "unknown study 'likelyhood'. Did you mean 'likelihood'? Valid: decisions, "),
    ("study name=likelihood worker=2", "'worker'. Did you mean 'workers'? Valid: scale, workers, name, args"),
    ("study name=../x", "unknown study '../x'. Valid: decisions"),
    ("test arg=-k", "unknown word of `make test`: 'arg'. Did you mean 'args'? Valid: args"),
    ("lint target=v", "make lint takes no words, but 'target' was given"),
    ("train PYTHN=python3", "unknown word of `make train`: 'PYTHN'"),
    ("train test bins=3", "unknown word of `make train test`: 'bins'")])
@with_make
def test_what_is_mistyped_is_refused_at_once(command, says):
    "For every target, and before any set-up."
    done = make(*command.split(), "-n")
    assert done.returncode == 2 and not done.stdout
    assert f"*** {says}" in done.stderr or says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("target", words.targets())
@with_make
def test_every_target_refuses_a_word_that_it_does_not_know(target):
    "And takes make's own."
    name = ["name=likelihood"] if target == "study" else []
    done = make("-n", target, *name, "tragte=v")
    assert done.returncode == 2 and "'tragte'" in done.stderr
    done = make("-n", target, *name, "PYTHON=python3", "UV_TORCH_BACKEND=cpu")
    assert done.returncode == 0, done.stderr


@with_make
def test_the_environment_is_no_word():
    done = make("-n", "-o", ".venv/ready", "train", target="v", epochs="many", args="-q", name="x", scale="y")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("train ''"), done.stdout
    assert make("-n", "study", name="likelihood").returncode == 2


def test_words_become_parameters_of_papermill(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("papermill.cli.papermill.main", lambda command, **_: seen.append(command))
    words.train({"weighting": "sigmoid(k=3)", "epochs": "5", "args": "-p seed 1 -k 'my kernel'"})
    words.study({"scale": "quick", "workers": "2"}, ["likelihood", "thesis_runs"])
    shown = ["--no-progress-bar", "--stdout-file", "-", "--stderr-file", "-"]
    assert seen[0] == [str(words.TRAIN), "runs/train.ipynb", *shown, "-p", "weighting", "sigmoid(k=3)",
                       "-p", "epochs", "5", "-p", "seed", "1", "-k", "my kernel"]
    assert [command[7:] for command in seen[1:]] == [["-p", "scale", "quick", "-p", "workers", "2"]] * 2
    assert "thesis_runs.ipynb, quick scale" in capsys.readouterr().out


NOTEBOOK = """{"cells": [%s], "metadata": {"kernelspec": {"name": "python3", "language": "python",
    "display_name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}"""
CELL = """{"cell_type": "code", "id": "%s", "metadata": {}, "outputs": [], "execution_count": null,
    "source": ["%s"]}"""
SAYS, FAILS = ("from lfdm.core import announce, in_one_line\\nannounce('the result')",
               "with in_one_line(): raise ValueError('what is wrong')")


def test_papermill_shows_the_result_and_an_error_first_and_last(tmp_path):
    "Its own command, which shows nothing of what a notebook prints."
    path = tmp_path / "says.ipynb"
    path.write_text(NOTEBOOK % ", ".join(CELL % pair for pair in (("a", SAYS), ("b", FAILS))))
    command = [sys.executable, "-m", "papermill", path, tmp_path / "out.ipynb", "--no-progress-bar"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.stdout.split("\n") == ["", "the result", "", "ValueError: what is wrong", ""], done.stderr
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: what is wrong")
    assert "Cell In[" not in done.stderr and len(done.stderr.splitlines()) < 45


def test_the_end_of_make_is_the_error_alone(tmp_path, monkeypatch):
    from papermill.exceptions import PapermillExecutionError
    red = "\x1b[31mno such thing\x1b[0m"
    def fail(*_, **__): raise PapermillExecutionError(1, 4, "x = 1", ename, red, [])
    monkeypatch.setattr("papermill.cli.papermill.main", fail)
    monkeypatch.chdir(tmp_path)
    for ename, first in (("ValueError", "no such thing"), ("RuntimeError", "RuntimeError: no such thing")):
        with pytest.raises(SystemExit) as ended: words.train({})
        assert str(ended.value).split("\n") == [
            first, "(cell 4 of nbs/train.ipynb; as far as it ran: runs/train.ipynb)"]


# ---- the set-up

def test_a_set_up_that_fails_shows_the_end_of_its_log(tmp_path):
    "And leaves no stamp, so that it starts afresh."
    copy = copy_tree(tmp_path / "copy")
    (copy / ".venv").mkdir()
    (copy / ".venv/ready").touch()   # the environment itself is there
    tool = copy / "tools/set_up.py"
    text = tool.read_text()
    steps = "STEPS = {'a step': [sys.executable, '-c', 'print(*range(99), sep=chr(10)); sys.exit(3)']}\nTAIL"
    tool.write_text(text.replace("TAIL", steps, 1))
    done = subprocess.run([sys.executable, tool], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) < 30 and not (copy / ".venv/ready").exists()
    assert "Set-up: a step: failed" in done.stdout and "NameError: name 'sys' is not defined" in lines[-1]


def test_a_set_up_is_quiet(tmp_path):
    "A line for each step and one at the end; the log has what the installer said."
    copy = copy_tree(tmp_path / "copy")
    (copy / ".venv").mkdir()
    (copy / ".venv/ready").touch()
    tool = copy / "tools/set_up.py"
    steps = "STEPS = {'a step': [sys.executable, '-c', 'print(*range(99), sep=chr(10))']}\nTAIL"
    tool.write_text(tool.read_text().replace("TAIL", steps, 1))
    done = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 4 and "Set-up: done in " in done.stdout.splitlines()[-1]
    assert (copy / ".venv/setup.log").read_text().split() == [str(i) for i in range(99)]
    assert (copy / ".venv/ready").exists() and (copy / ".venv/etc/ipython/ipython_kernel_config.py").exists()
