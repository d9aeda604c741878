"Attempts to break lfdm.losses: every (schedule, target, weighting) of the registries over random ranges, shapes and dtypes, and wrong input."
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.losses import DiffusionLoss, predict
from lfdm.schedules import SCHEDULES, CosineSchedule, Level, network_time
from lfdm.targets import TARGETS, convert
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('schedule', SCHEDULES)
SHAPES = [(2, 2), (3, 2), (1, 2), (4, 3, 4, 4), (3, 3, 3), (4, 4, 4, 4), (2, 2, 2), (5, 7)]
scene = st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from(SHAPES), st.integers(0, 10**6))


def pairs(schedule, targets=TARGETS, weightings=WEIGHTINGS):
    "Targets and weightings that go with a schedule: a learned one needs a weight w(λ)."
    return [(y, w) for y, w in itertools.product(targets, weightings) if not SCHEDULES[schedule].learned or issubclass(WEIGHTINGS[w], LogSNRWeighting)]


def schedule_over(name, u, v):
    "The schedule of that name over a range inside ±12 and its reach, of a bell within five deviations; the default range where the two ends meet."
    if name == 'ddpm': return SCHEDULES[name](logsnr_max=9.3 + 3 * max(u, v))
    s = SCHEDULES[name]()
    low, high = s.reach()
    low, high = max(low, -12.), min(high, 12.)
    if hasattr(s, 'std'): low, high = max(low, s.mean - 5 * s.std), min(high, s.mean + 5 * s.std)
    a, b = sorted((low + (high - low) * u, low + (high - low) * v))
    return SCHEDULES[name](logsnr_min=a, logsnr_max=b) if b - a > 0.1 else SCHEDULES[name]()


def draw(shape, seed, dtype=f64):
    "x, ε, a prediction and times"
    g = torch.Generator().manual_seed(seed)
    x, eps, y_hat = torch.randn(3, *shape, generator=g, dtype=f64).to(dtype)
    return x, eps, y_hat, torch.rand(shape[0], generator=g, dtype=f64).clamp(0.001, 0.999).to(dtype)


def column(scale, x): return scale.reshape(-1, *[1] * (x.ndim - 1))


@every
def test_the_loss_is_its_factor_on_the_noise_error_times_the_noise_error(schedule):
    "the test that closes a class of public bugs: a weight meant for one target's error on another's"
    g = torch.Generator().manual_seed(0)
    for k, ((target, weighting), (dtype, tolerance)) in enumerate(itertools.product(pairs(schedule), ((f64, 1e-9), (f32, 1e-3)))):
        s, shape = schedule_over(schedule, *torch.rand(2, generator=g, dtype=f64).tolist()), SHAPES[k % len(SHAPES)]
        loss = DiffusionLoss(s, target, weighting)
        x, eps, y_hat, t = draw(shape, k, dtype)
        with torch.no_grad(): got = loss(lambda z, u: y_hat, x, t=t, eps=eps)
        assert got.shape == shape[:1] and got.dtype == dtype and got.isfinite().all()
        alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
        eps_hat = convert(y_hat, target, 'eps', alpha * x + sigma * eps, alpha, sigma)
        torch.testing.assert_close(got, loss.eps_factor(t) * (eps - eps_hat).square().flatten(1).mean(1), rtol=tolerance, atol=0)
        ratio = TARGETS[target]().eps_ratio(s.alpha(t), s.sigma(t))
        torch.testing.assert_close(loss.factor(t), loss.eps_factor(t) * ratio, rtol=tolerance, atol=0)
        y = TARGETS[target]().encode(x, eps, alpha, sigma)
        torch.testing.assert_close(got, loss.factor(t) * (y - y_hat).square().flatten(1).mean(1), rtol=tolerance, atol=0)


@every
@few
@given(scene)
def test_converting_the_network_changes_no_loss_that_has_a_weight(schedule, scene):
    "the NELBO and every other weight: one value per example, whatever the network predicts"
    u, v, shape, seed = scene
    s = schedule_over(schedule, u, v)
    x, eps, x_hat, t = draw(shape, seed)
    alpha, sigma = column(s.alpha(t), x), column(s.sigma(t), x)
    z = alpha * x + sigma * eps
    weights = sorted({w for _, w in pairs(schedule)} - {'weighted'})
    for weighting in weights[seed % 4::4]:
        with torch.no_grad(): values = torch.stack([DiffusionLoss(s, y, weighting)(lambda z_seen, u: convert(x_hat, 'x', y, z, alpha, sigma), x, t, eps) for y in TARGETS])
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-7, atol=0)


