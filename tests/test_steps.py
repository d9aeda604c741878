"Attempts to break lfdm.steps: for one Gaussian every step is affine, so moments and orders are exact."
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gaussians import exact, f64, gaussian, randn, refuse, states
from lfdm.networks import MLP
from lfdm.sampling import sample
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
    langevin_step,
    network_denoiser,
    predictor_corrector_step,
    solve,
    velocity,
)

few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize("sampler", SAMPLERS)
both_scales = pytest.mark.parametrize("schedule", ["ve", "cosine"])
DETERMINISTIC = ["ddim", "euler", "heun", "adaptive", "dpmpp_2m"]
CALLS = dict(ancestral=1, ddim=1, euler=1, heun=2, edm=2, dpmpp_2m=1, euler_maruyama=1, annealed_langevin=1,
             predictor_corrector=2)
still = partial(edm_step, churn=0.)
numbers = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def level(logsnr, schedule="cosine", k=1.):
    "The level of that λ, its scales times k."
    logsnr = torch.as_tensor(logsnr, dtype=f64)
    return Level(logsnr, *(k * q for q in SCHEDULES[schedule]().scales(logsnr)))


def grid(steps, schedule="ve", low=-10., high=10.):
    return [level(l, schedule) for l in torch.linspace(low, high, steps + 1, dtype=f64)]


def followed(step, levels, denoiser=exact):
    "The first marginal's mean and one standard deviation more, taken down the levels without noise."
    mean, variance = gaussian.moments(levels[0])
    z, before = torch.stack([mean, mean + variance.sqrt()])[:, None], None
    for t, s in zip(levels, levels[1:]):
        told = {"before": before} if step is dpmpp_2m_step else {}
        z, before = step(denoiser, z, s, t, torch.zeros_like(z), **told), (t, denoiser(z, t))
    return z.flatten()


def propagated(step, levels, variance=None):
    "Mean and variance of the samples, from what each step does to (z, noise) = (0, 0), (1, 0) and (0, 1)."
    mean, exact_variance = gaussian.moments(levels[0])
    variance = exact_variance if variance is None else variance
    z, noise = torch.tensor([[0., 1., 0.], [0., 0., 1.]], dtype=f64)[..., None]
    for t, s in zip(levels, levels[1:]):
        c, a, b = step(exact, z, s, t, noise).flatten()
        mean, variance = (a - c) * mean + c, (a - c)**2 * variance + (b - c)**2
    return mean, variance


def gap(step, steps, schedule):
    "The largest error of mean and standard deviation at the end, in standard deviations."
    levels = grid(steps, schedule)
    mean, variance = gaussian.moments(levels[-1])
    if step in (still, *map(SAMPLERS.get, DETERMINISTIC)):
        low, high = followed(step, levels)
        found = low, high - low
    else: found = (m := propagated(step, levels))[0], m[1].sqrt()
    return max((found[0] - mean).abs(), (found[1] - variance.sqrt()).abs()).item() / variance.sqrt().item()


# ---- convergence

ORDERS = [*((SAMPLERS[name], order) for name, order in dict(
    ddim=1, euler=1, heun=2, dpmpp_2m=2, ancestral=1, euler_maruyama=1).items()), (still, 2)]

@both_scales
@pytest.mark.parametrize("step, order", ORDERS, ids=lambda v: getattr(v, "__name__", str(v)[:9]))
def test_the_order_of_convergence(step, order, schedule):
    coarse, fine = gap(step, 150, schedule), gap(step, 300, schedule)
    assert abs(math.log2(coarse / fine) - order) < .2 and fine < {1: .05, 2: .003}[order]


@both_scales
def test_churned_steps_keep_the_variance_as_they_grow_in_number(schedule):
    errors = [gap(partial(edm_step, steps=steps), steps, schedule) for steps in (100, 200, 400)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] and errors[2] < .01
    inflated = gap(partial(edm_step, steps=200, inflate=1.2), 200, schedule)   # noise it did not ask for
    assert inflated > 10 * errors[1]


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-7])
def test_the_adaptive_solver_keeps_its_tolerance_in_one_step(tolerance):
    counted = Counted(exact)
    found = followed(partial(adaptive_step, rtol=tolerance, atol=tolerance), grid(1), counted)
    mean, variance = gaussian.moments(grid(1)[-1])
    error = (found - torch.stack([mean, mean + variance.sqrt()])).abs().max()
    assert 1e-3 * tolerance < error < 30 * tolerance and 8 < counted.evaluations < 2000


