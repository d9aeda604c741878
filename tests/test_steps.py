"Attempts to break lfdm.steps: for one Gaussian every step is affine, so means, variances and orders of convergence are exact, without a random number."
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.networks import MLP, StackedMLP
from lfdm.parameters import Parameters
from lfdm.runs import Run
from lfdm.sampling import sample, sample_stack, sampling
from lfdm.core import from_spec
from lfdm.schedules import SCHEDULES, CosineSchedule, Level
from lfdm.steps import SAMPLERS, Counted, adaptive_step, annealed_langevin_step, at_angle, ddim_step, dpmpp_2m_step, edm_step, exact_denoiser, langevin_step, network_denoiser, predictor_corrector_step, solve, velocity

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('sampler', SAMPLERS)
DETERMINISTIC = ['ddim', 'euler', 'heun', 'adaptive', 'dpmpp_2m']
CALLS = dict(ancestral=1, ddim=1, euler=1, heun=2, edm=2, dpmpp_2m=1, euler_maruyama=1, annealed_langevin=1, predictor_corrector=2)
still = partial(edm_step, churn=0.)


class Gaussian:
    "One Gaussian: its posterior mean in one line."
    def __init__(self, mean=2., std=.5): self.mean, self.std = mean, std
    def denoise(self, z, alpha, sigma): return (sigma**2 * self.mean + alpha * self.std**2 * z) / (alpha**2 * self.std**2 + sigma**2)
    def moments(self, level): return level.alpha * self.mean, level.alpha**2 * self.std**2 + level.sigma**2

gaussian = Gaussian()
exact = exact_denoiser(gaussian)


def refuse(z, level): raise RuntimeError('work before the choices were checked')
def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=generator(seed), dtype=dtype)
def level(logsnr, schedule='cosine', k=1.):
    "The level of that λ, its scales times k"
    logsnr = torch.as_tensor(logsnr, dtype=f64)
    return Level(logsnr, *(k * q for q in SCHEDULES[schedule]().scales(logsnr)))
def grid(steps, schedule='ve', low=-10., high=10.): return [level(l, schedule) for l in torch.linspace(low, high, steps + 1, dtype=f64)]


def followed(step, levels, denoiser=exact):
    "Two points that stand for the first marginal, its mean and one standard deviation more, taken down the levels with no noise"
    mean, variance = gaussian.moments(levels[0])
    z, before = torch.stack([mean, mean + variance.sqrt()])[:, None], None
    for t, s in zip(levels, levels[1:]):
        z, before = step(denoiser, z, s, t, torch.zeros_like(z), **({'before': before} if step is dpmpp_2m_step else {})), (t, denoiser(z, t))
    return z.flatten()


def propagated(step, levels, variance=None):
    "Mean and variance of the samples, from what each step does to (0, 0), (1, 0) and (0, 1)"
    mean, exact_variance = gaussian.moments(levels[0])
    variance = exact_variance if variance is None else variance
    for t, s in zip(levels, levels[1:]):
        c, a, b = step(exact, torch.tensor([[0.], [1.], [0.]], dtype=f64), s, t, torch.tensor([[0.], [0.], [1.]], dtype=f64)).flatten()
        mean, variance = (a - c) * mean + c, (a - c)**2 * variance + (b - c)**2
    return mean, variance


def gap(step, steps, schedule):
    "The largest error of mean and standard deviation at the end, in standard deviations; first of the deterministic, then of the random steps"
    levels = grid(steps, schedule)
    mean, variance = gaussian.moments(levels[-1])
    if step in (still, *map(SAMPLERS.get, DETERMINISTIC)): z = followed(step, levels); got = z[0], z[1] - z[0]
    else: m, v = propagated(step, levels); got = m, v.sqrt()
    return max((got[0] - mean).abs(), (got[1] - variance.sqrt()).abs()).item() / variance.sqrt().item()


# ---- convergence

