"Attempts to break lfdm.evaluation: floors against closed forms and Monte Carlo, distances against what a distance has to be."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson
from scipy.stats import wasserstein_distance

from lfdm.data import DATASETS, Dataset, GaussianMixture, NoDensity
from lfdm.evaluation import DISTANCES, floor, floor_per_logsnr, judge, noise_floor, sliced_wasserstein, unit_vectors
from lfdm.losses import DiffusionLoss
from lfdm.schedules import CONTINUOUS, SCHEDULES, CosineSchedule, VESchedule
from lfdm.targets import TARGETS
from lfdm.validation import ValidationSet
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f64 = torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
def pairs(schedule): return [(y, w) for y, w in itertools.product(TARGETS, WEIGHTINGS) if not SCHEDULES[schedule].learned or issubclass(WEIGHTINGS[w], LogSNRWeighting)]
ONE = GaussianMixture([[0., 0.]], 1.)             # one Gaussian: mmse = 1/(1 + e^λ), and everything has a closed form
CLUSTER = DATASETS['cluster']()


def softplus(l): return max(l, 0.) + math.log1p(math.exp(-abs(l)))


@pytest.mark.parametrize('schedule', (*CONTINUOUS, 'adaptive'))
@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(u=st.floats(0, 1), v=st.floats(0, 1), target=st.sampled_from(list(TARGETS)))
def test_the_nelbo_floor_of_a_gaussian(schedule, target, u, v):
    "log((1 + e^λmax)/(1 + e^λmin)), whatever the schedule and the target"
    s = SCHEDULES[schedule]()
    low, high = s.reach()
    low, high = max(low, -30.), min(high, 30.)
    if hasattr(s, 'std'): low, high = max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)   # a bell has no float32 slope far from its mean
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    if b - a < 1e-3: return
    s = SCHEDULES[schedule](logsnr_min=a, logsnr_max=b)
    assert abs(floor(DiffusionLoss(s, target, 'nelbo'), ONE) - (softplus(b) - softplus(a))) < 1e-6


@pytest.mark.parametrize('low, high', [(-12., 100.), (-200., 200.), (85., 95.), (-100., 5.)])
def test_a_wide_range_is_integrated_to_its_ends(low, high):
    "not to ±80"
    assert abs(floor(DiffusionLoss(VESchedule(low, high), 'eps', 'nelbo'), ONE) - (softplus(high) - softplus(low))) < 1e-3


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_floor_of_a_gaussian_against_the_integral_over_times(schedule):
    "E_t[factor · error of the best linear prediction], with the errors by hand; over T times if there are T levels"
    s = SCHEDULES[schedule]()
    t = torch.arange(1, s.steps + 1, dtype=f64) / s.steps if s.steps else s.t(torch.linspace(s.logsnr_max, s.logsnr_min, 20_001, dtype=f64))
    level = s.level(t)
    best = level.logsnr.exp() / (1 + level.logsnr.exp())       # E(ε - E[ε|z])²
    for target, weighting in pairs(schedule):
        loss = DiffusionLoss(s, target, weighting)
        integrand = loss.factor(t) * best / loss.target.eps_ratio(level.alpha, level.sigma)
        value = integrand.mean() if s.steps else simpson(integrand.numpy(), x=t.numpy())
        assert abs(floor(loss, ONE) / value - 1) < 1e-4, (target, weighting)


def test_a_coarse_chain_has_a_higher_floor_and_a_fine_one_the_integral():
    "the T-step NELBO of a Gaussian: Σ expm1(Δ_i) · mmse of ε at λ_i, by hand, above the integral and down to it as T grows"
    cosine = CosineSchedule(-6, 6)
    exact, floors = floor(DiffusionLoss(cosine, 'eps', 'nelbo'), ONE), {}
    for T in (1, 4, 32, 256, 2048):
        l = cosine.logsnr(torch.arange(T + 1, dtype=f64) / T).tolist()
        by_hand = sum(math.expm1(a - b) / (1 + math.exp(-b)) for a, b in zip(l, l[1:]))
        floors[T] = floor(DiffusionLoss(SCHEDULES['discrete'](-6, 6, T=T), 'v', 'nelbo'), ONE)
        assert abs(floors[T] / by_hand - 1) < 1e-9
    values = list(floors.values())
    assert all(a > b for a, b in zip(values, values[1:])) and exact < values[-1] < 1.01 * exact
    assert floor(DiffusionLoss(SCHEDULES['ddpm'](logsnr_max=math.inf), 'eps', 'nelbo'), ONE) == math.inf
    assert floor(DiffusionLoss(SCHEDULES['ddpm'](logsnr_max=math.inf), 'eps', 'ddpm_vlb'), ONE) < math.inf


