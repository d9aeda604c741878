"Every study runs from top to bottom at the smoke scale, made for this test alone, and leaves the repository as it was."
import os
import subprocess
import sys

import pytest

from tree import ROOT, name, notebooks

STUDIES = [path for path in notebooks() if path.parent.name == "experiments"]


def state():
    "The files of figures/ and runs/, with their times."
    return {path: path.stat().st_mtime_ns for folder in ("figures", "runs") for path in (ROOT / folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("study", STUDIES, ids=name)
def test_study_runs(study, tmp_path):
    before = state()
    env = os.environ | {"LFDM_RUNS": str(tmp_path / "runs"), "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "papermill", str(study), str(tmp_path / "out.ipynb"), "--no-progress-bar", "-p", "scale", "smoke"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert state() == before


def test_a_wrong_scale_is_named(tmp_path):
    command = [sys.executable, "-m", "papermill", str(STUDIES[0]), str(tmp_path / "out.ipynb"), "--no-progress-bar", "-p", "scale", "smok"]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode != 0 and "Did you mean 'smoke'?" in done.stderr
