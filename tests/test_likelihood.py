"Attempts to break lfdm.likelihood: Gaussians in closed form, a density that sums to one, wrong denoisers."

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson
from torch.distributions import Independent, Normal, kl_divergence

from lfdm.core import expand
from lfdm.data import DATASETS
from lfdm.likelihood import Bound, flow_log_prob, nelbo
from lfdm.networks import MLP
from lfdm.schedules import SCHEDULES, CosineSchedule, VESchedule
from lfdm.score_matching import DIRECTIONS
from lfdm.steps import Counted, exact_denoiser, network_denoiser

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=6, deadline=None, derandomize=True, database=None)
MEAN, STD = 1., .5
SHAPES = [(4, 1), (4, 2), (2, 2), (3, 5), (2, 3, 2, 2), (3, 3, 3)]
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)


def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=generator(seed), dtype=dtype)
def data(*shape, seed=0, dtype=f64): return (MEAN + STD * randn(*shape, seed=seed)).to(dtype)


def gaussian(k=1., b=0.):
    "k times the exact ε̂ of data with mean 1 and standard deviation ½, plus b: right for k = 1, b = 0"
    def denoiser(z, level):
        alpha, sigma = expand(level.alpha, z), expand(level.sigma, z)
        eps_hat = k * sigma * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2) + b
        return (z - sigma * eps_hat) / alpha, eps_hat
    return denoiser

exact = gaussian()


class Field(torch.nn.Module):
    "A random smooth ε̂, right for no data"
    def __init__(self, dim, seed=0):
        super().__init__()
        self.a, self.b, self.c = (
            randn(dim + 1, 6, seed=seed),
            randn(6, seed=seed + 1),
            randn(6, dim, seed=seed + 2),
        )

    def forward(self, z, u): return torch.tanh(torch.cat([z, u[:, None]], 1) @ self.a + self.b) @ self.c


def refuse(z, level): raise RuntimeError('work before the choices were checked')


# ---- the flow

def flow_of_a_gaussian(x, s):
    "A standardized value stays the same along the flow; the noisy end is judged as standard normal"
    (a0, v0), (a1, v1) = (
        (a := l.alpha / l.scale, a**2 * STD**2 + (l.sigma / l.scale) ** 2)
        for l in (s.level(0.0), s.level(1.0))
    )
    end = a1 * MEAN + (v1 / v0).sqrt() * (a0 * x.double() - a0 * MEAN)
    return (Normal(0., 1.).log_prob(end) + (v1 / v0).log() / 2 + a0.log()).flatten(1).sum(1)


@shapes
@pytest.mark.parametrize('dtype, tolerance, close', [(f64, 1e-9, 1e-6), (f64, 1e-5, 2e-3), (f32, 1e-5, 3e-3)])
def test_the_flow_of_a_gaussian(shape, dtype, tolerance, close):
    x, s = data(*shape, dtype=dtype), CosineSchedule(-6, 8)
    got = flow_log_prob(exact, x, s, rtol=tolerance, atol=tolerance)
    assert got.shape == shape[:1] and got.dtype == dtype and not got.requires_grad
    torch.testing.assert_close(got.double(), flow_of_a_gaussian(x, s), rtol=0, atol=close)
    assert (got[0] - got[1]).abs() > 10 * close  # they are not all one number


def test_a_wide_range_gives_the_density_of_the_data():
    x = data(6, 2)
    truth = Normal(MEAN, STD).log_prob(x).sum(1)
    gaps = [
        (flow_log_prob(exact, x, CosineSchedule(-r, r), rtol=1e-8, atol=1e-8) - truth).abs().max()
        for r in (4, 8, 12)
    ]
    assert (
        gaps[0] > 5 * gaps[1] > 25 * gaps[2] and gaps[2] < 0.01
    )  # e^(-r/2): the noisy end still knows the mean


def test_a_density_it_is_for_a_mixture_too():
    d = DATASETS['cluster']()
    x = d.sample(8, seed=3).double()
    got = flow_log_prob(exact_denoiser(d), x, CosineSchedule(-10, 12), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got, d.log_prob(x), rtol=0, atol=5e-3)


