"Many networks trained as one program: each gives what it gives alone, whatever the others do."
import itertools

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lfdm.data import DATASETS
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP, StackedMLP
from lfdm.runs import Parameters, folder_of, grid, make_grid, make_run
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.training import TrainState, ValidationSet, train, train_stack
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

RING = DATASETS["ring"]()
SMALL = dict(epochs=2, width=8, batch_size=10_000, sample_steps=4, n_samples=50)


def net(m, width=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(m)
        return MLP(width=width)


def stack_of(losses, epochs=1, data=None, batch_size=100, validations=None, lr=1e-3):
    seeds = list(range(len(losses)))
    state = TrainState(StackedMLP([net(m) for m in seeds]), lr, seeds)
    data = data or [RING.sample(300, seed=m) for m in seeds]
    for state in train_stack(state, losses, data, epochs, batch_size, validations): pass
    return state


TRIPLES = st.tuples(st.sampled_from(list(SCHEDULES)), st.sampled_from(list(TARGETS)), st.sampled_from(list(WEIGHTINGS))).filter(
    lambda t: not SCHEDULES[t[0]].learned or issubclass(WEIGHTINGS[t[2]], LogSNRWeighting))


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(TRIPLES, min_size=1, max_size=5))
def test_a_stack_of_any_losses_gives_what_each_gives_alone(triples):
    "float32 rounding is all that may differ over the first steps, the last of them of a smaller batch"
    losses = [DiffusionLoss(*triple) for triple in triples]
    together = stack_of(losses, batch_size=128)
    for m in range(len(losses)):
        alone = TrainState(net(m), seed=m)
        for _ in train(alone, DiffusionLoss(*triples[m]), RING.sample(300, seed=m), 1, 128): pass   # anew: a schedule that learns has its history from the stack
        assert together.history[-1][m]["train_loss"] == pytest.approx(alone.history[-1]["train_loss"], rel=2e-4)
        for a, b in zip(alone.net.parameters(), together.net.network(m).parameters()): assert (a - b).abs().max() < 1e-3


def test_what_one_network_of_a_stack_teaches_its_schedule_is_its_own():
    "neighbours with the same words would be computed as one loss, and mix their histories: each learns from its own data, as it does alone"
    make = lambda: [DiffusionLoss("adaptive(decay=0.5)", "v", "sigmoid") for _ in range(3)]
    losses, data = make(), [RING.sample(300, seed=0), 3 * RING.sample(300, seed=1), RING.sample(300, seed=2)]
    stack_of(losses, 2, data)
    histories = [loss.schedule.state()["history"] for loss in losses]
    for m, loss in enumerate(make()):
        for _ in train(TrainState(net(m), seed=m), loss, data[m], 2, 100): pass
        torch.testing.assert_close(loss.schedule.state()["history"], histories[m], rtol=1e-3, atol=1e-6, equal_nan=True)
    assert not torch.allclose(histories[0].nan_to_num(), histories[1].nan_to_num(), rtol=0.1)
    with pytest.raises(ValueError, match="cannot share a schedule that learns"): stack_of([losses[0]] * 2)


def test_the_random_streams_are_those_of_the_networks_alone():
    losses = [DiffusionLoss("cosine", "v"), DiffusionLoss("linear", "x")]
    together = stack_of(losses)
    for m, loss in enumerate(losses):
        alone = TrainState(net(m), seed=m)
        for _ in train(alone, loss, RING.sample(300, seed=m), 1, 100): pass
        assert torch.equal(alone.generators[0].get_state(), together.generators[m].get_state())


def test_one_that_diverges_leaves_the_others_alone():
    losses, data = [DiffusionLoss()] * 3, [RING.sample(300, seed=m) for m in range(3)]
    well = stack_of(losses, 3, data)
    ill = stack_of(losses, 3, [data[0], data[1] * 1e30, data[2]])
    assert "diverged" in ill.history[-1][1]
    for m in (0, 2):
        assert ill.history[-1][m] == well.history[-1][m]
        for a, b in zip(ill.net.network(m).parameters(), well.net.network(m).parameters()): assert torch.equal(a, b)


def test_all_of_them_diverging_is_an_error():
    with pytest.raises(FloatingPointError, match="all 2 networks diverged by epoch 1"):
        stack_of([DiffusionLoss()] * 2, data=[RING.sample(300) * 1e30] * 2)


def test_a_stack_resumes_bit_identically(tmp_path):
    losses = [DiffusionLoss("cosine", y) for y in ("x", "v")]
    data = [RING.sample(300, seed=m) for m in range(2)]
    validations = [ValidationSet(loss, RING.sample(100), denoise=RING.denoise) for loss in losses]
    whole = stack_of(losses, 4, data, validations=validations)
    state = TrainState(StackedMLP([net(m) for m in range(2)]), seed=[0, 1])
    for state in train_stack(state, losses, data, 4, 100, validations):
        if state.epoch == 2: state.save(tmp_path / "checkpoint"); break
    other = TrainState(StackedMLP([net(m + 7) for m in range(2)]), seed=[5, 6])
    other.load(tmp_path / "checkpoint")
    for other in train_stack(other, losses, data, 4, 100, validations): pass
    assert other.history == whole.history
    for a, b in zip(other.net.parameters(), whole.net.parameters()): assert torch.equal(a, b)