@every
@torch.no_grad()
def test_examples_do_not_see_each_other(schedule):
    "the batch against one example at a time, where n is a size of the data too"
    for k, (target, weighting) in enumerate(pairs(schedule)):
        loss, shape = DiffusionLoss(schedule, target, weighting), ((2, 2), (3, 3, 3), (4, 4, 4, 4), (2, 3, 2, 2), (3, 2))[k % 5]
        x, eps, _, t = draw(shape, 7)
        net = lambda z, u: 0.3 * z + column(u, z)
        alone = torch.cat([loss(net, x[i:i + 1], t=t[i:i + 1], eps=eps[i:i + 1]) for i in range(shape[0])])
        torch.testing.assert_close(loss(net, x, t=t, eps=eps), alone, rtol=1e-11, atol=0)


def plain(target, weighting, theta, x, eps, t):
    "The cosine losses over ±12.9 in the thesis's own words: no code of lfdm."
    u0 = 2 / math.pi * math.atan(math.exp(-12.9 / 2))
    def scales(t):
        angle = math.pi / 2 * (u0 + (1 - 2 * u0) * t)
        return angle.cos(), angle.sin()
    (alpha, sigma), t_ = scales(t), t.clone().requires_grad_()
    a, s = scales(t_)
    dsnr, = torch.autograd.grad((a**2 / s**2).sum(), t_)
    z = alpha[:, None] * x + sigma[:, None] * eps
    y = dict(x=x, eps=eps, v=alpha[:, None] * eps - sigma[:, None] * x, score=-eps / sigma[:, None])[target]
    scaling = dict(x=1., eps=sigma**2 / alpha**2, v=sigma**2, score=sigma**4 / alpha**2)[target]
    factor = dict(nelbo=-dsnr * scaling, weighted=1., rescaled=scaling)[weighting]
    return factor * ((y - (theta[0] * z + theta[1] * torch.sin(t[:, None] * z)))**2).mean(1)


@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
@pytest.mark.parametrize('weighting', ['nelbo', 'weighted', 'rescaled'])
def test_value_and_gradient_are_those_of_the_plain_formula(target, weighting):
    x, eps, _, t = draw((6, 2), 3)
    mine, theirs = (torch.tensor([0.4, -0.7], dtype=f64, requires_grad=True) for _ in range(2))
    time_of = lambda u: (u - (u0 := 2 / math.pi * math.atan(math.exp(-12.9 / 2)))) / (1 - 2 * u0)
    net = lambda z, u: mine[0] * z + mine[1] * torch.sin(time_of(u)[:, None] * z)
    a, b = DiffusionLoss('cosine', target, weighting)(net, x, t=t, eps=eps), plain(target, weighting, theirs, x, eps, t)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=0)
    a.mean().backward(); b.mean().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=0)
    assert (mine.grad != 0).all()


@every
def test_training_from_random_times_is_finite_even_uncut(schedule):
    "sampled times reach neither end, so no loss and no gradient is infinite or nan at any λ range"
    uncut = {'cosine': (-math.inf, math.inf), 'rectified_flow': (-math.inf, math.inf), 'shifted_cosine': (-math.inf, math.inf)}
    for target, weighting in pairs(schedule):
        s, theta = SCHEDULES[schedule](*uncut.get(schedule, ())), torch.zeros(2, requires_grad=True)
        value = DiffusionLoss(s, target, weighting)(lambda z, u: z * theta, torch.randn(300, 2, generator=torch.Generator().manual_seed(1)), generator=torch.Generator().manual_seed(0))
        value.mean().backward()
        assert value.isfinite().all() and theta.grad.isfinite().all() and (value >= 0).all(), (target, weighting)


