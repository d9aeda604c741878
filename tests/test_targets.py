"Attempts to break lfdm.targets, every target of the registry alike: conversions, the error ratio, and levels where a scale is zero."
import itertools
import math

import pytest
import sympy
import torch
from hypothesis import given, settings, strategies as st

from lfdm.schedules import SCHEDULES
from lfdm.targets import F, TARGETS, convert, nonzero

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
PAIRS = list(itertools.product(TARGETS, TARGETS))
level = st.floats(-12, 12)
seeds = st.integers(0, 10**6)
shapes = st.sampled_from([(2, 2), (4, 4), (3, 3, 4, 4), (4, 3, 4, 4), (1, 2), (5, 2)])


def scene(shape, seed, levels, schedule, dtype=f64):
    "x, ε, z, α, σ with one level per example"
    g = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, *shape, generator=g, dtype=f64).to(dtype)
    logsnr = torch.tensor([levels[i % len(levels)] for i in range(shape[0])], dtype=dtype).reshape(-1, *[1] * (len(shape) - 1))
    alpha, sigma = SCHEDULES[schedule]().scales(logsnr)
    return x, eps, alpha * x + sigma * eps, alpha, sigma


@pytest.mark.parametrize('schedule', SCHEDULES)
@few
@given(shapes, seeds, st.lists(level, min_size=1, max_size=5))
def test_all_conversions_give_the_truth_from_the_truth(schedule, shape, seed, levels):
    for dtype, tolerance in ((f64, 1e-10), (f32, 1e-3)):
        x, eps, z, alpha, sigma = scene(shape, seed, levels, schedule, dtype)
        truth = {name: TARGETS[name]().encode(x, eps, alpha, sigma) for name in TARGETS}
        for source, target in PAIRS:
            got = convert(truth[source], source, target, z, alpha, sigma)
            assert got.shape == shape and got.dtype == dtype
            allowed = tolerance * (1 + truth[target].abs()).amax(tuple(range(1, len(shape))), keepdim=True)
            assert ((got - truth[target]).abs() <= allowed).all(), (source, target, (got - truth[target]).abs().max())


@few
@given(shapes, seeds, level, st.sampled_from(sorted(SCHEDULES)), st.sampled_from([1e-6, 1., 1e8]))
def test_nothing_is_clamped(shape, seed, logsnr, schedule, size):
    "conversions are linear in the prediction however large it is, and go there and back"
    x, eps, z, alpha, sigma = scene(shape, seed, [logsnr], schedule)
    y = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=f64)
    for source, target in PAIRS:
        f = lambda y: convert(y, source, target, z, alpha, sigma)
        at0, at1, at3 = f(0 * y), f(y), f(3 * y)
        torch.testing.assert_close(at3 - at0, 3 * (at1 - at0), rtol=1e-6, atol=1e-7 * (at0.abs().max().item() + at1.abs().max().item() + 1e-3))
        back = convert(at1, target, source, z, alpha, sigma)
        largest = sum(convert(y, source, t, z, alpha, sigma).abs().max() for t in TARGETS)
        assert (back - y).abs().max() <= 1e-11 * largest * max(1, math.exp(abs(logsnr) / 2))


