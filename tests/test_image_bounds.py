"Bits per dimension of images: bounds against known probabilities, batches, wrong input."
import math

import pytest
import torch

from lfdm.core import expand
from lfdm.images.data import dequantize, scaled
from lfdm.images.templates import Templates
from lfdm.likelihood import discrete_reconstruction, flow_bits_per_dim, image_bound
from lfdm.schedules import SCHEDULES
from lfdm.steps import exact_denoiser

torch.set_num_threads(1)
f64 = torch.float64


def generator(seed=0): return torch.Generator().manual_seed(seed)


class Pixels:
    "Bytes of L levels, independent, with known probabilities; the exact denoiser of their middles."
    def __init__(self, levels=4):
        self.p, self.shape = torch.linspace(1, 3, levels, dtype=f64), (1, 2, 2)
        self.p /= self.p.sum()
        self.middles = scaled(torch.arange(levels, dtype=torch.uint8), levels).double()

    def draw(self, n):
        drawn = torch.multinomial(self.p, n * 4, True, generator=generator())
        return drawn.view(n, *self.shape).to(torch.uint8)

    def log_prob(self, images): return self.p.log()[images.long()].flatten(1).sum(1)

    def denoise(self, z, alpha, sigma):
        error = (z[..., None] - expand(alpha, z)[..., None] * self.middles) / expand(sigma, z)[..., None]
        return (self.p.log() - error**2 / 2).softmax(-1) @ self.middles


PIXELS = Pixels()
def truth(s, images): return -s.log_prob(images) / (images[0].numel() * math.log(2))
def zero(gap, n=4): return abs(gap.mean()) < n * gap.std() / len(gap)**0.5
def bound_of(images, denoiser=None, levels=4, **options):
    "The bound of whole bytes, with 30 draws."
    options = dict(draws=30, decoder="discrete", dtype=f64) | options
    return image_bound(denoiser or exact_denoiser(PIXELS), images, levels, **options)


@pytest.mark.parametrize("levels", [2, 5])
def test_whole_bytes_at_the_optimum(levels):
    s = Pixels(levels)
    images = s.draw(1500)
    bound = bound_of(images, exact_denoiser(s), levels, schedule=SCHEDULES["cosine"](-10, 10), draws=40)
    assert bound.offset == 0 and bound.reconstruction.max() < 1e-5 and bound.report()["se"] < 0.05
    assert zero(bound.total - truth(s, images))


def test_dequantized_images_at_the_optimum():
    class Coarse(Templates): name, levels = "coarse", 8
    s, schedule = Coarse(), SCHEDULES["cosine"](-12.9, 11)
    images, denoiser = s.test()[:40], exact_denoiser(s)
    bound = image_bound(denoiser, images, 8, schedule, draws=64, dtype=f64)
    assert bound.offset == 2 and zero(bound.total - truth(s, images)) and bound.report()["se"] < 0.1
    flow = flow_bits_per_dim(denoiser, images[:16], 8, schedule, dtype=f64, rtol=1e-3, atol=1e-3)
    assert abs((flow - truth(s, images[:16])).mean()) < 0.05


def test_a_worse_denoiser_has_a_larger_bound():
    images, exact = PIXELS.draw(800), exact_denoiser(PIXELS)
    def off(z, level):
        x_hat, eps_hat = exact(z, level)
        return x_hat, 0.8 * eps_hat
    assert bound_of(images, off).total.mean() > bound_of(images, exact).total.mean() + 0.5


def test_one_bound_whatever_the_batches():
    images, calls = PIXELS.draw(101), []
    note = lambda *a: calls.append(a)
    at = lambda batch, seed=3: bound_of(images, seed=seed, batch_size=batch, progress=note)
    whole, parts = at(500), at(25)
    assert calls == [("bound", 101, 101)] + [("bound", n, 101) for n in (21, 41, 61, 81, 101)]
    assert len(parts.total) == 101 and zero(whole.total - parts.total)
    assert torch.equal(at(500).total, whole.total) and not torch.equal(at(500, seed=4).total, whole.total)
    report = whole.report()
    terms = sum(report[k] for k in ("prior", "diffusion", "reconstruction", "offset"))
    assert report["total"] == pytest.approx(terms) and report["n"] == 101
    assert math.isnan(bound_of(images[:1], draws=2).report()["se"])


@pytest.mark.parametrize("logsnr, low, high", [(-5., 1.9, 2.081), (1., 0, 2.08), (20., 0, 1e-4)])
def test_the_discrete_decoder_is_a_distribution(logsnr, low, high):
    "Its cost is a posterior's under a flat prior: at most log L on average over the levels, 0 without noise."
    b = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 1, 40, 40)
    level = SCHEDULES["cosine"](-20, 20).level_at(torch.tensor(logsnr, dtype=f64))
    cost = discrete_reconstruction(b, 8, level) / 1600
    assert cost.min() > -1e-9 and low <= cost.mean() < high


@pytest.mark.parametrize("f", [image_bound, flow_bits_per_dim])
def test_wrong_images_and_choices(f):
    denoiser, images = exact_denoiser(PIXELS), PIXELS.draw(4)
    with pytest.raises(TypeError, match="quantize"): f(denoiser, dequantize(images, 4), 4)
    for wrong, said in ((images[:0], "too few"), (images + 4, "4 levels"), (images[0], "shape")):
        with pytest.raises(ValueError, match=said): f(denoiser, wrong, 4)
    for option in (dict(levels=1), dict(batch_size=0), dict(schedule="cosin")):
        options = dict(levels=4) | option
        with pytest.raises(ValueError, match=next(iter(option))): f(denoiser, images, **options)


def test_wrong_choices_of_one():
    denoiser, images = exact_denoiser(PIXELS), PIXELS.draw(4)
    with pytest.raises(ValueError, match="'discrete'"): bound_of(images, decoder="discret")
    with pytest.raises(ValueError, match="draws"): bound_of(images, draws=0)
    with pytest.raises(ValueError, match="'sign'"): flow_bits_per_dim(denoiser, images, 4, trace="sine")
    with pytest.raises(FloatingPointError): bound_of(images, lambda z, level: (z, z / 0))
