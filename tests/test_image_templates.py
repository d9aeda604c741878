"Attempts to break lfdm.images.templates: tails, extremes of noise, blocks, forms of scales."
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.images.data import dequantize, scaled
from lfdm.images.templates import Templates, cell_integrals, log_cell

torch.set_num_threads(1)
f64 = torch.float64
SMALL = dict(n_train=300, n_test=100)
TEMPLATES = Templates(**SMALL)
BYTES = torch.arange(256, dtype=torch.uint8)
few = settings(max_examples=20, deadline=None)
scales = lambda logsnr: [(l * torch.tensor(logsnr, dtype=f64)).sigmoid().sqrt() for l in (1, -1)]
near = lambda a, b, tol: torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def noisy(n): return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=f64)


@pytest.mark.parametrize('low, high', [
    (-40, -39.96), (-.02, .02), (39.96, 40), (-float('inf'), -30)])
def test_a_cell_far_out_keeps_its_logarithm(low, high):
    import mpmath
    a, b = (low, high) if high < 0 else (-high, -low)
    with mpmath.workdps(60): exact = float(mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a)))
    found = log_cell(torch.tensor(low, dtype=f64), torch.tensor(high, dtype=f64))
    assert found.item() == pytest.approx(exact, rel=1e-12)


@few
@given(st.floats(-1.2, 1.2), st.floats(-20, 20))
def test_cells_add_up(z, logsnr):
    "The sum over cells is the integral over the whole range, and the mean of each cell lies in it."
    (alpha, sigma), L = scales(logsnr), 256
    log_factor, density, moment = cell_integrals(alpha * z, alpha, sigma, L)
    ends = (alpha * (torch.tensor([-1., 1.], dtype=f64) - z)) / sigma
    assert (density >= 0).all() and (moment.abs() <= density / L * (1 + 1e-9) + 1e-12).all()
    near((density.sum() * 2 / L).log() + log_factor, log_cell(*ends) - alpha.log(), 1e-9)


@pytest.mark.parametrize('omega', [3e-3, 9e-3, .5])   # the series holds below 1e-2
def test_cells_agree_with_quadrature(omega):
    h, sigma, z = 2 / 16, .6, .31
    alpha, (nodes, weights) = omega * sigma / h, np.polynomial.legendre.leggauss(40)
    middles = np.arange(16)[:, None] * h + h / 2 - 1
    x = middles + nodes * h / 2
    p = np.exp(-((z - alpha * x) / sigma)**2 / 2) / sigma / (2 * np.pi)**.5
    log_factor, density, moment = cell_integrals(torch.tensor(z, dtype=f64), alpha, sigma, 16)
    for found, exact in ((density, p @ weights / 2), (moment, (p * (x - middles)) @ weights / 2)):
        torch.testing.assert_close(found * log_factor.exp(), torch.from_numpy(exact), rtol=1e-8, atol=0)


@pytest.mark.parametrize('name', ['denoise', 'log_prob_at'])
def test_rows_do_not_see_each_other_nor_the_form_of_scales(name):
    cut, z, (alpha, sigma) = Templates(**SMALL), noisy(5), scales([-12., -7., 0., 5., 30.])
    z[3] *= 1e4   # so far out that another form is taken
    f = getattr(cut, name)
    alone = torch.cat([f(z[i:i + 1], alpha[i].item(), sigma[i].item()) for i in range(5)])
    for cut.block in (1, 3 * 64 * 256): near(f(z, alpha, sigma), alone, 1e-11)
    near(f(z, alpha.view(5, 1, 1, 1), sigma), alone, 1e-11)
    assert len(f(z[:0], .6, .8)) == 0


@few
@given(st.floats(-40, 40), st.floats(0, 8), st.floats(.05, 1))
def test_finite_and_bounded_everywhere(logsnr, log10_far, std):
    (alpha, sigma), t = scales(logsnr), Templates(std)
    z = torch.tensor([10**log10_far, -10**log10_far, 0.], dtype=f64).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    x_hat = t.denoise(z, alpha, sigma)
    assert t.log_prob_at(z, alpha, sigma).isfinite().all() and x_hat.abs().max() <= 1 + 1e-9


def test_the_two_ends_of_noise():
    x = dequantize(TEMPLATES.test()[:20], 256, torch.Generator().manual_seed(0)).double()
    near(TEMPLATES.denoise(x, 1., 1e-6), x, 1e-5)
    exact = TEMPLATES.weights @ (TEMPLATES.log_cells.exp() @ scaled(BYTES, 256).double())
    near(TEMPLATES.denoise(x, 0., 1.).flatten(1), exact.expand(20, -1), 1e-12)   # nothing is known of x
    for dtype, least in ((f64, f64), (torch.bfloat16, torch.float32)):
        z = x.to(dtype)
        assert TEMPLATES.denoise(z, .8, .6).dtype == dtype
        log_q = TEMPLATES.log_prob_at(z, .01, 1e-4)   # float16 could not hold it
        assert log_q.dtype == least and log_q.isfinite().all()


def test_probabilities_of_every_image_are_finite_and_add_up():
    t, others = Templates(.05), torch.arange(64) != 27
    b = t.test()[:1].repeat(256, 1, 1, 1)
    assert t.log_prob(torch.stack([0 * b[0], 0 * b[0] + 255])).isfinite().all()
    b[:, 0, 3, 3] = BYTES      # one pixel through all its values: the others' marginal probability
    pixels = b[0].flatten()[others].long().expand(4, -1)[..., None]
    marginal = (t.log_cells[:, others].gather(2, pixels).sum((1, 2)) + t.weights.log()).logsumexp(0)
    near(t.log_prob(b).logsumexp(0), marginal, 1e-12)


def test_template_streams():
    assert TEMPLATES.digest == Templates(**SMALL).digest
    assert not TEMPLATES.train()[:100].equal(TEMPLATES.test())
    t = Templates()
    pixels = scaled(t.train()[t.labels() == 3], 256).double().mean(0).flatten()
    assert (pixels - t.log_cells.exp()[3] @ scaled(BYTES, 256).double()).abs().max() < 5 * .2 / 800**.5


def test_arguments_that_do_not_fit():
    z, three = torch.zeros(2, 1, 8, 8), torch.ones(3)
    for call, *arguments, said in [
            (TEMPLATES.denoise, z[:, 0], 1., 1., 'shape .n, 1, 8, 8'),
            (TEMPLATES.denoise, z, three, 1., 'not one number per'),
            (TEMPLATES.log_prob_at, z, 1., torch.zeros(2), 'must be finite and'),
            (TEMPLATES.log_prob, z.to(torch.uint8)[..., :7], 'shape'),
            (TEMPLATES.bits_per_dim, z[:1].to(torch.uint8), 'n from 2'),
            (log_cell, 1., 1., 'low must be below high'), (log_cell, three[:2], three * 3, 'not broadcast'),
            (cell_integrals, z, three, 1., 16, 'alpha .3,.'), (Templates, .01, 'must be')]:
        with pytest.raises((ValueError, TypeError), match=said): call(*arguments)
