"Attempts to break lfdm.parameters: careless values of every field, and names that must stay."
import dataclasses
import re

import numpy as np
import pytest
import torch
from papermill.cli import _resolve_type

from lfdm import parameters
from lfdm.adaptive import AdaptiveSchedule
from lfdm.data import DATASETS
from lfdm.parameters import RANGE_FIELDS, RESULTS_VERSION, Parameters, parameters_from, valid_names
from lfdm.runs import beside, folder_of
from lfdm.schedules import Schedule
from lfdm.tasks import RUN_KINDS, kind_of
from tiny import Tiny, register, small

REFUSED = (ValueError, TypeError)
OTHER = dict(target="v", weighting="nelbo", error="huber", schedule="linear", logsnr_min=-9, logsnr_max=9,
             epochs=4, lr=2e-3, batch_size=99, width=7, seed=1, sampler="ddim", sample_steps=6, n_samples=51,
             dataset="ring", ema=.99, clip=1, warmup=10, cooldown=10, precision="bf16")


@pytest.fixture(autouse=True)
def tiny(monkeypatch): register(monkeypatch)


# ---- fields that do not fit

@pytest.mark.parametrize("ends", [(3, 3), (12.9, None), (None, -12.9), (None, 300)])
@pytest.mark.parametrize("choice", [dict(schedule="cosine"), dict(schedule="linear"), dict(schedule="ve"),
                                    dict(schedule="edm_sample(rho=0.1)"), dict(target="score")], ids=str)
def test_a_range_that_cannot_be(choice, ends):
    "it is empty, or in float32 a scale is 0 there: the network must not be trained first"
    with pytest.raises(ValueError, match="alpha|sigma|logsnr"):
        Parameters(**choice, **dict(zip(RANGE_FIELDS, ends)))


def test_limits():
    Parameters(epochs=1, batch_size=1, width=1, sample_steps=1, n_samples=2, seed=2**32 - 1, lr=1e-300)
    with pytest.raises(ValueError, match="^batch_size 50001 is larger than the data: 50000"):
        Parameters(batch_size=50_001)
    with pytest.raises(ValueError, match="^rho must be at least 0.114 for logsnr from -80 to 80, not 0.1"):
        Parameters(schedule="edm_sample(rho=0.1)", logsnr_min=-80, logsnr_max=80)


@pytest.mark.parametrize("name", RUN_KINDS)
def test_every_field_is_checked_and_every_registry_shown(name):
    kind = kind_of(name)
    together = {"schedule", *RANGE_FIELDS, "ema", "clip", "warmup", "cooldown", "device"}
    assert set(kind.CHECKS) | together == {f.name for f in dataclasses.fields(kind)}
    for field, registry in kind.NAMES.items():
        assert f"| `{field}` | `{'`, `'.join(registry)}` |" in valid_names(kind)


# ---- names

def test_every_parameter_has_its_own_name(monkeypatch):
    here = small().slug()
    for name, other in OTHER.items(): assert small(**{name: other}).slug() != here, name
    monkeypatch.setattr(parameters, "RESULTS_VERSION", RESULTS_VERSION + 1)
    assert small().slug() != here


def test_equal_parameters_have_one_name():
    for one, other in ((dict(epochs=3, lr=1), dict(epochs=3., lr=1.)), ({}, dict(logsnr_max=None, clip=None)),
                       (dict(logsnr_min=0, seed=0), dict(logsnr_min=-0., seed=-0.))):
        assert small(**one) == small(**other) and small(**one).slug() == small(**other).slug()


@pytest.mark.parametrize("name", ["../../x", "a\\b", "a\nb\0", "\ud800\u2028", "ü" * 120])
def test_a_name_is_that_of_one_folder_whatever_its_data_are_called(name, tmp_path, monkeypatch):
    "image folders as well: their path may stand in the name of the set"
    monkeypatch.setitem(DATASETS, name, Tiny)
    images = kind_of("images")(dataset=f"folder(path='{name}')", content="1x8x8, 17 values, 3d019220")
    for p in (small(dataset=name), images):
        folder = folder_of(p, root=tmp_path)
        assert folder.parent == tmp_path / "train" and re.fullmatch(r"[^./\\\n\0][^/\\\n\0]+", p.slug())
        beside(folder, "partial").mkdir(parents=True, exist_ok=True)


# ---- a notebook's variables

def test_a_notebooks_variables_become_parameters():
    "modules, functions, hidden names and the shell's own are no parameters"
    space = {"_": 5, "__name__": "x", "_i3": "epochs", "In": [""], "Out": {}, "np": np, "exit": exit}
    given = {k: _resolve_type(v) for k, v in dict(epochs="1e1", target="v", logsnr_min="None").items()}
    assert parameters_from(given | space) == Parameters(epochs=10, target="v")


def test_a_misspelt_parameter():
    for value in (5, "true", None, [1]):
        with pytest.raises(ValueError, match="^unknown parameter 'LR'. Did you mean 'lr'"):
            parameters_from({"LR": value, "epochs": 3})


@pytest.mark.parametrize("name, value", [
    ("epochs", np.int64(7)), ("width", np.float32(7)), ("lr", np.float32(.5)), ("epochs", torch.tensor(3)),
    ("width", {8}), ("target", b"v"), ("schedule", object())], ids=lambda v: str(v)[:12])
def test_a_parameter_of_an_odd_type_is_taken_or_refused_never_ignored(name, value):
    try: found = getattr(parameters_from({name: value}), name)
    except REFUSED as e: assert name in str(e)
    else: assert found == value and type(found) is (float if name == "lr" else int)


# ---- records

@pytest.mark.parametrize("change, says", [
    (dict(epoch=5), "unknown parameter 'epoch'. Did you mean 'epochs'"),
    (dict(width=..., device=...), "parameters missing: device, width")], ids=str)
def test_a_record_that_does_not_fit(change, says):
    record = {k: v for k, v in (dataclasses.asdict(small()) | change).items() if v is not ...}
    with pytest.raises(ValueError, match=re.escape(says)): Parameters.from_record(record)


def test_a_record_of_another_time_and_another_device():
    record = {k: v for k, v in dataclasses.asdict(small()).items() if k not in Parameters.ADDED}
    assert Parameters.from_record(record) == small()
    assert Parameters.from_record(record | dict(device="cuda:7")).device == "cuda:7"


def test_only_a_schedule_whose_numbers_changed_has_another_name(monkeypatch):
    "a mend of what small batches learn, or of lost levels, must not be taken for a run from before"
    shifted = "shifted_cosine(shift=10)"
    adaptive = dict(schedule="adaptive", weighting="nelbo")
    ordinary = [Parameters(**adaptive), Parameters(), Parameters(schedule="shifted_cosine")]
    changed = [Parameters(batch_size=4, **adaptive), Parameters(schedule=shifted)]
    before = [p.slug() for p in (*ordinary, *changed)]
    for schedule in (AdaptiveSchedule, Schedule):
        monkeypatch.setattr(schedule, "version", lambda self, n=None: 1)
    after = [p.slug() for p in (*ordinary, *changed)]
    assert after[:3] == before[:3] and not set(after[3:]) & set(before)
