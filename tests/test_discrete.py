"Chains of T levels: any schedule seen at T times, and DDPM's own."
import math
import warnings

import numpy as np
import pytest
import sympy
import torch

from lfdm.adaptive import AdaptiveSchedule
from lfdm.core import from_spec, seeded
from lfdm.data import DATASETS
from lfdm.discrete import DDPMSchedule, DiscreteSchedule, Staircase
from lfdm.evaluation import floor
from lfdm.likelihood import nelbo
from lfdm.losses import DiffusionLoss
from lfdm.sampling import sample
from lfdm.schedules import CONTINUOUS, SCHEDULES, sde
from lfdm.steps import SAMPLERS, exact_denoiser, network_denoiser
from lfdm.targets import TARGETS
from lfdm.weightings import WEIGHTINGS
from trained import new_state, trained

f32, f64 = torch.float32, torch.float64
close = torch.testing.assert_close


@pytest.mark.parametrize("T", [1, 7, 10**5, 10**6])
def test_a_time_i_over_T_finds_level_i(T):
    "in spite of rounding, in float32 too; and no time above 0 is at level 0, which no loss knows"
    s, i = DiscreteSchedule(-9, 9, T=T), torch.arange(T + 1)
    for dtype in (f32, f64):
        assert torch.equal(s._index(i.to(dtype) / T), i)
        smallest = torch.tensor([0., torch.finfo(dtype).tiny, torch.finfo(dtype).eps / 2], dtype=dtype)
        assert s._index(smallest).tolist() == [0, 1, 1]
        # beyond 10^5, float32 has too few digits for that many levels
        if T <= 10**5: assert torch.equal(s._cell(s.logsnr(i[1:].to(dtype) / T)), i[1:])
    assert torch.equal(s._index((i[1:].double() - 0.5) / T), i[1:])


@pytest.mark.parametrize("inner", [*CONTINUOUS, "shifted_cosine(shift=-1)", "linear(-5, 6)"])
def test_a_schedule_seen_at_T_times(inner):
    "its levels and scales at i/T, one cell of mass 1/T between two levels, t(λ(t)) the end of the cell"
    s, path = DiscreteSchedule(schedule=inner, T=13), DiscreteSchedule(schedule=inner, T=1)._seen
    i, levels, drops = torch.arange(14, dtype=f64), s._levels[1:], -s._levels.diff()
    for f in ("logsnr", "alpha", "sigma"):
        close(getattr(s, f)(i / 13), getattr(path, f)(i / 13), rtol=1e-12, atol=1e-12)
    t = torch.linspace(0.001, 1, 99, dtype=f64)
    close(s.t(s.logsnr(t)), (t * 13 - 1e-9).ceil() / 13, rtol=1e-12, atol=0)
    between = (s._levels[1:] + s._levels[:-1]) / 2   # a level between belongs to the next noisier one
    assert torch.equal(s.level_at(between).logsnr, levels)
    close(s.density(between) * drops, torch.full_like(drops, 1 / 13), rtol=1e-12, atol=0)
    assert (s.density(torch.tensor([s.logsnr_min - 1e-6, s.logsnr_max + 1e-6], dtype=f64)) == 0).all()
    snr = s._levels.exp()                            # thesis 3.17: a difference of SNRs
    close(-s.dlogsnr_at(levels), 13 * (snr[:-1] / snr[1:] - 1), rtol=1e-9, atol=0)
    close(s.jump(levels), s.before(levels) - levels)


def test_the_betas_of_chains_are_those_that_other_code_writes():
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2)**2
    sigmoid = lambda y: 1 / (1 + np.exp(-y))
    g = sigmoid(3) - sigmoid(np.linspace(-3, 3, 1001))
    betas = dict(linear=np.linspace(1e-4, 0.02, 1000), cosine=np.minimum(1 - f[1:] / f[:-1], 0.999),
                 sigmoid_beta=sigmoid(np.linspace(-6, 6, 1000)) * (0.02 - 1e-4) + 1e-4,
                 sigmoid_alpha=np.minimum(1 - g[1:] / g[:-1], 0.999),
                 scaled_linear=np.linspace(1e-4**0.5, 0.02**0.5, 1000)**2)
    for name, beta in betas.items():
        s, product = DDPMSchedule(beta=name, logsnr_max=math.inf), np.cumprod(1 - beta)
        level = s.level(torch.arange(1, 1001, dtype=f64) / 1000)
        np.testing.assert_allclose(level.alpha**2, product, rtol=1e-9)
        np.testing.assert_allclose(level.sigma**2, 1 - product, rtol=1e-9)
        assert (s.alpha(0.), s.sigma(0.), s.logsnr_min, s.steps) == (1, 0, s._levels[-1], 1000)
        assert DDPMSchedule(s.logsnr_min, beta=name).logsnr_min == s.logsnr_min


