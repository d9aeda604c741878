"The record of a study: small, whole or not there, and drawn from without the runs."
import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfdm.data import DATASETS
from lfdm.grids import grid, make_grid
from lfdm.parameters import Parameters
from lfdm.studies import Record, all_cached, cached_arrays, condense, load_record, make_record, measured, npz_bytes, outside, place, suffixed, write_whole

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
    assert npz_bytes(again.arrays) == path.with_suffix(".npz").read_bytes(), "the same arrays give the same bytes"


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


def test_a_record_from_before_a_parameter_was_added_is_of_its_default(record, runs):
    "it is not taken for a study of other parameters, and one of other parameters is still refused"
    old = [{k: v for k, v in row.items() if k not in Parameters.ADDED} for row in record.rows]
    Record(record.settings, old, record.arrays).save("old", "smoke")
    asked = grid(target=["x", "v"], seed=[1, 0], **SMALL)
    with pytest.raises(ValueError, match=r"exists with other parameters: ema \[None\], not \[0.5, None\]; warmup \[0\], not \[0, 3\]\. Choose"):
        make_record("old", asked[1:] + grid(target="x", ema=.5, warmup=3, **SMALL), MEASURED, "smoke")
    make_record("old", asked, MEASURED, "smoke")
    assert all({"ema", "clip", "warmup"} <= set(row) for row in load_record("old", "smoke").rows)


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


# ---- measurements that are kept

ARRAYS = {"a": np.arange(6.).reshape(2, 3), "b": np.array(3, dtype=np.int16), "c": np.array(["x", "yy"]), "d": np.zeros((0, 2), np.float16)}


def same(a, b): return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def counted(arrays=ARRAYS):
    "make(), and the list that grows with each call"
    calls = []
    return lambda: calls.append(1) or arrays, calls


def test_what_is_kept_is_made_once_and_comes_back_as_it_was(tmp_path):
    make, calls = counted()
    path = tmp_path / "deep" / "er" / "a.npz"
    assert all(same(cached_arrays(p, make), ARRAYS) for p in (path, path, str(path))) and len(calls) == 1
    assert [f.name for f in path.parent.iterdir()] == ["a.npz"] and path.read_bytes() == npz_bytes(ARRAYS)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"nonsense", lambda b: b[:1], lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:],
                                    lambda b: bytes(len(b)), lambda b: npy(np.arange(3)), lambda b: npz_bytes({"a": np.array([{}], dtype=object)})], ids=range(9))
def test_a_damaged_file_is_made_again(tmp_path, damage):
    "cut anywhere, one bit of the data turned, another kind of file, one that would have to be unpickled"
    make, calls = counted({"a": np.arange(100.)})
    path = tmp_path / "a.npz"
    cached_arrays(path, make)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert same(cached_arrays(path, make), make()) and path.read_bytes() == whole and same(cached_arrays(path, make), make()) and len(calls) == 4
    assert [f.name for f in tmp_path.iterdir()] == ["a.npz"]


def npy(a):
    import io
    with io.BytesIO() as f: np.save(f, a); return f.getvalue()


