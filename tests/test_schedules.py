"Attempts to break lfdm.schedules, every schedule of the registry alike: ranges, ends, dtypes, densities and times."
import math

import numpy as np

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson

from lfdm.adaptive import AdaptiveSchedule
from lfdm.discrete import DDPMSchedule, DiscreteSchedule
from lfdm.schedules import CONTINUOUS, SCHEDULES, CosineSchedule, Level, LinearSchedule, VESchedule, dlog_alpha, network_logsnr, network_time, posterior, sample_times, sde, transition

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('name', SCHEDULES)
with_path = pytest.mark.parametrize('name', (*CONTINUOUS, 'adaptive'))   # a staircase of T levels has neither slope nor process
with_formula = pytest.mark.parametrize('name', CONTINUOUS)               # what is learned is in no formula either
unit = st.floats(0, 1)
UNCUT = CosineSchedule(-math.inf, math.inf)


def ends(name, widest):
    "What a schedule of that name can reach within ±widest. A bell is kept to five deviations: beyond, its times have no digits left next to 1, and its slope none below infinity."
    s = SCHEDULES[name]()
    low, high = s.reach()
    low, high = max(low, -widest), min(high, widest)
    return (max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)) if hasattr(s, 'std') else (low, high)


def schedule_over(name, u, v, widest=14.):
    "The schedule of that name over a range between its reach and ±widest; the default range where it takes no other."
    if name == 'ddpm': return DDPMSchedule(logsnr_max=9.3 + (widest - 9.3) * max(u, v), T=1000)   # its other end is given by T and β
    low, high = ends(name, widest)
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    return SCHEDULES[name](logsnr_min=a, logsnr_max=max(b, a + 0.5) if a + 0.5 <= high else b) if b - a > 0.1 else SCHEDULES[name]()


@every
@few
@given(u=unit, v=unit)
def test_the_range_is_kept_exactly(name, u, v):
    "λ(0) is λ_max, λ(1) is λ_min, no time leads beyond them, and no level that is reached has density 0"
    s = schedule_over(name, u, v)
    for dtype in (f64, f32):
        t = torch.cat([torch.tensor([0., 1.]), torch.linspace(0, 1, 99)]).to(dtype)
        logsnr = s.logsnr(t)
        low, high = torch.tensor([s.logsnr_min, s.logsnr_max], dtype=dtype)
        torch.testing.assert_close(logsnr[:2], torch.stack([high, low]), rtol=0, atol=1e-4 if dtype == f32 else 1e-9)
        assert (logsnr <= high).all() and (logsnr >= low).all(), (logsnr.max() - high, logsnr.min() - low)
        assert (s.density(logsnr) > 0).all()
        assert (logsnr[2:].diff() <= 0).all()


@every
@pytest.mark.parametrize('widest', [40., 80.])
@pytest.mark.parametrize('dtype', [f32, f64])
def test_the_ends_of_a_wide_range_are_what_was_asked_for(name, widest, dtype):
    "near t = 1 the path must not run into -inf because 1 - t has no digits left"
    s = schedule_over(name, 0., 1., widest)
    ends = s.logsnr(torch.tensor([0., 1.], dtype=dtype))
    assert ends.isfinite().all() and (s.alpha(torch.ones(1, dtype=dtype)) > 0).all() and (s.sigma(torch.zeros(1, dtype=dtype)) > 0).all()
    if dtype == f64: torch.testing.assert_close(ends, torch.tensor([s.logsnr_max, s.logsnr_min], dtype=f64), rtol=1e-4, atol=0)


@with_path
@few
@given(u=unit, v=unit)
def test_time_and_level_are_inverse(name, u, v):
    s = schedule_over(name, u, v)
    t = torch.linspace(0, 1, 41, dtype=f64)
    torch.testing.assert_close(s.t(s.logsnr(t)), t, rtol=0, atol=1e-10)
    logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 41, dtype=f64)
    error = (s.logsnr(s.t(logsnr)) - logsnr).abs()
    assert (error <= 1e-12 + 4e-16 * s.dlogsnr_at(logsnr).abs() / min(1, s._t1 - s._t0)).all(), error.max()


@with_path
@few
@given(u=unit, v=unit)
def test_slope_is_the_derivative(name, u, v):
    s = schedule_over(name, u, v)
    t = torch.linspace(0.02, 0.98, 33, dtype=f64, requires_grad=True)
    slope, = torch.autograd.grad(s.logsnr(t).sum(), t)
    torch.testing.assert_close(s.dlogsnr(t).detach(), slope, rtol=1e-8, atol=0)
    assert (slope < 0).all()
    torch.testing.assert_close(s.dlogsnr_at(s.logsnr(t)).detach(), slope, rtol=1e-8, atol=0)


@with_path
@few
@given(u=unit, v=unit)
def test_density_is_the_density_of_the_levels_visited(name, u, v):
    "it integrates to one, is -1/λ′, is 0 outside, and its integral up to λ is the share of times below it"
    s = schedule_over(name, u, v)
    logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 4001, dtype=f64)
    p = s.density(logsnr)
    assert abs(simpson(p.numpy(), x=logsnr.numpy()) - 1) < 1e-8
    torch.testing.assert_close(p * -s.dlogsnr_at(logsnr), torch.ones_like(p), rtol=1e-12, atol=0)
    assert (s.density(torch.tensor([s.logsnr_min - 1e-6, s.logsnr_max + 1e-6, -1e3, 1e3], dtype=f64)) == 0).all()
    assert abs(simpson(p[:2001].numpy(), x=logsnr[:2001].numpy()) - (1 - s.t(logsnr[2000]).item())) < 1e-8


