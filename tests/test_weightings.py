"Attempts to break lfdm.weightings: every (schedule, target, weighting), and the factors others write."
import itertools
import math

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.integrate import simpson

from lfdm.core import from_spec
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.weightings import EDM, WEIGHTINGS, EpsFactor, LogSNRWeighting, implied_w, rising_intervals

torch.set_num_threads(1)
f32, f64 = torch.float32, torch.float64
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize('schedule', SCHEDULES)
close = torch.testing.assert_close


def pairs(schedule):
    "A third of all targets and weightings, another one for the next schedule."
    return list(itertools.product(TARGETS, WEIGHTINGS))[list(SCHEDULES).index(schedule) % 3::3]


def levels(s, n): return torch.linspace(s.logsnr_min, s.logsnr_max, n, dtype=f64)


@every
def test_implied_w_is_what_the_average_over_times_counts(schedule):
    "E_t[factor · e(λ(t))] = ∫ w(λ) r(λ) e(λ) dλ for a made-up error e; w is 0 outside"
    s, error = SCHEDULES[schedule](), lambda l: 1 / l.cosh()**2
    outside = torch.tensor([s.logsnr_min - 1, s.logsnr_max + 1], dtype=f64)
    for y, w in pairs(schedule):
        y, w = TARGETS[y](), WEIGHTINGS[w]()
        by_time = lambda l: w.factor(l, s, y) * error(l)
        by_level = lambda l: implied_w(l, s, y, w) * y.eps_ratio(*s.scales(l)) * error(l)
        if s.steps:   # a mean over T levels, and a sum over T cells
            l = s.logsnr(torch.arange(1, s.steps + 1, dtype=f64) / s.steps)
            over_time, over_level = by_time(l).mean(), (by_level(l) * s.jump(l)).sum()
        else:
            l = levels(s, 4001)
            t = s.t(l)                     # a grid of times that is fine where λ runs fast
            over_time, over_level = -simpson(by_time(s.logsnr(t)), x=t), simpson(by_level(l), x=l)
        assert abs(over_time / over_level - 1) < 1e-4, (y, w)
        if isinstance(w, LogSNRWeighting) and not s.steps:
            close(implied_w(l[1:-1], s, y, w), w.w(l[1:-1]), rtol=1e-9, atol=0)
        if isinstance(w, EpsFactor): close(w.eps_factor(l, s, y), w.g(l), rtol=1e-12, atol=0)
        assert (implied_w(outside, s, y, w) == 0).all()
        for shape, dtype in ((), torch.bfloat16), ((3, 1), f64), ((0,), f32):
            l, wide = torch.full(shape, 0.5, dtype=dtype), f32 if dtype == torch.bfloat16 else dtype
            for f in (w.factor, w.eps_factor):
                got = f(l, s, y)
                assert got.dtype == wide and torch.equal(got, f(l.to(wide), s, y)), (y, w)


