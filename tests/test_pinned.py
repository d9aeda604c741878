"Names, reprs, points and small runs stay what they were, bit for bit: older records keep their meaning."
import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pinned
from lfdm.images import parameters
from lfdm.runs import load_run

STORED = {path.stem: json.loads(path.read_text()) for path in pinned.FOLDER.glob("*.json")}
RUNS = sorted(path for path in (pinned.FOLDER / "runs").glob("*/*") if path.is_dir())
HERE = pinned.machine() == STORED["machine"]   # elsewhere the last bits of a sum may differ
BITS = STORED["bits"].get(pinned.products(), {}) if HERE else {}   # if it adds up in its own way


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The runs, made anew."
    threads = torch.get_num_threads()
    root = tmp_path_factory.mktemp("pinned")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LFDM_RUNS", str(root))   # the classifier that judges digits is kept there too
        folders = pinned.make(root)
    torch.set_num_threads(threads)
    return {folder.name: folder for folder in folders}


def test_names_and_reprs(monkeypatch):
    monkeypatch.setattr(parameters, "require_network", cache(parameters.require_network))   # once for each
    now = pinned.names()
    assert now.keys() >= STORED["names"].keys()
    assert {k: v for k, v in now.items() if k in STORED["names"]} == STORED["names"]


def test_points():
    now = pinned.points()
    for name, points in STORED["points"].items():
        if HERE or isinstance(points, str): assert now[name] == points, name
        else: np.testing.assert_allclose(now[name], points, rtol=1e-12)


def test_every_pinned_run_is_made(made):
    assert sorted(made) == sorted(folder.name for folder in RUNS)


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_run_made_before_loads_and_is_made_again_alike(folder, made):
    before, now = load_run(folder), load_run(made[folder.name])
    assert before.parameters == now.parameters and repr(before.loss) == repr(now.loss)
    kept, new = (load_file(f / "model.safetensors") for f in (folder, made[folder.name]))
    assert kept.keys() == new.keys()
    exact = HERE and folder.name not in BITS
    near = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=1e-4)
    for k in kept: torch.testing.assert_close(new[k], kept[k], **near)
    if folder.name in BITS: assert pinned.bits(now) == BITS[folder.name]
    if exact:
        assert before.samples.equal(now.samples)
        assert before.metrics == now.metrics and before.summary == now.summary
    then, today = (json.loads((f / "params.json").read_text()) for f in (folder, made[folder.name]))
    assert [*then, "sha256"] == list(today)
    assert now.parameters.completed(then["parameters"]) == today["parameters"]