def test_the_adaptive_solver_goes_up_as_well_as_down():
    z, low, high = randn(4, 2), level(-3.), level(4.)
    there = adaptive_step(exact, z, high, low, rtol=1e-9, atol=1e-9)
    numbers(adaptive_step(exact, there, low, high, rtol=1e-9, atol=1e-9), z, rtol=0, atol=1e-6)
    assert (there - z).abs().min() > .01


@few
@given(st.floats(-8, 6), st.floats(.01, 4), st.sampled_from(["ve", "cosine"]))
def test_an_ancestral_step_is_the_gaussian_conditional_at_the_guess(logsnr, h, schedule):
    "its noise is that of q(z_s given z_t, x); with x̂ for x it lacks the posterior variance of x"
    t, s = level(logsnr, schedule), level(logsnr + h, schedule)
    _, variance = propagated(SAMPLERS["ancestral"], [t, s])
    c2 = gaussian.std**2
    of_x = c2 * t.sigma**2 / (t.alpha**2 * c2 + t.sigma**2)
    lost = of_x * (s.alpha * -torch.expm1(t.logsnr - s.logsnr))**2
    numbers(variance + lost, gaussian.moments(s)[1], atol=0)


@few
@given(st.floats(-8, 8), st.floats(.01, 1.), st.sampled_from(["ve", "cosine"]))
def test_langevin_steps_leave_the_variance_they_are_known_to_leave(logsnr, size, schedule):
    "step size a: stationary at V/(1 - a/2V), too large; a corrector after no step does the same"
    l = level(logsnr, schedule)
    mean, variance = gaussian.moments(l)
    a = size * l.sigma**2
    stationary = variance / (1 - a / (2 * variance))
    for step in (annealed_langevin_step, predictor_corrector_step):
        found = propagated(partial(step, size=size), [l, l], stationary)
        numbers(torch.stack(found), torch.stack([mean, stationary]), atol=1e-12)
    z, noise = randn(3, 2), randn(3, 2, seed=1)
    plain = langevin_step(lambda z: -(z - mean) / variance, z, a, noise)
    torch.testing.assert_close(annealed_langevin_step(exact, z, l, l, noise, size), plain)


# ---- the velocity

def test_an_angle_is_its_level_and_a_level_its_angle():
    phi = torch.linspace(1e-6, math.pi / 2 - 1e-6, 101, dtype=f64)
    found = at_angle(phi)
    numbers(found.angle, phi, atol=0)
    numbers(found.scale, torch.ones_like(phi))
    numbers(2 * (found.alpha / found.sigma).log(), found.logsnr)
    for l in (-9., 0., 9.): torch.testing.assert_close(level(l, "ve").angle, level(l).angle)


def test_the_velocity_is_the_slope_of_the_known_flow():
    "a standardized value stays what it is along the flow of a Gaussian"
    w = randn(5)
    def at(phi):
        mean, variance = gaussian.moments(at_angle(phi))
        return mean + variance.sqrt() * w
    for phi in torch.linspace(.01, 1.56, 9, dtype=f64):
        slope = torch.autograd.functional.jvp(at, phi, torch.ones_like(phi))[1]
        numbers(velocity(exact, at(phi), at_angle(phi)), slope)


# ---- what a step owes its caller

@every
def test_a_step_changes_nothing_but_its_result(sampler):
    z, noise, s, t = randn(4, 2), randn(4, 2, seed=1), level(1.), level(.5)
    before, copies = torch.get_rng_state(), [q.clone() for q in (z, noise, *s, *t)]
    first, second = (SAMPLERS[sampler](exact, z, s, t, noise) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, z) and first.data_ptr() != z.data_ptr()
    assert all(map(torch.equal, copies, (z, noise, *s, *t))) and torch.equal(torch.get_rng_state(), before)


