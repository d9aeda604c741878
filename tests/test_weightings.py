"Attempts to break lfdm.weightings: every (schedule, target, weighting) of the registries, and the factors others write."
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from scipy.integrate import simpson

from lfdm.core import from_spec
from lfdm.losses import DiffusionLoss
from lfdm.schedules import CONTINUOUS, SCHEDULES, CosineSchedule
from lfdm.targets import TARGETS
from lfdm.weightings import EDM, WEIGHTINGS, EDMMonotonic, EpsFactor, LogSNRWeighting, implied_w, rising_intervals

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('schedule', SCHEDULES)
PAIRS = list(itertools.product(TARGETS, WEIGHTINGS))
WITH_PATH = (*CONTINUOUS, 'adaptive')   # on a staircase of T levels, sums stand for integrals and differences for slopes


def levels(s, n=41, dtype=f64): return torch.linspace(s.logsnr_min, s.logsnr_max, n, dtype=dtype)


@every
def test_factors_agree_and_keep_shape_and_dtype(schedule):
    s = SCHEDULES[schedule]()
    for (y, w), (dtype, tolerance) in itertools.product(((TARGETS[y](), WEIGHTINGS[w]()) for y, w in PAIRS), ((f64, 1e-12), (f32, 2e-6))):
        logsnr = levels(s, dtype=dtype)
        factor, eps_factor, ratio = w.factor(logsnr, s, y), w.eps_factor(logsnr, s, y), y.eps_ratio(*s.scales(logsnr))
        torch.testing.assert_close(factor, eps_factor * ratio, rtol=tolerance, atol=0)
        assert (factor >= 0).all() and factor.isfinite().all() and eps_factor.isfinite().all() and (factor > 0).any(), (y, w)
        for shape in ((), (1,), (3, 1), (0,)):
            for got in (w.factor(logsnr.new_full(shape, 0.5), s, y), w.eps_factor(logsnr.new_full(shape, 0.5), s, y)):
                assert got.shape == shape and got.dtype == dtype, (y, w)


@every
def test_implied_w_is_what_the_average_over_times_counts(schedule):
    "E_t[factor · e(λ(t))] = ∫ w(λ) r(λ) e(λ) dλ for a made-up error e, once over t and once over λ; and w is 0 outside the range"
    s, error = SCHEDULES[schedule](), lambda l: 1 / l.cosh()**2
    for y, w in ((TARGETS[y](), WEIGHTINGS[w]()) for y, w in PAIRS):
        if s.steps:   # a mean over T levels, and a sum over T cells
            l = s.logsnr(torch.arange(1, s.steps + 1, dtype=f64) / s.steps)
            over_time = (w.factor(l, s, y) * error(l)).mean()
            over_level = (implied_w(l, s, y, w) * y.eps_ratio(*s.scales(l)) * error(l) * s.jump(l)).sum()
        else:
            l = levels(s, 20_001)
            t = s.t(l)                     # a grid of times that is fine where λ runs fast
            over_time = -simpson((w.factor(s.logsnr(t), s, y) * error(s.logsnr(t))).numpy(), x=t.numpy())
            over_level = simpson((implied_w(l, s, y, w) * y.eps_ratio(*s.scales(l)) * error(l)).numpy(), x=l.numpy())
        assert abs(over_time / over_level - 1) < 1e-4, (y, w)
        assert (implied_w(torch.tensor([s.logsnr_min - 1, s.logsnr_max + 1], dtype=f64), s, y, w) == 0).all()
        torch.testing.assert_close(implied_w(l, s, y, w), s.density(l) * w.eps_factor(l, s, y))


def test_implied_w_takes_numbers():
    for triple in itertools.product(SCHEDULES, ('v', 'F'), WEIGHTINGS): torch.testing.assert_close(implied_w(0., *triple), implied_w(torch.tensor(0., dtype=f64), *triple))


@every
def test_the_nelbo_counts_every_level_alike(schedule):
    "but for a chain of T levels, which counts a step of height Δ (e^Δ - 1)/Δ times"
    s = SCHEDULES[schedule]()
    logsnr = levels(s)[1:-1]
    jump = s.jump(logsnr) if s.steps else torch.zeros_like(logsnr)
    want = torch.where(jump > 0, torch.expm1(jump) / jump, torch.ones_like(jump))
    for target in TARGETS: torch.testing.assert_close(implied_w(logsnr, s, target, 'nelbo'), want, rtol=1e-12, atol=0)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_each_kind_depends_on_what_it_says(weighting):
    "w(λ) on nothing but λ; an ε-factor on nothing but λ at sampled times"
    w, logsnr = WEIGHTINGS[weighting](), torch.linspace(-7, 7, 15, dtype=f64)
    pairs = list(itertools.product(WITH_PATH, TARGETS))
    implied = torch.stack([implied_w(logsnr, s, y, w) for s, y in pairs])
    factors = torch.stack([w.eps_factor(logsnr, SCHEDULES[s](), TARGETS[y]()) for s, y in pairs])
    same = lambda rows: torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-10, atol=0)
    if isinstance(w, LogSNRWeighting): assert same(implied) and not same(factors)
    if isinstance(w, EpsFactor): assert same(factors) and not same(implied)
    if weighting == 'weighted': assert not same(factors) and not same(implied)


