"Attempts to break lfdm.targets, all targets alike: conversions, the error ratio, zero scales."
import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given, settings, strategies as st

from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS, F, convert, nonzero

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
PAIRS = list(itertools.product(TARGETS, TARGETS))
of_all = pytest.mark.parametrize('name', TARGETS)
level = st.floats(-12, 12)
seeds = st.integers(0, 10**6)
schedules = st.sampled_from(sorted(SCHEDULES))
shapes = st.sampled_from([(2, 2), (4, 4), (3, 3, 4, 4), (4, 3, 4, 4), (1, 2), (5, 2)])


def scene(shape, seed, levels, schedule, dtype=f64):
    "x, ε, z, α, σ with one level per example"
    g = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, *shape, generator=g, dtype=f64).to(dtype)
    logsnr = torch.tensor([levels[i % len(levels)] for i in range(shape[0])], dtype=dtype)
    alpha, sigma = SCHEDULES[schedule]().scales(logsnr.reshape(-1, *[1] * (len(shape) - 1)))
    return x, eps, alpha * x + sigma * eps, alpha, sigma


def pair(seed=0): return torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.mark.parametrize('schedule', SCHEDULES)
@few
@given(shapes, seeds, st.lists(level, min_size=1, max_size=5))
def test_all_conversions_give_the_truth_from_the_truth(schedule, shape, seed, levels):
    for dtype, tolerance in ((f64, 1e-10), (f32, 1e-3)):
        x, eps, z, alpha, sigma = scene(shape, seed, levels, schedule, dtype)
        truth = {name: TARGETS[name]().encode(x, eps, alpha, sigma) for name in TARGETS}
        for source, target in PAIRS:
            got, want = convert(truth[source], source, target, z, alpha, sigma), truth[target]
            assert got.shape == shape and got.dtype == dtype
            allowed = tolerance * (1 + want.abs()).flatten(1).amax(1)
            assert ((got - want).abs().flatten(1).amax(1) <= allowed).all(), (source, target)


@few
@given(shapes, seeds, level, schedules, st.sampled_from([1e-6, 1., 1e8]))
def test_nothing_is_clamped(shape, seed, logsnr, schedule, size):
    "conversions are linear in the prediction however large it is, and go there and back"
    x, eps, z, alpha, sigma = scene(shape, seed, [logsnr], schedule)
    y = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=f64)
    for source, target in PAIRS:
        at0, at1, at3 = (convert(k * y, source, target, z, alpha, sigma) for k in (0, 1, 3))
        small = 1e-7 * (at0.abs().max().item() + at1.abs().max().item() + 1e-3)
        torch.testing.assert_close(at3 - at0, 3 * (at1 - at0), rtol=1e-6, atol=small)
        back = convert(at1, target, source, z, alpha, sigma)
        largest = sum(convert(y, source, t, z, alpha, sigma).abs().max() for t in TARGETS)
        assert (back - y).abs().max() <= 1e-11 * largest * max(1, math.exp(abs(logsnr) / 2))


@of_all
@few
@given(shapes, seeds, st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_one_identity(name, shape, seed, alpha, sigma):
    "‖ε - ε̂‖² = r ‖y - ŷ‖² at any scales, variance preserving or not"
    y = TARGETS[name]()
    x, eps, y_hat = torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
    for a, s in ((alpha, sigma), torch.tensor([alpha, sigma], dtype=f64)):
        left = (eps - y.to_eps(y_hat, a * x + s * eps, a, s)).square().mean()
        right = y.eps_ratio(a, s) * (y.encode(x, eps, a, s) - y_hat).square().mean()
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-12)


RATIOS = dict(
    x=lambda snr, s: snr, eps=lambda snr, s: 1., v=lambda snr, s: snr / (snr + 1), score=lambda snr, s: s**2,
    F=lambda snr, s: 1 / (1 + 4 / snr), flow=lambda snr, s: 1 / (1 + snr**-0.5)**2)


@of_all
@few
@given(level, schedules)
def test_the_ratio_is_the_documented_one(name, logsnr, schedule):
    "SNR/(SNR + 1) for v, and nothing without the + 1"
    alpha, sigma = SCHEDULES[schedule]().scales(torch.tensor([logsnr], dtype=f64))
    want = torch.tensor([RATIOS[name](math.exp(logsnr), sigma.item())], dtype=f64)
    torch.testing.assert_close(TARGETS[name]().eps_ratio(alpha, sigma), want)


@few
@given(seeds, level, schedules, st.floats(0.05, 20))
def test_targets_are_what_their_names_say(seed, logsnr, schedule, d):
    "score by autograd; v of unit variance, orthogonal to z; F as EDM's table 1 with z/α; F(1) is -v"
    x, eps, z, alpha, sigma = scene((4, 2), seed, [logsnr], schedule)
    z.requires_grad_()
    log_q = torch.distributions.Normal(alpha * x, sigma.expand_as(x)).log_prob(z)
    score, = torch.autograd.grad(log_q.sum(), z)
    torch.testing.assert_close(TARGETS['score']().encode(x, eps, alpha, sigma), score, rtol=1e-7, atol=1e-9)
    a, s = alpha[0].item(), sigma[0].item()
    v = TARGETS['v']()
    on_x, on_eps = v.encode(1., 0., a, s), v.encode(0., 1., a, s)
    assert abs(on_x**2 + on_eps**2 - 1) < 1e-12 and abs(on_x * a + on_eps * s) < 1e-12 * (a + s)
    noise = sigma / alpha
    c_skip, c_out = d**2 / (noise**2 + d**2), noise * d / (noise**2 + d**2).sqrt()
    want, small = (x - c_skip * z.detach() / alpha) / c_out, 1e-6 * (1 + math.exp(logsnr / 2)) / d
    torch.testing.assert_close(F(d).encode(x, eps, alpha, sigma), want, rtol=1e-6, atol=small)
    minus_v = -v.encode(x, eps, alpha, sigma)
    torch.testing.assert_close(F(1.).encode(x, eps, alpha, sigma), minus_v, rtol=1e-9, atol=1e-12)


