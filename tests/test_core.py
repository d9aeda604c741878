"Attempts to break lfdm.core: wrong names, wrong numbers, wrong shapes."
import math
import os
import string
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings, strategies as st

from lfdm.core import as_number, expand, from_spec, instance, is_symbolic, lookup, maths, number, project_root, unknown, write_whole
from lfdm.proofs import check, prove
from lfdm.core import spec as words_of
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
words = st.text(alphabet='abcdefgh_', min_size=1, max_size=6)


class Base: pass
class Child(Base): pass
class Stranger: pass
REGISTRY = {'child': Child, 'base': Base}


@few
@given(st.lists(words, min_size=1, max_size=5, unique=True), st.one_of(words, st.none(), st.integers(), st.just([]), st.just({})))
def test_a_bad_name_is_named_with_all_valid_ones(names, name):
    registry = {n: Child for n in names}
    if name in names:
        assert lookup(registry, name, 'thing') is Child
        return
    with pytest.raises(ValueError) as e: lookup(registry, name, 'thing')
    assert str(e.value).startswith(f'unknown thing {name!r}.')
    for n in names: assert repr(n) in str(e.value)


@pytest.mark.parametrize('typo', ['cosin', 'COSINE', ' cosine', 'cosine ', 'Cosine', 'cossine'])
def test_the_nearest_name_is_offered(typo):
    assert "Did you mean 'cosine'?" in unknown('schedule', typo, ['linear', 'cosine', 've'])


def test_no_guess_where_nothing_is_near():
    assert 'Did you mean' not in unknown('schedule', 'zzzz', ['linear', 'cosine']) and 'Did you mean' not in unknown('schedule', '', ['linear'])


def test_instance_takes_a_name_a_class_or_an_instance():
    child = Child()
    assert instance(REGISTRY, child, 'thing', Base) is child
    for choice in ('child', Child): assert type(instance(REGISTRY, choice, 'thing', Base)) is Child


@pytest.mark.parametrize('bad', [None, 3, 3., Stranger, Stranger(), ['child'], ('child',), {}, torch.zeros(1), b'child'], ids=repr)
def test_instance_refuses_everything_else(bad):
    with pytest.raises(TypeError, match="thing must be a name .'child', 'base'. or a Base, not"): instance(REGISTRY, bad, 'thing', Base)
    with pytest.raises(ValueError, match="Did you mean 'child'"): instance(REGISTRY, 'chid', 'thing', Base)


@few
@given(st.one_of(st.integers(-10**9, 10**9), st.floats(-1e9, 1e9)), st.integers(-10**9, 10**9), st.integers(0, 10**9), st.booleans())
def test_number_keeps_what_is_in_range_and_names_what_is_not(value, low, width, above):
    high = low + width
    if low <= value <= high and not (above and value == low):
        assert number('p', value, low, high, above=above) == value
    else:
        with pytest.raises(ValueError, match='^p must be ') as e: number('p', value, low, high, above=above)
        assert repr(value) in str(e.value)


@pytest.mark.parametrize('bad', [True, False, None, '1', '1e3', 'true', [1], (1,), 1j, {}, torch.tensor(1.), torch.ones(2), np.ones(2), np.bool_(True)], ids=repr)
@pytest.mark.parametrize('integer', [False, True])
def test_number_refuses_what_is_no_number(bad, integer):
    with pytest.raises(TypeError, match='^epochs must be'): number('epochs', bad, integer=integer)


@pytest.mark.parametrize('bad', [2.5, math.inf, -math.inf, math.nan, 1e3 + 1e-10])
def test_whole_numbers(bad):
    with pytest.raises(ValueError, match='^n must be a whole number'): number('n', bad, integer=True)
    for good in (1000, 1e3): assert (number('n', good, integer=True), type(number('n', good, integer=True))) == (1000, int)


