"Attempts to break lfdm.likelihood: the flow and the bound of one Gaussian are known in closed form."
import math

import pytest
import torch
from scipy.integrate import simpson
from torch.distributions import Independent, Normal, kl_divergence

from gaussians import f64, randn, refuse
from lfdm.core import expand
from lfdm.likelihood import flow_log_prob, nelbo
from lfdm.networks import MLP
from lfdm.schedules import SCHEDULES, CosineSchedule
from lfdm.steps import network_denoiser

f32 = torch.float32
MEAN, STD = 1., .5
COSINE, VE, LINEAR = (SCHEDULES[name](-5, 6) for name in ("cosine", "ve", "linear"))
SHAPES = [(4, 1), (2, 2), (2, 3, 2, 2)]
near = torch.testing.assert_close


def data(*shape, seed=0, dtype=f64): return (MEAN + STD * randn(*shape, seed=seed)).to(dtype)


def scaled_noise(k=1., b=0.):
    "k times the exact ε̂ plus b: right for k = 1, b = 0."
    def denoiser(z, level):
        alpha, sigma = expand(level.alpha, z), expand(level.sigma, z)
        eps_hat = k * sigma * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) + b
        return (z - sigma * eps_hat) / alpha, eps_hat
    return denoiser


exact = scaled_noise()


# ---- the flow

def flow_of_a_gaussian(x, s):
    "A standardized value stays the same along the flow; the noisy end is judged as standard normal."
    def unit(level):
        a = level.alpha / level.scale
        return a, (a**2 * STD**2 + (level.sigma / level.scale)**2).sqrt()
    (a0, s0), (a1, s1) = unit(s.level(0.)), unit(s.level(1.))
    end = a1 * MEAN + s1 / s0 * a0 * (x.double() - MEAN)
    return (Normal(0., 1.).log_prob(end) + (s1 / s0 * a0).log()).flatten(1).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype, tolerance, close, schedule", [
    (f64, 1e-7, 1e-5, LINEAR), (f64, 1e-5, 2e-3, VE), (f32, 1e-5, 3e-3, COSINE)])
def test_the_flow_of_a_gaussian(shape, dtype, tolerance, close, schedule):
    "its Jacobian is a multiple of one, whose trace signs estimate exactly"
    x = data(*shape, dtype=dtype)
    for trace in ("exact", "sign"):
        got = flow_log_prob(exact, x, schedule, trace, rtol=tolerance, atol=tolerance)
        assert got.dtype == dtype
        near(got.double(), flow_of_a_gaussian(x, schedule), rtol=0, atol=close)


def test_what_fails_says_where():
    def broken(z, level):
        bad = ((torch.arange(len(z)) == 1) & (level.logsnr <= 0))[:, None]
        return tuple(torch.where(bad, math.nan, q) for q in exact(z, level))
    with pytest.raises(FloatingPointError, match="stopped being finite at logsnr"):
        flow_log_prob(broken, data(3, 2))
    with pytest.raises(FloatingPointError, match="not finite at logsnr -"): nelbo(broken, data(6, 2), draws=3)
    with pytest.raises(RuntimeError, match="did not converge at logsnr"):
        flow_log_prob(exact, data(3, 2), max_steps=2)
    with pytest.raises(ValueError, match="differentiable"): flow_log_prob(torch.no_grad()(exact), data(3, 2))


@pytest.mark.parametrize("f", [nelbo, flow_log_prob])
def test_16_bits_are_computed_in_float32(f):
    x = data(50, 2, dtype=torch.bfloat16)
    found, expected = (f(exact, a, VE) for a in (x, x.float()))
    if f is nelbo: found, expected = found.total, expected.total
    assert found.dtype == f32
    near(found, expected, rtol=1e-5, atol=1e-5)


# ---- the bound

def errors(x, logsnr, k, b):
    "E‖ε - ε̂‖² of each x at each λ, for `scaled_noise(k, b)`: shape (n, number of λ)."
    s2 = torch.sigmoid(-logsnr)
    a2 = 1 - s2
    v = a2 * STD**2 + s2
    far = (x.flatten(1) - MEAN)[..., None]
    bias = k * (a2 * s2).sqrt() / v * far + b
    return x[0].numel() * (1 - k * s2 / v)**2 + bias.square().sum(1)


def expected(x, s, steps=None, k=1., b=0.):
    "The diffusion term in closed form, by Simpson's rule over λ or as the sum of T steps."
    if steps is None:
        logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 4001, dtype=f64)
        return torch.as_tensor(simpson(errors(x, logsnr, k, b).numpy(), x=logsnr.numpy(), axis=1) / 2)
    grid = s.logsnr(torch.linspace(0, 1, steps + 1, dtype=f64))
    return (errors(x, grid[1:], k, b) * torch.expm1(-grid.diff())).sum(1) / 2


