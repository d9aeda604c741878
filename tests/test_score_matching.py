"Attempts to break lfdm.score_matching: divergences against Jacobians, objectives by hand, levels."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.autograd.functional import jacobian

from lfdm.data import DATASETS
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP
from lfdm.schedules import CONTINUOUS, SCHEDULES, network_logsnr, network_time
from lfdm.score_matching import (
    DIRECTIONS,
    OBJECTIVES,
    Explicit,
    Hutchinson,
    Implicit,
    ScaledScore,
    ScoreMatchingLoss,
    Sliced,
    divergence,
    probe_vectors,
    projected_divergence,
)
from lfdm.weightings import WEIGHTINGS

torch.set_num_threads(1)
f32, f64, close = torch.float32, torch.float64, torch.testing.assert_close
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
FIXED = [name for name, cls in SCHEDULES.items() if not cls.learned]   # a schedule that learns is refused
SHAPES = [(4, 1), (5, 3), (3, 3), (2, 2, 3, 3), (3, 3, 3)]
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
kinds = pytest.mark.parametrize('kind', DIRECTIONS)
projected = pytest.mark.parametrize('projected', [False, True])


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

def jacobians(f, z, graph=False):
    "(n, D, D), one example at a time, by a route of its own"
    d, one = z[0].numel(), lambda q: f(q.view(1, *z.shape[1:])).flatten()
    return torch.stack([jacobian(one, e.flatten(), create_graph=graph) for e in z]).view(len(z), d, d)


def estimate(f, z, u):
    "The divergence, along u if it is given."
    return divergence(f, z) if u is None else projected_divergence(f, z, u)


@shapes
@pytest.mark.parametrize('kind', [None, *DIRECTIONS])
def test_divergences_and_their_gradients_are_those_of_the_jacobian(shape, kind):
    "the trace, or the quadratic form, and what a function of it teaches the parameters"
    f, z = Smooth(shape), randn(*shape, seed=9)
    u = probe_vectors(z, kind, generator(3)) if kind else None
    y, got = estimate(f, z, u)
    J = jacobians(f, z, graph=True)
    exact = torch.einsum('nii->n', J)
    if kind: exact = torch.einsum('ni,nij,nj->n', u.flatten(1), J, u.flatten(1))
    assert torch.equal(y, f(z)) and got.shape == shape[:1] and got.dtype == f64
    close(got, exact, rtol=1e-11, atol=1e-11)
    learned = [torch.autograd.grad((t.square().sum() + v.square().sum()), f.parameters())
               for t, v in ((got, y), (exact, f(z)))]
    for mine, want in zip(*learned):
        close(mine, want, rtol=1e-9, atol=1e-9)
        assert want.abs().max() > 1e-3


@projected
def test_without_gradients_the_value_is_the_same_and_nothing_is_kept(projected):
    f, z = Smooth((5, 3)), randn(5, 3, seed=9)
    u = probe_vectors(z, 'sign', generator()) if projected else None
    with torch.no_grad(): without = estimate(f, z, u)
    with_graph = estimate(f, z, u)
    for a, b in zip(without, with_graph):
        assert torch.equal(a, b.detach()) and b.requires_grad and not a.requires_grad
    assert all(p.grad is None for p in f.parameters()) and not z.requires_grad and z.grad is None


def test_what_needs_no_second_derivative_works_too():
    "a linear field: its divergence is constant, and the gradient reaches the weights"
    net = torch.nn.Linear(3, 3, bias=False).double()
    _, trace = divergence(net, randn(4, 3))
    close(trace, net.weight.trace().expand(4))
    trace.sum().backward()
    close(net.weight.grad, 4 * torch.eye(3, dtype=f64))


@projected
@pytest.mark.parametrize('f', [
    lambda z: z.detach(), lambda z: torch.zeros_like(z),
    lambda z: z.detach() * torch.ones(1, requires_grad=True),
    lambda z: z.long().to(z), lambda z: torch.no_grad()(torch.sin)(z)],
    ids=['detached', 'constant', 'parameters alone', 'whole', 'no_grad'])
def test_a_field_that_cannot_be_differentiated_is_refused(f, projected):
    for z in (randn(4, 2), randn(4, 2).requires_grad_()):
        for wanted in (True, False):
            with torch.set_grad_enabled(wanted), pytest.raises(ValueError, match='differentiable in its'):
                estimate(f, z, torch.ones_like(z) if projected else None)


@pytest.mark.parametrize('name', ['implicit', 'hutchinson', 'sliced'])
@pytest.mark.parametrize('net, error, words', [
    (lambda z, u: torch.ones_like(z), ValueError, 'differentiable in its input'),
    (lambda z, u: z[:, :1], ValueError, 'the network returned shape'),
    (lambda z, u: None, TypeError, 'the network returned')])
