"Attempts to break lfdm.losses: every (schedule, target, weighting) over shapes and dtypes; wrong input."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.core import seeded
from lfdm.losses import DiffusionLoss, predict
from lfdm.schedules import SCHEDULES, CosineSchedule, Level, network_time
from lfdm.targets import TARGETS, convert
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
close = torch.testing.assert_close
few = settings(max_examples=5, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('schedule', SCHEDULES)
SHAPES = [(2, 2), (3, 2), (1, 2), (4, 3, 4, 4), (3, 3, 3), (4, 4, 4, 4), (2, 2, 2), (5, 7)]
scene = st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from(SHAPES), st.integers(0, 10**6))


def pairs(schedule):
    "Targets and weightings that go with a schedule: a learned one needs a weight w(λ)."
    fits = lambda w: not SCHEDULES[schedule].learned or issubclass(WEIGHTINGS[w], LogSNRWeighting)
    return [(y, w) for y, w in itertools.product(TARGETS, WEIGHTINGS) if fits(w)]


def schedule_over(name, u, v):
    "The schedule of that name over a range inside ±12 and its reach, of a bell within five deviations."
    if name == 'ddpm': return SCHEDULES[name](logsnr_max=9.3 + 3 * max(u, v))
    s = SCHEDULES[name]()
    low, high = max(s.reach()[0], -12.), min(s.reach()[1], 12.)
    if hasattr(s, 'std'): low, high = max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    return SCHEDULES[name](logsnr_min=a, logsnr_max=b) if b - a > 0.1 else s


def draw(shape, seed, dtype=f64):
    "x, ε, a prediction and times"
    g = seeded(seed)
    x, eps, y_hat = torch.randn(3, *shape, generator=g, dtype=f64).to(dtype)
    return x, eps, y_hat, torch.rand(shape[0], generator=g, dtype=f64).clamp(0.001, 0.999).to(dtype)


def column(scale, x): return scale.reshape(-1, *[1] * (x.ndim - 1))


# ---- the value

@every
@torch.no_grad()
def test_the_loss_is_its_factor_on_the_noise_error_times_the_noise_error(schedule):
    "the test that closes a class of public bugs: a weight meant for one target's error on another's"
    precisions, ends = ((f64, 1e-9), (f32, 1e-3)), torch.rand(999, 2, generator=seeded(0), dtype=f64)
    for k, ((y, w), (dtype, tolerance)) in enumerate(itertools.product(pairs(schedule), precisions)):
        s, shape = schedule_over(schedule, *ends[k].tolist()), SHAPES[k % len(SHAPES)]
        loss = DiffusionLoss(s, y, w)
        x, eps, y_hat, t = draw(shape, k, dtype)
        got = loss(lambda z, u: y_hat, x, t=t, eps=eps)
        assert got.shape == shape[:1] and got.dtype == dtype and got.isfinite().all()
        alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
        eps_hat = convert(y_hat, y, 'eps', alpha * x + sigma * eps, alpha, sigma)
        truth = loss.target.encode(x, eps, alpha, sigma)
        for factor, error in ((loss.eps_factor(t), eps - eps_hat), (loss.factor(t), truth - y_hat)):
            close(got, factor * error.square().flatten(1).mean(1), rtol=tolerance, atol=0)


@every
@few
@given(scene)
@torch.no_grad()
def test_converting_the_network_changes_no_loss_that_has_a_weight(schedule, scene):
    "the NELBO and every other weight: one value per example, whatever the network predicts"
    u, v, shape, seed = scene
    s = schedule_over(schedule, u, v)
    x, eps, x_hat, t = draw(shape, seed)
    alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
    answer = {y: convert(x_hat, 'x', y, alpha * x + sigma * eps, alpha, sigma) for y in TARGETS}
    weights = sorted({w for _, w in pairs(schedule)} - {'weighted'})
    for w in weights[seed % 4::4]:
        first, *others = (DiffusionLoss(s, y, w)(lambda z, u, y=y: answer[y], x, t, eps) for y in TARGETS)
        for other in others: close(other, first, rtol=1e-7, atol=0)