@pytest.mark.parametrize('schedule', ['ve', 'cosine'])
@pytest.mark.parametrize('step, order', [(SAMPLERS['ddim'], 1), (SAMPLERS['euler'], 1), (SAMPLERS['heun'], 2), (still, 2), (SAMPLERS['dpmpp_2m'], 2),
                                         (SAMPLERS['ancestral'], 1), (SAMPLERS['euler_maruyama'], 1)], ids=lambda v: getattr(v, '__name__', getattr(v, 'keywords', v)))
def test_the_order_of_convergence(step, order, schedule):
    coarse, fine = gap(step, 150, schedule), gap(step, 300, schedule)
    assert abs(math.log2(coarse / fine) - order) < .2 and fine < {1: .05, 2: .003}[order]


@pytest.mark.parametrize('schedule', ['ve', 'cosine'])
def test_churned_steps_keep_the_variance_as_they_grow_in_number(schedule):
    errors = [gap(partial(edm_step, steps=steps), steps, schedule) for steps in (100, 200, 400)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2] and errors[2] < .01
    assert gap(partial(edm_step, steps=200, inflate=1.2), 200, schedule) > 10 * errors[1]    # noise it did not ask for is seen


@pytest.mark.parametrize('tolerance', [1e-3, 1e-5, 1e-7])
def test_the_adaptive_solver_keeps_its_tolerance_in_one_step(tolerance):
    counted = Counted(exact)
    got = followed(partial(adaptive_step, rtol=tolerance, atol=tolerance), grid(1), counted)
    mean, variance = gaussian.moments(grid(1)[-1])
    error = (got - torch.stack([mean, mean + variance.sqrt()])).abs().max()
    assert 1e-3 * tolerance < error < 30 * tolerance and 8 < counted.evaluations < 2000


