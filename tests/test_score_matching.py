"Attempts to break lfdm.score_matching: divergences against Jacobians, five objectives with one gradient, lists of levels, wrong input."
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
from lfdm.score_matching import DIRECTIONS, OBJECTIVES, Denoising, Explicit, Hutchinson, Implicit, ScaledScore, ScoreMatchingLoss, Sliced, divergence, probe_vectors, projected_divergence
from lfdm.weightings import WEIGHTINGS

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=15, deadline=None, derandomize=True, database=None)
FIXED = [name for name, cls in SCHEDULES.items() if not cls.learned]   # an objective need not be a loss per level, so it cannot teach a schedule
SHAPES = [(4, 1), (5, 3), (3, 3), (2, 2, 3, 3), (3, 3, 3)]
shapes = pytest.mark.parametrize('shape', SHAPES, ids=str)
kinds = pytest.mark.parametrize('kind', DIRECTIONS)
implicit = pytest.mark.parametrize('name', ['implicit', 'hutchinson', 'sliced'])


def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=f64): return torch.randn(*shape, generator=generator(seed), dtype=dtype)


class Smooth(torch.nn.Module):
    "A random smooth field on data of any shape, with parameters that all count"
    def __init__(self, shape, seed=0, dtype=f64):
        super().__init__()
        d = math.prod(shape[1:])
        self.a, self.b, self.c = (torch.nn.Parameter(randn(*s, seed=seed + i, dtype=dtype)) for i, s in enumerate([(d, 8), (8,), (8, d)]))
    def forward(self, z, u=None): return (torch.tanh(z.flatten(1) @ self.a + self.b) @ self.c).view(z.shape)


def jacobians(f, z, graph=False):
    "(n, D, D), one example at a time, by a route of its own"
    d = z[0].numel()
    return torch.stack([jacobian(lambda q: f(q.view(1, *z.shape[1:])).flatten(), e.flatten(), create_graph=graph) for e in z]).view(len(z), d, d)


def traces(f, z, graph=False): return jacobians(f, z, graph).diagonal(dim1=1, dim2=2).sum(1)


# ---- divergences

@shapes
def test_the_divergence_is_the_trace_of_the_jacobian(shape):
    f, z = Smooth(shape), randn(*shape, seed=9)
    y, trace = divergence(f, z)
    assert torch.equal(y, f(z)) and trace.shape == shape[:1] and trace.dtype == f64
    torch.testing.assert_close(trace, traces(f, z), rtol=1e-11, atol=1e-11)


@shapes
@kinds
def test_the_projected_divergence_is_the_quadratic_form(shape, kind):
    f, z = Smooth(shape), randn(*shape, seed=9)
    u = probe_vectors(z, kind, generator(3))
    y, got = projected_divergence(f, z, u)
    torch.testing.assert_close(got, torch.einsum('ni,nij,nj->n', u.flatten(1), jacobians(f, z), u.flatten(1)), rtol=1e-11, atol=1e-11)
    assert torch.equal(y, f(z)) and got.shape == shape[:1]


def test_all_signs_together_give_the_trace_exactly():
    f, z = Smooth((1, 4)), randn(1, 4, seed=9)
    signs = torch.tensor(list(itertools.product((-1., 1.), repeat=4)), dtype=f64)
    _, got = projected_divergence(f, z.expand(16, 4), signs)
    torch.testing.assert_close(got.mean(), divergence(f, z)[1][0], rtol=1e-12, atol=0)
    assert got.std() > 1e-3


@kinds
def test_hutchinson_is_unbiased(kind):
    f, z, n = Smooth((1, 2, 2)), randn(1, 2, 2, seed=9).expand(20_000, 2, 2), 20_000
    _, got = projected_divergence(f, z, probe_vectors(z, kind, generator(1)))
    error = got.mean() - traces(f, z[:1])[0]
    assert abs(error) < 4 * got.std() / n**.5 and got.std() > .01


@shapes
@pytest.mark.parametrize('projected', [False, True])
def test_parameters_feel_the_divergence(shape, projected):
    "the gradient of a function of the trace, against that through a Jacobian built with a graph"
    f, z, u = Smooth(shape), randn(*shape, seed=9), randn(*shape, seed=4)
    y, trace = projected_divergence(f, z, u) if projected else divergence(f, z)
    J = jacobians(f, z, True)
    exact = torch.einsum('ni,nij,nj->n', u.flatten(1), J, u.flatten(1)) if projected else J.diagonal(dim1=1, dim2=2).sum(1)
    both = [torch.autograd.grad((t.square() + v.square().flatten(1).sum(1)).sum(), f.parameters()) for t, v in ((trace, y), (exact, f(z)))]
    for got, want in zip(*both):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize('projected', [False, True])
