"Attempts to break lfdm.interop: its numbers against diffusers' own, any β, any length, and what has no counterpart."
import math
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings, strategies as st

diffusers = pytest.importorskip('diffusers')
from diffusers.training_utils import compute_snr  # noqa: E402

from lfdm.core import seeded# noqa: E402
from lfdm.discrete import DDPMSchedule, DiscreteSchedule# noqa: E402
from lfdm.interop import BETA_SCHEDULES, PREDICTIONS, SCHEDULERS, BetasSchedule, as_network, as_unet, from_diffusers, to_diffusers# noqa: E402
from lfdm.likelihood import nelbo# noqa: E402
from lfdm.losses import DiffusionLoss, predict# noqa: E402
from lfdm.sampling import sampling# noqa: E402
from lfdm.schedules import SCHEDULES, Level, network_time# noqa: E402
from lfdm.steps import ancestral_step, ddim_step, network_denoiser# noqa: E402

torch.set_num_threads(1)
f64 = torch.float64
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
predictions = st.sampled_from(sorted(PREDICTIONS))
betas = st.lists(st.floats(1e-4, 0.9), min_size=1, max_size=40).filter(lambda b: sum(math.log1p(-x) for x in b) > -25)   # float32 holds the ᾱ that is left
seeds = st.integers(0, 10**6)


def times(T): return torch.arange(1, T + 1, dtype=f64) / T
def ddpm(b, prediction='epsilon', **kw): return diffusers.DDPMScheduler(trained_betas=b, num_train_timesteps=len(b), prediction_type=prediction, clip_sample=False, **kw)


# --- levels

@few
@given(betas, predictions)
def test_levels_are_the_product_of_the_betas_whatever_they_are(b, prediction):
    "The other witness multiplies, in float64, the β that diffusers keeps."
    schedule, target = from_diffusers(ddpm(b, prediction))
    alpha_bar, product = [], 1.
    for beta in torch.tensor(b, dtype=torch.float32).tolist(): alpha_bar.append(product := product * (1 - beta))
    assert (schedule.T, target.name, schedule.logsnr_max) == (len(b), PREDICTIONS[prediction], 12.9)
    torch.testing.assert_close(schedule.alpha(times(len(b)))**2, torch.tensor(alpha_bar, dtype=f64), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.sigma(times(len(b)))**2, 1 - torch.tensor(alpha_bar, dtype=f64), rtol=1e-9, atol=0)


@few
@given(st.sampled_from(sorted(BETA_SCHEDULES)), st.integers(1, 300), st.floats(1e-5, 1e-3), st.floats(2e-3, 0.05), predictions)
def test_a_name_goes_there_and_back(name, T, low, high, prediction):
    ends = {} if name == 'squaredcos_cap_v2' else dict(beta_start=low, beta_end=high)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=T, beta_schedule=name, prediction_type=prediction, **ends)
    schedule, target = from_diffusers(scheduler)
    assert type(schedule) is DDPMSchedule and schedule.beta == BETA_SCHEDULES[name]
    torch.testing.assert_close(schedule.betas.float(), scheduler.betas, rtol=1e-6, atol=0)
    again = to_diffusers(schedule, target)
    assert (again.config.beta_schedule, again.config.prediction_type, len(again)) == (name, prediction, T)
    torch.testing.assert_close(again.alphas_cumprod, scheduler.alphas_cumprod)
    back, target2 = from_diffusers(again)
    assert torch.equal(back._levels, schedule._levels) and type(target2) is type(target)


@few
@given(betas, predictions)
def test_betas_go_there_and_back(b, prediction):
    schedule = BetasSchedule(b)
    back, target = from_diffusers(to_diffusers(schedule, PREDICTIONS[prediction]))
    assert target.name == PREDICTIONS[prediction]
    torch.testing.assert_close(back._levels, schedule._levels, rtol=1e-5, atol=1e-5)


