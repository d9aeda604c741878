"Every schedule of the registry alike: ranges, ends, dtypes, densities, the process, and times."
import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson

from lfdm.core import from_spec, seeded
from lfdm.schedules import (
    CONTINUOUS,
    SCHEDULES,
    CosineSchedule,
    dlog_alpha,
    network_logsnr,
    network_time,
    posterior,
    sample_times,
    sde,
    transition,
)

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
equal, close = torch.equal, torch.testing.assert_close
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize("name", SCHEDULES)
with_path = pytest.mark.parametrize("name", (*CONTINUOUS, "adaptive"))   # T levels have no process
over_ranges = lambda test: few(given(u=st.floats(0, 1), v=st.floats(0, 1))(test))
UNCUT = CosineSchedule(-math.inf, math.inf)
EXPLODING = ("ve", "edm_train", "edm_sample")
STRAIGHT = ("rectified_flow", "logit_normal", "cosmap", "mode", "beta")


def grid(low, high, n=33, dtype=f64, **kw): return torch.linspace(low, high, n, dtype=dtype, **kw)
def functions(s): return s.alpha, s.sigma, s.logsnr, s.dlogsnr, s.t, s.density


def ends(name, widest):
    "What a schedule reaches within ±widest. A bell ends at five deviations: beyond, times have no digits."
    s = SCHEDULES[name]()
    low, high = max(s.reach()[0], -widest), min(s.reach()[1], widest)
    return (max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)) if hasattr(s, "std") else (low, high)


def schedule_over(name, u, v, widest=14.):
    "The schedule of that name over a part of its reach; over its default range where that part is too small."
    if name == "ddpm": return SCHEDULES[name](logsnr_max=9.3 + (widest - 9.3) * max(u, v))
    low, high = ends(name, widest)
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    return SCHEDULES[name](a, max(b, min(a + 0.5, high))) if b - a > 0.1 else SCHEDULES[name]()


# --- range, path and density

@every
@over_ranges
def test_the_range_is_kept_exactly(name, u, v):
    "λ(0) is λ_max, λ(1) is λ_min, no time leads beyond them, and no level that is reached has density 0"
    s = schedule_over(name, u, v)
    for dtype, tolerance in ((f64, 1e-9), (f32, 1e-4)):
        logsnr = s.logsnr(grid(0, 1, 99, dtype))
        low, high = torch.tensor([s.logsnr_min, s.logsnr_max], dtype=dtype)
        close(logsnr[[0, -1]], torch.stack([high, low]), rtol=0, atol=tolerance)
        assert (logsnr <= high).all() and (logsnr >= low).all() and (logsnr.diff() <= 0).all()
        assert (s.density(logsnr) > 0).all()


@every
@pytest.mark.parametrize("widest", [40., 80.])
def test_the_ends_of_a_wide_range_are_what_was_asked_for(name, widest):
    "near t = 1 the path must not run into -inf because 1 - t has no digits left"
    s = schedule_over(name, 0., 1., widest)
    for t in (torch.tensor([0., 1.], dtype=dtype) for dtype in (f32, f64)):
        assert s.logsnr(t).isfinite().all() and s.alpha(t[1]) > 0 and s.sigma(t[0]) > 0
    close(s.logsnr(t), torch.tensor([s.logsnr_max, s.logsnr_min], dtype=f64), rtol=1e-4, atol=0)