def test_what_a_schedule_has_learned_does_not_move_the_floor():
    "L = ∫ w L′ dλ, whatever p"
    loss = DiffusionLoss('adaptive', 'F', 'edm')
    before = floor(loss, CLUSTER)
    loss(lambda z, u: torch.zeros_like(z), CLUSTER.sample(2000))
    assert loss.schedule._history.isfinite().any() and abs(floor(loss, CLUSTER) / before - 1) < 1e-9


def test_known_floors_of_the_cosine_schedule():
    "uncut, by symmetry: half of the noise and half of the data can be known, and v not at all"
    uncut = CosineSchedule(-math.inf, math.inf)
    for target, want in (('x', 0.5), ('eps', 0.5), ('v', 1.)): assert abs(floor(DiffusionLoss(uncut, target, 'weighted'), ONE) - want) < 1e-8
    for target in TARGETS: assert abs(floor(DiffusionLoss(uncut, target, 'rescaled'), ONE) - 0.5) < 1e-8


@pytest.mark.parametrize('target, weighting', [('eps', 'nelbo'), ('x', 'nelbo'), ('score', 'weighted')])
def test_a_floor_without_bound_is_not_a_number(target, weighting):
    "the continuous NELBO grows with λ_max: uncut it is infinite, and 80 is the edge of a table, not a floor"
    try: value = floor(DiffusionLoss(CosineSchedule(-math.inf, math.inf), target, weighting), ONE)
    except ValueError as e: assert 'logsnr' in str(e)
    else: assert value == math.inf


@pytest.mark.parametrize('target', TARGETS)
def test_floor_against_validation_set_and_plain_monte_carlo(target):
    "three ways to one number: quadrature, the exact denoiser on the validation set, and random times without lfdm's loss"
    for weighting in ('nelbo', 'weighted', 'rescaled', 'min_snr', 'edm'):
        loss = DiffusionLoss(CosineSchedule(-6, 6), target, weighting)
        exact = floor(loss, CLUSTER)
        x = CLUSTER.sample(20_000, split='test', dtype=f64)
        v = ValidationSet(loss, x, denoise=CLUSTER.denoise)
        report = v(lambda z, u: v.best)
        assert abs(report['loss'] - exact) < 4 * report['loss_se'] and report['excess'] == 0
        g = torch.Generator().manual_seed(1)
        t = (torch.arange(20_000, dtype=f64) + torch.rand(20_000, generator=g, dtype=f64)) / 20_000
        x = CLUSTER.sample(20_000, seed=1, dtype=f64); eps = torch.randn(20_000, 2, generator=g, dtype=f64)
        alpha, sigma = loss.schedule.alpha(t)[:, None], loss.schedule.sigma(t)[:, None]
        z = alpha * x + sigma * eps
        x_hat = CLUSTER.denoise(z, alpha, sigma)
        error = loss.eps_factor(t) * (alpha / sigma * (x - x_hat)).square().mean(1)
        assert abs(error.mean() - exact) < 4 * error.std() / 20_000**0.5


def test_no_other_denoiser_is_below_the_floor():
    loss = DiffusionLoss('cosine', 'v', 'weighted')
    x = CLUSTER.sample(20_000, split='test', dtype=f64)
    for wrong in (lambda z, a, s: a * z / (a**2 + s**2), lambda z, a, s: 1.02 * CLUSTER.denoise(z, a, s), lambda z, a, s: DATASETS['ring']().denoise(z, a, s)):
        v, w = (ValidationSet(loss, x, denoise=d) for d in (CLUSTER.denoise, wrong))
        report = v(lambda z, u: w.best)
        assert report['loss'] > floor(loss, CLUSTER) and report['excess'] > 5 * report['excess_se']


def test_all_targets_share_what_they_must():
    for weighting in WEIGHTINGS:
        values = torch.tensor([floor(DiffusionLoss('cosine', y, weighting), CLUSTER) for y in TARGETS])
        assert torch.allclose(values, values[:1].expand_as(values), rtol=1e-6) == (weighting != 'weighted')