@few
@given(st.sampled_from(['cosine', 'shifted_cosine', 'linear', 'cosine(-6, 8)', 'discrete(T=50)', 'ddpm(T=50)', 'ddpm(T=50, beta=cosine)']), st.sampled_from([1, 2, 50, 999]), predictions)
def test_a_schedule_is_seen_at_i_over_T(words, T, prediction):
    own = 50 if 'T=50' in words else None
    scheduler = to_diffusers(words, PREDICTIONS[prediction], T=own or T)
    assert len(scheduler) == (own or T) and scheduler.config.prediction_type == prediction and not scheduler.config.clip_sample
    alpha = DiffusionLoss(words, 'v').schedule.alpha(times(own or T))
    left = (alpha**2 / torch.cat([torch.ones(1), alpha[:-1]**2])).min().item()     # the smallest 1 - β, which float32 keeps to 6e-8
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha**2, rtol=1e-4 + 1e-7 / left, atol=0)
    back, _ = from_diffusers(scheduler, logsnr_max=30)
    torch.testing.assert_close(back.alpha(times(own or T))**2, alpha**2, rtol=1e-6 + 1e-7 / left, atol=0)


@pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')
@pytest.mark.parametrize('kind', SCHEDULERS)
def test_every_kind_has_the_same_levels(kind):
    for words in ('ddpm', 'cosine', 'ddpm(T=100, beta_min=0.001, beta_max=0.05, beta=scaled_linear)'):
        scheduler = to_diffusers(words, 'v', kind=kind)
        assert type(scheduler).__name__ == kind
        torch.testing.assert_close(scheduler.alphas_cumprod, to_diffusers(words, 'v').alphas_cumprod)
        schedule, target = from_diffusers(scheduler)
        assert target.name == 'v' and torch.equal(schedule._levels, from_diffusers(to_diffusers(words, 'v'))[0]._levels)
        assert type(to_diffusers(words, 'v', kind=getattr(diffusers, kind))) is type(scheduler)


def test_betas_without_a_name_here_and_levels_without_betas():
    assert type(from_diffusers(diffusers.DDPMScheduler(beta_schedule='sigmoid'))[0]) is BetasSchedule
    assert type(from_diffusers(diffusers.DDPMScheduler(beta_start=0.02, beta_end=1e-4))[0]) is BetasSchedule   # they fall
    shifted = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=False, snr_shift_scale=3.0, prediction_type='v_prediction')
    schedule, _ = from_diffusers(shifted)                                                                     # ᾱ is not the product of the β
    torch.testing.assert_close(schedule.alpha(times(1000))**2, shifted.alphas_cumprod, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.logsnr(times(1000)[100:]), from_diffusers(diffusers.DDIMScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.0120))[0].logsnr(times(1000)[100:]) - math.log(3),
                               atol=1e-3, rtol=0)


def test_a_name_that_the_betas_do_not_bear_out():
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=10)
    scheduler.betas = torch.linspace(0.1, 0.3, 10)
    scheduler.alphas_cumprod = (1 - scheduler.betas).cumprod(0)
    schedule, _ = from_diffusers(scheduler)
    assert type(schedule) is BetasSchedule and torch.equal(schedule.betas.float(), scheduler.betas)


def test_flow_matching_is_the_straight_line():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule, target = from_diffusers(scheduler)
    x, eps = torch.randn(2, 5, 1, 4, 4, generator=seeded(0))
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    z, y, _ = DiffusionLoss(schedule, target).noisy(x, t, eps)
    k = (scheduler.timesteps - 1000 * schedule.sigma(t)[:, None]).abs().argmin(1)
    theirs = scheduler.scale_noise(x, scheduler.timesteps[k], eps)
    torch.testing.assert_close(z, theirs, atol=1e-2, rtol=0)              # their σ is a multiple of 1/1000
    assert torch.equal(y, eps - x)
    for bad in (dict(shift=3.), dict(use_dynamic_shifting=True)):
        with pytest.raises(ValueError, match='shift'): from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(**bad))


# --- diffusers' own numbers

@few
@given(betas, seeds)
def test_noisy_data_velocity_and_snr_are_theirs(b, seed):
    scheduler, g = ddpm(b, 'v_prediction'), seeded(seed)
    loss = DiffusionLoss(*from_diffusers(scheduler))
    k = torch.randint(len(b), (6,), generator=g)
    x, eps = torch.randn(2, 6, 3, generator=g)
    z, v, level = loss.noisy(x, ((k + 1).double() / len(b)), eps)
    torch.testing.assert_close(z.float(), scheduler.add_noise(x, eps, k), atol=5e-4, rtol=0)
    torch.testing.assert_close(v.float(), scheduler.get_velocity(x, eps, k), atol=5e-4, rtol=0)
    snr = level.logsnr.exp()
    assert ((compute_snr(scheduler, k) / snr - 1).abs() <= 1e-5 + 1e-6 * len(b) * (1 + snr)).all()   # 1 - ᾱ in float32


