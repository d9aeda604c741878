"Every study runs from top to bottom at the smoke scale, and leaves the repository as it was."
import subprocess
import tempfile

import pytest

from beside import job
from tree import ROOT, name, notebooks

EXPERIMENTS = ROOT / "nbs/experiments"
RUNS = EXPERIMENTS / "thesis_runs.ipynb"
AFTER = {   # from the records that others leave
    "thesis.ipynb": RUNS, "mechanism.ipynb": RUNS, "nelbo_puzzle.ipynb": EXPERIMENTS / "mechanism.ipynb",
    "verdicts.ipynb": EXPERIMENTS / "nelbo_puzzle.ipynb", "decisions.ipynb": EXPERIMENTS / "triples.ipynb",
    "kingma_gao.ipynb": EXPERIMENTS / "triples.ipynb", "note.ipynb": EXPERIMENTS / "triples.ipynb",
    "sizes.ipynb": EXPERIMENTS / "decisions.ipynb"}
STUDIES = [path for path in notebooks() if path.parent == EXPERIMENTS]
BEFORE = {}


def state():
    "The files that a study of the full scale writes, with their times. (runs/train belongs to the main job.)"
    files = (path for folder in ("figures", "records", "runs") for path in (ROOT / folder).rglob("*"))
    kept = (path for path in files if path.is_file() and ROOT / "runs/train" not in path.parents)
    return {path: path.stat().st_mtime_ns for path in kept}


def jobs():
    "All studies, and two that fail."
    BEFORE.update(state())
    empty = tempfile.mkdtemp()
    after = {path: name(AFTER[path.name]) if path.name in AFTER else None for path in STUDIES}
    made = [job(name(path), path, dict(scale="smoke"), after=after[path])
            for path in sorted(STUDIES, key=lambda path: path != RUNS)]
    return [*made, job("wrong", STUDIES[0], dict(scale="smok"), LFDM_RUNS=empty),
            job("missing", EXPERIMENTS / "thesis.ipynb", dict(scale="smoke"), LFDM_RUNS=empty)]


@pytest.mark.parametrize("study", STUDIES, ids=name)
def test_study_runs(study, outcomes):
    outcome = outcomes[name(study)]
    assert outcome["status"] == 0, outcome["said"][-3000:]


def test_the_smoke_scale_leaves_the_repository_as_it_was(outcomes):
    assert not [str(path) for path, t in state().items() if BEFORE.get(path) != t]


@pytest.mark.parametrize("fault, says", [
    ("wrong", ["Did you mean 'smoke'?"]),
    ("missing", ["no record of study 'thesis'", "Make it: make figures scale=smoke"])])
def test_what_a_study_lacks_is_named(fault, says, outcomes):
    done = outcomes[fault]
    assert done["status"] != 0 and all(words in done["said"] for words in says)


@pytest.mark.parametrize("goal", ["figures", "draw"])
def test_make_refuses_an_unknown_scale_before_any_work(goal):
    command = ["make", "--silent", "--old-file=.venv/ready", goal, "scale=smal"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "unknown scale 'smal'. Valid: full, quick." in done.stderr
    assert "papermill" not in done.stdout
