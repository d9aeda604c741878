"Attempts to break lfdm.embedded. The normal case is checked in nbs/library/51_embedded.ipynb."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from gaussians import f64, randn
from lfdm.data import Dataset, NoDensity, Swiss
from lfdm.embedded import Embedded, as_dataset, random_frame
from lfdm.evaluation import floor, judge
from lfdm.losses import DiffusionLoss
from lfdm.validation import ValidationSet

close = torch.testing.assert_close
SWISS = Swiss(k=32)
METHODS = ["log_prob_at", "denoise", "score", "posterior_variance"]
few = settings(max_examples=12, deadline=None)


@few
@given(st.integers(2, 40), st.integers(0, 2**32 - 1), st.floats(-12, 12), st.floats(.1, 10))
def test_tweedie_and_autograd_in_any_dimension(dim, seed, logsnr, scale):
    "Score, denoiser, density and posterior variance agree, each found without the others."
    d = Embedded(SWISS, dim, seed, scale)
    alpha, sigma = (torch.tensor(s * logsnr, dtype=f64).sigmoid().sqrt() for s in (1, -1))
    z = (alpha * d.sample(1, 0, dtype=f64) + sigma * randn(1, dim, seed=seed % 99)).requires_grad_()
    score, = torch.autograd.grad(d.log_prob_at(z, alpha, sigma).sum(), z)
    close(d.score(z, alpha, sigma), score, rtol=1e-7, atol=1e-7)
    close(alpha * d.denoise(z, alpha, sigma), z + sigma**2 * score, rtol=1e-7, atol=1e-7)
    slope = torch.autograd.functional.jacobian(lambda z: d.denoise(z, alpha, sigma).sum(0), z)[:, 0]
    variance = (sigma**2 / alpha * slope.diagonal().mean())[None]
    close(d.posterior_variance(z, alpha, sigma), variance, rtol=1e-6, atol=1e-9 * scale**2)


@pytest.mark.parametrize("method", METHODS)
def test_one_scale_for_each_row_and_float32_outside(method):
    "as many rows as dimensions, where a wrong broadcast would hide"
    d, f = Embedded(SWISS, 6), getattr(Embedded(SWISS, 6), method)
    z, u = 2 * d.sample(6), torch.linspace(.1, .9, 6, dtype=f64)
    rows = torch.cat([f(z[i:i + 1], u[i].item(), 1 - u[i].item()) for i in range(6)])
    close(f(z, u, 1 - u[:, None]), rows)
    assert torch.equal(f(z, .6, .8), f(z.double(), .6, .8).float())


def test_same_seed_same_points_as_the_set_inside():
    d = Embedded(SWISS, 9, seed=3, scale=2.)
    for split in ("train", "test"):
        close(d.project(d.sample(7, 5, split, f64)), SWISS.sample(7, 5, split, f64))
    assert d.train().shape == (SWISS.n_train, 9) and d.draw(3, torch.Generator().manual_seed(0)).dtype == f64
    assert not torch.equal(random_frame(9, 2, 0), random_frame(9, 2, 1))
    off = d.embed(randn(4, 2)) + (q := randn(4, 9))
    plane = q - q @ d.frame @ d.frame.T
    close(d.distance_off(off), plane.norm(dim=1) / 2)


def test_a_set_within_a_set():
    inside = Embedded(SWISS, 3, seed=1, scale=2.)
    twice, z = Embedded(inside, 5, seed=2, scale=.5), randn(4, 5)
    frame = twice.frame @ inside.frame
    close(twice.denoise(z, .6, .8), SWISS.denoise(z @ frame, .6, .8) @ frame.T)
    assert twice.eps_floor(1.) == pytest.approx(2 / 5 * SWISS.eps_floor(1.).item())
    assert twice.entropy(.6, .8) == pytest.approx(
        SWISS.entropy(.6, .8) + 1.5 * math.log(2 * math.pi * math.e * .64))


def test_floors_keep_shape_dtype_and_limits():
    d = Embedded(SWISS, 8, scale="unit")
    l = torch.tensor([[-math.inf, 0., math.inf]])
    e, x = d.eps_floor(l), d.mmse(l)
    assert e.shape == l.shape and e.dtype == x.dtype == torch.float32
    close(e[0, [0, 2]], torch.tensor([0., 2 / 8])); close(x[0, [0, 2]], torch.tensor([1., 0.]))
    close(d.eps_floor(1.), math.e * d.mmse(1.))


def test_what_takes_a_data_set_takes_an_embedded_one():
    d = as_dataset("embedded(swiss(noise=0.4), dim=8, scale=unit)")
    assert d.of.scale is not None and d.scale == 2. and d.of.stds.max() < Swiss().stds.max()
    loss = DiffusionLoss("cosine(-6, 6)", "v")
    checks = ValidationSet(loss, d.sample(400), denoise=d.denoise)
    exact = lambda z, u: checks.best.to(z)
    assert checks(exact)["excess"] < 1e-12 and checks(lambda z, u: 0 * z)["excess"] > .1
    assert floor(loss, d) == pytest.approx(checks(exact)["loss"], abs=4 * checks(exact)["loss_se"])
    assert judge(d.sample(60), d, repeats=2)["sliced_wasserstein"]["value"] < 1.5


class Noise(Dataset):
    def draw(self, n, generator): return torch.randn(n, 2, generator=generator)


@pytest.mark.parametrize("f, words", [
    (lambda: Embedded(SWISS, 1), "dim must be .*'swiss' has 2 dimensions itself"),
    (lambda: Embedded(SWISS, 2.5), "whole number"), (lambda: Embedded(SWISS, math.nan), "nan"),
    (lambda: Embedded("swis"), "Did you mean 'swiss'"), (lambda: Embedded(3), "set in of: must be"),
    (lambda: Embedded(SWISS, 8, -1), "seed"), (lambda: Embedded(SWISS, 8, 0, 0.), "scale must be"),
    (lambda: Embedded(SWISS, 8, 0, "units"), "scale must be a number or 'unit'"),
    (lambda: random_frame(2, 3), "columns must be from 1 to 2"),
    (lambda: as_dataset("embedded(swiss, dims=8)"), "Did you mean 'dim'"),
    (lambda: Embedded(SWISS, 8).project(randn(3, 2)), r"\(n, 8\)"),
    (lambda: Embedded(SWISS, 8).embed(randn(3, 8)), r"y must have shape \(n, 2\)"),
    (lambda: Embedded(SWISS, 8).score(randn(3, 8), 1., torch.tensor([1., 0., 1.])), "sigma > 0 only"),
    (lambda: Embedded(SWISS, 8).sample(3, dtype=torch.int64), "dtype must be floating")])
def test_what_is_refused(f, words):
    with pytest.raises((ValueError, TypeError), match=words): f()


def test_no_density_without_noise_or_without_one_inside():
    d, z = Embedded(SWISS, 8), randn(3, 8)
    asked = (lambda: d.log_prob(z), d.entropy, lambda: d.log_prob_at(z, 1., 0.), lambda: d.score(z, 1., 0.))
    for ask in asked:
        with pytest.raises(NoDensity, match="lies in a plane"): ask()
    assert not Embedded(Noise(), 8).exact
    with pytest.raises(NoDensity, match="'noise' has samples"): Embedded(Noise(), 8).denoise(z, 1., 1.)
    Embedded(SWISS, 2).log_prob(randn(3, 2))
