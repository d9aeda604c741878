"Attempts to break lfdm.losses: every (schedule, target, weighting) over shapes and dtypes; wrong input."
import copy
import itertools
import math
import re

import numpy as np
import pytest
import torch

from lfdm.core import seeded
from lfdm.losses import DiffusionLoss, predict
from lfdm.networks import MLP
from lfdm.schedules import SCHEDULES, CosineSchedule, network_time
from lfdm.targets import TARGETS, convert
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
close = torch.testing.assert_close
every = pytest.mark.parametrize('schedule', SCHEDULES)
SHAPES = [(2, 2), (3, 2), (4, 3, 4, 4), (3, 3, 3), (4, 4, 4, 4), (2, 2, 2), (5, 7)]


def pairs(schedule):
    "Targets and weightings that go with a schedule: a learned one needs a weight w(λ)."
    fits = lambda w: not SCHEDULES[schedule].learned or issubclass(WEIGHTINGS[w], LogSNRWeighting)
    return [(y, w) for y, w in itertools.product(TARGETS, WEIGHTINGS) if fits(w)]


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
    net = lambda z, u: 0.3 * z + column(u, z)
    for k, (y, w) in enumerate(pairs(schedule)):
        loss, shape, said = DiffusionLoss(schedule, y, w), SHAPES[k % len(SHAPES)], []
        dtype, tolerance = ((f64, 1e-9), (f32, 1e-3))[k % 2]
        x, eps, _, t = draw(shape, k, dtype)
        got = loss(lambda z, u, said=said: said.append(net(z, u)) or said[0], x, t=t, eps=eps)
        assert got.shape == shape[:1] and got.dtype == dtype and got.isfinite().all()
        alpha, sigma = (column(q(t), x) for q in (loss.schedule.alpha, loss.schedule.sigma))
        eps_hat = convert(said[0], y, 'eps', alpha * x + sigma * eps, alpha, sigma)
        truth = loss.target.encode(x, eps, alpha, sigma)
        for factor, error in ((loss.eps_factor(t), eps - eps_hat), (loss.factor(t), truth - said[0])):
            close(got, factor * error.square().flatten(1).mean(1), rtol=tolerance, atol=0)
        close(loss(net, x[1:2], t[1:2], eps[1:2]), got[1:2], rtol=tolerance, atol=0)   # by itself


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


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_at_zero_or_infinite_snr_a_loss_is_right_or_refused(weighting):
    "the uncut cosine schedule at its ends: no nan, no clamp; an error that names the scale, or the truth"
    x, eps, y_hat, _ = draw((3, 2), 5)
    for target, end in itertools.product(TARGETS, (0., 1.)):
        loss = DiffusionLoss(CosineSchedule(-math.inf, math.inf), target, weighting)
        try: got = loss(lambda z, u: y_hat, x, t=end, eps=eps)
        except (ZeroDivisionError, ValueError) as e:
            assert any(word in str(e) for word in ('alpha', 'sigma', 'logsnr', 'finite'))
            continue
        assert not got.isnan().any()
        truth = dict(x=x, eps=eps, v=-x if end else eps, score=-eps, F=2 * x if end else -eps, flow=eps - x)
        if weighting == 'weighted': close(got, (truth[target] - y_hat).square().mean(1))


@pytest.mark.parametrize('T', [1, 100])
def test_the_bound_of_T_steps_is_a_sum_over_T_levels(T):
    "½ Σ (SNR(s)/SNR(t) - 1) ‖ε - ε̂‖², thesis 3.18, twice and by its mean"
    loss = DiffusionLoss(SCHEDULES['discrete'](-6, 6, T=T), 'eps', 'nelbo')
    x, eps, y_hat, _ = draw((T, 2), 5)
    got = loss(lambda z, u: y_hat.requires_grad_(), x, t=torch.arange(1, T + 1, dtype=f64) / T, eps=eps)
    l = CosineSchedule(-6, 6).logsnr(torch.arange(T + 1, dtype=f64) / T)
    factor = torch.expm1(l[:-1] - l[1:])
    close(got.mean(), (factor * (eps - y_hat).square().mean(1)).sum(), rtol=1e-9, atol=0)
    got.mean().backward()
    close(y_hat.grad, factor[:, None] * (y_hat - eps).detach(), rtol=1e-9, atol=0)   # 2/D, and D is 2