@pytest.mark.parametrize('kind', [dict(integer=True), dict(), dict(high=5)], ids=str)
def test_a_huge_integer_is_a_clear_error(kind):
    "float(10**400) overflows"
    with pytest.raises(ValueError, match='^n must be .*of a reasonable size, not one of 1329 bits'): number('n', 10**400, **kind)


@pytest.mark.parametrize('value', [np.float32(2), np.float64(2), np.int64(2), np.int32(2), Fraction(2)], ids=lambda v: type(v).__name__)
def test_number_takes_the_numbers_of_other_libraries(value):
    "a loop over np.arange(...) gives np.int64, which is a whole number"
    assert (number('p', value), type(number('p', value))) == (2., float)
    assert (number('p', value, integer=True), type(number('p', value, integer=True))) == (2, int)


def test_bounds_are_told():
    for kwargs, text in ((dict(low=1), 'at least 1'), (dict(low=0, above=True), 'greater than 0'), (dict(low=0, high=1), 'from 0 to 1'),
                         (dict(low=0, high=1, above=True), 'above 0 up to 1')):
        with pytest.raises(ValueError, match=text): number('p', -3, **kwargs)
    with pytest.raises(ValueError, match='0 up to 1'): number('p', 0, low=0, high=1, above=True)


@few
@given(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=0, max_size=3), st.sampled_from(['()', '(1,)', '(n,)', '(n,1)']))
def test_expand_multiplies_example_by_example(n, rest, form):
    "every n, the number of dimensions and the sizes of the data included, where a wrong broadcast hides"
    x, scale = torch.randn(n, *rest), torch.arange(1., n + 1)
    if form == '()': scale = torch.tensor(3.)
    if form == '(1,)': scale = torch.tensor([3.])
    if form == '(n,1)': scale = scale[:, None]
    got = expand(scale, x) * x
    assert got.shape == x.shape
    for i in range(n): assert torch.equal(got[i], x[i] * scale.reshape(-1)[i if scale.numel() == n else 0])


@few
@given(st.integers(1, 6), st.integers(2, 6), st.integers(1, 6))
def test_expand_refuses_scales_of_other_data(n, m, d):
    x = torch.randn(n, d)
    for shape in ((m,), (m, 1), (1, m), (n, m)):
        if shape[0] in (1, n) and all(s == 1 for s in shape[1:]): continue
        with pytest.raises(ValueError, match='not one number per example'): expand(torch.ones(shape), x)


@pytest.mark.parametrize('scale', [np.array([1., 10.]), [1., 10.], (1., 10.)], ids=lambda s: type(s).__name__)
def test_expand_never_lets_a_wrong_broadcast_through(scale):
    "as a list or an array, two scales for two examples must not multiply the two columns instead"
    x = torch.ones(2, 2)
    try: got = x * expand(scale, x)
    except (TypeError, ValueError): return
    torch.testing.assert_close(got.to(x), torch.tensor([[1., 1.], [10., 10.]]))


def test_expand_keeps_numbers():
    for scale in (2, 2., torch.tensor(2.)): assert (expand(scale, torch.ones(2, 2)) * torch.ones(2, 2) == 2).all()


@pytest.mark.parametrize('name', sorted(vars(maths(torch.zeros(())))))
def test_every_function_means_the_same_for_tensors_and_symbols(name):
    of_tensor, of_symbol = getattr(maths(torch.zeros(())), name), getattr(maths(sympy.Symbol('x')), name)
    if name == 'pi':
        assert abs(of_tensor - float(of_symbol)) < 1e-15
        return
    x = sympy.Symbol('x')
    if name in ('maximum', 'minimum'): of_tensor, of_symbol = (lambda a, f=f: f(a, 0.7) for f in (of_tensor, of_symbol))   # of two
    for value in (0.1, 0.5, 0.9 if name == 'ndtri' else 2.):                                                               # of a share
        assert abs(float(of_tensor(torch.tensor(value, dtype=torch.float64))) - float(of_symbol(x).subs(x, value))) < 1e-12


