"Attempts to break lfdm.losses: schedules, targets and weightings over shapes and dtypes."
import copy
import itertools
import math

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
SHAPES = [(2, 2), (3, 2), (4, 3, 4, 4), (3, 3, 3), (5, 7)]
NET = lambda z, u: 0.5 * z
X, EPS = torch.randn(2, 4, 2, generator=seeded(0))


def pairs(schedule):
    "A third of the targets and weightings that go with a schedule: a learned one needs a weight w(λ)."
    fits = lambda w: not SCHEDULES[schedule].learned or issubclass(WEIGHTINGS[w], LogSNRWeighting)
    every = [(y, w) for y, w in itertools.product(TARGETS, WEIGHTINGS) if fits(w)]
    return every[list(SCHEDULES).index(schedule) % 3::3]


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
    "a weight meant for one target's error is not one for another's"
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
        for factor, error in ((loss.eps_factor, eps - eps_hat), (loss.factor, truth - said[0])):
            close(got, factor(t) * error.square().flatten(1).mean(1), rtol=tolerance, atol=0)


@pytest.mark.parametrize('weighting', [w for w, cls in WEIGHTINGS.items() if not cls.learned])
def test_at_zero_or_infinite_snr_a_loss_is_right_or_refused(weighting):
    "no nan, no clamp; an error that names the scale, or the truth"
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


def test_a_weighting_that_learns_is_refused_on_levels_without_end():
    for target in TARGETS:
        with pytest.raises(ValueError, match='visits -inf to inf'):
            DiffusionLoss(CosineSchedule(-math.inf, math.inf), target, 'uncertainty')


# ---- what the network is given

@every
@torch.no_grad()
def test_the_network_sees_unit_scale_and_the_time_of_its_level(schedule):
    seen, s = {}, SCHEDULES[schedule]()
    def net(z, u): seen.update(z=z, u=u); return z
    for t, dtype in (0.0005, f32), (0.5, f64), (0.9995, f64):
        times, (x, eps, *_) = torch.full((20,), t, dtype=dtype), draw((20, 2), 0, dtype)
        DiffusionLoss(s, weighting='nelbo')(net, x, t=times, eps=eps)
        alpha, sigma = s.alpha(times)[:, None], s.sigma(times)[:, None]
        close(seen['z'], (alpha * x + sigma * eps) / (alpha**2 + sigma**2).sqrt())
        close(seen['u'], network_time(s.logsnr(times)), rtol=0, atol=0)
    level = s.level(torch.tensor(0.3, dtype=dtype))   # one for all
    out = predict(net, torch.ones(20, 2, dtype=dtype), level)
    assert seen['u'].shape == (20,)
    close(out[7, 0], 1 / (level.alpha**2 + level.sigma**2).sqrt())


@torch.no_grad()
def test_a_network_that_asks_for_fine_times_gets_them():
    "16 bits do not tell 1,000 timesteps apart"
    class Fine(torch.nn.Linear):
        time_dtype = f32
        def forward(self, z, u): self.seen = z.dtype, u; return super().forward(z)
    net, level = Fine(2, 2).half(), CosineSchedule().level(torch.linspace(.4, .6, 500))
    predict(net, torch.zeros(500, 2, dtype=torch.float16), level)
    z_dtype, u = net.seen
    assert z_dtype == torch.float16 and u.dtype == f32 and u.equal(network_time(level.logsnr))


HALVES = torch.float16, torch.bfloat16
RANGES = (-80, 80), (-170, 5), (-5, 100), (-5, 300), (-700, 700), (-math.inf, math.inf)


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
        assert k % 3 or torch.equal(got, loss(net, half.float(), generator=seeded(0)))


@torch.no_grad()
def test_data_and_network_of_two_precisions_work_or_say_so():
    "a network of 16 bits sees 16, whatever the data; one of 32 sees 32 of data of 16; 64 and 32 do not mix"
    of = lambda net, x: DiffusionLoss('cosine', 'score', 'weighted')(net, x, generator=seeded(0))
    net = MLP(width=8)
    assert torch.equal(of(net, X.half()), of(net, X.half().float()))
    for dtype, data in itertools.product(HALVES, (X, X.half(), X.bfloat16())):
        close(of(copy.deepcopy(net).to(dtype), data), of(net, X), rtol=0.1, atol=0.1)
    t = torch.rand(4, generator=seeded(1)).bfloat16()
    for f in (DiffusionLoss().factor, lambda t: DiffusionLoss(weighting='nelbo')(NET, X.half(), t, EPS)):
        assert torch.equal(f(t), f(t.float()))
    with pytest.raises(TypeError, match='not take x of torch.float64.*net.double') as e: of(net, X.double())
    assert len(str(e.value)) <= 300 and of(net.double(), X.double()).dtype == f64


