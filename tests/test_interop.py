"lfdm.interop against diffusers' own numbers: any β, any length, networks, and what has no counterpart."
import inspect
import math
import runpy
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

diffusers = pytest.importorskip("diffusers")
from diffusers.training_utils import compute_snr  # noqa: E402

from lfdm.core import from_spec, seeded  # noqa: E402
from lfdm.discrete import DDPMSchedule  # noqa: E402
from lfdm.interop import (  # noqa: E402
    PREDICTIONS,
    SCHEDULERS,
    BetasSchedule,
    as_network,
    as_unet,
    from_diffusers,
    to_diffusers,
)
from lfdm.losses import DiffusionLoss  # noqa: E402
from lfdm.schedules import SCHEDULES, network_time  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning", "ignore:.*found in sys.modules:RuntimeWarning",
    "ignore:.*:FutureWarning", "ignore:the chain of T:UserWarning")
f32, f64 = torch.float32, torch.float64
equal, close = torch.equal, torch.testing.assert_close
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
predictions = st.sampled_from(sorted(PREDICTIONS))
seeds = st.integers(0, 10**6)
betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=40).filter(
    lambda b: sum(math.log1p(-x) for x in b) > -25)   # float32 holds the ᾱ that is left
DDPM, FLOW = diffusers.DDPMScheduler, diffusers.FlowMatchEulerDiscreteScheduler
SOLVER, EULER = diffusers.DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler


def times(T): return torch.arange(1, T + 1, dtype=f64) / T
def schedule_of(text): return from_spec(SCHEDULES, text, "schedule")


def chain(b, prediction="epsilon"):
    return DDPM(trained_betas=b, num_train_timesteps=len(b), prediction_type=prediction, clip_sample=False)


# --- levels

@few
@given(betas, predictions, seeds)
def test_any_betas_are_theirs_there_and_back(b, prediction, seed):
    "Witnesses: the product, in float64, of the β that diffusers keeps; and diffusers itself."
    scheduler, g, T = chain(b, prediction), seeded(seed), len(b)
    schedule, target = from_diffusers(scheduler)
    alpha_bar = (1 - torch.tensor(b, dtype=f32).double()).cumprod(0)
    assert (schedule.T, target.name, schedule.logsnr_max) == (T, PREDICTIONS[prediction], 12.9)
    close(schedule.alpha(times(T))**2, alpha_bar, rtol=1e-9, atol=0)
    close(schedule.sigma(times(T))**2, 1 - alpha_bar, rtol=1e-9, atol=0)
    own = BetasSchedule(b)
    back, target = from_diffusers(to_diffusers(own, PREDICTIONS[prediction]))
    close(back._levels, own._levels, rtol=1e-5, atol=1e-5)
    assert target.name == PREDICTIONS[prediction]
    k = torch.randint(T, (6,), generator=g)
    x, eps = torch.randn(2, 6, 3, generator=g)
    z, v, level = DiffusionLoss(schedule, "v").noisy(x, (k + 1).double() / T, eps)
    close(z.float(), scheduler.add_noise(x, eps, k), atol=5e-4, rtol=0)
    close(v.float(), diffusers.DDIMScheduler.get_velocity(scheduler, x, eps, k), atol=5e-4, rtol=0)
    snr = level.logsnr.exp()
    off = (compute_snr(scheduler, k) / snr - 1).abs()
    assert (off <= 1e-5 + 1e-6 * T * (1 + snr)).all()   # 1 - ᾱ in float32


@pytest.mark.parametrize("text, T", [("cosine", 1), ("linear", 50), ("ddpm(T=50)", 50)])
def test_a_schedule_is_seen_at_i_over_T(text, T):
    scheduler, alpha = to_diffusers(text, "v", T=T), schedule_of(text).alpha(times(T))
    assert len(scheduler) == T and scheduler.config.timestep_spacing == "trailing"
    left = (alpha**2 / torch.cat([torch.ones(1), alpha[:-1]**2])).min().item()   # 1 - β, kept to 6e-8
    close(scheduler.alphas_cumprod.double(), alpha**2, rtol=1e-4 + 1e-7 / left, atol=0)
    back, _ = from_diffusers(scheduler, logsnr_max=30)
    close(back.alpha(times(T))**2, alpha**2, rtol=1e-6 + 1e-7 / left, atol=0)


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("text", ["cosine", "ddpm(T=100, beta_min=0.001, beta_max=0.05, beta=scaled_linear)"])
def test_every_kind_has_the_same_levels(text, kind):
    cls, plain = getattr(diffusers, kind), to_diffusers(text, "v")
    scheduler = to_diffusers(text, "v", kind=kind)
    assert type(scheduler) is cls
    close(scheduler.alphas_cumprod, plain.alphas_cumprod)
    (schedule, target), (expected, _) = from_diffusers(scheduler), from_diffusers(plain)
    assert target.name == "v" and equal(schedule._levels, expected._levels)