@every
@few
@given(l=st.floats(-8, 8), h=st.floats(.01, 3), k_s=st.floats(.01, 100), k_t=st.floats(.01, 100),
       schedule=st.sampled_from(["ve", "cosine"]))
def test_only_ratios_of_scales_matter(sampler, l, h, k_s, k_t, schedule):
    "variance preserving, exploding and all between are one process in other units"
    z, noise, step = randn(4, 2), randn(4, 2, seed=1), SAMPLERS[sampler]
    torch.manual_seed(0)
    near = 1e-3 if sampler == "adaptive" else 1e-7
    t, s = level(l, schedule), level(l + h, schedule)
    for denoiser in (exact, network_denoiser(MLP(2, 8).double(), "v")):
        plain = step(denoiser, t.scale * z, s, t, noise)
        zoomed = level(l + h, schedule, k_s), level(l, schedule, k_t)
        numbers(step(denoiser, k_t * t.scale * z, *zoomed, noise) / k_s, plain, rtol=near, atol=near)


SAME_MARGINALS = [*(SAMPLERS[name] for name in (*DETERMINISTIC, "ancestral", "euler_maruyama")), still]

@pytest.mark.parametrize("step", SAME_MARGINALS, ids=lambda step: getattr(step, "__name__", "still"))
def test_no_way_to_go_is_no_change(step):
    for schedule in SCHEDULES:
        for logsnr in (-12., 0., 12.):
            z, l = randn(4, 2), level(logsnr, schedule)
            numbers(step(exact, l.scale * z, l, l, randn(4, 2, seed=1)), l.scale * z)


@every
def test_images_go_like_their_numbers(sampler):
    z, noise, s, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), level(1.), level(.2)
    found = SAMPLERS[sampler](exact, z, s, t, noise)
    flat = SAMPLERS[sampler](exact, z.flatten(1), s, t, noise.flatten(1))
    assert torch.equal(found.flatten(1), flat) and found.shape == z.shape


@every
def test_precision_is_the_callers(sampler, monkeypatch):
    "a state stays in its dtype, and float32 is float64 rounded"
    draw = torch.randn   # the same numbers for both
    monkeypatch.setattr(torch, "randn", lambda *a, dtype=None, **kw: draw(*a, dtype=f64, **kw).to(dtype))
    ends = []
    for dtype in (torch.float32, f64):
        path = states(shape=(5, 2), steps=20, schedule=SCHEDULES["ve"](-10, 10), sampler=sampler, dtype=dtype)
        assert all(z.dtype == l.logsnr.dtype == dtype for _, l, z in path)
        ends.append(path[-1][2].double())
    numbers(*ends, rtol=2e-3, atol=2e-3)
    assert not torch.equal(*ends)


# ---- edm

def quiet(z, level): return z, torch.zeros_like(z)

def one_step(t, s, **kw):
    zero, one = torch.tensor([0., 1.], dtype=f64)[:, None, None]
    return edm_step(quiet, zero, s, t, one, **kw)


def churned(n_t, **kw):
    "The standard deviation of the noise that the step adds at σ/α = n_t, over n_t."
    t, s = level(-2 * math.log(n_t)), level(-2 * math.log(n_t) + 1)
    return (one_step(t, s, **kw) / s.alpha).item() / n_t


@few
@given(st.floats(.06, 49), st.floats(.01, 200), st.integers(1, 500), st.floats(.5, 2))
def test_churn_is_what_the_paper_says(n_t, churn, steps, inflate):
    gamma = min(churn / steps, math.sqrt(2) - 1)
    expected = inflate * math.sqrt((1 + gamma)**2 - 1)
    assert churned(n_t, churn=churn, steps=steps, inflate=inflate) == pytest.approx(expected, rel=1e-6)


