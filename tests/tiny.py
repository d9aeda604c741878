"Runs small enough for tests, and what of a finished run must not depend on how it came about."
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from lfdm.data import DATASETS, GaussianMixture
from lfdm.parameters import Parameters
from lfdm.runs import FILES, beside, folder_of

SMALL = dict(dataset="tiny", epochs=3, batch_size=100, width=6, n_samples=50, sample_steps=5)

# Other processes are forked from a clean one that has imported all that a run imports: a start takes no time.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["lfdm.runs", "pytest", "scipy.integrate", "scipy.interpolate", "torch._dynamo"])


class Tiny(GaussianMixture):
    "Small enough for a run in half a second; the last batch has one example."
    n_train = n_test = 301
    def __init__(self): super().__init__([[0., 0.], [2., 1.]], [.5, .8])


def small(**kw): return Parameters(**SMALL | kw)


def register(monkeypatch): monkeypatch.setitem(DATASETS, "tiny", Tiny)


def made(tmp_path_factory, make):
    "What `make(root)` makes, for a whole module."
    with pytest.MonkeyPatch.context() as m:
        register(m)
        return make(tmp_path_factory.mktemp("whole"))


def content(folder):
    "The record but for its environment; there is nothing else in the folder."
    folder = Path(folder)
    assert set(os.listdir(folder)) == set(FILES)
    record = json.loads((folder / "params.json").read_text())
    with np.load(folder / "samples.npz") as f: samples = f["samples"].tobytes()
    texts = [(folder / name).read_text() for name in ("metrics.jsonl", "summary.json")]
    return ((folder / "model.safetensors").read_bytes(), samples, *texts, record["parameters"],
            record["results_version"])


def tree(folder):
    "Every file below a folder with its bytes."
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def same(a, b):
    "Have two dicts the same arrays, of the same types?"
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def part(p, root): return beside(folder_of(p, root=root), "partial")


class Stopped(BaseException): pass


def stop_at(phase, done):
    "A progress that ends the work there, as a signal would."
    def progress(*now):
        if now[:2] == (phase, done): raise Stopped
    return progress
