"""Kills runs, grids, image runs and papermill at random moments, makes them to their end, and counts.

    python tests/kills.py 60                     # every kind in turn; half an hour
    python tests/kills.py 20 1 images papermill  # at other moments, two kinds alone

A process is killed by SIGKILL, SIGTERM or SIGINT. What it began is then made to its end by another one. It
has to be bit-identical to what was never disturbed, and the killed process may leave none behind: a grid has
two workers, papermill a kernel.
"""
import collections
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from joblib.externals.loky import get_reusable_executor

from lfdm.grids import grid, make_grid
from lfdm.images.parameters import ImageParameters
from lfdm.images.task import ImageTask
from lfdm.runs import make_run
from photos import TINY, numbered, write
from tiny import SERVER, content
from tree import ROOT

FEW = dict(dataset="cluster", batch_size=5000, width=4, n_samples=50, sample_steps=20)
OPTIONS = dict(epochs=20, ema=.9, warmup=6, cooldown=9)
KINDS = "run", "grid", "images", "papermill"
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def make(kind, root, photos):
    "In a process that leads a group of its own."
    os.setsid()
    torch.set_num_threads(1)
    if kind == "run": make_run(*grid(**OPTIONS, **FEW), root=root)
    elif kind == "grid":
        make_grid(grid(epochs=10, target=["x", "v"], seed=[0, 1], **FEW), root=root, stack=2, workers=2)
        get_reusable_executor().shutdown()   # which a forked process does not do when it ends
    elif kind == "images":
        ImageTask.save_every = 0   # each epoch, as an hour's run would
        make_run(ImageParameters(**TINY | dict(path=photos, epochs=20, sample_steps=100)), root=root)
    else:
        notebook, to = str(ROOT / "nbs/train.ipynb"), str(Path(root) / "out.ipynb")
        parameters = [word for k, v in (OPTIONS | FEW).items() for word in ("-p", k, str(v))]
        command = [sys.executable, "-m", "papermill", notebook, to, "--no-progress-bar", *parameters]
        os.execve(sys.executable, command, os.environ | {"LFDM_RUNS": str(root), "OMP_NUM_THREADS": "1"})


def start(kind, root, photos):
    child = SERVER.Process(target=make, args=(kind, root, photos))
    child.start()
    return child


def belongs(process, group, root):
    "Is it of that group, or does it write to that folder as papermill's kernel does?"
    try: return os.getpgid(process.pid) == group or process.environ().get("LFDM_RUNS") == str(root)
    except (psutil.Error, OSError): return False   # it has just ended


def left(group, root):
    "The processes of a group and its kernels that still live."
    found = [p for p in psutil.process_iter() if belongs(p, group, root)]
    return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def ended(group, root, seconds=60):
    "Have all ended by themselves? A worker that is still importing ends when it has. The others end here."
    for _ in range(10 * seconds):
        if not left(group, root): return True
        time.sleep(.1)
    for process in left(group, root): process.kill()
    return False


def found(root):
    "The finished runs of a folder: their records but for the environment."
    return {f.name: content(f) for f in sorted(Path(root).glob("train/[!.]*"))}


def whole(kind, root, photos):
    "What is made without a disturbance, and how long that takes."
    begin = time.monotonic()
    start(kind, root, photos).join()
    return found(root), time.monotonic() - begin


def kill(kind, how, after, photos):
    "Kill it after so many seconds and make it to its end: (was it killed, did all end, what it made)."
    with tempfile.TemporaryDirectory() as root:
        child = start(kind, root, photos)
        child.join(after)
        killed = child.is_alive()
        if killed: os.kill(child.pid, how)
        child.join()
        quiet = ended(child.pid, root)
        start(kind, root, photos).join()
        return killed, quiet, found(root)


def main(kills, seed=0, *kinds):
    rng, counts, expected = random.Random(seed), collections.Counter(), {}
    kinds = kinds or KINDS
    with tempfile.TemporaryDirectory() as photos:
        write(photos, numbered())
        for kind in (kinds[0], *kinds):   # the first one waits until everything is imported
            with tempfile.TemporaryDirectory() as root: expected[kind] = whole(kind, root, photos)
            assert expected[kind][0], f"nothing was made: {kind}"
        todo = itertools.islice(itertools.cycle(itertools.product(kinds, SIGNALS)), kills)
        for i, (kind, how) in enumerate(todo, 1):
            records, seconds = expected[kind]
            killed, quiet, made = kill(kind, how, rng.uniform(0, seconds), photos)
            counts.update({kind: 1, f"{kind} killed": killed, f"{kind} bit-identical": made == records,
                           "left processes behind": not quiet})
            print(f"{i:3} {kind} {how.name}: {killed=}, {quiet=}, identical={made == records}", flush=True)
    print(dict(counts))


if __name__ == "__main__": main(*map(int, sys.argv[1:3]), *sys.argv[3:])
