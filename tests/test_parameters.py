"Attempts to break lfdm.parameters: careless values of every field, and names that must stay."
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from papermill.cli import _resolve_type

from lfdm import parameters
from lfdm.parameters import RANGE_FIELDS, RESULTS_VERSION, Parameters, parameters_from, valid_names
from lfdm.tasks import RUN_KINDS, kind_of
from tiny import register, small

REFUSED = (ValueError, TypeError)
WRONG = [math.nan, math.inf, -math.inf, "true", "", "5", None, [], [5], {}, True, False, -1, 10**30, 10**400,
         -10**400, 1j, b"5", torch.tensor([1, 2])]
NUMBERS = ["epochs", "batch_size", "width", "seed", "sample_steps", "n_samples"]
NAMES = dict(dataset="rings", target="epsilon", weighting="weigthed", schedule="cos", sampler="ancestor",
             device="cpuu")
OPTIONS = dict(ema=[0, 1, "0.9", math.nan], clip=[0, math.inf, True], warmup=[-1, None, .5])
OTHER = dict(target="v", weighting="nelbo", schedule="linear", logsnr_min=-9, logsnr_max=9, epochs=4,
             batch_size=99, width=7, lr=2e-3, seed=1, sampler="ddim", sample_steps=6, n_samples=51,
             dataset="ring", ema=.99, clip=1, warmup=10)


@pytest.fixture(autouse=True)
def tiny(monkeypatch): register(monkeypatch)


def real(value): return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- one wrong field

@pytest.mark.parametrize("name", NUMBERS)
def test_wrong_whole_numbers(name):
    for value in [*WRONG, 1.5]:
        with pytest.raises(REFUSED, match=f"^{name} must"): Parameters(**{name: value})


def test_wrong_learning_rates():
    for value in [*WRONG, 0, 0., -1e-3]:
        with pytest.raises(REFUSED, match="^lr must"): Parameters(lr=value)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_options(name):
    for value in OPTIONS[name]:
        with pytest.raises(REFUSED, match=f"^{name} must"): Parameters(**{name: value})


@pytest.mark.parametrize("name", RANGE_FIELDS)
def test_wrong_ends(name):
    for value in [v for v in WRONG if v is not None and not (real(v) and abs(v) < 10)]:
        with pytest.raises((*REFUSED, ZeroDivisionError), match="logsnr"): Parameters(**{name: value})


@pytest.mark.parametrize("ends", [(3, 3), (4, 3), (12.9, None), (None, -12.9), (math.inf, math.inf)])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "ve"])
def test_an_empty_range(schedule, ends):
    given = dict(zip(RANGE_FIELDS, ends), schedule=schedule)
    with pytest.raises(ValueError, match="logsnr"): Parameters(**given)


@pytest.mark.parametrize("choice", [dict(logsnr_min=-300), dict(target="score", logsnr_min=-300),
                                    dict(target="score", logsnr_max=300)], ids=str)
def test_a_range_where_the_target_is_not_defined(choice):
    "in float32 the scale is 0 there; the network must not be trained first"
    with pytest.raises((ValueError, ZeroDivisionError), match="alpha|sigma|logsnr"): Parameters(**choice)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_names(name):
    for value in WRONG:
        with pytest.raises(ValueError, match=f"^unknown {name} .*Valid: "): Parameters(**{name: value})
    hint = f"^unknown {name} '{NAMES[name]}'. Did you mean '.*'. Valid: "
    with pytest.raises(ValueError, match=hint): Parameters(**{name: NAMES[name]})


@pytest.mark.parametrize("name", NUMBERS)
def test_numpy_numbers_are_taken_or_refused_never_ignored(name):
    for value in (np.int64(7), np.float32(7), np.float64(7), np.uint8(7)):
        try: p = Parameters(**{name: value})
        except TypeError as e: assert str(e).startswith(f"{name} must"); continue
        assert type(getattr(p, name)) is int and getattr(p, name) == 7 and json.dumps(dataclasses.asdict(p))


def test_limits():
    Parameters(epochs=1, batch_size=1, width=1, sample_steps=1, n_samples=2, seed=2**63 - 1, lr=1e-300)
    Parameters(batch_size=50_000)
    with pytest.raises(ValueError, match="batch_size 50001 is larger than the data: 50000 training examples"):
        Parameters(batch_size=50_001)
    with pytest.raises(ValueError, match="n_samples must"): Parameters(n_samples=1)


@pytest.mark.parametrize("name", RUN_KINDS)
def test_every_field_is_checked_and_every_registry_shown(name):
    kind = kind_of(name)
    together = {"schedule", *RANGE_FIELDS, "ema", "clip", "warmup", "device"}
    assert set(kind.CHECKS) | together == {f.name for f in dataclasses.fields(kind)}
    for field, registry in kind.NAMES.items():
        assert f"| `{field}` | `{'`, `'.join(registry)}` |" in valid_names(kind)