def test_without_gradients_the_value_is_the_same_and_nothing_is_kept(projected):
    f, z = Smooth((5, 3)), randn(5, 3, seed=9)
    call = lambda: projected_divergence(f, z, probe_vectors(z, 'sign', generator())) if projected else divergence(f, z)
    with torch.no_grad(): y, trace = call()
    assert not y.requires_grad and not trace.requires_grad
    with_grad = call()
    assert torch.equal(y, with_grad[0].detach()) and torch.equal(trace, with_grad[1].detach()) and with_grad[1].requires_grad
    assert all(p.grad is None for p in f.parameters()) and not z.requires_grad and z.grad is None


def test_what_needs_no_second_derivative_works_too():
    "a linear field and one of ReLUs: the divergence is constant where it is, and its gradient still reaches the weights"
    net = torch.nn.Linear(3, 3, bias=False).double()
    _, trace = divergence(net, randn(4, 3))
    torch.testing.assert_close(trace, net.weight.diagonal().sum().expand(4))
    trace.sum().backward()
    torch.testing.assert_close(net.weight.grad, 4 * torch.eye(3, dtype=f64))
    torch.manual_seed(0)
    relu = MLP(3, 16).double()
    f = lambda z: relu(z, torch.full((len(z),), .3, dtype=f64))
    torch.testing.assert_close(divergence(f, randn(4, 3))[1], traces(f, randn(4, 3)))


@pytest.mark.parametrize('f', [lambda z: z.detach(), lambda z: torch.zeros_like(z), lambda z: z.detach() * torch.ones(1, requires_grad=True),
                               lambda z: z.long().to(z), lambda z: torch.no_grad()(torch.sin)(z)], ids=['detached', 'constant', 'parameters alone', 'whole', 'no_grad'])
def test_a_field_that_cannot_be_differentiated_is_refused(f):
    for z in (randn(4, 2), randn(4, 2).requires_grad_()):
        for call in (divergence, lambda f, z: projected_divergence(f, z, torch.ones_like(z))):
            with pytest.raises(ValueError, match='differentiable in its input'): call(f, z)
            with torch.no_grad(), pytest.raises(ValueError, match='differentiable in its input'): call(f, z)


@implicit
def test_a_loss_refuses_it_too(name):
    with pytest.raises(ValueError, match='differentiable in its input'): ScoreMatchingLoss(name)(lambda z, u: torch.ones_like(z), randn(4, 2))
    with pytest.raises(ValueError, match='the network returned shape'): ScoreMatchingLoss(name)(lambda z, u: z[:, :1], randn(4, 2))
    with pytest.raises(TypeError, match='the network returned'): ScoreMatchingLoss(name)(lambda z, u: None, randn(4, 2))


# ---- directions

@kinds
@pytest.mark.parametrize('shape', [(40_000, 1), (40_000, 3), (40_000, 2, 2)], ids=str)
def test_directions_have_the_identity_for_second_moment(kind, shape):
    z = torch.zeros(shape, dtype=f64)
    u = probe_vectors(z, kind, generator(5))
    assert u.shape == z.shape and u.dtype == f64 and probe_vectors(z.float(), kind).dtype == f32
    flat, d = u.flatten(1), math.prod(shape[1:])
    assert (flat.T @ flat / len(u) - torch.eye(d)).abs().max() < 5 * 3**.5 / len(u)**.5 and flat.mean(0).abs().max() < 5 / len(u)**.5
    if kind == 'sign': assert set(u.unique().tolist()) == {-1., 1.}
    if kind != 'normal': torch.testing.assert_close(flat.square().sum(1), torch.full((len(u),), float(d), dtype=f64))
    if kind == 'normal': assert abs(flat.square().sum(1).var() - 2 * d) < .2 * d


@kinds
def test_the_generator_decides_the_directions(kind):
    z, before = torch.zeros(5, 3), torch.get_rng_state()
    assert torch.equal(probe_vectors(z, kind, generator(1)), probe_vectors(z, kind, generator(1)))
    assert not torch.equal(probe_vectors(z, kind, generator(1)), probe_vectors(z, kind, generator(2))) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize('bad', ['signs', '', None, 3], ids=repr)