@few
@given(st.integers(0, 999), predictions, seeds)
def test_a_step_of_ddpm_and_one_of_ddim_are_theirs(k, prediction, seed):
    "The last one, at k = 0, too: to the data, at λ = ∞."
    schedule = DDPMSchedule(logsnr_max=math.inf)
    s, t = (Level(*(q.float() for q in schedule.level(torch.tensor(i / 1000, dtype=f64)))) for i in (k, k + 1))
    z, y_hat = torch.randn(2, 3, 2, 4, 4, generator=seeded(seed))
    for kind, ours in (('DDPMScheduler', ancestral_step), ('DDIMScheduler', ddim_step)):
        scheduler = to_diffusers(schedule, PREDICTIONS[prediction], kind=kind)
        scheduler.set_timesteps(1000)
        theirs = scheduler.step(y_hat, k, z, generator=seeded(1)).prev_sample
        noise = torch.randn(z.shape, generator=seeded(1))
        torch.testing.assert_close(ours(network_denoiser(lambda z, u: y_hat, PREDICTIONS[prediction]), z, s, t, noise), theirs, atol=1e-3, rtol=1e-3)


def test_clipping_is_theirs_alone():
    "A clipped x̂ is another sample; where nothing is clipped, the option changes nothing."
    z, y_hat = torch.randn(2, 3, 1, 4, 4, generator=seeded(0)).clamp(-0.9, 0.9)
    for factor, same in ((1, True), (3, False)):
        plain, clipped = (to_diffusers('ddpm', 'x', clip_sample=clip, kind='DDIMScheduler') for clip in (False, True))
        for scheduler in (plain, clipped): scheduler.set_timesteps(1000)
        a, b = (s.step(factor * y_hat, 500, z).prev_sample for s in (plain, clipped))
        assert torch.equal(a, b) == same
        assert torch.equal(from_diffusers(clipped)[0]._levels, from_diffusers(plain)[0]._levels)
    thresholding = from_diffusers(diffusers.DDPMScheduler(thresholding=True, variance_type='fixed_large'))[0]
    assert torch.equal(thresholding._levels, from_diffusers(diffusers.DDPMScheduler())[0]._levels)


@pytest.mark.parametrize('name', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
@pytest.mark.parametrize('gamma', [0.5, 1., 5., 20.])
def test_min_snr_is_that_of_their_examples_since_6307(name, gamma):
    scheduler = diffusers.DDPMScheduler(beta_schedule=name)
    schedule, _ = from_diffusers(scheduler)
    i = times(1000)[5:]                                            # the first levels' SNR is inexact in float32, their weight is not tested
    snr = compute_snr(scheduler, torch.arange(5, 1000)).double()
    weight = torch.minimum(snr, torch.tensor(gamma, dtype=f64))
    for target, theirs in (('eps', weight / snr), ('v', weight / (snr + 1)), ('x', weight)):
        factor = DiffusionLoss(schedule, target, f'min_snr(gamma={gamma})').factor(i)
        torch.testing.assert_close(factor, theirs, rtol=1e-3, atol=0)
        for wrong in (weight / snr + 1, torch.minimum(snr + 1, torch.tensor(gamma, dtype=f64)) / (snr + 1)):   # v before #5238, and until #6307
            if target == 'v': assert (wrong / factor).max() / (wrong / factor).min() > 1.5                      # not the same up to a constant either


@pytest.mark.parametrize('prediction', PREDICTIONS)
def test_whole_runs_are_the_same(prediction):
    "20 steps of DDIM from one prior draw, a network of random weights."
    unet = tiny()
    schedule, target = from_diffusers(diffusers.DDIMScheduler(beta_schedule='scaled_linear', prediction_type=prediction), logsnr_max=math.inf)
    scheduler = to_diffusers(schedule, target, kind='DDIMScheduler')
    scheduler.set_timesteps(20)
    z = torch.randn(3, 1, 8, 8, generator=seeded(0))
    for k in scheduler.timesteps:
        with torch.no_grad(): z = scheduler.step(unet(z, k).sample, k, z).prev_sample
    *_, (_, _, ours) = sampling(network_denoiser(as_network(unet, schedule), target), (3, 1, 8, 8), 20, schedule, 'ddim', seeded(0))
    torch.testing.assert_close(ours, z, atol=1e-3 * z.abs().max().item(), rtol=0)


# --- networks

def tiny():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                                 down_block_types=('DownBlock2D',) * 2, up_block_types=('UpBlock2D',) * 2)


