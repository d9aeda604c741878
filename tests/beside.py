"""Notebooks run beside the tests, on the cores that these leave idle.

One process imports what notebooks import, and each notebook runs in a fork of it: alone, from top to
bottom, without the seconds that a new Python needs for torch. conftest.py begins it before the first test,
with the jobs of the modules whose tests want the outcomes, and puts these tests last.
"""
import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
IMPORTED = ("IPython.display", "execnb.shell", "fastcore.test", "matplotlib.pyplot", "nbdev.test", "sympy",
            "papermill.parameterize", "papermill.iorw", "torch._dynamo", "lfdm.plots", "lfdm.runs",
            "lfdm.studies")
WORKERS = max(1, min(CORES, 5))   # they stand back for the tests


def job(name, notebook, parameters=None, after=None, cwd=ROOT, **env):
    "A notebook to run: as nbdev_test does, or with parameters; after the job of that name has ended."
    return dict(name=name, notebook=str(notebook), parameters=parameters, after=after, cwd=str(cwd), env=env)


# ---- in the tests

class Beside:
    "The process that runs the jobs, and what came of them."

    def __init__(self, jobs):
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "jobs.json").write_text(json.dumps(jobs))
        runs = str(Path(self.folder.name) / "runs")
        shared = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "LFDM_RUNS": runs}   # as are the cores
        with (Path(self.folder.name) / "log").open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, self.folder.name], cwd=ROOT, env=os.environ | shared,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def outcomes(self):
        "For each job's name its exit status, what it said, and its CPU seconds. Waits for the last."
        code, log = self.process.wait(), Path(self.folder.name) / "log"
        assert code == 0, f"the notebooks did not come to their end: {log.read_text()[-3000:]}"
        return json.loads((Path(self.folder.name) / "outcomes.json").read_text())

    def bites(self):
        "What bites.py saw of every verdict of the notebooks."
        self.outcomes()
        return [json.loads(line) for line in (Path(self.folder.name) / "bites").read_text().splitlines()]

    def close(self):
        "Leave nothing behind, whenever the tests end."
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.folder.cleanup()


# ---- in the process beside them

def execute(job, folder):
    "Run one notebook; its traceback goes to stderr. The exit status."
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    notebook, copy = Path(job["notebook"]), folder / f"{Path(job['name']).stem}.ipynb"
    if not job["parameters"]:
        from nbdev.test import test_nb
        return not test_nb(notebook, skip_flags=["notest"], basepath=ROOT)[0]
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from papermill.iorw import load_notebook_node, write_ipynb
    from papermill.parameterize import parameterize_notebook
    write_ipynb(parameterize_notebook(load_notebook_node(str(notebook)), job["parameters"]), str(copy))
    shell = CaptureShell(mpl_format="png")
    sys.path.insert(0, str(ROOT))
    shell.run("import matplotlib; matplotlib.use('agg')")
    try: shell.run_all(read_nb(copy), exc_stop=True)
    except Exception:
        sys.stderr.write(shell.prettytb(fname=notebook))
        return 1
    return 0


def start(job, folder, log):
    """Run one notebook in a fork of this process; its id.

    To take down all that was imported would cost the fork two seconds: it leaves after its exit functions.
    """
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        code = int(execute(job, folder))
        atexit._run_exitfuncs()
    except BaseException: traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def ended(tests):
    "Wait for a fork to end: its id, status and use. If the tests are killed meanwhile, all of this ends."
    while not (found := os.wait4(-1, os.WNOHANG))[0]:
        if os.getppid() != tests: os.killpg(0, signal.SIGKILL)
        time.sleep(0.05)
    return found


def main(folder, tests):
    os.nice(10)
    import bites
    for name in IMPORTED: importlib.import_module(name)
    bites.watch(folder / "bites")
    gc.collect(), gc.freeze()   # what is imported is not looked through for garbage in every fork
    waiting, running, outcomes = json.loads((folder / "jobs.json").read_text()), {}, {}
    (folder / "runs").mkdir()
    while waiting or running:
        free = [job for job in waiting if job["after"] in (None, *outcomes)]
        for following in free[:WORKERS - len(running)]:
            waiting.remove(following)
            log = folder / f"{len(waiting)}.txt"
            running[start(following, folder, log)] = following["name"], log
        pid, status, used = ended(tests)
        name, log = running.pop(pid)
        outcomes[name] = dict(status=os.waitstatus_to_exitcode(status), said=log.read_text(errors="replace"),
                              seconds=used.ru_utime + used.ru_stime)
    (folder / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__": main(Path(sys.argv[1]), os.getppid())
