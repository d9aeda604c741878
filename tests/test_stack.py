"Many networks trained as one program: each gives what it gives alone, whatever the others do."
import itertools

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from lfdm.data import DATASETS, GaussianMixture
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP, StackedMLP
from lfdm.grids import grid, make_grid
from lfdm.parameters import Parameters
from lfdm.runs import folder_of, make_run
from lfdm.schedules import SCHEDULES, CosineSchedule
from lfdm.targets import TARGETS
from lfdm.training import TrainState, clip_gradients, train, train_stack
from lfdm.validation import ValidationSet
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

RING = DATASETS["ring"]()
SMALL = dict(epochs=2, width=8, batch_size=10_000, sample_steps=4, n_samples=50)


def net(m, width=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(m)
        return MLP(width=width)


def stack_of(losses, epochs=1, data=None, batch_size=100, validations=None, lr=1e-3, schedules=None, **options):
    seeds = list(range(len(losses)))
    state = TrainState(StackedMLP([net(m) for m in seeds]), lr, seeds, schedules=[loss.schedule for loss in losses] if schedules is None else schedules, **options)
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
        loss = DiffusionLoss(*triples[m])   # anew: a schedule that learns has its history from the stack
        alone = TrainState(net(m), seed=m, schedules=[loss.schedule])
        for _ in train(alone, loss, RING.sample(300, seed=m), 1, 128): pass
        assert together.history[-1][m]["train_loss"] == pytest.approx(alone.history[-1]["train_loss"], rel=2e-4)
        for a, b in zip(alone.net.parameters(), together.net.network(m).parameters()): assert (a - b).abs().max() < 1e-3


def test_what_one_network_of_a_stack_teaches_its_schedule_is_its_own():
    "neighbours with the same words would be computed as one loss, and mix their histories: each learns from its own data, as it does alone"
    make = lambda: [DiffusionLoss("adaptive(decay=0.5)", "v", "sigmoid") for _ in range(3)]
    losses, data = make(), [RING.sample(300, seed=0), 3 * RING.sample(300, seed=1), RING.sample(300, seed=2)]
    stack_of(losses, 2, data)
    histories = [loss.schedule.state()["history"] for loss in losses]
    for m, loss in enumerate(make()):
        for _ in train(TrainState(net(m), seed=m, schedules=[loss.schedule]), loss, data[m], 2, 100): pass
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


# ---- the options of a step

ALL = dict(ema=.9, clip=.05, warmup=5)   # three steps an epoch: the warm-up ends in the second


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.lists(TRIPLES, min_size=2, max_size=4))
def test_with_all_options_a_stack_gives_what_each_gives_alone(triples):
    losses = [DiffusionLoss(*triple) for triple in triples]
    together = stack_of(losses, batch_size=128, **ALL)
    for m, triple in enumerate(triples):
        loss = DiffusionLoss(*triple)
        alone = TrainState(net(m), seed=m, schedules=[loss.schedule], **ALL)
        for _ in train(alone, loss, RING.sample(300, seed=m), 1, 128): pass
        for a, b in zip(alone.net.parameters(), together.net.network(m).parameters()): assert (a - b).abs().max() < 1e-3
        for a, b in zip(alone.result.parameters(), together.result.network(m).parameters()): assert (a - b).abs().max() < 1e-3
    assert together.steps == alone.steps == 3 and together.optimizer.param_groups[0]["lr"] == alone.optimizer.param_groups[0]["lr"] == pytest.approx(6e-4)


@pytest.mark.parametrize("clip", [1e-3, .3, 1e6])
def test_each_network_of_a_stack_is_clipped_by_its_own_norm(clip):
    "gradients of very different lengths, some of them below the limit and one of them zero"
    scales, nets = [0., .1, 1., 100.], [net(m) for m in range(4)]
    stack, z, u = StackedMLP(nets), torch.randn(4, 50, 2), torch.rand(4, 50)
    (torch.tensor(scales) * stack(z, u).square().mean((1, 2))).sum().backward()
    before = [p.grad.clone() for p in stack.parameters()]
    norms = clip_gradients(stack, clip)
    for m, alone in enumerate(nets):
        (scales[m] * alone(z[m], u[m]).square().mean()).backward()
        torch.testing.assert_close(norms[m], clip_gradients(alone, clip), rtol=1e-5, atol=1e-9)
        linears = [layer for layer in alone.layers if isinstance(layer, torch.nn.Linear)]
        for layer, w, b in zip(linears, stack.weights, stack.biases, strict=True):
            for mine, theirs in ((w.grad[m].T, layer.weight.grad), (b.grad[m, 0], layer.bias.grad)): torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)
        after = torch.cat([p.grad[m].flatten() for p in stack.parameters()])
        assert after.norm() <= clip * (1 + 1e-5)
        if norms[m] < clip: assert all(torch.equal(p.grad[m], g[m]) for p, g in zip(stack.parameters(), before))


