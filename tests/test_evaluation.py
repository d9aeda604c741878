"Attempts to break lfdm.evaluation: floors against closed forms, distances against what a distance has to be."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson
from scipy.stats import wasserstein_distance

from lfdm.data import DATASETS, GaussianMixture
from lfdm.evaluation import (
    DISTANCES,
    floor,
    floor_per_logsnr,
    judge,
    noise_floor,
    sliced_wasserstein,
    unit_vectors,
)
from lfdm.losses import DiffusionLoss
from lfdm.schedules import CONTINUOUS, SCHEDULES, CosineSchedule, VESchedule
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f64 = torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ONE = GaussianMixture([[0., 0.]], 1.)   # one Gaussian: mmse = 1/(1 + e^λ), and everything has a closed form
CLUSTER = DATASETS['cluster']()


def softplus(l): return max(l, 0.) + math.log1p(math.exp(-abs(l)))


# ---- floors

@pytest.mark.parametrize('schedule', (*CONTINUOUS, 'adaptive'))
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(u=st.floats(0, 1), v=st.floats(0, 1), target=st.sampled_from(list(TARGETS)))
def test_the_nelbo_floor_of_a_gaussian(schedule, target, u, v):
    "log((1 + e^λmax)/(1 + e^λmin)), whatever the schedule and the target"
    s = SCHEDULES[schedule]()
    low, high = (max(-30., min(30., l)) for l in s.reach())
    if hasattr(s, 'std'):   # a bell has no float32 slope far from its mean
        low, high = max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)
    a, b = sorted(low + (high - low) * w for w in (u, v))
    if b - a < 1e-3: return
    loss = DiffusionLoss(SCHEDULES[schedule](logsnr_min=a, logsnr_max=b), target, 'nelbo')
    assert abs(floor(loss, ONE) - (softplus(b) - softplus(a))) < 1e-6


@pytest.mark.parametrize('low, high', [(-12., 100.), (-200., 200.), (85., 95.), (-100., 5.)])
def test_a_wide_range_is_integrated_to_its_ends(low, high):
    loss = DiffusionLoss(VESchedule(low, high), 'eps', 'nelbo')
    assert abs(floor(loss, ONE) - (softplus(high) - softplus(low))) < 1e-3


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_floor_of_a_gaussian_against_the_integral_over_times(schedule):
    "E_t[factor · error of the best linear prediction], the errors by hand; a mean over levels if discrete"
    s = SCHEDULES[schedule]()
    if s.steps: t = torch.arange(1, s.steps + 1, dtype=f64) / s.steps
    else: t = s.t(torch.linspace(s.logsnr_max, s.logsnr_min, 20_001, dtype=f64))
    level = s.level(t)
    best = level.logsnr.exp() / (1 + level.logsnr.exp())       # E(ε - E[ε|z])²
    for target, weighting in itertools.product(TARGETS, WEIGHTINGS):
        if s.learned and not issubclass(WEIGHTINGS[weighting], LogSNRWeighting): continue
        loss = DiffusionLoss(s, target, weighting)
        integrand = loss.factor(t) * best / loss.target.eps_ratio(level.alpha, level.sigma)
        value = integrand.mean() if s.steps else simpson(integrand.numpy(), x=t.numpy())
        assert abs(floor(loss, ONE) / value - 1) < 1e-4, (target, weighting)


def test_a_coarse_chain_has_a_higher_floor_and_a_fine_one_the_integral():
    "the T-step NELBO of a Gaussian: Σ expm1(Δ_i) · mmse of ε at λ_i, which falls to the integral as T grows"
    cosine, floors = CosineSchedule(-6, 6), []
    for T in (1, 4, 32, 256, 2048):
        l = cosine.logsnr(torch.arange(T + 1, dtype=f64) / T).tolist()
        by_hand = sum(math.expm1(a - b) / (1 + math.exp(-b)) for a, b in zip(l, l[1:]))
        floors.append(floor(DiffusionLoss(SCHEDULES['discrete'](-6, 6, T=T), 'v', 'nelbo'), ONE))
        assert abs(floors[-1] / by_hand - 1) < 1e-9
    exact = floor(DiffusionLoss(cosine, 'eps', 'nelbo'), ONE)
    assert floors == sorted(floors, reverse=True) and exact < floors[-1] < 1.01 * exact