@pytest.mark.parametrize('name', TARGETS)
@few
@given(shapes, seeds, st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_one_identity(name, shape, seed, alpha, sigma):
    "‖ε - ε̂‖² = r ‖y - ŷ‖² at any scales, variance preserving or not"
    g, y = torch.Generator().manual_seed(seed), TARGETS[name]()
    x, eps, y_hat = torch.randn(3, *shape, generator=g, dtype=f64)
    for wrap in (float, lambda a: torch.tensor(a, dtype=f64)):
        a, s = wrap(alpha), wrap(sigma)
        left = (eps - y.to_eps(y_hat, a * x + s * eps, a, s)).square().mean()
        right = y.eps_ratio(a, s) * (y.encode(x, eps, a, s) - y_hat).square().mean()
        torch.testing.assert_close(left, right if torch.is_tensor(right) else torch.tensor(right, dtype=f64), rtol=1e-8, atol=1e-12)


RATIOS = dict(x=lambda snr, s: snr, eps=lambda snr, s: 1., v=lambda snr, s: snr / (snr + 1), score=lambda snr, s: s**2,
              F=lambda snr, s: 1 / (1 + 4 / snr), flow=lambda snr, s: 1 / (1 + snr**-0.5)**2)


@pytest.mark.parametrize('name', [n for n in RATIOS if n in TARGETS])
@few
@given(level, st.sampled_from(sorted(SCHEDULES)))
def test_the_ratio_is_the_documented_one(name, logsnr, schedule):
    "SNR/(SNR + 1) for v, and nothing without the + 1"
    alpha, sigma = SCHEDULES[schedule]().scales(torch.tensor([logsnr], dtype=f64))
    got = TARGETS[name]().eps_ratio(alpha, sigma)
    torch.testing.assert_close(got, torch.full((1,), RATIOS[name](math.exp(logsnr), sigma.item()), dtype=f64))
    assert got.shape == (1,) and got.dtype == f64


@few
@given(seeds, level, st.sampled_from(sorted(SCHEDULES)))
def test_targets_are_what_their_names_say(seed, logsnr, schedule):
    "the score by autograd of log q(z given x); v has unit variance at every pair of scales and is orthogonal to z"
    x, eps, z, alpha, sigma = scene((4, 2), seed, [logsnr], schedule)
    z.requires_grad_()
    log_q = torch.distributions.Normal(alpha * x, sigma.expand_as(x)).log_prob(z)
    score, = torch.autograd.grad(log_q.sum(), z)
    torch.testing.assert_close(TARGETS['score']().encode(x, eps, alpha, sigma), score, rtol=1e-7, atol=1e-9)
    a, s = alpha[0].item(), sigma[0].item()
    v = TARGETS['v']()
    on_x, on_eps = v.encode(1., 0., a, s), v.encode(0., 1., a, s)
    assert abs(on_x**2 + on_eps**2 - 1) < 1e-12 and abs(on_x * a + on_eps * s) < 1e-12 * (a + s)


# what is known at the ends: at α = 0, z is the noise itself; at σ = 0, z is the data itself
UNDETERMINED = {'alpha': {('eps', 'x'), ('eps', 'v'), ('score', 'x'), ('score', 'v')},
                'sigma': {('x', 'eps'), ('x', 'v'), ('x', 'score'), ('eps', 'score'), ('v', 'score'), ('score', 'eps'), ('score', 'v')}}
FOUR = ('x', 'eps', 'v', 'score')
END_PAIRS = [(source, target, zero) for source, target in itertools.permutations(FOUR, 2) for zero in UNDETERMINED]


@pytest.mark.parametrize('source, target, zero', [p for p in END_PAIRS if p[:2] in UNDETERMINED[p[2]]])
def test_a_conversion_that_cannot_be_made_is_refused(source, target, zero):
    "zero terminal SNR: ε says nothing about x where α = 0, and a clamp would hide it"
    z = torch.randn(3, 2)
    for zero_scale in (0, 0., -0., torch.tensor(0.), torch.zeros(3, 1), torch.tensor([[1.], [0.], [1.]]), torch.zeros((), dtype=f64)):
        scales = dict(alpha=1., sigma=1.) | {zero: zero_scale}
        with pytest.raises(ZeroDivisionError, match=f'{zero} = 0'): convert(torch.randn(3, 2), source, target, z, **scales)


@pytest.mark.parametrize('source, target, zero', [p for p in END_PAIRS if p[:2] not in UNDETERMINED[p[2]]])
def test_a_conversion_that_can_be_made_is_made(source, target, zero):
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, 2, generator=g, dtype=f64)
    alpha, sigma = (0., 2.) if zero == 'alpha' else (2., 0.)
    truth = {n: TARGETS[n]().encode(x, eps, alpha, sigma) for n in FOUR if (n, zero) != ('score', 'sigma')}
    known = truth.get(source, torch.zeros_like(x))          # the score is infinite at σ = 0, but x stays z/α
    torch.testing.assert_close(convert(known, source, target, alpha * x + sigma * eps, alpha, sigma), truth[target])


def test_the_score_of_no_noise_is_refused():
    for sigma in (0., 0, torch.tensor([0.]), torch.tensor([1., 0.])):
        with pytest.raises(ZeroDivisionError, match='sigma = 0'): TARGETS['score']().encode(1., 1., 1., sigma)


def test_nonzero_lets_small_numbers_and_symbols_through():
    a = sympy.Symbol('a')
    assert nonzero(a, 'alpha', 'it') is a
    for tiny in (1e-300, -1e-300, torch.tensor(1e-30), torch.full((3, 1), 1e-30)): assert nonzero(tiny, 'alpha', 'it') is tiny


@pytest.mark.parametrize('bad, kind, text', [('velocity', ValueError, "'velocity'"), ('EPS', ValueError, "Did you mean 'eps'"), (None, TypeError, 'None'), (3, TypeError, '3')])
def test_bad_names(bad, kind, text):
    for source, target in ((bad, 'x'), ('x', bad)):
        with pytest.raises(kind, match=text): convert(torch.zeros(2, 2), source, target, torch.zeros(2, 2), 1., 1.)


