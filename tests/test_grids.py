"A grid of runs: killed and taken up again, beside runs made alone, with one that diverges."
import pytest
import torch
from filelock import FileLock

from lfdm import grids
from lfdm.data import DATASETS, GaussianMixture
from lfdm.grids import grid, make_grid
from lfdm.parameters import Parameters
from lfdm.runs import folder_of, make_run

RING = DATASETS["ring"]()
SMALL = dict(epochs=2, width=8, batch_size=10_000, sample_steps=4, n_samples=50)


def test_a_grid_is_the_product_of_its_axes():
    made = grid(dataset=["ring", "waves"], target=("x", "v"), seed=[0, 1, 2], **SMALL)
    assert len(made) == len(set(made)) == 12 and all(isinstance(p, Parameters) for p in made)
    assert [p.seed for p in made[:3]] == [0, 1, 2]


def test_a_grid_that_cannot_be():
    with pytest.raises(ValueError, match="unknown axis 'targets'. Did you mean 'target'"): grid(targets=["x"])
    with pytest.raises(ValueError, match="axis 'seed' of the grid is empty"): grid(seed=[])
    with pytest.raises(ValueError, match="unknown target 'noise'"): grid(target=["x", "noise"])


class Killed(BaseException): pass


def same_end(run, other): assert run.summary == other.summary and torch.equal(run.samples, other.samples)


def die(phase, done):
    def progress(*a):
        if a[:2] == (phase, done): raise Killed
    return progress


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    asked = grid(dataset="cluster", target=["x", "eps", "v"], **SMALL)
    return make_grid(asked, root=tmp_path_factory.mktemp("grid"), stack=2)[0]


DEATHS = [("train", 0), ("train", 1), ("train", 2), ("sample", 2), ("sample", 4), ("stack", 1)]

@pytest.mark.parametrize("death", DEATHS, ids=str)
def test_a_killed_grid_loses_nothing_and_ends_the_same(death, tmp_path, never_killed):
    parameters = list(never_killed)
    with pytest.raises(Killed): make_grid(parameters, root=tmp_path, stack=2, progress=die(*death))
    folders = [f for f in (tmp_path / "train").iterdir() if f.is_dir() and not f.name.startswith(".")]
    finished = {f / "params.json": (f / "params.json").read_bytes() for f in folders}
    runs, diverged = make_grid(parameters, root=tmp_path, stack=2)
    assert not diverged and list(runs) == parameters
    for p, run in runs.items():
        assert run.metrics == never_killed[p].metrics
        same_end(run, never_killed[p])
    for file, record in finished.items(): assert file.read_bytes() == record   # not made again
    assert not [f.name for f in (tmp_path / "train").iterdir() if f.name.startswith(".")]


def test_a_grid_killed_between_the_records_of_a_stack_ends_the_same(tmp_path, never_killed, monkeypatch):
    record, made = grids.write_record, []
    def dying(work, task, *rest, **environment):
        if made: raise Killed
        made.append(task.parameters)
        record(work, task, *rest, **environment)
    monkeypatch.setattr(grids, "write_record", dying)
    with pytest.raises(Killed): make_grid(list(never_killed), root=tmp_path, stack=2)
    monkeypatch.undo()
    before = (folder_of(made[0], root=tmp_path) / "params.json").read_bytes()
    again, _ = make_grid(list(never_killed), root=tmp_path, stack=2)
    for p, run in again.items(): same_end(run, never_killed[p])
    assert (folder_of(made[0], root=tmp_path) / "params.json").read_bytes() == before   # not made again


def test_a_grid_takes_up_runs_made_alone(tmp_path, never_killed):
    p, *_ = never_killed
    alone = make_run(p, root=tmp_path)
    runs, _ = make_grid(list(never_killed), root=tmp_path)
    assert runs[p].environment == alone.environment and "stacked" not in alone.environment
    assert all(r.environment["stacked"] == 2 for q, r in runs.items() if q != p)


def test_a_grid_does_not_touch_a_run_another_process_is_making(tmp_path, never_killed):
    p = list(never_killed)[1]
    folder = folder_of(p, root=tmp_path)
    folder.parent.mkdir()
    says = "another process is making one of these runs"
    with FileLock(folder.with_name(f".{folder.name}.lock")), pytest.raises(RuntimeError, match=says):
        make_grid(list(never_killed), root=tmp_path)
    assert len(make_grid(list(never_killed), root=tmp_path)[0]) == 3


def test_a_diverging_run_of_a_grid_is_named_and_the_others_are_whole(tmp_path, monkeypatch):
    class Huge(type(RING)):
        def draw(self, n, generator): return super().draw(n, generator) * 1e30
    monkeypatch.setitem(DATASETS, "huge", Huge)
    runs, diverged = make_grid(grid(dataset=["ring", "huge", "swiss"], **SMALL), root=tmp_path)
    assert [p.dataset for p in runs] == ["ring", "swiss"]
    assert [(p.dataset, epoch) for p, epoch in diverged.items()] == [("huge", 1)]


class Tiny(GaussianMixture):
    n_train = n_test = 300
    def __init__(self): super().__init__([[0., 0.], [2., 1.]], [.5, .8])


def test_a_grid_over_the_options_stacks_what_is_alike(tmp_path, monkeypatch):
    "and each network's result is that of the run alone: the average of its weights"
    monkeypatch.setitem(DATASETS, "tiny", Tiny)
    tiny = SMALL | dict(dataset="tiny", target=["x", "v"], batch_size=100)
    asked = grid(ema=[None, .8], **tiny) + grid(**tiny, clip=.3, warmup=4)
    runs, diverged = make_grid(asked, root=tmp_path / "grid")
    assert not diverged and [r.environment["stacked"] for r in runs.values()] == [2] * 6
    for p in asked:
        alone = make_run(p, root=tmp_path / "alone")
        for a, b in zip(alone.net.parameters(), runs[p].net.parameters(), strict=True):
            assert (a - b).abs().max() < 1e-3
        assert runs[p].metrics[-1]["loss"] == pytest.approx(alone.metrics[-1]["loss"], rel=1e-3)
    assert len({runs[p].metrics[-1]["loss"] for p in asked}) == 6


def test_equal_parameters_are_made_once(tmp_path):
    p = Parameters(dataset="cluster", **SMALL)
    runs, _ = make_grid([p, p], root=tmp_path)
    assert list(runs) == [p] and len([f for f in (tmp_path / "train").iterdir()]) == 1
