"Attempts to break lfdm.weighted_elbo: random weights and slopes, closed forms."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from gaussians import f64, generator
from lfdm import weighted_elbo
from lfdm.data import DATASETS, GaussianMixture
from lfdm.networks import MLP
from lfdm.steps import exact_denoiser, network_denoiser
from lfdm.weighted_elbo import elbos, eps_slope, exact_elbos, level_grid, over_elbos, over_slopes, weight
from lfdm.weightings import WEIGHTINGS, EpsFactor, LogSNRWeighting

some = settings(max_examples=15, deadline=None, derandomize=True, database=None)
LOW, HIGH = -5., 7.
CLUSTER = DATASETS["cluster"]()   # keeps the table of its floors
exact = exact_denoiser(CLUSTER)


def numbers(low, high): return st.lists(st.floats(low, high), min_size=6, max_size=6)


def falling(c):
    "A positive sum of sigmoids of different places: it falls."
    return lambda k: 0.01 + sum(abs(a) * torch.sigmoid(3 * i - 6 - k) for i, a in enumerate(c))


def made(slope, prior=0.3, points=2001):
    k = level_grid(LOW, HIGH, points)
    return elbos(k, slope(k), prior)


def pieces(c):
    "ELBOs of a slope L' ≥ 0 that is linear between six values."
    return made(lambda k: torch.from_numpy(np.interp(k, np.linspace(LOW, HIGH, 6), c)))


# ---- the areas

@some
@given(numbers(-3, 3), numbers(-3, 3))
def test_polynomials_are_exact(c, d):
    poly = lambda c: lambda k: sum(a * (k / 7)**i for i, a in enumerate(c[:3]))
    product = [sum(c[i] * d[n - i] for i in range(3) if 0 <= n - i < 3) for n in range(5)]
    inside = sum(a / 7**n * (HIGH**(n + 1) - LOW**(n + 1)) / (n + 1) for n, a in enumerate(product))
    want = inside + 0.3 * poly(c)(torch.tensor(LOW)).item()
    for area in (over_slopes, over_elbos):
        within = 1e-6 * (1 + sum(map(abs, c)) * sum(map(abs, d)))
        assert area(poly(c), made(poly(d), points=201)) == pytest.approx(want, abs=within)


@pytest.mark.parametrize("name", [w for w, cls in WEIGHTINGS.items() if not cls.learned])
def test_every_weighting_by_name_class_and_instance(name):
    e, cls = exact_elbos(CLUSTER, points=201), WEIGHTINGS[name]
    for area in (over_slopes, over_elbos):
        if issubclass(cls, LogSNRWeighting): assert area(name, e) == area(cls, e) == area(cls().w, e)
        else:
            with pytest.raises(ValueError, match="implied"): area(name, e)
            assert math.isfinite(area(f"implied(cosine, eps, {name})", e))
        if name == "nelbo": assert area(name, e) == pytest.approx(e.loss[-1].item(), rel=1e-9)


@some
@given(numbers(0.1, 3), numbers(0, 5))
def test_a_falling_weight_is_a_mean_of_elbos(c, d):
    e, w = pieces(d), falling(c)
    density, mass = weighted_elbo.augmentation(w, e.logsnr)
    assert (density >= 0).all() and 0 <= mass <= 1
    assert torch.trapezoid(density, e.logsnr).item() + mass == pytest.approx(1, abs=1e-4)
    assert weighted_elbo.over_augmentation(w, e) == pytest.approx(over_slopes(w, e), rel=1e-4, abs=1e-6)


def test_levels_are_drawn_from_the_augmentation(n=4000):
    w = falling([1., .1, 2.])
    k = weighted_elbo.draw_levels(w, n, LOW, HIGH, generator())
    at = lambda level: weight(w, torch.tensor([level])).item()
    shares = {(k == HIGH): at(HIGH)} | {(k > cut): at(cut) for cut in (-2., 1., 4.)}
    assert k.min() >= LOW and k.max() <= HIGH
    for found, want in shares.items():
        assert abs(found.double().mean() - want / at(LOW)) < 5 * 0.5 / n**0.5


# ---- slopes and divergences

def test_the_noise_is_the_same_at_all_levels():
    x, k = CLUSTER.sample(50, dtype=f64), torch.tensor([-3., 1.], dtype=f64)
    slopes = eps_slope(exact, x, k, seed=3)
    assert torch.equal(eps_slope(exact, x, k[1:], seed=3)[0], slopes[1])
    assert not torch.equal(eps_slope(exact, x, k, seed=4), slopes)


def test_sixteen_bits_of_data_are_levels_and_noise_of_thirty_two():
    x, k, net = CLUSTER.sample(20).bfloat16(), torch.tensor([-8., 0., 12.]), MLP(width=8)
    slopes = lambda net, x: eps_slope(network_denoiser(net, "v"), x, k)
    with torch.no_grad(): half = slopes(copy.deepcopy(net).bfloat16(), x)
    assert torch.equal(slopes(net, x), slopes(net, x.float()))
    assert half.dtype == f64 and (half - slopes(net, x)).abs().max() < .1