@with_path
@over_ranges
def test_time_slope_and_density_belong_to_the_path(name, u, v):
    "`t` inverts λ(t), λ′ is its derivative, p = -1/λ′ is 0 outside, and sums to the share of times above λ"
    s, t = schedule_over(name, u, v), grid(0, 1, 41)
    close(s.t(s.logsnr(t)), t, rtol=0, atol=1e-10)
    t = grid(0.02, 0.98, requires_grad=True)
    slope, = torch.autograd.grad(s.logsnr(t).sum(), t)
    close(s.dlogsnr(t).detach(), slope, rtol=1e-8, atol=0)
    logsnr = grid(s.logsnr_min, s.logsnr_max, 4001)
    slope, p = s.dlogsnr_at(logsnr), s.density(logsnr)
    error = (s.logsnr(s.t(logsnr)) - logsnr).abs()
    assert (error <= 1e-12 + 4e-16 * slope.abs() / min(1, s._t1 - s._t0)).all() and (slope < 0).all()
    close(p * -slope, torch.ones_like(p), rtol=1e-12, atol=0)
    share = lambda k: simpson(p[:k].numpy(), x=logsnr[:k].numpy())
    assert abs(share(4001) - 1) < 1e-8 and abs(share(2001) - (1 - s.t(logsnr[2000]).item())) < 1e-8
    outside = torch.tensor([s.logsnr_min - 1e-6, s.logsnr_max + 1e-6, -1e3, 1e3], dtype=f64)
    assert (s.density(outside) == 0).all()


@every
def test_scales_have_the_log_ratio_they_claim(name):
    "log α²/σ² = λ, and each schedule is variance preserving, variance exploding, or a straight line"
    s = schedule_over(name, 0., 1.)
    level = s.level(t := grid(0, 1))
    logsnr, alpha, sigma = level
    close(2 * (alpha.log() - sigma.log()), s.logsnr(t), rtol=1e-12, atol=1e-12)
    fixed = alpha if name in EXPLODING else alpha + sigma if name in STRAIGHT else alpha**2 + sigma**2
    close(fixed, torch.ones_like(alpha), rtol=1e-12, atol=0)
    close(level.scale * level.angle.cos(), alpha, rtol=1e-10, atol=0)
    close(level.scale * level.angle.sin(), sigma, rtol=1e-10, atol=0)
    close(2 / math.pi * level.angle, network_time(logsnr), rtol=1e-12, atol=0)


# --- arguments

@every
def test_shape_and_dtype_are_kept_and_16_bits_computed_in_32(name):
    for f in functions(SCHEDULES[name]()):
        for dtype in (torch.float16, torch.bfloat16, f32, f64):
            for shape in ((), (0,), (5, 1)):
                got = f(torch.full(shape, 0.5, dtype=dtype))
                assert got.shape == shape and got.dtype == dtype and got.isfinite().all(), f
        half = torch.tensor([0.25, 0.7], dtype=torch.bfloat16)
        if name in CONTINUOUS: assert equal(f(half), f(half.float()).bfloat16()), f
        assert f(torch.tensor([0.5, math.nan])).isnan().tolist() == [False, True], f


@every
def test_ranges_that_cannot_be(name):
    for low, high in ((5., 5.), (5., -5.), (math.inf, 0.), (0., -math.inf)):
        with pytest.raises(ValueError, match="logsnr"): SCHEDULES[name](low, high)
    edge, _ = SCHEDULES[name]().reach()
    if name in ("ve", "edm_sample", "adaptive"):
        for end in (dict(logsnr_min=-math.inf), dict(logsnr_max=math.inf)):
            with pytest.raises(ValueError, match=f"{name} schedule needs a finite range of logsnr"):
                SCHEDULES[name](**end)
    elif math.isfinite(edge):
        assert SCHEDULES[name](edge).logsnr_min == edge
        with pytest.raises(ValueError, match=f"the {name} schedule reaches logsnr from {edge:.6g}"):
            SCHEDULES[name](edge - 0.01)


@pytest.mark.parametrize("name, bad, says", [
    ("ve", dict(logsnr_min=-1500), "^logsnr_min -1500 is more than .* sigma inf"),
    ("cosine", dict(logsnr_min=-1500), "^logsnr_min .* alpha 0 "),
    ("cosine", dict(logsnr_max=1500), "^logsnr_max .* sigma 0 "),
    ("edm_sample", dict(logsnr_min=-80, logsnr_max=80, rho=0.1), "^rho must be at least 0.114 for logsnr"),
    ("shifted_cosine", dict(shift=40), "more levels than float64 has times"),
    ("linear", dict(beta_min=0), "^beta_min must"), ("linear", dict(beta_max=0.05), "^beta_max must"),
    ("shifted_cosine", dict(shift=41), "^shift must"), ("edm_sample", dict(rho=0), "^rho must"),
    ("edm_train", dict(std=0), "^std must"), ("logit_normal", dict(s=0), "^s must")])