class Index(torch.nn.Module):
    "A network that answers with what it is told."
    def forward(self, sample, timestep): return type('Output', (), dict(sample=torch.zeros_like(sample) + torch.as_tensor(timestep).reshape(-1, *[1] * (sample.ndim - 1))))


@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('words', ['ddpm', 'ddpm(beta=cosine)', 'ddpm(beta=scaled_linear, beta_min=0.00085, beta_max=0.012)', 'ddpm(T=1)', 'discrete(schedule=linear)', 'discrete(T=4000)',
                                   'discrete(schedule=ve)', 'discrete(schedule=rectified_flow, T=50)'])
def test_a_network_is_told_the_index_of_each_level(words, dtype):
    schedule = DiffusionLoss(words, 'v').schedule
    t = times(schedule.T).to(dtype)
    k = predict(as_network(Index(), words), torch.zeros(schedule.T, 1, dtype=dtype), schedule.level(t))[:, 0]
    assert torch.equal(k, torch.arange(schedule.T).to(dtype))


def test_the_nearest_level_between_two_and_1000u_without_a_chain():
    chain = DDPMSchedule()
    u = network_time(chain.logsnr(times(1000)))
    net = as_network(Index(), chain)
    assert torch.equal(net.timestep(u[:-1] + 0.4 * u.diff()), torch.arange(999)) and torch.equal(net.timestep(u[:-1] + 0.6 * u.diff()), torch.arange(1, 1000))
    assert net.timestep(torch.tensor([0., 1.])).tolist() == [0, 999]
    for free in (as_network(Index()), as_network(Index(), 'cosine')): torch.testing.assert_close(free(torch.zeros(3, 1), torch.tensor([0.1, 0.5, 0.9]))[:, 0], torch.tensor([100., 500, 900]))


def test_a_network_goes_there_and_back_and_learns():
    unet, schedule = tiny(), DDPMSchedule(T=100, beta_max=0.1)
    net = as_network(unet, schedule)
    assert set(net.parameters()) == set(unet.parameters())
    loss, x = DiffusionLoss(schedule, 'v', 'min_snr'), torch.randn(8, 1, 8, 8, generator=seeded(0))
    loss(net, x, generator=seeded(0)).mean().backward()
    assert all(p.grad is not None for p in unet.parameters())
    k = torch.arange(8) * 12
    back = as_unet(net, schedule, (1, 8, 8))
    assert torch.equal(back(x, k).sample, unet(x, k).sample) and torch.equal(back(x, k, return_dict=False)[0], back(x, k).sample)
    assert torch.equal(back(x, 7).sample, unet(x, 7).sample) and torch.equal(back(x, torch.tensor(7.)).sample, unet(x, 7).sample)
    assert (back.dtype, back.device, back.config.in_channels, back.config.sample_size) == (torch.float32, torch.device('cpu'), 1, (8, 8))
    with pytest.raises(ValueError, match='whole timesteps, not 6.5'): back(x, 6.5)


def test_options_reach_the_network():
    class Labelled(Index):
        def forward(self, sample, timestep, class_labels): return type('Output', (), dict(sample=sample + class_labels))
    assert as_network(Labelled(), 'ddpm', class_labels=3.)(torch.zeros(2, 1), torch.tensor([0.5, 0.5])).tolist() == [[3.], [3.]]


def test_halved_networks_keep_their_timesteps():
    net = as_network(tiny(), 'ddpm').half()
    assert torch.equal(net.timestep(network_time(DDPMSchedule().logsnr(times(1000))).float()), torch.arange(1000))