def test_the_stable_forms_are_stable():
    m = maths(torch.zeros(()))
    x = torch.tensor([-800., -50., 50., 800.], dtype=torch.float64)
    torch.testing.assert_close(m.softplus(x), torch.tensor([0., math.exp(-50), 50., 800.], dtype=torch.float64), rtol=1e-12, atol=0)
    assert m.softplus(x.float()).dtype == torch.float32 and m.expm1(torch.tensor(1e-20)) > 0


@pytest.mark.parametrize('value', [1, 0.5, np.float32(0.5), np.float64(0.5), [0.1, 0.2], np.array([0.1])], ids=repr)
def test_plain_numbers_become_float64(value): assert as_number(value).dtype == torch.float64


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_keep_their_dtype(dtype): assert as_number(torch.ones(2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('bad', [torch.tensor(1), torch.tensor(True), torch.tensor(1j)], ids=repr)
def test_tensors_of_other_kinds_are_refused(bad):
    with pytest.raises(TypeError, match='floating-point'): as_number(bad)


@pytest.mark.parametrize('bad', ['0.5', 'a', None, True], ids=repr)
def test_what_is_no_number_is_named(bad):
    with pytest.raises((TypeError, ValueError)) as e: as_number(bad)
    assert repr(bad) in str(e.value) and ('number' in str(e.value) or 'floating-point' in str(e.value))


def test_symbols_stay_symbols():
    x = sympy.Symbol('x')
    assert as_number(x) is x and is_symbolic(x) and is_symbolic(x + 1) and is_symbolic(sympy.Integer(1))
    for other in (1, 1., torch.ones(1), np.ones(1), 'x', None): assert not is_symbolic(other)


def test_prove_proves_what_is_true_and_nothing_else(capsys):
    x = sympy.Symbol('x', positive=True)
    prove(sympy.sin(x)**2 + sympy.cos(x)**2, 1, 'Pythagoras')
    prove((x**2)**0.5, x, 'with a float')
    assert capsys.readouterr().out == 'proved: Pythagoras\nproved: with a float\n'
    for left, right in ((x, x + 1), (x, x * 1.000001), (x, -x), (sympy.exp(x), 1 + x), (x**2, x**2 + sympy.Rational(1, 10**12)), (x, sympy.nan)):
        with pytest.raises(AssertionError, match='not proved: a lie'): prove(left, right, 'a lie')
    assert capsys.readouterr().out == ''


# ---- choices with options

OPTIONS = {'shifted_cosine': dict(shift=st.floats(-5, 5)), 'linear': dict(beta_min=st.floats(0.01, 1)), 'edm_train': dict(mean=st.floats(-3, 3), std=st.floats(1.8, 5)), 'edm_sample': dict(rho=st.floats(0.5, 20)),
           'logit_normal': dict(m=st.floats(-1, 1), s=st.floats(1, 3)), 'discrete': dict(schedule=st.sampled_from(['linear', 'cosine(-9, 9)', 'shifted_cosine(shift=0.3)']), T=st.integers(1, 2000)),
           'ddpm': dict(T=st.integers(1, 2000), beta_min=st.floats(1e-4, 0.01)), 'adaptive': dict(bins=st.integers(1, 200), uniform=st.floats(0.01, 1)), 'F': dict(sigma_data=st.floats(0.01, 100)),
           'min_snr': dict(gamma=st.floats(1e-3, 1e6)), 'soft_min_snr': dict(gamma=st.floats(1e-3, 1e6)), 'p2': dict(k=st.floats(0, 10), gamma=st.floats(0, 5)), 'ddpm_vlb': dict(variance=st.sampled_from(['beta', 'posterior'])),
           'sigmoid': dict(k=st.floats(-10, 10)), 'edm': dict(mean=st.floats(-5, 5), std=st.floats(0.1, 9)), 'edm_monotonic': dict(mean=st.floats(-5, 5), std=st.floats(0.1, 1.9)),
           'implied': dict(schedule=st.sampled_from(['ve', 'shifted_cosine(shift=-2)', 'cosine']), target=st.sampled_from(['v', 'F(sigma_data=2)']), weighting=st.sampled_from(['weighted', 'min_snr(gamma=3)', 'p2(k=2, gamma=0.5)']))}


def test_what_is_written_is_read_again():
    "every choice of every registry with any options: words of the instance give the instance again, and only what is not at its default is said"
    for kind, registry in (('schedule', SCHEDULES), ('target', TARGETS), ('weighting', WEIGHTINGS)):
        for name, cls in registry.items():
            assert repr(from_spec(registry, name, kind)) == repr(cls()) and type(from_spec(registry, f'{name}()', kind)) is cls
            @settings(max_examples=6, deadline=None, derandomize=True, database=None)
            @given(st.fixed_dictionaries({}, optional=OPTIONS.get(name, {})))
            def there_and_back(options):
                made = cls(**options)
                said = words_of(made, skip=('logsnr_min', 'logsnr_max') if name in ('discrete', 'ddpm') else ())
                again = from_spec(registry, said, kind)
                assert repr(again) == repr(made), said
                assert {k: v for k, v in vars(again).items() if not k.startswith('_')} == {k: v for k, v in vars(made).items() if not k.startswith('_')}
            there_and_back()
            assert words_of(cls(), skip=('logsnr_min', 'logsnr_max')) == name
    assert words_of(SCHEDULES['cosine'](-math.inf, math.inf)) == 'cosine(logsnr_min=-inf, logsnr_max=inf)'
    assert from_spec(SCHEDULES, 'cosine(-inf, inf)', 'schedule').logsnr_max == math.inf


HOSTILE = ['__import__("os")', '__import__("os").system("touch hacked")', 'cosine(__import__("os"))', 'cosine(shift=open("hacked", "w"))', 'cosine.__class__()', 'cosine().__init__', '(lambda: 1)()', 'cosine(lambda: 1)',
           'cosine([1, 2])', 'cosine(*[1, 2])', 'cosine(**{"logsnr_min": 1})', 'cosine(-5, logsnr_min=-4)', 'cosine(logsnr_min=-5, logsnr_min=-4)', 'cosine(1, 2, 3)', 'cosine(1 + 1)', 'cosine(-1 if 1 else 2)', 'cosine(5, -5)',
           'cosine("a")', 'cosine(-"a")', 'cosine(a)', 'cosine(True)', 'cosine(None)', 'cosine(1j)', 'cosine(nan)', 'cosine(b"1")', 'cosine(f"{1}")', 'cosine(logsnr_min=x:=1)', 'cosine(', 'cosine)', 'cosine()()', 'cosine() ; 1', 'cosine\n(1)()',
           'cosine(10**400)', f'cosine({"9" * 1000})', f'cosine({"9" * 9000})', '', ' ', '()', '\x00', 'cosine(\x00)', '\ud800', 'соsine', '余弦(1)', 'cosine(' * 5000, '(' * 10_000, '-' * 100_000 + '1', 'cosine(' + '-' * 5000 + '1)',
           'discrete(schedule=' * 60 + 'cosine' + ')' * 60, 'discrete(schedule=discrete)', 'adaptive(schedule=cosine)', 'linear(shift=1)', 'ｃｏｓｉｎｅ(1, 2, 3)', 'cosine' * 10_000, 'cosine(' + '1,' * 10_000 + ')']


def test_hostile_words_are_an_error_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in HOSTILE:
        with pytest.raises(ValueError) as e: from_spec(SCHEDULES, text, 'schedule')
        assert str(e.value), text
        with pytest.raises(ValueError): instance(SCHEDULES, text, 'schedule', SCHEDULES['cosine'].__mro__[-2])
    assert not list(tmp_path.iterdir())
    for text in ("sigmoid(k=__import__('os'))", 'implied(schedule=__import__("os"))', 'implied(weighting=implied(weighting=eval("1")))', 'implied(adaptive, eps, min_snr)'):
        with pytest.raises(ValueError): from_spec(WEIGHTINGS, text, 'weighting')


@few
@given(st.one_of(st.text(max_size=30), st.text(alphabet=string.ascii_letters + '(),=-.0123456789_', max_size=30).map(lambda t: f'cosine({t})')))
def test_any_text_is_a_choice_or_a_value_error(text):
    try: made = from_spec(SCHEDULES, text, 'schedule')
    except ValueError: return
    assert type(made) in SCHEDULES.values()


def test_the_nearest_option_is_offered():
    with pytest.raises(ValueError, match="unknown option of shifted_cosine: 'shft'. Did you mean 'shift'"): from_spec(SCHEDULES, 'shifted_cosine(shft=1)', 'schedule')
    with pytest.raises(ValueError, match="x has no options, but 'x.a=1.' gives 'a'"): from_spec(TARGETS, 'x(a=1)', 'target')
    with pytest.raises(ValueError, match='gamma must be above 0'): from_spec(WEIGHTINGS, 'min_snr(gamma=0)', 'weighting')


def test_project_root(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = lfdm\n', encoding='utf-8')
    assert project_root(tmp_path / 'a' / 'b') == project_root(str(tmp_path)) == tmp_path
    (tmp_path / 'a' / 'settings.ini').write_text('[DEFAULT]\nlib_name = another\n', encoding='utf-8')
    assert project_root(tmp_path / 'a' / 'b') == tmp_path
    (tmp_path / 'settings.ini').unlink()
    assert project_root(tmp_path / 'a' / 'b') == tmp_path / 'a' / 'b'


def test_a_check_within_a_difference_fails_beyond_it(capsys):
    "Simulations are compared within so many standard errors, each value within its own."
    check([1., 2.], [1.05, 2.5], 'one', within=[0.1, 1.])
    assert 'checked: one: worst difference' in capsys.readouterr().out
    with pytest.raises(AssertionError, match='1 is not 1.05'): check([1., 2.], [1.05, 2.5], 'two', within=[0.01, 1.])
    for bad in (float('nan'), float('inf')):
        with pytest.raises(AssertionError): check([bad], [1.], 'three', within=10.)
    with pytest.raises(AssertionError): check([1.], [1.1], 'four', within=0.)


# ---- whole files

def test_a_file_is_whole_or_the_former_one(tmp_path):
    path = tmp_path / 'file'
    path.write_text('former')
    for fault in (OSError('disk full'), KeyboardInterrupt()):
        with pytest.raises(type(fault)), write_whole(path) as draft:
            draft.write_text('half')
            raise fault
    with pytest.raises(FileNotFoundError), write_whole(path): pass   # nothing written
    assert path.read_text() == 'former' and os.listdir(tmp_path) == ['file']
    with write_whole(path) as draft:
        draft.write_text('new')
        assert path.read_text() == 'former'
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


def test_a_killed_writer_leaves_the_former_file(tmp_path):
    path = tmp_path / 'file'
    path.write_text('former')
    die = ("import os, sys; from lfdm.core import write_whole\n"
           "with write_whole(sys.argv[1], sys.argv[2]) as draft: draft.write_text('half'); os.kill(os.getpid(), 9)")
    killed = subprocess.run([sys.executable, '-c', die, path, tmp_path / 'draft'], cwd=project_root(__file__))
    assert killed.returncode == -9 and path.read_text() == 'former' and (tmp_path / 'draft').read_text() == 'half'
    with write_whole(path, tmp_path / 'draft') as draft: draft.write_text('new')   # the leftover does no harm
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']
