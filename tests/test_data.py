"Attempts to break lfdm.data. What is right in the normal case is checked in nbs/library/50_data.ipynb."
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from lfdm.data import DATASETS, Dataset, GaussianMixture, NoDensity

torch.set_num_threads(1)
f32, f64, close = torch.float32, torch.float64, torch.testing.assert_close
SETS = {name: make() for name, make in DATASETS.items()}
PARTS = [[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3]
THREE = GaussianMixture(*PARTS)
METHODS = ['log_prob_at', 'denoise', 'score', 'posterior_variance']
each_method = pytest.mark.parametrize('method', METHODS)
each_set = pytest.mark.parametrize('d', SETS.values(), ids=SETS)
few = settings(max_examples=20, deadline=None)
names, seeds = st.sampled_from(sorted(SETS)), st.integers(0, 10**6)


def vp(logsnr): return [torch.tensor(s * logsnr, dtype=f64).sigmoid().sqrt() for s in (1, -1)]
def generator(seed): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=f64)


# ---- at any noise level

@few
@given(names, st.sampled_from(METHODS), st.integers(0, 5), st.floats(-60, 60))
def test_every_form_of_a_scale_gives_the_same(name, method, n, logsnr):
    "n runs through 2, the number of dimensions, where a wrong broadcast hides"
    z, scales = 2 * SETS[name].sample(n, dtype=f64), vp(logsnr)
    f = getattr(SETS[name], method)
    expected = f(z, *(a.item() for a in scales))
    assert expected.shape == ((n, 2) if method in ('denoise', 'score') else (n,))
    for shape in ((), (1,), (n,), (n, 1)):
        close(f(z, *(a.expand(shape) for a in scales)), expected, rtol=1e-12, atol=1e-12)


@each_method
@pytest.mark.parametrize('block', [1, 7, 100, 10**9])
def test_blocks_leave_no_seam(method, block):
    "and rows do not see each other: a block of 1 is one row"
    cut = GaussianMixture(*PARTS)
    cut.block = block
    z, u = randn(50, 2), torch.linspace(.01, .99, 50, dtype=f64)[:, None]
    for scales in ((u, 1 - u), (u[:, 0], torch.tensor(.5)), (.3, .7)):
        close(getattr(cut, method)(z, *scales), getattr(THREE, method)(z, *scales), rtol=1e-12, atol=1e-12)


@few
@given(names, st.floats(-80, 80), st.floats(0, 12))
def test_finite_and_bounded_everywhere(name, logsnr, log10_far):
    d, scales = SETS[name], vp(logsnr)
    z = torch.tensor([[10**log10_far, -1.], [0., 0.], [-3., 10**log10_far]], dtype=f64)
    for method in METHODS: assert getattr(d, method)(z, *scales).isfinite().all(), method
    v = d.posterior_variance(z, *scales)
    assert (v >= 0).all() and (v <= d.means.abs().max()**2 * 4 + 1).all()
    close(d.denoise(z, 1., 0.), z)   # without noise the data are known exactly


@few
@given(names, st.floats(-10, 10), seeds)
def test_exact_quantities_against_independent_forms(name, logsnr, seed):
    "torch.distributions; autograd; Tweedie; the variance as the denoiser's slope, σ²/α dE[x|z]/dz"
    d, (alpha, sigma) = SETS[name], vp(logsnr)
    z = (alpha * d.sample(1, seed, dtype=f64) + sigma * randn(1, 2, seed=seed)).requires_grad_()
    tau = (alpha**2 * d.stds**2 + sigma**2).sqrt()
    q = MixtureSameFamily(Categorical(d.weights), Independent(Normal(alpha * d.means, tau), 1))
    log_q = d.log_prob_at(z, alpha, sigma)
    close(log_q, q.log_prob(z))
    score, = torch.autograd.grad(log_q.sum(), z)
    close(d.score(z, alpha, sigma), score, rtol=1e-8, atol=1e-8)
    close(alpha * d.denoise(z, alpha, sigma), z + sigma**2 * score, rtol=1e-8, atol=1e-8)
    slope = torch.autograd.functional.jacobian(lambda z: d.denoise(z, alpha, sigma).sum(0), z)[:, 0]
    variance = sigma**2 / alpha * slope.diagonal().mean()[None]
    close(d.posterior_variance(z, alpha, sigma), variance, rtol=1e-7, atol=1e-12)