UNCUT = CosineSchedule(-math.inf, math.inf)
DDPM = SCHEDULES['ddpm'](logsnr_max=math.inf)


@pytest.mark.parametrize('schedule, target, weighting, want', [
    *((UNCUT, y, 'weighted', w) for y, w in (('x', 0.5), ('eps', 0.5), ('v', 1.))),   # by symmetry
    *((UNCUT, y, 'rescaled', 0.5) for y in TARGETS),
    (UNCUT, 'eps', 'nelbo', math.inf), (UNCUT, 'x', 'nelbo', math.inf),
    (UNCUT, 'score', 'weighted', math.inf),
    (DDPM, 'eps', 'nelbo', math.inf)])
def test_floors_over_all_levels(schedule, target, weighting, want):
    "known ones, and those that grow without bound with λ_max: 80 is the edge of a table, not a floor"
    assert floor(DiffusionLoss(schedule, target, weighting), ONE) == pytest.approx(want, abs=1e-8)


def test_the_variational_bound_of_ddpm_is_finite():
    assert floor(DiffusionLoss(DDPM, 'eps', 'ddpm_vlb'), ONE) < math.inf


def test_what_a_schedule_has_learned_does_not_move_the_floor():
    "L = ∫ w L′ dλ, whatever p"
    loss = DiffusionLoss('adaptive', 'F', 'edm')
    before = floor(loss, CLUSTER)
    loss(lambda z, u: torch.zeros_like(z), CLUSTER.sample(2000))
    assert loss.schedule.state()['history'].isfinite().any()
    assert abs(floor(loss, CLUSTER) / before - 1) < 1e-9


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_all_targets_share_one_floor_but_weighted(weighting):
    values = torch.tensor([floor(DiffusionLoss('cosine', y, weighting), CLUSTER) for y in TARGETS])
    assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-6) == (weighting != 'weighted')


def test_floor_per_logsnr_takes_numbers_and_integrates_to_the_floor():
    loss, l = DiffusionLoss(), torch.linspace(-12.9 + 1e-9, 12.9 - 1e-9, 20_001, dtype=f64)
    density = floor_per_logsnr(loss, CLUSTER, l)
    assert abs(torch.trapezoid(density, l) - floor(loss, CLUSTER)) < 1e-6
    assert floor_per_logsnr(loss, CLUSTER, l[7].item()) == density[7]


# ---- distances

every = pytest.mark.parametrize('d', DISTANCES.values(), ids=DISTANCES)
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
    z = two_sets(n, m, dim, seed + 1)[0]
    same = lambda a, b: math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    assert d(x, x) == 0 and d(x, x.flip(0)) < 1e-12 and isinstance(d(x, y), float) and d(x, y) >= 0
    power = 2 if 'covariance' in d.__name__ else 1
    assert same(d(x, y), d(y, x)) and same(d(x, y), d(-x, -y)) and same(3**power * d(x, y), d(3 * x, 3 * y))
    assert same(d(x, y), d(x + 7, y + 7)) and d(x, z) <= d(x, y) + d(y, z) + 1e-12


@every
def test_turning_both_sets_changes_nothing(d):
    "by a multiple of the angle between directions, which maps them onto themselves, and by any other"
    x, y = two_sets(300, 200, 2, 0)
    for angle, tolerance in ((math.pi * 5 / 128, 1e-9), (0.927, 1e-4)):
        c, s = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[c, s], [-s, c]], dtype=f64)
        assert math.isclose(d(x @ turn, y @ turn), d(x, y), rel_tol=tolerance)