def test_options_that_cannot_be_are_named(name, bad, says):
    with pytest.raises(ValueError, match=says): SCHEDULES[name](**bad)


def exact(low, high, shift, t):
    "The cosine path with 60 digits."
    with mp.workdps(60):
        u0, u1 = (2 / mp.pi * mp.atan(mp.exp(-(k - 2 * shift) / 2)) for k in (high, low))
        path = lambda u: -2 * mp.log(mp.tan(mp.pi * u / 2)) + 2 * shift
        return torch.tensor([float(path(u0 + (u1 - u0) * k)) for k in t.tolist()], dtype=f64)


@pytest.mark.parametrize("low, high, shift", [
    (-12.9, 12.9, 25), (-12.9, 12.9, -40), (-33, 12, 0), (-70, 12, 0), (-80, 80, 0)])
def test_levels_that_float32_would_lose_are_found_in_float64(low, high, shift):
    "1 - t has no digits left in float32: λ was off by 0.5, or one number for all times"
    s, t = SCHEDULES["shifted_cosine"](low, high, shift), torch.linspace(0, 1, 1000)
    found = s.logsnr(t)
    assert found.dtype == f32 and len(found.unique()) == 1000
    close(found.double(), exact(low, high, shift, t), rtol=1e-3, atol=1e-4)
    close(found[[0, -1]], torch.tensor([high, low], dtype=f32), rtol=0, atol=1e-3)
    assert s.version() == (2 if shift > 0 or -80 < low < -30 else 1)


@pytest.mark.parametrize("text", ["edm_sample(rho=0.1)", "linear(-600, 12, 0.1, 2000)"])
def test_exponentials_beyond_float32_are_taken_in_float64(text):
    s, t = from_spec(SCHEDULES, text, "schedule"), torch.linspace(0, 1, 1000)
    assert s.version() == 2 and len(s.logsnr(t).unique()) == 1000
    close(s.logsnr(t).double(), s.logsnr(t.double()), rtol=1e-6, atol=1e-6)


# --- one step of the chain

def test_the_smallest_the_last_and_the_first_step():
    "σ²_{t|s} as a difference would be 0; at the ends of the uncut schedule there is no log 0 and no wrong α"
    near, here = (UNCUT.level_at(torch.tensor(k, dtype=f64)) for k in (1e-13, 0.))
    close(transition(near, here)[1], torch.tensor(0.5e-13, dtype=f64), rtol=1e-6, atol=0)
    clean, middle, noise = (UNCUT.level(t) for t in (0., 0.5, 1.))
    assert posterior(clean, middle) == (0, 1, 0)
    close(posterior(middle, noise), (torch.zeros_like(middle.alpha), middle.alpha, middle.sigma**2))


# --- times of a batch

@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_every_position_is_uniform_and_positions_are_independent_if_asked(low_discrepancy):
    options, before = dict(dtype=f64, low_discrepancy=low_discrepancy), torch.get_rng_state()
    t = torch.stack([sample_times(8, seeded(i), **options) for i in range(2000)])
    assert equal(before, torch.get_rng_state())                 # other streams are left alone
    gap = (t.sort(0).values - (torch.arange(2000)[:, None] + 0.5) / 2000).abs().max()
    assert gap < 1.95 / 2000**0.5                               # Kolmogorov-Smirnov at 0.1 %
    assert (t.T.corrcoef() - torch.eye(8)).abs().max() < (0.25 if low_discrepancy else 0.1)   # spread: -1/7
    assert (t.diff(dim=1) > 0).all(1).double().mean() < 0.01    # shuffled
    one_each = ((t * 8).floor().sort(1).values == torch.arange(8)).all(1).double().mean()
    assert one_each == 1 if low_discrepancy else one_each < 0.02   # independent ones: 8!/8^8 = 0.24 %


