"Attempts to break lfdm.core: wrong names, numbers, shapes and texts, and killed writers."
import math
import os
from fractions import Fraction

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings, strategies as st

from lfdm.core import (
    LONGEST,
    as_number,
    checked_device,
    checked_seed,
    expand,
    formula,
    from_spec,
    instance,
    is_symbolic,
    lookup,
    number,
    project_root,
    seeded,
    spec,
    write_whole,
)
from lfdm.schedules import SCHEDULES, Level, Schedule
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS
from pinned import choices

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
REGISTRIES = dict(schedule=SCHEDULES, target=TARGETS, weighting=WEIGHTINGS)


# ---- names

class Base: pass
class Child(Base): pass


REGISTRY = {'child': Child, 'base': Base}


@pytest.mark.parametrize('name', ['chil', 'CHILD', ' child', 'zzzz', '', 3, [], {}])
def test_a_bad_name_is_named_with_the_nearest_one_and_all(name):
    assert lookup(REGISTRY, 'base', 'thing') is Base
    hint = r" Did you mean 'child'\?" if 'chil' in str(name).lower() else ''
    with pytest.raises(ValueError, match=f"^unknown thing .{{1,8}}\\.{hint} Valid: 'child', 'base'"):
        lookup(REGISTRY, name, 'thing')


def test_an_instance_comes_of_a_name_a_class_or_an_instance():
    child = Child()
    assert instance(REGISTRY, child, 'thing', Base) is child
    for choice in ('child', Child): assert type(instance(REGISTRY, choice, 'thing', Base)) is Child
    for bad in (None, dict, ['child'], b'child'):
        with pytest.raises(TypeError, match="thing must be a name .'child', 'base'. or a Base, not"):
            instance(REGISTRY, bad, 'thing', Base)


# ---- choices with options

@pytest.mark.parametrize('kind', REGISTRIES)
def test_what_is_written_is_read_again(kind):
    "Each entry with each option: its spec gives the instance again, and says only what is not default."
    for text in choices(kind, REGISTRIES[kind]):
        try: made = from_spec(REGISTRIES[kind], text, kind)
        except ValueError: continue
        # chains have the ends of what is inside
        skip = ('logsnr_min', 'logsnr_max') if made.name in ('discrete', 'ddpm') else ()
        if skip and 'logsnr' in text: continue
        again = from_spec(REGISTRIES[kind], spec(made, skip), kind)
        options = [{k: v for k, v in vars(m).items() if k[0] != '_'} for m in (made, again)]
        assert repr(again) == repr(made) and (skip or options[0] == options[1]), text
        if '(' not in text: assert type(from_spec(REGISTRIES[kind], f'{text}()', kind)) is type(made)


HOSTILE = [
    '__import__("os").system("touch hacked")', 'cosine(shift=open("hacked", "w"))', 'cosine.__class__()',
    '(lambda: 1)()', 'cosine(lambda: 1)', 'cosine(*[1, 2])', 'cosine(**{"logsnr_min": 1})',
    'cosine(-5, logsnr_min=-4)', 'cosine(logsnr_min=-5, logsnr_min=-4)', 'cosine(-"a")', 'cosine(True)',
    'cosine(nan)', 'cosine(logsnr_min=x:=1)', 'cosine(', 'cosine()()', 'cosine() ; 1', 'cosine(10**400)',
    f'cosine({"9" * 9000})', '', 'cosine(\x00)', '\ud800', 'соsine',
    'cosine(' * 5000, '(' * 10_000, '-' * 100_000 + '1', 'cosine(' + '-' * 5000 + '1)',
    'discrete(schedule=' * 60 + 'cosine' + ')' * 60, 'discrete(schedule=discrete)', 'cosine' * 10_000]
HOSTILE_WEIGHTS = ['implied(schedule=__import__("os"))', 'implied(weighting=implied(weighting=eval("1")))']