@pytest.mark.parametrize("cls, bad, text", [
    (DiscreteSchedule, dict(T=10**7), "T must be"),
    *((DiscreteSchedule, dict(schedule=s), "levels of its own") for s in ("adaptive", "discrete(T=4)")),
    (DiscreteSchedule, dict(logsnr_min=0, logsnr_max=1e-12, T=10**5), "levels of 'discrete' do not fall"),
    (DDPMSchedule, dict(beta="scaled-linear"), "Did you mean 'scaled_linear'"),
    (DDPMSchedule, dict(beta_min=0), "beta_min must be"),
    (DDPMSchedule, dict(beta_min=0.1, beta_max=0.01), "beta_max must be")])
def test_chains_that_cannot_be(cls, bad, text):
    with pytest.raises(ValueError, match=text): cls(**bad)


@pytest.mark.parametrize("s", [DiscreteSchedule(T=7), DDPMSchedule(T=500)], ids=lambda s: s.name)
def test_nan_is_at_no_level(s):
    nan = torch.tensor([math.nan, 0.5])
    for f in (s.logsnr, s.alpha, s.dlogsnr, s.t, s.density, s.dlogsnr_at, s.before, s.jump):
        assert f(math.nan).isnan() and f(nan).isnan().tolist() == [True, False], f
    assert all(q.isnan() for q in (*s.level(math.nan), *s.level_at(math.nan)))


def test_a_chain_that_ends_in_signal_warns():
    with pytest.warns(UserWarning, match="T = 50 steps ends at logsnr 0.418"): DDPMSchedule(T=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DDPMSchedule(), DDPMSchedule(None, 12.9, 1000, 0.00085, 0.012, "scaled_linear")


def test_a_staircase_falls_and_has_no_process_and_no_formula():
    for levels in ([1.], [[2., 1.]], [1., 2.]):
        with pytest.raises(ValueError, match="levels"): Staircase(levels)
    for s in (Staircase([2, 1.5]), AdaptiveSchedule()):
        with pytest.raises(TypeError, match="no formula"): s.logsnr(sympy.Symbol("t"))
    with pytest.raises(ValueError, match="jumps from level to level"): sde(DDPMSchedule(), 0.5)


# ---- a last level without signal

NOISE = "ddpm(T=12, zero_snr=True)", "discrete(logsnr_min=-inf, T=9)", "discrete(-inf, 5, rectified_flow, 7)"


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w != "uncertainty"])
def test_a_loss_at_pure_noise_is_the_limit_of_the_losses_before_it_or_refused(name, weighting):
    "and so is its floor; refused only where the limit is infinite"
    schedule = from_spec(SCHEDULES, name, "schedule")
    x, eps, y_hat = torch.randn(3, 4, 2, generator=seeded(0), dtype=torch.float64)
    cluster = DATASETS["cluster"]()
    for target in TARGETS:
        near = [DiffusionLoss(schedule.ending_at(k), target, weighting) for k in (-40., -50.)]
        values = [loss.values(lambda z, u: y_hat, x, torch.ones(4), eps) for loss in near]
        try: loss = DiffusionLoss(schedule, target, weighting)
        except ValueError as e:
            assert "at logsnr -inf" in str(e) and (values[1] > 1.5 * values[0]).all(), target
            continue
        value = loss(lambda z, u: y_hat, x, t=1., eps=eps)
        assert torch.allclose(value, values[1], rtol=1e-6, atol=1e-8), target
        assert floor(loss, cluster) == pytest.approx(floor(near[1], cluster), rel=1e-6)
        assert loss(lambda z, u: y_hat, x, generator=seeded(1)).isfinite().all()


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_pure_noise_every_sampler_goes_on_or_says_why_not(name, sampler):
    exact = exact_denoiser(DATASETS["cluster"]())
    for denoiser, known in ((exact, True), (network_denoiser(lambda z, u: 0 * z, "eps"), False)):
        try: z = sample(denoiser, 50, steps=6, schedule=name, sampler=sampler)
        except ValueError as e: assert "logsnr_min must be finite for this sampler" in str(e)
        else: assert known and z.isfinite().all() and z.abs().mean() < 3


def test_a_network_learns_on_a_chain_that_ends_in_noise():
    loss = DiffusionLoss("discrete(logsnr_min=-inf, T=10)", "x", "weighted")
    state = new_state(lr=1e-2)
    trained(state, 30, 20, loss=loss)
    values = [h["train_loss"] for h in state.history if "train_loss" in h]
    assert sum(values[-5:]) < 0.9 * sum(values[:5]) and all(map(math.isfinite, values))


def test_refusals_of_a_chain_without_signal():
    for bad, says in (("ddpm(T=1, zero_snr=True)", "two levels or more"),
                      ("ddpm(zero_snr=2)", "True or False"),
                      ("ddpm(-5, zero_snr=True)", "cannot end at logsnr_min"),
                      ("ddpm(-inf)", "cannot end at logsnr_min")):
        with pytest.raises(ValueError, match=says): from_spec(SCHEDULES, bad, "schedule")
    with pytest.raises(ValueError, match="finite range"):
        nelbo(lambda z, level: (z, z), torch.ones(3, 2), "ddpm(T=5, zero_snr=True)")