@pytest.mark.parametrize("value", [0., 1 - 2**-53])
@pytest.mark.parametrize("low_discrepancy", [True, False])
def test_the_worst_random_numbers_reach_neither_end(monkeypatch, value, low_discrepancy):
    "the largest float64 below 1 rounds to 1 in every narrower type; times of 16 bits would coincide"
    monkeypatch.setattr(torch, "rand", lambda k, dtype, **kw: torch.full((k,), value, dtype=dtype))
    for dtype in (torch.float16, torch.bfloat16, f32, f64):
        for n in (1, 49, 600):
            t = sample_times(n, dtype=dtype, low_discrepancy=low_discrepancy)
            assert t.dtype == torch.promote_types(dtype, f32) and (t > 0).all() and (t < 1).all()
            assert UNCUT.logsnr(t).isfinite().all()
    with pytest.raises(TypeError, match="floating-point dtype"): sample_times(4, dtype=torch.int64)


# --- the network's time

def test_network_time_is_a_bounded_bijection():
    logsnr = grid(-30, 30, 241)
    u = network_time(logsnr)
    error = (network_logsnr(u) - logsnr).abs()
    assert (error <= 1e-12 + 4e-16 * 2 * math.pi * (logsnr / 2).cosh()).all() and (u.diff() < 0).all()
    for dtype in (f32, f64):
        u = network_time(torch.tensor([-math.inf, -1e4, -200., 0., 200., 1e4, math.inf], dtype=dtype))
        assert u.dtype == dtype and (u[0], u[3], u[-1]) == (1, 0.5, 0) and (u.diff() <= 0).all()


# --- the process

def growth(name, logsnr):
    "d log α/dλ by hand: of a constant, of sigmoid(λ/2), of √sigmoid(λ)."
    if name in EXPLODING: return torch.zeros_like(logsnr)
    return torch.sigmoid(-logsnr / 2 if name in STRAIGHT else -logsnr) / 2


@every
@pytest.mark.parametrize("dtype, widest, tolerance", [(f32, 12.9, 1e-4), (f64, 20., 1e-6)])
def test_the_growth_of_the_signal_keeps_its_digits_at_the_clean_end(name, dtype, widest, tolerance):
    "precision is stated at given λ: 1 - sigmoid(λ) must not be what gives sigmoid(-λ)"
    logsnr = grid(-10, widest, 41, dtype)
    got = dlog_alpha(SCHEDULES[name](), logsnr)
    close(got.double(), growth(name, logsnr.double()), rtol=tolerance, atol=0)


@with_path
@over_ranges
def test_the_process_has_the_moments_of_the_schedule(name, u, v):
    "dα/dt = f α and dσ²/dt = 2 f σ² + g², by autograd of the schedule itself"
    s, t = schedule_over(name, u, v), grid(0.02, 0.98, requires_grad=True)
    level = s.level(t)
    dalpha, = torch.autograd.grad(level.alpha.sum(), t, retain_graph=True, materialize_grads=True)
    dvariance, = torch.autograd.grad((level.sigma**2).sum(), t)
    f, g2, alpha, sigma = (q.detach() for q in (*sde(s, t), level.alpha, level.sigma))
    close(f * alpha, dalpha, rtol=1e-7, atol=1e-9)
    close(2 * f * sigma**2 + g2, dvariance, rtol=1e-7, atol=1e-9 * g2.max().item())


@with_path
@pytest.mark.parametrize("dtype", [f32, f64])
def test_the_process_is_finite_at_every_level_a_run_may_have(name, dtype):
    s = schedule_over(name, 0., 1., 80.)
    with torch.no_grad():
        slope = dlog_alpha(s, grid(s.logsnr_min, s.logsnr_max, 161, dtype))
        f, g2 = sde(s, grid(0, 1, 161, dtype))
    assert slope.dtype == f.dtype == g2.dtype == dtype and not slope.requires_grad
    assert (slope >= -1e-7).all() and (slope <= 0.5 + 1e-6).all() and f.isfinite().all() and (f <= 1e-3).all()
    assert g2.isfinite().all() and (g2 > 0).all()


def test_the_process_at_uncut_ends_is_refused():
    with pytest.raises(ValueError, match="no finite drift and noise at logsnr inf"):
        sde(UNCUT, torch.tensor([0.5, 0., 1.]))
