"The record of a study: small, whole or not there, and drawn from without the runs."
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfdm.data import DATASETS
from lfdm.runs import grid, make_grid
from lfdm.studies import Record, condense, load_record, measured, outside, packed, place, suffixed

SMALL = dict(dataset="cluster", epochs=2, width=8, batch_size=10_000, sample_steps=4, n_samples=50)
MEASURED = dict(steps=[2], epochs=[1, 2], times=[0.5], points=20, arrows=2, logsnr=[3.])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def runs(folder, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(folder))
    return folder


@pytest.fixture
def record(runs):
    return condense(grid(target=["x", "v"], seed=[1, 0], **SMALL), "study", MEASURED)


def test_a_record_comes_back_as_it_was(record):
    path = record.save("study", "smoke")
    again = load_record("study", "smoke")
    assert again.rows == record.rows and again.settings == json.loads(json.dumps(record.settings))
    assert {k: v.dtype for k, v in again.arrays.items()} == {k: v.dtype for k, v in record.arrays.items()}
    assert all(np.array_equal(again.arrays[k], record.arrays[k]) for k in record.arrays)
    assert packed(again.arrays) == path.with_suffix(".npz").read_bytes(), "the same arrays give the same bytes"


def test_rows_and_arrays_are_of_the_same_runs(record, runs):
    for row, curve, few in zip(record.rows, record.arrays["loss_curve"], record.arrays["quality"]):
        metrics = [json.loads(line) for line in (runs / "study" / row["run"] / "metrics.jsonl").read_text().splitlines()]
        assert np.allclose(curve, [m["loss"] for m in metrics])
        assert few[-1, 0] == np.float32(row["mean_distance"]) and row["run"].startswith(f"cluster-{row['target']}")


def test_samples_are_kept_for_the_first_seed_alone(record):
    assert [r["seed"] for r in record.rows] == [0, 0, 1, 1] and len(record.arrays["samples"]) == 2
    assert record.values("samples", seed=0, target="v").shape == (1, 20, 2)
    with pytest.raises(ValueError, match="first 2 of 4"): record.values("samples", target="v")


@pytest.mark.parametrize("ask, says", [
    (dict(name="loss_curv"), "Did you mean 'loss_curve'"), (dict(name="loss", targets="x"), "Did you mean 'target'"),
    (dict(name="loss", target="eps"), "unknown target 'eps'. Valid: 'x', 'v'"), (dict(name="loss", seed=7), r"no run has seed = 7, only \[0, 1\]")])
def test_what_is_not_in_a_record_is_named(record, ask, says):
    with pytest.raises(ValueError, match=says): record.values(**ask)


def test_an_array_longer_than_the_runs_is_refused():
    with pytest.raises(ValueError, match="'a' has 2 entries for 1 runs"): Record({}, [{}], {"a": np.zeros(2)})


@pytest.mark.parametrize("which", [".json", ".npz"])
def test_a_missing_or_damaged_record_names_the_command(record, which):
    path = record.save("study", "smoke").with_suffix(which)
    whole = path.read_bytes()
    for damage in (whole[:len(whole) // 2], b"", b"nonsense", whole[:-40] + bytes(40)):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged.*Make it: make figures scale=smoke"): load_record("study", "smoke")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"study-smoke{which} is missing. Make it: papermill x"): load_record("study", "smoke", "papermill x")


def test_a_half_written_record_is_not_taken_for_one(record, monkeypatch):
    "killed between the arrays and the rows: the old rows do not belong to the new arrays"
    record.save("study", "smoke")
    other = Record(record.settings, record.rows, record.arrays | {"loss_curve": record.arrays["loss_curve"] + 1})
    def die(a, b):
        if str(b).endswith(".json"): raise OSError("disk full")
        replace(a, b)

    replace = os.replace
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="disk full"): other.save("study", "smoke")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ValueError, match="do not belong together"): load_record("study", "smoke")


def test_measurements_are_made_once_and_again_if_damaged(record, runs):
    row = record.rows[0]
    first = measured(runs / "study" / row["run"], MEASURED)
    path, = (runs / "study" / "measured").glob(f"{row['run']}-*.npz")
    before = path.stat().st_mtime_ns
    measured(runs / "study" / row["run"], MEASURED)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:100])
    again = measured(runs / "study" / row["run"], MEASURED)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    other = measured(runs / "study" / row["run"], MEASURED | {"steps": [2, 3]})
    assert other["quality"].shape == (3, 4) and len(list(path.parent.glob(f"{row['run']}-*.npz"))) == 2


def test_scales_have_their_own_places(runs):
    assert suffixed("a", "full") == "a" and suffixed("a", "quick") == "a-quick"
    assert place("records", "smoke").is_relative_to(runs) and not place("records", "quick").is_relative_to(runs)
    with pytest.raises(ValueError, match="Did you mean 'quick'"): place("records", "quik")


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(DATASETS)), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_share_outside_is_that_of_the_data_for_the_data(name, q):
    dataset = DATASETS[name]()
    spread = (q * (1 - q) * (1 / 5000 + 1 / 50_000))**0.5
    assert abs(outside(dataset.sample(5000, seed=11), dataset, q) - q) < 5 * spread
    assert outside(torch.full((10, 2), 50.), dataset, q) == 1


# ---- several processes

def test_two_processes_give_what_one_gives(tmp_path):
    parameters = grid(target=["x", "eps", "v"], **SMALL)
    one, _ = make_grid(parameters, root=tmp_path / "one", stack=1)
    two, _ = make_grid(parameters, root=tmp_path / "two", stack=1, workers=2)
    assert list(one) == list(two) == parameters
    for p in parameters:
        assert two[p].environment["threads"] == 1 and two[p].summary["loss"] == pytest.approx(one[p].summary["loss"], rel=1e-4)
        assert (one[p].samples - two[p].samples).abs().max() < 1e-2


def test_an_error_in_one_process_is_told_and_the_finished_runs_stay(tmp_path):
    parameters = grid(target=["x", "eps", "v", "score"], **SMALL)
    (tmp_path / "train").mkdir()
    whole, _ = make_grid(parameters[:1], root=tmp_path)
    (tmp_path / "train" / f".{parameters[2].slug()}.partial").write_text("in the way")
    with pytest.raises(OSError, match="cannot write runs"): make_grid(parameters, root=tmp_path, stack=1, workers=2)
    (tmp_path / "train" / f".{parameters[2].slug()}.partial").unlink()
    again, _ = make_grid(parameters, root=tmp_path, stack=1, workers=2)
    assert len(again) == 4 and again[parameters[0]].environment == next(iter(whole.values())).environment


def endless(root): make_grid(grid(target=["x", "v"], **SMALL | {"epochs": 100_000}), root=root, stack=1, workers=2)


def test_a_killed_study_leaves_no_process_behind(tmp_path):
    "the workers hold the locks of their runs: if they lived on, the study could not be resumed"
    parent = multiprocessing.get_context("spawn").Process(target=endless, args=(tmp_path,))
    parent.start()
    def wait(condition, what):
        for _ in range(600):
            if condition(): return
            time.sleep(0.1)
        raise AssertionError(what)
    wait(lambda: len(list((tmp_path / "train").glob(".stack-*.safetensors"))) == 2, "no training began")
    os.kill(parent.pid, signal.SIGKILL); parent.join()
    def quiet():
        before = [f.stat().st_mtime_ns for f in (tmp_path / "train").glob(".stack-*.safetensors")]
        time.sleep(1.5)
        return before == [f.stat().st_mtime_ns for f in (tmp_path / "train").glob(".stack-*.safetensors")]
    wait(quiet, "the workers live on")