def test_betas_without_a_name_and_levels_without_betas():
    assert type(from_diffusers(DDPM(beta_start=0.02, beta_end=1e-4))[0]) is BetasSchedule
    shifted = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=False, snr_shift_scale=3.)
    schedule, _ = from_diffusers(shifted)                    # ᾱ is not the product of the β
    close(schedule.alpha(times(1000))**2, shifted.alphas_cumprod, rtol=1e-9, atol=0)
    scheduler = DDPM(num_train_timesteps=10)                 # β are not those of the name
    scheduler.betas = torch.linspace(0.1, 0.3, 10)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    schedule, _ = from_diffusers(scheduler)
    assert type(schedule) is BetasSchedule and equal(schedule.betas.float(), scheduler.betas)


def test_flow_matching_is_the_straight_line():
    scheduler = FLOW()
    schedule, target = from_diffusers(scheduler)
    x, eps = torch.randn(2, 5, 1, 4, 4, generator=seeded(0))
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    z, y, _ = DiffusionLoss(schedule, target).noisy(x, t, eps)
    k = (scheduler.timesteps - 1000 * schedule.sigma(t)[:, None]).abs().argmin(1)
    close(z, scheduler.scale_noise(x, scheduler.timesteps[k], eps), atol=1e-2, rtol=0)   # σ to 1/1000
    assert equal(y, eps - x)


@pytest.mark.parametrize("shift", [0.3, 1., 3., 12.])
def test_a_shift_comes_and_goes(shift):
    "the levels are the scheduler's own; a shift set later counts"
    theirs = to_diffusers(f"rectified_flow(shift={shift})", "flow", T=50)
    schedule, target = from_diffusers(theirs, logsnr_max=math.inf)
    assert schedule.shift == shift and target.name == "flow"
    uncut = SCHEDULES["rectified_flow"](-math.inf, math.inf, shift)
    close(uncut.sigma(torch.arange(50, 0, -1, dtype=f64) / 50).float(), theirs.sigmas, rtol=1e-6, atol=0)
    assert equal(to_diffusers(schedule, target, 50).sigmas, theirs.sigmas)
    theirs.set_shift(2 * shift)
    assert from_diffusers(theirs)[0].shift == 2 * shift


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_is_the_pipelines(kind):
    "mu is linear in the tokens, 0.5 at 256 and 1.15 at 4096, not clamped; the levels are the scheduler's"
    theirs = FLOW(use_dynamic_shifting=True, time_shift_type=kind)
    for tokens in (16, 256, 4096, 10_000):
        schedule, _ = from_diffusers(theirs, tokens=tokens)
        theirs.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=0.5 + 0.65 * (tokens - 256) / 3840)
        uncut = SCHEDULES["rectified_flow"](-math.inf, math.inf, schedule.shift)
        close(uncut.sigma(torch.tensor([0.9, 0.5, 0.1])), theirs.sigmas[:-1])


@pytest.mark.parametrize("call, message", [
    (lambda: from_diffusers(FLOW(shift=3.), tokens=256), "this scheduler's is 3"),
    (lambda: from_diffusers(DDPM(), tokens=256), "a chain of noise levels has no shift"),
    (lambda: from_diffusers(FLOW(use_dynamic_shifting=True), tokens=0), "tokens must be at least 1"),
    (lambda: to_diffusers("rectified_flow", "eps"), "predicts flow"),
    (lambda: to_diffusers("rectified_flow", "flow", kind="DDPMScheduler"), "kind must be FlowMatchEuler"),
    (lambda: to_diffusers("rectified_flow", "flow", shift=3.), "follows from the schedule"),
    (lambda: to_diffusers("rectified_flow", "flow", use_karras=True), "Did you mean 'use_karras_sigmas'"),
    (lambda: to_diffusers("logit_normal", "flow"), "does not preserve variance|no prediction_type")])
def test_shifts_that_are_not_there(call, message):
    with pytest.raises(ValueError, match=message): call()


# --- networks

class Index(torch.nn.Module):
    "A network that answers with what it is told."
    def forward(self, sample, timestep, add=0.):
        told = torch.as_tensor(timestep).reshape(-1, *[1] * (sample.ndim - 1))
        return SimpleNamespace(sample=torch.zeros_like(sample) + told + add)