def test_a_loss_refuses_such_a_network(name, net, error, words):
    with pytest.raises(error, match=words): ScoreMatchingLoss(name)(net, randn(4, 2))


# ---- directions

@kinds
@pytest.mark.parametrize('shape', [(40_000, 1), (40_000, 3), (40_000, 2, 2)], ids=str)
def test_directions_have_the_identity_for_second_moment(kind, shape):
    z, state = torch.zeros(shape, dtype=f64), torch.get_rng_state()
    u, d, n = probe_vectors(z, kind, generator(5)), math.prod(shape[1:]), shape[0]
    assert torch.equal(u, probe_vectors(z, kind, generator(5))) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(u, probe_vectors(z, kind, generator(6)))
    assert u.shape == z.shape and u.dtype == f64 and probe_vectors(z.float(), kind).dtype == f32
    flat = u.flatten(1)
    length2 = flat.square().sum(1)
    assert (flat.T @ flat / n - torch.eye(d)).abs().max() < 5 * (3 / n)**.5
    assert flat.mean(0).abs().max() < 5 / n**.5
    if kind == 'sign': assert set(u.unique().tolist()) == {-1., 1.}
    if kind == 'normal': assert abs(length2.var() - 2 * d) < .2 * d
    else: close(length2, torch.full((n,), float(d), dtype=f64))


@pytest.mark.parametrize('bad', ['signs', '', None, 3], ids=repr)
def test_unknown_directions_are_named(bad):
    x = torch.zeros(2, 2)
    by_loss = [lambda o=o: ScoreMatchingLoss(o(bad))(MLP(2, 8), x) for o in (Hutchinson, Sliced)]
    for call in (lambda: probe_vectors(x, bad), *by_loss):
        with pytest.raises(ValueError, match=f'unknown kind of directions {bad!r}'): call()


# ---- five objectives, one gradient

def gaussian_score(z, alpha, sigma):
    "Of data of mean 1 and standard deviation ½"
    return (alpha - z) / (alpha**2 / 4 + sigma**2)


ALL = [Explicit(gaussian_score), Implicit(), Hutchinson(), Sliced('sign'), OBJECTIVES['denoising']()]
objectives = pytest.mark.parametrize('objective', ALL, ids=str)


@pytest.mark.parametrize('schedule', FIXED)
@pytest.mark.parametrize('shape', [(3, 3), (2, 2), (4, 1), (3, 3, 3), (2, 3, 2, 2)], ids=str)
def test_values_for_an_affine_network_by_hand(schedule, shape):
    "where n is a size of the data too; the Jacobian is k/√(α²+σ²) times one: signs and spheres make no error"
    x, eps, t, s = randn(*shape, seed=1), randn(*shape, seed=2), times(shape[0]), SCHEDULES[schedule]()
    alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
    z, scale = alpha * x + sigma * eps, (alpha**2 + sigma**2).sqrt()
    net, score = lambda z, u: -.7 * z + .2, -.7 * z / scale + .2
    mean = lambda q: q.flatten(1).mean(1)
    implicit, squares = mean(score**2 + 2 * -.7 / scale), lambda true: mean((true - score)**2)
    wanted = [(Explicit(gaussian_score), squares(gaussian_score(z, alpha, sigma))),
              ('denoising', squares(-eps / sigma)), ('implicit', implicit),
              ('hutchinson', implicit), (Hutchinson('sphere'), implicit)]
    for (objective, want), weighting in itertools.product(wanted, WEIGHTINGS):
        factor = DiffusionLoss(schedule, 'score', weighting).factor(t)
        got = ScoreMatchingLoss(objective, schedule, weighting)(net, x, t, eps)
        close(got, factor * want, rtol=1e-9, atol=0)
    u = probe_vectors(z, 'normal', generator(7)).flatten(1)
    want = (u * score.flatten(1)).sum(1)**2 + 2 * -.7 / scale.flatten() * u.square().sum(1)
    got = ScoreMatchingLoss('sliced', schedule)(net, x, t, eps, generator(7))
    close(got, want / u.shape[1], rtol=1e-9, atol=1e-12)


