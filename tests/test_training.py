"Attempts to break lfdm.training: odd batches, options that are off, runs cut short, infinite losses."
import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP
from lfdm.training import (
    TrainState,
    clip_gradients,
    cooled_down,
    ema_decay,
    train,
    warmed_up,
)
from lfdm.validation import ValidationSet
from trained import DATA, LOSS, Learning, X, everything, learning, new_net, new_state, same, trained

# ---- batches

@pytest.mark.parametrize("n, batch_size", [(101, 20), (101, 101), (1, 1), (2, 2.)])
def test_every_example_is_seen_once_an_epoch(n, batch_size):
    x, seen, told = torch.arange(2. * n).reshape(n, 2), [], []
    class Recorder(DiffusionLoss):
        def __call__(self, net, x, generator):
            seen.append(x)
            return super().__call__(net, x, generator=generator)
    def progress(*of_all): told.append(of_all)
    for state in train(new_state(), Recorder(), x / n, 2, batch_size, progress=progress): pass
    assert told[-1] == (2 * n, 2 * n)
    assert [len(b) for b in seen] == 2 * [int(min(batch_size, n - i)) for i in range(0, n, int(batch_size))]
    epochs = (torch.cat(seen) * n).round().split(n)
    for epoch in epochs: assert torch.equal(epoch[:, 0].sort().values, x[:, 0])
    assert n <= 2 or not torch.equal(*epochs)
    assert state.epoch == 2 and [h["epoch"] for h in state.history] == [1, 2]


@pytest.mark.parametrize("function, name, wrong", [
    (train, "batch_size", 0), (train, "batch_size", 102), (train, "x", X[:, 0]), (TrainState, "lr", 0),
    (TrainState, "seed", 2**32), (TrainState, "seed", [0, 1]), (TrainState, "ema", 0), (TrainState, "ema", 1),
    (TrainState, "clip", 0), (ema_decay, "ema", 1.5), (clip_gradients, "clip", 0)])
def test_what_is_refused(function, name, wrong):
    given = dict(state=new_state(), loss=LOSS, x=X, batch_size=20, net=new_net(), n=1, ema=.9)
    takes, before = inspect.signature(function).parameters, everything(given["state"])
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        for _ in function(**{k: v for k, v in given.items() if k in takes} | {name: wrong}): pass
    assert everything(given["state"]) == before


# ---- processes

def process(rank):
    "One of two, which hears nothing of the other."
    return SimpleNamespace(process_index=rank, num_processes=2, reduce=lambda q, how: q)


def test_the_shares_of_two_processes_make_one_gradient():
    "their mean is the gradient of one process, also where one has a row more; the random streams are its own"
    def after_one_step(accelerator):
        state = new_state(lr=1e-9)
        for _ in train(state, LOSS, X, 1, len(X), accelerator=accelerator): pass
        return torch.cat([p.grad.flatten() for p in state.net.parameters()]), state
    (whole, alone), *parts = (after_one_step(a) for a in (None, process(0), process(1)))
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, whole, rtol=1e-4, atol=1e-7)
    for gradient, state in parts:
        assert not torch.allclose(gradient, whole, rtol=1e-3)
        assert torch.equal(state.generators[0].get_state(), alone.generators[0].get_state())


def test_what_processes_cannot_share():
    with pytest.raises(ValueError, match="last batch of an epoch has 1 examples for 2 processes.*than 20"):
        next(train(new_state(), LOSS, X, 1, 20, accelerator=process(0)))
    loss, state = learning()
    with pytest.raises(ValueError, match="train it on one"):
        next(train(state, loss, X, 1, 99, accelerator=process(0)))


@pytest.mark.parametrize("drop", [torch.nn.Dropout(.5), lambda v: torch.nn.functional.dropout(v, .5)])
def test_what_a_network_draws_follows_from_the_run_and_differs_between_processes(drop):
    "also what no module tells of; torch's own random state is neither read nor changed"
    class Dropping(MLP):
        def __init__(self):
            super().__init__(2, 8)
            self.drop = drop
        def forward(self, z, u):
            if self.training: seen.append(self.drop(torch.ones(50)))
            return super().forward(z, u)
    masks = []
    for accelerator, global_seed in ((process(0), 0), (process(0), 1), (process(1), 0)):
        seen, state = [], TrainState(Dropping())
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        for _ in train(state, LOSS, X[:60], 1, 30, ValidationSet(LOSS, X, 5), accelerator=accelerator): pass
        assert torch.equal(torch.get_rng_state(), before) and state.net.training
        masks.append(torch.stack(seen))
    one, again, other = masks
    assert len(one) == 2 and not torch.equal(*one)
    assert torch.equal(one, again) and not torch.equal(one, other)


# ---- the options of a step

def each_step(state, steps):
    "(weights, gradient used, learning rate) after each of some steps."
    for i in range(steps):
        state.descend(LOSS(state.net, X[20 * i:20 * i + 20], generator=state.generators[0]).mean())
        weights, gradients = zip(*((p.detach().flatten(), p.grad.flatten()) for p in state.net.parameters()))
        yield torch.cat(weights), torch.cat(gradients), state.optimizer.param_groups[0]["lr"]


