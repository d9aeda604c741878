"Every notebook runs from top to bottom, as nbdev_test runs it, but each in a process of its own."
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import lfdm.ledger as ledger
from beside import job
from tree import ROOT, cells, name, notebooks

# to show that they run; test_train_notebook.py and test_workflow.py look at what they make
SHORT = {ROOT / "nbs/train.ipynb": dict(dataset="cluster", epochs=2, width=8, batch_size=5000,
                                        n_samples=200, sample_steps=4),
         ROOT / "nbs/train_images.ipynb": dict(network="small(width=4)", epochs=1, batch_size=500,
                                               n_samples=10, sample_steps=2, judged=10)}


def shown(path):
    "Is a notebook for reading alone? The studies are, to nbdev_test: test_experiments.py runs them."
    return any("skip_exec: true" in source for kind in ("raw", "markdown") for source, _ in cells(path, kind))


RUN = [path for path in notebooks() if not shown(path)]


def broken():
    "A notebook that fails in its second cell."
    path = Path(tempfile.mkdtemp()) / "broken.ipynb"
    code = map(new_code_cell, ("a = 0", "b = 1 / a", "raise KeyError('never')"))
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(new_notebook(cells=list(code), metadata=dict(kernelspec=kernel)), path)
    return path


def jobs():
    path = broken()
    whole = [job(name(path), path, SHORT.get(path), cwd=path.parent) for path in RUN]
    return whole + [job("broken", path), job("broken with parameters", path, dict(scale="smoke"))]


@pytest.mark.parametrize("notebook", RUN, ids=name)
def test_notebook_runs(notebook, outcomes):
    outcome = outcomes[name(notebook)]
    assert outcome["status"] == 0, outcome["said"][-3000:]


@pytest.mark.parametrize("how", ["broken", "broken with parameters"])
def test_a_notebook_that_fails_is_told(how, outcomes):
    status, said = outcomes[how]["status"], outcomes[how]["said"]
    assert status == 1 and "ZeroDivisionError" in said and "never" not in said


def test_every_line_of_the_ledger_bites(bites):
    "Off by a sign, a factor of 1.05 or a power, none of them would have been printed."
    zero = {b["source"] for b in bites if "shift" in b["noticed"] and ledger.named(b["source"])}
    dull = [f"{b['by']}: {b['source']}: {b['noticed']}" for b in bites
            if not all(b["noticed"].values()) or b["source"] in zero]
    assert not dull, "\n".join(dull)
    seen = {b["source"] for b in bites}
    here = {path.relative_to(ledger.NBS).as_posix() for path in RUN}
    lines = [l.source for l in ledger.checks() if l.equations and l.place.address.partition("#")[0] in here]
    assert set(lines) <= seen, f"printed by hand: {set(lines) - seen}"


def test_every_notebook_is_run_here_or_as_a_study():
    assert {path.parent.name for path in notebooks() if path not in RUN} == {"experiments"}