def test_clipping_keeps_a_network_from_its_neighbours():
    "one with a gradient of nan does not stop the others, nor does a long one shorten theirs"
    data = [RING.sample(300, seed=m) for m in range(3)]
    well = stack_of([DiffusionLoss()] * 3, 2, data, **ALL)
    for worse in (1e30, 1e3):
        ill = stack_of([DiffusionLoss()] * 3, 2, [data[0], data[1] * worse, data[2]], **ALL)
        assert ("diverged" in ill.history[-1][1]) == (worse == 1e30)
        for m in (0, 2):
            assert ill.history[-1][m] == well.history[-1][m]
            for a, b in zip(ill.result.network(m).parameters(), well.result.network(m).parameters()): assert torch.equal(a, b)


class Learning(CosineSchedule):
    "A schedule that counts the examples it was asked for."
    def __init__(self): super().__init__(); self._seen = torch.zeros(1)
    def level(self, t): self._seen = self._seen + len(t); return super().level(t)
    def state(self): return {"seen": self._seen}
    def load_state(self, tensors): self._seen = tensors["seen"]


def test_a_stack_with_all_options_resumes_bit_identically(tmp_path):
    "in the middle of the warm-up, with schedules that learn beside one that does not"
    data = [RING.sample(300, seed=m) for m in range(3)]
    def fresh(shift=0):
        losses = [DiffusionLoss(Learning()), DiffusionLoss("cosine", "v"), DiffusionLoss(Learning())]
        validations = [ValidationSet(loss, RING.sample(100), denoise=RING.denoise) for loss in losses]
        state = TrainState(StackedMLP([net(m + shift) for m in range(3)]), seed=[m + shift for m in range(3)], schedules=[loss.schedule for loss in losses], **ALL)
        return state, train_stack(state, losses, data, 4, 100, validations)
    whole, run = fresh()
    for _ in run: pass
    state, run = fresh()
    next(run).save(tmp_path / "checkpoint")
    other, run = fresh(7)
    other.load(tmp_path / "checkpoint")
    assert other.steps == 3 and other.learning[0]._seen == other.learning[2]._seen == 3 * 100   # the validation set is not training, and asks for levels without times
    for _ in run: pass
    assert other.history == whole.history and other.steps == whole.steps == 12
    for a, b in zip((*other.net.parameters(), *other.average.parameters()), (*whole.net.parameters(), *whole.average.parameters()), strict=True): assert torch.equal(a, b)
    for m in (0, 2): assert other.learning[m]._seen == whole.learning[m]._seen == 4 * 300


def test_validation_of_a_stack_sees_the_averages():
    losses = [DiffusionLoss("cosine", y) for y in ("x", "v")]
    validations = [ValidationSet(loss, RING.sample(100)) for loss in losses]
    state = stack_of(losses, 2, validations=validations, lr=.05, ema=.9)
    for m, (v, report) in enumerate(zip(validations, state.history[-1])):
        assert report["loss"] == v(state.average.alone(m))["loss"] != v(state.net.alone(m))["loss"]


def test_when_one_schedule_refuses_what_it_learned_none_takes_it(tmp_path):
    class Fussy(Learning):
        def load_state(self, tensors):
            super().load_state(tensors)
            if self._seen > 100: raise ValueError("too much seen")
    def fresh(): return TrainState(StackedMLP([net(0), net(1)]), seed=[0, 1], schedules=[Learning(), Fussy()])
    state = fresh()
    for s in state.learning.values(): s._seen += 200
    state.save(tmp_path / "checkpoint")
    other = fresh()
    with pytest.raises(ValueError, match="too much seen"): other.load(tmp_path / "checkpoint")
    assert [s._seen.item() for s in other.learning.values()] == [0, 0]


def test_schedules_that_learn_are_never_shared_between_networks():
    losses = [DiffusionLoss(Learning()) for _ in range(3)]
    stack_of(losses)
    assert [loss.schedule._seen.item() for loss in losses] == [300] * 3   # grouped by what they look like, the first would have seen all
    with pytest.raises(ValueError, match="cannot share a schedule that learns"): stack_of([losses[0]] * 2, schedules=[losses[0].schedule] * 2)
    with pytest.raises(ValueError, match="does not know it"): stack_of(losses, schedules=())
    with pytest.raises(ValueError, match="does not know it"): stack_of(losses, schedules=[loss.schedule for loss in losses[::-1]])


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
    return make_grid(grid(dataset="cluster", target=["x", "eps", "v"], **SMALL), root=tmp_path_factory.mktemp("grid"), stack=2)[0]


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
        for a, b in zip(alone.net.parameters(), runs[p].net.parameters(), strict=True): assert (a - b).abs().max() < 1e-3
        assert runs[p].metrics[-1]["loss"] == pytest.approx(alone.metrics[-1]["loss"], rel=1e-3)
    assert len({runs[p].metrics[-1]["loss"] for p in asked}) == 6


def test_equal_parameters_are_made_once(tmp_path):
    p = Parameters(dataset="cluster", **SMALL)
    runs, _ = make_grid([p, p], root=tmp_path)
    assert list(runs) == [p] and len([f for f in (tmp_path / "train").iterdir()]) == 1