def test_the_flow_is_the_velocity_of_rectified_flow():
    "dz/dt by autograd"
    s = SCHEDULES['rectified_flow'](-math.inf, math.inf)
    t = torch.tensor([0.1, 0.9], dtype=f64, requires_grad=True)
    x, eps = pair()[:, 0]
    velocity, = torch.autograd.grad((s.alpha(t) * x + s.sigma(t) * eps).sum(), t)
    torch.testing.assert_close(velocity, TARGETS['flow']().encode(x, eps, None, None))


@few
@given(shapes, seeds, level, schedules, st.floats(0.01, 100), st.floats(0.01, 100))
def test_F_of_any_data_is_determined_by_and_determines_every_target(shape, seed, logsnr, schedule, of, other):
    "σ_d included: F of one σ_d is not F of another"
    x, eps, z, alpha, sigma = scene(shape, seed, [logsnr], schedule)
    a = F(of)
    y = a.encode(x, eps, alpha, sigma)
    assert convert(y, a, F(of), z, alpha, sigma) is y
    allowed = 1e-9 * math.exp(abs(logsnr) / 2) * max(of, 1 / of, other, 1 / other)**2
    for target in (*(cls() for cls in TARGETS.values()), F(other)):
        truth = target.encode(x, eps, alpha, sigma)
        there = convert(y, a, target, z, alpha, sigma) - truth
        back = convert(truth, target, a, z, alpha, sigma) - y
        assert (torch.stack([there, back]).abs() <= allowed * (1 + truth.abs().max())).all(), target


# ---- the ends: at α = 0, z is the noise itself; at σ = 0, z is the data itself

UNDETERMINED = {
    'alpha': {('eps', 'x'), ('eps', 'v'), ('eps', 'F'), ('eps', 'flow'),
              ('score', 'x'), ('score', 'v'), ('score', 'F'), ('score', 'flow')},
    'sigma': {('x', 'eps'), ('x', 'v'), ('x', 'F'), ('x', 'flow'), ('score', 'eps'), ('score', 'v'),
              ('score', 'F'), ('score', 'flow'), *((y, 'score') for y in ('x', 'eps', 'v', 'F', 'flow'))}}
ENDS = [(*p, zero) for p in itertools.permutations(TARGETS, 2) for zero in UNDETERMINED]
ZEROS = [0, -0., torch.tensor(0.), torch.zeros((), dtype=f64), torch.tensor([[1.], [0.], [1.]])]


@pytest.mark.parametrize('source, target, zero', ENDS)
def test_a_conversion_is_made_where_it_is_determined_and_refused_elsewhere(source, target, zero):
    "zero terminal SNR: ε says nothing about x where α = 0, and a clamp would hide it"
    if (source, target) in UNDETERMINED[zero]:
        for scale in ZEROS:
            scales = dict(alpha=1., sigma=1.) | {zero: scale}
            with pytest.raises(ZeroDivisionError, match=f'{zero} = 0'):
                convert(pair()[0], source, target, pair()[1], **scales)
        return
    (x, eps), (alpha, sigma) = pair(), (0., 2.) if zero == 'alpha' else (2., 0.)
    encoded = lambda name: TARGETS[name]().encode(x, eps, alpha, sigma)
    infinite = (source, zero) == ('score', 'sigma')          # but x is z/α all the same
    known = torch.zeros_like(x) if infinite else encoded(source)
    got = convert(known, source, target, alpha * x + sigma * eps, alpha, sigma)
    torch.testing.assert_close(got, encoded(target))


def test_the_score_of_no_noise_is_refused():
    for sigma in (0., 0, torch.tensor([0.]), torch.tensor([1., 0.])):
        with pytest.raises(ZeroDivisionError, match='sigma = 0'): TARGETS['score']().encode(1., 1., 1., sigma)


def test_nonzero_lets_small_numbers_and_symbols_through():
    for tiny in (sympy.Symbol('a'), 1e-300, -1e-300, torch.tensor(1e-30), torch.full((3, 1), 1e-30)):
        assert nonzero(tiny, 'alpha', 'it') is tiny


# ---- names and options

@pytest.mark.parametrize('bad, kind, text', [
    ('velocity', ValueError, "'velocity'"), ('EPS', ValueError, "Did you mean 'eps'"),
    (None, TypeError, 'None')])
def test_bad_names(bad, kind, text):
    for source, target in ((bad, 'x'), ('x', bad)):
        with pytest.raises(kind, match=text): convert(*pair()[:1], source, target, pair()[1], 1., 1.)


@of_all
def test_every_target_is_complete(name):
    "floats in, floats out; symbols in, symbols out; a name that is its key"
    y = TARGETS[name]()
    assert y.name == name
    numbers, symbols = (0.3, -0.2, 0.8, 0.6), sympy.symbols('x e a s', positive=True)
    for kind, (x, eps, *scales) in ((float, numbers), (sympy.Basic, symbols)):
        value, z = y.encode(x, eps, *scales), scales[0] * x + scales[1] * eps
        for out in (value, y.to_x(value, z, *scales), y.to_eps(value, z, *scales), y.eps_ratio(*scales)):
            assert isinstance(out, (kind, int))


@pytest.mark.parametrize('bad', [0, -1., math.nan, math.inf, '1', True, None], ids=repr)
def test_a_standard_deviation_of_the_data_that_is_none(bad):
    with pytest.raises((TypeError, ValueError), match='^sigma_data must be'): F(bad)
