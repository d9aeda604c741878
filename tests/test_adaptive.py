"The schedule that follows the loss: whatever it has seen, it stays a schedule."
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.adaptive import AdaptiveSchedule
from lfdm.core import seeded
from lfdm.schedules import sample_times

f32, f64 = torch.float32, torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
values = st.one_of(st.sampled_from([0., 1e-300, 1., 1e300, math.inf, math.nan]), st.floats(0, 1e6))
batches = st.lists(st.lists(st.tuples(st.floats(-3, 5), values), min_size=1, max_size=6), max_size=5)


@few
@given(batches=batches, bins=st.integers(1, 9), moment=st.sampled_from([1, 2]),
       uniform=st.sampled_from([1e-6, 0.1, 1.]), decay=st.sampled_from([0., 0.5, 0.99]))
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
    s = AdaptiveSchedule(0, 4, bins=4, decay=0.75, uniform=1e-6)

    def averages_after(logsnr, value):
        s.observe(torch.tensor(logsnr), torch.tensor(value))
        return s._history.averages.nan_to_num(-1).tolist()

    assert averages_after([3.5, 3.6, 0.5], [1., 3., 6.]) == [2., -1., -1., 6.]   # from the clean end
    mass = torch.tensor([2., 4., 4., 6.], dtype=f64) / 16                        # unseen bins are average
    torch.testing.assert_close(s._history.mass, mass, rtol=1e-5, atol=0)
    assert averages_after([3.5], [10.]) == [4., -1., -1., 6.]                    # 0.75 · 2 + 0.25 · 10
    for bad in (math.nan, math.inf, -math.inf):   # such a batch teaches nothing
        assert averages_after([3.5, 1.5], [bad, 7.]) == [4., -1., -1., 6.]
    assert averages_after([4., 0., 2.], [4., 6., 1.]).count(-1) == 1   # both ends and an edge have a bin


def test_an_adapted_schedule_still_estimates_the_integral():
    "the mean of w L′/p over its times is the integral of w L′, with less variance when adapted"
    profile = lambda k: (-(k - 2)**2).exp() + 0.1
    k = torch.linspace(-6, 6, 20_001, dtype=f64)
    exact, s, spread = torch.trapezoid(profile(k), k).item(), AdaptiveSchedule(-6, 6), []
    for step in range(60):
        logsnr = s.logsnr(sample_times(4096, seeded(step), dtype=f64, low_discrepancy=False))
        value = profile(logsnr) / s.density(logsnr)
        assert abs(value.mean() - exact) < 5 * value.std() / 64
        spread.append(value.std().item())
        s.observe(logsnr, profile(logsnr))
    assert spread[-1] < 0.3 * spread[0]


def test_a_state_is_a_copy_and_belongs_to_its_schedule():
    s, other = AdaptiveSchedule(-3, 5, bins=7), AdaptiveSchedule(-3, 5, bins=7)
    s.observe(torch.tensor([-2., 4.]), torch.tensor([5., 1.]))
    kept = s.state()
    other.load_state(kept)
    other.observe(torch.tensor([-2.]), torch.tensor([50.]))
    assert kept["history"][-1] == s.state()["history"][-1] == 5 != other.state()["history"][-1]
    for bad in ({}, {"history": None}, {"history": torch.zeros(6)}, {"history": [1.] * 7}):
        with pytest.raises(ValueError, match="does not hold the history"): other.load_state(bad)


@pytest.mark.parametrize("option, bad", [
    *(("bins", b) for b in (0, 2.5, "9")), *(("decay", b) for b in (1, -0.1, math.nan)),
    *(("uniform", b) for b in (0, 1.1, True)), *(("moment", b) for b in (3, 0, 1.5))])
def test_options_that_cannot_be(option, bad):
    with pytest.raises((TypeError, ValueError), match=f"^{option} must be"): AdaptiveSchedule(**{option: bad})