def test_churn_never_more_than_doubles_the_variance_and_stays_inside_its_range():
    assert churned(1., churn=1e9) == pytest.approx(1)
    assert churned(1., churn=0.) == churned(1., inflate=0.) == 0
    assert churned(.0499) == churned(50.1) == 0 and churned(.0501) > 0 < churned(49.9)
    assert churned(.3, low=.31) == churned(.3, high=.29) == 0 < churned(.3, low=.29, high=.31)
    one = Level(*(torch.tensor(q, dtype=f64) for q in (0., 1., 1.)))   # σ/α = 1: both ends are inside
    assert all(one_step(one, level(1.), **kw) > 0 for kw in (dict(low=1.), dict(high=1.)))


def test_edm_asks_at_the_raised_level_and_at_the_end():
    seen = []
    def denoiser(z, l): seen.append([q.item() for q in l]); return exact(z, l)
    edm_step(denoiser, randn(3, 2), level(1.), level(0.), randn(3, 2, seed=1), steps=100)
    raised, end = seen
    assert raised == pytest.approx([-2 * math.log(1.4), 1, 1.4])
    assert end == pytest.approx([1, 1, math.exp(-.5)])


@every
def test_a_network_is_never_asked_outside_its_training(sampler):
    "the sampling range is refused if it leaves the training's; then no step may leave it either"
    seen = []
    def denoiser(z, l): seen.append(l.logsnr.item()); return exact(z, l)
    denoiser.within = (-7., 7.)
    states(denoiser, (2, 2), 30, schedule=CosineSchedule(-7, 7), sampler=sampler)
    assert min(seen) >= -7 - 1e-3 and max(seen) <= 7 + 1e-3


# ---- dpmpp_2m

@few
@given(st.floats(-6, 6), st.floats(.05, 2), st.floats(.05, 4))
def test_a_line_through_two_guesses_is_followed_as_far_as_it_can_be_trusted(l, last, ratio):
    "up to a step twice the last one; beyond it, in a first step and in one of no length it is DDIM's"
    r, t, s = level(l - last), level(l), level(l + ratio * last)
    z, before = randn(4, 2), (r, exact(randn(4, 2, seed=2), r))
    found, ddim = dpmpp_2m_step(exact, z, s, t, before=before), ddim_step(exact, z, s, t)
    numbers(dpmpp_2m_step(exact, z, s, t), ddim)
    for end in (s, t):
        numbers(dpmpp_2m_step(exact, z, end, t, before=(t, exact(z + 1, t))), ddim_step(exact, z, end, t))
    if ratio > 2.0001: numbers(found, ddim)
    if ratio < 1.9999:
        shrunk = s.alpha * -torch.expm1(-(s.logsnr - t.logsnr) / 2)
        numbers(found - ddim, shrunk * ratio / 2 * (exact(z, t)[0] - before[1][0]), rtol=1e-6)


# ---- counting, and what goes wrong

@every
def test_evaluations_are_counted(sampler):
    counted = Counted(exact)
    states(counted, (3, 2), 7, sampler=sampler)
    found = counted.evaluations
    if sampler == "adaptive": assert found >= 7 * 7 and (found - 7) % 6 == 0   # dopri5: one, and six a step
    else: assert found == 7 * CALLS[sampler]


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_denoiser_that_stops_being_finite_is_placed(sampler, bad):
    "the step and its λ; within an adaptive step the λ of the evaluation"
    s = SCHEDULES["cosine"]()
    def denoiser(z, l):
        x, eps = exact(z, l)
        off = bad if l.logsnr >= 0 else 0
        return (x + off, eps) if sampler in ("ancestral", "dpmpp_2m") else (x, eps + off)
    with pytest.raises(FloatingPointError) as e: states(denoiser, steps=10, schedule=s, sampler=sampler)
    said = str(e.value)
    if sampler == "adaptive":
        assert "velocity stopped being finite at logsnr" in said
        assert 0 <= float(said.split("logsnr ")[1].rstrip(".")) < 2
    else:
        at = int(said.split("step ")[1].split()[0])
        logsnr = s.logsnr(1 - at / 10).item()
        assert f"step {at} of 10" in said and f"logsnr {logsnr:.4g}" in said and 0 <= logsnr < 5


UNDEFINED = ("edm", "euler_maruyama", "annealed_langevin", "predictor_corrector")