def test_the_adaptive_solver_goes_up_as_well_as_down():
    z = randn(4, 2)
    low, high = level(-3.), level(4.)
    there = adaptive_step(exact, z, high, low, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(adaptive_step(exact, there, low, high, rtol=1e-9, atol=1e-9), z, rtol=0, atol=1e-6)
    assert (there - z).abs().min() > .01


@few
@given(st.floats(-8, 6), st.floats(.01, 4), st.sampled_from(['ve', 'cosine']))
def test_an_ancestral_step_is_the_gaussian_conditional_at_the_guess(logsnr, h, schedule):
    "its noise is what q(z_s given z_t, x) leaves open; with x̂ for x too little by the posterior variance of x"
    t, s = level(logsnr, schedule), level(logsnr + h, schedule)
    _, variance = propagated(SAMPLERS['ancestral'], [t, s])
    c2 = gaussian.std**2
    lost = c2 * t.sigma**2 / (t.alpha**2 * c2 + t.sigma**2) * (s.alpha * -torch.expm1(t.logsnr - s.logsnr))**2
    torch.testing.assert_close(variance + lost, gaussian.moments(s)[1], rtol=1e-9, atol=0)


@few
@given(st.floats(-8, 8), st.floats(.01, 1.), st.sampled_from(['ve', 'cosine']))
def test_langevin_steps_leave_the_variance_they_are_known_to_leave(logsnr, size, schedule):
    "step size a: stationary at V/(1 - a/2V), too large; a corrector after no step does the same"
    l = level(logsnr, schedule)
    mean, variance = gaussian.moments(l)
    a = size * l.sigma**2
    stationary = variance / (1 - a / (2 * variance))
    for step in (annealed_langevin_step, predictor_corrector_step):
        got = propagated(partial(step, size=size), [l, l], stationary)
        torch.testing.assert_close(torch.stack(got), torch.stack([mean, stationary]), rtol=1e-9, atol=1e-12)
    z, noise = randn(3, 2), randn(3, 2, seed=1)
    torch.testing.assert_close(annealed_langevin_step(exact, z, l, l, noise, size), langevin_step(lambda z: -(z - mean) / variance, z, a, noise))


# ---- the velocity

def test_an_angle_is_its_level_and_a_level_its_angle():
    phi = torch.linspace(1e-6, math.pi / 2 - 1e-6, 101, dtype=f64)
    got = at_angle(phi)
    torch.testing.assert_close(got.angle, phi, rtol=1e-9, atol=0)
    torch.testing.assert_close(got.scale, torch.ones_like(phi))
    torch.testing.assert_close(2 * (got.alpha / got.sigma).log(), got.logsnr, rtol=1e-9, atol=1e-9)
    for l in (-9., 0., 9.): torch.testing.assert_close(level(l, 've').angle, level(l).angle)


def test_the_velocity_is_the_slope_of_the_known_flow():
    "a standardized value stays what it is along the flow of a Gaussian"
    def at(phi):
        mean, variance = gaussian.moments(at_angle(phi))
        return mean + variance.sqrt() * w
    w = randn(5)
    for phi in torch.linspace(.01, 1.56, 9, dtype=f64):
        slope = torch.autograd.functional.jvp(at, phi, torch.ones_like(phi))[1]
        torch.testing.assert_close(velocity(exact, at(phi), at_angle(phi)), slope, rtol=1e-9, atol=1e-9)


# ---- what a step owes its caller

@every
def test_a_step_changes_nothing_but_its_result(sampler):
    z, noise, s, t = randn(4, 2), randn(4, 2, seed=1), level(1.), level(.5)
    before = torch.get_rng_state()
    copies = [q.clone() for q in (z, noise, *s, *t)]
    first, second = (SAMPLERS[sampler](exact, z, s, t, noise) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, z) and first.data_ptr() != z.data_ptr()
    assert all(map(torch.equal, copies, (z, noise, *s, *t))) and torch.equal(torch.get_rng_state(), before)


@every
@few
@given(l=st.floats(-8, 8), h=st.floats(.01, 3), k_s=st.floats(.01, 100), k_t=st.floats(.01, 100), schedule=st.sampled_from(['ve', 'cosine']))
def test_only_ratios_of_scales_matter(sampler, l, h, k_s, k_t, schedule):
    "variance preserving, exploding and all between are one process in other units"
    z, noise, step = randn(4, 2), randn(4, 2, seed=1), SAMPLERS[sampler]
    torch.manual_seed(0)
    net = network_denoiser(MLP(2, 8).double(), 'v')
    for denoiser in (exact, net):
        t, s = level(l, schedule), level(l + h, schedule)
        plain = step(denoiser, t.scale * z, s, t, noise)
        scaled = step(denoiser, k_t * t.scale * z, level(l + h, schedule, k_s), level(l, schedule, k_t), noise)
        torch.testing.assert_close(scaled / k_s, plain, rtol=1e-3 if sampler == 'adaptive' else 1e-7, atol=1e-3 if sampler == 'adaptive' else 1e-7)


@pytest.mark.parametrize('step', [*(SAMPLERS[s] for s in (*DETERMINISTIC, 'ancestral', 'euler_maruyama')), still], ids=str)
@pytest.mark.parametrize('logsnr', [-12., 0., 12.])
def test_no_way_to_go_is_no_change(step, logsnr):
    for schedule in SCHEDULES:
        z, l = randn(4, 2), level(logsnr, schedule)
        torch.testing.assert_close(step(exact, l.scale * z, l, l, randn(4, 2, seed=1)), l.scale * z, rtol=1e-10, atol=1e-10)


@every
def test_images_go_like_their_numbers(sampler):
    z, noise, s, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), level(1.), level(.2)
    got = SAMPLERS[sampler](exact, z, s, t, noise)
    assert torch.equal(got.flatten(1), SAMPLERS[sampler](exact, z.flatten(1), s, t, noise.flatten(1))) and got.shape == z.shape