def test_no_model_is_below_the_exact_one_and_numbers_are_float64():
    x, best = CLUSTER.sample(4000), exact_elbos(CLUSTER, LOW, HIGH, 401).loss[-1].item()
    halved = lambda z, level: (None, 0.5 * exact(z, level)[1])
    bad, good = (weighted_elbo.model_elbos(denoiser, x, LOW, HIGH, 41) for denoiser in (halved, exact))
    assert bad.loss[-1] > 1.1 * best and good.loss[-1].item() == pytest.approx(best, rel=.05)
    assert all(q.dtype == f64 and q.isfinite().all() for q in good) and (good.loss.diff() > 0).all()


def gaussian(std, mean=0.):
    d = GaussianMixture([[0., 0.]], 1.)
    d.means, d.stds = torch.tensor([[mean, 0.]], dtype=f64), torch.tensor([[std, std]], dtype=f64)
    return d


@some
@given(st.floats(0.3, 2), st.floats(0.3, 2), st.floats(-1, 1), st.floats(0, 1.5), st.floats(0.3, 1.5))
def test_divergences_of_two_gaussians(a, b, m, alpha, sigma):
    v, u = alpha**2 * a**2 + sigma**2, alpha**2 * b**2 + sigma**2
    kl, fisher = weighted_elbo.kl_and_fisher(gaussian(a), gaussian(b, m), alpha, sigma)
    assert kl == pytest.approx(v / u - 1 + math.log(u / v) + (alpha * m)**2 / (2 * u), abs=1e-7)
    assert fisher == pytest.approx(2 * v * (1 / u - 1 / v)**2 + (alpha * m / u)**2, abs=1e-7)


# ---- what must be refused

GRID, SOLID = torch.linspace(LOW, HIGH, 5, dtype=f64), GaussianMixture([[0., 0., 0.]], 1.)
GOOD, SHORT = elbos(GRID, torch.ones(5, dtype=f64), 0.), exact_elbos(CLUSTER, points=21)
OF_WEIGHTS = ["over_slopes", "over_elbos", "elbo_shares", "over_augmentation"]
NO_WEIGHTS = [
    (lambda k: 1 / (k - LOW), "w is inf at logsnr -5"), (lambda k: k[:-1], "one weight for each"),
    ("rescaled", "no w"), (EpsFactor(), "no w")]
RISING = ["edm", lambda k: -torch.sigmoid(-k), lambda k: 0 * k]
NO_GRIDS = [(-math.inf, 3, 5, "finite range"), (3, 3, 5, "finite range"), (-3, 3, 4, "odd")]
NO_ELBOS = [
    (GRID, torch.ones(4), "one shape"), (GRID.flip(0), torch.ones(5), "increase"),
    (GRID * math.inf, torch.ones(5), "finite"), (GRID**3, torch.ones(5), "evenly"),
    (GRID[:4], torch.ones(4), "odd"), (GRID, GRID.sqrt(), "is nan")]


@pytest.mark.parametrize("name, arguments, says", [
    *(("level_grid", bad, says) for *bad, says in NO_GRIDS),
    *(("elbos", (*bad, 0.), says) for *bad, says in NO_ELBOS),
    *((f, (w, GOOD), says) for f in OF_WEIGHTS for w, says in NO_WEIGHTS),
    *((f, (w, *more), "rises|positive") for w in RISING
      for f, more in (("over_augmentation", [SHORT]), ("draw_levels", [5, LOW, HIGH]))),
    ("kl_and_fisher", (DATASETS["ring"](), gaussian(1e-3), 1., 0.), "more noise"),
    ("kl_and_fisher", (SOLID, SOLID, 1., 1.), "two dimensions")])
def test_what_cannot_be_is_refused(name, arguments, says):
    with pytest.raises(ValueError, match=says): getattr(weighted_elbo, name)(*arguments)


def test_slopes_are_refused_beyond_the_training_and_where_they_are_not_finite():
    x, narrow = torch.randn(3, 2), lambda z, level: (z, z)
    narrow.within = (-4., 4.)
    assert eps_slope(narrow, x, torch.tensor([-4., 4.])).shape == (2, 3)
    for k in (-4.1, 4.1, math.nan):
        with pytest.raises(ValueError, match="within the range"): eps_slope(narrow, x, torch.tensor([0., k]))
    broken = lambda z, level: (z, z / (level.logsnr < 1))
    with pytest.raises(FloatingPointError, match="not finite at logsnr 2"):
        eps_slope(broken, x, torch.tensor([0., 2.]))
    with pytest.raises(TypeError, match="denoiser must return"): eps_slope(lambda z, level: z, x, 0.)