def test_the_average_by_hand():
    state = new_state(ema=.3, lr=.1)
    flat = lambda net: torch.cat([p.detach().flatten() for p in net.parameters()])
    average = flat(state.net).double()
    for n, (weights, _, _) in enumerate(each_step(state, 5)):
        d = min(.3, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weights
        torch.testing.assert_close(average.float(), flat(state.average), rtol=1e-5, atol=1e-6)
    assert not torch.equal(flat(state.average), flat(state.net)) and state.result is state.average
    assert not any(p.requires_grad for p in state.average.parameters())


def test_the_decay_and_the_warm_up_rise_to_their_value_and_stay():
    decays = [ema_decay(.99, n) for n in range(2000)]
    assert decays[0] == .1 and decays == sorted(decays) and decays[889] < .99 == decays[890] == decays[-1]
    assert ema_decay(.05, 0) == .05 and warmed_up(0, 0) == warmed_up(0, 1) == 1
    rates = [lr for _, _, lr in each_step(new_state(lr=.1, warmup=4), 5)]
    assert rates == pytest.approx([.025, .05, .075, .1, .1])


def test_the_rate_falls_to_nothing_with_the_last_step():
    "also where training goes on: the end that counts is the one that was last asked for"
    def rates(state, epochs, seen):
        for p in state.optimizer.param_groups: p["lr"] = None   # set anew at each step
        progress = lambda *_: seen.append(state.optimizer.param_groups[0]["lr"])
        for _ in train(state, LOSS, X, epochs, 34, progress=progress): pass   # three steps an epoch
        return seen
    state = new_state(lr=1., warmup=2, cooldown=4)
    assert rates(state, 2, []) == pytest.approx([.5, 1, 1, .75, .5, .25])
    assert rates(state, 4, []) == pytest.approx([1, 1, 1, .75, .5, .25])
    for late in (new_state(cooldown=1), state):   # nobody said when it ends; it has ended
        with pytest.raises(ValueError, match="how many steps are to come.*ends_with"):
            late.descend(LOSS(late.net, X).mean())
    assert cooled_down(0, 3) == 0 and cooled_down(7, 0) == cooled_down(3, 3) == 1


def test_validation_sees_the_average_and_does_not_change_training():
    v = ValidationSet(LOSS, X, 5, denoise=DATA.denoise)
    state = trained(new_state(ema=.9, lr=.05), 2, validation=v)
    assert state.history[-1].items() >= v(state.result).items() and v(state.net) != v(state.result)
    assert state.history[0].items() > v(new_net()).items()
    plain = trained(new_state(lr=.05), 2)   # the training loss is that of the weights as they move
    assert same(plain.net, state.net)
    assert [h["train_loss"] for h in state.history[1:]] == [h["train_loss"] for h in plain.history]


def test_training_uses_the_clipped_gradient():
    free, clipped = (list(each_step(new_state(clip=c), 4)) for c in (None, .01))
    assert all(g.norm() > .02 for _, g, _ in free) and not torch.equal(free[-1][0], clipped[-1][0])
    assert all(g.norm() <= .01 * (1 + 1e-5) for _, g, _ in clipped)


def test_an_epoch_that_is_behind_asks_for_nothing():
    state = trained(new_state(), 2)
    assert not list(train(state, LOSS, X, 1, 20)) and state.epoch == 2


# ---- schedules that learn

def test_a_schedule_that_learns_must_be_known_to_the_state():
    loss, state = learning()
    for stranger in (new_state(), learning()[1]):
        with pytest.raises(ValueError, match=r"losses=\[loss\]"): trained(stranger, 1, loss=loss)
    with pytest.raises(ValueError, match="does not know it"): trained(state, 1)
    with pytest.raises(ValueError, match="1 networks need as many losses, not 2"):
        new_state(losses=[DiffusionLoss(Learning()), DiffusionLoss(Learning())])
    assert new_state(losses=[LOSS]).learning == {}   # one that does not learn may be named


# ---- training that goes wrong

def test_nan_in_training():
    state = new_state(lr=1e20)
    with pytest.raises(FloatingPointError, match=r"epoch \d+ .*Eps.*lr 1e\+20.*Lower lr"): trained(state, 50)
    assert len(state.history) == state.epoch and all(math.isfinite(h["train_loss"]) for h in state.history)


def test_means_of_gradients_that_ceased_do_not_become_slow():
    "dead units: what is left of their gradients is dropped before it is too small for fast arithmetic"
    def trained_for(steps, forgets):
        state = new_state(lr=.01)
        with torch.no_grad(): state.net.layers[0].bias[:4] = -100.   # these units are dead from the start
        state.descend(state.net.layers[0](torch.zeros(1, 3)).square().mean())   # the last gradient they get
        if not forgets: state._forget = lambda: None
        for _ in range(steps):
            state.descend(LOSS(state.net, X, generator=state.generators[0]).mean())
        means = torch.cat([m["exp_avg"].flatten() for m in state.optimizer.state.values()])
        return state.net, ((means != 0) & (means.abs() < 1e-37)).sum().item()
    (with_it, slow), (without, slow_without) = (trained_for(850, forgets) for forgets in (True, False))
    assert slow == 0 < slow_without and same(with_it, without)