@every
def test_precision_is_the_callers(sampler, monkeypatch):
    "a state stays in its dtype, and float32 is float64 rounded"
    draw = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *a, dtype=None, **kw: draw(*a, dtype=f64, **kw).to(dtype))   # the same numbers for both
    ends = {}
    for dtype in (f32, f64):
        for _, l, z in sampling(exact, (5, 2), 20, SCHEDULES['ve'](-10, 10), sampler, generator(), dtype): assert z.dtype == l.logsnr.dtype == dtype
        ends[dtype] = z.double()
    torch.testing.assert_close(ends[f32], ends[f64], rtol=2e-3, atol=2e-3)
    assert not torch.equal(ends[f32], ends[f64])


# ---- edm

def quiet(z, level): return z, torch.zeros_like(z)


def churned(n_t, **kw):
    "The standard deviation of the noise that the step adds at σ/α = n_t, over n_t"
    t, s = level(-2 * math.log(n_t)), level(-2 * math.log(n_t) + 1)
    return (edm_step(quiet, torch.zeros(1, 1, dtype=f64), s, t, torch.ones(1, 1, dtype=f64), **kw) / s.alpha).item() / n_t


@few
@given(st.floats(.06, 49), st.floats(.01, 200), st.integers(1, 500), st.floats(.5, 2))
def test_churn_is_what_the_paper_says(n_t, churn, steps, inflate):
    gamma = min(churn / steps, math.sqrt(2) - 1)
    assert churned(n_t, churn=churn, steps=steps, inflate=inflate) == pytest.approx(inflate * math.sqrt((1 + gamma)**2 - 1), rel=1e-6)


def test_churn_never_more_than_doubles_the_variance_and_stays_inside_its_range():
    assert churned(1., churn=1e9) == pytest.approx(1) and churned(1., churn=0.) == 0 and churned(1., inflate=0.) == 0
    assert churned(.0499) == churned(50.1) == 0 and churned(.0501) > 0 < churned(49.9)
    assert churned(.3, low=.31) == churned(.3, high=.29) == 0 and churned(.3, low=.29, high=.31) > 0
    one = Level(*(torch.tensor(q, dtype=f64) for q in (0., 1., 1.)))          # σ/α = 1 without rounding: both ends count as inside
    ends = [edm_step(quiet, torch.zeros(1, 1, dtype=f64), level(1.), one, torch.ones(1, 1, dtype=f64), **kw) for kw in (dict(low=1.), dict(high=1.))]
    assert all(e > 0 for e in ends)


def test_edm_asks_at_the_raised_level_and_at_the_end():
    seen = []
    def denoiser(z, l): seen.append(l); return exact(z, l)
    t, s = level(0.), level(1.)
    edm_step(denoiser, randn(3, 2), s, t, randn(3, 2, seed=1), steps=100)
    assert [l.alpha.item() for l in seen] == [1, 1]
    assert [l.sigma.item() for l in seen] == pytest.approx([1.4, math.exp(-.5)]) and [l.logsnr.item() for l in seen] == pytest.approx([-2 * math.log(1.4), 1.])


def test_a_network_is_never_asked_outside_its_training():
    "the sampling range is refused if it leaves the training's; then no step may leave it either"
    for sampler in SAMPLERS:
        seen = []
        def denoiser(z, l): seen.append(l.logsnr.item()); return exact(z, l)
        denoiser.within = (-7., 7.)
        list(sampling(denoiser, (2, 2), 30, CosineSchedule(-7, 7), sampler, generator()))
        assert -7 - 1e-3 <= min(seen) and max(seen) <= 7 + 1e-3, f"{sampler} asks at λ from {min(seen):.3f} to {max(seen):.3f}"


# ---- dpmpp_2m

def test_the_first_step_of_two_is_ddim():
    z, s, t = randn(4, 2), level(1.), level(.2)
    torch.testing.assert_close(dpmpp_2m_step(exact, z, s, t), ddim_step(exact, z, s, t), rtol=1e-12, atol=1e-12)


