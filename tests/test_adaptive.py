"The schedule that follows the loss: whatever it has seen, it stays a schedule."
import math

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from lfdm.adaptive import AdaptiveSchedule
from lfdm.core import seeded
from lfdm.schedules import sample_times

f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
values = st.one_of(st.sampled_from([0., 1e-300, 1., 1e300, math.inf, math.nan]), st.floats(0, 1e6))
batches = st.lists(st.lists(st.tuples(st.floats(-3, 5), values), min_size=1, max_size=6), max_size=5)


@few
@given(batches=batches, bins=st.sampled_from([1, 2, 9, 40]), moment=st.sampled_from([1, 2]),
       uniform=st.sampled_from([1e-6, 0.1, 1.]), decay=st.sampled_from([0., 0.5, 0.99]))
@example(batches=[[(1., 1e300)] * 6], bins=2, moment=2, uniform=0.1, decay=0.5)   # its square overflows
def test_whatever_was_seen_the_path_is_a_decreasing_bijection(batches, bins, moment, uniform, decay):
    "zeros, overflows and nan included: the density stays above its uniform share, and integrates to one"
    s, t = AdaptiveSchedule(-3, 5, bins, decay, uniform, moment), torch.linspace(0, 1, 201, dtype=f64)
    for batch in batches: s.observe(*torch.tensor(batch, dtype=f64).T)
    logsnr = s.logsnr(t)
    assert logsnr.isfinite().all() and (logsnr.diff() < 0).all()
    assert logsnr[0] == 5 and abs(logsnr[-1] + 3) < 1e-12
    torch.testing.assert_close(s.t(logsnr), t, rtol=0, atol=1e-9)
    p = s.density((s._history.edges[1:] + s._history.edges[:-1]) / 2)
    assert (p >= uniform / 8 * (1 - 1e-9)).all() and abs(p.sum().item() * 8 / bins - 1) < 1e-9
    for dtype in (f32, f64):
        k = s.logsnr(torch.rand(50, generator=seeded(0)).to(dtype))
        assert (s.dlogsnr_at(k) < 0).all() and s.dlogsnr_at(k).isfinite().all() and k.dtype == dtype


def test_the_history_is_a_moving_average_of_the_means():
    s = AdaptiveSchedule(0, 4, bins=4, decay=0.75, uniform=0.2)
    assert (s.version(), s.version(2), s.version(1)) == (1, 1, 2)   # small batches have one of their own

    def averages_after(logsnr, value):
        s.observe(torch.tensor(logsnr), torch.tensor(value))
        return s._history.averages.nan_to_num(-1).tolist()

    assert averages_after([3.5, 3.6, 0.5], [1., 3., 6.]) == [2., -1., -1., 6.]   # from the clean end
    mass = 0.8 * torch.tensor([2., 4., 4., 6.], dtype=f64) / 16 + 0.2 / 4        # unseen bins are average
    torch.testing.assert_close(s._history.mass, mass)
    assert averages_after([3.5], [10.]) == [4., -1., -1., 6.]      # 0.75 · 2 + 0.25 · 10, as no small batch
    for bad in (math.nan, math.inf, -math.inf):   # such a batch teaches nothing
        assert averages_after([3.5, 1.5], [bad, 7.]) == [4., -1., -1., 6.]
        assert averages_after([3.5, bad], [9., 7.]) == [4., -1., -1., 6.]
    assert averages_after([4., 0., 2.], [4., 6., 1.]).count(-1) == 1   # both ends and an edge have a bin


TAILS = dict(   # of mean 1; a plain average of few values is of no use
    lognormal=lambda n, g: (1.5 * torch.randn(n, generator=g, dtype=f64) - 1.125).exp(),
    power=lambda n, g: torch.rand(n, generator=g, dtype=f64)**(-1 / 1.5) / 3)


@pytest.mark.parametrize("n, steps, tail, allowed", [
    (8, 300, "power", 0.2), (16, 200, "lognormal", 0.2), (512, 300, "power", 0.1)])
