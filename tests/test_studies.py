"Records of many runs: small, whole or not there, and drawn from without the runs."
import errno
import hashlib
import io
import json
import math
import os
import zipfile

import numpy as np
import pytest
import torch

from lfdm import studies
from lfdm.data import DATASETS
from lfdm.folders import runs_root
from lfdm.grids import grid
from lfdm.parameters import Parameters
from lfdm.runs import Run, load_run
from lfdm.steps import exact_denoiser
from lfdm.studies import (
    Record,
    all_cached,
    arrow_grid,
    condense,
    error_variance,
    holm,
    learned_score,
    load_record,
    make_record,
    mean_sd,
    measured,
    npz_bytes,
    paired_ratio,
    sample_quality,
    verdict,
)
from tiny import same

SMALL = dict(dataset="cluster", epochs=2, width=8, batch_size=50_000, sample_steps=4, n_samples=50)
ASKED = grid(target=["x", "v"], seed=[1, 0], **SMALL)
MEASURED = dict(steps=[2], epochs=[1, 2], times=[0.5], points=20, arrows=2, logsnr=[3.])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("LFDM_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield runs_root()


@pytest.fixture(scope="module")
def record(runs): return condense(ASKED, "study-smoke", MEASURED)


@pytest.fixture
def place_for_all(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    return tmp_path


# --- the record

def test_a_record_comes_back_as_it_was_with_rows_and_arrays_of_the_same_runs(record, runs):
    path = record.save("study", "smoke")
    again = load_record("study", "smoke")
    assert again.rows == record.rows and again.settings == json.loads(json.dumps(record.settings))
    assert same(again.arrays, record.arrays)
    assert npz_bytes(again.arrays) == path.with_suffix(".npz").read_bytes()
    for row, curve, quality in zip(record.rows, record.arrays["loss_curve"], record.arrays["quality"]):
        lines = (runs / "study-smoke" / row["run"] / "metrics.jsonl").read_text().splitlines()
        assert np.allclose(curve, [json.loads(line)["loss"] for line in lines])
        assert quality[-1, 0] == np.float32(row["mean_distance"])
        assert row["run"].startswith(f"cluster-{row['target']}")
    assert [r["seed"] for r in record.rows] == [0, 0, 1, 1] and len(record.arrays["samples"]) == 2
    assert record.values("samples", seed=0, target="v").shape == (1, 20, 2)
    shapes = [record.arrays[name].shape for name in ("samples_few", "field")]
    assert shapes == [(2, 1, 10, 2), (4, 1, 4, 2)]


@pytest.mark.parametrize("ask, says", [
    (lambda record: record.values("loss_curv"), "Did you mean 'loss_curve'"),
    (lambda record: record.values("loss", seed=7), r"no run has seed = 7, only \[0, 1\]"),
    (lambda record: record.values("samples", target="v"), "first 2 of 4"),
    (lambda record: Record({}, [dict(a=1, b=1), dict(a=2, b=2)], {}).where(a=1, b=2), "no run of this"),
    (lambda record: Record({}, [{}], {"a": np.zeros(2)}), "'a' has 2 entries for 1 runs")])
def test_what_is_not_in_a_record_is_named(record, ask, says):
    with pytest.raises(ValueError, match=says): ask(record)


@pytest.mark.parametrize("which", [".json", ".npz"])
def test_a_missing_or_damaged_record_names_the_command(record, which):
    path = record.save("study", "smoke").with_suffix(which)
    whole = path.read_bytes()
    for damage in (whole[:len(whole) // 2], b"", b"nonsense", whole[:-40] + bytes(40)):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged.*Make it: make figures scale=smoke"):
            load_record("study", "smoke")
    with pytest.raises(FileNotFoundError, match=r"'sudy' .* Did you mean 'study'\? Make it"):
        load_record("sudy", "smoke")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"study-smoke{which} is missing. Make it: papermill x"):
        load_record("study", "smoke", "papermill x")


def test_every_flipped_bit_of_a_record_is_noticed_or_harmless(place_for_all):
    whole = load_record("triples")
    path = whole.save("triples", "smoke")
    rng = np.random.default_rng(0)
    for file in (path, path.with_suffix(".npz")):
        content = file.read_bytes()
        for place, bit in zip(rng.integers(len(content), size=100), rng.integers(8, size=100)):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            file.write_bytes(flipped)
            try: again = load_record("triples", "smoke")
            except ValueError: continue
            assert again.rows == whole.rows and again.settings == whole.settings, "a flip was not noticed"
            assert same(again.arrays, whole.arrays)
        file.write_bytes(content)


def lying():
    "An .npz whose array says that it is of 32 GB, and is not."
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as members, members.open("a.npy", "w") as f:
            np.lib.format.write_array_header_1_0(f, dict(shape=(4, 10**9), fortran_order=False, descr="<f8"))
        return file.getvalue()


@pytest.mark.parametrize("change, packed, says", [
    ({}, npz_bytes({"a": np.zeros(100)}), r"a.npy has shape \(100,\) of float64 for 4 runs"),
    ({}, npz_bytes({"a": np.zeros((4, 1000))}), "would take more than 30,000 bytes"),
    ({}, lying(), r"a.npy has shape \(4, 1000000000\)"),
    ({"study": "other"}, npz_bytes({}), "it is of study 'other'")], ids=range(4))
def test_a_record_is_compared_with_what_it_says_before_anything_is_allocated(
        record, monkeypatch, change, packed, says):
    "though all digests are right; and an old one that has none is loaded, but says so"
    monkeypatch.setattr(studies, "_MOST", 30_000)
    path = Record(record.settings, record.rows, {}).save("study", "smoke")
    path.with_suffix(".npz").write_bytes(packed)
    content = json.loads(path.read_text()) | change | {"arrays": hashlib.sha256(packed).hexdigest()}
    path.write_text(json.dumps(content | {"digest": studies._content_digest(content)}))
    with pytest.raises(ValueError, match=says): load_record("study", "smoke")
    old = json.loads(record.save("study", "smoke").read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k != "digest"}))
    with pytest.warns(UserWarning, match="before records had a digest"):
        assert load_record("study", "smoke").rows == record.rows


def test_a_half_written_record_is_not_taken_for_one(record, monkeypatch):
    "killed between the arrays and the rows: the old rows do not belong to the new arrays"
    record.save("study", "smoke")
    other = Record(record.settings, record.rows,
                   record.arrays | {"loss_curve": record.arrays["loss_curve"] + 1})
    replace = os.replace
    def die(a, b):
        if str(b).endswith(".json"): raise OSError("disk full")
        replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(os, "replace", die)
        with pytest.raises(OSError, match="disk full"): other.save("study", "smoke")
    with pytest.raises(ValueError, match="do not belong together"): load_record("study", "smoke")


def test_a_record_from_before_a_parameter_was_added_is_of_its_default(record, runs):
    "it is not taken for a study of other parameters, and one of other parameters is still refused"
    old = [{k: v for k, v in row.items() if k not in Parameters.ADDED} for row in record.rows]
    Record(record.settings, old, record.arrays).save("study", "smoke")
    other = ASKED[1:] + grid(target="x", ema=.5, warmup=3, **SMALL)
    says = r"parameters: ema \[None\], not \[0.5, None\]; warmup \[0\], not \[0, 3\]\. Choose"
    with pytest.raises(ValueError, match=says): make_record("study", other, MEASURED, "smoke")
    make_record("study", ASKED, MEASURED, "smoke")
    assert all({"ema", "clip", "warmup"} <= set(row) for row in load_record("study", "smoke").rows)


# --- measurements that are kept

def test_a_run_is_measured_once_for_each_settings(record, runs):
    run = runs / "study-smoke" / record.rows[0]["run"]
    assert measured(run, MEASURED | {"steps": [2, 3]})["quality"].shape == (3, 4)
    assert len(list((runs / "study-smoke/measured").glob(f"{run.name}-*.npz"))) == 2


def refused(*a, **kw): raise OSError(errno.EROFS, "Read-only file system")


def test_what_cannot_be_written_or_measured_is_refused_before_any_work(place_for_all, monkeypatch):
    asked = grid(target="x", **SMALL)
    for name, value, says in (
            ("epochs", [3], "epochs must be from 0 to 2"), ("logsnr", [20.], "logsnr must be"),
            ("steps", [4], "steps must hold another"), ("step", [2], "Did you mean 'steps'")):
        with pytest.raises(ValueError, match=says):
            make_record("new", asked, MEASURED | {name: value}, "smoke")
    monkeypatch.setattr(studies.tempfile, "TemporaryFile", refused)
    with pytest.raises(OSError, match="no record can be written in .*Read-only"):
        make_record("new", asked, MEASURED, "smoke")
    assert not (place_for_all / "new-smoke").exists()


def test_no_name_leads_out_of_its_folder(place_for_all):
    record, name = Record({}, [dict(a=1)], {}), "../x"
    for call in (lambda: record.save(name, "smoke"), lambda: load_record(name, "smoke"),
                 lambda: all_cached(name, "smoke", [{}], dict),
                 lambda: make_record(name, ASKED, MEASURED, "smoke")):
        with pytest.raises(ValueError, match="must be a plain folder name"): call()
    assert not list(place_for_all.iterdir())


def values(results): return [r["value"].item() for r in results]


def test_an_interrupted_set_goes_on_where_it_stopped(place_for_all):
    made, stop, reports = [], 2, []
    def make(i):
        if len(made) == stop: raise KeyboardInterrupt
        made.append(i)
        return {"value": np.array([i])}

    asked = [dict(i=i) for i in (0, 1, 2, 1, 4)]
    with pytest.raises(KeyboardInterrupt): all_cached("study", "smoke", asked, make)
    stop = None
    results = all_cached("study", "smoke", asked, make, progress=lambda *a: reports.append(a))
    assert values(results) == [0, 1, 2, 1, 4] and reports == [("measure", k, 5) for k in range(6)]
    assert made == [0, 1, 2, 4]


def test_settings_are_told_apart_and_studies_and_scales_too(place_for_all):
    made = []
    def make(**kw):
        made.append(kw)
        return {"value": np.array(len(made))}

    asked = [dict(a=1, b=2), dict(a=2, b=1), *(dict(a=a) for a in (1, "1", 1.5, None, True, [1, 2], [2, 1]))]
    assert values(all_cached("one", "smoke", asked, make)) == list(range(1, 10)) and made == asked
    assert values(all_cached("one", "smoke", [dict(b=2, a=1)], make)) == [1], "by the order of the names"
    for study, scale in (("other", "smoke"), ("one", "quick")): all_cached(study, scale, [dict(a=1)], make)
    assert len(made) == 11


def test_what_is_measured_on_a_network_that_is_known(record, runs, monkeypatch):
    "one that always answers 0 misses x by x; the exact denoiser has learned the exact score"
    run = load_run(runs / "study-smoke" / record.rows[0]["run"])
    run.net, x = (lambda z, u: 0 * z), run.dataset.sample(500, 0, "test")
    assert torch.allclose(error_variance(run, [.2, .8], 500), x.square().mean(1).var().expand(2))
    monkeypatch.setattr(Run, "denoiser", lambda self: exact_denoiser(self.dataset))
    z, level = arrow_grid(4, 2.), run.loss.schedule.level(run.loss.schedule.t(torch.tensor(3.)))
    assert z.abs().max() == 1.5 and z.unique().tolist() == [-1.5, -.5, .5, 1.5]
    exact = run.dataset.score(z.float(), level.alpha, level.sigma)
    assert torch.allclose(learned_score(run, z, 3.), exact, atol=1e-4)


def test_only_divergence_is_taken_for_divergence():
    ring, levels = DATASETS["ring"](), ("cosine", -9.6, 12.9)
    def judged(denoiser): return sample_quality(denoiser, ring, "euler", 3, levels, 50, real=50)
    assert (judged(lambda z, level: (z * np.nan, z)) == np.inf).all()
    layer = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes"): judged(lambda z, level: (layer(z), z))


def test_means_over_seeds():
    said = [mean_sd(given, ".2f") for given in ([], [2.], [1., 3.])]
    assert said == ["–", "2.00 ± 0.00", "2.00 ± 1.41"]


def test_a_paired_interval_covers_as_often_as_it_says_and_turns_round_with_its_arguments():
    draw, covered = np.random.default_rng(0), 0
    for _ in range(400):
        a = np.exp(draw.normal(size=10))
        b = a * np.exp(draw.normal(0.2, 0.3, size=10))
        ratio, low, high, p = paired_ratio(a, b)
        back = paired_ratio(b.tolist(), a, 0.95)
        np.testing.assert_allclose(back, (1 / ratio, 1 / high, 1 / low, p), rtol=1e-9)
        assert (p < 0.05) == (not low <= 1 <= high)
        covered += low < np.exp(0.2) < high
    assert 0.92 < covered / 400 < 0.98
    assert paired_ratio([1., 2.], [1., 2.]) == (1, 1, 1, 1)


def test_holm_is_never_below_the_p_values_nor_out_of_order():
    draw = np.random.default_rng(1)
    for n in (1, 2, 8):
        p = draw.uniform(0, 0.2, n)
        raised = np.array(holm(p))
        assert (raised >= p).all() and (raised <= 1).all() and (np.diff(raised[np.argsort(p)]) >= 0).all()
        assert np.isclose(raised.min(), min(1, n * p.min()))
        # all hypotheses true: the chance of any found is at most 5 %
    found = np.mean([min(holm(draw.uniform(size=8))) < 0.05 for _ in range(2000)])
    assert found < 0.06


@pytest.mark.parametrize("a, b", [([1., 2.], [1., 2., 3.]), ([1.], [2.]), ([0., 1.], [1., 1.]),
                                  ([1., math.inf], [1., 1.]), ("word", [1., 2.]), ([[1., 2.]], [1., 2.])])
def test_what_cannot_be_compared_is_refused(a, b):
    with pytest.raises(ValueError, match="^(a|b|a and b) must be"): paired_ratio(a, b)
    for bad in ([], [0.5, 1.1], [math.nan], "word"):
        with pytest.raises(ValueError, match="p_values must be"): holm(bad)
    with pytest.raises(ValueError, match="margin must be"): verdict(0.9, 1.1, 0.5, 1.)
    with pytest.raises(ValueError, match="low must not be above"): verdict(1.2, 1.1, 0.5, 1.1)


def test_outcomes_come_in_the_order_asked_and_say_inf_for_what_diverged(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    asked = grid(lr=[1e-3, 1e6, 2e-3], **SMALL)
    found = studies.outcomes("some", "smoke", asked, ["euler, 8", "dpmpp_2m, 8"], n=20, real=40, draws=2)
    assert [list(q) for q in found] == [[*studies.OUTCOMES, "euler, 8", "dpmpp_2m, 8"]] * 3
    assert [all(np.isfinite(list(q.values()))) for q in found] == [True, False, True]
    assert set(found[1].values()) == {math.inf}
    how = dict(n=20, real=40, draws=2)
    assert studies.outcomes("some", "smoke", asked[::-1], ["euler, 8", "dpmpp_2m, 8"], **how) == found[::-1]
    one, = studies.outcomes("some", "smoke", asked[:1], ["euler, 8"], n=20, real=40)
    assert one["euler, 8"] != found[0]["euler, 8"] and one["excess"] == found[0]["excess"]
    with pytest.raises(ValueError, match="unknown way"): studies.outcomes("some", "smoke", asked, ["euler"])


# --- several processes

def test_two_workers_keep_the_order_and_lose_nothing_to_an_error(place_for_all):
    def make(i):
        import time

        import numpy as np
        if i == 7: raise RuntimeError("measured in vain")
        time.sleep(0.3 if i == 5 else 0)
        return {"value": np.array([i])}
    def never(i): raise AssertionError("made twice")
    def measure(order, *make, **how):
        return all_cached("study", "smoke", [dict(i=i) for i in order], *make, **how)
    reports = []
    results = measure([5, 3, 0], make, workers=2, progress=lambda *a: reports.append(a))
    assert values(results) == [5, 3, 0] and reports == [("measure", k, 3) for k in range(4)]
    with pytest.raises(RuntimeError, match="in vain"): measure([0, 7, 3], make, workers=2)
    assert values(measure([0, 3, 5], never)) == [0, 3, 5]
