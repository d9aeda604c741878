"Attempts to break lfdm.weightings: every (schedule, target, weighting) of the registries, and the factors others write."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from scipy.integrate import simpson

from lfdm.schedules import SCHEDULES, CosineSchedule
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS, EpsFactor, LogSNRWeighting, implied_w

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
TRIPLES = list(itertools.product(SCHEDULES, TARGETS, WEIGHTINGS))
every = pytest.mark.parametrize('schedule, target, weighting', TRIPLES)


def instances(schedule, target, weighting): return SCHEDULES[schedule](), TARGETS[target](), WEIGHTINGS[weighting]()
def levels(s, n=41, dtype=f64): return torch.linspace(s.logsnr_min, s.logsnr_max, n, dtype=dtype)


@every
def test_factors_agree_and_keep_shape_and_dtype(schedule, target, weighting):
    s, y, w = instances(schedule, target, weighting)
    for dtype, tolerance in ((f64, 1e-12), (f32, 2e-6)):
        logsnr = levels(s, dtype=dtype)
        factor, eps_factor, ratio = w.factor(logsnr, s, y), w.eps_factor(logsnr, s, y), y.eps_ratio(*s.scales(logsnr))
        torch.testing.assert_close(factor, eps_factor * ratio, rtol=tolerance, atol=0)
        assert (factor >= 0).all() and factor.isfinite().all() and eps_factor.isfinite().all() and (factor > 0).any()
        for shape in ((), (1,), (3, 1), (0,)):
            for got in (w.factor(logsnr.new_full(shape, 0.5), s, y), w.eps_factor(logsnr.new_full(shape, 0.5), s, y)):
                assert got.shape == shape and got.dtype == dtype


@every
def test_implied_w_is_what_the_average_over_times_counts(schedule, target, weighting):
    "E_t[factor · e(λ(t))] = ∫ w(λ) r(λ) e(λ) dλ for a made-up error e, once over t and once over λ; and w is 0 outside the range"
    s, y, w = instances(schedule, target, weighting)
    error = lambda l: 1 / l.cosh()**2
    t = torch.linspace(0, 1, 200_001, dtype=f64); l = s.logsnr(t)
    over_time = simpson((w.factor(l, s, y) * error(l)).numpy(), x=t.numpy())
    inside = levels(s, 20_001)
    implied = implied_w(inside, s, y, w)
    over_level = simpson((implied * y.eps_ratio(*s.scales(inside)) * error(inside)).numpy(), x=inside.numpy())
    assert abs(over_time / over_level - 1) < 1e-4
    assert (implied_w(torch.tensor([s.logsnr_min - 1, s.logsnr_max + 1], dtype=f64), s, y, w) == 0).all()
    torch.testing.assert_close(implied, s.density(inside) * w.eps_factor(inside, s, y))


def test_implied_w_takes_numbers():
    for triple in TRIPLES: torch.testing.assert_close(implied_w(0., *triple), implied_w(torch.tensor(0., dtype=f64), *triple))


@pytest.mark.parametrize('schedule, target', list(itertools.product(SCHEDULES, TARGETS)))
def test_the_nelbo_counts_every_level_alike(schedule, target):
    logsnr = levels(SCHEDULES[schedule]())[1:-1]
    torch.testing.assert_close(implied_w(logsnr, schedule, target, 'nelbo'), torch.ones_like(logsnr), rtol=1e-12, atol=0)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_each_kind_depends_on_what_it_says(weighting):
    "w(λ) on nothing but λ; an ε-factor on nothing but λ at sampled times"
    w, logsnr = WEIGHTINGS[weighting](), torch.linspace(-7, 7, 15, dtype=f64)
    pairs = list(itertools.product(SCHEDULES, TARGETS))
    implied = torch.stack([implied_w(logsnr, s, y, w) for s, y in pairs])
    factors = torch.stack([w.eps_factor(logsnr, SCHEDULES[s](), TARGETS[y]()) for s, y in pairs])
    same = lambda rows: torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-10, atol=0)
    if isinstance(w, LogSNRWeighting): assert same(implied) and not same(factors)
    if isinstance(w, EpsFactor): assert same(factors) and not same(implied)
    if weighting == 'weighted': assert not same(factors) and not same(implied)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_the_thesis_factors_from_the_schedule_alone(schedule):
    "SNR′ by autograd of α²/σ² over t: the scalings 3.21, 3.26, 3.60, 3.51 and the rescalings 3.62 to 3.64"
    s = SCHEDULES[schedule]()
    t = torch.linspace(0.05, 0.95, 19, dtype=f64, requires_grad=True)
    level = s.level(t)
    snr = (level.alpha / level.sigma)**2
    dsnr, = torch.autograd.grad(snr.sum(), t)
    l, a2, s2, snr = (q.detach() for q in (level.logsnr, level.alpha**2, level.sigma**2, snr))
    nelbo = dict(x=-dsnr, eps=-dsnr / snr, v=-dsnr * s2 / (a2 + s2), score=-dsnr * s2**2 / a2)
    rescaled = dict(x=torch.ones_like(l), eps=s2 / a2, v=s2 / (a2 + s2), score=s2**2 / a2)
    weight = dict(x=-1 / dsnr, eps=-snr / dsnr, v=-(a2 + s2) / (s2 * dsnr), score=-a2 / (s2**2 * dsnr))   # 3.24, 3.27, 3.61, paper 15
    for y in nelbo:
        factor = {w: WEIGHTINGS[w]().factor(l, s, TARGETS[y]()) for w in ('nelbo', 'rescaled', 'weighted')}
        torch.testing.assert_close(factor['nelbo'], nelbo[y], rtol=1e-8, atol=0)
        torch.testing.assert_close(factor['rescaled'], rescaled[y], rtol=1e-10, atol=0)
        torch.testing.assert_close(factor['weighted'] / factor['nelbo'], weight[y], rtol=1e-8, atol=0)