@few
@given(st.floats(-6, 6), st.floats(.05, 2), st.floats(.05, 4))
def test_a_line_through_two_guesses_is_followed_as_far_as_it_can_be_trusted(l, last, ratio):
    "the integral of α x̂ along x̂'s line would need one more order; up to a step twice the last one, then plain DDIM"
    r, t, s = level(l - last), level(l), level(l + ratio * last)
    z, before = randn(4, 2), (r, exact(randn(4, 2, seed=2), r))
    got, first = dpmpp_2m_step(exact, z, s, t, before=before), ddim_step(exact, z, s, t)
    if ratio > 2.0001: torch.testing.assert_close(got, first, rtol=1e-9, atol=1e-9)
    if ratio < 1.9999:
        move = s.alpha * -torch.expm1(-(s.logsnr - t.logsnr) / 2) * (ratio / 2) * (exact(z, t)[0] - before[1][0])
        torch.testing.assert_close(got - first, move, rtol=1e-6, atol=1e-9)


def test_a_last_step_of_no_length_is_no_line():
    z, t, s = randn(4, 2), level(.2), level(1.)
    for end in (s, t): torch.testing.assert_close(dpmpp_2m_step(exact, z, end, t, before=(t, exact(z + 1, t))), ddim_step(exact, z, end, t))


# ---- the loop

@every
def test_evaluations_are_counted(sampler):
    counted = Counted(exact)
    list(sampling(counted, (3, 2), 7, sampler=sampler, generator=generator()))
    if sampler == 'adaptive': assert counted.evaluations >= 7 * 7 and (counted.evaluations - 7) % 6 == 0   # dopri5: one to begin with, and six a step
    else: assert counted.evaluations == 7 * CALLS[sampler]


def test_what_a_network_knows_is_honoured_whatever_wraps_it():
    net = network_denoiser(lambda z, u: refuse(z, u), 'eps', within=(-5., 5.))
    for denoiser in (net, Counted(net), Counted(Counted(net))):
        for schedule in ('cosine', SCHEDULES['ve'](-5.1, 5), SCHEDULES['ve'](-5, 5.1)):
            for sampler in (*SAMPLERS, ddim_step):
                with pytest.raises(ValueError, match='leaves the range of the training, -5 to 5'): sampling(denoiser, (3, 2), 4, schedule, sampler)
            with pytest.raises(ValueError, match='leaves the range of the training, -5 to 5'): sample(denoiser, 3, steps=4, schedule=schedule)
        sampling(denoiser, (3, 2), 4, SCHEDULES['ve'](-5, 5))
    with pytest.raises(ValueError, match=r"Choose 've\(logsnr_min=-5, logsnr_max=4\)'"): sampling(net, (3, 2), 4, SCHEDULES['ve'](-7, 4))
    assert getattr(exact, 'within', None) is None and Counted(exact).within is None


def test_the_advice_for_a_range_out_of_reach_is_one_that_works():
    "ranges that share nothing, and those of the linear schedule, which does not reach below -10.05"
    kept = (((-5, 5), SCHEDULES['ve'](-7, 7)), ((-20., 5), SCHEDULES['linear'](-10, 7)), ((-20., 5), SCHEDULES['cosine'](-25, 7)), ((-5, 5), SCHEDULES['edm_sample'](rho=3)),
            ((-5, 5), SCHEDULES['discrete'](schedule='shifted_cosine(shift=1)', T=50)), ((-12, 9.5), SCHEDULES['ddpm']()), ((-5, 5), SCHEDULES['adaptive'](bins=7)), ((-5, 5), SCHEDULES['logit_normal'](m=0.5)))
    for within, schedule in kept:   # with their options
        net = network_denoiser(MLP(2, 8), 'v', within=within)
        with pytest.raises(ValueError) as e: sampling(net, (3, 2), 4, schedule)
        advised = str(e.value).split("Choose '")[1].removesuffix("'.")
        assert len(list(sampling(net, (3, 2), 4, advised))) == 5
        advised, ends = from_spec(SCHEDULES, advised, 'schedule'), ('logsnr_min', 'logsnr_max', 'scales')
        assert type(advised) is type(schedule) and advised.logsnr_max == min(within[1], schedule.logsnr_max)
        assert [(k, v) for k, v in vars(advised).items() if k[0] != '_' and k not in ends] == [(k, v) for k, v in vars(schedule).items() if k[0] != '_' and k not in ends]
    for within, schedule in (((-5, 5), 'ddpm'), ((5, 6), SCHEDULES['ve'](-7, 4))):
        with pytest.raises(ValueError, match='cannot be cut to that range. Choose another.'): sampling(network_denoiser(MLP(2, 8), 'v', within=within), (3, 2), 4, schedule)