@pytest.mark.parametrize('schedule', WITH_PATH)
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
              min_snr=lambda l: min(1, 5 * math.exp(-l)), soft_min_snr=lambda l: 1 / (1 + math.exp(l) / 5), snr_plus_one=lambda l: 1 + math.exp(-l), p2=lambda l: 1 / (1 + math.exp(l)))
# and of the weights w(λ)
WEIGHTS = dict(nelbo=lambda l: 1., sigmoid=lambda l: 1 / (1 + math.exp(l - 2)), sech=lambda l: 2 / (math.exp(l / 2) + math.exp(-l / 2)), exponential=lambda l: math.exp(-l / 2), ddpm_vlb=lambda l: 1.,
               edm=lambda l: math.exp(-(l - 2.4)**2 / (2 * 2.4**2)) / (2.4 * math.sqrt(2 * math.pi)) * (1 + 4 * math.exp(-l)))


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
    for w, y, s in itertools.product(WEIGHTS.keys() & WEIGHTINGS.keys(), TARGETS, WITH_PATH):
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


# ---- the field's weights, one by one

def test_min_snr_with_velocity_is_not_min_snr_on_the_velocity_error():
    "the public bug: min(SNR, γ)/SNR belongs on the ε-error; on ‖v - v̂‖² it has to become min(SNR, γ)/(SNR + 1), and on ‖x - x̂‖² min(SNR, γ)"
    g = torch.Generator().manual_seed(0)
    x, eps, y_hat = torch.randn(3, 64, 2, generator=g, dtype=f64)
    t = torch.rand(64, generator=g, dtype=f64)
    snr = CosineSchedule().logsnr(t).exp()
    for gamma in (0.5, 5.):
        on = dict(v=snr.clamp(max=gamma) / (snr + 1), x=snr.clamp(max=gamma), eps=snr.clamp(max=gamma) / snr)
        for y, want in on.items():
            loss = DiffusionLoss('cosine', y, f'min_snr(gamma={gamma})')
            _, truth, _ = loss.noisy(x, t, eps)
            torch.testing.assert_close(loss(lambda z, u: y_hat, x, t, eps), want * (truth - y_hat).square().mean(1), rtol=1e-9, atol=0)
        wrong = on['eps'] * (DiffusionLoss('cosine', 'v').noisy(x, t, eps)[1] - y_hat).square().mean(1)
        assert ((DiffusionLoss('cosine', 'v', f'min_snr(gamma={gamma})')(lambda z, u: y_hat, x, t, eps) / wrong).log().abs() > 0.01).double().mean() > 0.9


def test_every_weight_against_50_digits_at_extreme_levels():
    "formulas as printed, in mpmath; the float32 and float64 code may differ by rounding only, and is 0 or infinite only where the number is beyond the type"
    import mpmath as mp
    mp.mp.dps = 50
    e = mp.exp
    bell = lambda l, m, s: e(-((l - m) / s)**2 / 2) / (s * mp.sqrt(2 * mp.pi))
    printed = {'snr': lambda l: e(l), 'snr_plus_one': lambda l: (e(l) + 1) / e(l), 'truncated_snr': lambda l: max(e(l), 1) / e(l), 'min_snr(gamma=0.25)': lambda l: min(e(l), mp.mpf(1) / 4) / e(l),
               'soft_min_snr(gamma=0.25)': lambda l: mp.mpf(1) / 4 / (e(l) + mp.mpf(1) / 4), 'p2(k=2, gamma=0.5)': lambda l: 1 / (2 + e(l))**mp.mpf(0.5), 'p2(k=0, gamma=2)': lambda l: e(-2 * l),
               'rescaled': lambda l: e(-l), 'sech': lambda l: mp.sech(l / 2), 'exponential': lambda l: e(-l / 2), 'sigmoid(k=-3)': lambda l: 1 / (1 + e(l + 3)),
               'edm(mean=-1, std=2, sigma_data=2)': lambda l: bell(l, -1, 2) * (e(-l) + 4) / 4, 'edm(mean=1, std=40)': lambda l: bell(l, 1, 40) * (1 + 4 * e(-l))}
    for dtype, close in ((f32, 1e-4), (f64, 1e-12)):
        k = torch.tensor([-80., -40.5, -20., -3., -0.25, 0., 0.25, 1.5, 10., 40.5, 80.], dtype=dtype)
        info = torch.finfo(dtype)
        for words, formula in printed.items():
            w = from_spec(WEIGHTINGS, words, 'weighting')
            got = w.g(k) if isinstance(w, EpsFactor) else w.w(k)
            assert got.dtype == dtype
            for l, value in zip(k.tolist(), got.tolist()):
                exact = formula(mp.mpf(l))
                if exact > info.max: assert value == math.inf, (words, l)
                elif exact < info.tiny: assert 0 <= value <= 2 * info.tiny, (words, l)
                else: assert abs(value / exact - 1) < close, (words, l, value, float(exact))


