"Attempts to break lfdm.grids: what shares a stack, grids killed and taken up again, one run that diverges."
import os
import shutil
import time
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import given, strategies as st
from joblib import delayed

from kills import ended
from lfdm import grids
from lfdm.data import DATASETS
from lfdm.grids import KEEPS_MEMORY, SHARED, _busiest, grid, make_grid, side_by_side, stacks_of
from lfdm.images.parameters import ImageParameters
from lfdm.parameters import Parameters
from lfdm.runs import beside, folder_of, load_run, make_run
from tiny import SERVER, SMALL, Stopped, Tiny, made, register, stop_at
from tree import ROOT


@pytest.fixture(autouse=True)
def tiny(monkeypatch): register(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A grid that was never disturbed."
    return made(tmp_path_factory, lambda root: make_grid(
        grid(target=["x", "eps", "v"], **SMALL), root=root, stack=2)[0])


def test_a_grid_is_the_product_of_its_axes():
    for kind in (Parameters, ImageParameters):
        asked = grid(kind, target=("x", "v"), seed=[0, 1], epochs=2)
        assert asked == [kind(target=t, seed=s, epochs=2) for t in ("x", "v") for s in (0, 1)]
    for seeds in (range(2), np.arange(2)): assert asked[:2] == grid(kind, target="x", seed=seeds, epochs=2)


def test_a_grid_that_cannot_be():
    for kind, axes, says in (
            (Parameters, dict(targets=["x"]), "unknown axis 'targets'. Did you mean 'target'"),
            (Parameters, dict(seed=[]), "axis 'seed' of the grid is empty"),
            (ImageParameters, dict(width=[8]), "unknown axis 'width'")):
        with pytest.raises(ValueError, match=says): grid(kind, **axes)
    says = "parameters must be a list of Parameters, not Image.*make_images"
    with pytest.raises(TypeError, match=says): make_grid([ImageParameters()])


# ---- stacks

def test_a_stack_shares_exact_values():
    "digits that a repr drops count; what may differ in a stack, differs"
    for field, values in dict(lr=[1e-3, 1.0000000001e-3], ema=[.9, .9000000001], clip=[None, 1.],
                              schedule=["cosine", "shifted_cosine(shift=1e-9)"], width=[8, 9]).items():
        assert len(stacks_of(grid(**{field: values}))) == 2, field
    own = {"dataset", "target", "weighting", "error", "seed"}
    assert {*SHARED} | own == set(Parameters.__dataclass_fields__)


def test_stacks_are_those_of_before():
    """In their order: by what they share, then by their losses; those of one loss as they were asked for.
    Losses are neighbours though their reprs agree with those of others."""
    close = ["sigmoid(k=3)", "sigmoid(k=3.0000001)"]
    stack, = stacks_of(grid(seed=[0, 1, 2], weighting=close), 6)
    assert len({repr(p.loss()) for p in stack}) == 1
    assert [(p.weighting, p.seed) for p in stack] == [(w, s) for w in close for s in (0, 1, 2)]
    asked = grid(dataset=["waves", "ring"], target=["v", "x"], weighting=["weighted", "nelbo"], width=[16, 8])
    found = [[(p.width, p.target, p.weighting, p.dataset) for p in stack] for stack in stacks_of(asked, 3)]
    triples = [("v", "nelbo"), ("v", "weighted"), ("x", "nelbo"), ("x", "weighted")]
    order = [[(width, *triple, d) for triple in triples for d in ("waves", "ring")] for width in (8, 16)]
    assert found == [of_width[i:i + 3] for of_width in order for i in (0, 3, 6)]


# ---- killed, and beside others

def ends_the_same(root, whole):
    "Make the grid to its end: it is that which was never disturbed, and what was finished is not made again."
    finished = records(root)
    runs, diverged = make_grid(list(whole), root=root, stack=2)
    assert not diverged and list(runs) == list(whole)
    for p, run in runs.items():
        assert (run.summary, run.metrics) == (whole[p].summary, whole[p].metrics)
        assert torch.equal(run.samples, whole[p].samples)
    assert finished.items() <= records(root).items(), "made again"
    return finished


def records(root):
    "The finished runs."
    return {f.name: (f / "params.json").read_bytes() for f in (root / "train").glob("[!.]*")}


@pytest.mark.parametrize("death, finished", [(("train", 2), 0), (("sample", 2), 0), (("sample", 5), 2)],
                         ids=str)
def test_a_killed_grid_loses_nothing_and_ends_the_same(death, finished, tmp_path, whole):
    "in the first stack, or in the second"
    stop, seen = stop_at(*death), []
    def progress(*now):
        if now[0] == "train" and now[1] == 0: seen.append(now)   # a stack begins
        if len(seen) > finished // 2: stop(*now)
    with pytest.raises(Stopped): make_grid(list(whole), root=tmp_path, stack=2, progress=progress)
    assert len(ends_the_same(tmp_path, whole)) == finished
    assert not list((tmp_path / "train").glob(".*"))


def test_a_grid_killed_between_the_records_of_a_stack_ends_the_same(tmp_path, whole, monkeypatch):
    "the stack goes on as it was, with the run of it that is finished: another stack would round otherwise"
    write, written = grids.write_record, []
    def dying(*args, **kw):
        if written: raise Stopped
        written.append(write(*args, **kw))
    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(grids, "write_record", dying)
        make_grid(list(whole), root=tmp_path, stack=2)
    reports = []
    make_grid(list(whole), root=tmp_path, stack=3, progress=lambda *now: reports.append(now))
    assert reports[1] == ("train", 3, 3), "trained again"
    assert len(ends_the_same(tmp_path, whole)) == 3 and not list((tmp_path / "train").glob(".*"))


# ---- what it reports and returns

@given(st.lists(st.floats(0, 1e12), max_size=30), st.integers(1, 8))
def test_the_busiest_worker(rest, workers):
    "no less than its share or the longest stack, and never idle while there is a stack to take"
    most = _busiest(rest, workers)
    fair, longest = sum(rest) / workers, max(rest, default=0)
    assert max(fair, longest) * (1 - 1e-9) <= most <= (fair + longest) * (1 + 1e-9)


def test_several_workers_are_reported_while_they_work(tmp_path):
    "by each in a file that all see; the last report is the last, and what a callback raises ends the grid"
    asked, seen = grid(epochs=[30, 31], seed=[0, 1], **FEW), []
    make_grid(asked, root=tmp_path / "told", stack=1, workers=2, progress=lambda *now: seen.append(now))
    shares = [done / total for phase, done, total in seen]
    assert {phase for phase, _, _ in seen} == {"grid"} and shares[0] == 0 and shares[-1] == 1
    assert shares == sorted(shares) and any(0 < share < 1 for share in shares)
    def full(phase, done, total):
        if done: raise OSError("the disk with the log is full")
    with pytest.raises(OSError, match="the log is full"):
        make_grid(asked, root=tmp_path / "full", stack=1, workers=2, progress=full)
    seen.clear()
    make_grid(asked, root=tmp_path / "told", progress=lambda *now: seen.append(now))
    assert not seen   # all is there: there is nothing to report


def test_what_is_done_is_counted_from_where_a_grid_goes_on(tmp_path, whole):
    "one bar to its end, which begins where the killed one stopped: else its rate would be too high"
    with pytest.raises(Stopped):
        make_grid(list(whole), root=tmp_path, stack=3, progress=stop_at("sample", 1))
    seen = []
    make_grid(list(whole), root=tmp_path, stack=3, progress=lambda *now: seen.append(now))
    done = [n for phase, n, _ in seen if phase == "grid"]
    totals = {total for phase, _, total in seen if phase == "grid"}
    assert done[0] == 0 and done == sorted(done) and totals == {done[-1]}
    assert done[-1] == pytest.approx(3 * 50 * 5 * 6**2)   # the samples alone were left


def test_the_runs_of_a_grid_are_read_when_they_are_asked_for(tmp_path, whole):
    runs, _ = make_grid(list(whole), root=tmp_path)
    p, *others = runs
    assert isinstance(runs, Mapping) and len(runs) == 3 and runs[p].summary == whole[p].summary
    shutil.rmtree(runs[p].folder)
    with pytest.raises(FileNotFoundError, match="no run at"): runs[p]
    assert runs[others[0]].summary and p in runs
    (folder_of(others[0], root=tmp_path) / "summary.json").unlink()
    with pytest.raises(ValueError, match="damaged: summary.json missing"): make_grid(others, root=tmp_path)


def test_workers_keep_the_memory_that_they_free():
    "as do processes that make starts"
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"export {name} := {value}\n" in makefile for name, value in KEEPS_MEMORY.items())
    keeps = side_by_side([delayed(os.environ.get)(name) for name in KEEPS_MEMORY], 2, ordered=True)
    assert list(keeps) == list(KEEPS_MEMORY.values())


