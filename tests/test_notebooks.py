"Every notebook runs from top to bottom: one run of nbdev_test, one test for each notebook."
import os
import re
import subprocess
import sys

import pytest

from tree import ROOT, name, notebooks

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(CORES, 4)
# what the command `nbdev_test` calls
NBDEV_TEST = f"from nbdev.test import nbdev_test; nbdev_test(n_workers={WORKERS}, do_print=True, timing=True)"


@pytest.fixture(scope="module")
def failed(request):
    "The names of the notebooks that failed. What nbdev_test says is shown while it runs, it may take minutes."
    # side by side, each notebook has its share of the cores: threads that compete slow all of them down
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, CORES // WORKERS)), "MPLBACKEND": "agg", "PYTHONUNBUFFERED": "1"}
    said = []
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\nnbdev_test")
        with subprocess.Popen([sys.executable, "-c", NBDEV_TEST], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            for line in process.stdout:
                said.append(line)
                if not line.startswith("Starting"): print(line.replace(f"{ROOT}/", ""), end="", flush=True)
    found = set(re.findall(r"^\t(\S+\.ipynb)$", "".join(said), re.M))
    assert process.returncode == 0 or found, "nbdev_test did not come to its end: see above"
    return found


@pytest.mark.parametrize("notebook", notebooks(), ids=name)
def test_notebook_runs(notebook, failed):
    assert notebook.name not in failed, "its traceback stands above, in what nbdev_test says"