def test_the_bound_of_their_network():
    "The other witness adds up the T levels by hand, with diffusers' noisy data and its ε̂ of a velocity."
    class Linear(torch.nn.Module):
        def forward(self, sample, timestep): return type('Output', (), dict(sample=0.3 * sample + 0.5 * timestep.reshape(-1, 1)))
    scheduler, net, x, g = ddpm([0.2, 0.3, 0.4, 0.5], 'v_prediction'), Linear(), torch.tensor([[0.5, -1.], [1.5, 0.3]]), seeded(0)
    schedule, target = from_diffusers(scheduler, logsnr_max=3.)
    total, draws, snr = 0., 3000, scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    for k in range(4):
        eps, ks = torch.randn(draws, 2, 2, generator=g), torch.full((draws,), k)
        for n in range(2):
            z = scheduler.add_noise(x[n].expand(draws, 2), eps[:, n], ks)
            a = scheduler.alphas_cumprod[k]
            eps_hat = (1 - a)**0.5 * z + a**0.5 * net(z, ks).sample
            before = math.exp(3.) if k == 0 else snr[k - 1].item()
            total += 0.5 * (before / snr[k].item() - 1) * (eps[:, n] - eps_hat).square().sum(1).mean().item() / 2
    bound = nelbo(network_denoiser(as_network(net, schedule), target), x.repeat(200, 1), schedule, draws=100)
    assert abs(bound.diffusion.mean().item() / total - 1) < 0.03, (bound.diffusion.mean().item(), total)


# --- what has no counterpart

@pytest.mark.parametrize('kind', ['DDPMScheduler', 'DDIMScheduler', 'EulerDiscreteScheduler'])
def test_zero_terminal_snr_is_refused_and_the_advice_works(kind):
    scheduler = getattr(diffusers, kind)(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r'no signal \(zero terminal SNR\).*BetasSchedule\(scheduler.betas\[:-1\]\)'): from_diffusers(scheduler)
    rest = BetasSchedule(scheduler.betas[:-1])
    torch.testing.assert_close(rest.alpha(times(999)).float()[:900]**2, scheduler.alphas_cumprod[:900], rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match='beta_1000 of 1000 is 1'): BetasSchedule(scheduler.betas)


def test_no_advice_where_the_betas_are_not_the_levels():
    with pytest.raises(ValueError, match='zero terminal SNR') as e: from_diffusers(diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True))
    assert 'BetasSchedule' not in str(e.value)


def test_a_subclass_is_taken_by_its_own_betas():
    class Constant(DDPMSchedule):
        @property
        def betas(self): return torch.full((self.T,), 0.1, dtype=f64)
    torch.testing.assert_close(to_diffusers(Constant(T=20)).betas, torch.full((20,), 0.1))


@pytest.mark.parametrize('bad, message', [
    (lambda: diffusers.DDPMScheduler(prediction_type='vpred'), "unknown prediction_type 'vpred'.*'v_prediction'"),
    (lambda: diffusers.EDMEulerScheduler(), 'no chain of noise levels'),
    (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction'), 'no chain of noise levels'),
    (lambda: ddpm([0.1, 0., 0.2]), 'strictly between 0 and 1, but beta_2 of 3 is 0'),
    (lambda: ddpm([0.1, 0.5, 1.]), 'zero terminal SNR'),
    (lambda: ddpm([1e-7, 0.1]), 'logsnr_max must be above')])
def test_schedulers_that_say_something_else(bad, message):
    with pytest.raises(ValueError, match=message): from_diffusers(bad())


@pytest.mark.parametrize('bad', [None, 'DDPMScheduler', diffusers.DDPMScheduler, torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD([torch.ones(1)], 1), lambda i: 1.), tiny()])
def test_schedulers_of_another_kind(bad):
    with pytest.raises(TypeError, match='expected a scheduler of diffusers, not a'): from_diffusers(bad)