# ---- what the network is given

@every
@torch.no_grad()
def test_the_network_sees_unit_scale_and_the_time_of_its_level(schedule):
    seen, g, s = {}, seeded(0), SCHEDULES[schedule]()
    def net(z, u): seen.update(z=z, u=u); return z
    for t, dtype in itertools.product((0.0005, 0.5, 0.9995), (f32, f64)):
        times, x = torch.full((20_000,), t, dtype=dtype), torch.randn(20_000, 2, generator=g, dtype=dtype)
        DiffusionLoss(s, weighting='nelbo')(net, x, t=times, generator=g)
        assert abs(seen['z'].std() - 1) < 0.03 and seen['z'].dtype == seen['u'].dtype == dtype
        close(seen['u'], network_time(s.logsnr(times)), rtol=0, atol=0)
    level = s.level(torch.tensor(0.3, dtype=dtype))
    out = predict(net, torch.ones(20, 2, dtype=dtype), level)
    assert seen['u'].shape == (20,) and out.shape == (20, 2)
    close(out[7, 0], 1 / (level.alpha**2 + level.sigma**2).sqrt())


HALVES = torch.float16, torch.bfloat16
RANGES = (-80, 80), (-170, 5), (-5, 100), (-5, 300), (-700, 700)


@every
@torch.no_grad()
def test_sixteen_bits_cost_the_rounding_of_the_network_only(schedule):
    "times, levels, factors and noise have 32; the network sees its own dtype, and says the same in both"
    x = torch.randn(64, 2, generator=seeded(0))
    for k, (target, weighting) in enumerate(pairs(schedule)):
        loss, half, seen = DiffusionLoss(schedule, target, weighting), x.to(HALVES[k % 2]), set()
        net = lambda z, u, seen=seen: seen.add(z.dtype) or seen.add(u.dtype) or torch.full_like(z, .25)
        got = loss(net, half, generator=seeded(0))
        assert seen == {half.dtype} and got.dtype == f32 and got.isfinite().all(), (target, weighting)
        same = k % 3 or torch.equal(got, loss(net, half.float(), generator=seeded(0)))
        assert same, (target, weighting)


@torch.no_grad()
def test_data_and_network_of_two_precisions_work_or_say_so():
    "a network of 16 bits sees 16, whatever the data; one of 32 sees 32 of data of 16; 64 and 32 do not mix"
    of = lambda net, x: DiffusionLoss('cosine', 'score', 'weighted')(net, x, generator=seeded(0))
    net = MLP(width=8)
    want, x = of(net, X), X
    assert torch.equal(of(net, x.half()), of(net, x.half().float()))
    for dtype, data in itertools.product(HALVES, (x, x.half(), x.bfloat16())):
        close(of(copy.deepcopy(net).to(dtype), data), want, rtol=0.1, atol=0.1)
    for t in (torch.rand(4).half(), torch.rand(4).bfloat16()):
        values = [DiffusionLoss(weighting='nelbo')(NET, x.half(), q, EPS) for q in (t, t.float())]
        assert torch.equal(*values) and torch.equal(*(DiffusionLoss().factor(q) for q in (t, t.float())))
    with pytest.raises(TypeError, match='not take x of torch.float64.*net.double') as e: of(net, x.double())
    assert len(str(e.value)) <= 300 and of(net.double(), x.double()).dtype == f64
    assert torch.equal(of(lambda z, u: z, X.numpy()), of(lambda z, u: z, X))   # an array is data, a list too
    close(of(lambda z, u: z, X.tolist()), of(lambda z, u: z, X))