@few
@given(st.floats(-20, 20), st.floats(0.05, 60), st.floats(0.02, 50))
def test_edm_monotonic_is_edm_right_of_its_peak_and_never_rises_or_is_refused(mean, std, sigma_data):
    "EDM's weight may have two peaks. If the right one is the lower, no monotonic weight equals it right of its highest peak, and the class says so"
    k = torch.linspace(mean - std**2 - 5 * std - 10, mean + 5 * std, 40_001, dtype=f64)
    log_w = lambda k: -((k - mean) / std)**2 / 2 + torch.nn.functional.softplus(-k - 2 * math.log(sigma_data))
    v = log_w(k)
    top = v.argmax()
    rises_again = (v[top:].diff() > 1e-9).any()
    try: w = EDMMonotonic(mean, std, sigma_data)
    except ValueError as e:
        assert 'second peak' in str(e) and 'smaller std' in str(e)
        fine = torch.linspace(float(k[top]) + 1e-3 * std, mean, 400_001, dtype=f64)
        assert rises_again or (log_w(fine).diff() > 0).any()
        return
    assert not rises_again and abs(w._peak - k[top]) <= 2 * (k[1] - k[0])
    for dtype in (f32, f64):
        q = torch.linspace(w._peak - 20, w._peak + 20, 999, dtype=dtype)
        edm, monotonic = EDM(mean, std, sigma_data).w(q), w.w(q)
        right = q > w._peak
        assert torch.equal(edm[right], monotonic[right])
        close = 1e-3 if dtype == f32 else 1e-9
        assert (monotonic >= edm * (1 - close)).all() and (monotonic[1:] <= monotonic[:-1] * (1 + close)).all()


def test_rising_against_what_is_known():
    r = lambda *triple, **kw: rising_intervals(*triple, **kw)
    near = lambda got, *want: len(got) == len(want) and all(abs(a - b) < 0.01 for pair, ends in zip(got, want) for a, b in zip(pair, ends))
    assert r('cosine', 'eps', 'nelbo') == r('cosine', 'v', 'weighted') == r('rectified_flow', 'flow', 'weighted') == r('ve', 'x', 'exponential') == r('linear', 'F', 'sigmoid(k=-3)') == r('cosine', 'x', 'edm_monotonic') == []
    assert near(r('cosine', 'eps', 'weighted'), (-12.9, 0)) and near(r('ve', 'eps', 'sech'), (-8.8, 0))                    # sech(λ/2)
    assert near(r('cosine', 'score', 'weighted'), (-12.9, 12.9))                                                            # (1 + e^λ) sech(λ/2)
    assert near(r('cosine', 'eps', 'min_snr(gamma=1000)'), (-12.9, 0)) and near(r('cosine', 'eps', 'min_snr(gamma=0.01)'), (-12.9, math.log(0.01)))
    assert near(r('ve', 'eps', 'edm'), (-8.8, EDMMonotonic()._peak))
    assert near(r('cosine', 'eps', 'edm(mean=20, std=5, sigma_data=0.05)'), *[(a, b) for a, b in r('ve(-12.9, 12.9)', 'x', 'edm(mean=20, std=5, sigma_data=0.05)')])   # a weight does not know of the schedule
    for points in (2, 2.5, '9', True):
        with pytest.raises((TypeError, ValueError), match='points must be'): r('cosine', 'eps', 'nelbo', points=points)
    with pytest.raises(ValueError, match='finite range'): r('cosine(-inf, inf)', 'eps', 'nelbo')


def test_a_bound_weight_implies_what_its_triple_implies():
    "on the triple's own schedule, chains included; on any other schedule it is the same w(λ), and the schedule no longer matters"
    bound = WEIGHTINGS['implied']
    for s, (y, w) in itertools.product((n for n in SCHEDULES if n != 'adaptive'), PAIRS):
        k = levels(SCHEDULES[s](), 11)[1:-1]
        own = implied_w(k, s, y, w)
        torch.testing.assert_close(implied_w(k, s, 'eps', bound(s, y, w)), own, rtol=1e-10, atol=0)
        if s in CONTINUOUS: torch.testing.assert_close(implied_w(k, 'cosine', 'x', bound(s, y, w)), own, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match='the adaptive schedule moves'): bound('adaptive', 'v', 'min_snr')
    for bad, kind in ((('cosin', 'eps', 'nelbo'), ValueError), (('cosine', 'epsilon', 'nelbo'), ValueError), (('cosine', 'eps', 'implied(cosin)'), ValueError), ((3, 'eps', 'nelbo'), TypeError)):
        with pytest.raises(kind): bound(*bad)