@every
@torch.no_grad()
def test_a_range_of_levels_is_refused_or_finite(schedule):
    "float32 has no σ² below λ = -88 and no σ below -177; sampled times reach neither end"
    x, seen, made = torch.randn(99, 2, generator=seeded(1)), {}, set()
    def net(z, u): seen.update(z=z); return 0 * z
    for ends, pair in itertools.product(RANGES, pairs(schedule)):
        try: loss = DiffusionLoss(SCHEDULES[schedule](*ends), *pair)
        except ValueError as e:
            assert len(str(e)) <= 300
            continue
        made.add(ends[0])
        assert loss(net, x, generator=seeded(0)).isfinite().all() and (seen['z'].abs().amax(1) > 1e-3).all()
    if schedule == 've': assert made == {-80, -170, -5}
    if schedule == 'cosine': assert -math.inf in made


# ---- what the network, t, eps and x must be

WRONG = dict(
    net=('the network returned', [
        lambda z, u: z[:, :1], lambda z, u: z[0], lambda z, u: u, lambda z, u: None, lambda z, u: (z, u),
        lambda z, u: z.numpy()]),
    x=('x must be floating-point data', [   # images as uint8 are the usual mistake
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.randn(4)]),
    eps=('eps must be like x', [            # float64 noise would turn a float32 step into float64
        torch.randn(4), torch.randn(1, 2), EPS.double(), EPS.half()]),
    t=('t has shape .* but x has 4 examples|t must lie in .0, 1.', [
        torch.rand(3), torch.rand(2, 2), -0.1, 1.0003, [0.5, 0.5, 1.1, 0.5]]))


@pytest.mark.parametrize('name', WRONG)
def test_what_does_not_fit_is_refused(name):
    "a wrong shape would broadcast to a loss that looks like one"
    says, wrong = WRONG[name]
    for bad in wrong:
        with pytest.raises((TypeError, ValueError), match=says):
            DiffusionLoss(weighting='nelbo')(**dict(net=NET, x=X, t=0.5, eps=EPS) | {name: bad})


def test_the_generator_decides_everything_and_inputs_stay():
    make = lambda seed, *given: DiffusionLoss()(NET, X, *given, generator=seeded(seed))
    before, x, t = torch.get_rng_state(), X.clone(), torch.full((4,), 0.3)
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))
    assert torch.equal(make(0, t, EPS), make(5, torch.tensor([0.3]), EPS))   # one time may stand for all
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, X)


# ---- choices, and losses of no use

@pytest.mark.parametrize('triple, says', [
    ('cosine(-20,100) eps snr', 'inf in'), ('ve(-100,0) eps rescaled', 'inf in'),
    ('cosine(60,70) eps edm', '0 in')])
def test_a_weight_that_is_infinite_or_nothing_is_refused(triple, says):
    with pytest.raises(ValueError, match=f'the factor of DiffusionLoss.* is {says} float32'):
        DiffusionLoss(*triple.split())
    DiffusionLoss('ve(-12, 40)', 'eps', 'p2(k=1, gamma=100)')   # 0 somewhere


# ---- a schedule that learns

FACTORS = [w for w, cls in WEIGHTINGS.items() if not issubclass(cls, LogSNRWeighting) and not cls.learned]


@pytest.mark.parametrize('weighting', FACTORS)
def test_a_factor_on_a_schedule_that_learns_is_refused_with_the_weight_to_take(weighting):
    k = torch.linspace(-12, 12, 9, dtype=f64)
    w = lambda loss: loss.eps_factor(loss.schedule.t(k)) * loss.schedule.density(k)
    of = lambda schedule, weighting: DiffusionLoss(schedule, 'F(sigma_data=2)', weighting)
    with pytest.raises(ValueError, match="Bind it to a schedule: 'implied") as e: of('adaptive', weighting)
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
