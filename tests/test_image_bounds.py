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
    def __init__(self, levels=4, shape=(1, 2, 2)):
        self.p, self.levels, self.shape = torch.linspace(1, 3, levels, dtype=f64) / torch.linspace(1, 3, levels, dtype=f64).sum(), levels, shape
        self.middles = scaled(torch.arange(levels, dtype=torch.uint8), levels).double()
    def draw(self, n): return torch.multinomial(self.p, n * math.prod(self.shape), True, generator=generator()).view(n, *self.shape).to(torch.uint8)
    def log_prob(self, images): return self.p.log()[images.long()].flatten(1).sum(1)
    def denoise(self, z, alpha, sigma):
        logit = self.p.log() - ((z[..., None] - expand(alpha, z)[..., None] * self.middles) / expand(sigma, z)[..., None])**2 / 2
        return logit.softmax(-1) @ self.middles


def truth(s, images): return -s.log_prob(images) / (images[0].numel() * math.log(2))
def within(gap, expected=0., n=4): return abs(gap.mean() - expected) < n * gap.std() / len(gap)**0.5


@pytest.mark.parametrize("levels", [2, 5])
def test_whole_bytes_at_the_optimum(levels):
    s, schedule = Pixels(levels), SCHEDULES["cosine"](-10, 10)
    images = s.draw(1500)
    bound = image_bound(exact_denoiser(s), images, levels, schedule, draws=40, decoder="discrete", dtype=f64)
    assert bound.offset == 0 and bound.reconstruction.max() < 1e-5 and within(bound.total - truth(s, images)) and bound.report()["se"] < 0.05


def test_dequantized_images_at_the_optimum():
    class Coarse(Templates): name, levels = "coarse", 8
    s, schedule = Coarse(), SCHEDULES["cosine"](-12.9, 11)
    images = s.test()[:40]
    bound = image_bound(exact_denoiser(s), images, 8, schedule, draws=64, dtype=f64)
    assert bound.offset == 2 and within(bound.total - truth(s, images)) and bound.report()["se"] < 0.1
    flow = flow_bits_per_dim(exact_denoiser(s), images[:16], 8, schedule, dtype=f64, rtol=1e-3, atol=1e-3)
    assert abs((flow - truth(s, images[:16])).mean()) < 0.05


def test_a_worse_denoiser_has_a_larger_bound():
    s = Pixels()
    images = s.draw(800)
    def off(z, level):
        x_hat, eps_hat = exact_denoiser(s)(z, level)
        return x_hat, 0.8 * eps_hat
    bounds = [image_bound(d, images, 4, draws=30, decoder="discrete", dtype=f64).total.mean() for d in (exact_denoiser(s), off)]
    assert bounds[1] > bounds[0] + 0.5


def test_one_bound_whatever_the_batches():
    s = Pixels()
    images, calls = s.draw(101), []
    whole, parts = (image_bound(exact_denoiser(s), images, 4, draws=30, seed=3, batch_size=b, dtype=f64, progress=lambda *a: calls.append(a)) for b in (500, 25))
    assert len(parts.total) == 101 and calls == [("bound", 101, 101)] + [("bound", n, 101) for n in (21, 41, 61, 81, 101)]
    assert abs((whole.total - parts.total).mean()) < 4 * ((whole.total - parts.total).std() / 101**0.5)
    same, other = (image_bound(exact_denoiser(s), images, 4, draws=30, seed=seed, batch_size=500, dtype=f64) for seed in (3, 4))
    assert torch.equal(same.total, whole.total) and not torch.equal(other.total, whole.total)
    report = whole.report()
    assert report["total"] == pytest.approx(sum(report[k] for k in ("prior", "diffusion", "reconstruction", "offset"))) and report["n"] == 101
    assert math.isnan(image_bound(exact_denoiser(s), images[:1], 4, draws=2).report()["se"])


@pytest.mark.parametrize("logsnr", [-5., 1., 4., 20.])
def test_the_discrete_decoder_is_a_distribution(logsnr):
    "Its cost is that of a posterior under a flat prior: at most log L on average over the levels, and 0 where there is no noise."
    b = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 1, 40, 40)
    cost = discrete_reconstruction(b, 8, SCHEDULES["cosine"](-20, 20).level_at(torch.tensor(logsnr, dtype=f64))) / 1600
    assert 0 <= cost.min() + 1e-9 and cost.mean() < math.log(8) + 1e-3 and (cost.max() < 1e-4 if logsnr == 20 else True) and (cost.mean() > 1.9 if logsnr == -5 else True)


def test_wrong_images_and_choices():
    s, denoiser = Pixels(), exact_denoiser(Pixels())
    images = s.draw(4)
    for f in (image_bound, flow_bits_per_dim):
        for wrong, error, said in ((dequantize(images, 4), TypeError, "quantize"), (images[:0], ValueError, "too few"), (images + 4, ValueError, "4 levels"), (images[0], ValueError, "shape")):
            with pytest.raises(error, match=said): f(denoiser, wrong, 4)
        with pytest.raises(ValueError, match="levels"): f(denoiser, images, 1)
        with pytest.raises(ValueError, match="batch_size"): f(denoiser, images, 4, batch_size=0)
        with pytest.raises(ValueError, match="cosine"): f(denoiser, images, 4, "cosin")
    with pytest.raises(ValueError, match="'discrete'"): image_bound(denoiser, images, 4, decoder="discret")
    with pytest.raises(ValueError, match="draws"): image_bound(denoiser, images, 4, draws=0)
    with pytest.raises(ValueError, match="'sign'"): flow_bits_per_dim(denoiser, images, 4, trace="sine")
    with pytest.raises(FloatingPointError): image_bound(lambda z, level: (z, z / 0), images, 4)