@pytest.mark.parametrize('name', TARGETS)
def test_every_target_is_complete(name):
    "floats in, floats out; symbols in, symbols out; a name that is its key"
    y, symbols = TARGETS[name](), sympy.symbols('x e a s', positive=True)
    assert y.name == name and type(y).__name__ in repr(y)
    for args in ((0.3, -0.2, 0.8, 0.6), symbols):
        kind = float if args is not symbols else sympy.Basic
        value = y.encode(*args)
        z = args[2] * args[0] + args[3] * args[1]
        for out in (value, y.to_x(value, z, *args[2:]), y.to_eps(value, z, *args[2:]), y.eps_ratio(*args[2:])): assert isinstance(out, (kind, int))


# ---- F and the flow

@few
@given(shapes, seeds, level, st.sampled_from(sorted(SCHEDULES)), st.floats(0.01, 100), st.floats(0.01, 100))
def test_F_of_any_data_is_determined_by_and_determines_every_target(shape, seed, logsnr, schedule, of, other):
    "σ_d included: F of one σ_d is not F of another"
    x, eps, z, alpha, sigma = scene(shape, seed, [logsnr], schedule)
    a, b = F(of), F(other)
    y = a.encode(x, eps, alpha, sigma)
    assert convert(y, a, F(of), z, alpha, sigma) is y
    allowed = 1e-9 * math.exp(abs(logsnr) / 2) * max(of, 1 / of, other, 1 / other)**2
    for target in (*TARGETS, b):
        truth = target.encode(x, eps, alpha, sigma) if target is b else TARGETS[target]().encode(x, eps, alpha, sigma)
        for got in (convert(y, a, target, z, alpha, sigma) - truth, convert(truth, target, a, z, alpha, sigma) - y): assert (got.abs() <= allowed * (1 + truth.abs().max())).all(), target


@few
@given(shapes, seeds, level, st.sampled_from(sorted(SCHEDULES)), st.floats(0.05, 20))
def test_F_is_what_EDM_says(shape, seed, logsnr, schedule, d):
    "D = c_skip z̃ + c_out F with z̃ = z/α and σ̃ = σ/α, Karras et al. table 1, by hand; F(1) is -v, whatever the scales"
    x, eps, z, alpha, sigma = scene(shape, seed, [logsnr], schedule)
    noise = sigma / alpha
    c_skip, c_out = d**2 / (noise**2 + d**2), noise * d / (noise**2 + d**2).sqrt()
    torch.testing.assert_close(F(d).encode(x, eps, alpha, sigma), (x - c_skip * z / alpha) / c_out, rtol=1e-6, atol=1e-6 * (1 + math.exp(logsnr / 2)) / d)
    torch.testing.assert_close(F(1.).encode(x, eps, alpha, sigma), -TARGETS['v']().encode(x, eps, alpha, sigma), rtol=1e-9, atol=1e-12)


def test_the_flow_is_the_velocity_of_rectified_flow():
    "dz/dt by autograd"
    s, t = SCHEDULES['rectified_flow'](-math.inf, math.inf), torch.tensor([0.1, 0.5, 0.9], dtype=f64, requires_grad=True)
    x, eps = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=f64)
    velocity, = torch.autograd.grad((s.alpha(t) * x + s.sigma(t) * eps).sum(), t)
    torch.testing.assert_close(velocity, TARGETS['flow']().encode(x, eps, None, None))


def test_F_and_flow_at_the_ends():
    "both are defined at every pair of scales: no ZeroDivisionError from them, and none hidden towards the score"
    x, eps = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=f64)
    for name, (alpha, sigma) in itertools.product(('F', 'flow'), ((0., 2.), (2., 0.))):
        y, z = TARGETS[name]().encode(x, eps, alpha, sigma), alpha * x + sigma * eps
        for other in ('F', 'flow', 'v'):
            # at α = 0 F is x and z is ε, at σ = 0 F is ε and z is x: together they tell everything
            torch.testing.assert_close(convert(y, name, other, z, alpha, sigma), TARGETS[other]().encode(x, eps, alpha, sigma))
        if sigma == 0:
            with pytest.raises(ZeroDivisionError, match='sigma = 0'): convert(y, name, 'score', z, alpha, sigma)


@pytest.mark.parametrize('bad', [0, -1., math.nan, math.inf, '1', True, None], ids=repr)
def test_a_standard_deviation_of_the_data_that_is_none(bad):
    with pytest.raises((TypeError, ValueError), match='^sigma_data must be'): F(bad)