@every
@torch.no_grad()
def test_a_range_of_levels_is_refused_or_finite(schedule):
    "float32 has no σ² below λ = -88 and no σ below -177: a network would see zeros, or nan"
    x, seen, made = torch.randn(99, 2, generator=seeded(1)), {}, []
    def net(z, u): seen.update(z=z); return 0 * z
    for low, high, (target, weighting) in ((*ends, pair) for ends in RANGES for pair in pairs(schedule)[::3]):
        try: loss = DiffusionLoss(SCHEDULES[schedule](low, high), target, weighting)
        except ValueError as e:
            assert len(str(e)) <= 300
            continue
        made.append(low)
        assert loss(net, x, generator=seeded(0)).isfinite().all() and (seen['z'].abs().amax(1) > 1e-3).all()
    if schedule == 've': assert set(made) == {-80, -170, -5}


# ---- what the network, t, eps and x must be

NET = lambda z, u: 0.5 * z
X, EPS = torch.randn(4, 2, generator=seeded(0)), torch.randn(4, 2, generator=seeded(1))
WRONG = dict(
    net=('the network returned', [
        lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: z[None], lambda z, u: z.T, lambda z, u: u,
        lambda z, u: None, lambda z, u: (z, u), lambda z, u: z.numpy(), lambda z, u: 0.]),
    x=('x must be floating-point data', [   # images as uint8 are the usual mistake
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.randn(4), torch.zeros(0, 2), torch.zeros(4, 0), 3]),
    eps=('eps must be like x', [            # float64 noise would turn a float32 step into float64
        torch.randn(4), torch.randn(4, 1), torch.randn(1, 2), torch.randn(3, 2), EPS.double(), 1.,
        np.ones((4, 2)), EPS.half()]),
    t=('t has shape .* but x has 4 examples|t must lie in .0, 1.|t must be a number, not nan', [
        torch.rand(3), torch.rand(2, 2), torch.rand(0), [0.1, 0.2], -0.1, 1.0003, math.nan, math.inf,
        [0.5, 0.5, 1.1, 0.5]]))


@pytest.mark.parametrize('name', WRONG)
def test_what_cannot_be_is_refused(name):
    "a wrong shape would broadcast to a loss that looks like one"
    says, wrong = WRONG[name]
    for bad, schedule in itertools.product(wrong, SCHEDULES if name == 't' else ['cosine']):
        with pytest.raises((TypeError, ValueError), match=says):
            DiffusionLoss(schedule, weighting='nelbo')(**dict(net=NET, x=X, t=0.5, eps=EPS) | {name: bad})


def test_one_time_may_stand_for_all():
    of = lambda t: DiffusionLoss()(NET, X, t, EPS)
    for t in (0.3, torch.tensor(0.3), torch.tensor([0.3]), [0.3] * 4, torch.full((4,), 0.3, dtype=f64)):
        assert torch.equal(of(t), of(torch.full((4,), 0.3)))


def test_the_generator_decides_everything_and_inputs_stay():
    make = lambda seed: DiffusionLoss()(NET, X, generator=seeded(seed))
    before, x, eps, t = torch.get_rng_state(), X.clone(), EPS.clone(), torch.full((4,), 0.3)
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    assert torch.equal(DiffusionLoss()(NET, x, t, eps), DiffusionLoss()(NET, x, t, eps, seeded(5)))
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, X) and torch.equal(eps, EPS)


# ---- choices, and losses of no use

@pytest.mark.parametrize('bad, kind', [('cosin', ValueError), (None, TypeError), (dict, TypeError)], ids=repr)
def test_bad_choices_are_named(bad, kind):
    for name in ('schedule', 'target', 'weighting'):
        with pytest.raises(kind, match=f'{name}.*{re.escape(repr(bad))}'): DiffusionLoss(**{name: bad})


@pytest.mark.parametrize('triple, says', [
    ('cosine(-75,75) x nelbo', 'inf in'), ('cosine(-20,100) eps snr', 'inf in'),
    ('edm_train(-9.6,60) v nelbo', 'inf in'), ('ve(-100,0) eps rescaled', 'inf in'),
    ('cosine(60,70) eps edm', '0 in')])
def test_a_weight_that_is_infinite_or_nothing_is_refused(triple, says):
    with pytest.raises(ValueError, match=f'the factor of DiffusionLoss.* is {says} float32'):
        DiffusionLoss(*triple.split())
    DiffusionLoss('ve(-12, 40)', 'eps', 'p2(k=1, gamma=100)')   # 0 somewhere