@every
@few
@given(u=unit, v=unit)
def test_scales_have_the_log_ratio_they_claim(name, u, v):
    "log α²/σ² = λ, and each schedule is variance preserving, variance exploding, or a straight line"
    s = schedule_over(name, u, v)
    for dtype, tolerance in ((f64, 1e-12), (f32, 1e-5)):
        logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 33, dtype=dtype)
        alpha, sigma = s.scales(logsnr)
        torch.testing.assert_close(2 * (alpha.log() - sigma.log()), logsnr, rtol=tolerance, atol=tolerance)
        invariant = {'ve': alpha, 'edm_train': alpha, 'edm_sample': alpha, 'rectified_flow': alpha + sigma, 'logit_normal': alpha + sigma}.get(name, alpha**2 + sigma**2)
        torch.testing.assert_close(invariant, torch.ones_like(alpha), rtol=tolerance, atol=0)
        level = s.level(t := torch.linspace(0, 1, 9, dtype=dtype))
        assert torch.equal(level.logsnr, s.logsnr(t)) and torch.equal(level.alpha, s.alpha(t)) and torch.equal(level.sigma, s.sigma(t))


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, f32, f64])
@pytest.mark.parametrize('shape', [(), (0,), (1,), (5,), (5, 1), (2, 3, 4)], ids=str)
def test_shape_and_dtype_are_kept(name, dtype, shape):
    s, t = SCHEDULES[name](), torch.full(shape, 0.5, dtype=dtype)
    for f in (s.alpha, s.sigma, s.logsnr, s.dlogsnr, s.t, s.density):
        got = f(t)
        assert got.shape == shape and got.dtype == dtype and got.isfinite().all(), f


@every
def test_a_float_is_a_float64_tensor(name):
    s = SCHEDULES[name]()
    for f in (s.alpha, s.sigma, s.logsnr, s.dlogsnr, s.t, s.density):
        for value in (0.5, 1, 0):
            got = f(value)
            assert torch.is_tensor(got) and got.shape == () and got.dtype == f64
            torch.testing.assert_close(got, f(torch.tensor(float(value), dtype=f64)), rtol=0, atol=0)


@every
@pytest.mark.parametrize('bad', ['0.5', None, torch.tensor(1), torch.tensor([True])], ids=repr)
def test_what_is_no_time_is_named(name, bad):
    s = SCHEDULES[name]()
    for f in (s.alpha, s.sigma, s.logsnr, s.dlogsnr, s.t, s.density):
        with pytest.raises((TypeError, ValueError)) as e: f(bad)
        assert 'floating-point' in str(e.value) or repr(bad) in str(e.value)


@every
@pytest.mark.parametrize('end', ['logsnr_min', 'logsnr_max'])
@pytest.mark.parametrize('bad', ['1', 'inf', None, True, [1.], 1j, torch.tensor(1.), math.nan], ids=repr)
def test_an_end_that_is_no_number_is_named(name, end, bad):
    if bad is None and name in ('discrete', 'ddpm') and (name, end) != ('ddpm', 'logsnr_max'): return   # as their own schedule has it
    with pytest.raises((TypeError, ValueError), match=f'{end} must be a number, not') as e: SCHEDULES[name](**{end: bad})
    assert repr(bad) in str(e.value)


@every
@pytest.mark.parametrize('low, high', [(5., 5.), (5., -5.), (math.inf, -math.inf), (math.inf, 0.), (0., -math.inf), (5, 4)])
def test_an_empty_range_is_refused(name, low, high):
    with pytest.raises(ValueError, match='logsnr'): SCHEDULES[name](logsnr_min=low, logsnr_max=high)


@every
def test_beyond_reach_is_an_error_and_the_reach_itself_is_not(name):
    low, high = SCHEDULES[name]().reach()
    for end, edge, beyond in (('logsnr_min', low, low - 0.01), ('logsnr_max', high, high + 0.01)):
        if math.isinf(edge): continue
        assert getattr(SCHEDULES[name](**{end: edge}), end) == edge
        with pytest.raises(ValueError, match=f'the {name} schedule reaches logsnr from'): SCHEDULES[name](**{end: beyond})


def test_infinite_ends():
    with pytest.raises(ValueError, match='finite range'): VESchedule(logsnr_max=math.inf)
    with pytest.raises(ValueError, match='finite range'): VESchedule(logsnr_min=-math.inf)
    with pytest.raises(ValueError, match='reaches logsnr from -10.05'): LinearSchedule(logsnr_min=-math.inf)
    t = torch.tensor([0., 1.], dtype=f64)
    assert torch.equal(UNCUT.alpha(t), 1 - t) and torch.equal(UNCUT.sigma(t), t)
    linear = LinearSchedule(logsnr_max=math.inf)
    assert linear.alpha(0.) == 1 and linear.sigma(0.) == 0 and linear.logsnr(0.) == math.inf