@each_method
def test_float32_in_float32_out_float64_inside(method):
    z, f = THREE.sample(20), getattr(THREE, method)
    for scales in map(vp, (-8., 0., 8.)): assert torch.equal(f(z, *scales), f(z.double(), *scales).to(f32))


# ---- mixtures and their floors

ROW = st.tuples(*[st.floats(-50, 50)] * 2, *[st.floats(.05, 5)] * 2, st.floats(.01, 1))


@few
@given(st.lists(ROW, min_size=1, max_size=6))
def test_any_mixture_is_standardized_exactly_and_can_be_taken_back(rows):
    a = torch.tensor(rows, dtype=f64)
    d = GaussianMixture(a[:, :2], a[:, 2:4], a[:, 4])
    close(d.weights @ d.means, torch.zeros(2, dtype=f64), rtol=0, atol=1e-10)
    close(d.weights @ (d.means**2 + d.stds**2), torch.ones(2, dtype=f64), rtol=1e-10, atol=0)
    close(d.means * d.scale + d.shift, a[:, :2], rtol=1e-10, atol=1e-10)
    close(d.stds * d.scale, a[:, 2:4], rtol=1e-10, atol=1e-10)


@each_set
def test_floors_obey_their_bounds_and_limits(d):
    l = torch.linspace(-20, 25, 400, dtype=f64)
    ends = torch.tensor([-math.inf, math.inf, -700., 700.], dtype=f64)
    x, e = d.mmse(l), d.eps_floor(l)
    assert (x >= 0).all() and (x <= (-l).sigmoid() * (1 + 1e-6)).all()   # not above the linear denoiser
    assert (x.diff() < 0).all()                                          # more signal, less error
    close(e, l.exp() * x)
    assert d.mmse(ends)[:2].tolist() == [1, 0] and d.eps_floor(ends)[:2].tolist() == [0, 1]
    assert d.mmse(ends).isfinite().all() and d.eps_floor(ends).isfinite().all()


@few
@given(names, st.floats(-14.5, 15.5))
def test_table_is_the_quadrature_and_the_quadrature_has_converged(name, logsnr):
    d, (alpha, sigma) = SETS[name], [a.item() for a in vp(logsnr)]
    direct = d.eps_error(alpha, sigma)
    assert d.eps_floor(logsnr).item() == pytest.approx(direct, rel=2e-6)
    assert d.eps_error(3 * alpha, 3 * sigma, fine=6) == pytest.approx(direct, rel=1e-6)


def test_table_reaches_as_far_as_narrow_components_need():
    "to its last point, where it is the quadrature itself; with one interval less it would be 6e-10 off"
    d = GaussianMixture([[-1., 0.], [1., .5], [0., 1.]], .005)
    last = -14 + math.ceil(16 * (23 - 2 * d.stds.min().log().item())) / 16
    for logsnr, tolerance in ((9., 1e-6), (17., 1e-6), (last + 3, 1e-6), (last, 1e-11)):
        direct = d.eps_error(*(a.item() for a in vp(logsnr)))
        assert d.eps_floor(logsnr).item() == pytest.approx(direct, rel=tolerance)


@pytest.mark.parametrize('dim', [1, 3])
def test_other_dimensions(dim):
    "one Gaussian has closed forms in any dimension; in three the grid must still fit"
    d, l = GaussianMixture(torch.zeros(1, dim), 2.), torch.tensor([-3., 0., 3.], dtype=f64)
    assert d.entropy(fine=2.) == pytest.approx(dim / 2 * math.log(2 * math.pi * math.e), abs=1e-6)
    if dim < 3: close(d.mmse(l), (-l).sigmoid(), rtol=1e-8, atol=0)
    assert d.eps_error(1., 1., fine=2.) == pytest.approx(.5, rel=1e-8)
    z = randn(5, dim)
    close(d.denoise(z, .6, .8), .6 * z)


# ---- samples

@few
@given(names, st.integers(0, 50), st.integers(0, 2**40), st.sampled_from(['train', 'test']))
def test_sample_is_a_function_of_its_arguments(name, n, seed, split):
    torch.manual_seed(seed % 7)
    state = torch.get_rng_state()
    x = SETS[name].sample(n, seed, split)
    assert x.shape == (n, 2) and x.dtype == f32 and torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, DATASETS[name]().sample(n, seed, split, dtype=f64).float())