def test_a_run_samples_with_any_sampler_and_schedule_inside_its_training():
    torch.manual_seed(0)
    run = Run(None, Parameters(dataset='cluster', sample_steps=3, schedule='linear', logsnr_min=-6, logsnr_max=6), {}, [], {}, None, MLP(2, 8))
    for sampler in SAMPLERS: assert run.sample(3, sampler=sampler).shape == (3, 2) and run.sample(3, sampler=sampler).isfinite().all()
    assert torch.equal(run.sample(3), run.sample(3, 0, 3, 'ancestral', SCHEDULES['linear'](-6, 6)))
    assert torch.equal(run.sample(3, sampler='ddim'), run.sample(3, sampler=ddim_step)) and not torch.equal(run.sample(3), run.sample(3, sampler='ddim'))
    assert run.sample(3, schedule=SCHEDULES['ve'](-6, 5)).isfinite().all()
    for schedule in ('linear', 'cosine', 've', SCHEDULES['linear'](-6.1, 6)):
        with pytest.raises(ValueError, match='leaves the range of the training, -6 to 6'): run.sample(3, schedule=schedule)
    with pytest.raises(ValueError, match="Did you mean 'heun'"): run.sample(3, sampler='heum')
    with pytest.raises(ValueError, match='steps must'): run.sample(3, steps=0)


@every
def test_a_name_its_function_and_a_partial_of_it_are_one(sampler):
    a, b, c = (sample(exact, 5, steps=4, sampler=s) for s in (sampler, SAMPLERS[sampler], partial(SAMPLERS[sampler])))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_what_a_partial_binds_is_used():
    for step, kw in ((edm_step, dict(churn=0.)), (annealed_langevin_step, dict(size=.1)), (predictor_corrector_step, dict(size=.5)), (adaptive_step, dict(rtol=.1, atol=.1))):
        assert not torch.equal(sample(exact, 5, steps=9, sampler=step), sample(exact, 5, steps=9, sampler=partial(step, **kw))), step


@pytest.mark.parametrize('sampler', [3, None, [ddim_step], 'Heun', 'dpm++', ''], ids=repr)
def test_what_is_no_sampler_is_named_before_any_work(sampler):
    with pytest.raises((ValueError, TypeError), match='sampler') as e: sampling(refuse, (3, 2), 4, sampler=sampler)
    assert repr(sampler) in str(e.value)


def test_a_step_is_told_what_it_asks_for_and_nothing_else():
    told = []
    def asks(denoiser, z, s, t, noise, before, steps=None):
        told.append((before, steps))
        denoiser(z + 1, s)                                      # its first guess, at another place
        return ddim_step(denoiser, z, s, t)
    path = list(sampling(exact, (3, 2), 4, sampler=asks, generator=generator()))
    assert [steps for _, steps in told] == [4] * 4 and told[0][0] is None
    for (l, (x_hat, eps_hat)), (_, t, z), (_, s, _) in zip([before for before, _ in told[1:]], path, path[1:]):
        assert all(map(torch.equal, l, s))                       # the level of the guess, which here is not that of the state
        torch.testing.assert_close(x_hat, exact(z + 1, s)[0]); torch.testing.assert_close(eps_hat, exact(z + 1, s)[1])
    def asks_nothing(denoiser, z, s, t, noise): return ddim_step(denoiser, z, s, t)
    def takes_all(denoiser, z, s, t, noise, **kw): assert not kw; return ddim_step(denoiser, z, s, t)
    for step in (asks_nothing, takes_all): assert torch.equal(sample(exact, 3, steps=4, sampler=step), sample(exact, 3, steps=4, sampler='ddim'))


