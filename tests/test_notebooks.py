"Every notebook runs from top to bottom, as nbdev_test runs it, but each in a process of its own."
import pytest

from beside import job
from tree import ROOT, cells, name, notebooks

# 100 epochs and 512 steps are of no use here: what they lead to is a study's business
SHORT = {ROOT / "nbs/train.ipynb": dict(epochs=3, sample_steps=64)}


def shown(path):
    "Is a notebook for reading alone? The studies are, to nbdev_test: test_studies.py runs them."
    return any("skip_exec: true" in source for kind in ("raw", "markdown") for source, _ in cells(path, kind))


RUN = [path for path in notebooks() if not shown(path)]


def jobs(): return [job(name(path), path, SHORT.get(path, {}), cwd=path.parent) for path in RUN]


@pytest.mark.parametrize("notebook", RUN, ids=name)
def test_notebook_runs(notebook, outcomes):
    outcome = outcomes[name(notebook)]
    assert outcome["status"] == 0, outcome["said"][-3000:]


def test_every_notebook_is_run_here_or_as_a_study():
    assert {path.parent.name for path in notebooks() if path not in RUN} == {"experiments"}