def test_products_in_bf16(tmp_path):
    "alone and in a stack; what is kept and judged is float32"
    asked = grid(target=["x", "v"], precision=["float32", "bf16"], **SMALL)
    stacked, _ = make_grid(asked, root=tmp_path)
    alone = {p: make_run(p, root=tmp_path / "alone") for p in asked}
    for runs in (stacked, alone):
        for exact, rough in zip(asked[::2], asked[1::2]):
            a, b = (runs[p].net.layers[2].weight for p in (exact, rough))
            assert a.dtype == b.dtype == torch.float32 and not torch.equal(a, b) and (a - b).abs().max() < .02
    assert all(run.environment["stacked"] == 2 for run in stacked.values())


FEW = dict(dataset="cluster", width=4, batch_size=50_000, n_samples=8, sample_steps=2)

def endless(root):
    os.setsid()
    make_grid(grid(epochs=[1, 100_000], **FEW), root=root, stack=1, workers=2)


def test_two_workers_give_what_one_gives_and_end_with_a_killed_grid(tmp_path):
    "one is at work and one has nothing to do: it would hold its memory for minutes (more kills: kills.py)"
    parent = SERVER.Process(target=endless, args=(tmp_path,))
    parent.start()
    while not (finished := list(tmp_path.glob("train/cluster*"))) and parent.is_alive(): time.sleep(.1)
    parent.kill(), parent.join()
    assert ended(parent.pid, tmp_path)
    run, = make_grid(grid(epochs=1, **FEW), root=tmp_path / "one")[0].values()
    found = load_run(*finished)
    assert found.summary["loss"] == pytest.approx(run.summary["loss"], rel=1e-4)
    assert found.environment["threads"] == 1 and (found.samples - run.samples).abs().max() < 1e-2