# ---- names

@pytest.mark.parametrize("name, other", OTHER.items())
def test_every_parameter_has_its_own_name(name, other, monkeypatch):
    assert small(**{name: other}).slug() != (here := small().slug())
    monkeypatch.setattr(parameters, "RESULTS_VERSION", RESULTS_VERSION + 1)
    assert small().slug() != here


@pytest.mark.parametrize("one, other", [
    (dict(epochs=3), dict(epochs=3.)), (dict(lr=1), dict(lr=1.)), ({}, dict(logsnr_min=-12.9)),
    (dict(logsnr_min=0), dict(logsnr_min=-0.)), (dict(seed=0), dict(seed=-0.)),
    (dict(batch_size=100), dict(batch_size=1e2)), (dict(logsnr_max=None), dict(logsnr_max=12.9))], ids=str)
def test_equal_parameters_have_one_name(one, other):
    assert small(**one) == small(**other) and small(**one).slug() == small(**other).slug()


def test_what_was_run_before_a_parameter_was_added_keeps_its_name():
    "names as they were before ema, clip and warmup"
    if RESULTS_VERSION != 2: pytest.skip("the names of results version 2")
    assert Parameters().slug() == "ring-eps-weighted-cosine-s0-e02f69e6"
    old = Parameters(target="v", seed=3, lr=.01, schedule="linear", ema=None, warmup=0.)
    assert old.slug() == "ring-v-weighted-linear-s3-9796387b"
    options = ({}, dict(ema=.9), dict(ema=.99), dict(clip=1), dict(clip=2), dict(warmup=1),
               dict(warmup=1, ema=.9))
    assert len({small(**o).slug() for o in options}) == 7


# ---- a notebook's variables

def test_a_notebooks_variables_become_parameters():
    "modules, functions, hidden names and the shell's own are no parameters"
    space = {"_": 5, "__name__": "x", "_i3": "epochs", "In": [""], "Out": {}, "np": np, "exit": exit}
    found = parameters_from({"epochs": 1e1, "target": "v", "logsnr_min": None} | space)
    assert found == Parameters(epochs=10, target="v")


@pytest.mark.parametrize("wrong, right", [
    ("epoch", "epochs"), ("batchsize", "batch_size"), ("targets", "target"), ("LR", "lr"),
    ("learning_rate", None),
    ("n_sample", "n_samples"), ("Seed", "seed"), ("logsnrmin", "logsnr_min"), ("data_set", "dataset")])
def test_a_misspelt_parameter(wrong, right):
    hint = f"^unknown parameter '{wrong}'. " + (f"Did you mean '{right}'" if right else "Valid")
    for value in (5, 1e3, "true", None, True, [1]):
        with pytest.raises(ValueError, match=hint): parameters_from({wrong: value, "epochs": 3})


@pytest.mark.parametrize("name, value", [
    ("lr", np.float32(.5)), ("seed", np.int64(3)), ("epochs", torch.tensor(3)),
    ("device", torch.device("cpu")),
    ("target", b"v"), ("width", {8}), ("schedule", object())], ids=lambda v: str(v)[:12])
def test_a_parameter_of_an_odd_type_is_not_silently_the_default(name, value):
    try: found = getattr(parameters_from({name: value}), name)
    except REFUSED as e: assert name in str(e)
    else: assert found == value and type(found) in (int, float, str)


@pytest.mark.parametrize("typed", ["1e1", "10", "10.0"])
def test_papermills_numbers(typed):
    given = dict(epochs=_resolve_type(typed), logsnr_min=_resolve_type("None"))
    assert parameters_from(given) == Parameters(epochs=10)


@pytest.mark.parametrize("typed", ["true", "True", "None", "1.5", "nan", "inf", "-3", "1e400", "ten", ""])
def test_papermills_other_values(typed):
    with pytest.raises(REFUSED, match="^epochs must"): parameters_from({"epochs": _resolve_type(typed)})
    with pytest.raises(ValueError, match="^unknown device"): parameters_from({"device": _resolve_type(typed)})


# ---- records

@pytest.mark.parametrize("change, says", [
    (dict(epoch=5), "unknown parameter 'epoch'. Did you mean 'epochs'"),
    (dict(width=...), "parameters missing: width"),
    (dict(device=...), "parameters missing: device"), (dict(epochs="3"), "epochs must")], ids=str)
def test_a_record_that_does_not_fit(change, says):
    record = {k: v for k, v in (dataclasses.asdict(small()) | change).items() if v is not ...}
    with pytest.raises(REFUSED, match=re.escape(says)): Parameters.from_record(record)


def test_a_record_of_another_time_and_another_device():
    record = {k: v for k, v in dataclasses.asdict(small()).items() if k not in Parameters.ADDED}
    assert Parameters.from_record(record) == small()
    assert Parameters.from_record(record | dict(device="cuda:7")).device == "cuda:7"
