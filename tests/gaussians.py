"One Gaussian, whose posterior mean is one line: for the tests of steps and of sampling."
import torch

from lfdm.sampling import sampling
from lfdm.steps import exact_denoiser

torch.set_num_threads(1)
f64 = torch.float64


class Gaussian:
    def __init__(self, mean=2., std=.5): self.mean, self.std = mean, std

    def denoise(self, z, alpha, sigma):
        return (sigma**2 * self.mean + alpha * self.std**2 * z) / (alpha**2 * self.std**2 + sigma**2)

    def moments(self, level):
        "Mean and variance of its noisy data."
        return level.alpha * self.mean, level.alpha**2 * self.std**2 + level.sigma**2


gaussian = Gaussian()
exact = exact_denoiser(gaussian)


def refuse(z, level): raise AssertionError("work before the choices were checked")
def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def states(denoiser=exact, shape=(6, 2), steps=5, **kw):
    "Every state of a sampler."
    return list(sampling(denoiser, shape, steps, **{"generator": generator()} | kw))
