"Attempts to break lfdm.images.templates: tails, extremes of noise, blocks, forms of scales, wrong input."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.images.data import dequantize, scaled
from lfdm.images.templates import Templates, cell_integrals, log_cell

torch.set_num_threads(1)
f64 = torch.float64
TEMPLATES = Templates(n_train=300, n_test=100)
few = settings(max_examples=20, deadline=None)
gen = lambda seed=0: torch.Generator().manual_seed(seed)


def vp(logsnr): return torch.tensor(logsnr, dtype=f64).sigmoid().sqrt(), torch.tensor(-logsnr, dtype=f64).sigmoid().sqrt()


def test_a_cell_far_out_keeps_its_logarithm():
    import mpmath
    mpmath.mp.dps = 60
    for low, high in ((-40, -39.96), (-8, -7.9), (-.02, .02), (7.9, 8), (39.96, 40), (-float('inf'), -30), (30, float('inf')), (-1e-3, 1e-3)):
        exact = mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low)) if high < 0 else mpmath.log(mpmath.ncdf(-low) - mpmath.ncdf(-high))
        assert log_cell(torch.tensor(low, dtype=f64), torch.tensor(high, dtype=f64)).item() == pytest.approx(float(exact), rel=1e-12)


@few
@given(st.floats(-1.2, 1.2), st.floats(-20, 20))
def test_cells_add_up(z, logsnr):
    "The sum over cells is the integral over the whole range, and the moment that of x."
    (alpha, sigma), L = vp(logsnr), 256
    z = alpha * z
    log_factor, density, moment = cell_integrals(z, alpha, sigma, L)
    ends = (alpha * torch.tensor([-1., 1.], dtype=f64) - z) / sigma
    total = log_cell(*ends) - alpha.log()
    assert (density >= 0).all()
    torch.testing.assert_close((density.sum() * 2 / L).log() + log_factor, total, rtol=1e-9, atol=1e-9)
    assert (moment.abs() <= density / L * (1 + 1e-9) + 1e-12).all()   # the mean of each cell lies in it


@few
@given(st.integers(0, 5), st.floats(-30, 30))
def test_every_form_of_a_scale_gives_the_same(n, logsnr):
    alpha, sigma = vp(logsnr)
    z = torch.randn(n, 1, 8, 8, generator=gen(), dtype=f64)
    for f in (TEMPLATES.denoise, TEMPLATES.log_prob_at):
        expected = f(z, alpha.item(), sigma.item())
        assert expected.shape == (z.shape if f == TEMPLATES.denoise else (n,))
        for shape in ((), (1,), (n,), (n, 1, 1, 1)):
            torch.testing.assert_close(f(z, alpha.expand(shape), sigma.expand(shape)), expected, rtol=1e-12, atol=1e-12)


def test_rows_do_not_see_each_other_and_blocks_leave_no_seam():
    cut = Templates(n_train=300, n_test=100)
    z, l = torch.randn(5, 1, 8, 8, generator=gen(), dtype=f64), torch.tensor([-12., -7., 0., 5., 30.], dtype=f64)
    z[3] *= 1e4   # so far out that another form is taken
    alpha, sigma = l.sigmoid().sqrt(), (-l).sigmoid().sqrt()
    for name in ('denoise', 'log_prob_at'):
        alone = torch.cat([getattr(cut, name)(z[i:i + 1], alpha[i].item(), sigma[i].item()) for i in range(5)])
        for cut.block in (1, 3 * 64 * 256, 10**9): torch.testing.assert_close(getattr(cut, name)(z, alpha, sigma), alone, rtol=1e-11, atol=1e-11)
        cut.block = Templates.block


@few
@given(st.floats(-40, 40), st.floats(0, 8), st.floats(.05, 1))
def test_finite_and_bounded_everywhere(logsnr, log10_far, std):
    (alpha, sigma), t = vp(logsnr), Templates(std)
    z = torch.stack([torch.full((1, 8, 8), v, dtype=f64) for v in (10**log10_far, -10**log10_far, 0.)])
    x_hat = t.denoise(z, alpha, sigma)
    assert t.log_prob_at(z, alpha, sigma).isfinite().all() and x_hat.isfinite().all() and x_hat.abs().max() <= 1 + 1e-9


