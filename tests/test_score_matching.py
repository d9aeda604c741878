"Attempts to break lfdm.score_matching: divergences against Jacobians, objectives by hand, levels."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd.functional import jacobian

from lfdm import score_matching
from lfdm.losses import DiffusionLoss
from lfdm.schedules import CONTINUOUS, SCHEDULES, network_logsnr, network_time
from lfdm.score_matching import DIRECTIONS, OBJECTIVES, Explicit, Hutchinson, ScoreMatchingLoss, Sliced

torch.set_num_threads(1)
f32, f64, close = torch.float32, torch.float64, torch.testing.assert_close
PRECISIONS = (f64, 1e-6), (f32, 2e-2)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
kinds = pytest.mark.parametrize('kind', [None, *DIRECTIONS])
probe = score_matching.probe_vectors


def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=generator(seed), dtype=dtype)
def times(n): return torch.linspace(.05, .95, n, dtype=f64)
def column(q, x): return q.view(-1, *[1] * (x.ndim - 1))


class Smooth(torch.nn.Module):
    "A random smooth field on data of any shape, with parameters that all count"
    def __init__(self, shape, seed=0, dtype=f64):
        super().__init__()
        d = math.prod(shape[1:])
        sizes = enumerate([(d, 8), (8,), (8, d)])
        self.a, self.b, self.c = (torch.nn.Parameter(randn(*s, seed=seed + i, dtype=dtype)) for i, s in sizes)

    def forward(self, z, u=None): return (torch.tanh(z.flatten(1) @ self.a + self.b) @ self.c).view(z.shape)


# ---- divergences

def estimate(f, z, u):
    "The divergence, along u if it is given."
    if u is None: return score_matching.divergence(f, z)
    return score_matching.projected_divergence(f, z, u)


@pytest.mark.parametrize('shape', [(3, 3), (2, 2, 3, 3)], ids=str)
@kinds
def test_divergences_and_their_gradients_are_those_of_the_jacobian(shape, kind):
    "and what a function of it teaches; without gradients nothing is kept"
    f, z, d = Smooth(shape), randn(*shape, seed=9), math.prod(shape[1:])
    u = probe(z, kind, generator(3)) if kind else None
    y, got = estimate(f, z, u)
    one = lambda q: f(q.view(1, *shape[1:])).flatten()
    J = torch.stack([jacobian(one, e.flatten(), create_graph=True) for e in z]).view(len(z), d, d)
    exact = torch.einsum('nii->n', J)
    if kind: exact = torch.einsum('ni,nij,nj->n', u.flatten(1), J, u.flatten(1))
    assert torch.equal(y, f(z)) and got.shape == shape[:1] and got.dtype == f64
    close(got, exact, rtol=1e-11, atol=1e-11)
    learned = [torch.autograd.grad((t.square().sum() + v.square().sum()), f.parameters())
               for t, v in ((got, y), (exact, f(z)))]
    for mine, want in zip(*learned): close(mine, want, rtol=1e-9, atol=1e-9)
    with torch.no_grad(): without = estimate(f, z, u)
    for a, b in zip(without, (y, got)): assert torch.equal(a, b.detach()) and not a.requires_grad
    assert not z.requires_grad and z.grad is None


@kinds
@pytest.mark.parametrize('f', [
    lambda z: z.detach(), lambda z: z.detach() * torch.ones(1, requires_grad=True), lambda z: z.long().to(z)])
def test_a_field_that_cannot_be_differentiated_is_refused(f, kind):
    for z, wanted in itertools.product((randn(4, 2), randn(4, 2).requires_grad_()), (True, False)):
        with torch.set_grad_enabled(wanted), pytest.raises(ValueError, match='differentiable in its'):
            estimate(f, z, kind and probe(z, kind))


@pytest.mark.parametrize('kind', DIRECTIONS)
def test_directions_have_the_length_of_their_kind(kind, n=20_000):
    "of data of any shape; their second moment is checked on the page"
    z, state = torch.zeros(n, 2, 2, dtype=f64), torch.get_rng_state()
    u = probe(z, kind, generator(5))
    assert torch.equal(u, probe(z, kind, generator(5))) and torch.equal(state, torch.get_rng_state())
    assert u.dtype == f64 and probe(z.float(), kind).dtype == f32
    length2 = u.flatten(1).square().sum(1)
    if kind == 'normal': assert abs(length2.mean() - 4) < .2 and abs(length2.var() - 8) < .8
    else: close(length2, torch.full((n,), 4., dtype=f64))


# ---- five objectives, one gradient

def gaussian_score(z, alpha, sigma):
    "Of data of mean 1 and standard deviation ½"
    return (alpha - z) / (alpha**2 / 4 + sigma**2)


ALL = [Explicit(gaussian_score), 'implicit', Hutchinson(), Sliced('sign'), 'denoising']


