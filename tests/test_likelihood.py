"Attempts to break lfdm.likelihood: the flow and the bound of one Gaussian are known in closed form."
import math

import pytest
import torch
from scipy.integrate import simpson
from torch.distributions import Independent, Normal, kl_divergence

from gaussians import f64, randn, refuse
from lfdm.core import expand
from lfdm.likelihood import Bound, discrete_reconstruction, flow_log_prob, nelbo
from lfdm.networks import MLP
from lfdm.schedules import SCHEDULES, CosineSchedule, VESchedule
from lfdm.score_matching import DIRECTIONS
from lfdm.steps import Counted, network_denoiser

f32 = torch.float32
MEAN, STD = 1., .5
COSINE, VE, LINEAR = (SCHEDULES[name](-5, 6) for name in ("cosine", "ve", "linear"))
SHAPES = [(4, 1), (4, 2), (2, 2), (3, 5), (2, 3, 2, 2), (3, 3, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
both = pytest.mark.parametrize("f", [nelbo, flow_log_prob])
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


class Field(torch.nn.Module):
    "A random smooth ε̂, right for no data."
    def __init__(self, dim):
        super().__init__()
        self.a, self.b, self.c = randn(dim + 1, 6), randn(6, seed=1), randn(6, dim, seed=2)

    def forward(self, z, u): return torch.tanh(torch.cat([z, u[:, None]], 1) @ self.a + self.b) @ self.c


# ---- the flow

def flow_of_a_gaussian(x, s):
    "A standardized value stays the same along the flow; the noisy end is judged as standard normal."
    def unit(level):
        a = level.alpha / level.scale
        return a, (a**2 * STD**2 + (level.sigma / level.scale)**2).sqrt()
    (a0, s0), (a1, s1) = unit(s.level(0.)), unit(s.level(1.))
    end = a1 * MEAN + s1 / s0 * a0 * (x.double() - MEAN)
    return (Normal(0., 1.).log_prob(end) + (s1 / s0 * a0).log()).flatten(1).sum(1)


@shapes
@pytest.mark.parametrize("dtype, tolerance, close, schedule", [
    (f64, 1e-9, 1e-6, LINEAR), (f64, 1e-5, 2e-3, VE), (f32, 1e-5, 3e-3, COSINE)])
def test_the_flow_of_a_gaussian(shape, dtype, tolerance, close, schedule):
    x = data(*shape, dtype=dtype)
    got = flow_log_prob(exact, x, schedule, rtol=tolerance, atol=tolerance)
    assert got.shape == shape[:1] and got.dtype == dtype
    near(got.double(), flow_of_a_gaussian(x, schedule), rtol=0, atol=close)
    assert (got[0] - got[1]).abs() > 10 * close   # they are not all one number


@pytest.mark.parametrize("target, schedule", [
    ("x", VESchedule), ("eps", CosineSchedule), ("v", VESchedule), ("score", VESchedule)])
def test_every_network_gives_a_density_whatever_it_predicts(target, schedule):
    "Summed over the line it is one, right or wrong: a lost factor of the scales or of the trace would show."
    x = torch.linspace(-40, 40, 8001, dtype=f64)
    denoiser = network_denoiser(Field(1), target)
    p = flow_log_prob(denoiser, x[:, None], schedule(-4, 3), rtol=1e-6, atol=1e-6).exp()
    assert abs(simpson(p.numpy(), x=x.numpy()) - 1) < 1e-3 and p.max() < 10 and p[[0, -1]].max() < 1e-6


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_estimated_traces_are_unbiased(kind):
    "One point many times, each with directions of its own; the field's Jacobian is not diagonal."
    denoiser, n, x, s = network_denoiser(Field(3), "eps"), 4000, data(1, 3), CosineSchedule(-3, 3)
    got = flow_log_prob(denoiser, x.expand(n, 3), s, kind, seed=1)
    assert abs(got.mean() - flow_log_prob(denoiser, x, s)) < 4 * got.std() / n**.5 + 1e-3
    assert .03 < got.std() < 30


@pytest.mark.parametrize("kind", ["sign", "sphere"])
def test_estimated_traces_of_a_multiple_of_one_are_exact(kind):
    x = data(3, 2, 2, 2)
    near(flow_log_prob(exact, x, COSINE, kind), flow_log_prob(exact, x, COSINE), rtol=0, atol=2e-3)


@pytest.mark.parametrize("blind", [
    lambda z, level: (torch.zeros_like(z), torch.ones_like(z)),
    lambda z, level: tuple(q.detach() for q in exact(z, level)), torch.no_grad()(exact)])
@pytest.mark.parametrize("trace", ["exact", "sign"])
def test_a_denoiser_without_derivatives_has_no_flow(blind, trace):
    with pytest.raises(ValueError, match="differentiable"): flow_log_prob(blind, data(3, 2), trace=trace)


def test_a_flow_that_fails_says_where():
    def broken(z, level):
        x, eps = exact(z, level)
        return (x, eps) if level.logsnr > 0 else (x * math.nan, eps)
    with pytest.raises(FloatingPointError, match=r"stopped being finite at logsnr (-0|-1|0)"):
        flow_log_prob(broken, data(3, 2))
    with pytest.raises(RuntimeError, match="did not converge at logsnr"):
        flow_log_prob(exact, data(3, 2), max_steps=2)


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


@pytest.mark.parametrize("schedule, dims", [(COSINE, (1,)), (VE, (3,)), (LINEAR, (2, 2, 2))], ids=str)
@pytest.mark.parametrize("steps", [None, 1, 3, 50])
@pytest.mark.parametrize("k, b", [(1., 0.), (.6, .3)])
def test_the_diffusion_term_is_unbiased(schedule, steps, k, b, dims):
    "For each of two points, many times over."
    n = 1500
    for point in data(2, *dims, seed=2):
        got = nelbo(scaled_noise(k, b), point.expand(n, *dims), schedule, steps, 24, seed=1).diffusion
        want, se = expected(point[None], schedule, steps, k, b)[0], got.std() / n**.5
        assert abs(got.mean() - want) < 4.5 * se + 1e-9 * abs(want) and se < .05 * want


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("steps", [None, 8])
def test_few_examples_are_judged_as_many_are(n, steps):
    "The control variate must not bias the estimate: one example alone has its bound, too."
    x, repeats = data(n, 2, seed=5), 200
    got = torch.stack([nelbo(exact, x, COSINE, steps, draws=8, seed=seed).diffusion.mean()
                       for seed in range(repeats)])
    want, se = expected(x, COSINE, steps).mean(), got.std() / repeats**.5
    assert abs(got.mean() - want) < 4.5 * se and se < .2 * want


@pytest.mark.parametrize("shape", [(2, 2), (3, 3, 3)])
def test_every_example_has_its_own_terms_where_n_is_a_size_of_the_data(shape):
    "A far point costs more; its neighbour does not."
    x = data(*shape, seed=8)
    x[0] += 4
    many = torch.cat([x] * 40)
    got = torch.stack([nelbo(exact, many, COSINE, draws=16, seed=i).diffusion.view(40, -1).mean(0)
                       for i in range(30)])
    want = expected(x, COSINE)
    assert ((got.mean(0) - want).abs() < 5 * got.std(0) / 30**.5).all() and want[0] > 2 * want[1]


@pytest.mark.parametrize("dims", [2, 300])
def test_the_control_variate_helps_in_any_dimension(dims):
    "Of a denoiser that knows no noise, the diffusion term scatters as ‖ε‖² without it: variance 2D."
    zero, n, draws = lambda z, level: (z, torch.zeros_like(z)), 40, 4
    x, schedule = torch.zeros(n, dims, dtype=f64), CosineSchedule(-5, 5)
    found = torch.stack([nelbo(zero, x, schedule, draws=draws, seed=seed).diffusion for seed in range(n)])
    free = 5 * (2 * dims / draws)**0.5
    assert found.std() < free / 2 and found.mean(1).std() < free / n**.5 / 2   # one example, and the mean
    assert abs(found.mean() - 5 * dims) < 4 * found.mean(1).std() / n**.5


@shapes
@pytest.mark.parametrize("schedule, dtype, close", [
    (COSINE, f32, dict(rtol=1e-4, atol=2e-6)), (VE, f64, dict(rtol=1e-10, atol=0))])
def test_the_other_two_terms_by_their_definitions(shape, schedule, dtype, close):
    "KL(q(z_1 given x) ‖ N(0, I)) in unit scale, and E -log N(x; z_0/α, σ²/α²)."
    x = data(*shape, dtype=dtype)
    bound = nelbo(exact, x, schedule, draws=2)
    assert isinstance(bound, Bound)
    for q in (*bound, bound.total):
        assert q.shape == shape[:1] and q.dtype == dtype and q.isfinite().all()
    near(bound.total, bound.prior + bound.diffusion + bound.reconstruction, rtol=0, atol=0)
    end, start, flat = schedule.level(1.), schedule.level(0.), x.double().flatten(1)
    normal = lambda mean, std: Independent(Normal(mean, std.expand_as(mean)), 1)
    q = normal(flat * end.alpha / end.scale, end.sigma / end.scale)
    p = normal(torch.zeros_like(flat), torch.tensor(1., dtype=f64))
    near(bound.prior.double(), kl_divergence(q, p), **close)
    decoder = normal(torch.zeros_like(flat), start.sigma / start.alpha)
    near(bound.reconstruction.double(), decoder.entropy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps, draws", [(None, 1), (None, 7), (5, 1), (5, 7), (1, 3), (5., 2.)])
def test_levels_are_drawn_one_from_each_part(steps, draws):
    seen, n = [], 400
    def denoiser(z, level): seen.append(level.logsnr); return exact(z, level)
    nelbo(denoiser, data(n, 2), COSINE, steps, draws)
    seen = torch.stack(seen)
    assert seen.shape == (draws, n)
    if steps is None:
        part = (seen + 5) / 11 * draws
        assert torch.equal(part.floor(), torch.arange(draws)[:, None].expand(seen.shape).double())
        assert part.frac().std() > .25
    else:   # the noisy ends of the steps, each as often
        grid = COSINE.logsnr(torch.linspace(0, 1, int(steps) + 1, dtype=f64))[1:]
        gap, which = (seen.flatten()[:, None] - grid).abs().min(1)
        often = which.bincount(minlength=int(steps)) / which.numel()
        assert gap.max() < 1e-12 and (often - 1 / steps).abs().max() < 5 / (which.numel() * steps)**.5


def test_more_draws_of_the_discrete_decoder_estimate_the_same():
    images, clean = torch.full((2, 1, 60, 60), 7, dtype=torch.uint8), CosineSchedule(-5, 3).level(0.)
    few, many = (discrete_reconstruction(images, 16, clean, draws=draws) for draws in (1, 6))
    near(few, many, rtol=.05, atol=0)
    assert few.min() > 0


# ---- both

@both
def test_the_seed_decides_and_nothing_else_is_touched(f):
    x, net, before = data(20, 2), MLP(2, 8).double(), torch.get_rng_state()
    copy, denoiser = x.clone(), network_denoiser(net, "v")
    x.requires_grad_(f is flow_log_prob)
    options = dict(draws=8) if f is nelbo else dict(trace="normal")
    run = lambda seed: f(denoiser, x, CosineSchedule(-4, 4), seed=seed, **options)
    a, b, c = (found.diffusion if f is nelbo else found for found in map(run, (3, 3, 4)))
    assert torch.equal(a, b) and not torch.equal(a, c) and not a.requires_grad
    assert torch.equal(x, copy) and x.grad is None and all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)


CASES = [
    (flow_log_prob, dict(trace="signs"), "unknown kind of directions 'signs'. Did you mean 'sign'"),
    (flow_log_prob, dict(trace=None), "directions None"),
    (flow_log_prob, dict(rtol=0), "rtol must"), (flow_log_prob, dict(atol=-1.), "atol must"),
    (flow_log_prob, dict(max_steps=0), "max_steps must"),
    (flow_log_prob, dict(trace="sign", seed=-1), "seed must"),
    *((nelbo, dict(steps=v), "steps must") for v in (0, -1, 2.5, "3", True, math.nan)),
    *((nelbo, dict(draws=v), "draws must") for v in (0, -1, 1.5, None, "3", math.inf)),
    *((nelbo, dict(seed=v), "seed must") for v in (-1, .5, None)),
    *((nelbo, dict(schedule=CosineSchedule(*ends)), "finite range of logsnr")
      for ends in ((-math.inf, 5), (-5, math.inf))),
    *((f, dict(schedule="cosin"), "Did you mean 'cosine'") for f in (nelbo, flow_log_prob)),
    *((f, dict(schedule=None), "schedule must") for f in (nelbo, flow_log_prob))]


@pytest.mark.parametrize("f, kw, says", CASES, ids=lambda case: getattr(case, "__name__", str(case)))
def test_bad_choices_come_before_any_work(f, kw, says):
    with pytest.raises((ValueError, TypeError), match=says): f(refuse, data(3, 2), **kw)


@both
@pytest.mark.parametrize("wrapped", [lambda net: net, Counted])
def test_the_range_of_the_training_is_honoured(f, wrapped):
    within = lambda net: wrapped(network_denoiser(net, "v", within=(-5, 6)))
    with pytest.raises(ValueError, match="leaves the range of the training, -5 to 6"):
        f(within(refuse), data(3, 2), CosineSchedule(-6, 5))
    f(within(Field(2)), data(3, 2), COSINE)


@both
@pytest.mark.parametrize("x", [
    torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.ones(4),
    torch.zeros(0, 2), None, [[1., 2.]]], ids=lambda x: f"{type(x).__name__}{getattr(x, 'shape', '')}")
def test_what_is_no_batch_of_data_is_named(f, x):
    "Images as uint8 are the usual mistake."
    with pytest.raises((TypeError, ValueError), match=r"\bx must\b"): f(refuse, x)


@both
@pytest.mark.parametrize("wrong", [lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: u])
def test_a_network_of_the_wrong_shape_is_refused(f, wrong):
    with pytest.raises(ValueError, match="the network returned shape"):
        f(network_denoiser(wrong, "eps"), data(2, 2))


def test_one_example_that_is_not_finite_stops_the_bound_and_says_where():
    def broken(z, level):
        x, eps = exact(z, level)
        return x, torch.where(torch.arange(len(z))[:, None] == 1, math.nan, eps)
    with pytest.raises(FloatingPointError, match="not finite at logsnr"): nelbo(broken, data(6, 2), draws=3)