def test_every_objective_has_the_explicit_ones_gradient():
    "a mixture's data, a small network: mean gradients over many batches differ within their standard errors"
    data, batches, n, s = DATASETS['cluster'](), 30, 2000, SCHEDULES['cosine'](-2, 3)
    net, x = Smooth((n, 2), 5), data.sample(batches * n, seed=1).double().view(batches, n, 2)
    def gradients(objective):
        loss = ScoreMatchingLoss(objective, s, 'sigmoid')
        values = (loss(net, x[i], generator=generator(100 + i)).mean() for i in range(batches))
        each = (torch.autograd.grad(v, net.parameters()) for v in values)
        return torch.stack([torch.cat([q.flatten() for q in grads]) for grads in each])
    exact = gradients(Explicit(data.score))
    for objective in ('implicit', *map(Hutchinson, DIRECTIONS), *map(Sliced, DIRECTIONS), 'denoising'):
        gap = gradients(objective) - exact   # the same times and noise: what differs is the objective
        error = gap.std(0) / batches**.5
        z = gap.mean(0) / error
        assert z.abs().max() < 5 and z.square().mean() < 2.5, objective
        assert error.norm() < .2 * exact.mean(0).norm()   # the test can see


@objectives
@pytest.mark.parametrize('shape', [(2, 2), (3, 3, 3), (2, 3, 2, 2), (4, 1)], ids=str)
def test_examples_do_not_see_each_other(objective, shape):
    "another second example leaves the first as it was"
    x, eps, t = randn(*shape, seed=1), randn(*shape, seed=2), times(shape[0])
    net, other = lambda z, u: torch.sin(z) + column(u, z), x.clone()
    other[1:] += 1
    loss = ScoreMatchingLoss(objective, 'cosine', 'nelbo')
    whole, changed = (loss(net, v, t, eps, generator(8)) for v in (x, other))
    close(whole[:1], changed[:1], rtol=1e-10, atol=0)
    assert whole.shape == shape[:1] and len(whole.unique()) == shape[0] and (whole[1:] != changed[1:]).all()


@objectives
def test_a_loss_is_pure_and_works_without_gradients(objective):
    net, x, loss = Smooth((5, 2), dtype=f32), randn(5, 2, dtype=f32), ScoreMatchingLoss(objective)
    copy, before = x.clone(), torch.get_rng_state()
    with torch.no_grad(): value = loss(net, x, generator=generator(1))
    again = loss(net, x, generator=generator(1))
    assert not value.requires_grad and again.requires_grad and value.shape == (5,) and value.dtype == f32
    close(value, again.detach(), rtol=1e-6, atol=0)
    assert torch.equal(x, copy) and not x.requires_grad and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(value, loss(net, x, generator=generator(2)).detach())
    assert all(p.grad is None for p in net.parameters())


# ---- levels

def visited(schedule, levels, n=3000, dtype=f64):
    "The loss, and the levels that its network sees."
    seen, loss = [], ScoreMatchingLoss('denoising', schedule, levels=levels)
    loss(lambda z, u: seen.append(u) or z * 1., randn(n, 2, dtype=dtype), generator=generator(1))
    return loss, network_logsnr(torch.cat(seen).double())


@pytest.mark.parametrize('schedule', CONTINUOUS)
@pytest.mark.parametrize('levels', [[-4., 0.5, 7.], (1, 3), torch.tensor([-1., 4.]), 2.5], ids=str)
@pytest.mark.parametrize('dtype, tolerance', [(f64, 1e-9), (f32, 2e-3)])
def test_only_the_listed_levels_are_visited_and_all_alike(schedule, levels, dtype, tolerance):
    want = torch.as_tensor(levels, dtype=f64).reshape(-1)
    loss, got = visited(schedule, levels, dtype=dtype)
    gap, which = (got[:, None] - want).abs().min(1)
    shares = which.bincount(minlength=len(want)).double() / len(got)
    assert gap.max() < tolerance and (shares - 1 / len(want)).abs().max() < 5 / (len(got) * len(want))**.5
    assert repr(loss) == f'ScoreMatchingLoss(Denoising(), {loss.schedule}, {loss.weighting}, {want.tolist()})'


@pytest.mark.parametrize('schedule', CONTINUOUS)
@few
@given(u=st.floats(0, 1), v=st.floats(0, 1))
def test_the_ends_of_the_range_are_levels_too(schedule, u, v):
    "a time of -1e-17 must not be taken for one outside [0, 1]"
    s = SCHEDULES[schedule]()
    low, high = (max(-12., s.reach()[0]), 12.)
    a, b = sorted(low + (high - low) * w for w in (u, v))
    if b - a > .1: s = SCHEDULES[schedule](logsnr_min=a, logsnr_max=b)
    ends = [s.logsnr_min, s.logsnr_max]
    for dtype, tolerance in ((f32, 2e-2), (f64, 1e-6)):
        got = visited(s, ends, 40, dtype)[1]
        assert (got[:, None] - torch.tensor(ends, dtype=f64)).abs().min(1).values.max() < tolerance