@pytest.mark.parametrize('schedule', ['cosine', 've', 'ddpm', 'edm_sample'])
@pytest.mark.parametrize('shape', [(3, 3), (2, 3, 2, 2)], ids=str)
def test_values_and_gradients_for_an_affine_network_by_hand(schedule, shape):
    "where n is a size of the data too; the Jacobian is k/√(α²+σ²) times one: signs and spheres make no error"
    x, eps, t, s = randn(*shape, seed=1), randn(*shape, seed=2), times(shape[0]), SCHEDULES[schedule]()
    alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
    z, scale = alpha * x + sigma * eps, (alpha**2 + sigma**2).sqrt()
    k, b = (torch.tensor(q, dtype=f64, requires_grad=True) for q in (-.7, .2))
    net, score, mean = lambda z, u: k * z + b, k * z / scale + b, lambda q: q.flatten(1).mean(1)
    u, implicit = probe(z, 'normal', generator(7)), mean(score**2 + 2 * k / scale)
    wanted = [(Explicit(gaussian_score), mean((gaussian_score(z, alpha, sigma) - score)**2)),
              ('denoising', mean((-eps / sigma - score)**2)), ('implicit', implicit),
              ('hutchinson', implicit), (Hutchinson('sphere'), implicit),
              ('sliced', mean(u * score)**2 * u[0].numel() + mean(2 * k / scale * u**2))]
    for (objective, want), weighting in itertools.product(wanted, ('weighted', 'nelbo')):
        factor = DiffusionLoss(schedule, 'score', weighting).factor(t)
        got = ScoreMatchingLoss(objective, schedule, weighting)(net, x, t, eps, generator(7))
        close(got, factor * want, rtol=1e-9, atol=1e-12)
        learned = [torch.autograd.grad(q.sum(), (k, b), retain_graph=True) for q in (got, factor * want)]
        close(*learned, rtol=1e-9, atol=1e-12)


def test_sixteen_bits_cost_the_rounding_of_the_network_only(dtype=torch.bfloat16):
    x, near = randn(64, 2).to(dtype), 4 * torch.finfo(dtype).eps
    for objective in ALL:
        loss, seen = ScoreMatchingLoss(objective, levels=[-3., 2., 9.], weighting='nelbo'), set()
        net = lambda z, u, seen=seen: seen.add(z.dtype) or seen.add(u.dtype) or torch.sin(z)
        got = loss(net, x, generator=generator(1))
        assert seen == {dtype} and got.dtype == f32 and loss.drawn(x)[0].dtype == f32
        want = loss(net, x.float(), generator=generator(1))
        assert ((got - want).abs() <= near * (want.abs() + want.abs().mean() + 1)).all(), objective


# ---- levels

@few
@given(st.sampled_from([*CONTINUOUS]), st.floats(0, 1), st.floats(0, 1))
def test_only_the_listed_levels_are_visited_and_all_alike(schedule, u, v):
    "the ends of the range too: a time of -1e-17 must not be taken for one outside [0, 1]"
    s = SCHEDULES[schedule]()
    low, high = max(-12., s.reach()[0]), 12.
    a, b = sorted(low + (high - low) * w for w in (u, v))
    if b - a > .1: s = SCHEDULES[schedule](logsnr_min=a, logsnr_max=b)
    want = torch.tensor([s.logsnr_min, (s.logsnr_min + s.logsnr_max) / 2, s.logsnr_max], dtype=f64)
    for levels, (dtype, near) in itertools.product((want, want[0].item()), PRECISIONS):
        loss, seen = ScoreMatchingLoss('denoising', s, levels=levels), []
        loss(lambda z, u, seen=seen: seen.append(u) or z, randn(200, 2, dtype=dtype), generator=generator(1))
        gap = (network_logsnr(seen[0].double())[:, None] - loss.levels).abs()
        assert gap.min(1).values.max() < near and ((gap < near).double().mean(0) - 1 / len(gap.T)).max() < .15


def test_given_times_win_over_levels():
    net, x, eps, t = Smooth((4, 2)), randn(4, 2), randn(4, 2, seed=1), times(4)
    plain, listed = (ScoreMatchingLoss('implicit', levels=levels) for levels in (None, [2.]))
    assert torch.equal(listed(net, x, t, eps), plain(net, x, t, eps))
    assert not torch.equal(listed(net, x, eps=eps), plain(net, x, t, eps))


# ---- what must be refused

@pytest.mark.parametrize('bad, says', [
    ('explicit', 'dataset.score'), ('denoising adaptive nelbo', 'does not teach the adaptive')])
def test_bad_choices_are_named(bad, says):
    with pytest.raises(ValueError, match=says): ScoreMatchingLoss(*bad.split())


def test_levels_and_networks_that_do_not_fit_are_named():
    for bad in ([], [13.], [0., 12.91], [0., math.inf]):
        with pytest.raises(ValueError, match='levels must be noise levels λ from -12.9 to 12.9, not'):
            ScoreMatchingLoss(levels=bad)
    for net, name in itertools.product((lambda z, u: z[:, :1], lambda z, u: None), list(OBJECTIVES)[1:]):
        with pytest.raises((TypeError, ValueError), match='the network returned'):
            ScoreMatchingLoss(name)(net, torch.zeros(2, 2))


# ---- the scaled network

def test_a_scaled_score_is_over_sigma_at_every_level():
    "λ from -80 to 80, as far as a run may go; σ of unit scale"
    for dtype, near in PRECISIONS:
        logsnr, z = torch.linspace(-80, 80, 41, dtype=dtype), randn(41, 2, 4, dtype=dtype)
        scaled = score_matching.ScaledScore(lambda z, u: z)
        got, sigma = scaled(z, network_time(logsnr)), column(torch.sigmoid(-logsnr.double()).sqrt(), z)
        assert got.dtype == dtype and got.isfinite().all()
        close(got.double(), z.double() / sigma, rtol=near / 1000, atol=0)
        assert torch.equal(scaled(z, torch.ones(41, dtype=dtype)), z)   # pure noise: σ = 1