def test_floor_per_logsnr_takes_numbers_and_integrates_to_the_floor():
    loss = DiffusionLoss()
    l = torch.linspace(-12.9 + 1e-9, 12.9 - 1e-9, 20_001, dtype=f64)
    assert abs(torch.trapezoid(floor_per_logsnr(loss, CLUSTER, l), l) - floor(loss, CLUSTER)) < 1e-6
    torch.testing.assert_close(floor_per_logsnr(loss, CLUSTER, 0.), floor_per_logsnr(loss, CLUSTER, torch.tensor(0., dtype=f64)))


def test_no_density_no_floor():
    class Coil(Dataset):
        def draw(self, n, generator): return torch.rand(n, 2, generator=generator)
    for f in (floor, lambda l, d: floor_per_logsnr(l, d, torch.zeros(1))):
        with pytest.raises(NoDensity, match="'coil'"): f(DiffusionLoss(), Coil())


# ---- distances

every = pytest.mark.parametrize('name', DISTANCES)
sizes = st.tuples(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.integers(0, 10**6))


def two_sets(n, m, dim, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=g, dtype=f64), 0.5 + 2 * torch.randn(m, dim, generator=g, dtype=f64)


@every
@few
@given(sizes)
def test_what_a_distance_has_to_be(name, size):
    "zero on itself and on any order of itself, symmetric, not negative, of the data's unit, the triangle inequality, at any sizes"
    d, (n, m, dim, seed) = DISTANCES[name], size
    x, y = two_sets(n, m, dim, seed)
    assert d(x, x) == 0 and d(x, x[torch.randperm(n)]) < 1e-12
    assert isinstance(d(x, y), float) and d(x, y) >= 0 and math.isclose(d(x, y), d(y, x), rel_tol=1e-12)
    power = 2 if name == 'covariance_distance' else 1
    assert math.isclose(d(3 * x, 3 * y), 3**power * d(x, y), rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(d(-x, -y), d(x, y), rel_tol=1e-9, abs_tol=1e-12)
    shift = torch.full((dim,), 7., dtype=f64)
    assert math.isclose(d(x + shift, y + shift), d(x, y), rel_tol=1e-9, abs_tol=1e-9)
    z = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed + 1), dtype=f64)
    assert d(x, z) <= d(x, y) + d(y, z) + 1e-12


@every
def test_turning_both_sets_changes_nothing(name):
    x, y = two_sets(300, 200, 2, 0)
    turn = torch.tensor([[math.cos(a := math.pi * 5 / 128), math.sin(a)], [-math.sin(a), math.cos(a)]], dtype=f64)   # onto the directions themselves
    assert math.isclose(DISTANCES[name](x @ turn, y @ turn), DISTANCES[name](x, y), rel_tol=1e-9)
    any_turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=f64)
    assert math.isclose(DISTANCES[name](x @ any_turn, y @ any_turn), DISTANCES[name](x, y), rel_tol=1e-4)


@every
def test_single_precision_is_enough(name):
    x, y = two_sets(500, 400, 2, 1)
    assert math.isclose(DISTANCES[name](x.float() + 1000, y.float() + 1000), DISTANCES[name](x.float().double() + 1000, y.float().double() + 1000), rel_tol=1e-3)


def test_moments_by_hand():
    x, y = torch.tensor([[0., 0.], [2., 4.]]), torch.tensor([[1., 1.], [1., 1.], [4., 1.]])
    assert math.isclose(DISTANCES['mean_distance'](x, y), math.sqrt(1 + 1))
    # covariances with n - 1 and m - 1, thesis 4.3 and 4.4: [[2, 4], [4, 8]] and [[3, 0], [0, 0]]
    assert math.isclose(DISTANCES['covariance_distance'](x, y), math.sqrt(1 + 16 + 16 + 64))


@few
@given(sizes)
def test_sliced_wasserstein_in_one_dimension_is_wasserstein(size):
    "against scipy's W1, which is at most W2; at equal sizes W2 is the distance of the sorted samples; copies change nothing"
    n, m, _, seed = size
    x, y = two_sets(n, m, 1, seed)
    same = two_sets(n, n, 1, seed)[1]
    assert math.isclose(sliced_wasserstein(x, same), ((x.sort(0).values - same.sort(0).values)**2).mean().sqrt(), rel_tol=1e-12)
    assert sliced_wasserstein(x, same) >= wasserstein_distance(x[:, 0], same[:, 0]) - 1e-12
    assert sliced_wasserstein(x, x.repeat(3, 1)) < 1e-12
    assert math.isclose(sliced_wasserstein(x.repeat(m, 1), y.repeat(n, 1)), sliced_wasserstein(x, y), rel_tol=1e-9)


