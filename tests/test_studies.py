"Every study runs from top to bottom at the smoke scale, made for this test alone, and leaves the repository as it was."
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tree import ROOT, name, notebooks

DRAWN = ("thesis.ipynb", "verdicts.ipynb")   # from the record that thesis_runs.ipynb leaves
STUDIES = sorted((path for path in notebooks() if path.parent.name == "experiments"), key=lambda path: path.name in DRAWN)


def state():
    "The files that a study of the full scale writes, with their times."
    return {path: path.stat().st_mtime_ns for folder in ("figures", "records", "runs") for path in (ROOT / folder).rglob("*") if path.is_file()}


def execute(study, runs, out, scale="smoke"):
    env = os.environ | {"LFDM_RUNS": str(runs), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}   # two share the cores
    command = [sys.executable, "-m", "papermill", str(study), str(out), "--no-progress-bar", "-p", "scale", scale]
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    "What came of every study, two at a time: in one line those that train the thesis's networks, and at last those drawn from their record."
    runs, empty, out = (tmp_path_factory.mktemp(what) for what in ("runs", "empty", "out"))
    one = lambda study: (study, execute(study, runs, out / study.name))
    chain = [study for study in STUDIES if study.stem in ("thesis_runs", "samplers", "likelihood", "defaults")]
    others = sorted((study for study in STUDIES if study not in chain and study.name not in DRAWN), key=lambda study: study.stem != "nelbo_puzzle")   # the longest first
    before = state()
    with ThreadPoolExecutor(2) as pool:
        chained = pool.submit(lambda: [one(study) for study in chain])
        apart = [pool.submit(one, study) for study in others]
        wrong = pool.submit(execute, STUDIES[0], empty, out / "wrong.ipynb", "smok")
        missing = pool.submit(execute, ROOT / "nbs/experiments" / DRAWN[0], empty, out / "missing.ipynb")
        done = dict(chained.result() + [future.result() for future in apart])
        done |= dict(pool.map(one, [study for study in STUDIES if study.name in DRAWN]))
    changed = [str(path) for path, t in state().items() if before.get(path) != t]
    return done | {"changed": changed, "wrong": wrong.result(), "missing": missing.result()}


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