def test_two_step_memory_does_not_pass_from_chunk_to_chunk():
    whole = torch.cat([sample_of(c) for c in (0, 1)])
    assert torch.equal(whole, sample(exact, 8, steps=6, sampler='dpmpp_2m', chunk=4))


def sample_of(chunk):
    "A chunk of four with the numbers of the whole stream, alone"
    g = generator()
    for _ in range(chunk * 7): torch.randn(4, 2, generator=g)    # the prior and one noise a step
    *_, (_, _, z) = sampling(exact, (4, 2), 6, sampler='dpmpp_2m', generator=g)
    return z


@every
def test_the_global_random_state_is_neither_read_nor_changed(sampler):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed); before = torch.get_rng_state()
        results.append(sample(exact, 5, steps=3, sampler=sampler))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@every
def test_no_graph_is_kept(sampler):
    assert not any(z.requires_grad for _, _, z in sampling(network_denoiser(MLP(2, 8), 'x'), (3, 2), 3, sampler=sampler, generator=generator()))


@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
@every
def test_an_untrained_network_gives_finite_samples(sampler, target):
    torch.manual_seed(0)
    for schedule in SCHEDULES: assert sample(network_denoiser(MLP(2, 8), target), 3, steps=9, schedule=schedule, sampler=sampler).isfinite().all()


@every
def test_a_stack_gives_what_each_network_gives_alone(sampler):
    torch.manual_seed(1)
    nets, targets, seeds = [MLP(2, 8) for _ in range(3)], ['x', 'eps', 'v'], [5, 6, 7]
    schedule = SCHEDULES['cosine'](-6, 6)
    together = sample_stack(StackedMLP(nets), targets, 5, 2, 6, schedule, sampler, seeds, chunk=3)
    alone = torch.stack([sample(network_denoiser(*pair), 5, 2, 6, schedule, sampler, seed, chunk=3) for *pair, seed in zip(nets, targets, seeds)])
    torch.testing.assert_close(together, alone, rtol=2e-3 if sampler == 'adaptive' else 1e-4, atol=2e-3 if sampler == 'adaptive' else 1e-4)
    assert len(together.flatten().unique()) == 30


# ---- what goes wrong

@every
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_denoiser_that_stops_being_finite_is_placed(sampler, bad):
    "the step and its λ; within an adaptive step the λ of the evaluation"
    s = SCHEDULES['cosine']()
    def denoiser(z, l):
        x, eps = exact(z, l)
        return (x, eps) if l.logsnr < 0 else (x, eps + bad)
    if sampler in ('ancestral', 'dpmpp_2m'): denoiser = partial(lambda d, z, l: (d(z, l)[1] - exact(z, l)[1] + exact(z, l)[0], exact(z, l)[1]), denoiser)
    with pytest.raises(FloatingPointError) as e: list(sampling(denoiser, (4, 2), 10, s, sampler, generator()))
    if sampler == 'adaptive':
        assert 'velocity stopped being finite at logsnr' in str(e.value) and 0 <= float(str(e.value).split('logsnr ')[1].rstrip('.')) < 2
        return
    at = int(str(e.value).split('step ')[1].split()[0])
    assert f'step {at} of 10' in str(e.value) and f'logsnr {s.logsnr(1 - at / 10).item():.4g}' in str(e.value)
    assert 0 <= s.logsnr(1 - at / 10).item() < 5