def test_every_weight_against_50_digits_at_extreme_levels():
    "formulas as printed; the code is 0 or infinite only beyond its type, and nowhere nan"
    mp.mp.dps = 50
    e, bell = mp.exp, lambda l, m, s: mp.exp(-((l - m) / s)**2 / 2) / (s * mp.sqrt(2 * mp.pi))
    tau = lambda l: 1 / (1 + e(l / 2))
    printed = {
        'nelbo': lambda l: 1, 'simple': lambda l: 1, 'rescaled': lambda l: e(-l), 'snr': lambda l: e(l),
        'snr_plus_one': lambda l: (e(l) + 1) / e(l), 'truncated_snr': lambda l: max(e(l), 1) / e(l),
        'min_snr': lambda l: min(e(l), 5) / e(l), 'soft_min_snr': lambda l: 5 / (e(l) + 5),
        'p2(k=2, gamma=0.5)': lambda l: 1 / (2 + e(l))**mp.mpf(0.5), 'debiased': lambda l: e(-l / 2),
        'jit': lambda l: e(-l) / max(1 / (1 + e(l / 2)), mp.mpf(0.05))**2,
        'cosmap_weight': lambda l: 2 / mp.pi * (1 + e(-l / 2))**2 / (1 - 2 * tau(l) + 2 * tau(l)**2),
        'sech': lambda l: mp.sech(l / 2), 'monotonic': lambda l: mp.sech(max(l, 0) / 2),
        'exponential': lambda l: e(-l / 2),
        'sigmoid': lambda l: 1 / (1 + e(l - 2)),
        'edm': lambda l: bell(l, mp.mpf(2.4), mp.mpf(2.4)) * (1 + 4 * e(-l)),
        'edm(mean=-1, std=2, sigma_data=2)': lambda l: bell(l, -1, 2) * (e(-l) + 4) / 4,
        'edm(mean=1, std=40)': lambda l: bell(l, 1, 40) * (1 + 4 * e(-l))}
    unprinted = {'weighted', 'ddpm_vlb', 'edm_monotonic', 'implied', 'uncertainty'}
    assert {words.split('(')[0] for words in printed} == WEIGHTINGS.keys() - unprinted
    for (words, formula), (dtype, near) in itertools.product(printed.items(), ((f32, 1e-4), (f64, 1e-12))):
        k = torch.tensor([-80., -40.5, -3., -0.25, 0., 0.25, 1.5, 10., 40.5, 80.], dtype=dtype)
        w, info = from_spec(WEIGHTINGS, words, 'weighting'), torch.finfo(dtype)
        of = w.g if isinstance(w, EpsFactor) else w.w
        got = of(k)
        ends = torch.tensor([-math.inf, math.inf], dtype=dtype)
        assert got.dtype == dtype and not of(ends).isnan().any()
        for l, value in zip(k.tolist(), got.tolist()):
            exact = formula(mp.mpf(l))
            if exact > info.max: assert value == math.inf, (words, l)
            elif exact < info.tiny: assert 0 <= value <= 2 * info.tiny, (words, l)
            else: assert abs(value / exact - 1) < near, (words, l)


@few
@given(st.floats(-20, 20), st.floats(0.05, 60), st.floats(0.02, 50))
def test_edm_monotonic_is_edm_right_of_its_peak_and_never_rises_or_is_refused(mean, std, sigma_data):
    "EDM's weight may have two peaks"
    k = torch.linspace(mean - std**2 - 5 * std - 10, mean + 5 * std, 40_001, dtype=f64)
    log_w = lambda k: -((k - mean) / std)**2 / 2 + torch.nn.functional.softplus(-k - 2 * math.log(sigma_data))
    top, rises = log_w(k).argmax(), lambda k: (log_w(k).diff() > 1e-10).any()
    try: w = WEIGHTINGS['edm_monotonic'](mean, std, sigma_data)
    except ValueError as e:
        assert 'second peak' in str(e) and rises(k[top:])
        return
    assert not rises(k[top:]) and abs(w._peak - k[top]) <= 2 * (k[1] - k[0])
    assert torch.equal(w.w(k), EDM(mean, std, sigma_data).w(k.clamp(min=w._peak)))


@few
@given(st.floats(-10, 10), st.floats(0.5, 4), st.floats(0.1, 3))
def test_a_weight_made_monotonic_is_itself_behind_its_peak_and_never_rises(mean, std, sigma_data):
    "as EDM's, whose peak is known; what falls stays; factors and what rises behind its peak are refused"
    of = lambda words: from_spec(WEIGHTINGS, words, 'weighting')
    own, k = f'edm({mean}, {std}, {sigma_data})', torch.linspace(-39, 39, 4001, dtype=f64)
    try: known = WEIGHTINGS['edm_monotonic'](mean, std, sigma_data)
    except ValueError:
        with pytest.raises(ValueError, match='rises to the right'): of(f'monotonic({own})')
        return
    close(of(f'monotonic({own})').w(k), known.w(k), rtol=1e-9, atol=0)
    for falling in ('nelbo', 'sigmoid(k=-3)', 'exponential', 'implied(cosine, eps, rescaled)'):
        assert torch.equal(of(f'monotonic({falling})').w(k), of(falling).w(k))
    for rising in ('implied(cosine, eps, snr)', 'implied(cosine, score, weighted)'):
        with pytest.raises(ValueError, match='rises to the right'): of(f'monotonic({rising})')
    with pytest.raises(ValueError, match='Bind it to a schedule'): of('monotonic(min_snr)')