@pytest.mark.parametrize('schedule', ['discrete(T=20)', 'ddpm'])
@pytest.mark.parametrize('dtype, tolerance', [(f64, 1e-9), (f32, 2e-3)])
def test_a_listed_level_on_a_staircase_is_the_level_of_its_cell(schedule, dtype, tolerance):
    loss, got = visited(schedule, [-4., 0.5, 7.], dtype=dtype)
    own = loss.schedule.level_at(loss.levels).logsnr
    assert (own <= loss.levels).all() and (loss.schedule.before(own) > loss.levels).all()
    gap = (got[:, None] - own).abs()
    assert gap.min(1).values.max() < tolerance and gap.min(0).values.max() < tolerance


BAD_LEVELS = [[], [13.], [-13.], [0., 12.91], [math.nan], [0., math.inf], 'a', [None], torch.tensor([])]


@pytest.mark.parametrize('levels', BAD_LEVELS, ids=str)
def test_levels_that_are_none_are_named_before_any_work(levels):
    with pytest.raises(ValueError, match='levels must be noise levels λ from -12.9 to 12.9') as e:
        ScoreMatchingLoss(levels=levels)
    assert repr(levels) in str(e.value)


def test_given_times_win_over_levels_and_given_noise_over_drawn():
    net, x, eps, t = Smooth((4, 2)), randn(4, 2), randn(4, 2, seed=1), times(4)
    for objective in ('denoising', 'implicit'):
        plain, listed = ScoreMatchingLoss(objective), ScoreMatchingLoss(objective, levels=[2.])
        assert torch.equal(listed(net, x, t, eps), plain(net, x, t, eps))
        at_two = plain.schedule.t(torch.tensor(2., dtype=f64)).expand(4)
        close(listed(net, x, eps=eps), plain(net, x, at_two, eps), rtol=1e-12, atol=0)
        assert torch.equal(plain(net, x, t, eps, generator(1)), plain(net, x, t, eps, generator(2)))
    for bad in (dict(t=torch.rand(3)), dict(t=1.5), dict(eps=randn(2)), dict(eps=randn(4, 1))):
        with pytest.raises((ValueError, TypeError)): listed(net, x, **bad)
    for x, loss in itertools.product((torch.ones(4), None, [[1., 2.]], torch.zeros(0, 2)), (plain, listed)):
        with pytest.raises(TypeError, match='x must be'): loss(net, x)


# ---- choices

@pytest.mark.parametrize('call, error, words', [
    (lambda: ScoreMatchingLoss(Explicit), ValueError, 'Explicit\\(dataset.score\\)'),
    (lambda: ScoreMatchingLoss('explicit'), ValueError, 'dataset.score'),
    (lambda: Explicit('score'), ValueError, 'exact score'),
    (lambda: Explicit(DATASETS['cluster']()), ValueError, 'exact score'),
    (lambda: ScoreMatchingLoss('implict'), ValueError, "Did you mean 'implicit'"),
    (lambda: ScoreMatchingLoss(None), TypeError, 'objective must be'),
    (lambda: ScoreMatchingLoss(dict), TypeError, 'objective must be'),
    (lambda: ScoreMatchingLoss(schedule='cosin'), ValueError, "Did you mean 'cosine'"),
    (lambda: ScoreMatchingLoss('denoising', 'adaptive', 'nelbo'), ValueError, 'does not teach the adaptive'),
    (lambda: ScoreMatchingLoss(weighting='nelb'), ValueError, "Did you mean 'nelbo'"),
    (lambda: ScoreMatchingLoss('implicit', SCHEDULES['ve'](-3, 5), levels=[6.]), ValueError, 'from -3 to 5')])
def test_bad_choices_are_named(call, error, words):
    with pytest.raises(error, match=words): call()


# ---- the scaled network

@pytest.mark.parametrize('dtype, tolerance', [(f32, 1e-5), (f64, 1e-11)])
@pytest.mark.parametrize('shape', [(1,), (3,), (2, 4, 4)], ids=str)
def test_a_scaled_score_is_over_sigma_at_every_level(dtype, tolerance, shape):
    "λ from -80 to 80, as far as a run may go; σ of unit scale, whatever the schedule"
    logsnr, z = torch.linspace(-80, 80, 41, dtype=dtype), randn(41, *shape, dtype=dtype)
    scaled = ScaledScore(lambda z, u: z)
    got, sigma = scaled(z, network_time(logsnr)), column(torch.sigmoid(-logsnr.double()).sqrt(), z)
    assert got.dtype == dtype and got.isfinite().all()
    close(got.double(), z.double() / sigma, rtol=tolerance, atol=0)
    assert torch.equal(scaled(z, torch.ones(41, dtype=dtype)), z)   # pure noise: σ = 1
