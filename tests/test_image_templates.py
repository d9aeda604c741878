"Attempts to break lfdm.images.templates: tails, extremes of noise, blocks, forms of scales, wrong input."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.images.data import dequantize, scaled
from lfdm.images.templates import Templates, cell_integrals, log_cell

torch.set_num_threads(1)
f64 = torch.float64
TEMPLATES = Templates(n_train=300, n_test=100)
BYTES = torch.arange(256, dtype=torch.uint8)
few = settings(max_examples=20, deadline=None)
gen = lambda seed=0: torch.Generator().manual_seed(seed)
scales = lambda logsnr: [(l * torch.tensor(logsnr, dtype=f64)).sigmoid().sqrt() for l in (1, -1)]


@pytest.mark.parametrize('low, high', [
    (-40, -39.96), (-8, -7.9), (-.02, .02), (39.96, 40), (-float('inf'), -30), (30, float('inf'))])
def test_a_cell_far_out_keeps_its_logarithm(low, high):
    import mpmath
    with mpmath.workdps(60):
        a, b = (low, high) if high < 0 else (-high, -low)
        exact = float(mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a)))
    value = log_cell(torch.tensor(low, dtype=f64), torch.tensor(high, dtype=f64))
    assert value.item() == pytest.approx(exact, rel=1e-12)


@few
@given(st.floats(-1.2, 1.2), st.floats(-20, 20))
def test_cells_add_up(z, logsnr):
    "The sum over cells is the integral over the whole range, and the mean of each cell lies in it."
    (alpha, sigma), L = scales(logsnr), 256
    z = alpha * z
    log_factor, density, moment = cell_integrals(z, alpha, sigma, L)
    ends = (alpha * torch.tensor([-1., 1.], dtype=f64) - z) / sigma
    total = log_cell(*ends) - alpha.log()
    assert (density >= 0).all() and (moment.abs() <= density / L * (1 + 1e-9) + 1e-12).all()
    torch.testing.assert_close((density.sum() * 2 / L).log() + log_factor, total, rtol=1e-9, atol=1e-9)


@few
@given(st.integers(0, 5), st.floats(-30, 30))
def test_every_form_of_a_scale_gives_the_same(n, logsnr):
    alpha, sigma = scales(logsnr)
    z = torch.randn(n, 1, 8, 8, generator=gen(), dtype=f64)
    for f, like in ((TEMPLATES.denoise, z.shape), (TEMPLATES.log_prob_at, (n,))):
        expected = f(z, alpha.item(), sigma.item())
        assert expected.shape == like
        for shape in ((), (1,), (n,), (n, 1, 1, 1)):
            found = f(z, alpha.expand(shape), sigma.expand(shape))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['denoise', 'log_prob_at'])
def test_rows_do_not_see_each_other_and_blocks_leave_no_seam(name):
    cut = Templates(n_train=300, n_test=100)
    z = torch.randn(5, 1, 8, 8, generator=gen(), dtype=f64)
    z[3] *= 1e4   # so far out that another form is taken
    alpha, sigma = scales([-12., -7., 0., 5., 30.])
    f = getattr(cut, name)
    alone = torch.cat([f(z[i:i + 1], alpha[i].item(), sigma[i].item()) for i in range(5)])
    for cut.block in (1, 3 * 64 * 256, 10**9):
        torch.testing.assert_close(f(z, alpha, sigma), alone, rtol=1e-11, atol=1e-11)


@few
@given(st.floats(-40, 40), st.floats(0, 8), st.floats(.05, 1))
def test_finite_and_bounded_everywhere(logsnr, log10_far, std):
    (alpha, sigma), t = scales(logsnr), Templates(std)
    z = torch.tensor([10**log10_far, -10**log10_far, 0.], dtype=f64).view(3, 1, 1, 1).expand(3, 1, 8, 8)
    x_hat = t.denoise(z, alpha, sigma)
    assert t.log_prob_at(z, alpha, sigma).isfinite().all() and x_hat.abs().max() <= 1 + 1e-9


def test_the_two_ends_of_noise():
    x = dequantize(TEMPLATES.test()[:20], 256, gen()).double()
    assert (TEMPLATES.denoise(x, 1., 1e-6) - x).abs().max() < 1e-5
    mean = TEMPLATES.denoise(x, 0., 1.)   # nothing is known of x
    exact = TEMPLATES.weights @ (TEMPLATES.log_cells.exp() @ scaled(BYTES, 256).double())
    torch.testing.assert_close(mean.flatten(1), exact.expand(20, -1), rtol=0, atol=1e-12)
    assert TEMPLATES.denoise(x.float(), .8, .6).dtype == torch.float32


@pytest.mark.parametrize('std', [.05, .2, 1.])
def test_probabilities_of_every_image_are_finite_and_add_up(std):
    t, others = Templates(std), torch.arange(64) != 27
    ends = torch.stack([torch.zeros(1, 8, 8), torch.full((1, 8, 8), 255)]).to(torch.uint8)
    assert t.log_prob(ends).isfinite().all()
    b = t.test()[:1].repeat(256, 1, 1, 1)
    b[:, 0, 3, 3] = BYTES      # one pixel through all its values: the others' marginal probability
    pixels = b[0].flatten()[others].long().expand(4, -1)[..., None]
    marginal = (t.log_cells[:, others].gather(2, pixels).sum((1, 2)) + t.weights.log()).logsumexp(0)
    torch.testing.assert_close(t.log_prob(b).logsumexp(0), marginal, rtol=1e-12, atol=1e-12)


def test_template_streams():
    assert TEMPLATES.digest == Templates(n_train=300, n_test=100).digest
    assert not TEMPLATES.train()[:100].equal(TEMPLATES.test()) and TEMPLATES.exact
    t = Templates()
    share = t.labels().bincount() / 8000
    assert ((share - t.weights).abs() < 4 * (t.weights * (1 - t.weights) / 8000).sqrt()).all()
    pixels = scaled(t.train()[t.labels() == 3], 256).double().mean(0).flatten()
    assert (pixels - t.log_cells.exp()[3] @ scaled(BYTES, 256).double()).abs().max() < 5 * .2 / 800**.5


def test_wrong_input():
    z = torch.zeros(2, 1, 8, 8)
    for bad in (torch.zeros(2, 8, 8), torch.zeros(2, 3, 8, 8), z.to(torch.uint8), 3.):
        with pytest.raises(ValueError, match="tensor of shape .n, 1, 8, 8"): TEMPLATES.denoise(bad, 1., 1.)
    for alpha, sigma in ((1., 0.), (-1., 1.), (1., float('inf')), (float('nan'), 1.), (1., torch.zeros(2))):
        with pytest.raises(ValueError, match='must be finite and'): TEMPLATES.log_prob_at(z, alpha, sigma)
    with pytest.raises(ValueError, match='not one number per'): TEMPLATES.denoise(z, torch.ones(3), 1.)
    with pytest.raises(TypeError, match='uint8'): TEMPLATES.log_prob(z)
    with pytest.raises(ValueError, match='shape'): TEMPLATES.log_prob(z.to(torch.uint8)[..., :7])
    for bad in (dict(std=.01), dict(std=2), dict(n_train=0), dict(n_test=.5)):
        with pytest.raises(ValueError, match='must be'): Templates(**bad)