def test_linear_is_ddpm():
    "log α² against the product of DDPM's thousand steps, β from 1e-4 to 0.02, and against the integral of β"
    s = LinearSchedule(logsnr_min=LinearSchedule().reach()[0], logsnr_max=math.inf)
    t = torch.linspace(0, 1, 11, dtype=f64)
    torch.testing.assert_close(2 * s.alpha(t).log(), -(0.1 * t + 19.9 * t**2 / 2), rtol=1e-10, atol=1e-12)
    product = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=f64), 0)[-1]
    assert abs(product.log() / (2 * s.alpha(1.).log()) - 1) < 0.02
    for bad in (dict(beta_min=0), dict(beta_min=-1.), dict(beta_min=5, beta_max=4), dict(beta_max='20'), dict(beta_max=None), dict(beta_max=math.nan), dict(beta_max=math.inf)):
        with pytest.raises((TypeError, ValueError), match='beta_m'): LinearSchedule(**bad)
    constant = LinearSchedule(logsnr_min=-4, beta_min=5, beta_max=5)
    torch.testing.assert_close(constant.t(constant.logsnr(t)), t, rtol=0, atol=1e-12)


def test_cosine_is_the_cosine():
    t = torch.linspace(0.001, 0.999, 99, dtype=f64)
    torch.testing.assert_close(UNCUT.alpha(t), (math.pi * t / 2).cos(), rtol=1e-12, atol=0)
    torch.testing.assert_close(UNCUT.sigma(t), (math.pi * t / 2).sin(), rtol=1e-12, atol=0)
    dsnr = UNCUT.dlogsnr(t) * UNCUT.logsnr(t).exp()
    torch.testing.assert_close(dsnr, -math.pi * UNCUT.alpha(t) / UNCUT.sigma(t)**3, rtol=1e-11, atol=0)   # thesis 3.22


def test_every_schedule_says_what_it_is():
    for name, cls in SCHEDULES.items(): assert cls.name == name and cls.__name__ in repr(cls())


# ---- one step of the chain

@few
@given(st.floats(-12, 12), st.floats(0.001, 10), st.sampled_from(['cosine', 've']), st.floats(-3, 3), st.floats(-3, 3))
def test_transition_and_posterior_against_gaussian_conditioning(logsnr_t, gap, name, x, z):
    "the joint Gaussian of (z_s, z_t) given x, conditioned on z_t, knows nothing of the formulas"
    s, t = (Level(l := torch.tensor(k, dtype=f64), *SCHEDULES[name]().scales(l)) for k in (logsnr_t + gap, logsnr_t))
    a_ts, var_ts = transition(s, t)
    torch.testing.assert_close(a_ts**2 * s.sigma**2 + var_ts, t.sigma**2)
    torch.testing.assert_close(a_ts * s.alpha, t.alpha)
    z = t.alpha * x + t.sigma * z
    covariance = a_ts * s.sigma**2
    mean = s.alpha * x + covariance / t.sigma**2 * (z - t.alpha * x)
    variance = s.sigma**2 - covariance**2 / t.sigma**2
    k_z, k_x, v = posterior(s, t)
    torch.testing.assert_close(k_z * z + k_x * x, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(v, variance, rtol=1e-9, atol=1e-12 * s.sigma.item()**2)
    assert v > 0


def test_a_tiny_step_keeps_its_digits():
    "σ²_{t|s} as a difference would be 0 here"
    t = torch.tensor(0., dtype=f64); s = t + 1e-17 * 1e4
    level = lambda l: Level(l, *UNCUT.scales(l))
    torch.testing.assert_close(transition(level(s), level(t))[1], torch.tensor(0.5e-13, dtype=f64), rtol=1e-6, atol=0)


def test_the_last_step_ends_on_the_data_and_the_first_starts_in_pure_noise():
    "no log 0 and no wrong α at either end of the uncut schedule"
    clean, middle, noise = (UNCUT.level(t) for t in (0., 0.5, 1.))
    k_z, k_x, v = posterior(clean, middle)
    assert (k_z, k_x, v) == (0, 1, 0)
    k_z, k_x, v = posterior(middle, noise)
    assert k_z == 0
    torch.testing.assert_close(torch.stack([k_x, v]), torch.stack([middle.alpha, middle.sigma**2]))


# ---- times of a batch

def test_one_time_in_each_slot_for_every_batch_size():
    "arange(0, 1, 1/n) has n + 1 entries for n = 49, 98, 103, ..."
    for n in range(1, 601):
        t = sample_times(n, torch.Generator().manual_seed(n), dtype=f64)
        assert t.shape == (n,) and (t > 0).all() and (t < 1).all()
        assert torch.equal((t * n).floor().sort().values, torch.arange(n).to(f64)), n
        t = sample_times(n, torch.Generator().manual_seed(n))
        assert t.shape == (n,) and t.dtype == f32 and (t > 0).all() and (t < 1).all()


def test_times_are_shuffled_and_every_position_is_uniform():
    t = torch.stack([sample_times(8, torch.Generator().manual_seed(i), dtype=f64) for i in range(2000)])
    assert not (t.diff(dim=1) > 0).all(1).float().mean() > 0.01
    for column in t.T:
        gap = (column.sort().values - (torch.arange(2000) + 0.5) / 2000).abs().max()
        assert gap < 1.95 / 2000**0.5, gap                    # Kolmogorov-Smirnov at 0.1 %
    assert (t.T.corrcoef() - torch.eye(8)).abs().max() < 0.25


def test_independent_times_are_independent():
    t = torch.stack([sample_times(8, torch.Generator().manual_seed(i), dtype=f64, low_discrepancy=False) for i in range(2000)])
    assert (t > 0).all() and (t < 1).all()
    gap = (t.flatten().sort().values - (torch.arange(16000) + 0.5) / 16000).abs().max()
    assert gap < 1.95 / 16000**0.5
    assert (t.T.corrcoef() - torch.eye(8)).abs().max() < 0.1   # evenly spread ones have -1/7
    one_each = ((t * 8).floor().sort(1).values == torch.arange(8)).all(1)
    assert one_each.double().mean() < 0.02                      # 8!/8^8 = 0.24 %


def test_times_are_reproducible_and_leave_other_streams_alone():
    make = lambda seed, **kw: sample_times(50, torch.Generator().manual_seed(seed), **kw)
    for kw in ({}, dict(low_discrepancy=False)):
        assert torch.equal(make(0, **kw), make(0, **kw)) and not torch.equal(make(0, **kw), make(1, **kw))
    before = torch.get_rng_state(); make(0)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3); a = sample_times(5); torch.manual_seed(3)
    assert torch.equal(a, sample_times(5))
    g = torch.Generator().manual_seed(0)
    assert not torch.equal(sample_times(50, g), sample_times(50, g))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, f32, f64])