@every
@torch.no_grad()
def test_examples_do_not_see_each_other(schedule):
    "the batch against one example at a time, where n is a size of the data too"
    net = lambda z, u: 0.3 * z + column(u, z)
    for k, (target, weighting) in enumerate(pairs(schedule)[::5]):
        loss, (x, eps, _, t) = DiffusionLoss(schedule, target, weighting), draw(SHAPES[k % len(SHAPES)], 7)
        alone = [loss(net, x[i:i + 1], t=t[i:i + 1], eps=eps[i:i + 1]) for i in range(len(x))]
        close(loss(net, x, t=t, eps=eps), torch.cat(alone), rtol=1e-11, atol=0)


U0 = 2 / math.pi * math.atan(math.exp(-12.9 / 2))


def plain(target, weighting, theta, x, eps, t):
    "The cosine losses over ±12.9 in the thesis's own words: no code of lfdm."
    t_ = t.clone().requires_grad_()
    angle = math.pi / 2 * (U0 + (1 - 2 * U0) * t_)
    dsnr, = torch.autograd.grad((angle.cos()**2 / angle.sin()**2).sum(), t_)
    a, s = angle.detach().cos()[:, None], angle.detach().sin()[:, None]
    z = a * x + s * eps
    y = dict(x=x, eps=eps, v=a * eps - s * x, score=-eps / s)[target]
    scaling = dict(x=1., eps=s**2 / a**2, v=s**2, score=s**4 / a**2)[target]
    factor = dict(nelbo=-dsnr[:, None] * scaling, weighted=1., rescaled=scaling)[weighting]
    return (factor * (y - (theta[0] * z + theta[1] * torch.sin(t[:, None] * z)))**2).mean(1)


@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
@pytest.mark.parametrize('weighting', ['nelbo', 'weighted', 'rescaled'])
def test_value_and_gradient_are_those_of_the_plain_formula(target, weighting):
    x, eps, _, t = draw((6, 2), 3)
    mine, theirs = (torch.tensor([0.4, -0.7], dtype=f64, requires_grad=True) for _ in range(2))
    net = lambda z, u: mine[0] * z + mine[1] * torch.sin(((u - U0) / (1 - 2 * U0))[:, None] * z)
    a = DiffusionLoss('cosine', target, weighting)(net, x, t=t, eps=eps)
    b = plain(target, weighting, theirs, x, eps, t)
    a.mean().backward(); b.mean().backward()
    close(a, b, rtol=1e-8, atol=0)
    close(mine.grad, theirs.grad, rtol=1e-8, atol=0)
    assert (mine.grad != 0).all()


@every
def test_training_from_random_times_is_finite_even_uncut(schedule):
    "sampled times reach neither end, so no loss and no gradient is infinite or nan at any λ range"
    ends = (-math.inf, math.inf) if schedule in ('cosine', 'rectified_flow', 'shifted_cosine') else ()
    x = torch.randn(300, 2, generator=seeded(1))
    for target, weighting in pairs(schedule):
        theta = torch.zeros(2, requires_grad=True)
        loss = DiffusionLoss(SCHEDULES[schedule](*ends), target, weighting)
        value = loss(lambda z, u, theta=theta: z * theta, x, generator=seeded(0))
        value.mean().backward()
        assert (value >= 0).all() and (value.sum() + theta.grad.sum()).isfinite(), (target, weighting)


@pytest.mark.parametrize('target, weighting', list(itertools.product(TARGETS, WEIGHTINGS)))
@pytest.mark.parametrize('end', [0., 1.])
def test_at_zero_or_infinite_snr_a_loss_is_right_or_refused(target, weighting, end):
    "the uncut cosine schedule at its ends: no nan, no clamp; an error that names the scale, or the truth"
    loss = DiffusionLoss(CosineSchedule(-math.inf, math.inf), target, weighting)
    x, eps, y_hat, _ = draw((3, 2), 5)
    try: got = loss(lambda z, u: y_hat, x, t=end, eps=eps)
    except (ZeroDivisionError, ValueError) as e:
        assert any(word in str(e) for word in ('alpha', 'sigma', 'logsnr', 'finite'))
        return
    assert not got.isnan().any()
    if weighting == 'weighted':
        truth = dict(x=x, eps=eps, v=-x if end else eps, score=-eps, F=2 * x if end else -eps, flow=eps - x)
        close(got, (truth[target] - y_hat).square().mean(1))


