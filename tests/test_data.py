"Attempts to break lfdm.data. What is right in the normal case is checked in nbs/library/50_data.ipynb."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from gaussians import f64, randn
from lfdm.data import DATASETS, Dataset, GaussianMixture, NoDensity

f32, close = torch.float32, torch.testing.assert_close
SETS = {name: make() for name, make in DATASETS.items()}
PARTS = [[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3]
THREE = GaussianMixture(*PARTS)
METHODS = ['log_prob_at', 'denoise', 'score', 'posterior_variance']
each_method = pytest.mark.parametrize('method', METHODS)
few = settings(max_examples=12, deadline=None)
names = st.sampled_from(sorted(SETS))


def vp(logsnr): return [torch.tensor(s * logsnr, dtype=f64).sigmoid().sqrt() for s in (1, -1)]


# ---- at any noise level

@each_method
def test_blocks_of_rows_leave_no_seam(method):
    cut, z, u = GaussianMixture(*PARTS), 2 * THREE.sample(9, dtype=f64), torch.linspace(.01, .99, 9).double()
    cut.block = 7
    close(getattr(cut, method)(z, u, 1 - u[:, None]), getattr(THREE, method)(z, u, 1 - u), rtol=1e-12, atol=0)


@few
@given(names, st.floats(-80, 80), st.floats(0, 12))
def test_finite_and_bounded_everywhere(name, logsnr, log10_far):
    d, scales = SETS[name], vp(logsnr)
    z = torch.tensor([[10**log10_far, -1.], [0., 0.], [-3., 10**log10_far]], dtype=f64)
    assert all(getattr(d, method)(z, *scales).isfinite().all() for method in METHODS)
    v = d.posterior_variance(z, *scales)
    assert (v >= 0).all() and (v <= d.means.abs().max()**2 * 4 + 1).all()


@few
@given(names, st.floats(-10, 10), st.floats(.01, 100), st.integers(0, 10**6))
def test_exact_quantities_against_independent_forms(name, logsnr, k, seed):
    "in any units: torch.distributions; autograd; Tweedie; the variance as a slope, σ²/α dE[x|z]/dz"
    d, (alpha, sigma) = SETS[name], [k * a for a in vp(logsnr)]
    z = (alpha * d.sample(1, seed, dtype=f64) + sigma * randn(1, 2, seed=seed)).requires_grad_()
    tau = (alpha**2 * d.stds**2 + sigma**2).sqrt()
    q = MixtureSameFamily(Categorical(d.weights), Independent(Normal(alpha * d.means, tau), 1))
    log_q = d.log_prob_at(z, alpha, sigma)
    close(log_q, q.log_prob(z))
    score, = torch.autograd.grad(log_q.sum(), z)
    close(d.score(z, alpha, sigma), score, rtol=1e-8, atol=1e-8 / k)
    close(alpha * d.denoise(z, alpha, sigma), z + sigma**2 * score, rtol=1e-8, atol=1e-8 * k)
    slope = torch.autograd.functional.jacobian(lambda z: d.denoise(z, alpha, sigma).sum(0), z)[:, 0]
    variance = sigma**2 / alpha * slope.diagonal().mean()[None]
    close(d.posterior_variance(z, alpha, sigma), variance, rtol=1e-7, atol=1e-12)


@each_method
def test_float32_in_float32_out_float64_inside(method):
    z, f = THREE.sample(20), getattr(THREE, method)
    for scales in map(vp, (-8., 0., 8.)): assert torch.equal(f(z, *scales), f(z.double(), *scales).to(f32))


# ---- mixtures and their floors

@pytest.mark.parametrize('d', [SETS['cluster'], THREE])
def test_floors_obey_their_bounds_and_limits(d):
    l = torch.tensor([-math.inf, -700., *torch.linspace(-20, 25, 100), 700., math.inf], dtype=f64)
    x, e = d.mmse(l), d.eps_floor(l)
    assert (x >= 0).all() and (x <= (-l).sigmoid() * (1 + 1e-6)).all()   # not above the linear denoiser
    assert (x[1:-1].diff() < 0).all() and x[0] == e[-1] == 1 and x[-1] == e[0] == 0
    close(e[1:-1], l[1:-1].exp() * x[1:-1])


def test_table_reaches_as_far_as_narrow_components_need():
    "to its last point, where it is the quadrature itself"
    d = GaussianMixture([[-1., 0.], [1., .5], [0., 1.]], .02)
    last = max(14, math.ceil(16 * (9 - 2 * d.stds.min().log().item())) / 16)
    for logsnr, tolerance in ((9., 1e-6), (last + 3, 1e-6), (last, 1e-11)):
        direct = d.eps_error(*(a.item() for a in vp(logsnr)))
        assert d.eps_floor(logsnr).item() == pytest.approx(direct, rel=tolerance)


def test_far_components_are_two_gaussians():
    "a long grid leaves out what lies between them; where no noise joins them the forms are closed"
    d, l = GaussianMixture([[0.], [1e6]], 1.), torch.tensor([20., 25., 30., 35.], dtype=f64)
    s = d.stds[0, 0]
    close(d.mmse(l), s**2 / (1 + l.exp() * s**2), rtol=1e-6, atol=0)
    assert d.entropy() == pytest.approx(math.log(2) + math.log(2 * math.pi * math.e) / 2 + s.log().item())


def test_three_dimensions():
    "one Gaussian has closed forms in any dimension, and the grid must fit"
    d, z = GaussianMixture(torch.zeros(1, 3), 2.), randn(5, 3)
    assert d.entropy(fine=2.) == pytest.approx(1.5 * math.log(2 * math.pi * math.e), abs=1e-6)
    assert d.eps_error(1., 1., fine=2.) == pytest.approx(.5, rel=1e-8)
    close(d.denoise(z, .6, .8), .6 * z)


# ---- samples

@pytest.mark.parametrize('name', SETS)
def test_samples_of_every_split_and_seed_are_their_own(name, seed=2**40):
    state, x = torch.get_rng_state(), SETS[name].sample(9, seed)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, SETS[name].sample(9, seed, dtype=f64).float())
    draws = {tuple(d.sample(1, s, split)[0].tolist())
             for d in SETS.values() for s in (seed, seed + 1) for split in ('train', 'test')}
    assert len(draws) == len(SETS) * 4