@pytest.mark.parametrize('triple, want', [
    ('ddpm v weighted', []),                      # it rises inside cells only
    ('cosine eps weighted', [(-12.9, 0)]),        # sech(λ/2)
    ('cosine score weighted', [(-12.9, 12.9)]),   # (1 + e^λ) sech(λ/2)
    ('ve eps edm', [(-8.8, -3.308)])])
def test_rising_against_what_is_known(triple, want):
    got = torch.tensor(rising_intervals(*triple.split()), dtype=f64)
    close(got, torch.tensor(want, dtype=f64), rtol=0, atol=0.01)


@pytest.mark.parametrize('last', [12.9, math.inf])
@pytest.mark.filterwarnings('ignore:the chain of T')
def test_the_bound_of_ddpm_is_the_one_of_its_authors(last, T=40):
    "T β²/(σ² α (1 - ᾱ)) by hand; with σ² = β finite even where the data are the cleaner level"
    s = SCHEDULES['ddpm'](logsnr_max=last, T=T)
    before, want = 1 / (1 + math.exp(-last)), {'beta': [], 'posterior': []}
    for i in range(T):
        b = 1e-4 + 0.0199 * i / (T - 1)
        if i == 0 and last < math.inf: b = 1 - (1 - b) / before   # what is left of the first step
        after = before * (1 - b)
        for variance, reverse in (('beta', b), ('posterior', b * (1 - before) / (1 - after))):
            want[variance].append(T * b**2 / (reverse * (1 - b) * (1 - after)) if reverse else math.inf)
        before = after
    l = s.logsnr(torch.arange(1, T + 1, dtype=f64) / T)
    for variance, values in want.items():
        got = WEIGHTINGS['ddpm_vlb'](variance).eps_factor(l, s, TARGETS['eps']())
        close(got, torch.tensor(values, dtype=f64), rtol=1e-6, atol=0)


def test_a_fine_chain_keeps_its_digits_in_float32():
    "differences of 10⁵ levels, taken in float32, would have three digits"
    s = SCHEDULES['discrete'](-9, 9, T=10**5)
    l = s.logsnr(torch.arange(1, 10**5, 997, dtype=f64) / 10**5)
    for words in ('ddpm_vlb', 'ddpm_vlb(variance=posterior)', 'nelbo'):
        w = from_spec(WEIGHTINGS, words, 'weighting')
        short, long = (w.eps_factor(k, s, TARGETS['v']()).double() for k in (l.float(), l))
        close(short, long, rtol=1e-5, atol=0)


# ---- what must be refused

BEYOND = {
    'gamma': ('min_snr(0)', 'soft_min_snr(inf)', 'p2(gamma=-1)'), 'k': ('p2(-1)', 'sigmoid(81)'),
    'std': ('edm(std=0)',), 'sigma_data': ('edm(sigma_data=0)',), 'variance': ('ddpm_vlb(gamma)',)}


def test_options_that_cannot_be_are_named():
    for option, words in BEYOND.items():
        for bad in words:
            with pytest.raises(ValueError, match=f'{option} must be'): from_spec(WEIGHTINGS, bad, 'weighting')
    with pytest.raises(ValueError, match='points must be'): rising_intervals('cosine', 'eps', 'nelbo', 2)


def test_what_moves_or_has_no_end_is_refused():
    bound = lambda weighting: WEIGHTINGS['implied']('adaptive', 'v', weighting)
    with pytest.raises(ValueError, match='the adaptive schedule moves'): bound('min_snr')
    assert bound('sigmoid').weighting == 'sigmoid'
    with pytest.raises(ValueError, match='finite range'): rising_intervals('cosine(-inf,inf)', 'v', 'nelbo')