def test_hostile_texts_are_an_error_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, texts in dict(schedule=HOSTILE, weighting=HOSTILE_WEIGHTS).items():
        for text in texts:
            with pytest.raises(ValueError, match='.'): from_spec(REGISTRIES[kind], text, kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind, text, says', [
    ('schedule', 'shifted_cosine(shft=1)', "unknown option of shifted_cosine: 'shft'. Did you mean 'shift'"),
    ('schedule', 'cosine(1, 2, 3)', "too many options, .* cosine has: 'logsnr_min', 'logsnr_max'"),
    ('target', 'x(a=1)', "x has no options, but 'x.a=1.' gives 'a'"),
    ('weighting', 'min_snr(gamma=1+1)', "cannot read '1 . 1' in 'min_snr")])
def test_what_is_wrong_with_options_is_said(kind, text, says):
    with pytest.raises(ValueError, match=says): from_spec(REGISTRIES[kind], text, kind)


# ---- numbers

@few
@given(st.one_of(st.integers(-10**9, 10**9), st.floats(-1e9, 1e9), st.just(math.nan)),
       st.integers(-10**9, 10**9), st.integers(0, 10**9), st.booleans())
def test_number_keeps_what_is_in_range_and_names_what_is_not(value, low, width, above):
    high = low + width
    if low <= value <= high and not (above and value == low):
        assert number('p', value, low, high, above=above) == value
        return
    said = 'above .* up to' if above else 'from .* to'
    with pytest.raises(ValueError, match=f'^p must be ({said} .*|a number), not {value}'):
        number('p', value, low, high, above=above)


def test_whole_numbers_are_whole_and_come_from_any_library():
    "a loop over np.arange(...) gives np.int64, which is a whole number"
    for value in (2., np.float32(2), np.int64(2), Fraction(2)):
        for integer in (False, True):
            got = number('p', value, integer=integer)
            assert got == 2 and type(got) is (int if integer else float)
    with pytest.raises(ValueError, match='^n must be a whole number'): number('n', 1e3 + 1e-10, integer=True)


# ---- shapes

@few
@given(st.integers(1, 6), st.lists(st.integers(1, 6), max_size=3),
       st.sampled_from(['()', '(1,)', '(n,)', '(n,1)']))
def test_expand_multiplies_example_by_example(n, rest, form):
    "every n, also the number of dimensions and the sizes of the data, where a wrong broadcast hides"
    x, each = torch.randn(n, *rest), torch.arange(1., n + 1)
    scale = {'()': each[0], '(1,)': each[:1], '(n,)': each, '(n,1)': each[:, None]}[form]
    each = each if 'n' in form else torch.ones(n)
    assert torch.equal(expand(scale, x) * x, torch.stack([k * row for k, row in zip(each, x)]))


def test_expand_takes_numbers_in_any_form():
    x = torch.ones(2, 2)
    for scale in (np.array([1., 10.]), (1, 10)):
        assert (expand(scale, x) * x).tolist() == [[1.] * 2, [10.] * 2]
    for scale in (2., torch.tensor(2.), sympy.Symbol('a')): assert expand(scale, x) is scale
    for bad in ('a', [[1], [1, 2]], torch.tensor([True])):
        with pytest.raises(TypeError, match='^alpha must '): expand(bad, x, 'alpha')
    for shape in ((3, 1), (1, 2), (2, 2), (2, 1, 2)):
        with pytest.raises(ValueError, match='not one number per example'): expand(torch.ones(shape), x)


# ---- one formula for tensors and symbols

def test_numbers_become_tensors_and_symbols_stay():
    for value in (1, np.float32(0.5), [0.1, 0.2], np.array([0.1]), [1, 2]):
        assert torch.equal(as_number(value), torch.tensor(value, dtype=torch.float64))
    for dtype in (torch.bfloat16, torch.float32): assert as_number(torch.ones(2, dtype=dtype)).dtype == dtype
    x = sympy.Symbol('x')
    assert as_number(x) is x and is_symbolic(x + 1) and is_symbolic(sympy.Integer(1))
    assert not any(map(is_symbolic, (1, torch.ones(1), np.ones(1), 'x', None)))


def test_a_formula_takes_any_number_and_computes_nothing_in_16_bits():
    seen = []

    class Curve:
        @formula
        def at(self, t):
            seen.append(t.dtype)
            return t * 2, Level(t, t, t)

    half = torch.tensor([0.5], dtype=torch.float16)
    for double, level in (Curve().at(half), Curve().at(t=half)):
        assert double.dtype == level.alpha.dtype == half.dtype and type(level) is Level
    assert Curve().at(1)[0] == 2 and seen == [torch.float32] * 2 + [torch.float64]
    for wrong in ((), (1, 2)):
        with pytest.raises(TypeError, match='argument'): Curve().at(*wrong)
    with pytest.raises(TypeError, match='unexpected'): Curve().at(u=1)