def test_the_first_step_of_ddpm_from_the_data_themselves():
    "λ_0 = ∞: the first term of the bound is infinite, so the loss is refused there; with σ² = β it is finite"
    first, loss = torch.full((4,), 1e-3), lambda w: DiffusionLoss('ddpm(logsnr_max=inf)', 'eps', w)
    assert loss('ddpm_vlb')(NET, X, first, EPS).isfinite().all()
    with pytest.raises(ValueError, match='no finite factor'): loss('nelbo')(NET, X, first, EPS)


# ---- a schedule that learns

FACTORS = [w for w in WEIGHTINGS if not issubclass(WEIGHTINGS[w], LogSNRWeighting)]


@pytest.mark.parametrize('weighting', FACTORS)
def test_a_factor_on_a_schedule_that_learns_is_refused_with_the_weight_to_take(weighting):
    k = torch.linspace(-12, 12, 9, dtype=f64)
    w = lambda loss: loss.eps_factor(loss.schedule.t(k)) * loss.schedule.density(k)
    with pytest.raises(ValueError, match="Bind it to a schedule: 'implied") as e:
        DiffusionLoss('adaptive', 'F(sigma_data=2)', weighting)
    of = lambda s, weighting: DiffusionLoss(s, 'F(sigma_data=2)', weighting)
    offered = of('adaptive', str(e.value).split("'")[-2])
    for loss in (offered, of('adaptive', 'nelbo').beside(weighting)):
        close(w(loss), w(of('cosine', weighting)), rtol=1e-6, atol=0)


def test_it_learns_where_gradients_are_recorded_and_nowhere_else():
    loss, x = DiffusionLoss('adaptive', 'v', 'sigmoid'), torch.randn(256, 2, generator=seeded(0))
    seen = lambda: (~loss.schedule.state()['history'].isnan()).sum().item()
    with torch.no_grad(): loss(NET, x)
    with torch.inference_mode(): loss(NET, x)
    loss.factor(torch.rand(9)); loss.noisy(x, torch.rand(256), x)
    assert seen() == 0
    loss(NET, x)
    assert seen() > 90
    before = loss.schedule.state()['history'].clone()   # what is not finite teaches nothing
    assert loss(lambda z, u: z * math.nan, x).isnan().all() and loss(lambda z, u: z * 1e30, x).isinf().any()
    close(loss.schedule.state()['history'], before, rtol=0, atol=0, equal_nan=True)


def test_it_learns_w_times_the_loss_per_level():
    "L = E[w L′/p] is the integral over λ for any history, which is w L′ itself"
    x = torch.randn(50_000, 2, generator=seeded(0))
    loss = DiffusionLoss('adaptive(decay=0)', 'eps', 'sigmoid')
    zero = lambda z, u: 0 * z   # ε-error 1 at every level: w L′ is w
    edges, values = loss.schedule._history.edges, []
    for seed in range(3):
        values.append(loss(zero, x, generator=seeded(seed)).double())
        want = torch.sigmoid(2 - (edges[1:] + edges[:-1]) / 2)
        close(loss.schedule._history.averages, want, rtol=0.3, atol=2e-3)
    exact = 14.9 + math.log1p(math.exp(-14.9)) - math.log1p(math.exp(-10.9))   # ∫ sigmoid(2 - λ) dλ, ±12.9
    assert all(abs(value.mean() - exact) < 5 * value.std() / len(x)**0.5 for value in values)
    assert values[-1].std() < 0.8 * values[0].std()




@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_a_network_that_asks_for_fine_times_gets_them(dtype):
    "16 bits do not tell 1,000 timesteps apart"
    class Fine(torch.nn.Linear):
        time_dtype = torch.float32
        def forward(self, z, u): self.seen = z.dtype, u; return super().forward(z)
    schedule, t = CosineSchedule(), torch.linspace(.4, .6, 500)
    net, level = Fine(2, 2).to(dtype), CosineSchedule().level(t)
    predict(net, torch.zeros(500, 2, dtype=dtype), level)
    z_dtype, u = net.seen
    assert z_dtype == dtype and u.dtype == f32 and u.equal(network_time(schedule.logsnr(t)))