@pytest.mark.parametrize("schedule, dims", [(COSINE, (1,)), (VE, (3,)), (LINEAR, (2, 2, 2))])
@pytest.mark.parametrize("steps", [None, 1, 50])
def test_the_diffusion_term_is_unbiased(schedule, steps, dims, k=.6, b=.3):
    "Two points, many times over, in one batch: every example has its own term."
    n, points = 1500, data(2, *dims, seed=2)
    points[0] += 2
    many = points.repeat(n, *[1] * len(dims))
    got = nelbo(scaled_noise(k, b), many, schedule, steps, 24, seed=1).diffusion.view(n, 2)
    want, se = expected(points, schedule, steps, k, b), got.std(0) / n**.5
    assert ((got.mean(0) - want).abs() < 4.5 * se + 1e-9 * want).all() and (se < .05 * want).all()


@pytest.mark.parametrize("n, steps", [(1, None), (2, 8)])
def test_few_examples_are_judged_as_many_are(n, steps):
    "The control variate must not bias the estimate: one example alone has its bound, too."
    x, repeats = data(n, 2, seed=5), 150
    got = torch.stack([nelbo(exact, x, COSINE, steps, draws=8, seed=seed).diffusion.mean()
                       for seed in range(repeats)])
    want, se = expected(x, COSINE, steps).mean(), got.std() / repeats**.5
    assert abs(got.mean() - want) < 4.5 * se and se < .2 * want


@pytest.mark.parametrize("dims", [2, 300])
def test_the_control_variate_helps_in_any_dimension(dims):
    "Of a denoiser that knows no noise, the term scatters as ‖ε‖² without it: variance 2D."
    zero, x, draws = lambda z, level: (z, torch.zeros_like(z)), torch.zeros(40, dims, dtype=f64), 4
    found = torch.stack([nelbo(zero, x, COSINE, draws=draws, seed=seed).diffusion for seed in range(40)])
    free = 5.5 * (2 * dims / draws)**0.5
    assert found.std() < free / 2 and found.mean(1).std() < free / 40**.5 / 2   # one example, and the mean


@pytest.mark.parametrize("schedule, dtype, close", [
    (COSINE, f32, dict(rtol=1e-4, atol=2e-6)), (VE, f64, dict(rtol=1e-10, atol=1e-12))])
def test_the_other_two_terms_by_their_definitions(schedule, dtype, close):
    "KL(q(z_1 given x) ‖ N(0, I)) in unit scale, and E -log N(x; z_0/α, σ²/α²)."
    x = data(2, 3, 2, 2, dtype=dtype)
    bound = nelbo(exact, x, schedule, draws=2)
    assert all(q.shape == (2,) and q.dtype == dtype for q in (*bound, bound.total))
    end, start, flat = schedule.level(1.), schedule.level(0.), x.double().flatten(1)
    normal = lambda mean, std: Independent(Normal(mean, std.expand_as(mean)), 1)
    q = normal(flat * end.alpha / end.scale, end.sigma / end.scale)
    near(bound.prior.double(), kl_divergence(q, normal(0 * flat, torch.ones((), dtype=f64))), **close)
    decoder = normal(0 * flat, start.sigma / start.alpha)
    near(bound.reconstruction.double(), decoder.entropy(), rtol=1e-6, atol=1e-6)


def test_levels_are_drawn_one_from_each_part():
    seen = []
    def denoiser(z, level): seen.append(level.logsnr); return exact(z, level)
    nelbo(denoiser, data(400, 2), COSINE, draws=7)
    part = (torch.stack(seen) + 5) / 11 * 7
    assert torch.equal(part.floor(), torch.arange(7.)[:, None].expand(7, 400).double())
    assert part.frac().std() > .25


# ---- both

@pytest.mark.parametrize("f", [nelbo, flow_log_prob])
def test_the_seed_decides_and_nothing_else_is_touched(f):
    x, net, before = data(20, 2, dtype=f32), network_denoiser(MLP(2, 8), "v"), torch.get_rng_state()
    copy, options = x.clone(), dict(draws=8) if f is nelbo else dict(trace="normal")
    run = lambda seed: torch.stack([*f(net, x, CosineSchedule(-2, 2), seed=seed, **options)])
    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4)) and torch.equal(x, copy)
    assert torch.equal(torch.get_rng_state(), before)


NO_BATCH = torch.ones(4), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.ones(3, 2) / 0


@pytest.mark.parametrize("f", [nelbo, flow_log_prob])
@pytest.mark.parametrize("bad, says", [
    (dict(denoiser=network_denoiser(refuse, "v", within=(-5, 6))), "leaves the range of the training"),
    (dict(denoiser=network_denoiser(lambda z, u: u, "eps")), "the network returned shape"),
    *((dict(x=x), r"\bx must\b") for x in NO_BATCH)])
def test_what_does_not_fit_is_refused_before_any_work(f, bad, says):
    with pytest.raises((ValueError, TypeError), match=says): f(**dict(denoiser=refuse, x=data(2, 2)) | bad)


@pytest.mark.parametrize("ends", [(-math.inf, 5), (-5, math.inf)])
def test_a_bound_needs_a_finite_range(ends):
    with pytest.raises(ValueError, match="finite range of logsnr"):
        nelbo(refuse, data(2, 2), CosineSchedule(*ends))
