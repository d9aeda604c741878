"Attempts to break lfdm.weighted_elbo: random weights and slopes, weights that jump, closed forms."

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.data import DATASETS, GaussianMixture
from lfdm.likelihood import nelbo, prior_kl
from lfdm.schedules import SCHEDULES
from lfdm.steps import exact_denoiser
from lfdm.weighted_elbo import (
    ELBOs,
    augmentation,
    draw_levels,
    elbo_shares,
    elbos,
    eps_slope,
    exact_elbos,
    exact_slope,
    kl_and_fisher,
    level_grid,
    model_elbos,
    over_augmentation,
    over_elbos,
    over_slopes,
    weight,
)
from lfdm.weightings import WEIGHTINGS, EpsFactor, LogSNRWeighting

torch.set_num_threads(1)
f64 = torch.float64
some = settings(max_examples=25, deadline=None, derandomize=True, database=None)
LOW, HIGH = -5., 7.
CLUSTER = DATASETS['cluster']()   # keeps the table of its floors
numbers = lambda low, high, n=6: st.lists(st.floats(low, high), min_size=n, max_size=n)


def generator(seed=0): return torch.Generator().manual_seed(seed)


def waves(c):
    "a smooth function of λ from six numbers, not monotonic"
    return lambda k: sum(a * torch.cos(i * k / 3 + i) for i, a in enumerate(c))


def falling(c):
    "a positive sum of sigmoids of different places: it falls"
    return lambda k: 0.01 + sum(abs(a) * torch.sigmoid(3 * i - 6 - k) for i, a in enumerate(c))


def pieces(c):
    "a slope L' ≥ 0 that is linear between six values"
    knots, values = torch.linspace(LOW, HIGH, 6, dtype=f64), torch.tensor(c, dtype=f64)
    def f(k):
        i = torch.searchsorted(knots, k.clamp(LOW, HIGH), right=True).sub(1).clamp(0, 4)
        return values[i] + (values[i + 1] - values[i]) * (k - knots[i]) / (knots[1] - knots[0])
    return f


def made(slope, prior=0.3, points=2001):
    k = level_grid(LOW, HIGH, points)
    return elbos(k, slope(k), prior)


# ---- the identity

@some
@given(numbers(-3, 3), numbers(0, 5), st.floats(0, 3))
def test_the_two_areas_agree_for_any_weight_and_slope(c, d, prior):
    e = made(pieces(d), prior)
    a, b = over_slopes(waves(c), e), over_elbos(waves(c), e)
    assert abs(a - b) < 1e-4 * (1 + sum(map(abs, c)) * (sum(d) + prior))


@some
@given(numbers(-3, 3), numbers(-3, 3))
def test_polynomials_are_exact(c, d):
    "against the integral of the polynomial itself, not the other area"
    poly = lambda c: lambda k: sum(a * (k / 7)**i for i, a in enumerate(c[:3]))
    e = made(poly(d), points=201)
    product = [sum(c[i] * d[n - i] for i in range(3) if 0 <= n - i < 3) for n in range(5)]
    inside = sum(a / 7**n * (HIGH**(n + 1) - LOW**(n + 1)) / (n + 1) for n, a in enumerate(product))
    expected = inside + 0.3 * poly(c)(torch.tensor(LOW)).item()
    assert abs(over_slopes(poly(c), e) - expected) < 1e-6 * (1 + sum(map(abs, c)) * sum(map(abs, d)))
    assert abs(over_elbos(poly(c), e) - expected) < 1e-6 * (1 + sum(map(abs, c)) * sum(map(abs, d)))


@some
@given(st.floats(LOW + 0.5, HIGH - 0.5), numbers(0, 5))
def test_a_weight_that_jumps_costs_a_step_of_the_grid(where, d):
    "w = 1 up to a level leaves the ELBO of that level"
    e = made(pieces(d))
    step = lambda k: (k <= where).double()
    i = torch.searchsorted(e.logsnr, where)
    L = e.loss[i].item()
    tolerance = 3 * (HIGH - LOW) / 2000 * max(d) + 1e-9
    assert abs(over_elbos(step, e) - L) < tolerance and abs(over_slopes(step, e) - L) < tolerance


