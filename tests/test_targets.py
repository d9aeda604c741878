"Attempts to break lfdm.targets, all targets alike: conversions, the error ratio, zero scales."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS, F, convert

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
levels, seeds, sizes = st.floats(-12, 12), st.integers(0, 10**6), st.floats(0.01, 100)
schedules = st.sampled_from(sorted(SCHEDULES))
shapes = st.sampled_from([(2, 2), (4, 4), (3, 3, 4, 4), (1, 2), (5, 2)])


def randn(many, shape, seed):
    return torch.randn(many, *shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def scene(shape, seed, levels, schedule, dtype=f64):
    "x, ε, z, α, σ with one level per example"
    x, eps = randn(2, shape, seed).to(dtype)
    logsnr = torch.tensor([levels[i % len(levels)] for i in range(shape[0])], dtype=dtype)
    alpha, sigma = SCHEDULES[schedule]().scales(logsnr.reshape(-1, *[1] * (len(shape) - 1)))
    return x, eps, alpha * x + sigma * eps, alpha, sigma


@settings(few, max_examples=25)
@given(shapes, seeds, st.lists(levels, min_size=1, max_size=5), schedules, st.floats(0.05, 20))
def test_all_conversions_give_the_truth_from_the_truth(shape, seed, levels, schedule, other):
    "σ_d included: F of one σ_d is not F of another"
    targets = [*(cls() for cls in TARGETS.values()), F(other)]
    for dtype, tolerance in ((f64, 1e-9), (f32, 1e-2)):
        x, eps, z, alpha, sigma = scene(shape, seed, levels, schedule, dtype)
        truth = [target.encode(x, eps, alpha, sigma) for target in targets]
        for (source, y), (target, want) in itertools.product(zip(targets, truth), repeat=2):
            got = convert(y, source, target, z, alpha, sigma)
            assert got.shape == shape and got.dtype == dtype and (got is y) == (repr(source) == repr(target))
            allowed = tolerance * (1 + want.abs()).flatten(1).amax(1)
            assert ((got - want).abs().flatten(1).amax(1) <= allowed).all(), (source, target)


@few
@given(shapes, seeds, levels, schedules)
def test_nothing_is_clamped(shape, seed, logsnr, schedule):
    "a prediction far from the truth goes there and back"
    x, eps, *at = scene(shape, seed, [logsnr], schedule)
    y = 1e8 * randn(1, shape, seed + 1)[0]
    for source in TARGETS:
        there = {target: convert(y, source, target, *at) for target in TARGETS}
        near = 1e-11 * sum(q.abs().max() for q in there.values()) * max(1, math.exp(abs(logsnr) / 2))
        for target, q in there.items(): assert (convert(q, target, source, *at) - y).abs().max() <= near


@pytest.mark.parametrize('name', TARGETS)
@few
@given(shapes, seeds, sizes, sizes)
def test_the_one_identity(name, shape, seed, alpha, sigma):
    "‖ε - ε̂‖² = r ‖y - ŷ‖² at any scales"
    y, (x, eps, y_hat) = TARGETS[name](), randn(3, shape, seed)
    for a, s in ((alpha, sigma), torch.tensor([alpha, sigma], dtype=f64)):
        left = (eps - y.to_eps(y_hat, a * x + s * eps, a, s)).square().mean()
        right = y.eps_ratio(a, s) * (y.encode(x, eps, a, s) - y_hat).square().mean()
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-12)


# ---- the ends: at α = 0, z is the noise itself; at σ = 0, z is the data itself

UNDETERMINED = {
    'alpha': {*itertools.product(('eps', 'score'), ('x', 'v', 'F', 'flow'))},
    'sigma': {*itertools.product(('x', 'score'), ('eps', 'v', 'F', 'flow')),
              *((y, 'score') for y in ('x', 'eps', 'v', 'F', 'flow'))}}
ZEROS = 0, -0., torch.tensor(0.), torch.tensor([[1.], [0.], [1.]])


@pytest.mark.parametrize('zero', UNDETERMINED)
def test_a_conversion_is_made_where_it_is_determined_and_refused_elsewhere(zero):
    "ε says nothing about x where α = 0, and a clamp would hide it"
    x, eps = randn(2, (3, 2), 0)
    alpha, sigma = (0., 2.) if zero == 'alpha' else (2., 0.)
    encoded = lambda name: TARGETS[name]().encode(x, eps, alpha, sigma)
    for source, target in itertools.permutations(TARGETS, 2):
        if (source, target) in UNDETERMINED[zero]:
            for scale in ZEROS:
                with pytest.raises(ZeroDivisionError, match=f'{zero} = 0'):
                    convert(x, source, target, eps, **dict(alpha=1., sigma=1.) | {zero: scale})
            continue
        infinite = (source, zero) == ('score', 'sigma')          # but x is z/α all the same
        known = torch.zeros_like(x) if infinite else encoded(source)
        got = convert(known, source, target, alpha * x + sigma * eps, alpha, sigma)
        torch.testing.assert_close(got, encoded(target))
    for tiny in (1e-300, torch.full((3, 1), 1e-30)): convert(x, 'x', 'score', eps, tiny, tiny)


# ---- shapes

def test_scales_of_each_example_multiply_examples():
    "also where n is the number of dimensions; of 16 bits the result has 32"
    (x, eps), logsnr = randn(2, (3, 3), 1), torch.tensor([-2., 0., 3.], dtype=f64)
    alpha, sigma = SCHEDULES['cosine']().scales(logsnr)
    columns = alpha[:, None], sigma[:, None]
    z = columns[0] * x + columns[1] * eps
    for pair in itertools.permutations(TARGETS, 2):
        of = lambda y, *rest, pair=pair: convert(y, *pair, *rest)
        torch.testing.assert_close(of(x, z, alpha, sigma), of(x, z, *columns))
        half = [q.bfloat16() for q in (x, z, alpha, sigma)]
        assert of(*half).dtype == f32 and torch.equal(of(*half), of(*(q.float() for q in half)))


@pytest.mark.parametrize('bad, says', [
    (dict(alpha=torch.ones(2)), 'alpha must be one number for all, or one for each of 3 examples'),
    (dict(sigma=torch.ones(3, 2)), 'sigma must be one number'), (dict(z=torch.ones(3, 1)), 'y_hat.s shape')])
def test_what_does_not_fit_is_named(bad, says):
    good = dict(y_hat=torch.ones(3, 2), z=torch.ones(3, 2), alpha=torch.ones(3), sigma=torch.ones(3))
    for source, target in itertools.permutations(TARGETS, 2):
        with pytest.raises(ValueError, match=says): convert(source=source, target=target, **good | bad)
    with pytest.raises(ValueError, match='sigma_data must be'): F(-1.)
