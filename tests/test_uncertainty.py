"A weighting that learns: its loss at its floor, what a checkpoint keeps of it, and what it must not touch."
import math

import pytest
import torch

from lfdm.data import DATASETS
from lfdm.evaluation import floor, floor_per_logsnr
from lfdm.losses import DiffusionLoss
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.training import train
from lfdm.uncertainty import Uncertainty
from lfdm.validation import ValidationSet
from lfdm.weightings import WEIGHTINGS
from trained import X, everything, new_net, new_state, stacked, trained

FIXED = [name for name, cls in SCHEDULES.items() if not cls.learned]
CLUSTER = DATASETS["cluster"]()


def learning(base="weighted", target="v"): return DiffusionLoss("cosine", target, f"uncertainty({base})")


def taught(loss, rounds=150):
    "The loss, after its weighting has seen the exact mean error of ε at random levels."
    g = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        t = torch.rand(512, generator=g, dtype=torch.float64)
        level = loss.schedule.level(t)
        error = loss.judge.eps_factor(t) * CLUSTER.eps_floor(level.logsnr)
        loss.observe(level, error / loss.weighting.mean(level.logsnr) + loss.weighting.u(level.logsnr))
    return loss


def at_floor(loss):
    "Its mean over times for a network whose error is the floor."
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    k = loss.schedule.logsnr(t)
    return (loss.eps_factor(t) * CLUSTER.eps_floor(k) + loss.weighting.u(k)).mean().item()


@pytest.mark.parametrize("schedule", FIXED)
def test_with_what_it_has_learned_the_loss_lies_just_over_its_floor(schedule):
    "for every schedule, with a target and a weighting that go round"
    i = FIXED.index(schedule)
    target = list(TARGETS)[i % len(TARGETS)]
    base = [w for w in WEIGHTINGS if w not in ("uncertainty", "ddpm_vlb")][i % (len(WEIGHTINGS) - 2)]
    loss = DiffusionLoss(schedule, target, Uncertainty(base, -15, 15, bins=60))
    lowest, fresh = floor(loss, CLUSTER), at_floor(loss)
    assert 0 < at_floor(taught(loss)) - lowest < 0.05
    assert fresh - lowest > at_floor(loss) - lowest and floor(loss, CLUSTER) == lowest


def test_the_floor_per_level_adds_up_and_follows_the_judge():
    loss = learning("nelbo")
    k = torch.linspace(-12.9, 12.9, 20_001, dtype=torch.float64)
    total = torch.trapezoid(floor_per_logsnr(loss, CLUSTER, k), k).item()
    assert math.isclose(total, floor(loss, CLUSTER), rel_tol=1e-3)
    density = loss.schedule.density(k)
    a = floor_per_logsnr(loss.judge, CLUSTER, k) / density
    assert torch.allclose(floor_per_logsnr(loss, CLUSTER, k), density * (1 + a.log()))


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path):
    loss = learning()
    whole = trained(new_state(losses=[loss]), 4, 20, loss=loss)
    first, second = learning(), learning()
    trained(new_state(losses=[first]), 2, 20, loss=first).save(tmp_path / "c")
    state = new_state(losses=[second])
    state.load(tmp_path / "c")
    assert everything(trained(state, 4, 20, loss=second)) == everything(whole)
    k = torch.linspace(-12, 12, 50)
    assert torch.equal(second.weighting.u(k), loss.weighting.u(k)) and (loss.weighting.u(k) != 0).any()
    with pytest.raises(ValueError, match="what these losses have learned"): new_state().load(tmp_path / "c")


def test_in_a_stack_each_network_teaches_its_own():
    losses = [learning(), learning()]
    stacked(losses, 2, [X, 9 * X])
    alone = learning()
    trained(new_state(losses=[alone]), 2, 50, loss=alone)
    k = torch.linspace(-12, 12, 50)
    assert torch.allclose(losses[0].weighting.u(k), alone.weighting.u(k), atol=1e-3)
    assert (losses[0].weighting.u(k) - losses[1].weighting.u(k)).abs().max() > 0.5
    with pytest.raises(ValueError, match="cannot share a schedule or weighting"): stacked([losses[0]] * 2)


def test_measuring_teaches_nothing_and_the_excess_is_without_u():
    loss = taught(learning(), 50)
    before = loss.weighting.state()["history"]
    found = ValidationSet(loss, CLUSTER.sample(500), denoise=CLUSTER.denoise)(new_net())
    plain = ValidationSet(loss.judge, CLUSTER.sample(500), denoise=CLUSTER.denoise)(new_net())
    assert torch.equal(before.nan_to_num(), loss.weighting.state()["history"].nan_to_num())
    assert found["excess"] > 0 and found["loss"] != plain["loss"]
    per_level = [a / b for a, b in zip(found["excess_per_logsnr"], plain["excess_per_logsnr"]) if b]
    means = loss.weighting.mean(torch.linspace(-12.9, 12.9, 200))
    assert 0.9 / means.max() < min(per_level) and max(per_level) < 1.1 / means.min()


def test_an_error_of_zero_and_values_that_are_no_numbers_do_no_harm():
    w, k = Uncertainty(bins=4), torch.tensor([-12., -5., 5., 12.])
    w.observe(k, torch.zeros(4))
    assert torch.equal(w.mean(k), torch.ones(4))
    w.observe(k, torch.tensor([math.nan, 1., 1., 1.]))
    assert torch.equal(w.mean(k), torch.ones(4))
    w.observe(k[:1], torch.tensor([7.]))   # the others have seen no error above 0: their neighbour's
    assert (w.mean(k) == w.mean(k)[0]).all() and w.mean(k)[0] > 0
    with pytest.raises(ValueError, match="does not hold the history of 4 bins"):
        w.load_state(Uncertainty(bins=5).state())


def test_several_processes_are_refused():
    class Two: process_index, num_processes = 0, 2
    loss = learning()
    with pytest.raises(ValueError, match="learns follows the losses of one process"):
        next(train(new_state(losses=[loss]), loss, X, batch_size=50, accelerator=Two()))