@every
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_an_uncut_schedule_gives_samples_or_says_why_not(sampler, dtype):
    "α = 0 at the start, σ = 0 at the end: no nan comes out; with v, defined everywhere, most give samples"
    torch.manual_seed(0)
    for target in ("v", "x", "eps", "score"):
        denoiser = network_denoiser(MLP(2, 8).to(dtype), target)
        uncut = CosineSchedule(-math.inf, math.inf)
        try: *_, (_, l, z) = states(denoiser, (3, 2), schedule=uncut, sampler=sampler, dtype=dtype)
        except (FloatingPointError, ZeroDivisionError, RuntimeError) as e:
            assert target != "v" or sampler in UNDEFINED
            assert any(word in str(e) for word in ("finite", "alpha", "sigma", "logsnr -")), (target, e)
        else: assert z.isfinite().all() and l.sigma == 0


def rough(z, level): return z, torch.sin(1e9 * z * level.logsnr) * 50

@pytest.mark.parametrize("denoiser, most", [(exact, 3), (rough, 50)])
def test_an_adaptive_solver_that_cannot_converge_says_where_and_what_to_do(denoiser, most):
    says = r"did not converge at logsnr -?\d.*rtol and atol.*max_steps.*fixed steps"
    with pytest.raises(RuntimeError, match=says) as e:
        step = partial(adaptive_step, max_steps=most)
        states(denoiser, steps=1, schedule=SCHEDULES["ve"](-6, 6), sampler=step)
    said = str(e.value)
    assert -6.1 < float(said.split("logsnr ")[1].split()[0]) < 6.1 and f"({most})" in said


def test_an_assertion_of_the_network_is_not_taken_for_the_solvers():
    "a user's assert says what is wrong with the network; 'loosen rtol' would not help"
    with pytest.raises(AssertionError, match="work before"): sample(refuse, 3, steps=1, sampler="adaptive")


@pytest.mark.parametrize("name", ["rtol", "atol", "max_steps"])
@pytest.mark.parametrize("bad", [0, -1e-3, math.nan, "1", None, True])
def test_bad_tolerances_are_named_before_any_work(name, bad):
    with pytest.raises((ValueError, TypeError), match=f"{name} must"):
        sample(refuse, 3, steps=1, sampler=partial(adaptive_step, **{name: bad}))


def test_solve_knows_what_it_cannot_miss():
    phi = torch.tensor(.3, dtype=f64)
    z, pair, growth = randn(3), (randn(3), randn(2, 2)), lambda phi, z: z
    assert torch.equal(solve(refuse, z, phi, phi), z)
    assert all(map(torch.equal, solve(refuse, pair, phi, phi), pair))
    grown = solve(growth, z, phi, phi + 1, 1e-9, 1e-9)
    numbers(grown, math.e * z, rtol=1e-7, atol=0)
    numbers(solve(growth, grown, phi + 1, phi, 1e-9, 1e-9), z, rtol=1e-7, atol=0)   # backwards
    coupled = lambda phi, state: (state[1].sum() + 0 * state[0], 0 * state[1])
    a, b = solve(coupled, pair, phi, phi + 2, 1e-9, 1e-9)
    numbers(a, pair[0] + 2 * pair[1].sum(), rtol=1e-7, atol=1e-7)
    numbers(b, pair[1])
    seen = []
    solve(lambda phi, z: seen.append(phi.item()) or z, z, phi, phi + .1, 1e-3, 1e-3)
    assert min(seen) >= .3 - 1e-12 and max(seen) <= .4 + 1e-12                      # never beyond the end


def test_what_a_partial_binds_is_used():
    options = {edm_step: dict(churn=0.), annealed_langevin_step: dict(size=.1),
               predictor_corrector_step: dict(size=.5), adaptive_step: dict(rtol=.1, atol=.1)}
    for step, kw in options.items():
        plain, bound = (sample(exact, 5, steps=9, sampler=s) for s in (step, partial(step, **kw)))
        assert not torch.equal(plain, bound), step


def test_an_unknown_target_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown target 'epsilon'.*Did you mean 'eps'"):
        network_denoiser(MLP(2, 8), "epsilon")


