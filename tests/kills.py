"""Kills runs and grids at random moments, makes them to their end, and counts.

    python tests/kills.py 40      # half of them single runs, half grids of two workers; a quarter of an hour
    python tests/kills.py 40 1    # at other moments

A process is killed by SIGKILL, SIGTERM or SIGINT. What it began is then made to its end by another one. It
has to be bit-identical to what was never disturbed, and the killed process may leave none behind.
"""
import collections
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from joblib.externals.loky import get_reusable_executor

from lfdm.grids import grid, make_grid
from lfdm.runs import make_run
from tiny import SERVER, content

FEW = dict(dataset="cluster", batch_size=5000, width=4, n_samples=50, sample_steps=20)
ASKED = {"run": grid(epochs=20, ema=.9, warmup=6, **FEW),
         "grid": grid(epochs=10, target=["x", "v"], seed=[0, 1], **FEW)}
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def make(kind, root):
    "In a process that leads a group of its own."
    os.setsid()
    torch.set_num_threads(1)
    if kind == "run": make_run(*ASKED[kind], root=root)
    else:
        make_grid(ASKED[kind], root=root, stack=2, workers=2)
        get_reusable_executor().shutdown()   # which a forked process does not do when it ends


def start(kind, root):
    child = SERVER.Process(target=make, args=(kind, root))
    child.start()
    return child


def alive(group):
    "Are there processes of that group?"
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def ended(group, seconds=60):
    "Have all of a group ended by themselves? A worker that is still importing ends when it has; others here."
    for _ in range(10 * seconds):
        if not alive(group): return True
        time.sleep(.1)
    os.killpg(group, signal.SIGKILL)
    return False


def found(root):
    "The finished runs of a folder: their records but for the environment."
    return {f.name: content(f) for f in sorted(Path(root).glob("train/[!.]*"))}


def whole(kind, root):
    "What is made without a disturbance, and how long that takes."
    begin = time.monotonic()
    start(kind, root).join()
    return found(root), time.monotonic() - begin


def kill(kind, how, after):
    "Kill it after so many seconds and make it to its end: (was it killed, did all end, what it made)."
    with tempfile.TemporaryDirectory() as root:
        child = start(kind, root)
        child.join(after)
        killed = child.is_alive()
        if killed: os.kill(child.pid, how)
        child.join()
        quiet = ended(child.pid)
        start(kind, root).join()
        return killed, quiet, found(root)


def main(kills, seed=0):
    rng, counts, expected = random.Random(seed), collections.Counter(), {}
    for kind in ("run", *ASKED):   # the first one waits until everything is imported
        root = tempfile.mkdtemp()
        expected[kind] = whole(kind, root)
        shutil.rmtree(root)
    todo = list(itertools.islice(itertools.cycle(itertools.product(ASKED, SIGNALS)), kills))
    for i, (kind, how) in enumerate(todo, 1):
        records, seconds = expected[kind]
        killed, quiet, made = kill(kind, how, rng.uniform(0, seconds))
        counts.update({f"{kind}s": 1, f"{kind}s killed": killed, f"{kind}s bit-identical": made == records,
                       "left processes behind": not quiet})
        print(f"{i:3} {kind} {how.name}: {killed=}, {quiet=}, identical={made == records}", flush=True)
    print(dict(counts))


if __name__ == "__main__": main(*map(int, sys.argv[1:]))