@every
@pytest.mark.parametrize('dtype', [f32, f64])
def test_an_uncut_schedule_gives_samples_or_says_why_not(sampler, dtype):
    "α = 0 at the start and σ = 0 at the end: no nan comes out, and with v, which is defined everywhere, angles and mixtures give samples"
    torch.manual_seed(0)
    for target in ('v', 'x', 'eps', 'score'):
        denoiser, refused = network_denoiser(MLP(2, 8).to(dtype), target), target != 'v' or sampler in ('edm', 'euler_maruyama', 'annealed_langevin', 'predictor_corrector')
        try: *_, (_, l, z) = sampling(denoiser, (3, 2), 5, CosineSchedule(-math.inf, math.inf), sampler, generator(), dtype)
        except (FloatingPointError, ZeroDivisionError, RuntimeError) as e: assert refused and any(word in str(e) for word in ('finite', 'alpha', 'sigma', 'logsnr -')), (target, e)
        else: assert z.isfinite().all() and l.sigma == 0


def rough(z, level): return z, torch.sin(1e9 * z * level.logsnr) * 50


def test_an_adaptive_solver_that_cannot_converge_says_where_and_what_to_do():
    for denoiser, kw in ((exact, dict(max_steps=3)), (rough, dict(max_steps=50))):
        with pytest.raises(RuntimeError, match=r'did not converge at logsnr -?\d.*rtol and atol.*max_steps.*fixed steps') as e:
            sample(denoiser, 3, steps=1, schedule=SCHEDULES['ve'](-6, 6), sampler=partial(adaptive_step, **kw))
        assert -6.1 < float(str(e.value).split('logsnr ')[1].split()[0]) < 6.1 and f"({kw['max_steps']})" in str(e.value)


def test_an_assertion_of_the_network_is_not_taken_for_the_solvers():
    "a user's assert says what is wrong with the network; 'loosen rtol' would not help"
    def denoiser(z, level): raise AssertionError('the network wants images')
    with pytest.raises(AssertionError, match='the network wants images'): sample(denoiser, 3, steps=1, sampler='adaptive')


@pytest.mark.parametrize('name', ['rtol', 'atol', 'max_steps'])
@pytest.mark.parametrize('bad', [0, -1e-3, math.nan, '1', None, True])
def test_bad_tolerances_are_named_before_any_work(name, bad):
    with pytest.raises((ValueError, TypeError), match=f'{name} must'): sample(refuse, 3, steps=1, sampler=partial(adaptive_step, **{name: bad}))


def test_solve_knows_what_it_cannot_miss():
    phi = torch.tensor(.3, dtype=f64)
    def never(phi, state): raise RuntimeError('work for nothing')
    z, pair = randn(3), (randn(3), randn(2, 2))
    assert torch.equal(solve(never, z, phi, phi), z) and all(map(torch.equal, solve(never, pair, phi, phi), pair))
    got = solve(lambda phi, z: z, z, phi, phi + 1, 1e-9, 1e-9)
    torch.testing.assert_close(got, math.e * z, rtol=1e-7, atol=0)
    torch.testing.assert_close(solve(lambda phi, z: z, got, phi + 1, phi, 1e-9, 1e-9), z, rtol=1e-7, atol=0)     # backwards
    a, b = solve(lambda phi, state: (state[1].sum() + 0 * state[0], 0 * state[1]), pair, phi, phi + 2, 1e-9, 1e-9)
    torch.testing.assert_close(a, pair[0] + 2 * pair[1].sum()); torch.testing.assert_close(b, pair[1])
    seen = []
    solve(lambda phi, z: seen.append(phi.item()) or z, z, phi, phi + .1, 1e-3, 1e-3)
    assert .3 - 1e-12 <= min(seen) and max(seen) <= .4 + 1e-12                                                     # never beyond the end