@pytest.mark.parametrize('T', [1, 7, 1000])
def test_the_bound_of_T_steps_is_a_sum_over_T_levels(T):
    "½ Σ (SNR(s)/SNR(t) - 1) ‖ε - ε̂‖², thesis 3.18, twice and by its mean, from λ alone"
    loss = DiffusionLoss(SCHEDULES['discrete'](-6, 6, T=T), 'eps', 'nelbo')
    x, eps, y_hat, _ = draw((T, 2), 5)
    got = loss(lambda z, u: y_hat, x, t=torch.arange(1, T + 1, dtype=f64) / T, eps=eps)
    l = CosineSchedule(-6, 6).logsnr(torch.arange(T + 1, dtype=f64) / T)
    want = torch.expm1(l[:-1] - l[1:]) * (eps - y_hat).square().mean(1)
    close(got.mean(), want.sum(), rtol=1e-9, atol=0)


# ---- what the network is given and what it may give

@every
@pytest.mark.parametrize('dtype', [f32, f64])
@torch.no_grad()
def test_the_network_sees_unit_scale_and_the_time_of_its_level(schedule, dtype):
    seen, g, s = {}, seeded(0), SCHEDULES[schedule]()
    def net(z, u): seen.update(z=z, u=u); return z
    for t in (0.0005, 0.5, 0.9995):
        times, x = torch.full((20_000,), t, dtype=dtype), torch.randn(20_000, 2, generator=g, dtype=dtype)
        DiffusionLoss(s, weighting='nelbo')(net, x, t=times, generator=g)
        assert abs(seen['z'].std() - 1) < 0.03 and seen['z'].dtype == seen['u'].dtype == dtype
        close(seen['u'], network_time(s.logsnr(times)), rtol=0, atol=0)
    level = s.level(torch.tensor(0.3, dtype=dtype))
    for of in (level, Level(*(q.expand(20_000) for q in level))):
        out = predict(net, torch.ones(20_000, 2, dtype=dtype), of)
        assert seen['u'].shape == (20_000,) and out.shape == (20_000, 2)
        close(out[7, 0], 1 / (level.alpha**2 + level.sigma**2).sqrt())


@every
@torch.no_grad()
def test_a_network_in_half_precision_costs_its_own_rounding_only(schedule):
    "the error, the factor and the mean stay in the data's precision, though factors reach far beyond float16"
    x, eps, y_hat, t = draw((5, 2), 11, f32)
    for k, (target, weighting) in enumerate(pairs(schedule)):
        rounded = y_hat.to((torch.float16, torch.bfloat16)[k % 2])
        loss = DiffusionLoss(schedule, target, weighting)
        got, want = (loss(lambda z, u, y=y: y, x, t=t, eps=eps) for y in (rounded, rounded.float()))
        assert got.dtype == f32 and torch.equal(got, want), (target, weighting)


WRONG = [lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: z[None], lambda z, u: z.mean(),
         lambda z, u: z.T, lambda z, u: u, lambda z, u: None, lambda z, u: (z, u),
         lambda z, u: z.numpy(), lambda z, u: 0.]


@pytest.mark.parametrize('wrong', WRONG)
def test_a_network_that_answers_in_another_form_is_refused(wrong):
    "a wrong shape would broadcast to a loss that looks like one"
    with pytest.raises((TypeError, ValueError), match='the network returned'):
        DiffusionLoss()(wrong, torch.randn(4, 2))


# ---- t, eps and x from outside

NET = lambda z, u: 0.5 * z
X, EPS = torch.randn(4, 2, generator=seeded(0)), torch.randn(4, 2, generator=seeded(1))


def test_one_time_may_stand_for_all():
    want = DiffusionLoss()(NET, X, t=torch.full((4,), 0.3), eps=EPS)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3]), [0.3] * 4, torch.full((4,), 0.3, dtype=f64)):
        close(DiffusionLoss()(NET, X, t=t, eps=EPS), want, rtol=0, atol=0)