@pytest.mark.parametrize('value', [0., 1 - 2**-53], ids=['lowest', 'highest'])
@pytest.mark.parametrize('low_discrepancy', [True, False])
@pytest.mark.parametrize('n', [1, 2, 49, 600])
def test_the_worst_random_numbers_reach_neither_end(monkeypatch, dtype, value, low_discrepancy, n):
    "the largest float64 below 1 rounds to 1 in every narrower type"
    monkeypatch.setattr(torch, 'rand', lambda k, dtype, **kw: torch.full((k,), value, dtype=dtype))
    t = sample_times(n, dtype=dtype, low_discrepancy=low_discrepancy)
    assert t.dtype == dtype and (t > 0).all() and (t < 1).all()
    assert UNCUT.logsnr(t).isfinite().all()


@pytest.mark.parametrize('bad', [0, -1, 2.5, '4', None, True, math.nan, math.inf, torch.tensor(4)], ids=repr)
def test_a_batch_size_that_is_none_is_named(bad):
    with pytest.raises((TypeError, ValueError), match='^n must be'): sample_times(bad)


def test_times_of_whole_numbers_are_refused():
    with pytest.raises((TypeError, ValueError), match='dtype'): sample_times(4, dtype=torch.int64)


# ---- the network's time

def test_network_time_is_a_bounded_bijection():
    logsnr = torch.linspace(-30, 30, 241, dtype=f64)
    u = network_time(logsnr)
    assert (u > 0).all() and (u < 1).all() and (u.diff() < 0).all()
    error = (network_logsnr(u) - logsnr).abs()
    assert (error <= 1e-12 + 4e-16 * 2 * math.pi * (logsnr / 2).cosh()).all()
    torch.testing.assert_close(network_time(network_logsnr(u)), u, rtol=1e-13, atol=0)
    torch.testing.assert_close(u + network_time(-logsnr), torch.ones_like(u))
    torch.testing.assert_close(u, UNCUT.t(logsnr), rtol=1e-14, atol=0)


@pytest.mark.parametrize('dtype', [f32, f64])
def test_network_time_at_the_extremes(dtype):
    u = network_time(torch.tensor([-math.inf, -1e4, -200., 0., 200., 1e4, math.inf], dtype=dtype))
    assert u.dtype == dtype and not u.isnan().any() and (u >= 0).all() and (u <= 1).all()
    assert u[0] == 1 and u[-1] == 0 and abs(u[3] - 0.5) < 1e-7


# ---- the process

def growth(name, logsnr):
    "d log α/dλ by hand: of a constant, of √sigmoid(λ), of sigmoid(λ/2)."
    if name in ('ve', 'edm_train', 'edm_sample'): return torch.zeros_like(logsnr)
    return torch.sigmoid(-logsnr / 2 if name in ('rectified_flow', 'logit_normal') else -logsnr) / 2


@with_path
@few
@given(u=unit, v=unit)
def test_the_process_has_the_moments_of_the_schedule(name, u, v):
    "dα/dt = f α and dσ²/dt = 2 f σ² + g², by autograd of the schedule itself"
    s = schedule_over(name, u, v)
    t = torch.linspace(0.02, 0.98, 33, dtype=f64, requires_grad=True)
    level = s.level(t)
    dalpha, = torch.autograd.grad(level.alpha.sum(), t, retain_graph=True, materialize_grads=True)
    dvariance, = torch.autograd.grad((level.sigma**2).sum(), t)
    alpha, sigma = level.alpha.detach(), level.sigma.detach()
    f, g2 = (q.detach() for q in sde(s, t))
    torch.testing.assert_close(f * alpha, dalpha, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(2 * f * sigma**2 + g2, dvariance, rtol=1e-7, atol=1e-9 * g2.max().item())
    assert (g2 > 0).all() and (f <= 0).all()


@with_path
@few
@given(u=unit, v=unit)
def test_the_growth_of_the_signal_is_its_slope(name, u, v):
    "finite differences of log α over λ, and the known forms"
    s = schedule_over(name, u, v)
    logsnr, h = torch.linspace(s.logsnr_min, s.logsnr_max, 33, dtype=f64), 1e-5
    log_alpha = lambda l: s.scales(l)[0].log()
    got = dlog_alpha(s, logsnr)
    torch.testing.assert_close(got, (log_alpha(logsnr + h) - log_alpha(logsnr - h)) / (2 * h), rtol=0, atol=1e-9)
    torch.testing.assert_close(got, growth(name, logsnr), rtol=1e-6, atol=0)


@every
@pytest.mark.parametrize('dtype, widest, close', [(f32, 12.9, 1e-4), (f64, 20., 1e-6)])
def test_the_growth_of_the_signal_keeps_its_digits_at_the_clean_end(name, dtype, widest, close):
    "precision is stated at given λ: 1 - sigmoid(λ) must not be what gives sigmoid(-λ)"
    s, logsnr = SCHEDULES[name](), torch.linspace(-10, widest, 41, dtype=dtype)
    torch.testing.assert_close(dlog_alpha(s, logsnr).double(), growth(name, logsnr.double()), rtol=close, atol=0)


@with_path
@pytest.mark.parametrize('dtype', [f32, f64])
def test_the_process_is_finite_at_every_level_a_run_may_have(name, dtype):
    s = schedule_over(name, 0., 1., 80.)
    logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 161, dtype=dtype)
    got = dlog_alpha(s, logsnr)
    assert got.dtype == dtype and got.isfinite().all() and (got >= -1e-7).all() and (got <= 0.5 + 1e-6).all()
    f, g2 = sde(s, torch.linspace(0, 1, 161, dtype=dtype))
    assert f.dtype == g2.dtype == dtype and f.isfinite().all() and g2.isfinite().all() and (g2 > 0).all() and (f <= 1e-3).all()