# factor on the ε-error of the plain error of each target, variance preserving: FIELD.md, first table
PLAIN = dict(x=lambda l: math.exp(-l), eps=lambda l: 1., v=lambda l: 1 + math.exp(-l), score=lambda l: 1 + math.exp(l), F=lambda l: 1 + 4 * math.exp(-l))
# and of the ε-factors others write, whatever the target
OTHERS = dict(rescaled=lambda l: math.exp(-l), snr=math.exp, truncated_snr=lambda l: max(1, math.exp(-l)),
              min_snr=lambda l: min(1, 5 * math.exp(-l)), soft_min_snr=lambda l: 1 / (1 + math.exp(l) / 5))
# and of the weights w(λ)
WEIGHTS = dict(nelbo=lambda l: 1., sigmoid=lambda l: 1 / (1 + math.exp(l - 2)))


@few
@given(st.floats(-9.9, 12))
def test_the_factors_others_write(l):
    "min where min is meant, and + 1 where + 1 is meant: both were wrong in public code for years"
    logsnr, cosine = torch.tensor([l], dtype=f64), CosineSchedule()
    for schedule in ('cosine', 'linear'):
        for y in PLAIN.keys() & TARGETS.keys():
            got = WEIGHTINGS['weighted']().eps_factor(logsnr, SCHEDULES[schedule](), TARGETS[y]())
            assert abs(got.item() / PLAIN[y](l) - 1) < 1e-9, y
    for w, y in itertools.product(OTHERS.keys() & WEIGHTINGS.keys(), TARGETS):
        got = WEIGHTINGS[w]().factor(logsnr, cosine, TARGETS[y]()) / TARGETS[y]().eps_ratio(*cosine.scales(logsnr))
        assert abs(got.item() / OTHERS[w](l) - 1) < 1e-9, (w, y)
    for w, y, s in itertools.product(WEIGHTS.keys() & WEIGHTINGS.keys(), TARGETS, SCHEDULES):
        if not SCHEDULES[s]().logsnr_min < l < SCHEDULES[s]().logsnr_max: continue
        assert abs(implied_w(logsnr, s, y, w).item() / WEIGHTS[w](l) - 1) < 1e-9, (w, y, s)


def test_the_v_error_is_snr_plus_one_on_x_and_one_plus_inverse_snr_on_eps():
    "Salimans and Ho's SNR + 1, in numbers: at SNR = 4, ‖v - v̂‖² = 5 ‖x - x̂‖² = 1.25 ‖ε - ε̂‖²"
    logsnr = torch.tensor([math.log(4)], dtype=f64)
    cosine, weighted = CosineSchedule(), WEIGHTINGS['weighted']()
    on_eps = weighted.eps_factor(logsnr, cosine, TARGETS['v']())
    torch.testing.assert_close(torch.cat([on_eps, on_eps * TARGETS['x']().eps_ratio(*cosine.scales(logsnr))]), torch.tensor([1.25, 5.], dtype=f64))


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('target', TARGETS)
def test_no_factor_is_nan_where_the_signal_or_the_noise_is_gone(weighting, target):
    "uncut, t = 0 and t = 1: a plain error stays a plain error, a weight may be infinite, nothing is nan"
    uncut = CosineSchedule(-math.inf, math.inf)
    logsnr = uncut.logsnr(torch.tensor([0., 1.], dtype=f64))
    try: factor = WEIGHTINGS[weighting]().factor(logsnr, uncut, TARGETS[target]())
    except (ZeroDivisionError, ValueError) as e:
        assert 'alpha' in str(e) or 'sigma' in str(e) or 'logsnr' in str(e)
        return
    if weighting == 'weighted': assert torch.equal(factor, torch.ones(2, dtype=f64))
    if isinstance(w := WEIGHTINGS[weighting](), LogSNRWeighting): assert not w.w(logsnr).isnan().any()


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_every_weighting_says_what_it_is(weighting):
    w = WEIGHTINGS[weighting]()
    assert w.name == weighting and repr(w).startswith(type(w).__name__ + '(')


def test_bad_names():
    l = torch.zeros(1)
    for bad, kind in ((('cosin', 'eps', 'nelbo'), ValueError), (('cosine', 'epss', 'nelbo'), ValueError), (('cosine', 'eps', 'elbo'), ValueError),
                      ((None, 'eps', 'nelbo'), TypeError), (('cosine', 3, 'nelbo'), TypeError), (('cosine', 'eps', torch.zeros(1)), TypeError)):
        with pytest.raises(kind, match='schedule|target|weighting'): implied_w(l, *bad)