@pytest.mark.parametrize('args, error, message', [
    (('ve',), ValueError, 'does not preserve variance'), (('edm_sample',), ValueError, 'does not preserve variance'), (('rectified_flow',), ValueError, 'does not preserve variance'),
    (('discrete(schedule=ve)',), ValueError, 'does not preserve variance'), (('adaptive',), ValueError, 'moves as it learns'),
    (('cosine', 'score'), ValueError, "no prediction_type for the target 'score'"), (('cosine', 'F'), ValueError, "no prediction_type for the target 'F'"),
    (('cosin',), ValueError, "Did you mean 'cosine'"), ((3,), TypeError, 'schedule must be'), (('ddpm', 'eps', 50), ValueError, '1000 levels of its own, not T = 50'),
    (('cosine', 'eps', 0), ValueError, 'T must be'), (('cosine', 'eps', 2.5), ValueError, 'T must be a whole number'),
    (('cosine', 'eps', 10, 'DDPM'), ValueError, "unknown kind of scheduler 'DDPM'"), (('cosine', 'eps', 10, 'EDMEulerScheduler'), ValueError, 'unknown kind'),
    (('cosine', 'eps', 10, diffusers.EDMEulerScheduler), ValueError, 'takes no betas'), (('cosine', 'eps', 10, torch.nn.Linear), TypeError, 'kind must be'),
    (('ddpm(beta_min=1e-9, logsnr_max=40)',), ValueError, 'float32 cannot tell apart'), (('cosine(-20, 12.9)', 'v', 1), ValueError, 'pure noise in diffusers'), (('cosine(-inf, 12.9)', 'v', 10), ValueError, 'finite range')])
def test_what_diffusers_cannot_have(args, error, message):
    with pytest.raises(error, match=message): to_diffusers(*args)


def test_the_way_out_that_is_named_is_one():
    with pytest.raises(ValueError) as e: to_diffusers('ve')
    words = str(e.value).split("to_diffusers('")[1].split("'")[0]
    schedule, back = DiffusionLoss(words, 'v').schedule, from_diffusers(to_diffusers(words, 'v'))[0]
    assert schedule.logsnr_min == SCHEDULES['ve']().logsnr_min and abs(back.logsnr_min - schedule.logsnr_min) < 1e-4


@pytest.mark.parametrize('bad', [[], [[0.1]], [0.], [1.], [-0.1], [0.1, math.nan], torch.tensor(0.1), [1.5]])
def test_betas_that_are_none(bad):
    with pytest.raises(ValueError, match='beta'): BetasSchedule(bad)
    for worse in ('linear', None, {}): pytest.raises(TypeError, BetasSchedule, worse)


def test_betas_at_the_ends():
    assert BetasSchedule([1e-12], logsnr_max=40.).logsnr_min == pytest.approx(-math.log(1e-12), abs=1e-3)
    assert BetasSchedule([1 - 1e-9]).logsnr_min == pytest.approx(math.log(1e-9), abs=1e-3)
    assert BetasSchedule([0.5], logsnr_max=math.inf).level(torch.tensor(0.)).sigma == 0
    assert torch.equal(BetasSchedule(torch.tensor([0.1, 0.2])).betas.float(), torch.tensor([0.1, 0.2]))
    assert BetasSchedule([0.1, 0.2]).betas.tolist() == [0.1, 0.2]                    # floats keep their digits
    assert 'T=2' in repr(BetasSchedule([0.1, 0.2])) and len(repr(BetasSchedule([0.1] * 50))) < 200


@pytest.mark.parametrize('net, schedule, shape, message', [(Index(), 'cosine', (1, 8, 8), 'no timesteps'), (Index(), 'ddpm', (1, 0, 8), 'shape must be'), (Index(), 'dpm', (1, 8, 8), 'unknown schedule')])
def test_networks_without_timesteps(net, schedule, shape, message):
    with pytest.raises(ValueError, match=message): as_unet(net, schedule, shape)


# --- an extra

def test_without_diffusers_the_error_names_the_extra():
    scheduler = diffusers.DDPMScheduler()
    with patch.dict(sys.modules, diffusers=None):
        for need in (lambda: from_diffusers(scheduler), lambda: to_diffusers(), lambda: to_diffusers('cosin')):
            with pytest.raises(ImportError, match=r"pip install 'lfdm\[diffusers\]'"): need()


def test_import_needs_no_diffusers():
    code = "import sys; sys.modules['diffusers'] = None; from lfdm.interop import *; BetasSchedule([0.1]); as_network(None, 'ddpm'); as_unet(None, 'ddpm', (1, 2, 2)); print('diffusers' in str(sys.modules.get('diffusers')))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'False\n', done.stderr