def test_unknown_directions_are_named(bad):
    for call in (lambda: probe_vectors(torch.zeros(2, 2), bad), lambda: ScoreMatchingLoss(Hutchinson(bad))(MLP(2, 8), torch.zeros(2, 2)), lambda: ScoreMatchingLoss(Sliced(bad))(MLP(2, 8), torch.zeros(2, 2))):
        with pytest.raises(ValueError, match=f'unknown kind of directions {bad!r}'): call()


# ---- five objectives, one gradient

class Gaussian:
    "Data of mean 1 and standard deviation ½"
    def score(self, z, alpha, sigma): return (alpha - z) / (alpha**2 / 4 + sigma**2)


def affine(k, b): return lambda z, u: k * z + b
def times(n): return torch.linspace(.05, .95, n, dtype=f64)


@pytest.mark.parametrize('schedule', FIXED)
@pytest.mark.parametrize('shape', [(3, 3), (2, 2), (4, 1), (3, 3, 3), (2, 3, 2, 2)], ids=str)
def test_values_for_an_affine_network_by_hand(schedule, shape):
    "where n is a size of the data too; the Jacobian is k/√(α²+σ²) times one, so signs and spheres estimate it without error"
    x, eps, t, s = randn(*shape, seed=1), randn(*shape, seed=2), times(shape[0]), SCHEDULES[schedule]()
    column = lambda q: q.view(-1, *[1] * (len(shape) - 1))
    alpha, sigma = column(s.alpha(t)), column(s.sigma(t))
    z, scale = alpha * x + sigma * eps, (alpha**2 + sigma**2).sqrt()
    score, mean = -.7 * z / scale + .2, lambda q: q.flatten(1).mean(1)
    want = {'explicit': mean(((alpha - z) / (alpha**2 / 4 + sigma**2) - score)**2), 'implicit': mean(score**2 + 2 * -.7 / scale), 'denoising': mean((-eps / sigma - score)**2)}
    want |= {'hutchinson': want['implicit']}
    for name, objective in (('explicit', Explicit(Gaussian().score)), ('implicit', 'implicit'), ('denoising', 'denoising'), ('hutchinson', 'hutchinson'), ('hutchinson', Hutchinson('sphere'))):
        for weighting in WEIGHTINGS:
            got = ScoreMatchingLoss(objective, schedule, weighting)(affine(-.7, .2), x, t, eps)
            factor = DiffusionLoss(schedule, 'score', weighting).factor(t)
            torch.testing.assert_close(got, factor * want[name], rtol=1e-9, atol=0)
    u = probe_vectors(z, 'normal', generator(7))
    got = ScoreMatchingLoss('sliced', schedule)(affine(-.7, .2), x, t, eps, generator(7))
    dims = z[0].numel()
    torch.testing.assert_close(got, ((u * score).flatten(1).sum(1)**2 + 2 * -.7 / scale.flatten() * u.flatten(1).square().sum(1)) / dims, rtol=1e-9, atol=1e-12)