def test_the_nearest_level_between_two_and_1000u_without_a_chain():
    u, net = network_time(DDPMSchedule().logsnr(times(1000))), as_network(Index(), "ddpm")
    for part, nearest in ((0.4, torch.arange(999)), (0.6, torch.arange(1, 1000))):
        assert equal(net.timestep(u[:-1] + part * u.diff()), nearest)
    assert as_network(Index(), "ddpm(T=1)").timestep(u[:3]).tolist() == [0, 0, 0]
    assert net.timestep(torch.tensor([0., 1.])).tolist() == [0, 999]
    assert equal(net.half().timestep(u.float()), torch.arange(1000))   # halved networks keep their timesteps
    for free, more in (as_network(Index()), 0.), (as_network(Index(), "cosine", add=3.), 3.):
        told = free(torch.zeros(3, 1), torch.tensor([0.1, 0.5, 0.9]))[:, 0]
        close(told, torch.tensor([100., 500, 900]) + more)


def test_sixteen_bits_keep_a_thousand_timesteps_apart(dtype=torch.float16):
    class Heard(torch.nn.Module):
        def forward(self, sample, timestep): self.timestep = timestep; return SimpleNamespace(sample=sample)
    heard = Heard()
    net = as_unet(as_network(heard, "ddpm"), "ddpm", (1,))
    assert net(torch.zeros(1000, 1, dtype=dtype), torch.arange(1000), return_dict=False)[0].dtype == dtype
    assert equal(heard.timestep, torch.arange(1000))


@pytest.mark.parametrize("timestep", [-1, 1000, 6.5, math.nan, None, True, [1, 2, 3]])
def test_timesteps_that_a_chain_has_not(timestep):
    net = as_unet(lambda z, u: z, "ddpm", (1, 4, 4))
    with pytest.raises((TypeError, ValueError), match="timestep"): net(torch.zeros(2, 1, 4, 4), timestep)


@pytest.mark.parametrize("answer, message", [
    (lambda z: z, "field `sample`"),
    (lambda z: SimpleNamespace(sample=z.repeat(1, 2)), "a variance as well")])
def test_networks_that_answer_otherwise(answer, message):
    net = as_network(lambda sample, timestep: answer(sample), "ddpm")
    with pytest.raises((TypeError, ValueError), match=message): net(torch.zeros(2, 3), torch.zeros(2))


# --- what has no counterpart

@pytest.mark.parametrize("kind", ["DDPMScheduler", "DDIMScheduler", "CogVideoXDDIMScheduler"])
def test_zero_terminal_snr_is_read_with_its_last_level(kind):
    scheduler = getattr(diffusers, kind)(rescale_betas_zero_snr=True)
    schedule, _ = from_diffusers(scheduler)
    assert schedule.ends_in_noise and schedule.alpha(times(1000))[-1] == 0
    close(schedule.alpha(times(1000))[:900]**2, scheduler.alphas_cumprod[:900].double(), rtol=1e-4, atol=0)


def test_a_chain_that_ends_in_two_ways_is_refused_and_the_advice_works():
    scheduler = EULER(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"two schedules.*BetasSchedule\(scheduler.betas\)"):
        from_diffusers(scheduler)
    assert BetasSchedule(scheduler.betas).ends_in_noise
    with pytest.raises(ValueError, match="but beta_2 of 3 is 1"): BetasSchedule([0.1, 1., 0.2])


@pytest.mark.parametrize("scheduler, message", [
    (SOLVER(use_flow_sigmas=True, prediction_type="flow_prediction"), "no chain of noise levels"),
    (chain([0.1, 0., 0.2]), "strictly between 0 and 1, but beta_2 of 3 is 0"),
    (chain([1e-7, 0.1]), "logsnr_max must be above"),
    (FLOW(use_dynamic_shifting=True), "depends on the image"),
    (FLOW(invert_sigmas=True), "invert_sigmas=True"), (FLOW(shift_terminal=0.1), "shift_terminal=0.1"),
    (EULER(timestep_type="continuous", prediction_type="v_prediction"), "log.sigma./4"),
    (DDPM(variance_type="learned_range"), "gives a variance"),
    (DDPM(trained_betas=[0.1, 0.2]), "2 betas, but num_train_timesteps=1000")])
def test_what_lfdm_cannot_have(scheduler, message):
    with pytest.raises(ValueError, match=message): from_diffusers(scheduler)