# ---- files

def test_project_root(tmp_path):
    inner = tmp_path / 'a' / 'b'
    inner.mkdir(parents=True)
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = lfdm\n')
    (tmp_path / 'a' / 'settings.ini').write_text('[DEFAULT]\nlib_name = another\n')
    assert project_root(inner) == project_root(str(tmp_path)) == tmp_path
    (tmp_path / 'settings.ini').unlink()
    assert project_root(inner) == inner


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


def test_a_file_is_on_the_disk_before_it_has_its_name_and_no_link_is_written_through(tmp_path, monkeypatch):
    path, draft, outside, done = tmp_path / 'file', tmp_path / 'draft', tmp_path / 'outside', []
    outside.write_text('not ours')
    draft.symlink_to(outside)
    monkeypatch.setattr('lfdm.core.sync', lambda p: done.append((p, path.exists())))
    with write_whole(path, draft) as d: d.write_text('new')
    assert done == [(draft, False), (tmp_path, True)]
    assert (path.read_text(), outside.read_text(), path.is_symlink()) == ('new', 'not ours', False)


def test_a_killed_writer_leaves_the_former_file(tmp_path):
    path, draft = tmp_path / 'file', tmp_path / 'draft'
    path.write_text('former')
    if not (writer := os.fork()):
        with write_whole(path, draft) as d:
            d.write_text('half')
            os.kill(os.getpid(), 9)
    assert os.waitpid(writer, 0) == (writer, 9)
    assert path.read_text() == 'former' and draft.read_text() == 'half'
    with write_whole(path, draft): draft.write_text('new')   # the leftover does no harm
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


# ---- seeds, devices, short messages

def test_seeds_are_kept_and_one_that_repeats_another_is_refused():
    for seed in (0, 2**32 - 1, 1e3, np.int64(5)):
        assert checked_seed(seed) == seed and type(checked_seed(seed)) is int
        assert torch.equal(torch.rand(3, generator=seeded(seed)),
                           torch.rand(3, generator=torch.Generator().manual_seed(int(seed))))
    for seed in (-1, 2**32, 10**400, True):
        for refuses in (checked_seed, seeded):
            with pytest.raises((TypeError, ValueError), match='^seed must be '): refuses(seed)
    assert seeded(g := seeded(3)) is g   # a stream is gone on with


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for device in ('cpu', torch.device('cpu')): assert checked_device(device) == torch.device('cpu')
    for bad in ('CPU', 'cuda', 'cuda:0', 'meta', '', 'cpu:7'):
        for refuses in (checked_device, lambda device: seeded(0, device)):
            with pytest.raises(ValueError, match="unknown device.* '.*'. .*Valid: 'cpu'"): refuses(bad)
    with pytest.raises(TypeError, match='^device must be a name such as'): checked_device(0)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for good in ('cuda', 'cuda:1'): assert checked_device(good) == torch.device(good)
    with pytest.raises(ValueError, match="this machine: 'cuda:2'.*Valid: 'cpu', 'cuda:0', 'cuda:1'"):
        checked_device('cuda:2')


LONG = ['cosine(' + 'x' * 10_000, ['a'] * 10_000, 10**400, 'a\nb', torch.zeros(100_000), np.zeros(10_000),
        'cosine(' + 'a=1,' * 999 + ')', 'cosine(' + '"a"' * 999 + ')']


@pytest.mark.parametrize('value', LONG, ids=range(len(LONG)))
def test_messages_are_short(value):
    names = {f'name_{i}': Child for i in range(500)}
    doors = [lambda: lookup(names, value, 'thing'), lambda: instance(names, value, 'thing', Base),
             lambda: instance(SCHEDULES, value, 'schedule', Schedule), lambda: number('n', value, high=1),
             lambda: number('n', value, integer=True, high=1), lambda: checked_seed(value)]
    for door in doors:
        with pytest.raises((TypeError, ValueError)) as e: door()
        assert len(str(e.value)) <= LONGEST and '\n' not in str(e.value)