def full(path, content):
    with open(path, "wb") as f: f.write(content[:len(content) // 2])
    raise OSError(errno.ENOSPC, "No space left on device")


def refused(*a, **kw): raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("where, fails, says", [((Path, "write_bytes"), full, "No space left"), ((Path, "write_bytes"), refused, "Read-only"), ((os, "replace"), refused, "Read-only"),
                                                ((Path, "mkdir"), refused, "Read-only")], ids=["full", "read-only", "rename", "folder"])
def test_a_disk_that_takes_nothing_is_told_and_keeps_what_it_had(tmp_path, monkeypatch, where, fails, says):
    make, calls = counted()
    for before in (None, b"damaged"):
        path = tmp_path / "a.npz"
        if before: path.write_bytes(before)
        with monkeypatch.context() as m:
            m.setattr(*where, fails)
            with pytest.raises(OSError, match=says): cached_arrays(path, make)
        assert [f.read_bytes() for f in tmp_path.iterdir()] == ([before] if before else []), "half a file, or a draft, was left"
    assert same(cached_arrays(path, make), ARRAYS) and len(calls) == 3


def test_a_file_that_is_whole_stays_when_another_cannot_replace_it(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_whole(path, b"old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError): write_whole(path, b"newer")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_what_fails_while_it_is_made_leaves_nothing(tmp_path):
    def fail(): raise RuntimeError("measured in vain")
    with pytest.raises(RuntimeError, match="in vain"): cached_arrays(tmp_path / "a.npz", fail)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def place_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    return tmp_path


def test_an_interrupted_set_goes_on_where_it_stopped(place_for_all):
    made, stop = [], [2]
    def make(i, name="a"):
        if len(made) == stop[0]: raise KeyboardInterrupt
        made.append(i); return {"value": np.array([i])}
    grid_of = [dict(i=i) for i in range(5)]
    with pytest.raises(KeyboardInterrupt): all_cached("study", "smoke", grid_of, make)
    assert made == [0, 1]
    stop[0], reports = None, []
    results = all_cached("study", "smoke", grid_of, make, progress=lambda *a: reports.append(a))
    assert made == [0, 1, 2, 3, 4] and [r["value"].item() for r in results] == [0, 1, 2, 3, 4]
    assert reports == [("measure", k, 5) for k in range(6)]
    again = all_cached("study", "smoke", [dict(i=4), dict(i=0), dict(i=4)], make)
    assert [r["value"].item() for r in again] == [4, 0, 4] and len(made) == 5
    assert all_cached("study", "smoke", [], make) == []


def test_settings_are_told_apart_and_studies_and_scales_too(place_for_all):
    made = []
    def make(**kw): made.append(kw); return {"value": np.array(len(made))}
    settings_of = [dict(a=1, b=2), dict(a=2, b=1), dict(a=1), dict(a="1"), dict(a=1.5), dict(a=None), dict(a=True), dict(a=[1, 2]), dict(a=[2, 1]), dict(a={"c": 1})]
    assert [r["value"].item() for r in all_cached("one", "smoke", settings_of, make)] == list(range(1, 11)) and made == settings_of
    all_cached("one", "smoke", [dict(b=2, a=1)], make)
    assert len(made) == 10, "the order of the names does not matter"
    for study, scale in (("other", "smoke"), ("one", "quick")): all_cached(study, scale, [dict(a=1)], make)
    assert len(made) == 12 and len({f.parent for f in place_for_all.rglob("*.npz")}) == 3


def test_settings_that_have_no_name_are_refused_before_any_work(place_for_all):
    made = []
    with pytest.raises(TypeError): all_cached("study", "smoke", [dict(i=0), dict(i=np.int64(1))], lambda i: made.append(i) or {"i": np.array(i)})
    assert not made, "the first was measured before the second was found to be no plain value"


def test_two_workers_keep_the_order(place_for_all):
    def make(i):
        import time
        import numpy as np
        time.sleep(0.3 if i == 5 else 0)
        return {"value": np.array([i])}
    order, reports = [5, 3, 0, 4, 1, 2], []
    results = all_cached("study", "smoke", [dict(i=i) for i in order], make, workers=2, progress=lambda *a: reports.append(a))
    assert [r["value"].item() for r in results] == order and reports == [("measure", k, 6) for k in range(7)]
    def never(i): raise AssertionError("made twice")
    assert [r["value"].item() for r in all_cached("study", "smoke", [dict(i=i) for i in range(6)], never)] == list(range(6))


def test_an_error_in_one_measurement_is_told_and_the_finished_ones_stay(place_for_all):
    def make(i):
        import numpy as np
        if i == 2: raise RuntimeError("measured in vain")
        return {"value": np.array([i])}
    with pytest.raises(RuntimeError, match="in vain"): all_cached("study", "smoke", [dict(i=i) for i in range(3)], make, workers=2)
    files = {f.name: f.stat().st_mtime_ns for f in place_for_all.rglob("*.npz")}
    assert 0 < len(files) < 3 and not list(place_for_all.rglob(".*.npz*"))
    all_cached("study", "smoke", [dict(i=i) for i in range(2)], make)
    assert all(f.stat().st_mtime_ns == files[f.name] for f in place_for_all.rglob("*.npz") if f.name in files)


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
