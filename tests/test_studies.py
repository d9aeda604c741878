"Every study runs from top to bottom at the smoke scale, made for this test alone, and leaves the repository as it was."
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from tree import ROOT, name, notebooks

DRAWN = ("thesis.ipynb", "verdicts.ipynb")   # from the record that thesis_runs.ipynb leaves
STUDIES = sorted((path for path in notebooks() if path.parent.name == "experiments"), key=lambda path: path.name in DRAWN)


def state():
    "The files that a study of the full scale writes, with their times. (runs/train belongs to the main job, which other tests run meanwhile.)"
    files = (path for folder in ("figures", "records", "runs") for path in (ROOT / folder).rglob("*"))
    return {path: path.stat().st_mtime_ns for path in files if path.is_file() and ROOT / "runs/train" not in path.parents}


def execute(study, runs, out, scale="smoke"):
    env = os.environ | {"LFDM_RUNS": str(runs), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}   # two share the cores
    command = [sys.executable, "-m", "papermill", str(study), str(out), "--no-progress-bar", "-p", "scale", scale]
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@cache
def begun():
    "All studies, one after the other beside the other tests: conftest.py begins them, as most tests leave a core idle."
    before, pool, folder = state(), ThreadPoolExecutor(1), tempfile.TemporaryDirectory()
    runs, empty, out = (Path(folder.name) / what for what in ("runs", "empty", "out"))
    for path in (runs, empty, out): path.mkdir()
    tasks = {study: pool.submit(execute, study, runs, out / study.name) for study in STUDIES}
    tasks["wrong"] = pool.submit(execute, STUDIES[0], empty, out / "wrong.ipynb", "smok")
    tasks["missing"] = pool.submit(execute, ROOT / "nbs/experiments" / DRAWN[0], empty, out / "missing.ipynb")
    return folder, tasks, before


@pytest.fixture(scope="module")
def outcomes():
    "What came of every study."
    folder, tasks, before = begun()
    done = {what: task.result() for what, task in tasks.items()}
    folder.cleanup()
    return done | {"changed": [str(path) for path, t in state().items() if before.get(path) != t]}


@pytest.mark.parametrize("study", STUDIES, ids=name)
def test_study_runs(study, outcomes):
    assert outcomes[study].returncode == 0, outcomes[study].stderr[-3000:]


def test_the_smoke_scale_leaves_the_repository_as_it_was(outcomes):
    assert not outcomes["changed"]


def test_a_wrong_scale_is_named(outcomes):
    done = outcomes["wrong"]
    assert done.returncode != 0 and "Did you mean 'smoke'?" in done.stderr


def test_a_missing_record_is_named_with_what_makes_it(outcomes):
    done = outcomes["missing"]
    assert done.returncode != 0 and "no record of study 'thesis'" in done.stderr and "Make it: make figures scale=smoke" in done.stderr


@pytest.mark.parametrize("goal", ["figures", "draw"])
def test_make_refuses_an_unknown_scale_before_any_work(goal):
    done = subprocess.run(["make", "--silent", "--old-file=.venv/ready", goal, "scale=smal"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "scale is full or quick, not smal." in done.stderr and "papermill" not in done.stdout