def test_a_grid_takes_up_runs_made_alone(tmp_path, whole):
    p, *_ = whole
    alone = make_run(p, root=tmp_path)
    runs, _ = make_grid([*whole, *whole], root=tmp_path)   # asked for twice, made once
    assert list(runs) == list(whole) and runs[p].environment == alone.environment
    assert [r.environment.get("stacked") for r in runs.values()] == [None, 2, 2]


def test_what_a_grid_may_not_write(tmp_path, whole):
    "a run that another process is making; a file in the way"
    folder = folder_of(list(whole)[1], root=tmp_path)
    folder.parent.mkdir()
    with FileLock(beside(folder, "lock")), pytest.raises(RuntimeError, match="another process is making one"):
        make_grid(list(whole), root=tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=f"cannot write runs to {tmp_path}.*run again to resume"):
        make_grid(list(whole), "file", tmp_path)


def test_a_diverging_run_of_a_grid_is_named_and_the_others_are_whole(tmp_path, monkeypatch):
    class Huge(Tiny):
        def draw(self, n, generator): return super().draw(n, generator) * 1e30
    monkeypatch.setitem(DATASETS, "huge", Huge)
    fine, ill = grid(seed=[0, 1], **SMALL), grid(seed=[0, 1], **SMALL | dict(dataset="huge"))
    runs, diverged = make_grid(fine + ill, root=tmp_path)
    assert list(runs) == fine and diverged == {p: 1 for p in ill}
    runs, diverged = make_grid(ill, root=tmp_path / "all of a stack")
    assert not runs and diverged == {p: 1 for p in ill} and not list(tmp_path.rglob(".stack-*"))


def test_a_grid_over_the_options_stacks_what_is_alike(tmp_path):
    "and each network's result is that of the run alone: the average of its weights"
    few = SMALL | dict(target=["x", "v"], epochs=2)
    asked = grid(ema=[None, .8], **few) + grid(**few, clip=.3, warmup=4)
    runs, diverged = make_grid(asked, root=tmp_path / "grid")
    assert not diverged and [r.environment["stacked"] for r in runs.values()] == [2] * 6
    for p in asked:
        alone = make_run(p, root=tmp_path / "alone")
        for a, b in zip(alone.net.parameters(), runs[p].net.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-3
        assert runs[p].metrics[-1]["loss"] == pytest.approx(alone.metrics[-1]["loss"], rel=1e-3)
    assert len({runs[p].metrics[-1]["loss"] for p in asked}) == 6