@some
@given(numbers(-3, 3), numbers(0, 5), st.floats(-4, 4))
def test_the_areas_are_linear_in_the_weight(c, d, factor):
    e = made(pieces(d))
    for f in (over_slopes, over_elbos):
        assert f(lambda k: factor * waves(c)(k) + 1, e) == pytest.approx(
            factor * f(waves(c), e) + f('nelbo', e), rel=1e-9, abs=1e-9
        )


def test_w_of_one_is_the_elbo():
    e = exact_elbos(CLUSTER, LOW, HIGH, 401)
    assert (
        over_slopes('nelbo', e) == pytest.approx(e.loss[-1].item(), rel=1e-9)
        and over_elbos('nelbo', e) == e.loss[-1].item()
    )


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_every_weighting_by_name_class_and_instance(name):
    e = exact_elbos(CLUSTER, points=2001)
    if not issubclass(WEIGHTINGS[name], LogSNRWeighting):
        with pytest.raises(ValueError, match='implied'): over_slopes(name, e)
        name = f'implied(cosine, eps, {name})'
        values = [over_slopes(name, e)]
    else:
        values = [
            over_slopes(w, e) for w in (name, WEIGHTINGS[name], WEIGHTINGS[name](), WEIGHTINGS[name]().w)
        ]
    assert len(set(values)) == 1 and over_elbos(name, e) == pytest.approx(values[0], rel=1e-4)


# ---- augmentation

@some
@given(numbers(0.1, 3), numbers(0, 5))
def test_a_falling_weight_is_a_mean_of_elbos(c, d):
    e, w = made(pieces(d)), falling(c)
    density, mass = augmentation(w, e.logsnr)
    assert (density >= 0).all() and 0 <= mass <= 1
    assert torch.trapezoid(density, e.logsnr).item() + mass == pytest.approx(1, abs=1e-4)
    assert over_augmentation(w, e) == pytest.approx(over_slopes(w, e), rel=1e-4, abs=1e-6)
    assert e.loss.min() - 1e-9 <= over_augmentation(w, e) / weight(w, e.logsnr)[0] <= e.loss.max() + 1e-9


@some
@given(numbers(-3, 3), numbers(0, 5))
def test_what_counts_against_is_nothing_only_if_w_falls(c, d):
    e, w = made(pieces(d)), waves(c)
    plus, minus = elbo_shares(w, e)
    assert minus >= 0 and plus - minus == pytest.approx(
        over_elbos(w, e), rel=1e-4, abs=1e-4 * (1 + sum(map(abs, c)) * sum(d))
    )
    value = weight(w, e.logsnr)
    assert (minus == 0) == (not ((value.diff() > 0) & (e.loss[1:] + e.loss[:-1] > 0)).any())


@some
@given(numbers(0.1, 3), st.integers(0, 5))
def test_levels_are_drawn_from_the_augmentation(c, seed):
    w, n = falling(c), 4000
    k = draw_levels(w, n, LOW, HIGH, generator(seed))
    assert ((LOW <= k) & (k <= HIGH)).all()
    first, last = weight(w, torch.tensor([LOW, HIGH]))
    assert ((k == HIGH).double().mean() - last / first).abs() < 5 * 0.5 / n**0.5
    for cut in (-2.0, 1.0, 4.0):
        assert (
            (k <= cut).double().mean() - (1 - weight(w, torch.tensor([cut])) / first)
        ).abs() < 5 * 0.5 / n**0.5


# ---- slopes, in closed form

def gaussian(std):
    d = GaussianMixture([[0., 0.]], 1.)
    d.stds = torch.tensor([[std, std]], dtype=f64)
    return d