# ---- what is refused

class Noise(Dataset):
    def draw(self, n, generator): return torch.randn(n, 2, generator=generator)

class Flat(Dataset):
    def draw(self, n, generator): return torch.zeros(n)


TWO = [[0., 0.], [1., 1.]]
NO_MIXTURE = [
    (TWO, 0., 'std must be finite and greater than 0'), (TWO, 1e300, 'std'), (TWO, 1e-300, 'std'),
    (TWO, [1.] * 3, 'std must be a number'), ([[math.inf, 0.]], 1., 'means must be finite'),
    ([0., 0.], 1., 'K, D'), ([], 1., 'K, D'),
    *((TWO, 1., weights, 'weights') for weights in ([1.], [1., -1.], [0., 0.]))]

@pytest.mark.parametrize('f, args, words', [
    *((GaussianMixture, bad, words) for *bad, words in NO_MIXTURE),
    (THREE.eps_floor, (torch.tensor([0., math.nan]),), 'logsnr'),
    (THREE.entropy, (0., 0.), 'both be 0'), (THREE.entropy, (1., 0., .1), 'fine must be from 2'),
    (GaussianMixture(TWO, 1e-12).entropy, (), 'need a grid'),
    (GaussianMixture(torch.zeros(1, 1000), 1.).entropy, (), 'in 1000 dimensions need a grid'),
    (SETS['ring'].sample, (3, 0, 'train', torch.int64), 'dtype must be floating'),
    (Flat().sample, (3,), "draw of data set 'flat'"), (Dataset().sample, (3,), 'draw')])
def test_what_is_refused(f, args, words):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=words): f(*args)


Z = torch.zeros(4, 2)


@pytest.mark.parametrize('z, alpha, sigma, words', [
    (torch.zeros(4, 3), 1., 1., 'shape'), (torch.zeros(2), 1., 1., 'shape'), (Z, -1., 1., 'alpha'),
    (Z, 1., math.nan, 'sigma'), (Z, torch.ones(3), 1., 'one number per example'),
    (Z, 1., Z + 1, 'one number per example'), (Z[:2], torch.eye(2)[0], torch.eye(2)[0], 'both')])
@each_method
def test_exact_methods_refuse(method, z, alpha, sigma, words):
    with pytest.raises(ValueError, match=words): getattr(THREE, method)(z, alpha, sigma)


@pytest.mark.parametrize('method', [*METHODS, 'log_prob', 'entropy', 'eps_error', 'eps_floor', 'mmse'])
def test_samples_alone_have_no_floor(method):
    with pytest.raises(NoDensity, match="'noise' has samples but no exact density"):
        getattr(Noise(), method)(Z)
