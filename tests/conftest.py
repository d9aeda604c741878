"Notebooks run beside the other tests; see beside.py."
import os
import shutil
import tempfile
from collections import Counter

# before torch is imported: threads that compete for a core slow all of them down
os.environ.setdefault("OMP_NUM_THREADS", "1")
# a `make` of a test has its own words, not those of `make test`
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"): os.environ.pop(name, None)
KEPT = tempfile.TemporaryDirectory()   # what is made once, is made once for all tests: nothing of before
os.environ["LFDM_CACHE"] = KEPT.name

import pytest  # noqa: E402

from beside import Beside  # noqa: E402


def waits(item): return "outcomes" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items):
    items.sort(key=waits)   # what waits comes last


def pytest_collection_finish(session):
    modules = dict.fromkeys(item.module for item in session.items if waits(item))
    if modules and not session.config.option.collectonly:
        session.config.beside = Beside([job for module in modules for job in module.jobs()])


def pytest_unconfigure(config):
    if hasattr(config, "beside"): config.beside.close()
    KEPT.cleanup()


def pytest_terminal_summary(terminalreporter, config):
    if getattr(config, "noticed", None):
        terminalreporter.section("Lines of the ledger that notice a change of one side")
        terminalreporter.write_line(", ".join(f"{name} {k}" for name, k in config.noticed.most_common()))
    if not getattr(config, "seconds", None): return
    terminalreporter.section("CPU seconds of the notebooks")
    for name, seconds in sorted(config.seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{seconds:7.1f} {name}")


@pytest.fixture(scope="session")
def outcomes(request):
    "What came of every notebook that ran beside the tests."
    found = request.config.beside.outcomes()
    request.config.seconds = {name: outcome["seconds"] for name, outcome in found.items()}
    return found


@pytest.fixture(scope="session")
def bites(request, outcomes):
    "What every verdict of these notebooks noticed; see bites.py."
    found = request.config.beside.bites()
    request.config.noticed = Counter(name for b in found for name, noticed in b["noticed"].items() if noticed)
    return found


@pytest.fixture(scope="session")
def python():
    "A command that starts at once; see quick.py."
    import quick
    with quick.python() as command: yield command


@pytest.fixture
def copied(whole, tmp_path):
    "A copy of a module's finished run, to be damaged."
    folder = tmp_path / "train" / whole.folder.name
    shutil.copytree(whole.folder, folder)
    return folder