@with_path
@pytest.mark.parametrize('dtype', [f32, f64])
@pytest.mark.parametrize('shape', [(), (0,), (1,), (5, 1), (2, 3, 4)], ids=str)
def test_the_process_keeps_shape_and_dtype_and_leaves_no_trace(name, dtype, shape):
    s, t = SCHEDULES[name](), torch.full(shape, 0.4, dtype=dtype)
    outside = dlog_alpha(s, t), *sde(s, t)
    with torch.no_grad(): inside = dlog_alpha(s, t), *sde(s, t)
    leaf = t.clone().requires_grad_()
    for a, b, c in zip(outside, inside, (dlog_alpha(s, leaf), *sde(s, leaf))):
        assert a.shape == shape and a.dtype == dtype and not a.requires_grad and torch.equal(a, b) and torch.equal(a, c.detach())
    assert leaf.grad is None and not t.requires_grad
    for value in (0.4, 0.): assert all(q.dtype == f64 and q.shape == () for q in (dlog_alpha(s, value), *sde(s, value)))


@with_formula
def test_the_process_of_symbols_is_that_of_numbers(name):
    import sympy
    s, l, t = SCHEDULES[name](), sympy.Symbol('l', real=True), sympy.Symbol('t', positive=True)
    for value in (-8., -0.3, 0., 5.):
        assert float(sympy.N(dlog_alpha(s, l).subs(l, value))) == pytest.approx(dlog_alpha(s, value).item(), rel=1e-9, abs=1e-12)
    for at in (0.1, 0.5, 0.9):
        for symbolic, numeric in zip(sde(s, t), sde(s, at)): assert float(sympy.N(sympy.sympify(symbolic).subs(t, at))) == pytest.approx(numeric.item(), rel=1e-8, abs=1e-12)
    torch.testing.assert_close(torch.tensor(float(dlog_alpha(s, l).subs(l, 1)), dtype=f64), growth(name, torch.tensor(1., dtype=f64)))


@with_path
def test_the_process_integrates_to_the_transition(name):
    "α_{t|s} = exp ∫f and σ²_{t|s} = ∫ g² exp(2∫f), by Simpson's rule"
    sched = SCHEDULES[name](logsnr_min=-6, logsnr_max=6)
    t = torch.linspace(0.2, 0.8, 4001, dtype=f64)
    f, g2 = sde(sched, t)
    from scipy.integrate import cumulative_simpson
    total = torch.as_tensor(cumulative_simpson(f.numpy(), x=t.numpy(), initial=0))
    a_ts, var_ts = transition(sched.level(0.2), sched.level(0.8))
    assert total[-1].exp().item() == pytest.approx(a_ts.item(), rel=1e-8)
    assert simpson((g2 * (2 * (total[-1] - total)).exp()).numpy(), x=t.numpy()) == pytest.approx(var_ts.item(), rel=1e-8)


@pytest.mark.parametrize('schedule', [UNCUT, LinearSchedule(logsnr_max=math.inf)], ids=lambda s: s.name)
def test_the_process_at_uncut_ends_is_right_or_refused(schedule):
    "no nan: DDPM's own first level has f = -β_min/2 and g² = β_min; the uncut cosine starts at 0 and ends at -∞ and ∞"
    try: f, g2 = sde(schedule, torch.tensor([0., 1.], dtype=f64))
    except (ValueError, ZeroDivisionError, FloatingPointError) as e: assert 'logsnr' in str(e) or 'alpha' in str(e) or 'sigma' in str(e)
    else:
        first = schedule.beta_min if schedule.name == 'linear' else 0.
        assert (f[0], g2[0]) == (-first / 2, first) and not f.isnan().any() and not g2.isnan().any()


@every
@few
@given(st.floats(-12, 12))
def test_a_level_knows_its_scale_and_its_angle(name, logsnr):
    for dtype, close in ((f32, 1e-5), (f64, 1e-12)):
        l = torch.tensor([logsnr], dtype=dtype)
        level = Level(l, *SCHEDULES[name]().scales(l))
        assert level.scale.dtype == level.angle.dtype == dtype and 0 < level.angle < math.pi / 2
        torch.testing.assert_close(torch.cat([level.scale * level.angle.cos(), level.scale * level.angle.sin()]), torch.cat([level.alpha, level.sigma]), rtol=100 * close, atol=0.)
        torch.testing.assert_close(2 / math.pi * level.angle, network_time(l), rtol=close, atol=0)     # the cosine time of λ, whatever the schedule
    noise, clean = UNCUT.level(1.), UNCUT.level(0.)
    assert (noise.angle, clean.angle, noise.scale, clean.scale) == (math.pi / 2, 0, 1, 1)