@pytest.mark.parametrize('target, weighting', list(itertools.product(TARGETS, WEIGHTINGS)))
@pytest.mark.parametrize('end', [0., 1.])
def test_at_zero_or_infinite_snr_a_loss_is_right_or_refused(target, weighting, end):
    "the uncut cosine schedule at its ends: no nan, no clamp; an error that names the scale, or the true value"
    loss = DiffusionLoss(CosineSchedule(-math.inf, math.inf), target, weighting)
    x, eps, y_hat, _ = draw((3, 2), 5)
    try: got = loss(lambda z, u: y_hat, x, t=torch.full((3,), end, dtype=f64), eps=eps)
    except (ZeroDivisionError, ValueError) as e:
        assert any(word in str(e) for word in ('alpha', 'sigma', 'logsnr', 'finite'))
        return
    assert not got.isnan().any()
    if weighting == 'weighted':
        truth = dict(x=x, eps=eps, v=eps if end == 0 else -x, score=-eps / end if end else None, F=-eps if end == 0 else 2 * x, flow=eps - x)[target]
        torch.testing.assert_close(got, (truth - y_hat).square().mean(1))


# ---- what the network is given and what it may give

@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('dtype', [f32, f64])
def test_the_network_sees_unit_scale_and_the_time_of_its_level(schedule, dtype):
    seen = {}
    def net(z, u): seen.update(z=z, u=u); return z
    s = SCHEDULES[schedule]()
    g = torch.Generator().manual_seed(0)
    for t in (0.0005, 0.25, 0.5, 0.75, 0.9995):
        times = torch.full((20_000,), t, dtype=dtype)
        with torch.no_grad(): DiffusionLoss(s, weighting='nelbo')(net, torch.randn(20_000, 2, generator=g, dtype=dtype), t=times, generator=g)
        assert abs(seen['z'].std() - 1) < 0.03 and seen['z'].dtype == seen['u'].dtype == dtype
        assert seen['u'].shape == (20_000,)
        torch.testing.assert_close(seen['u'], network_time(s.logsnr(times)), rtol=0, atol=0)
    for level in (s.level(torch.tensor(0.3, dtype=dtype)), Level(*(q.expand(20_000) for q in s.level(torch.tensor(0.3, dtype=dtype))))):
        out = predict(net, torch.ones(20_000, 2, dtype=dtype), level)
        assert seen['u'].shape == (20_000,) and out.shape == (20_000, 2)
        torch.testing.assert_close(out[7, 0], 1 / (level.alpha**2 + level.sigma**2).sqrt().reshape(-1)[0])


@every
@torch.no_grad()
def test_a_network_in_half_precision_costs_its_own_rounding_only(schedule):
    "the error, the factor and the mean stay in the data's precision, though factors reach far beyond float16"
    for k, (target, weighting) in enumerate(pairs(schedule)):
        loss = DiffusionLoss(schedule, target, weighting)
        x, eps, y_hat, t = draw((5, 2), 11, f32)
        rounded = y_hat.to((torch.float16, torch.bfloat16)[k % 2])
        got, want = loss(lambda z, u: rounded, x, t=t, eps=eps), loss(lambda z, u: rounded.float(), x, t=t, eps=eps)
        assert got.dtype == f32 and torch.equal(got, want), (target, weighting)


@pytest.mark.parametrize('wrong', [lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: z[None], lambda z, u: z.mean(), lambda z, u: z.T, lambda z, u: u,
                                   lambda z, u: z[:1], lambda z, u: None, lambda z, u: (z, u), lambda z, u: z.numpy(), lambda z, u: 0.], ids=range(11))
def test_a_network_that_answers_in_another_form_is_refused(wrong):
    "a wrong shape would broadcast to a loss that looks like one"
    with pytest.raises((TypeError, ValueError), match='the network returned'): DiffusionLoss()(wrong, torch.randn(4, 2))


# ---- t, eps and x from outside

NET = lambda z, u: 0.5 * z
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
EPS = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))