LENGTHS = [torch.rand(3), torch.rand(2, 2), torch.rand(0), [0.1, 0.2]]
NO_TIMES = ['0.5', True, [None] * 4, torch.ones(4, dtype=torch.int64), torch.full((4,), 0.5 + 0j)]
BEYOND = [-0.1, 1.0003, math.nan, math.inf, [0.5, 0.5, 1.1, 0.5]]


@pytest.mark.parametrize('times, says', [
    (LENGTHS, 't has shape .* but x has 4 examples'), (BEYOND, 't must lie in .0, 1.'),
    (NO_TIMES, 'expected floating-point')], ids=['lengths', 'beyond', 'no times'])
def test_times_that_cannot_be_are_refused(times, says):
    for t, schedule in itertools.product(times, SCHEDULES):
        with pytest.raises((TypeError, ValueError), match=says):
            DiffusionLoss(schedule, weighting='nelbo')(NET, X, t=t)


NO_NOISE = [torch.randn(4), torch.randn(4, 1), torch.randn(1, 2), torch.randn(4, 2, 1), torch.randn(3, 2),
            EPS.double(), EPS.long(), 'noise', 1., [[1., 2.]] * 4, np.ones((4, 2)), EPS.to('meta')]


@pytest.mark.parametrize('eps', NO_NOISE, ids=str)
def test_noise_unlike_the_data_is_refused(eps):
    "a wrong shape would broadcast, and float64 noise from numpy would turn a float32 step into float64"
    with pytest.raises(ValueError, match='eps must be like x'): DiffusionLoss()(NET, X, t=0.5, eps=eps)


NO_DATA = [torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.ones((4, 2)),
           [[1., 2.]], None, torch.randn(4), torch.tensor(1.), torch.zeros(0, 2)]


@pytest.mark.parametrize('x', NO_DATA, ids=lambda x: f'{type(x).__name__}{tuple(getattr(x, "shape", ()))}')
def test_data_that_cannot_be_noised_are_refused(x):
    "images as uint8 are the usual mistake"
    with pytest.raises(TypeError, match='x must be floating-point data'): DiffusionLoss()(NET, x)


def test_the_generator_decides_everything_and_inputs_stay():
    make = lambda seed: DiffusionLoss()(NET, X, generator=seeded(seed))
    before, x, eps, t = torch.get_rng_state(), X.clone(), EPS.clone(), torch.full((4,), 0.3)
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    assert torch.equal(DiffusionLoss()(NET, x, t, eps), DiffusionLoss()(NET, x, t, eps, seeded(5)))
    for now, then in ((torch.get_rng_state(), before), (x, X), (eps, EPS), (t, torch.full((4,), 0.3))):
        assert torch.equal(now, then)


# ---- choices, and losses of no use

@pytest.mark.parametrize('place', range(3))
@pytest.mark.parametrize('bad, kind', [('cosin', ValueError), (None, TypeError), (dict, TypeError)], ids=repr)
def test_bad_choices_are_named(place, bad, kind):
    choice = ['cosine', 'eps', 'weighted']; choice[place] = bad
    with pytest.raises(kind, match=('schedule', 'target', 'weighting')[place]) as e: DiffusionLoss(*choice)
    assert repr(bad) in str(e.value)


@every
def test_names_classes_and_instances_are_one(schedule):
    for y, w in pairs(schedule):
        classes = SCHEDULES[schedule], TARGETS[y], WEIGHTINGS[w]
        made = [DiffusionLoss(*c) for c in ((schedule, y, w), classes, [cls() for cls in classes])]
        assert len(set(map(repr, made))) == 1
        assert (type(made[0].schedule), type(made[0].target), type(made[0].weighting)) == classes


@pytest.mark.parametrize('triple, says', [
    ('cosine(-75,75) x nelbo', 'inf in'), ('cosine(-100,20) eps rescaled', 'inf in'),
    ('cosine(-20,100) eps snr', 'inf in'), ('edm_train(-9.6,60) v nelbo', 'inf in'),
    ('ve(-100,0) eps rescaled', 'inf in'), ('cosine(60,70) eps edm', '0 in'),
    ('cosine eps edm(mean=80,std=0.01)', '0 in')])