def test_the_two_ends_of_noise():
    b = TEMPLATES.test()[:20]
    x = dequantize(b, 256, gen()).double()
    assert (TEMPLATES.denoise(x, 1., 1e-6) - x).abs().max() < 1e-5
    mean = TEMPLATES.denoise(x, 0., 1.)   # nothing is known of x
    assert (mean - mean[0]).abs().max() < 1e-12
    exact = TEMPLATES.weights @ (TEMPLATES.log_cells.exp() @ scaled(torch.arange(256, dtype=torch.uint8), 256).double())
    torch.testing.assert_close(mean[0].flatten(), exact, rtol=0, atol=1e-12)
    assert TEMPLATES.denoise(x.float(), .8, .6).dtype == torch.float32


def test_probabilities_of_every_image_are_finite_and_add_up():
    for std in (.05, .2, 1.):
        t = Templates(std)
        for value in (0, 255): assert t.log_prob(torch.full((1, 1, 8, 8), value, dtype=torch.uint8)).isfinite().all()
        b = t.test()[:1].repeat(256, 1, 1, 1)
        b[:, 0, 3, 3] = torch.arange(256, dtype=torch.uint8)      # one pixel through all its values: the others' marginal probability
        one = (t.log_cells[:, torch.arange(64) != 27].gather(2, b[:1].flatten(1)[:, torch.arange(64) != 27].long().expand(4, -1)[..., None]).sum((1, 2)) + t.weights.log()).logsumexp(0)
        torch.testing.assert_close(t.log_prob(b).logsumexp(0), one, rtol=1e-12, atol=1e-12)


def test_template_streams():
    assert TEMPLATES.digest == Templates(n_train=300, n_test=100).digest and not TEMPLATES.train()[:100].equal(TEMPLATES.test())
    assert TEMPLATES.labels().max() == 3 and TEMPLATES.exact and (TEMPLATES.n_train, TEMPLATES.n_test, TEMPLATES.shape) == (300, 100, (1, 8, 8))
    big = Templates()
    share = big.labels().bincount() / 8000
    assert ((share - big.weights).abs() < 4 * (big.weights * (1 - big.weights) / 8000).sqrt()).all()
    pixels = scaled(big.train()[big.labels() == 3], 256).double().mean(0)
    assert (pixels - (big.log_cells.exp()[3] @ scaled(torch.arange(256, dtype=torch.uint8), 256).double()).reshape(1, 8, 8)).abs().max() < 5 * .2 / 800**.5


def test_wrong_input_of_the_templates():
    z = torch.zeros(2, 1, 8, 8)
    for bad in (torch.zeros(2, 8, 8), torch.zeros(2, 3, 8, 8), z.to(torch.uint8), 3.):
        with pytest.raises(ValueError, match=r'tensor of shape \(n, 1, 8, 8\)'): TEMPLATES.denoise(bad, 1., 1.)
    for alpha, sigma in ((1., 0.), (-1., 1.), (1., float('inf')), (float('nan'), 1.), (1., torch.zeros(2))):
        with pytest.raises(ValueError, match='must be finite and'): TEMPLATES.log_prob_at(z, alpha, sigma)
    with pytest.raises(ValueError, match='not one number per example'): TEMPLATES.denoise(z, torch.ones(3), 1.)
    with pytest.raises(TypeError, match='uint8'): TEMPLATES.log_prob(z)
    with pytest.raises(ValueError, match='shape'): TEMPLATES.log_prob(torch.zeros(2, 1, 8, 9, dtype=torch.uint8))
    for bad in (dict(std=0), dict(std=.01), dict(std=2), dict(n_train=0), dict(n_test=.5)):
        with pytest.raises(ValueError, match='must be'): Templates(**bad)