def test_one_time_may_stand_for_all():
    want = DiffusionLoss()(NET, X, t=torch.full((4,), 0.3), eps=EPS)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3]), torch.tensor(0.3, dtype=f64), [0.3] * 4, torch.full((4,), 0.3, dtype=f64)):
        got = DiffusionLoss()(NET, X, t=t, eps=EPS)
        assert got.dtype == f32
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize('t', [torch.rand(3), torch.rand(5), torch.rand(2, 2), torch.rand(0), [0.1, 0.2]], ids=lambda t: str(len(t)))
def test_times_of_another_length_are_refused(t):
    with pytest.raises((TypeError, ValueError), match=r'\bt\b.*shape|times.*shape|shape.*times'): DiffusionLoss()(NET, X, t=t)


@pytest.mark.parametrize('t', [-0.1, 1.1, 1.0003, math.nan, math.inf], ids=str)
def test_times_outside_the_unit_interval_are_refused(t):
    "beyond [0, 1] lie nan and levels outside the range that was asked for"
    for schedule, times in itertools.product(SCHEDULES, (t, torch.tensor([0.5, 0.5, t, 0.5]))):
        with pytest.raises(ValueError, match='0.*1'): DiffusionLoss(schedule, weighting='nelbo')(NET, X, t=times)


@pytest.mark.parametrize('t', ['0.5', 'a', True, [None] * 4, torch.ones(4, dtype=torch.int64), torch.tensor([True] * 4), torch.full((4,), 0.5 + 0j)], ids=repr)
def test_times_that_are_no_numbers_are_refused(t):
    "an index 0 ... T - 1 is the usual mistake: as a time it would be 1 or beyond"
    with pytest.raises((TypeError, ValueError), match=r'\bt\b|times|floating-point'): DiffusionLoss()(NET, X, t=t)


@pytest.mark.parametrize('eps', [torch.randn(4), torch.randn(2), torch.randn(4, 1), torch.randn(1, 2), torch.randn(4, 2, 1), torch.randn(3, 2)], ids=lambda e: str(tuple(e.shape)))
def test_noise_of_another_shape_is_refused(eps):
    "with four examples of four numbers (4,) would broadcast"
    with pytest.raises(ValueError, match='eps'): DiffusionLoss()(NET, X, eps=eps)
    if eps.shape == (4,):
        with pytest.raises(ValueError, match='eps'): DiffusionLoss()(NET, torch.randn(4, 4), eps=eps)


@pytest.mark.parametrize('dtype', [torch.float16, f64, torch.int64])
def test_noise_of_another_dtype_does_not_change_the_precision_of_training(dtype):
    "float64 noise from numpy would turn a float32 step into float64, or meet float32 weights and fail inside the network"
    seen = []
    def net(z, u): seen.append(z.dtype); return 0.5 * z
    try: got = DiffusionLoss()(net, X, t=0.5, eps=EPS.to(dtype))
    except (TypeError, ValueError) as e: assert 'eps' in str(e)
    else: assert got.dtype == f32 and seen == [f32]


@pytest.mark.parametrize('eps', ['noise', 1., [[1., 2.]] * 4, np.ones((4, 2)), torch.zeros(4, 2, device='meta')], ids=lambda e: type(e).__name__)
def test_noise_that_is_no_tensor_here_is_refused(eps):
    with pytest.raises((TypeError, ValueError), match='eps'): DiffusionLoss()(NET, X, t=0.5, eps=eps)


@pytest.mark.parametrize('x', [torch.ones(4, 2, dtype=torch.int64), torch.zeros(4, 3, 8, 8, dtype=torch.uint8), np.ones((4, 2)), [[1., 2.]], None, 'ring',
                               torch.randn(4), torch.tensor(1.), torch.zeros(0, 2)], ids=lambda x: f'{type(x).__name__}{tuple(getattr(x, "shape", ()))}')
def test_data_that_cannot_be_noised_are_refused(x):
    "images as uint8 are the usual mistake"
    with pytest.raises((TypeError, ValueError), match=r'\bx\b|data'): DiffusionLoss()(NET, x)


