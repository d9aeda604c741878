"Attempts to break lfdm.data: shapes, dtypes, extremes and wrong input. What is right in the normal case stands in nbs/library/50_data.ipynb."
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.data import DATASETS, Dataset, GaussianMixture, NoDensity

torch.set_num_threads(1)
f64 = torch.float64
SETS = {name: make() for name, make in DATASETS.items()}
THREE = GaussianMixture([[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3])
METHODS = 'log_prob_at denoise score posterior_variance'.split()
name = st.sampled_from(sorted(SETS))
method = st.sampled_from(METHODS)
few = settings(max_examples=20, deadline=None)


def vp(logsnr): return torch.tensor(logsnr, dtype=f64).sigmoid().sqrt(), torch.tensor(-logsnr, dtype=f64).sigmoid().sqrt()


@few
@given(name, method, st.integers(0, 5), st.floats(-60, 60))
def test_every_form_of_a_scale_gives_the_same(name, method, n, logsnr):
    "n runs through 2, the number of dimensions, where a wrong broadcast hides"
    z, (alpha, sigma) = 2 * SETS[name].sample(n, dtype=f64), vp(logsnr)
    f = getattr(SETS[name], method)
    expected = f(z, alpha.item(), sigma.item())
    assert expected.shape == ((n, 2) if method in ('denoise', 'score') else (n,))
    for shape in ((), (1,), (n,), (n, 1)):
        a, s = (alpha.expand(shape), sigma.expand(shape))
        torch.testing.assert_close(f(z, a, s), expected, rtol=1e-12, atol=1e-12)


@few
@given(method, st.integers(2, 9), st.integers(0, 10**6))
def test_rows_do_not_see_each_other(method, n, seed):
    g = torch.Generator().manual_seed(seed)
    z, u = torch.randn(n, 2, generator=g, dtype=f64), torch.rand(n, generator=g, dtype=f64)
    f = getattr(THREE, method)
    alone = torch.cat([f(z[i:i + 1], u[i].item(), 1 - u[i].item()) for i in range(n)])
    torch.testing.assert_close(f(z, u, 1 - u), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('block', [1, 7, 100, 10**9])
def test_blocks_leave_no_seam(method, block):
    cut = GaussianMixture([[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3])
    cut.block = block
    z, u = torch.randn(50, 2, dtype=f64), torch.rand(50, 1, dtype=f64)
    for scales in ((u, 1 - u), (.3, .7), (u, torch.tensor(.5))):
        torch.testing.assert_close(getattr(cut, method)(z, *scales), getattr(THREE, method)(z, *scales), rtol=1e-12, atol=1e-12)


@few
@given(name, st.floats(-80, 80), st.floats(0, 12))
def test_finite_and_bounded_everywhere(name, logsnr, log10_far):
    d, (alpha, sigma) = SETS[name], vp(logsnr)
    z = torch.tensor([[10**log10_far, -1.], [0., 0.], [-3., 10**log10_far]], dtype=f64)
    for m in METHODS: assert getattr(d, m)(z, alpha, sigma).isfinite().all(), m
    v = d.posterior_variance(z, alpha, sigma)
    assert (v >= 0).all() and (v <= d.means.abs().max()**2 * 4 + 1).all()
    # rho sums to 1: at sigma = 0 the data are known exactly, whatever z is
    torch.testing.assert_close(d.denoise(z, 1., 0.), z)


@few
@given(name, st.floats(-12, 12), st.integers(0, 10**6))
def test_tweedie_and_autograd(name, logsnr, seed):
    d, (alpha, sigma) = SETS[name], vp(logsnr)
    g = torch.Generator().manual_seed(seed)
    z = (alpha * d.sample(4, seed, dtype=f64) + sigma * torch.randn(4, 2, generator=g, dtype=f64)).requires_grad_()
    grad, = torch.autograd.grad(d.log_prob_at(z, alpha, sigma).sum(), z)
    torch.testing.assert_close(d.score(z, alpha, sigma), grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(alpha * d.denoise(z, alpha, sigma), z + sigma**2 * grad, rtol=1e-8, atol=1e-8)


@few
@given(name, st.floats(-10, 10), st.integers(0, 10**6))
def test_density_and_variance_against_independent_forms(name, logsnr, seed):
    "torch.distributions for q(z); the slope of the denoiser, Var[x given z] = sigma^2/alpha dE[x given z]/dz, for the variance"
    from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
    d, (alpha, sigma) = SETS[name], vp(logsnr)
    z = alpha * d.sample(1, seed, dtype=f64) + sigma * torch.randn(1, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)
    q = Independent(Normal(alpha * d.means, (alpha**2 * d.stds**2 + sigma**2).sqrt()), 1)
    torch.testing.assert_close(d.log_prob_at(z, alpha, sigma), MixtureSameFamily(Categorical(d.weights), q).log_prob(z))
    slope = torch.autograd.functional.jacobian(lambda z: d.denoise(z, alpha, sigma).sum(0), z)[:, 0]
    torch.testing.assert_close(d.posterior_variance(z, alpha, sigma), sigma**2 / alpha * slope.diagonal().mean()[None], rtol=1e-7, atol=1e-12)


@few
@given(method, st.floats(-8, 8), st.integers(0, 10**6))
def test_float32_in_float32_out_float64_inside(method, logsnr, seed):
    z, (alpha, sigma) = THREE.sample(20, seed), vp(logsnr)
    out = getattr(THREE, method)(z, alpha, sigma)
    assert out.dtype == torch.float32
    assert torch.equal(out, getattr(THREE, method)(z.double(), alpha, sigma).float())


@few
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(-10, 10), st.floats(.01, 100))
def test_only_the_ratio_of_scales_matters(z1, z2, logsnr, c):
    z, (alpha, sigma) = torch.tensor([[z1, z2]], dtype=f64), vp(logsnr)
    torch.testing.assert_close(THREE.denoise(c * z, c * alpha, c * sigma), THREE.denoise(z, alpha, sigma), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(THREE.score(c * z, c * alpha, c * sigma) * c, THREE.score(z, alpha, sigma), rtol=1e-9, atol=1e-9)


@few
@given(st.lists(st.tuples(*[st.floats(-50, 50)] * 2, st.floats(.05, 5), st.floats(.05, 5), st.floats(.01, 1)), min_size=1, max_size=6))
def test_any_mixture_is_standardized_exactly_and_can_be_taken_back(rows):
    a = torch.tensor(rows, dtype=f64)
    d = GaussianMixture(a[:, :2], a[:, 2:4], a[:, 4])
    torch.testing.assert_close(d.weights @ d.means, torch.zeros(2, dtype=f64), rtol=0, atol=1e-10)
    torch.testing.assert_close(d.weights @ (d.means**2 + d.stds**2), torch.ones(2, dtype=f64), rtol=1e-10, atol=0)
    torch.testing.assert_close(d.means * d.scale + d.shift, a[:, :2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', sorted(SETS))
def test_floors_obey_their_bounds_and_limits(name):
    d, l = SETS[name], torch.cat([torch.linspace(-20, 25, 400, dtype=f64), torch.tensor([-math.inf, -700., 700., math.inf], dtype=f64)])
    x, e = d.mmse(l), d.eps_floor(l)
    assert x.isfinite().all() and e.isfinite().all() and (x >= 0).all() and (e >= 0).all()
    assert (x <= (-l).sigmoid() * (1 + 1e-6)).all() and (e <= l.sigmoid() * (1 + 1e-6)).all()  # not above the linear denoiser
    assert (x[:400].diff() < 0).all()                                                         # more signal, less error
    torch.testing.assert_close(e[:400], l[:400].exp() * x[:400])
    assert (x[-4], x[-1], e[-4], e[-1]) == (1, 0, 0, 1)


@few
@given(name, st.floats(-14.5, 15.5))
def test_table_is_the_quadrature_and_the_quadrature_has_converged(name, logsnr):
    alpha, sigma = (a.item() for a in vp(logsnr))
    direct = SETS[name].eps_error(alpha, sigma)
    assert SETS[name].eps_floor(logsnr).item() == pytest.approx(direct, rel=2e-6)
    assert SETS[name].eps_error(3 * alpha, 3 * sigma, fine=6) == pytest.approx(direct, rel=1e-6)


def test_table_reaches_as_far_as_narrow_components_need():
    d = GaussianMixture([[-1., 0.], [1., .5], [0., 1.]], .005)
    for logsnr in (9., 14.5, 17., 21., 25.):
        alpha, sigma = (a.item() for a in vp(logsnr))
        assert d.eps_floor(logsnr).item() == pytest.approx(d.eps_error(alpha, sigma), rel=1e-6)


@pytest.mark.parametrize('name', sorted(SETS))
def test_sampled_error_of_the_denoiser_is_the_floor(name):
    d = SETS[name]
    x, eps = d.sample(20_000, 3, 'test', dtype=f64), torch.randn(20_000, 2, dtype=f64, generator=torch.Generator().manual_seed(3))
    for logsnr in (0., 4.):
        alpha, sigma = vp(logsnr)
        error = (x - d.denoise(alpha * x + sigma * eps, alpha, sigma)).square().mean(1)
        assert abs(error.mean() - d.mmse(logsnr)) < 4.5 * error.std() / len(x)**.5


@pytest.mark.parametrize('dim', [1, 3])
def test_other_dimensions(dim):
    "one Gaussian has closed forms in any dimension; in three the grid must still fit"
    d, l = GaussianMixture(torch.zeros(1, dim), 2.), torch.tensor([-3., 0., 3.], dtype=f64)
    assert d.entropy(fine=2.) == pytest.approx(dim / 2 * math.log(2 * math.pi * math.e), abs=1e-6)
    if dim < 3: torch.testing.assert_close(d.mmse(l), (-l).sigmoid(), rtol=1e-8, atol=0)
    assert d.eps_error(1., 1., fine=2.) == pytest.approx(.5, rel=1e-8)
    z = torch.randn(5, dim, dtype=f64)
    torch.testing.assert_close(d.denoise(z, .6, .8), .6 * z)


@few
@given(name, st.integers(0, 50), st.integers(0, 2**40), st.sampled_from(['train', 'test']))
def test_sample_is_a_function_of_its_arguments(name, n, seed, split):
    torch.manual_seed(seed % 7)
    state = torch.get_rng_state()
    x = SETS[name].sample(n, seed, split)
    assert x.shape == (n, 2) and x.dtype == torch.float32 and torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, DATASETS[name]().sample(n, seed, split))
    assert torch.equal(x, SETS[name].sample(n, seed, split, dtype=f64).float())


def test_streams_differ():
    draws = [tuple(SETS[n].sample(1, s, split)[0].tolist()) for n in SETS for s in range(20) for split in ('train', 'test')]
    assert len(set(draws)) == len(draws)


def test_train_and_test_are_independent():
    "the joint of paired train and test points has no correlation"
    for d in SETS.values():
        c = (d.train()[:, :, None] * d.test()[:, None, :]).mean(0)
        assert c.abs().max() < 5 / 50_000**.5


@pytest.mark.parametrize('args, error, words', [
    ((-1,), ValueError, 'at least 0'), ((2.5,), ValueError, 'whole number'), (('9',), TypeError, 'whole number'),
    ((True,), TypeError, 'whole number'), ((5, -1), ValueError, 'seed'), ((5, 'a'), TypeError, 'seed'),
    ((5, 0, 'tset'), ValueError, "Did you mean 'test'"), ((5, 0, None), ValueError, 'split')])
def test_sample_refuses(args, error, words):
    with pytest.raises(error, match=words): SETS['ring'].sample(*args)


@pytest.mark.parametrize('z, alpha, sigma', [
    (torch.zeros(4, 3), 1., 1.), (torch.zeros(2), 1., 1.), (torch.zeros(4, 2, dtype=torch.int64), 1., 1.), ([[0., 0.]], 1., 1.),
    (torch.zeros(4, 2), -1., 1.), (torch.zeros(4, 2), 1., math.nan), (torch.zeros(4, 2), math.inf, 1.), (torch.zeros(4, 2), 0., 0.),
    (torch.zeros(4, 2), torch.ones(3), 1.), (torch.zeros(4, 2), 1., torch.ones(4, 2)), (torch.zeros(2, 2), torch.ones(1, 2), 1.),
    (torch.zeros(3, 2), torch.tensor([1., 0., 1.]), torch.tensor([1., 0., 1.]))])
@pytest.mark.parametrize('method', METHODS)
def test_exact_methods_refuse(method, z, alpha, sigma):
    with pytest.raises(ValueError): getattr(THREE, method)(z, alpha, sigma)


@pytest.mark.parametrize('args', [
    ([[0., 0.]], 0.), ([[0., 0.]], -1.), ([[0., 0.]], math.nan), ([[math.inf, 0.]], 1.), ([0., 0.], 1.), ([], 1.), (torch.zeros(0, 2), 1.),
    ([[0., 0.], [1., 1.]], [1., 1., 1.]), ([[0., 0.], [1., 1.]], 1., [1.]), ([[0., 0.], [1., 1.]], 1., [1., -1.]),
    ([[0., 0.], [1., 1.]], 1., [0., 0.]), ([[0., 0.], [1., 1.]], torch.ones(2, 3))])
def test_mixture_refuses(args):
    with pytest.raises(ValueError): GaussianMixture(*args)


@pytest.mark.parametrize('bad', [math.nan, torch.tensor([0., math.nan]), torch.tensor([1, 2])])
def test_floors_refuse(bad):
    for f in (THREE.mmse, THREE.eps_floor):
        with pytest.raises(ValueError, match='logsnr'): f(bad)


def test_too_fine_a_grid_is_refused_before_it_is_made():
    with pytest.raises(ValueError, match='need a grid'): GaussianMixture([[0., 0.], [1., 1.]], 1e-7).entropy()
    with pytest.raises(ValueError, match='both be 0'): THREE.entropy(0., 0.)


@pytest.mark.parametrize('method', ['log_prob', 'log_prob_at', 'denoise', 'score', 'posterior_variance', 'entropy', 'eps_error', 'eps_floor', 'mmse'])
def test_samples_alone_have_no_floor(method):
    class Noise(Dataset):
        def draw(self, n, generator): return torch.randn(n, 2, generator=generator)
    assert not Noise().exact and THREE.exact and Noise().sample(3).shape == (3, 2)
    with pytest.raises(NoDensity, match="'noise' has samples but no exact density, so no floor"): getattr(Noise(), method)(torch.zeros(1, 2))


def test_wrong_draw_is_named():
    class Flat(Dataset):
        def draw(self, n, generator): return torch.zeros(n)
    with pytest.raises(ValueError, match="draw of data set 'flat'"): Flat().sample(3)
    with pytest.raises(NotImplementedError, match='draw'): Dataset().sample(3)


def test_import_is_light():
    code = "import sys, lfdm.data; print([m for m in ('scipy', 'matplotlib', 'fastcore', 'nbdev', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'