# ---- schedules of the field

def test_the_lists_of_edm():
    "σ of their sampler against their own formula, (σ_max^(1/ρ) + i/(N-1)(σ_min^(1/ρ) - σ_max^(1/ρ)))^ρ; ln σ of their training is N(-1.2, 1.2²)"
    for rho in (7., 3., 1., 0.5):
        i, N = torch.arange(18, dtype=f64), 18
        theirs = (80**(1 / rho) + i / (N - 1) * (0.002**(1 / rho) - 80**(1 / rho)))**rho
        torch.testing.assert_close(SCHEDULES['edm_sample'](rho=rho).sigma(1 - i / (N - 1)), theirs, rtol=1e-7, atol=0)
    log_sigma = SCHEDULES['edm_train'](-14., 18.).sigma(sample_times(100_000, torch.Generator().manual_seed(0), dtype=f64)).log()
    assert abs(log_sigma.mean() + 1.2) < 1e-3 and abs(log_sigma.std() - 1.2) < 1e-3


@few
@given(st.floats(-3, 3), st.floats(0.3, 2))
def test_logit_normal_times_are_logit_normal(m, spread):
    "σ = t under rectified flow, so logit σ ~ N(m, s²)"
    s = SCHEDULES['logit_normal'](-2 * m - 10 * spread, -2 * m + 10 * spread, m=m, s=spread)
    logit = s.sigma(sample_times(20_000, torch.Generator().manual_seed(0), dtype=f64)).logit()
    assert abs(logit.mean() - m) < 1e-3 and abs(logit.std() - spread) < 2e-3


@few
@given(st.floats(-4, 4))
def test_a_shift_is_a_change_of_the_snr_by_e_to_twice_the_shift(shift):
    t = torch.linspace(0.01, 0.99, 21, dtype=f64)
    shifted = SCHEDULES['shifted_cosine'](-math.inf, math.inf, shift=shift)
    torch.testing.assert_close(shifted.logsnr(t), UNCUT.logsnr(t) + 2 * shift, rtol=0, atol=1e-12)
    assert SCHEDULES['shifted_cosine']().shift == math.log(64 / 128)