@few
@given(st.floats(-9, -2), st.floats(2, 9))
def test_only_the_range_matters_not_the_schedule(low, high):
    x, denoiser = data(5, 2), network_denoiser(Field(2), 'v')
    a, b, c = (
        flow_log_prob(denoiser, x, s(low, high), rtol=1e-7, atol=1e-7)
        for s in (CosineSchedule, VESchedule, SCHEDULES['linear'])
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9); torch.testing.assert_close(a, c, rtol=0, atol=1e-9)


@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
@pytest.mark.parametrize('schedule', [CosineSchedule(-4, 3), VESchedule(-4, 3)], ids=lambda s: s.name)
def test_every_network_gives_a_density_whatever_it_predicts(target, schedule):
    "summed over the line it is one, right or wrong: a lost factor of the scales or of the trace would show"
    x = torch.linspace(-40, 40, 16_001, dtype=f64)
    p = flow_log_prob(network_denoiser(Field(1), target), x[:, None], schedule, rtol=1e-6, atol=1e-6).exp()
    assert abs(simpson(p.numpy(), x=x.numpy()) - 1) < 1e-3 and p.max() < 10 and p[[0, -1]].max() < 1e-6


@pytest.mark.parametrize('kind', DIRECTIONS)
def test_estimated_traces_are_unbiased(kind):
    "one point many times, each with directions of its own, through a field whose Jacobian is not diagonal"
    denoiser, n = network_denoiser(Field(3), 'eps'), 4000
    x, s = data(1, 3), CosineSchedule(-3, 3)
    truth = flow_log_prob(denoiser, x, s)
    got = flow_log_prob(denoiser, x.expand(n, 3), s, kind, seed=1)
    assert abs(got.mean() - truth) < 4 * got.std() / n**.5 + 1e-3 and .03 < got.std() < 30


