"prove, check and refute let through what is true, and nothing else."
import math
import re

import numpy as np
import pytest
import sympy as sp
import torch

from lfdm.proofs import check, prove, refute

x, p = sp.Symbol('x', real=True), sp.Symbol('p', positive=True)


@pytest.mark.parametrize('left, right', [
    (sp.sin(x)**2 + sp.cos(x)**2, 1), ((p**2)**0.5, p), (sp.Abs(p), p), (2, 2.0),
    (sp.exp(sp.log(p) / 2), sp.sqrt(p))])
def test_what_is_true_is_proved_and_not_refuted(left, right, capsys):
    prove(left, right, 'a truth')
    with pytest.raises(AssertionError, match='not refuted'): refute(left, right, 'a truth')
    assert capsys.readouterr().out == 'proved: a truth\n'


def test_a_special_case_says_so(capsys):
    prove(p + p, 2 * p, 'a truth', case='D = 1')
    assert capsys.readouterr().out == 'proved for D = 1: a truth\n'


@pytest.mark.parametrize('left, right', [
    (p, p * 1.00001), (sp.sqrt(x**2), x), (sp.Function('f')(x).diff(x), 0)])
def test_what_is_false_is_refuted_and_not_proved(left, right, capsys):
    refute(left, right, 'a lie')
    with pytest.raises(AssertionError, match='not proved: a lie: the two sides differ by'):
        prove(left, right, 'a lie')
    assert re.fullmatch('refuted: a lie: .* is not .*\n', capsys.readouterr().out)


def test_what_is_nearly_true_is_not_proved_and_some_lies_need_a_point():
    for near in (p + sp.Rational(1, 10**12), sp.nan):
        with pytest.raises(AssertionError, match='not proved'): prove(p, near, 'a lie')
    refute(p, 1, 'a lie', {p: 2})
    with pytest.raises(AssertionError, match='not refuted'): refute(p, 1, 'a truth', {p: 1})


@pytest.mark.parametrize('value, expected, options', [
    (torch.tensor([1., 2.]), [1., 2. + 1e-12], {}),
    ([1e6 + 1e-4], [1e6], {}),                                   # relative, not absolute
    (np.array([1e-12, 5.]), torch.tensor([0., 5.]), {}),         # 0 is expected: relative to the largest
    (sp.Rational(1, 3), 1 / 3, {}),
    ([math.inf, 0.], [math.inf, 0.], {}),
    ([1., 2.], [1.05, 2.5], dict(within=[0.1, 1.])),             # each within its own standard error
    (1.1, 1., dict(tolerance=0.2))])
def test_check_lets_through_what_agrees(value, expected, options, capsys):
    check(value, expected, 'a claim', **options)
    assert capsys.readouterr().out.startswith('checked: a claim: worst ')


@pytest.mark.parametrize('value, expected, options', [
    ([1., 2.1], [1., 2.], {}), ([1., 1e-8], [1., 0.], {}),
    (2e-12, 1e-12, {}),                                          # a small number is not a small difference
    ([1., math.nan], 1., {}), (math.inf, 1., {}), (1., math.inf, {}),
    ([1., 2.], [1.05, 2.5], dict(within=[0.01, 1.])), ([1., 1.], [1., 1.1], dict(within=0.)),
    (math.nan, 1., dict(within=10.))])
def test_check_fails_where_numbers_differ(value, expected, options, capsys):
    with pytest.raises(AssertionError, match='not so: a claim'): check(value, expected, 'a claim', **options)
    assert capsys.readouterr().out == ''


def test_check_names_the_worst_number_and_needs_like_shapes():
    with pytest.raises(AssertionError, match='4.4 is not 4, a relative difference of 0.1 .allowed 1e-09'):
        check([1.01, 4.4, 1e3], [1., 4., 1e3], 'three')
    with pytest.raises(AssertionError, match='1 is not 1.5, a difference of 0.5 .allowed 0.1'):
        check([1., 2.], [1.5, 9.], 'two', within=[0.1, 6.])
    with pytest.raises(ValueError, match='shape'): check([1., 1.], [1., 1., 1.], 'a claim')


@pytest.mark.parametrize('judge, bad, says', [
    *((prove, bad, 'left must be a sympy expression or a number') for bad in (None, True, [p])),
    (refute, '__import__("os")', 'left must be a sympy expression or a number'),
    *((check, bad, 'value must hold real numbers') for bad in ('1', None, [1j], {})),
    (check, [], 'value holds no numbers')])
def test_what_cannot_be_judged_is_named(judge, bad, says):
    with pytest.raises((TypeError, ValueError), match=says): judge(bad, 1, 'a claim')