@every
def test_single_precision_is_enough_and_nan_does_not_look_good(d):
    x, y = (s.float() + 1000 for s in two_sets(500, 400, 2, 1))
    assert math.isclose(d(x, y), d(x.double(), y.double()), rel_tol=1e-3)
    x[3, 1] = math.nan
    assert math.isnan(d(x, y))


@few
@given(sizes)
def test_sliced_wasserstein_in_one_dimension_is_wasserstein(size):
    "at equal sizes W2 is the distance of the sorted samples, and at least scipy's W1; copies change nothing"
    n, m, _, seed = size
    x, y = two_sets(n, m, 1, seed)
    other = two_sets(n, n, 1, seed)[1]
    got, gap = sliced_wasserstein(x, other), x.sort(0).values - other.sort(0).values
    assert math.isclose(got, gap.square().mean().sqrt(), rel_tol=1e-12)
    assert got >= wasserstein_distance(x[:, 0], other[:, 0]) - 1e-12
    copies = sliced_wasserstein(x.repeat(m, 1), y.repeat(n, 1))
    assert math.isclose(copies, sliced_wasserstein(x, y), rel_tol=1e-9)


@pytest.mark.parametrize('dim', [1, 2, 3, 8])
def test_a_shift_costs_its_length_over_the_root_of_the_dimension(dim):
    x, shift = two_sets(200, 200, dim, 0)[0], 2 * torch.eye(dim, dtype=f64)[0]
    got = sliced_wasserstein(x, x + shift, projections=4096)
    assert abs(got - 2 / dim**0.5) < (1e-9 if dim <= 2 else 0.06)
    v = unit_vectors(dim, 64)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(64, dtype=f64))
    assert v.shape == (64, dim) and torch.equal(v, unit_vectors(dim, 64))


@every
@pytest.mark.parametrize('x, y', [((5, 2), (5, 1)), ((5, 2), (5, 3)), ((5,), (5,)), ((5, 3, 4), (5, 3, 4)),
                                  ((5, 2), (2,)), ((0, 2), (5, 2))], ids=str)
def test_sets_that_cannot_be_compared_are_refused(d, x, y):
    "(n, 2) against (m, 1) would broadcast to a number"
    for a, b in ((x, y), (y, x)):
        with pytest.raises(ValueError, match='samples'): d(torch.ones(a), torch.ones(b))


# ---- noise floors and judgements

@every
def test_noise_floors_are_reproducible_and_shrink(d):
    noise = lambda *n, **options: noise_floor(d, CLUSTER, *n, repeats=10, **options)
    before = torch.get_rng_state()
    mean, sd = noise(200)
    assert (mean, sd) == noise(200, 200) != noise(200, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    big, uneven = noise(3200)[0], noise(200, 3200)[0]
    assert 2 < mean / big < 8 and big < uneven < mean   # 1/√n: 4


@pytest.mark.parametrize('bad', [dict(n=0), dict(n='100'), dict(n=10, m=0), dict(n=10, m=2.5),
                                 dict(n=10, repeats=1), dict(n=10, repeats='3')], ids=str)
def test_noise_floors_of_nothing_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match=[*bad][-1]):
        noise_floor(sliced_wasserstein, CLUSTER, **bad)


def test_a_judgement_tells_data_from_no_data():
    samples = CLUSTER.sample(800, seed=7)
    good, bad = judge(samples, CLUSTER), judge(samples * 1.3 + 0.3, CLUSTER)
    assert good.keys() == bad.keys() == DISTANCES.keys()
    for name, d in DISTANCES.items():
        noise, sd = noise_floor(d, CLUSTER, 800)
        for report in (good, bad): assert (report[name]['noise'], report[name]['noise_sd']) == (noise, sd)
        assert good[name]['value'] < noise + 4 * sd and bad[name]['value'] > noise + 6 * sd