def test_a_checkpoint_of_a_stack_of_another_size_is_refused(tmp_path):
    stack_of([DiffusionLoss()] * 2).save(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match="another shape"): TrainState(StackedMLP([net(0)] * 3), seed=[0, 1, 2]).load(tmp_path / "checkpoint")


@pytest.mark.parametrize("bad, says", [
    (dict(losses=[DiffusionLoss()]), "2 networks need as many losses"),
    (dict(data=[RING.sample(10), RING.sample(11)]), "must have one shape"),
    (dict(batch_size=11), "batch_size 11 is larger than the data: 10"),
])
def test_a_stack_that_does_not_fit_together(bad, says):
    given = dict(losses=[DiffusionLoss()] * 2, data=[RING.sample(10)] * 2, epochs=1, batch_size=5) | bad
    with pytest.raises(ValueError, match=says): next(train_stack(TrainState(StackedMLP([net(0), net(1)]), seed=[0, 1]), **given))


def test_a_grid_is_the_product_of_its_axes():
    made = grid(dataset=["ring", "waves"], target=("x", "v"), seed=[0, 1, 2], **SMALL)
    assert len(made) == len(set(made)) == 12 and all(isinstance(p, Parameters) for p in made)
    assert [p.seed for p in made[:3]] == [0, 1, 2]


def test_a_grid_that_cannot_be():
    with pytest.raises(ValueError, match="unknown axis 'targets'. Did you mean 'target'"): grid(targets=["x"])
    with pytest.raises(ValueError, match="axis 'seed' of the grid is empty"): grid(seed=[])
    with pytest.raises(ValueError, match="unknown target 'noise'"): grid(target=["x", "noise"])


class Killed(BaseException): pass


def die(phase, done):
    def progress(*a):
        if a[:2] == (phase, done): raise Killed
    return progress


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    return make_grid(grid(target=["x", "eps", "v"], **SMALL), root=tmp_path_factory.mktemp("grid"), stack=2)[0]


@pytest.mark.parametrize("death", [("train", 0), ("train", 1), ("train", 2), ("sample", 2), ("sample", 4), ("stack", 1)], ids=str)
def test_a_killed_grid_loses_nothing_and_ends_the_same(death, tmp_path, never_killed):
    parameters = list(never_killed)
    with pytest.raises(Killed): make_grid(parameters, root=tmp_path, stack=2, progress=die(*death))
    finished = {f.name: (f / "params.json").read_bytes() for f in (tmp_path / "train").iterdir() if f.is_dir() and not f.name.startswith(".")}
    runs, diverged = make_grid(parameters, root=tmp_path, stack=2)
    assert not diverged and list(runs) == parameters
    for p, run in runs.items():
        assert run.summary == never_killed[p].summary and run.metrics == never_killed[p].metrics and torch.equal(run.samples, never_killed[p].samples)
    for name, record in finished.items(): assert (tmp_path / "train" / name / "params.json").read_bytes() == record   # not made again
    assert not [f.name for f in (tmp_path / "train").iterdir() if f.name.startswith(".")]


def test_a_grid_killed_between_the_records_of_a_stack_ends_the_same(tmp_path, never_killed, monkeypatch):
    from lfdm import runs
    record, made = runs._record, []
    def dying(work, p, *rest):
        if made: raise Killed
        made.append(p); record(work, p, *rest)
    monkeypatch.setattr(runs, "_record", dying)
    with pytest.raises(Killed): make_grid(list(never_killed), root=tmp_path, stack=2)
    monkeypatch.undo()
    before = (folder_of(made[0], root=tmp_path) / "params.json").read_bytes()
    again, _ = make_grid(list(never_killed), root=tmp_path, stack=2)
    for p, run in again.items(): assert run.summary == never_killed[p].summary and torch.equal(run.samples, never_killed[p].samples)
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
    with FileLock(folder.with_name(f".{folder.name}.lock")), pytest.raises(RuntimeError, match="another process is making one of these runs"):
        make_grid(list(never_killed), root=tmp_path)
    assert len(make_grid(list(never_killed), root=tmp_path)[0]) == 3


def test_a_diverging_run_of_a_grid_is_named_and_the_others_are_whole(tmp_path, monkeypatch):
    class Huge(type(RING)):
        def draw(self, n, generator): return super().draw(n, generator) * 1e30
    monkeypatch.setitem(DATASETS, "huge", Huge)
    runs, diverged = make_grid(grid(dataset=["ring", "huge", "swiss"], **SMALL), root=tmp_path)
    assert [p.dataset for p in runs] == ["ring", "swiss"]
    assert [(p.dataset, epoch) for p, epoch in diverged.items()] == [("huge", 1)]


def test_equal_parameters_are_made_once(tmp_path):
    p = Parameters(**SMALL)
    runs, _ = make_grid([p, p], root=tmp_path)
    assert list(runs) == [p] and len([f for f in (tmp_path / "train").iterdir()]) == 1
