"Attempts to break lfdm.steps: for one Gaussian every step is affine, so moments and orders are exact."
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gaussians import exact, f64, gaussian, randn, refuse, states
from lfdm.schedules import SCHEDULES, CosineSchedule, Level
from lfdm.steps import (
    SAMPLERS,
    Counted,
    adaptive_step,
    annealed_langevin_step,
    at_angle,
    ddim_step,
    dpmpp_2m_step,
    edm_step,
    network_denoiser,
    predictor_corrector_step,
    solve,
)
from lfdm.targets import TARGETS

few = settings(max_examples=6, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize("sampler", SAMPLERS)
still = partial(edm_step, churn=0.)
numbers = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def level(logsnr, schedule="cosine", k=1.):
    "The level of that λ, its scales times k."
    logsnr = torch.as_tensor(logsnr, dtype=f64)
    return Level(logsnr, *(k * q for q in SCHEDULES[schedule]().scales(logsnr)))


def end_of(step, levels, sd=None, denoiser=exact):
    "Mean and standard deviation of the samples: a step is affine in z and in its noise, which is probed."
    (mean, variance), before = gaussian.moments(levels[0]), None
    sd = variance.sqrt() if sd is None else sd
    for t, s in zip(levels, levels[1:]):
        z, told = torch.stack([mean, mean + sd, mean])[:, None], {}
        if step is dpmpp_2m_step: told["before"] = before
        noise = torch.tensor([[0.], [0.], [1.]], dtype=f64)
        mean, high, moved = step(denoiser, z, s, t, noise, **told).flatten()
        before, sd = (t, exact(z, t)), torch.hypot(high - mean, moved - mean)
    return torch.stack([mean, sd])


def known(level):
    mean, variance = gaussian.moments(level)
    return torch.stack([mean, variance.sqrt()])


def gap(step, steps, schedule):
    "The largest error of mean and standard deviation at the end, in standard deviations."
    levels = [level(l, schedule) for l in torch.linspace(-10, 10, steps + 1, dtype=f64)]
    truth = known(levels[-1])
    return ((end_of(step, levels) - truth).abs().max() / truth[1]).item()


# ---- convergence

ORDERS = dict(ddim=1, euler=1, heun=2, dpmpp_2m=2, ancestral=1, euler_maruyama=1)

@pytest.mark.parametrize("schedule", ["ve", "cosine"])
@pytest.mark.parametrize("step, order", [*((SAMPLERS[k], order) for k, order in ORDERS.items()), (still, 2)])
def test_the_order_of_convergence(step, order, schedule):
    coarse, fine = gap(step, 100, schedule), gap(step, 200, schedule)
    assert abs(math.log2(coarse / fine) - order) < .2 and fine < {1: .08, 2: .007}[order]
    if step is still:   # and with churn, for which the noise must be asked at the raised level
        coarse, fine = (gap(partial(edm_step, steps=steps), steps, schedule) for steps in (100, 200))
        assert coarse > 1.5 * fine and fine < .02


@pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
def test_the_adaptive_solver_keeps_its_tolerance_in_one_step(tolerance):
    counted, ends = Counted(exact), [level(-10., "ve"), level(10., "ve")]
    found = end_of(partial(adaptive_step, rtol=tolerance, atol=tolerance), ends, denoiser=counted)
    error = (found - known(ends[1])).abs().max()
    assert 1e-3 * tolerance < error < 30 * tolerance and 8 < counted.evaluations < 2000


@few
@given(st.floats(-8, 8), st.floats(.01, 1.), st.sampled_from(["ve", "cosine"]))
def test_langevin_steps_leave_the_variance_they_are_known_to_leave(logsnr, size, schedule):
    "stationary at V/(1 - a/2V), too large; a corrector after no step does the same"
    l = level(logsnr, schedule)
    mean, variance = gaussian.moments(l)
    sd = (variance / (1 - size * l.sigma**2 / (2 * variance))).sqrt()
    for step in (annealed_langevin_step, predictor_corrector_step):
        numbers(end_of(partial(step, size=size), [l, l], sd), torch.stack([mean, sd]), atol=1e-12)


# ---- what a step owes its caller

@every
def test_a_step_changes_nothing_but_its_result(sampler):
    z, noise, s, t = randn(4, 2), randn(4, 2, seed=1), level(1.), level(.5)
    before, copies = torch.get_rng_state(), [q.clone() for q in (z, noise, *s, *t)]
    first, second = (SAMPLERS[sampler](exact, z, s, t, noise) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, z)
    assert all(map(torch.equal, copies, (z, noise, *s, *t))) and torch.equal(torch.get_rng_state(), before)


@every
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_precision_is_the_callers(sampler, dtype):
    path = states(steps=5, schedule=SCHEDULES["ve"](-10, 10), sampler=sampler, dtype=dtype)
    assert all(z.dtype == l.logsnr.dtype == dtype for _, l, z in path)


# ---- edm

def churned(n_t, **kw):
    "The standard deviation of the noise that the step adds at σ/α = n_t, over n_t."
    t, s = Level(*(torch.tensor(q, dtype=f64) for q in (-2 * math.log(n_t), 1., n_t))), level(30.)
    zero, one = torch.tensor([0., 1.], dtype=f64)[:, None, None]
    quiet = lambda z, level: (z, torch.zeros_like(z))
    return (edm_step(quiet, zero, s, t, one, **kw) / s.alpha).item() / n_t


@few
@given(st.floats(.06, 49), st.floats(.01, 200), st.integers(1, 500), st.floats(.5, 2))
def test_churn_is_what_the_paper_says(n_t, churn, steps, inflate):
    gamma = min(churn / steps, math.sqrt(2) - 1)
    expected = inflate * math.sqrt((1 + gamma)**2 - 1)
    assert churned(n_t, churn=churn, steps=steps, inflate=inflate) == pytest.approx(expected, rel=1e-6)


def test_churn_never_more_than_doubles_the_variance_and_stays_inside_its_range():
    assert churned(1., churn=0.) == 0 and churned(1., churn=1e9) <= 1 + 1e-9
    assert churned(.0499) == churned(50.1) == 0 < churned(.0501) and churned(49.9) > 0
    assert churned(1., low=1.) > 0 < churned(1., high=1.)   # both ends are inside


@every
def test_a_network_is_never_asked_outside_its_training(sampler):
    seen = []
    def denoiser(z, l): seen.append(l.logsnr.item()); return exact(z, l)
    denoiser.within = (-7., 7.)
    states(denoiser, (2, 2), 30, schedule=CosineSchedule(-7, 7), sampler=sampler)
    assert min(seen) >= -7 - 1e-3 and max(seen) <= 7 + 1e-3


# ---- dpmpp_2m

@pytest.mark.parametrize("ratio", [.5, 1.9, 2.1])
def test_a_line_through_two_guesses_is_followed_up_to_twice_the_last_step(ratio):
    r, t, s, z = level(-1.), level(0.), level(ratio), randn(4, 2)
    before, ddim = (r, exact(randn(4, 2, seed=2), r)), ddim_step(exact, z, s, t)
    more = s.alpha * -torch.expm1((t.logsnr - s.logsnr) / 2) * ratio / 2 * (exact(z, t)[0] - before[1][0])
    numbers(dpmpp_2m_step(exact, z, s, t), ddim)
    numbers(dpmpp_2m_step(exact, z, s, t, before=before) - ddim, more if ratio < 2 else 0 * more)


# ---- what goes wrong

@every
def test_a_denoiser_that_stops_being_finite_is_placed(sampler):
    "the step and its λ; within an adaptive step the λ of the evaluation"
    def denoiser(z, l): return tuple(q + (math.inf if l.logsnr >= 0 else 0) for q in exact(z, l))
    with pytest.raises(FloatingPointError, match="stopped being finite at") as e:
        states(denoiser, steps=10, sampler=sampler)
    said = str(e.value)
    assert ("velocity" if sampler == "adaptive" else "of 10") in said
    assert 0 <= float(said.split("logsnr ")[1].rstrip(".")) < 5


@every
@pytest.mark.parametrize("denoiser", [lambda z, l: z, lambda z, l: (z, None), lambda z, l: (z, z[:, :1])])
def test_what_is_no_guess_is_refused(sampler, denoiser):
    "one tensor of two rows would be unpacked into its rows"
    for one in (denoiser, Counted(denoiser)):
        with pytest.raises((TypeError, ValueError), match="denoiser must return"):
            SAMPLERS[sampler](one, randn(2, 2), level(1.), level(0.), randn(2, 2))


def test_an_adaptive_solver_that_cannot_converge_says_where_and_what_to_do():
    "but an assertion of the network says what is wrong with the network"
    with pytest.raises(RuntimeError, match=r"did not converge at logsnr -?[0-6]\.\d.*max_steps.*\(3\)"):
        states(steps=1, schedule=SCHEDULES["ve"](-6, 6), sampler=partial(adaptive_step, max_steps=3))
    with pytest.raises(AssertionError, match="work before"): states(refuse, steps=1, sampler="adaptive")


def test_solve_knows_what_it_cannot_miss():
    phi, z, pair, seen = torch.tensor(.3, dtype=f64), randn(3), (randn(3), randn(2, 2)), []
    assert all(map(torch.equal, solve(refuse, pair, phi, phi), pair))
    growth = lambda phi, z: seen.append(phi.item()) or z
    grown = solve(growth, z, phi, phi + 1, 1e-9, 1e-9)
    numbers(grown, math.e * z, rtol=1e-7, atol=0)
    numbers(solve(growth, grown, phi + 1, phi, 1e-9, 1e-9), z, rtol=1e-7, atol=0)   # backwards
    assert min(seen) >= .3 - 1e-12 and max(seen) <= 1.3 + 1e-12                     # never beyond an end
    numbers(at_angle(phi).angle, phi)


KEPT = ["cosine", "ve", "rectified_flow"]   # variance preserved, exploding, a straight line


@pytest.mark.parametrize("target", TARGETS)
def test_a_network_guesses_the_same_whatever_the_scales_of_the_sampling(target):
    "the score is one of its own scales: asked at others as it is, it would answer something else"
    y, (x, eps) = TARGETS[target](), randn(2, 5, 2)
    for trained, sampled, logsnr in itertools.product(KEPT, KEPT, (-8., -1., 3., 8.)):
        own, k = SCHEDULES[trained](), torch.tensor(logsnr, dtype=f64)
        at = SCHEDULES[sampled]().level_at(k)
        def net(z, u): return y.encode(x, eps, *own.scales(k))
        guess = network_denoiser(net, target, scales=own.scales)(at.alpha * x + at.sigma * eps, at)
        for got, want in zip(guess, (x, eps)): numbers(got, want, rtol=1e-6, atol=1e-6)