@pytest.mark.parametrize('std', [0.3, 1., 2.])
def test_the_slope_of_gaussian_data(std):
    "exact ε̂ of N(0, std²): E‖ε - ε̂‖²/D = std² α²/(std² α² + σ²)"
    d, k = gaussian(std), torch.tensor([-4., 0., 3.], dtype=f64)
    x = d.sample(20_000, dtype=f64)
    slope = eps_slope(exact_denoiser(d), x, k)
    expected = 1 / (1 + (-k).exp() / std**2)
    assert (
        slope.shape == (3, 20_000)
        and ((slope.mean(1) - expected).abs() < 5 * slope.std(1) / 20_000**0.5).all()
    )


def test_the_slope_does_not_depend_on_the_process_nor_on_the_other_levels():
    d = CLUSTER
    x, k = d.sample(50, dtype=f64), torch.tensor([-3., 1., 5.], dtype=f64)
    all_ = eps_slope(exact_denoiser(d), x, k, seed=3)
    for i in range(3): assert torch.equal(eps_slope(exact_denoiser(d), x, k[i:i + 1], seed=3)[0], all_[i])
    for s in ('ve', 'rectified_flow'):
        assert torch.allclose(eps_slope(exact_denoiser(d), x, k, s, seed=3), all_, rtol=1e-8)
    assert not torch.equal(eps_slope(exact_denoiser(d), x, k, seed=4), all_)


def test_no_model_is_below_the_exact_one_and_the_nelbo_is_its_end():
    d = CLUSTER
    x, exact = d.sample(4000, dtype=f64), exact_elbos(d, LOW, HIGH, 401)
    for scale in (0.5, 1.):
        wrong = lambda z, level: (None, scale * exact_denoiser(d)(z, level)[1])
        e = model_elbos(wrong, x, LOW, HIGH, 41)
        assert e.loss[-1] > exact.loss[-1] * (1.1 if scale < 1 else 0.95)
    bound = nelbo(exact_denoiser(d), x, SCHEDULES['cosine'](LOW, HIGH), draws=40)
    assert (
        abs((bound.total - bound.reconstruction).mean() - exact.loss[-1])
        < 5 * bound.total.std() / 4000**0.5
    )


def test_the_prior_term_is_that_of_the_nelbo_and_has_a_closed_form():
    x = torch.randn(5, 3, 2, generator=generator(), dtype=f64)
    for name in ('cosine', 've', 'rectified_flow'):
        s = SCHEDULES[name](-6, 6)
        got = prior_kl(x, s.level_at(torch.tensor(-6., dtype=f64)))
        alpha2 = 1 / (1 + math.exp(6))
        assert torch.allclose(
            got, 0.5 * (alpha2 * x.square().sum((1, 2)) - 6 * (alpha2 + math.log(1 - alpha2))), rtol=1e-9
        )


def test_numbers_of_a_float32_network_are_float64_and_finite():
    e = model_elbos(lambda z, level: (None, torch.tanh(z)), torch.randn(20, 2), points=9)
    assert (
        isinstance(e, ELBOs)
        and all(q.dtype == f64 and q.isfinite().all() for q in e)
        and (e.loss.diff() > 0).all()
    )


# ---- Kullback-Leibler and Fisher

@some
@given(st.floats(0.3, 2), st.floats(0.3, 2), st.floats(-1, 1), st.floats(0, 1.5), st.floats(0.3, 1.5))
def test_divergences_of_two_gaussians(a, b, m, alpha, sigma):
    q, p = gaussian(a), gaussian(b)
    p.means = torch.tensor([[m, 0.]], dtype=f64)
    v, u = alpha**2 * a**2 + sigma**2, alpha**2 * b**2 + sigma**2
    kl, fisher = kl_and_fisher(q, p, alpha, sigma)
    assert kl == pytest.approx(v / u - 1 + math.log(u / v) + (alpha * m)**2 / (2 * u), abs=1e-7)
    assert fisher == pytest.approx(2 * v * (1 / u - 1 / v)**2 + (alpha * m / u)**2, abs=1e-7)


# ---- what must be refused

GRID = torch.linspace(LOW, HIGH, 5, dtype=f64)
GOOD = elbos(GRID, torch.ones(5, dtype=f64), 0.)