def test_rectified_flow_is_a_straight_line():
    s, t = SCHEDULES['rectified_flow'](-math.inf, math.inf), torch.linspace(0, 1, 21, dtype=f64)
    torch.testing.assert_close(s.alpha(t), 1 - t, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(s.sigma(t), t, rtol=1e-12, atol=1e-15)


@with_formula
@few
@given(u=unit, v=unit)
def test_cut_is_cut_and_nothing_else(name, u, v):
    "the levels of a cut schedule are those of its own path between two times"
    s = schedule_over(name, u, v)
    t = torch.linspace(0, 1, 21, dtype=f64)
    torch.testing.assert_close(s.logsnr(t), s.path(s._t0 + (s._t1 - s._t0) * t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('bad', [dict(shift=41), dict(shift='1'), dict(rho=0), dict(rho=math.nan), dict(std=0), dict(mean=math.inf), dict(m='0'), dict(s=0), dict(s=-1.), dict(m=True)], ids=str)
def test_options_out_of_range_are_named(bad):
    (option,) = bad
    name = dict(shift='shifted_cosine', rho='edm_sample', std='edm_train', mean='edm_train', m='logit_normal', s='logit_normal')[option]
    with pytest.raises((TypeError, ValueError), match=f'^{option} must be'): SCHEDULES[name](**bad)


# ---- T levels

@pytest.mark.parametrize('T', [1, 2, 7, 1000, 10**5, 10**6])
def test_a_time_i_over_T_finds_level_i(T):
    "in spite of rounding, in float32 too; and no time above 0 is at level 0, which no loss knows"
    s, i = DiscreteSchedule(-9, 9, T=T), torch.arange(T + 1)
    for dtype in (f32, f64):
        assert torch.equal(s.index(i.to(dtype) / T), i)
        tiny = torch.finfo(dtype).tiny
        assert s.index(torch.tensor([0., tiny, torch.finfo(dtype).eps / 2], dtype=dtype)).tolist() == [0, 1, 1]
    between = (i[1:].double() - 0.5) / T
    assert torch.equal(s.index(between), i[1:])
    if T <= 10**5:   # beyond, float32 has too few digits for that many levels
        for dtype in (f32, f64): assert torch.equal(s._i(s.logsnr((i[1:].to(dtype)) / T)), i[1:])


@pytest.mark.parametrize('inner', [*CONTINUOUS, 'shifted_cosine(shift=-1)', 'linear(-5, 6)'])
def test_a_schedule_seen_at_T_times(inner):
    "its levels and scales at i/T, one cell of density 1/T between two levels, and t(λ(t)) the end of the cell"
    s = DiscreteSchedule(schedule=inner, T=13)
    path = DiscreteSchedule(schedule=inner, T=1)._inner
    i = torch.arange(14, dtype=f64)
    for f in ('logsnr', 'alpha', 'sigma'): torch.testing.assert_close(getattr(s, f)(i / 13), getattr(path, f)(i / 13), rtol=1e-12, atol=1e-12)
    t = torch.linspace(0.001, 1, 99, dtype=f64)
    torch.testing.assert_close(s.t(s.logsnr(t)), (t * 13 - 1e-9).ceil() / 13, rtol=1e-12, atol=0)
    mass = s.density((s._levels[1:] + s._levels[:-1]) / 2) * -s._levels.diff()
    torch.testing.assert_close(mass, torch.full_like(mass, 1 / 13), rtol=1e-12, atol=0)
    assert (s.density(torch.tensor([s.logsnr_min - 1e-6, s.logsnr_max + 1e-6], dtype=f64)) == 0).all()
    snr = s._levels.exp()                                                  # thesis 3.17: a difference of SNRs
    torch.testing.assert_close(-s.dlogsnr_at(s._levels[1:]), 13 * (snr[:-1] / snr[1:] - 1), rtol=1e-9, atol=0)
    torch.testing.assert_close(s.jump(s._levels[1:]), s.before(s._levels[1:]) - s._levels[1:])
    inside = (s._levels[1:] + s._levels[:-1]) / 2                          # a level between belongs to the next noisier one
    assert torch.equal(s.level_at(inside).logsnr, s._levels[1:])


@few
@given(st.integers(1, 60), st.floats(1e-4, 0.5), st.floats(0, 0.49))
def test_ddpm_is_the_plain_product(T, beta_min, more):
    s = DDPMSchedule(logsnr_max=math.inf, T=T, beta_min=beta_min, beta_max=beta_min + more)
    product, alphas = 1., []
    for i in range(T):
        product *= 1 - (beta_min + more * i / max(1, T - 1)); alphas.append(product)
    i = torch.arange(1, T + 1, dtype=f64) / T
    torch.testing.assert_close(s.alpha(i)**2, torch.tensor(alphas, dtype=f64), rtol=1e-9, atol=0)
    torch.testing.assert_close(s.sigma(i)**2, 1 - torch.tensor(alphas, dtype=f64), rtol=1e-9, atol=1e-12)
    assert s.alpha(0.) == 1 and s.sigma(0.) == 0 and s.logsnr_min == s._levels[-1]
    assert DDPMSchedule(logsnr_min=s.logsnr_min, logsnr_max=math.inf, T=T, beta_min=beta_min, beta_max=beta_min + more).logsnr_min == s.logsnr_min


@pytest.mark.parametrize('bad, text', [
    (dict(T=0), 'T must be'), (dict(T=1.5), 'T must be'), (dict(T=True), 'T must be'), (dict(T='10'), 'T must be'), (dict(T=math.nan), 'T must be'), (dict(T=10**7), 'T must be'),
    (dict(schedule='cosin'), "Did you mean 'cosine'"), (dict(schedule='cosine(-inf, inf)'), 'finite range'), (dict(schedule='ddpm'), 'levels of its own'), (dict(schedule='adaptive'), 'levels of its own'),
    (dict(schedule='discrete(T=4)', logsnr_min=-5), 'levels of its own'), (dict(schedule='linear', logsnr_min=-12), 'linear schedule reaches'), (dict(schedule=None), 'schedule must be'),
    (dict(logsnr_min=5, logsnr_max=-5), 'logsnr_min must be below'), (dict(logsnr_min=0, logsnr_max=1e-12, T=10**5), 'do not fall')], ids=str)
def test_T_levels_that_cannot_be(bad, text):
    with pytest.raises((TypeError, ValueError), match=text): DiscreteSchedule(**bad)


@pytest.mark.parametrize('bad, text', [(dict(logsnr_min=-12), 'cannot end at -12'), (dict(logsnr_max=5), 'above the first level'), (dict(logsnr_max=math.nan), 'logsnr_max must be'), (dict(beta_min=0), 'beta_min'),
                                       (dict(beta_max=1), 'beta_max'), (dict(beta_min=0.1, beta_max=0.01), 'beta_max'), (dict(beta_min='1'), 'beta_min'), (dict(T=0), 'T must be')], ids=str)
def test_chains_of_ddpm_that_cannot_be(bad, text):
    with pytest.raises((TypeError, ValueError), match=text): DDPMSchedule(**bad)


def test_a_staircase_has_no_process_and_no_formula():
    import sympy
    for s in (DiscreteSchedule(), DDPMSchedule()):
        with pytest.raises(ValueError, match='jumps from level to level'): sde(s, torch.tensor([0.5]))
        with pytest.raises(TypeError, match='no formula'): s.logsnr(sympy.Symbol('t'))
        assert len(repr(s)) < 130, repr(s)
    with pytest.raises(TypeError, match='no formula'): AdaptiveSchedule().logsnr(sympy.Symbol('t'))


# ---- the schedule that learns

batches = st.lists(st.lists(st.tuples(st.floats(-3, 5), st.one_of(st.sampled_from([0., 1e-300, 1., 1e300, math.inf, math.nan]), st.floats(0, 1e6))), min_size=1, max_size=6), max_size=5)


@few
@given(batches, st.integers(1, 9), st.sampled_from([1, 2]), st.sampled_from([1e-6, 0.1, 1.]), st.sampled_from([0., 0.5, 0.99]))
def test_whatever_was_seen_the_path_is_a_decreasing_bijection(batches, bins, moment, uniform, decay):
    "zeros, overflows and nan included: the density stays at or above its uniform share, and integrates to one"
    s = AdaptiveSchedule(-3, 5, bins=bins, moment=moment, uniform=uniform, decay=decay)
    for batch in batches: s.observe(*torch.tensor(batch, dtype=f64).T)
    t = torch.linspace(0, 1, 201, dtype=f64)
    logsnr = s.logsnr(t)
    assert logsnr.isfinite().all() and (logsnr.diff() < 0).all() and logsnr[0] == 5 and abs(logsnr[-1] + 3) < 1e-12
    torch.testing.assert_close(s.t(logsnr), t, rtol=0, atol=1e-9)
    middle = (s._edges[1:] + s._edges[:-1]) / 2
    p = s.density(middle)
    assert (p >= uniform / 8 * (1 - 1e-9)).all() and abs(p.sum().item() * 8 / bins - 1) < 1e-9
    for dtype in (f32, f64):
        k = s.logsnr(torch.rand(50, generator=torch.Generator().manual_seed(0)).to(dtype))
        assert (s.dlogsnr_at(k) < 0).all() and s.dlogsnr_at(k).isfinite().all() and k.dtype == dtype


def test_the_history_is_a_moving_average_of_the_means():
    s = AdaptiveSchedule(0, 4, bins=4, decay=0.75, uniform=1e-6)
    see = lambda k, v: s.observe(torch.tensor(k), torch.tensor(v))
    see([3.5, 3.6, 0.5], [1., 3., 6.])
    assert s._history.nan_to_num(-1).tolist() == [2., -1., -1., 6.]           # from the clean end; first seen, first believed
    torch.testing.assert_close(s._mass, torch.tensor([2., 4., 4., 6.], dtype=f64) / 16, rtol=1e-5, atol=0)   # unseen: average
    see([3.5], [10.])
    assert s._history.nan_to_num(-1).tolist() == [4., -1., -1., 6.]           # 0.75 · 2 + 0.25 · 10
    for bad in (math.nan, math.inf, -math.inf): see([3.5, 1.5], [bad, 7.])
    assert s._history.nan_to_num(-1).tolist() == [4., -1., -1., 6.]           # a batch that is not finite teaches nothing
    see([4., 0., 2.], [4., 6., 1.])                                            # both ends and an edge are somewhere
    assert s._history.isnan().sum() == 1


def test_an_adapted_schedule_still_estimates_the_integral():
    "the mean of w L′/p over its times, against the integral of w L′: for any history, and with less variance when adapted"
    profile = lambda k: (-(k - 2)**2).exp() + 0.1
    k = torch.linspace(-6, 6, 20_001, dtype=f64)
    exact, s, spread = torch.trapezoid(profile(k), k).item(), AdaptiveSchedule(-6, 6), []
    for step in range(60):
        logsnr = s.logsnr(sample_times(4096, torch.Generator().manual_seed(step), dtype=f64, low_discrepancy=False))
        value = profile(logsnr) / s.density(logsnr)
        assert abs(value.mean() - exact) < 5 * value.std() / 64
        spread.append(value.std().item())
        s.observe(logsnr, profile(logsnr))
    assert spread[-1] < 0.3 * spread[0]


def test_a_state_goes_there_and_back():
    s, other = AdaptiveSchedule(-3, 5, bins=7), AdaptiveSchedule(-3, 5, bins=7)
    s.observe(torch.tensor([-2., 4.]), torch.tensor([5., 1.]))
    kept = s.state(); other.load_state(kept)
    t = torch.linspace(0, 1, 9, dtype=f64)
    assert torch.equal(s.logsnr(t), other.logsnr(t))
    other.observe(torch.tensor([-2.]), torch.tensor([50.]))
    assert not torch.equal(s.logsnr(t), other.logsnr(t)) and torch.equal(kept['history'][-1], torch.tensor(5., dtype=f64))   # a copy, not a view
    for bad in ({}, {'history': None}, {'history': torch.zeros(6)}, {'history': [1.] * 7}):
        with pytest.raises(ValueError, match='does not hold the history'): other.load_state(bad)


@pytest.mark.parametrize('bad', [dict(bins=0), dict(bins=2.5), dict(decay=1), dict(decay=-0.1), dict(uniform=0), dict(uniform=1.1), dict(moment=3), dict(moment=0), dict(moment=1.5), dict(bins='9'), dict(decay=math.nan),
                                 dict(uniform=True)], ids=str)
def test_an_adaptive_schedule_that_cannot_be(bad):
    (option,) = bad
    with pytest.raises((TypeError, ValueError), match=f'^{option} must be'): AdaptiveSchedule(**bad)
    for ends in ((-math.inf, 3.), (3., math.inf), (3., -3.)):
        with pytest.raises(ValueError, match='finite range of logsnr'): AdaptiveSchedule(*ends)


def test_the_betas_of_chains_are_those_that_other_code_writes():
    betas = {'linear': np.linspace(1e-4, 0.02, 1000), 'scaled_linear': np.linspace(1e-4**0.5, 0.02**0.5, 1000)**2}
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    betas['cosine'] = np.minimum(1 - f[1:] / f[:-1], 0.999)
    for name, beta in betas.items():
        alpha_bar = np.cumprod(1 - beta)
        s = SCHEDULES['ddpm'](beta=name, logsnr_max=20)
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        assert np.allclose(s.alpha(t).numpy()**2, alpha_bar, rtol=1e-9), name
    with pytest.raises(ValueError, match="Did you mean 'scaled_linear'"): SCHEDULES['ddpm'](beta='scaled-linear')