@pytest.mark.parametrize("name", sorted(k for k in diffusers._class_to_module if k.endswith("Scheduler")))
def test_every_scheduler_of_diffusers_means_the_same_or_is_refused(name):
    "What lfdm takes has the scheduler's own levels, whatever the class."
    cls = getattr(diffusers, name)
    v = {"prediction_type": "v_prediction"} if "prediction_type" in inspect.signature(cls).parameters else {}
    try: scheduler = cls(**v)
    except (TypeError, ValueError, ImportError): return pytest.skip("needs more than its defaults")
    try: schedule, target = from_diffusers(scheduler)
    except (TypeError, ValueError): return
    if cls is FLOW: return
    close(schedule.alpha(times(1000))**2, scheduler.alphas_cumprod.double(), rtol=1e-3, atol=1e-7)
    assert target.name == "v"


@pytest.mark.parametrize("args, message", [
    (("discrete(schedule=rectified_flow)",), "does not preserve variance"),
    (("cosine", "F"), "no prediction_type for the target 'F'"), (("adaptive",), "moves as it learns"),
    (("cosine", "eps", 10, "DDPM"), "unknown kind of scheduler 'DDPM'"),
    (("cosine", "eps", 10, diffusers.EDMEulerScheduler), "EDMEulerScheduler takes none"),
    (("cosine", "eps", 10, torch.nn.Linear), "kind must be a scheduler class"),
    (("cosine(-20, 12.9)", "v", 1), "pure noise in diffusers"),
    (("cosine(-inf, 12.9)", "v", 10), "finite range")])
def test_what_diffusers_cannot_have(args, message):
    with pytest.raises((ValueError, TypeError), match=message): to_diffusers(*args)


@pytest.mark.parametrize("kind, options, message", [
    (DDPM, dict(trained_betas=[0.1]), "trained_betas follows from schedule"),
    (DDPM, dict(clip_sampel=True), "Did you mean 'clip_sample'"),
    (SOLVER, dict(solver_type="best"), "refuses an option"),
    (DDPM, dict(rescale_betas_zero_snr=True), "zero terminal SNR"),
    (DDPM, dict(variance_type="learned"), "gives a variance"),
    (EULER, dict(timestep_type="continuous"), "log.sigma./4"),
    (SOLVER, dict(use_flow_sigmas=True), "no chain of noise levels"),
    (diffusers.RePaintScheduler, {}, "no prediction_type='v_prediction'"),
    (diffusers.CogVideoXDDIMScheduler, {}, "moves the levels .* snr_shift_scale=1")])
def test_options_that_make_it_another_scheduler(kind, options, message):
    with pytest.raises(ValueError, match=message): to_diffusers("ddpm", "v", kind=kind, **options)


def test_how_one_samples_is_an_option():
    plain = to_diffusers("ddpm", "v", clip_sample=True)
    assert plain.config.clip_sample
    video = to_diffusers("ddpm", "v", kind=diffusers.CogVideoXDDIMScheduler, snr_shift_scale=1.)
    close(video.alphas_cumprod, plain.alphas_cumprod)
    assert from_diffusers(FLOW(), logsnr_max=5)[0].logsnr_max == 5


def test_the_way_out_that_is_named_is_one():
    with pytest.raises(ValueError) as e: to_diffusers("ve")
    text = str(e.value).split("to_diffusers('")[1].split("'")[0]
    assert abs(from_diffusers(to_diffusers(text, "v"))[0].logsnr_min - SCHEDULES["ve"]().logsnr_min) < 1e-4


def test_betas_at_the_ends_and_beyond():
    for bad in ([], [[0.1]], [0.], [1.], [0.1, math.nan], torch.tensor(0.1)):
        with pytest.raises(ValueError, match="beta"): BetasSchedule(bad)
    assert BetasSchedule([1e-12], logsnr_max=40.).logsnr_min == pytest.approx(-math.log(1e-12), abs=1e-3)
    assert BetasSchedule([1 - 1e-9]).logsnr_min == pytest.approx(math.log(1e-9), abs=1e-3)
    assert BetasSchedule([0.1, 0.2]).betas.tolist() == [0.1, 0.2]   # floats keep their digits
    assert len(repr(BetasSchedule([0.1] * 50))) < 200


def test_the_module_needs_no_diffusers():
    with patch.dict(sys.modules, diffusers=None):
        own = SimpleNamespace(**runpy.run_module("lfdm.interop"))
        own.BetasSchedule([0.1]), own.as_network(Index(), "ddpm"), own.as_unet(Index(), "ddpm", (1, 2, 2))