def test_a_weight_that_is_infinite_or_nothing_is_refused(triple, says):
    with pytest.raises(ValueError, match=f'the factor of DiffusionLoss.* is {says} float32'):
        DiffusionLoss(*triple.split())


def test_a_weight_that_is_0_somewhere_is_not():
    assert DiffusionLoss('ve(-12, 40)', 'eps', 'p2(k=1, gamma=100)').factor(torch.tensor(0.5)).isfinite()


def test_the_first_step_of_ddpm_from_the_data_themselves():
    "λ_0 = ∞: the first term of the bound is infinite, so the loss is refused there; with σ² = β it is finite"
    first, loss = torch.full((4,), 1e-3), lambda w: DiffusionLoss('ddpm(logsnr_max=inf)', 'eps', w)
    assert loss('ddpm_vlb')(NET, X, first, EPS).isfinite().all()
    with pytest.raises(ValueError, match='no finite factor'): loss('nelbo')(NET, X, first, EPS)
    assert loss('nelbo')(NET, X, first + 1e-3, EPS).isfinite().all()


# ---- a schedule that learns

FACTORS = [w for w in WEIGHTINGS if not issubclass(WEIGHTINGS[w], LogSNRWeighting)]


@pytest.mark.parametrize('weighting', FACTORS)
def test_a_factor_on_a_schedule_that_learns_is_refused_with_the_weight_to_take(weighting):
    k = torch.linspace(-12, 12, 9, dtype=f64)
    w = lambda loss: loss.eps_factor(loss.schedule.t(k)) * loss.schedule.density(k)
    for y in (*TARGETS, 'F(sigma_data=2)'):
        with pytest.raises(ValueError, match="Bind it to a schedule: 'implied") as e:
            DiffusionLoss('adaptive', y, weighting)
        offered = str(e.value).split("'")[-2]
        want = w(DiffusionLoss('cosine', y, weighting))
        beside = DiffusionLoss('adaptive', y, 'nelbo').beside(weighting)
        for loss in (DiffusionLoss('adaptive', y, offered), beside): close(w(loss), want, rtol=1e-6, atol=0)


def test_it_learns_where_gradients_are_recorded_and_nowhere_else():
    loss, x = DiffusionLoss('adaptive', 'v', 'sigmoid'), torch.randn(256, 2, generator=seeded(0))
    seen = lambda: (~loss.schedule.state()['history'].isnan()).sum().item()
    with torch.no_grad(): loss(NET, x)
    with torch.inference_mode(): loss(NET, x)
    loss.factor(torch.rand(9)); loss.noisy(x, torch.rand(256), x)
    assert seen() == 0
    loss(NET, x)
    assert seen() > 90


def test_it_learns_w_times_the_loss_per_level_whatever_its_density_was():
    "L = E[w L′/p] is the integral over λ for any history, which is w L′ itself"
    loss = DiffusionLoss('adaptive(decay=0)', 'eps', 'sigmoid')
    x = torch.randn(200_000, 2, generator=seeded(0))
    zero = lambda z, u: torch.zeros_like(z)           # ε-error 1 at every level: w L′ is w
    edges = loss.schedule._history.edges
    middle = (edges[1:] + edges[:-1]) / 2
    values = []
    for seed in range(3):
        values.append(loss(zero, x, generator=seeded(seed)).double())
        close(loss.schedule._history.averages, torch.sigmoid(2 - middle), rtol=0.2, atol=1e-3)
    exact = 14.9 + math.log1p(math.exp(-14.9)) - math.log1p(math.exp(-10.9))   # ∫ sigmoid(2 - λ) dλ, ±12.9
    assert all(abs(value.mean() - exact) < 5 * value.std() / len(x)**0.5 for value in values)
    assert values[-1].std() < 0.8 * values[0].std()


def test_a_batch_that_is_not_finite_teaches_nothing():
    loss, x = DiffusionLoss('adaptive', 'v', 'nelbo'), torch.randn(64, 2, generator=seeded(0))
    loss(NET, x)
    before = loss.schedule.state()['history'].clone()
    assert loss(lambda z, u: z * math.nan, x).isnan().all() and loss(lambda z, u: z * 1e30, x).isinf().any()
    close(loss.schedule.state()['history'], before, rtol=0, atol=0, equal_nan=True)