def test_streams_differ():
    draws = {tuple(d.sample(1, seed, split)[0].tolist())
             for d in SETS.values() for seed in range(20) for split in ('train', 'test')}
    assert len(draws) == len(SETS) * 40


# ---- what is refused

@pytest.mark.parametrize('args, error, words', [
    ((-1,), ValueError, 'at least 0'), ((2.5,), ValueError, 'whole number'),
    (('9',), TypeError, 'whole number'),
    ((True,), TypeError, 'whole number'), ((5, -1), ValueError, 'seed'), ((5, 'a'), TypeError, 'seed'),
    ((5, 0, 'tset'), ValueError, "Did you mean 'test'"), ((5, 0, None), ValueError, 'split')])
def test_sample_refuses(args, error, words):
    with pytest.raises(error, match=words): SETS['ring'].sample(*args)


Z, ONES = torch.zeros(4, 2), torch.ones(4, 2)


@pytest.mark.parametrize('z, alpha, sigma, words', [
    (torch.zeros(4, 3), 1., 1., 'shape'), (torch.zeros(2), 1., 1., 'shape'),
    (Z.long(), 1., 1., 'floating-point'),
    ([[0., 0.]], 1., 1., 'floating-point tensor'), (Z, -1., 1., 'alpha'), (Z, 1., math.nan, 'sigma'),
    (Z, math.inf, 1., 'alpha'), (Z, 0., 0., 'both'), (Z, torch.ones(3), 1., 'one number per example'),
    (Z, 1., ONES, 'one number per example'), (Z[:2], ONES[:1], 1., 'one number per example'),
    (Z[:2], torch.tensor([1., 0.]), torch.tensor([1., 0.]), 'both')])
@each_method
def test_exact_methods_refuse(method, z, alpha, sigma, words):
    with pytest.raises(ValueError, match=words): getattr(THREE, method)(z, alpha, sigma)


TWO = [[0., 0.], [1., 1.]]


@pytest.mark.parametrize('args, words', [
    ((TWO, 0.), 'std must be finite and greater than 0'), ((TWO, -1.), 'std'), ((TWO, math.nan), 'std'),
    (([[math.inf, 0.]], 1.), 'means must be finite'), (([0., 0.], 1.), 'K, D'), (([], 1.), 'K, D'),
    ((torch.zeros(0, 2), 1.), 'K, D'), ((TWO, [1.] * 3), 'std must be a number'),
    ((TWO, 1., [1.]), 'weights'),
    ((TWO, 1., [1., -1.]), 'weights'), ((TWO, 1., [0., 0.]), 'weights'), ((TWO, torch.ones(2, 3)), 'std')])
def test_mixture_refuses(args, words):
    with pytest.raises(ValueError, match=words): GaussianMixture(*args)


@pytest.mark.parametrize('call, words', [
    (lambda: THREE.mmse(math.nan), 'logsnr'),
    (lambda: THREE.eps_floor(torch.tensor([0., math.nan])), 'logsnr'),
    (lambda: THREE.eps_floor(torch.tensor([1, 2])), 'logsnr'), (lambda: THREE.entropy(0., 0.), 'both be 0'),
    (lambda: GaussianMixture(TWO, 1e-7).entropy(), 'need a grid')])
def test_floors_refuse(call, words):
    with pytest.raises(ValueError, match=words): call()


EXACT = [*METHODS, 'log_prob', 'entropy', 'eps_error', 'eps_floor', 'mmse']


@pytest.mark.parametrize('method', EXACT)
def test_samples_alone_have_no_floor(method):
    class Noise(Dataset):
        def draw(self, n, generator): return torch.randn(n, 2, generator=generator)
    assert not Noise().exact and THREE.exact and Noise().sample(3).shape == (3, 2)
    with pytest.raises(NoDensity, match="'noise' has samples but no exact density"):
        getattr(Noise(), method)(Z)


def test_wrong_draw_is_named():
    class Flat(Dataset):
        def draw(self, n, generator): return torch.zeros(n)
    with pytest.raises(ValueError, match="draw of data set 'flat'"): Flat().sample(3)
    with pytest.raises(NotImplementedError, match='draw'): Dataset().sample(3)


def test_import_does_not_load_scipy():
    code = "import sys, lfdm.data; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'False'
