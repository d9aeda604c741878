"Attempts to break lfdm.evaluation: floors against closed forms, distances against what a distance has to be."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson

from lfdm.data import DATASETS, GaussianMixture
from lfdm.evaluation import DISTANCES, floor, judge, noise_floor, sliced_wasserstein
from lfdm.losses import DiffusionLoss
from lfdm.schedules import SCHEDULES, CosineSchedule, VESchedule
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f64 = torch.float64
ONE = GaussianMixture([[0., 0.]], 1.)   # one Gaussian: mmse = 1/(1 + e^λ), and everything has a closed form
CLUSTER = DATASETS['cluster']()


def softplus(l): return max(l, 0.) + math.log1p(math.exp(-abs(l)))


# ---- floors

@pytest.mark.parametrize('low, high', [(-170., 170.), (85., 95.), (.3, .4)])
def test_the_nelbo_floor_of_a_gaussian(low, high):
    "log((1 + e^λmax)/(1 + e^λmin)), to the ends of a wide range"
    loss = DiffusionLoss(VESchedule(low, high), 'eps', 'nelbo')
    assert abs(floor(loss, ONE) - (softplus(high) - softplus(low))) < 1e-3


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_floor_of_a_gaussian_against_the_integral_over_times(schedule):
    "E_t[factor · error of the best linear prediction], the errors by hand; a mean over levels if discrete"
    s = SCHEDULES[schedule]()
    if s.steps: t = torch.arange(1, s.steps + 1, dtype=f64) / s.steps
    else: t = s.t(torch.linspace(s.logsnr_max, s.logsnr_min, 5001, dtype=f64))
    level = s.level(t)
    best = level.logsnr.sigmoid()       # E(ε - E[ε|z])²
    for target, weighting in itertools.product(TARGETS, WEIGHTINGS):
        if s.learned and not issubclass(WEIGHTINGS[weighting], LogSNRWeighting): continue
        loss = DiffusionLoss(s, target, weighting)
        integrand = loss.factor(t) * best / loss.target.eps_ratio(level.alpha, level.sigma)
        if loss.weighting.learned: integrand = 1 + integrand.log()
        value = integrand.mean() if s.steps else simpson(integrand.numpy(), x=t.numpy())
        near = 1e-4 * max(abs(value), loss.weighting.learned)   # a logarithm may be near 0
        assert abs(floor(loss, ONE) - value) < near, (target, weighting)


UNCUT = CosineSchedule(-math.inf, math.inf)
DDPM = SCHEDULES['ddpm'](logsnr_max=math.inf)


@pytest.mark.parametrize('schedule, target, weighting, want', [
    *((UNCUT, y, 'weighted', w) for y, w in (('x', 0.5), ('eps', 0.5), ('v', 1.))),   # by symmetry
    *((UNCUT, y, 'rescaled', 0.5) for y in TARGETS),
    (UNCUT, 'eps', 'nelbo', math.inf), (UNCUT, 'score', 'weighted', math.inf),
    (DDPM, 'eps', 'nelbo', math.inf)])
def test_floors_over_all_levels(schedule, target, weighting, want):
    "known ones, and those that grow without bound with λ_max: 80 is the edge of a table, not a floor"
    assert floor(DiffusionLoss(schedule, target, weighting), ONE) == pytest.approx(want, abs=1e-8)
    assert floor(DiffusionLoss(DDPM, 'eps', 'ddpm_vlb'), ONE) < math.inf


def test_what_a_schedule_has_learned_does_not_move_the_floor():
    loss = DiffusionLoss('adaptive', 'F', 'edm')
    before = floor(loss, CLUSTER)
    loss(lambda z, u: torch.zeros_like(z), CLUSTER.sample(2000))
    assert loss.schedule.state()['history'].isfinite().any() and floor(loss, CLUSTER) == pytest.approx(before)


# ---- distances

every = pytest.mark.parametrize('d', DISTANCES.values(), ids=DISTANCES)
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
sizes = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(0, 10**6))


def two_sets(n, m, dim, seed):
    g = torch.Generator().manual_seed(seed)
    return [scale * (1 + 2 * torch.randn(k, dim, generator=g, dtype=f64)) for k, scale in ((n, .5), (m, 1.))]


