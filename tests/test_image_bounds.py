"Bits per dimension of images: bounds against known probabilities, batches."
import math

import pytest
import torch

from gaussians import f64, generator
from lfdm.core import expand
from lfdm.images.data import dequantize, scaled
from lfdm.likelihood import discrete_reconstruction, flow_bits_per_dim, image_bound
from lfdm.schedules import SCHEDULES
from lfdm.steps import exact_denoiser


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
def bound_of(images, denoiser=None, levels=4, draws=30, **options):
    "The bound of whole bytes."
    how = dict(draws=draws, decoder="discrete", dtype=f64) | options
    return image_bound(denoiser or exact_denoiser(PIXELS), images, levels, **how)


def test_whole_bytes_at_the_optimum():
    s = Pixels(5)
    images = s.draw(1500)
    bound = bound_of(images, exact_denoiser(s), 5, schedule=SCHEDULES["cosine"](-10, 10), draws=40)
    assert bound.offset == 0 and bound.reconstruction.max() < 1e-5 and bound.report()["se"] < 0.05
    assert zero(bound.total - truth(s, images))


def test_one_bound_whatever_the_batches():
    images, calls = PIXELS.draw(101), []
    note = lambda *a: calls.append(a)
    whole, again, other, parts = (bound_of(images, seed=seed, batch_size=batch, progress=note)
                                  for seed, batch in ((3, 500), (3, 500), (4, 500), (3, 25)))
    assert calls == 3 * [("bound", 101, 101)] + [("bound", n, 101) for n in (21, 41, 61, 81, 101)]
    assert len(parts.total) == 101 and zero(whole.total - parts.total)
    assert torch.equal(again.total, whole.total) and not torch.equal(other.total, whole.total)
    report = whole.report()
    terms = sum(report[k] for k in ("prior", "diffusion", "reconstruction", "offset"))
    assert report["total"] == pytest.approx(terms) and report["n"] == 101
    sixteen, single = (bound_of(images, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(sixteen.total, single.total)   # never less than float32


@pytest.mark.parametrize("logsnr, low, high", [
    (-math.inf, 2.07, 2.09), (20., 0, 1e-4), (180., 0, 0)])
def test_the_discrete_decoder_is_a_distribution(logsnr, low, high):
    "Its cost is a posterior's under a flat prior: at most log L on average over the levels, 0 without noise."
    b = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 1, 40, 40)
    level = SCHEDULES["cosine"](-math.inf, math.inf).level_at(torch.tensor(logsnr, dtype=f64))
    few, many = (discrete_reconstruction(b, 8, level, draws=draws) / 1600 for draws in (1, 6))
    assert few.min() > -1e-9 and low <= few.mean() <= high
    torch.testing.assert_close(few, many, rtol=.1, atol=1e-3)


@pytest.mark.parametrize("bound", [image_bound, flow_bits_per_dim])
def test_images_of_other_levels(bound):
    images = PIXELS.draw(4)
    for wrong, said in ((dequantize(images, 4), "quantize"), (images + 4, "4 levels")):
        with pytest.raises((TypeError, ValueError), match=said): bound(exact_denoiser(PIXELS), wrong, 4)