def test_the_objectives_differ_by_what_no_network_can_change():
    "E explicit - E implicit = E s², E denoising - E explicit = E Var(ε given z)/σ²: both known for a Gaussian"
    n, l = 200_000, torch.tensor(.4, dtype=f64)
    s = SCHEDULES['cosine'](-3, 3)
    alpha, sigma = s.scales(l)
    x, eps, t = 1 + .5 * randn(n, 1, seed=1), randn(n, 1, seed=2), s.t(l).expand(n)
    variance = alpha**2 / 4 + sigma**2
    for net in (affine(-.7, .2), affine(.4, -1.)):
        value = {str(o): ScoreMatchingLoss(o, s)(net, x, t, eps, generator(3)) for o in (Explicit(Gaussian().score), Implicit(), Hutchinson('normal'), Sliced('normal'), Denoising())}
        first = value.pop('Explicit()')
        for name, constant in (('Implicit()', 1 / variance), ('Hutchinson()', 1 / variance), ('Sliced()', 1 / variance), ('Denoising()', 1 / variance - 1 / sigma**2)):
            gap = first - value[name]
            assert abs(gap.mean() - constant) < 4 * gap.std() / n**.5, name


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_every_objective_has_the_explicit_ones_gradient(weighting):
    "a mixture's data, a small network: mean gradients over many batches, their differences within their standard errors"
    data, batches, n = DATASETS['cluster'](), 30, 2000
    s = SCHEDULES['cosine'](-2, 3)
    net = Smooth((n, 2), 5)
    x = data.sample(batches * n, seed=1).double().view(batches, n, 2)
    def gradients(objective, offset=0):
        loss, rows = ScoreMatchingLoss(objective, s, weighting), []
        for i in range(batches):
            g = torch.autograd.grad(loss(net, x[i], generator=generator(100 + i + offset)).mean(), net.parameters())
            rows.append(torch.cat([q.flatten() for q in g]))
        return torch.stack(rows)
    exact = gradients(Explicit(data.score))
    for objective in ('implicit', 'hutchinson', Hutchinson('sphere'), 'sliced', Sliced('sign'), Sliced('sphere'), 'denoising'):
        gap = gradients(objective) - exact                                              # the same times and noise: what differs is the objective
        z = gap.mean(0) / (gap.std(0) / batches**.5)
        assert z.abs().max() < 5 and z.square().mean() < 2.5, objective
        assert (gap.std(0) / batches**.5).norm() < .2 * exact.mean(0).norm()            # the test can see


def test_the_exact_score_is_the_best_there_is():
    data, s = DATASETS['cluster'](), SCHEDULES['ve'](-2, 3)
    def net(z, u):
        logsnr = network_logsnr(u)
        alpha, sigma = s.scales(logsnr)
        return data.score(z * (alpha**2 + sigma**2).sqrt()[:, None], alpha, sigma)
    value = ScoreMatchingLoss(Explicit(data.score), s, 'nelbo')(net, data.sample(100).double(), generator=generator())
    assert value.max() < 1e-16


# ---- denoising is the diffusion loss of the score target