def test_it_follows_a_profile_that_moves_whatever_the_batch(n, steps, tail, allowed):
    "small batches: within 3,000 examples; others: within some times of 100 batches"
    s, g = AdaptiveSchedule(), seeded(0)
    middle = (s._history.edges[1:] + s._history.edges[:-1]) / 2
    for peak in (5, -5):
        profile = lambda k, peak=peak: (-(k - peak)**2 / 4).exp() + 0.02
        for _ in range(steps):
            logsnr = s.logsnr(sample_times(n, g, dtype=f64))
            s.observe(logsnr, profile(logsnr) * TAILS[tail](n, g))
        share = profile(middle) / profile(middle).sum()
        assert (s._history.mass - 0.9 * share - 0.001).abs().sum() / 2 < allowed


def test_small_batches_fade_and_weigh_as_their_bins_are_seldom_visited():
    s = AdaptiveSchedule(0, 3, bins=3, decay=0.9, uniform=1e-6)
    s.load_state(s.state() | {"history": torch.tensor([8., 1., 1.], dtype=f64)})
    total = weight = 0.
    for logsnr, value, own in ((2.5, 8., 10 / 24), (1.5, 1., 1.), (0.5, 3., 1.)):
        s.observe([logsnr], [value])
        total, weight = (q * 0.9**0.1 + own * more for q, more in ((total, value), (weight, 1)))
        assert s._history.averages == pytest.approx([total / weight] * 3, rel=1e-5)   # too few for one bin


@pytest.mark.parametrize("moment, bins", [(1, 100), (2, 7)])
def test_schedules_that_learn_together_are_what_each_is_alone(moment, bins):
    "to the bit, parts that are not finite or overflow included; the last batch is smaller than half the bins"
    new = lambda: [AdaptiveSchedule(-9, 9, bins, moment=moment) for _ in range(3)]
    alone, kept = new(), new()
    joint, g = AdaptiveSchedule.together(kept), seeded(0)
    assert joint.joins(64) and not AdaptiveSchedule().joins(49)
    for step, n in enumerate([64] * 30 + [5]):
        t, value = torch.rand(3, n, generator=g), torch.rand(3, n, generator=g, dtype=f64).exp()
        if step == 3: value[1, 0] = math.nan
        if step == 4: value[0, 0] = 1e300
        logsnr = torch.stack([s.logsnr(own) for s, own in zip(alone, t)])
        assert torch.equal(joint.logsnr(t.flatten()), logsnr.flatten())
        density = torch.cat([s.density(k) for s, k in zip(alone, logsnr)])
        assert torch.equal(joint.density(logsnr.flatten()), density)
        assert torch.equal(joint.t(logsnr.flatten()), torch.cat([s.t(k) for s, k in zip(alone, logsnr)]))
        joint.observe(logsnr.flatten(), value.flatten())
        for s, k, v in zip(alone, logsnr, value): s.observe(k, v)
    joint.apart(kept)
    for s, other in zip(alone, kept):
        for a, b in zip(s.state().values(), other.state().values()): assert torch.equal(a, b)
        assert torch.equal(s._history.cdf, other._history.cdf)


@pytest.mark.parametrize("bins", [3, 7])
def test_a_state_is_a_copy_and_belongs_to_its_schedule(bins):
    s, other = AdaptiveSchedule(-3, 5, bins=bins), AdaptiveSchedule(-3, 5, bins=bins)
    s.observe([-2., 4.], [5., 1.])
    kept = s.state()
    other.load_state(kept)
    more = torch.tensor([-2., 0.]), torch.tensor([50., 2.])
    other.observe(*more)
    assert kept["history"].equal(s.state()["history"]) or bins == 3   # nan is not equal
    assert not torch.equal(kept["history"], other.state()["history"])
    s.observe(*more)   # goes on as the other did
    for a, b in zip(s.state().values(), other.state().values()): assert torch.equal(a, b)
    for bad in ({}, kept | {"history": torch.zeros(6)}):
        with pytest.raises(ValueError, match="^state does not hold the"): other.load_state(bad)


@pytest.mark.parametrize("logsnr, value", [([1.], [1., 2.]), ([[1.]], [[1.]]), ([1.], [-1.])])
def test_values_that_cannot_be(logsnr, value):
    with pytest.raises(ValueError, match="^value must"): AdaptiveSchedule().observe(logsnr, value)