def test_the_generator_decides_everything():
    make = lambda seed: DiffusionLoss()(NET, X, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    before = torch.get_rng_state(); make(0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(DiffusionLoss()(NET, X, 0.3, EPS), DiffusionLoss()(NET, X, 0.3, EPS, torch.Generator().manual_seed(5)))


def test_inputs_are_left_as_they_were():
    x, eps, t = X.clone(), EPS.clone(), torch.rand(4)
    kept = t.clone()
    DiffusionLoss()(NET, x, t=t, eps=eps)
    assert torch.equal(x, X) and torch.equal(eps, EPS) and torch.equal(t, kept)


@pytest.mark.parametrize('place', range(3))
@pytest.mark.parametrize('bad, kind', [('cosin', ValueError), ('', ValueError), (None, TypeError), (3., TypeError), (['x'], TypeError), (dict, TypeError)], ids=repr)
def test_bad_choices_are_named(place, bad, kind):
    choice = ['cosine', 'eps', 'weighted']; choice[place] = bad
    with pytest.raises(kind, match=('schedule', 'target', 'weighting')[place]) as e: DiffusionLoss(*choice)
    assert repr(bad) in str(e.value)


@every
@torch.no_grad()
def test_names_classes_and_instances_are_one(schedule):
    for target, weighting in pairs(schedule):
        by_name = DiffusionLoss(schedule, target, weighting)
        for other in (DiffusionLoss(SCHEDULES[schedule], TARGETS[target], WEIGHTINGS[weighting]), DiffusionLoss(SCHEDULES[schedule](), TARGETS[target](), WEIGHTINGS[weighting]())):
            assert repr(other) == repr(by_name)
            assert torch.equal(other(NET, X, 0.4, EPS), by_name(NET, X, 0.4, EPS))
        assert type(by_name.schedule).__name__ in repr(by_name) and type(by_name.target).__name__ in repr(by_name)


# ---- losses of no use

@pytest.mark.parametrize('triple, says', [
    ((CosineSchedule(-75, 75), 'x', 'nelbo'), 'inf in float32 at logsnr'), ((CosineSchedule(-100, 20), 'eps', 'rescaled'), 'inf in float32 at logsnr'), (('cosine(-20, 100)', 'eps', 'snr'), 'inf in float32 at logsnr'),
    ((CosineSchedule(60, 70), 'eps', 'edm'), 'is 0 in float32 over the whole range'), (('cosine', 'eps', 'edm(mean=80, std=0.01)'), 'is 0 in float32 over the whole range'), (('ve(-12, 40)', 'eps', 'p2(k=1, gamma=100)'), None),
    (('edm_train(-9.6, 60)', 'v', 'nelbo'), 'inf in float32 at logsnr'), (('ve(-100, 0)', 'eps', 'rescaled'), 'inf in float32 at logsnr')], ids=str)
def test_a_weight_that_is_infinite_or_nothing_is_refused(triple, says):
    if says is None: assert DiffusionLoss(*triple).factor(torch.tensor(0.5)).isfinite(); return
    with pytest.raises(ValueError, match=says): DiffusionLoss(*triple)


def test_a_factor_on_a_schedule_that_learns_is_refused_with_the_weight_to_take():
    factors = [w for w, cls in WEIGHTINGS.items() if not issubclass(cls, LogSNRWeighting)]
    assert {'weighted', 'rescaled', 'min_snr', 'ddpm_vlb'} <= set(factors)
    for w, y in itertools.product(factors, TARGETS):
        with pytest.raises(ValueError, match='Bind it to a schedule') as e: DiffusionLoss('adaptive', y, w)
        offered = str(e.value).rsplit("'implied(", 1)[1].split("'")[0]
        loss = DiffusionLoss('adaptive', y, f'implied({offered}')
        k = torch.linspace(-12, 12, 9, dtype=f64)
        torch.testing.assert_close(loss.eps_factor(loss.schedule.t(k)) * loss.schedule.density(k), DiffusionLoss('cosine', y, w).eps_factor(CosineSchedule().t(k)) * CosineSchedule().density(k), rtol=1e-6, atol=0)
        torch.testing.assert_close(*(q.factor(q.schedule.t(k)) * q.schedule.density(k) for q in (loss, DiffusionLoss('adaptive', y, 'nelbo').beside(w))), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match='Bind it') as e: DiffusionLoss('adaptive', 'F(sigma_data=2)', 'min_snr(gamma=3)')
    offered = "implied(" + str(e.value).rsplit("'implied(", 1)[1].split("'")[0]
    assert DiffusionLoss('adaptive', 'F(sigma_data=2)', offered).weighting._triple[1].sigma_data == 2 and DiffusionLoss('adaptive', 'v', offered).weighting._triple[2].gamma == 3


# ---- a schedule that learns

def test_it_learns_where_gradients_are_recorded_and_nowhere_else():
    loss = DiffusionLoss('adaptive', 'v', 'sigmoid')
    seen = lambda: (~loss.schedule._history.isnan()).sum().item()
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): loss(NET, x)
    with torch.inference_mode(): loss(NET, x)
    loss.factor(torch.rand(9)); loss.noisy(x, torch.rand(256), x); repr(loss)
    assert seen() == 0
    loss(NET, x)
    assert seen() > 90
    cosine = DiffusionLoss('cosine', 'v', 'sigmoid')
    before = repr(vars(cosine.schedule)); cosine(NET, x)
    assert repr(vars(cosine.schedule)) == before


def test_it_learns_w_times_the_loss_per_level_whatever_its_density_was():
    "L = E[w L′/p] is for any history the integral over λ; the history is w L′ itself, so it does not depend on the density that was sampled from"
    loss = DiffusionLoss('adaptive(decay=0)', 'eps', 'sigmoid')
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    zero = lambda z, u: torch.zeros_like(z)           # ε-error 1 at every level: w L′ is w
    middle = (loss.schedule._edges[1:] + loss.schedule._edges[:-1]) / 2
    values = []
    for seed in range(3):
        values.append(loss(zero, x, generator=torch.Generator().manual_seed(seed)).double())
        torch.testing.assert_close(loss.schedule._history, torch.sigmoid(2 - middle), rtol=0.2, atol=1e-3)
    exact = 12.9 + 2 + math.log1p(math.exp(-14.9)) - math.log1p(math.exp(-10.9))   # ∫ sigmoid(2 - λ) dλ, ±12.9
    for value in values: assert abs(value.mean() - exact) < 5 * value.std() / len(x)**0.5
    assert values[-1].std() < 0.8 * values[0].std()


def test_a_batch_that_is_not_finite_teaches_nothing():
    loss = DiffusionLoss('adaptive', 'v', 'nelbo')
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    loss(NET, x); before = loss.schedule.state()['history']
    assert loss(lambda z, u: z * math.nan, x).isnan().all() and loss(lambda z, u: z * 1e30, x).isinf().any()
    assert torch.equal(loss.schedule.state()['history'].nan_to_num(-1), before.nan_to_num(-1))


@pytest.mark.parametrize('T', [1, 7, 1000])
def test_the_bound_of_T_steps_is_a_sum_over_T_levels(T):
    "½ Σ (SNR(s)/SNR(t) - 1) ‖ε - ε̂‖², thesis 3.18, twice and by its mean, from λ alone"
    loss = DiffusionLoss(SCHEDULES['discrete'](-6, 6, T=T), 'eps', 'nelbo')
    i = torch.arange(1, T + 1)
    x, eps, y_hat, _ = draw((T, 2), 5)
    got = loss(lambda z, u: y_hat, x, t=i.double() / T, eps=eps)
    l = CosineSchedule(-6, 6).logsnr(torch.arange(T + 1, dtype=f64) / T)
    torch.testing.assert_close(got.mean(), (torch.expm1(l[:-1] - l[1:]) * (eps - y_hat).square().mean(1)).sum(), rtol=1e-9, atol=0)
    seen = loss.schedule.index(torch.rand(5000, generator=torch.Generator().manual_seed(0)))
    assert seen.min() >= 1 and (T == 1000 or len(seen.unique()) == T)


def test_the_first_step_of_ddpm_from_the_data_themselves():
    "λ_0 = ∞: the first term of the bound is infinite, so the loss is refused at that time and with it; with the variance β it is finite"
    s = SCHEDULES['ddpm'](logsnr_max=math.inf)
    first = torch.tensor([1e-3] * 4)
    assert DiffusionLoss(s, 'eps', 'ddpm_vlb')(NET, X, first, EPS).isfinite().all()
    with pytest.raises(ValueError, match='no finite factor'): DiffusionLoss(s, 'eps', 'nelbo')(NET, X, first, EPS)
    assert DiffusionLoss(s, 'eps', 'nelbo')(NET, X, first + 1e-3, EPS).isfinite().all()
