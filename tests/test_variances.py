"The variance of a step back: its price over random sets and levels, and every shape it may have."
from functools import partial

import pytest
import torch

from lfdm.data import DATASETS, GaussianMixture
from lfdm.likelihood import image_bound, nelbo
from lfdm.sampling import sample
from lfdm.schedules import SCHEDULES
from lfdm.steps import ancestral_step, exact_denoiser
from lfdm.variances import (
    VARIANCES,
    InterpolatedVariance,
    OptimalVariance,
    chain_floor,
    estimated_spread,
    exact_spread,
)


def chain(T, **options): return SCHEDULES["discrete"](T=T, **options)


@pytest.mark.parametrize("seed", range(6))
def test_no_variance_costs_less_than_the_best_of_each_level(seed):
    g = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=g)
    dataset = GaussianMixture(4 * rand(5, 2) - 2, 0.02 + rand(1).item())
    best = OptimalVariance(exact_spread(dataset))
    last = float("inf")
    for T in (2, 9, 50):
        lowest = chain_floor(dataset, chain(T), best)
        others = "posterior", "beta", InterpolatedVariance(rand(1).item())
        assert all(lowest <= chain_floor(dataset, chain(T), v) + 1e-9 for v in others)
        assert 0 < lowest < last   # a finer chain is a tighter bound
        last = lowest


def test_with_many_steps_all_come_to_the_same():
    cluster, fine = DATASETS["cluster"](), chain(20_000, schedule="linear_logsnr")
    first, second = (chain_floor(cluster, fine, v) for v in ("posterior", "beta"))
    assert abs(first - second) < 0.01 * first


def test_the_default_is_the_posterior_bit_for_bit():
    exact = exact_denoiser(DATASETS["cluster"]())
    default, named = (sample(exact, 20, steps=5, sampler=s, seed=3)
                      for s in ("ancestral", partial(ancestral_step, variance="posterior")))
    assert torch.equal(default, named)
    assert not torch.equal(default, sample(exact, 20, steps=5, seed=3,
                                           sampler=partial(ancestral_step, variance="beta")))


@pytest.mark.parametrize("nu", [
    0.3, lambda z, t: torch.tensor(0.3), lambda z, t: torch.full(z.shape[:1], 0.3),
    lambda z, t: torch.full_like(z, 0.3)])
def test_one_number_may_come_in_every_shape(nu):
    "For all, for each example, for each element: the same samples and the same bound, of points and images."
    unchanged = lambda z, level: (z, z)
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 1, 4, 4), generator=g, dtype=torch.uint8)
    found, expected = [], []
    for v, to in ((InterpolatedVariance(nu), found), (VARIANCES["interpolated"](0.3), expected)):
        to += [sample(unchanged, 4, steps=3, sampler=partial(ancestral_step, variance=v)),
               nelbo(unchanged, torch.ones(5, 2), chain(7), draws=3, variance=v).total,
               image_bound(unchanged, images, draws=2, steps=7, variance=v).total]
    for a, b in zip(found, expected): assert torch.allclose(a, b, rtol=1e-5)


def test_an_estimate_from_few_points_is_never_negative():
    worse = lambda z, level: (z, 2 * z)   # not a mean: its answers are larger than the noise
    spread = estimated_spread(worse, torch.randn(10, 2, generator=torch.Generator().manual_seed(0)))
    level = SCHEDULES["cosine"]().level(torch.tensor([0.1, 0.9]))
    assert (spread(None, level) == 0).all()


def test_in_continuous_time_a_variance_is_refused():
    with pytest.raises(ValueError, match="in continuous time none plays a role"):
        nelbo(lambda z, level: (z, z), torch.ones(5, 2), variance="beta")
    with pytest.raises(ValueError, match="Did you mean 'beta'"):
        nelbo(lambda z, level: (z, z), torch.ones(5, 2), steps=4, variance="betta")