@every
@few
@given(sizes)
def test_what_a_distance_has_to_be(d, size):
    "zero on any order of itself, symmetric, of the data's unit, the triangle inequality, at any sizes"
    n, m, dim, seed = size
    x, y = two_sets(n, m, dim, seed)
    z, unit = two_sets(n, m, dim, seed + 1)[0], 9 if 'covariance' in d.__name__ else 3
    same = lambda a, b, rel_tol=1e-9: math.isclose(a, b, rel_tol=rel_tol, abs_tol=1e-9)
    assert d(x, x.flip(0)) < 1e-12 and isinstance(d(x, y), float) and d(x, y) >= 0
    assert same(d(x, y), d(y, x)) and same(d(x, y), d(7 - x, 7 - y)) and same(unit * d(x, y), d(3 * x, 3 * y))
    assert d(x, z) <= d(x, y) + d(y, z) + 1e-12
    x, y = x.float() + 1000, y.float() + 1000   # single precision is enough
    assert same(d(x, y), d(x.double(), y.double()))


@few
@given(sizes)
def test_sliced_wasserstein_in_one_dimension_is_wasserstein(size):
    "copied to equal sizes, it is the distance of the sorted samples"
    n, m, _, seed = size
    x, y = two_sets(n, m, 1, seed)
    gap = x.repeat(m, 1).sort(0).values - y.repeat(n, 1).sort(0).values
    assert math.isclose(sliced_wasserstein(x, y), gap.square().mean().sqrt(), rel_tol=1e-9)


@pytest.mark.parametrize('dim', [1, 8])
def test_a_shift_costs_its_length_over_the_root_of_the_dimension(dim):
    x, shift = two_sets(50, 50, dim, 0)[0], 2 * torch.eye(dim, dtype=f64)[0]
    assert abs(sliced_wasserstein(x, x + shift, 4096) - 2 / dim**0.5) < (1e-9 if dim == 1 else 0.06)


@every
@pytest.mark.parametrize('x, y', [((5, 2), (5, 1)), ((5,), (5,)), ((5, 3, 4), (5, 3, 4)), ((0, 2), (5, 2))])
def test_sets_that_cannot_be_compared_are_refused(d, x, y):
    "(n, 2) against (m, 1) would broadcast to a number"
    for a, b in itertools.permutations((x, y)):
        with pytest.raises(ValueError, match='samples'): d(torch.ones(a), torch.ones(b))
    with pytest.raises(ValueError, match='y must be finite'): d(torch.ones(5, 2), torch.ones(5, 2) / 0)
    with pytest.raises(ValueError, match='at least 2 of each'):
        DISTANCES['covariance_distance'](torch.ones(1, 2), torch.ones(5, 2))


# ---- noise floors and judgements

@every
def test_noise_floors_are_reproducible_and_shrink(d):
    noise, before = lambda *n, **how: noise_floor(d, CLUSTER, *n, repeats=10, **how), torch.get_rng_state()
    mean, sd = noise(200)
    assert (mean, sd) == noise(200, 200) != noise(200, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    big, uneven = noise(1800)[0], noise(200, 1800)[0]
    assert 1.8 < mean / big < 5 and big < uneven < mean   # 1/√n: 3
    with pytest.raises(ValueError, match='repeats'): noise_floor(d, CLUSTER, 9, repeats=1)


def test_a_judgement_tells_data_from_no_data():
    samples = CLUSTER.sample(800, seed=7)
    good, bad = judge(samples, CLUSTER), judge(samples * 1.3 + 0.3, CLUSTER)
    for name, d in DISTANCES.items():
        noise, sd = noise_floor(d, CLUSTER, 800)
        for report in (good, bad): assert (report[name]['noise'], report[name]['noise_sd']) == (noise, sd)
        assert good[name]['value'] < noise + 4 * sd and bad[name]['value'] > noise + 6 * sd
    for wrong in (samples / 0, samples[:1], samples[:, :1]):
        with pytest.raises(ValueError, match='samples must'): judge(wrong, CLUSTER)


def test_too_few_points_for_an_integral_are_refused():
    with pytest.raises(ValueError, match='points must be from 201'):
        floor(DiffusionLoss(), CLUSTER, points=200)
    loss = DiffusionLoss()
    assert floor(loss, CLUSTER, points=201) == pytest.approx(floor(loss, CLUSTER), rel=1e-3)