@pytest.mark.parametrize('dim', [1, 2, 3, 8])
def test_a_shift_costs_its_length_over_the_root_of_the_dimension(dim):
    x = two_sets(200, 200, dim, 0)[0]
    shift = torch.zeros(dim, dtype=f64); shift[0] = 2.
    got = sliced_wasserstein(x, x + shift, projections=4096)
    assert abs(got - 2 / dim**0.5) < (1e-9 if dim <= 2 else 0.06)
    v = unit_vectors(dim, 64)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(64, dtype=f64))
    assert v.shape == (64, dim) and torch.equal(v, unit_vectors(dim, 64))


@every
def test_sets_that_cannot_be_compared_are_refused(name):
    "(n, 2) against (m, 1) would broadcast to a number"
    for x, y in (((5, 2), (5, 1)), ((5, 2), (5, 3)), ((5,), (5,)), ((5, 3, 4, 4), (5, 3, 4, 4)), ((5, 2), (2,)), ((0, 2), (5, 2))):
        for a, b in ((x, y), (y, x)):
            with pytest.raises(ValueError, match='samples'): DISTANCES[name](torch.ones(a), torch.ones(b))


@every
def test_nan_samples_do_not_look_good(name):
    x, y = two_sets(30, 30, 2, 0)
    x[3, 1] = math.nan
    assert math.isnan(DISTANCES[name](x, y))


def test_only_one_of_them_sees_shape():
    ring = DATASETS['ring']()
    real, blob = ring.sample(2000), torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    noise, sd = noise_floor(sliced_wasserstein, ring, 2000, repeats=8)
    assert sliced_wasserstein(real, blob) > noise + 10 * sd


# ---- noise floors and judgements

@every
def test_noise_floors_are_reproducible_and_shrink(name):
    d = DISTANCES[name]
    before = torch.get_rng_state()
    a = noise_floor(d, CLUSTER, 200, repeats=10)
    assert a == noise_floor(d, CLUSTER, 200, 200, repeats=10) and a != noise_floor(d, CLUSTER, 200, repeats=10, seed=5000)
    assert torch.equal(before, torch.get_rng_state())
    big, _ = noise_floor(d, CLUSTER, 3200, repeats=10)
    assert 2 < a[0] / big < 8                                     # 1/√n: 4
    uneven, _ = noise_floor(d, CLUSTER, 200, 3200, repeats=10)
    assert big < uneven < a[0]


@pytest.mark.parametrize('bad', [dict(n=0), dict(n=-1), dict(n='100'), dict(n=10, m=0), dict(n=10, m=2.5), dict(n=10, repeats=0), dict(n=10, repeats=1), dict(n=10, repeats='3')], ids=str)
def test_noise_floors_of_nothing_are_refused(bad):
    with pytest.raises((TypeError, ValueError), match='|'.join(bad)): noise_floor(DISTANCES['mean_distance'], CLUSTER, **bad)


def test_a_judgement_tells_data_from_no_data():
    samples = CLUSTER.sample(800, seed=7)
    good, bad = judge(samples, CLUSTER), judge(samples * 1.3 + 0.3, CLUSTER)
    assert good.keys() == bad.keys() == DISTANCES.keys()
    for name in DISTANCES:
        assert good[name]['value'] < good[name]['noise'] + 4 * good[name]['noise_sd']
        assert bad[name]['value'] > bad[name]['noise'] + 6 * bad[name]['noise_sd']
        assert (good[name]['noise'], good[name]['noise_sd']) == (bad[name]['noise'], bad[name]['noise_sd']) == noise_floor(DISTANCES[name], CLUSTER, 800)


@pytest.mark.parametrize('shape', [(0, 2), (10, 3), (10, 1), (10,), (10, 3, 4, 4)], ids=str)
def test_samples_of_another_kind_cannot_be_judged(shape):
    with pytest.raises(ValueError, match='samples'): judge(torch.ones(shape), CLUSTER, repeats=2)