@pytest.mark.parametrize(
    'low, high, points, message',
    [
        (-math.inf, 3, 5, 'finite range'),
        (-3, math.inf, 5, 'finite range'),
        (3, 3, 5, 'finite range'),
        (4, 3, 5, 'finite range'),
        (-3, 3, 4, 'odd'),
        (-3, 3, 1, 'at least 3'),
        (math.nan, 3, 5, 'nan'),
    ],
)
def test_a_grid_is_finite_and_increases(low, high, points, message):
    with pytest.raises(ValueError, match=message): level_grid(low, high, points)
    if points % 2 and points > 1:
        with pytest.raises(ValueError, match=message): exact_elbos(CLUSTER, low, high, points)


@pytest.mark.parametrize(
    'w, message',
    [
        (lambda k: 1 / (k - LOW), 'w is inf at logsnr -5'),
        (lambda k: k * math.nan, 'w is nan'),
        (lambda k: (k - 1).log(), 'w is nan at logsnr -5'),
        (lambda k: 1.0, 'one weight for each'),
        (lambda k: k[:-1], 'one weight for each'),
        ('sigmoyd', "Did you mean 'sigmoid'"),
        ('rescaled', 'no w'),
        (EpsFactor(), 'no w'),
    ],
)
def test_a_weight_is_finite_and_a_function_of_the_level(w, message):
    for f in (over_slopes, over_elbos, elbo_shares, over_augmentation):
        with pytest.raises(ValueError, match=message): f(w, GOOD)


@pytest.mark.parametrize(
    'w',
    [
        'edm',
        'sech',
        'implied(cosine, eps, min_snr)',
        'implied(cosine, score, weighted)',
        lambda k: -torch.sigmoid(-k),
        lambda k: 0 * k,
    ],
)
def test_a_weight_that_rises_is_no_augmentation(w):
    for f in (
        lambda: augmentation(w, level_grid(LOW, HIGH)),
        lambda: over_augmentation(w, exact_elbos(CLUSTER, points=21)),
        lambda: draw_levels(w, 5, LOW, HIGH),
    ):
        with pytest.raises(ValueError, match='rises|positive'): f()


@pytest.mark.parametrize(
    'logsnr, slope',
    [
        (GRID, torch.ones(4)),
        (GRID[:2], torch.ones(2)),
        (GRID.flip(0), torch.ones(5)),
        (GRID**3, torch.ones(5)),
        (GRID[:4], torch.ones(4)),
        (GRID, torch.tensor([1, math.nan, 1, 1, 1.0])),
        (GRID * math.inf, torch.ones(5)),
        (GRID[None], torch.ones(1, 5)),
    ],
)
def test_a_curve_is_finite_and_evenly_spaced(logsnr, slope):
    with pytest.raises(ValueError): elbos(logsnr, slope, 0.)


def test_slopes_are_refused_beyond_the_training_and_where_they_are_not_finite():
    narrow = lambda z, level: (z, z)
    narrow.within = (-4., 4.)
    x = torch.randn(3, 2)
    assert eps_slope(narrow, x, torch.tensor([-4., 4.])).shape == (2, 3)
    for k in (-4.1, 4.1, math.nan, math.inf):
        with pytest.raises(ValueError, match='within the range'): eps_slope(narrow, x, torch.tensor([0., k]))
    with pytest.raises(FloatingPointError, match='not finite at logsnr 2'):
        eps_slope(lambda z, level: (z, z / (level.logsnr < 1)), x, torch.tensor([0.0, 2.0]))
    for bad in (torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3), torch.zeros(0, 2)):
        with pytest.raises(TypeError): eps_slope(narrow, bad, torch.tensor([0.]))


def test_too_fine_a_plane_is_refused():
    with pytest.raises(ValueError, match='more noise'):
        kl_and_fisher(DATASETS['ring'](), gaussian(1e-3), 1.0, 0.0)
    with pytest.raises(ValueError, match='two dimensions'):
        kl_and_fisher(
            GaussianMixture([[0.0, 0.0, 0.0]], 1.0), GaussianMixture([[0.0, 0.0, 0.0]], 1.0), 1.0, 1.0
        )