def test_estimated_traces_of_a_multiple_of_one_are_exact_and_seeds_decide():
    x, s = data(4, 3), CosineSchedule(-4, 4)
    exactly = flow_log_prob(exact, x, s)
    for kind in ('sign', 'sphere'):
        torch.testing.assert_close(flow_log_prob(exact, x, s, kind), exactly, rtol=0, atol=1e-3)
    a, b, c = (flow_log_prob(exact, x, s, 'normal', seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and (a - c).abs().min() > 1e-3


def test_the_flow_touches_nothing_else():
    x = data(3, 2).requires_grad_()
    copy, net = x.detach().clone(), MLP(2, 8).double()
    for trace in ('exact', 'sign'):
        assert not flow_log_prob(network_denoiser(net, 'v'), x, CosineSchedule(-3, 3), trace).requires_grad
    before_twice = torch.get_rng_state(); flow_log_prob(exact, x, CosineSchedule(-3, 3), 'normal')
    assert (
        torch.equal(x, copy)
        and x.grad is None
        and all(p.grad is None for p in net.parameters())
        and torch.equal(before_twice, torch.get_rng_state())
    )


def test_images_are_their_numbers():
    x = data(3, 2, 2, 2)
    for trace in ('exact', 'sign'):
        torch.testing.assert_close(
            flow_log_prob(exact, x, trace=trace),
            flow_log_prob(exact, x.flatten(1), trace=trace),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    'kw, kind, says',
    [
        (dict(trace='signs'), ValueError, "unknown kind of directions 'signs'. Did you mean 'sign'"),
        (dict(trace=None), ValueError, 'directions None'),
        (dict(schedule='cosin'), ValueError, "Did you mean 'cosine'"),
        (dict(schedule=CosineSchedule(-13, 5)), ValueError, 'leaves the range of the training'),
        (dict(rtol=0), ValueError, 'rtol must'),
        (dict(atol=-1.0), ValueError, 'atol must'),
        (dict(max_steps=0), ValueError, 'max_steps must'),
        (dict(trace='sign', seed=-1), ValueError, 'seed must'),
    ],
    ids=str,
)
def test_bad_choices_of_the_flow_come_before_any_work(kw, kind, says):
    net = network_denoiser(refuse, 'v', within=(-12.9, 12.9))
    with pytest.raises(kind, match=says): flow_log_prob(net, data(3, 2), **kw)
    with pytest.raises(ValueError, match='leaves the range of the training'):
        flow_log_prob(Counted(net), data(3, 2), CosineSchedule(-13, 5))


def test_a_flow_that_fails_says_where():
    def broken(z, level):
        x, eps = exact(z, level)
        return (x, eps) if level.logsnr > 0 else (x * math.nan, eps)

    with pytest.raises(FloatingPointError, match=r'stopped being finite at logsnr (-0|-1|0)'):
        flow_log_prob(broken, data(3, 2))
    with pytest.raises(RuntimeError, match='did not converge at logsnr'):
        flow_log_prob(exact, data(3, 2), max_steps=2)
    for blind in (
        lambda z, l: (torch.zeros_like(z), torch.ones_like(z)),
        lambda z, l: tuple(q.detach() for q in exact(z, l)),
        torch.no_grad()(exact),
    ):
        for trace in ('exact', 'sign'):
            with pytest.raises(ValueError, match='differentiable'):
                flow_log_prob(blind, data(3, 2), trace=trace)


# ---- the bound

def errors(x, logsnr, k, b):
    "E‖ε - ε̂‖² of each x at each λ, for `gaussian(k, b)`: shape (n, number of λ)"
    s2 = torch.sigmoid(-logsnr); a2 = 1 - s2; v = a2 * STD**2 + s2
    far = (x.double().flatten(1) - MEAN)[..., None]
    return (x[0].numel() * (1 - k * s2 / v)**2 + (k * (a2 * s2).sqrt() / v * far + b).square().sum(1))


def expected(x, s, steps=None, k=1., b=0.):
    "The diffusion term in closed form, by Simpson's rule over λ or as the sum of T steps"
    if steps is None:
        logsnr = torch.linspace(s.logsnr_min, s.logsnr_max, 4001, dtype=f64)
        return torch.as_tensor(simpson(errors(x, logsnr, k, b).numpy(), x=logsnr.numpy(), axis=1) / 2)
    grid = s.logsnr(torch.linspace(0, 1, steps + 1, dtype=f64))
    return (errors(x, grid[1:], k, b) * torch.expm1(grid[:-1] - grid[1:])).sum(1) / 2


@pytest.mark.parametrize(
    'schedule', [CosineSchedule(-5, 6), VESchedule(-5, 6), SCHEDULES['linear'](-5, 6)], ids=lambda s: s.name
)
@pytest.mark.parametrize('steps', [None, 1, 3, 50])
@pytest.mark.parametrize('k, b', [(1., 0.), (.6, .3)])
@pytest.mark.parametrize('dims', [(1,), (3,), (2, 2, 2)], ids=str)
def test_the_diffusion_term_is_unbiased(schedule, steps, k, b, dims):
    "for each of two points, many times over"
    n = 1500
    for point in data(2, *dims, seed=2):
        got = nelbo(gaussian(k, b), point.expand(n, *dims), schedule, steps, draws=24, seed=1).diffusion
        want = expected(point[None], schedule, steps, k, b)[0]
        assert (
            abs(got.mean() - want) < 4.5 * got.std() / n**0.5 + 1e-9 * abs(want)
            and got.std() / n**0.5 < 0.05 * want
        )


@pytest.mark.parametrize('n', [1, 2, 3, 10])
@pytest.mark.parametrize('steps', [None, 8])
def test_few_examples_are_judged_as_many_are(n, steps):
    "what makes the estimate steadier must not make it biased: one example alone has its bound too"
    x, s, repeats = data(n, 2, seed=5), CosineSchedule(-5, 6), 200
    got = torch.stack(
        [nelbo(exact, x, s, steps, draws=8, seed=seed).diffusion.mean() for seed in range(repeats)]
    )
    want = expected(x, s, steps).mean()
    assert abs(got.mean() - want) < 4.5 * got.std() / repeats**0.5, (
        f"{got.mean():.3f} ± {got.std() / repeats**0.5:.3f}, not {want:.3f}"
    )
    assert got.std() / repeats**.5 < .2 * want


def test_the_steadier_estimate_is_steadier():
    "the spread over seeds for the exact denoiser, against plain Monte Carlo with as many draws"
    x, s, n = data(500, 2), CosineSchedule(-12, 12), 500
    got = nelbo(exact, x, s, draws=64).diffusion - expected(x, s)
    g, plain = generator(1), torch.zeros(n, dtype=f64)
    for _ in range(64):
        logsnr = -12 + 24 * torch.rand(n, 1, generator=g, dtype=f64)
        alpha, sigma = s.scales(logsnr)
        eps = torch.randn(n, 2, generator=g, dtype=f64)
        plain += (
            12
            * (eps - sigma * (alpha * (x - MEAN) + sigma * eps) / (alpha**2 * STD**2 + sigma**2))
            .square()
            .sum(1)
            / 64
        )
    assert got.std() < .5 * (plain - expected(x, s)).std()


@pytest.mark.parametrize('steps', [None, 6])
@pytest.mark.parametrize('k, b', [(1., .2), (.7, 0.), (1.2, -.1)])
def test_a_wrong_denoiser_pays_what_its_error_is(steps, k, b):
    "½∫E‖ε̂ - ε*‖²dλ more than the exact one, with ε* = σ(z - αμ)/V of variance σ²/V"
    n, s = 4000, CosineSchedule(-5, 6)
    x = data(n, 2, seed=3)
    more = (
        nelbo(gaussian(k, b), x, s, steps, draws=16).diffusion
        - nelbo(exact, x, s, steps, draws=16).diffusion
    )
    logsnr = (
        torch.linspace(-5, 6, 2001, dtype=f64)
        if steps is None
        else s.logsnr(torch.linspace(0, 1, steps + 1, dtype=f64))
    )
    s2 = torch.sigmoid(-logsnr)
    error = 2 * ((k - 1)**2 * s2 / ((1 - s2) * STD**2 + s2) + b**2)
    want = (
        simpson(error.numpy(), x=logsnr.numpy()) / 2
        if steps is None
        else (error[1:] * torch.expm1(-logsnr.diff())).sum().item() / 2
    )
    assert abs(more.mean() - want) < 4.5 * more.std() / n**.5 and want > 20 * more.std() / n**.5


@shapes
@pytest.mark.parametrize('schedule', [CosineSchedule(-5, 6), VESchedule(-5, 6)], ids=lambda s: s.name)
@pytest.mark.parametrize('dtype', [f32, f64])
def test_the_other_two_terms_by_their_definitions(shape, schedule, dtype):
    "KL(q(z_1 given x) ‖ N(0, I)) in unit scale, and E -log N(x; z_0/α, σ²/α²)"
    x = data(*shape, dtype=dtype)
    bound = nelbo(exact, x, schedule, draws=2)
    assert isinstance(bound, Bound) and all(
        q.shape == shape[:1] and q.dtype == dtype and q.isfinite().all() for q in (*bound, bound.total)
    )
    torch.testing.assert_close(
        bound.total, bound.prior + bound.diffusion + bound.reconstruction, rtol=0, atol=0
    )
    end, flat = schedule.level(1.), x.double().flatten(1)
    q = Independent(Normal(flat * end.alpha / end.scale, (end.sigma / end.scale).expand_as(flat)), 1)
    torch.testing.assert_close(
        bound.prior.double(),
        kl_divergence(q, Independent(Normal(torch.zeros_like(flat), 1.0), 1)),
        rtol=1e-4 if dtype == f32 else 1e-10,
        atol=2e-6 if dtype == f32 else 0,
    )
    start, noise = schedule.level(0.), randn(200_000)
    spread = start.sigma / start.alpha
    each = -Normal(0., spread).log_prob(spread * noise)
    assert (
        abs(bound.reconstruction[0] - flat.shape[1] * each.mean())
        < 4 * flat.shape[1] * each.std() / 200_000**0.5
    )


def test_every_example_has_its_own_terms_where_n_is_a_size_of_the_data():
    for shape in ((2, 2), (3, 3, 3)):
        x, s = data(*shape, seed=8), CosineSchedule(-5, 6)
        x[0] += 4  # a far point pays; its neighbour does not
        got = torch.stack(
            [
                nelbo(exact, torch.cat([x] * 40), s, draws=16, seed=i).diffusion.view(40, -1).mean(0)
                for i in range(30)
            ]
        )
        gap = got.mean(0) - expected(x, s)
        assert (gap.abs() < 5 * got.std(0) / 30**.5).all() and expected(x, s)[0] > 2 * expected(x, s)[1]


@few
@given(st.floats(-9, -3), st.floats(3, 9), st.integers(0, 10**6))
def test_the_bound_does_not_know_the_schedule_in_continuous_time(low, high, seed):
    for denoiser in (exact, network_denoiser(Field(2), 'eps')):
        a, b = (
            nelbo(denoiser, data(4, 2), s(low, high), draws=6, seed=seed)
            for s in (CosineSchedule, VESchedule)
        )
        for q, r in zip(a, b): torch.testing.assert_close(q, r, rtol=1e-8, atol=1e-8)


def test_more_steps_tighten_the_bound_down_to_continuous_time():
    "in expectation by the closed form, and so estimated"
    x, s = data(2000, 1), CosineSchedule(-6, 6)
    exactly, got = (
        [f(T) for T in (2, 8, 32, 128, None)]
        for f in (
            lambda T: expected(x, s, T).mean(),
            lambda T: nelbo(exact, x, s, T, draws=128).diffusion.mean(),
        )
    )
    for a, b in zip(got, exactly): assert abs(a / b - 1) < .03
    assert (
        all(a > b for a, b in zip(got, got[1:]))
        and got[0] > 1.5 * got[-1]
        and abs(got[3] / got[4] - 1) < 0.02 + exactly[3] / exactly[4] - 1
    )


@pytest.mark.parametrize('steps', [None, 40])
def test_it_is_a_bound_and_tight_in_continuous_time(steps):
    "on average over the data, for the exact denoiser; the truth is the log density of each x"
    x = data(3000, 2, seed=4)
    over = nelbo(exact, x, CosineSchedule(-12, 12), steps, draws=128).total + Normal(MEAN, STD).log_prob(
        x
    ).sum(1)
    se = over.std() / 3000**.5
    assert over.mean() > -4 * se and se < .02 + .01 * over.mean()
    if steps is None: assert over.mean() < .01 + 4 * se
    else: assert over.mean() > 1
    worse = nelbo(gaussian(0.7, 0.1), x, CosineSchedule(-12, 12), steps, draws=64).total + Normal(
        MEAN, STD
    ).log_prob(x).sum(1)
    assert worse.mean() > over.mean() + 10 * se


def test_the_seed_decides_and_nothing_else_is_touched():
    x, before = data(50, 2), torch.get_rng_state()
    copy = x.clone()
    a, b, c = (nelbo(exact, x, CosineSchedule(-8, 8), draws=8, seed=seed) for seed in (3, 3, 4))
    assert (
        all(map(torch.equal, a, b))
        and (a.diffusion - c.diffusion).abs().min() > 0
        and torch.equal(a.prior, c.prior)
    )
    assert torch.equal(x, copy) and torch.equal(torch.get_rng_state(), before)
    assert not nelbo(network_denoiser(MLP(2, 8), 'v'), data(5, 2, dtype=f32), draws=2).diffusion.requires_grad


@pytest.mark.parametrize('steps, draws', [(None, 1), (None, 7), (5, 1), (5, 7), (1, 3), (5., 2.)])
def test_levels_are_where_they_should_be(steps, draws):
    seen = []
    def denoiser(z, level): seen.append(level.logsnr); return exact(z, level)
    s = CosineSchedule(-5, 6)
    nelbo(denoiser, data(400, 2), s, steps, draws)
    seen = torch.stack(seen)
    assert seen.shape == (draws, 400)
    if steps is None:  # one in each part
        part = (seen + 5) / 11 * draws
        assert (
            torch.equal(part.floor(), torch.arange(draws)[:, None].expand(int(draws), 400).double())
            and (part - part.floor()).std() > 0.25
        )
    # the noisy ends of the steps, each as often
    else:
        grid = s.logsnr(torch.linspace(0, 1, int(steps) + 1, dtype=f64))[1:]
        gap, which = (seen.flatten()[:, None] - grid).abs().min(1)
        assert (
            gap.max() < 1e-12
            and (which.bincount(minlength=int(steps)) / which.numel() - 1 / steps).abs().max()
            < 5 / (which.numel() * steps) ** 0.5
        )


@pytest.mark.parametrize(
    'kw, says',
    [
        *((dict(steps=v), 'steps must') for v in (0, -1, 2.5, '3', True, math.nan)),
        *((dict(draws=v), 'draws must') for v in (0, -1, 1.5, None, '3', math.inf)),
        *((dict(seed=v), 'seed must') for v in (-1, 0.5, None)),
        (dict(schedule=CosineSchedule(-math.inf, 5)), 'finite range of logsnr'),
        (dict(schedule=CosineSchedule(-5, math.inf)), 'finite range of logsnr'),
        (dict(schedule='cosin'), "Did you mean 'cosine'"),
        (dict(schedule=None), 'schedule must'),
    ],
    ids=str,
)
def test_bad_choices_of_the_bound_come_before_any_work(kw, says):
    with pytest.raises((ValueError, TypeError), match=says): nelbo(refuse, data(3, 2), **kw)


def test_the_range_of_the_training_is_honoured():
    net = network_denoiser(lambda z, u: refuse(z, u), 'v', within=(-6, 6))
    for denoiser in (net, Counted(net)):
        for steps in (None, 10):
            with pytest.raises(ValueError, match=r'leaves the range of the training, -6 to 6'):
                nelbo(denoiser, data(3, 2), steps=steps)
    assert (
        nelbo(network_denoiser(Field(2), 'v', within=(-6, 6)), data(3, 2), VESchedule(-6, 6), draws=1)
        .total.isfinite()
        .all()
    )


@pytest.mark.parametrize('f', [nelbo, flow_log_prob])
@pytest.mark.parametrize(
    'x',
    [
        torch.ones(4, 2, dtype=torch.int64),
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        torch.ones(4),
        torch.zeros(0, 2),
        None,
        [[1.0, 2.0]],
    ],
    ids=lambda x: f'{type(x).__name__}{tuple(getattr(x, "shape", ()))}',
)
def test_data_that_are_none_are_named(f, x):
    "images as uint8 are the usual mistake; the losses say so"
    with pytest.raises((TypeError, ValueError), match=r'\bx must\b'): f(exact, x)


@pytest.mark.parametrize('wrong', [lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: u])
def test_a_network_of_the_wrong_shape_is_refused(wrong):
    for f in (nelbo, flow_log_prob):
        with pytest.raises(ValueError, match='the network returned shape'):
            f(network_denoiser(wrong, 'eps'), data(2, 2))


def test_a_bound_that_is_not_finite_is_neither_hidden_nor_catching():
    def broken(z, level): x, eps = exact(z, level); eps = eps.clone(); eps[1] = math.nan; return x, eps
    try:
        got = nelbo(broken, data(6, 2), draws=3).diffusion
    except FloatingPointError as e:
        assert 'logsnr' in str(e)
    else:
        assert got[1].isnan() and not got[[0, 2, 3, 4, 5]].isnan().any(), (
            "one broken example makes the bounds of all the others nan"
        )


@pytest.mark.parametrize('dims', [2, 300])
def test_the_control_variate_helps_in_any_dimension(dims):
    "A denoiser that knows no noise: without control the diffusion term scatters as ‖ε‖², of variance 2D."
    zero = lambda z, level: (z, torch.zeros_like(z))
    x, width, draws = torch.zeros(40, dims, dtype=f64), 10., 4
    found = torch.stack(
        [nelbo(zero, x, CosineSchedule(-5, 5), draws=draws, seed=seed).diffusion for seed in range(40)]
    )
    free = width / 2 * (2 * dims / draws)**0.5
    assert (
        found.std() < free / 2 and found.mean(1).std() < free / 40**0.5 / 2
    )  # one example, and the mean of 40
    assert abs(found.mean() - width / 2 * dims) < 4 * found.mean(1).std() / 40**0.5