@pytest.mark.parametrize('schedule, weighting', list(itertools.product(FIXED, WEIGHTINGS)))
def test_denoising_is_the_diffusion_loss(schedule, weighting):
    torch.manual_seed(0)
    for shape, dtype in (((5, 2), f32), ((3, 3), f64), ((2, 3, 4, 4), f64)):
        net, x = Smooth(shape, dtype=dtype), randn(*shape, seed=1, dtype=dtype)
        pair = [loss(net, x, generator=generator(4)) for loss in (ScoreMatchingLoss('denoising', schedule, weighting), DiffusionLoss(schedule, 'score', weighting))]
        torch.testing.assert_close(*pair, rtol=1e-5 if dtype == f32 else 1e-12, atol=0)
        grads = [torch.autograd.grad(v.mean(), net.parameters()) for v in pair]
        for a, b in zip(*grads): torch.testing.assert_close(a, b, rtol=1e-4 if dtype == f32 else 1e-10, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize('objective', [Explicit(Gaussian().score), 'implicit', 'hutchinson', 'sliced', 'denoising'], ids=str)
def test_examples_do_not_see_each_other(objective):
    if objective in ('hutchinson', 'sliced'): objective = OBJECTIVES[objective]('sign')
    for shape in ((2, 2), (3, 3, 3), (2, 3, 2, 2), (4, 1)):
        x, eps, t, net = randn(*shape, seed=1), randn(*shape, seed=2), times(shape[0]), lambda z, u: torch.sin(z) + u.view(-1, *[1] * (z.ndim - 1))
        loss = ScoreMatchingLoss(objective, 'cosine', 'nelbo')
        draws = lambda n: torch.randn(n, *shape[1:], generator=generator(8), dtype=f64)
        same = torch.equal(draws(shape[0])[:1], draws(1))                               # the first example's direction does not depend on the batch
        whole, first = loss(net, x, t, eps, generator(8)), loss(net, x[:1], t[:1], eps[:1], generator(8))
        if same or not isinstance(loss.objective, (Hutchinson, Sliced)): torch.testing.assert_close(whole[:1], first, rtol=1e-10, atol=0)
        assert whole.shape == shape[:1] and len(whole.unique()) == shape[0]


@pytest.mark.parametrize('objective', [Explicit(Gaussian().score), 'implicit', 'hutchinson', 'sliced', 'denoising'], ids=str)
def test_a_loss_is_pure_and_works_without_gradients(objective):
    net, x, loss = Smooth((5, 2), dtype=f32), randn(5, 2, dtype=f32), ScoreMatchingLoss(objective)
    copy, before = x.clone(), torch.get_rng_state()
    with torch.no_grad(): value = loss(net, x, generator=generator(1))
    again = loss(net, x, generator=generator(1))
    assert not value.requires_grad and again.requires_grad and value.shape == (5,) and value.dtype == f32
    torch.testing.assert_close(value, again.detach(), rtol=1e-6, atol=0)
    assert torch.equal(x, copy) and not x.requires_grad and torch.equal(before, torch.get_rng_state())
    assert not torch.equal(value, loss(net, x, generator=generator(2)).detach()) and all(p.grad is None for p in net.parameters())


# ---- levels

def visited(loss, n=3000, dtype=f64, **kw):
    seen = []
    loss(lambda z, u: seen.append(u) or z * 1., randn(n, 2, dtype=dtype), generator=generator(1), **kw)
    return network_logsnr(torch.cat(seen).double())


@pytest.mark.parametrize('schedule', CONTINUOUS)
@pytest.mark.parametrize('levels', [[2.], [-4., 0.5, 7.], (1, 3), torch.tensor([-1., 4.]), 2.5, torch.linspace(-5, 5, 11)], ids=str)
@pytest.mark.parametrize('dtype, close', [(f64, 1e-9), (f32, 2e-3)])
def test_only_the_listed_levels_are_visited_and_all_alike(schedule, levels, dtype, close):
    want = torch.as_tensor(levels, dtype=f64).reshape(-1)
    loss = ScoreMatchingLoss('denoising', schedule, levels=levels)
    got = visited(loss, dtype=dtype)
    gap, which = (got[:, None] - want).abs().min(1)
    assert gap.max() < close
    shares = which.bincount(minlength=len(want)).double() / len(got)
    assert (shares - 1 / len(want)).abs().max() < 5 / (len(got) * len(want))**.5
    assert str(want.tolist()) in repr(loss) and 'ScoreMatchingLoss(Denoising()' in repr(loss)


@pytest.mark.parametrize('schedule', CONTINUOUS)
@few
@given(u=st.floats(0, 1), v=st.floats(0, 1))
def test_the_ends_of_the_range_are_levels_too(schedule, u, v):
    "a time of -1e-17 must not be taken for one outside [0, 1]"
    low, high = (max(-12., SCHEDULES[schedule]().reach()[0]), 12.)
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    s = SCHEDULES[schedule](logsnr_min=a, logsnr_max=b) if b - a > .1 else SCHEDULES[schedule]()
    for dtype in (f32, f64):
        got = visited(ScoreMatchingLoss('denoising', s, levels=[s.logsnr_min, s.logsnr_max]), 40, dtype)
        assert torch.minimum((got - s.logsnr_min).abs(), (got - s.logsnr_max).abs()).max() < (2e-2 if dtype == f32 else 1e-6)


@pytest.mark.parametrize('schedule', ['discrete(T=20)', 'ddpm'])
def test_a_listed_level_on_a_staircase_is_the_level_of_its_cell(schedule):
    loss = ScoreMatchingLoss('denoising', schedule, levels=[-4., 0.5, 7.])
    own = loss.schedule.level_at(loss.levels).logsnr
    assert (own <= loss.levels).all() and (loss.schedule.before(own) > loss.levels).all()
    for dtype, close in ((f32, 2e-3), (f64, 1e-9)):
        gap = (visited(loss, dtype=dtype)[:, None] - own).abs()
        assert gap.min(1).values.max() < close and gap.min(0).values.max() < close


def test_a_schedule_that_learns_is_refused():
    for weighting in ('nelbo', 'sigmoid'):
        with pytest.raises(ValueError, match='score matching does not teach the adaptive schedule'): ScoreMatchingLoss('denoising', 'adaptive', weighting)


@pytest.mark.parametrize('levels', [[], [13.], [-13.], [0., 12.91], [math.nan], [0., math.inf], 'a', ['a'], [None], torch.tensor([])], ids=str)
def test_levels_that_are_none_are_named_before_any_work(levels):
    with pytest.raises((ValueError, TypeError), match='levels must be noise levels λ from -12.9 to 12.9') as e: ScoreMatchingLoss(levels=levels)
    assert repr(levels) in str(e.value)


def test_levels_belong_to_the_range_of_the_schedule():
    with pytest.raises(ValueError, match='from -3 to 5'): ScoreMatchingLoss('implicit', SCHEDULES['ve'](-3, 5), levels=[6.])
    assert ScoreMatchingLoss('implicit', SCHEDULES['ve'](-3, 7), levels=[6.]).levels.tolist() == [6.]


def test_given_times_win_over_levels_and_given_noise_over_drawn():
    loss, net = ScoreMatchingLoss(levels=[2.]), Smooth((4, 2))
    x, eps, t = randn(4, 2), randn(4, 2, seed=1), times(4)
    for objective in ('denoising', 'implicit'):
        plain, listed = ScoreMatchingLoss(objective), ScoreMatchingLoss(objective, levels=[2.])
        assert torch.equal(listed(net, x, t, eps), plain(net, x, t, eps))
        at_two = plain.schedule.t(torch.tensor(2., dtype=f64)).expand(4)
        torch.testing.assert_close(listed(net, x, eps=eps), plain(net, x, at_two, eps), rtol=1e-12, atol=0)
        assert torch.equal(plain(net, x, t, eps, generator(1)), plain(net, x, t, eps, generator(2)))
    for bad in (dict(t=torch.rand(3)), dict(t=1.5), dict(eps=randn(2)), dict(eps=randn(4, 1))):
        with pytest.raises((ValueError, TypeError)): loss(net, x, **bad)
    for x in (torch.ones(4, 2, dtype=torch.int64), torch.ones(4), None, [[1., 2.]], torch.zeros(0, 2)):
        for levels in (None, [2.]):
            with pytest.raises(TypeError, match='x must be'): ScoreMatchingLoss(levels=levels)(net, x)


# ---- choices

@pytest.mark.parametrize('bad, kind, says', [('explicit', ValueError, 'Explicit\\(dataset.score\\)'), (Explicit, ValueError, 'dataset.score'), ('implict', ValueError, "Did you mean 'implicit'"),
                                             (None, TypeError, 'objective must be'), (3, TypeError, 'objective must be'), (dict, TypeError, 'objective must be')], ids=repr)
def test_bad_objectives_are_named(bad, kind, says):
    with pytest.raises(kind, match=says): ScoreMatchingLoss(bad)


def test_other_bad_choices_are_named():
    for exact in (None, 'score', DATASETS['cluster']()):
        with pytest.raises(ValueError, match='exact score'): Explicit(exact)
    with pytest.raises(ValueError, match="Did you mean 'cosine'"): ScoreMatchingLoss(schedule='cosin')
    with pytest.raises(ValueError, match="Did you mean 'nelbo'"): ScoreMatchingLoss(weighting='nelb')
    for name, cls in OBJECTIVES.items(): assert cls.name == name
    for other in (Implicit, Implicit()): assert repr(ScoreMatchingLoss(other)) == repr(ScoreMatchingLoss('implicit'))


# ---- the scaled network

@pytest.mark.parametrize('dtype, close', [(f32, 1e-5), (f64, 1e-11)])
@pytest.mark.parametrize('shape', [(1,), (3,), (2, 4, 4)], ids=str)
def test_a_scaled_score_is_over_sigma_at_every_level(dtype, close, shape):
    "λ from -80 to 80, as far as a run may go; σ of unit scale, whatever the schedule"
    logsnr = torch.linspace(-80, 80, 41, dtype=dtype)
    z = randn(41, *shape, dtype=dtype)
    got = ScaledScore(lambda z, u: z)(z, network_time(logsnr))
    sigma = torch.sigmoid(-logsnr.double()).sqrt().view(-1, *[1] * len(shape))
    assert got.dtype == dtype and got.isfinite().all()
    torch.testing.assert_close(got.double(), z.double() / sigma, rtol=close, atol=0)
    assert torch.equal(ScaledScore(lambda z, u: z)(z, torch.ones(41, dtype=dtype)), z)     # pure noise: σ = 1


def test_a_scaled_score_trains_and_is_saved_like_its_network():
    torch.manual_seed(0)
    net = ScaledScore(MLP(2, 8))
    assert set(net.state_dict()) == {f'net.{k}' for k in net.net.state_dict()}
    for name in ('implicit', 'sliced', 'denoising'):
        net.zero_grad()
        ScoreMatchingLoss(name, weighting='rescaled')(net, torch.randn(50, 2), generator=generator()).mean().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters()) and sum(p.grad.abs().sum() for p in net.parameters()) > 0