@few
@given(st.integers(2, 40), st.floats(1e-4, 0.3), st.floats(0, 0.5))
def test_the_bound_of_ddpm_is_the_one_of_its_authors(T, beta_min, more):
    "T β²/(σ² α (1 - ᾱ)) on the ε-error, without the ½, by hand for both variances; with β finite at the first step, where the data themselves are the cleaner level"
    for last in (12.9, math.inf):
        beta = [beta_min + more * i / max(1, T - 1) for i in range(T)]
        if -math.log(beta[0]) + math.log1p(-beta[0]) >= last: return
        s = SCHEDULES['ddpm'](logsnr_max=last, T=T, beta_min=beta_min, beta_max=beta_min + more)
        before, by_hand = 1 / (1 + math.exp(-last)), {'beta': [], 'posterior': []}
        for i, b in enumerate(beta):
            if i == 0 and last < math.inf: b = 1 - (1 - b) / before   # what is left of the first step
            after = before * (1 - b)
            for variance, reverse in (('beta', b), ('posterior', b * (1 - before) / (1 - after))):
                by_hand[variance].append(math.inf if reverse == 0 else T * b**2 / (reverse * (1 - b) * (1 - after)))
            before = after
        l = s.logsnr(torch.arange(1, T + 1, dtype=f64) / T)
        for variance, want in by_hand.items():
            got = WEIGHTINGS['ddpm_vlb'](variance).eps_factor(l, s, TARGETS['eps']())
            torch.testing.assert_close(got, torch.tensor(want, dtype=f64), rtol=1e-6, atol=0)
        assert WEIGHTINGS['ddpm_vlb']('beta').eps_factor(l, s, TARGETS['eps']()).isfinite().all()
        torch.testing.assert_close(WEIGHTINGS['ddpm_vlb']('posterior').eps_factor(l, s, TARGETS['eps']()), WEIGHTINGS['nelbo']().eps_factor(l, s, TARGETS['eps']()))


def test_a_fine_chain_keeps_its_digits_in_float32():
    "differences of 10⁵ levels, taken in float32, would have three digits"
    s = SCHEDULES['discrete'](-9, 9, T=10**5)
    l = s._levels[1::997]
    for w in (WEIGHTINGS['ddpm_vlb']('beta'), WEIGHTINGS['ddpm_vlb']('posterior'), WEIGHTINGS['nelbo']()):
        torch.testing.assert_close(w.eps_factor(l.float(), s, TARGETS['v']()).double(), w.eps_factor(l, s, TARGETS['v']()), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name, bad', [('min_snr', dict(gamma=0)), ('min_snr', dict(gamma=-1)), ('min_snr', dict(gamma=math.nan)), ('min_snr', dict(gamma=True)), ('min_snr', dict(gamma='5')), ('soft_min_snr', dict(gamma=0)),
                                       ('soft_min_snr', dict(gamma=math.inf)), ('p2', dict(k=-1)), ('p2', dict(gamma=-1)), ('p2', dict(gamma=101)), ('sigmoid', dict(k=81)), ('sigmoid', dict(k=None)), ('edm', dict(std=0)), ('edm', dict(mean=math.nan)),
                                       ('edm', dict(sigma_data=0)), ('edm_monotonic', dict(std=-1)), ('ddpm_vlb', dict(variance='gamma')), ('ddpm_vlb', dict(variance=None)), ('ddpm_vlb', dict(variance=1))], ids=str)
def test_options_that_cannot_be_are_named(name, bad):
    (option,) = bad
    with pytest.raises((TypeError, ValueError), match=f'^{option} must be'): WEIGHTINGS[name](**bad)


def test_a_chain_of_levels_is_judged_from_level_to_level():
    "Inside a cell a staircase's density is flat and its weight is not: that is no rise."
    assert rising_intervals('ddpm', 'v', 'weighted') == []
    (low, high), = rising_intervals('ddpm', 'eps', 'weighted')
    (l, h), = rising_intervals('linear', 'eps', 'weighted')
    assert abs(high - h) < 0.1 and low < -9


def test_the_simple_loss_is_the_noise_error_for_every_target():
    for y in TARGETS: assert torch.equal(implied_w(torch.linspace(-8, 8, 9), 'cosine', y, 'simple'), implied_w(torch.linspace(-8, 8, 9), 'cosine', 'eps', 'weighted'))
