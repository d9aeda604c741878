"Attempts to break lfdm.sampling: few steps, odd chunks, bad choices, ends of the noise range; the exact denoiser reaches the exact distribution."
import math
import re

import pytest
import torch

from lfdm.networks import MLP
from lfdm.sampling import sample, sampling
from lfdm.steps import SAMPLERS, ancestral_step, ddim_step, exact_denoiser, network_denoiser
from lfdm.schedules import SCHEDULES

torch.set_num_threads(1)
both = pytest.mark.parametrize('sampler', ['ancestral', 'ddim'])
every_schedule = pytest.mark.parametrize('schedule', ['cosine', 'linear', 've'])


class Gaussian:
    "One Gaussian: its posterior mean in one line."
    def __init__(self, mean=2., std=.5): self.mean, self.std = mean, std
    def denoise(self, z, alpha, sigma): return (sigma**2 * self.mean + alpha * self.std**2 * z) / (alpha**2 * self.std**2 + sigma**2)

exact = exact_denoiser(Gaussian())


def refuse(z, level): raise AssertionError('work before the choices were checked')


def generator(seed=0): return torch.Generator().manual_seed(seed)


def states(denoiser=exact, shape=(6, 2), **kw):
    kw = {'steps': 5, 'generator': generator()} | kw
    return list(sampling(denoiser, shape, **kw))


# ---- the distribution

@every_schedule
def test_ancestral_sampling_reaches_the_distribution_as_the_steps_grow(schedule):
    n, gaps = 20_000, {}
    for steps in (4, 32, 256):
        x = sample(exact, n, 2, steps, schedule, 'ancestral', seed=steps, chunk=n).double()
        gaps[steps] = abs(x.var(0).mean().item() / .25 - 1)
        mean = x.mean(0)
    assert gaps[4] > 2 * gaps[32] > 4 * gaps[256] or gaps[256] < 4 / n**.5
    assert gaps[4] > .1                                       # few steps are visibly wrong, so the test can see
    assert gaps[256] < 2 / 256 * 12.9 + 4 * n**-.5             # first order in the step of λ
    assert (mean - 2).abs().max() < .02 + 4 * .5 * n**-.5      # the prior forgets the mean but for α at t = 1
    skew = ((x - 2) / .5).pow(3).mean().item()
    assert abs(skew) < .2


@every_schedule
def test_ddim_maps_the_prior_as_the_probability_flow_does(schedule):
    "for a Gaussian: the standardized value stays the same along the flow"
    d, s = Gaussian(), SCHEDULES[schedule]()
    path = states(shape=(50, 2), steps=2000, schedule=schedule, sampler='ddim', dtype=torch.float64)
    standard = lambda level, z: (z - level.alpha * d.mean) / (level.alpha**2 * d.std**2 + level.sigma**2)**.5
    (_, first, z1), (_, end, z0) = path[0], path[-1]
    torch.testing.assert_close(standard(end, z0), standard(first, z1), atol=.01, rtol=0)
    assert end.logsnr.item() == pytest.approx(s.logsnr_max) and first.logsnr.item() == pytest.approx(s.logsnr_min)


def test_a_single_step_is_the_guess():
    for sampler in ('ancestral', 'ddim', 'dpmpp_2m'):   # those that remix it
        (_, t, prior), (_, s, z) = states(steps=1, sampler=sampler, dtype=torch.float64)
        torch.testing.assert_close(z, exact(prior, t)[0], atol=.02, rtol=0)


# ---- states

@both
@every_schedule
def test_the_states_go_down_the_schedule(sampler, schedule):
    s = SCHEDULES[schedule]()
    path = states(schedule=schedule, sampler=sampler, steps=7)
    assert [i for i, _, _ in path] == list(range(8))
    torch.testing.assert_close(torch.stack([l.logsnr for _, l, _ in path]), s.logsnr(torch.linspace(1, 0, 8).double()).float())
    assert all(z.shape == (6, 2) and z.dtype == torch.float32 and z.isfinite().all() for _, _, z in path)
    assert len({z.data_ptr() for _, _, z in path}) == 8       # no state is overwritten by the next


def test_the_prior_has_the_scale_of_the_noise():
    for schedule in SCHEDULES.values():
        (_, level, z), *_ = states(shape=(20_000, 2), steps=1, schedule=schedule)
        assert z.std().item() == pytest.approx(float(level.alpha**2 + level.sigma**2)**.5, rel=.02)


def test_steps_are_pure():
    z, noise = torch.randn(4, 2, generator=generator()), torch.randn(4, 2, generator=generator(1))
    s, t = (SCHEDULES['cosine']().level(torch.tensor(u)) for u in (.4, .5))
    for step in (ancestral_step, ddim_step):
        before = z.clone(), noise.clone()
        assert torch.equal(step(exact, z, s, t, noise), step(exact, z, s, t, noise))
        assert torch.equal(z, before[0]) and torch.equal(noise, before[1])


def test_other_shapes_and_types():
    for shape in ((0, 2), (1, 1), (3, 5), (2, 3, 4, 4)):
        *_, (_, _, z) = states(shape=shape, dtype=torch.float64)
        assert z.shape == shape and z.dtype == torch.float64


# ---- randomness

@both
def test_same_seed_same_samples(sampler):
    a, b, c = (sample(exact, 9, steps=4, sampler=sampler, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b) and not torch.equal(a, c)


@both
def test_the_global_random_state_is_neither_read_nor_changed(sampler):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed); before = torch.get_rng_state()
        results.append(sample(exact, 9, steps=4, sampler=sampler))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


def test_only_the_prior_decides_in_ddim():
    ends = {}
    for sampler in SAMPLERS:
        for later in (1, 2):
            g = generator(0)
            for i, level, z in sampling(exact, (6, 2), 5, sampler=sampler, generator=g):
                if i == 0: g.manual_seed(later)
            ends[sampler, later] = z
    assert torch.equal(ends['ddim', 1], ends['ddim', 2])
    assert not torch.equal(ends['ancestral', 1], ends['ancestral', 2])


# ---- chunks

@both
@pytest.mark.parametrize('n, chunk', [(1, 2000), (1, 1), (5, 2), (6, 2), (7, 100), (5., 2.)])
def test_chunks(n, chunk, sampler):
    calls, sizes = [], []
    def denoiser(z, level): sizes.append(len(z)); return exact(z, level)
    x = sample(denoiser, n, steps=3, sampler=sampler, chunk=chunk, progress=lambda *a: calls.append(a))
    assert x.shape == (n, 2) and x.isfinite().all() and len(x.unique(dim=0)) == n
    assert sizes[::3] == [int(min(chunk, n - i)) for i in range(0, int(n), int(chunk))]
    assert calls == [(i + 1, len(sizes)) for i in range(len(sizes))]


@both
def test_a_chunk_larger_than_n_changes_nothing(sampler):
    assert torch.equal(sample(exact, 5, steps=3, chunk=5, sampler=sampler), sample(exact, 5, steps=3, chunk=10**9, sampler=sampler))


# ---- the ends of the noise range

@both
@pytest.mark.parametrize('target', ['v', 'x'])
def test_the_uncut_cosine_schedule_works_with_a_target_defined_everywhere(target, sampler):
    uncut = SCHEDULES['cosine'](-math.inf, math.inf)
    denoiser = network_denoiser(MLP(2, 8), target)
    path = states(denoiser, schedule=uncut, sampler=sampler)
    assert path[0][1].logsnr == -math.inf and path[-1][1].logsnr == math.inf
    assert all(z.isfinite().all() for _, _, z in path)
    torch.testing.assert_close(path[-1][2], denoiser(path[-2][2], path[-2][1])[0].detach())   # nothing is added where σ = 0


@both
@pytest.mark.parametrize('target', ['eps', 'score'])
def test_no_clamp_where_alpha_is_zero(target, sampler):
    uncut = SCHEDULES['cosine'](-math.inf, math.inf)
    with pytest.raises(ZeroDivisionError, match="alpha = 0.*'v'"): states(network_denoiser(MLP(2, 8), target), schedule=uncut, sampler=sampler)


@both
@every_schedule
@pytest.mark.parametrize('target', ['x', 'eps', 'v', 'score'])
def test_an_untrained_network_gives_finite_samples(target, schedule, sampler):
    assert sample(network_denoiser(MLP(2, 8), target), 3, steps=9, schedule=schedule, sampler=sampler).isfinite().all()


# ---- what goes wrong

@both
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_denoiser_that_stops_being_finite(bad, sampler):
    calls = []
    def denoiser(z, level):
        calls.append(level); x, eps = exact(z, level)
        if len(calls) == 3: x = x.clone(); x[4, 1] = bad
        return x, eps
    with pytest.raises(FloatingPointError) as e: states(denoiser, sampler=sampler)
    at = SCHEDULES['cosine']().logsnr(torch.tensor(1 - 3 / 5, dtype=torch.float64))
    assert 'step 3 of 5' in str(e.value) and f'logsnr {at:.4g}' in str(e.value) and len(calls) == 3


@pytest.mark.parametrize('choice, message', [
    ({'sampler': 'dim'}, "unknown sampler 'dim'. Did you mean 'ddim'?"), ({'sampler': 'DDIM'}, "Did you mean 'ddim'?"),
    ({'sampler': None}, 'unknown sampler None'), ({'sampler': ''}, "unknown sampler ''"), ({'sampler': ['ddim']}, 'unknown sampler'),
    ({'schedule': 'cosin'}, "unknown schedule 'cosin'. Did you mean 'cosine'?"), ({'schedule': None}, 'schedule must be a name'),
    ({'steps': 0}, 'steps must be at least 1, not 0'), ({'steps': -3}, 'steps must'), ({'steps': 2.5}, 'steps must be a whole number, not 2.5'),
    ({'steps': 'true'}, "steps must be a whole number, not 'true'"), ({'steps': True}, 'steps must'), ({'steps': None}, 'steps must'),
    ({'steps': math.nan}, 'steps must'), ({'steps': math.inf}, 'steps must'), ({'steps': 10**400}, 'steps must')])
def test_bad_choices_come_before_any_work(choice, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)): sampling(refuse, (6, 2), **choice)   # not even iterated
    with pytest.raises((ValueError, TypeError), match=re.escape(message)): sample(refuse, 6, **choice)


@pytest.mark.parametrize('choice, message', [
    *(({name: bad}, f'{name} must') for name in ('n', 'chunk', 'dim') for bad in (0, -1, 1.5, math.nan, math.inf, '3', True, None, 10**400)),
    *(({'seed': bad}, 'seed must') for bad in (.5, '0', None, True, math.nan, 2**64, 10**400))])
def test_bad_numbers_come_before_any_work(choice, message):
    with pytest.raises((ValueError, TypeError), match=message): sample(refuse, **{'n': 6} | choice)


def test_steps_may_be_a_whole_float():
    assert len(states(steps=1e1)) == 11


def test_a_network_of_the_wrong_shape_is_refused():
    "(n, 1) and (n,) with n = D = 2 broadcast silently"
    for shape in ((2, 1), (2,), (1, 2), (3, 2)):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            states(network_denoiser(lambda z, u: torch.zeros(shape), 'v'), shape=(2, 2))


def test_an_unknown_target_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown target 'epsilon'.*Did you mean 'eps'"): network_denoiser(MLP(2, 8), 'epsilon')


@pytest.mark.parametrize('device', ['cdu', '', 3.5])
def test_an_unknown_device_is_refused(device):
    with pytest.raises((ValueError, TypeError, RuntimeError), match='(?i)device'): sample(refuse, 3, device=device)


def test_a_chain_is_sampled_level_by_level_down_to_its_clean_end():
    "T steps of a chain of T levels visit each of them; fewer skip, more wait; t = 0 is λ_0 and not the first level"
    for schedule in (SCHEDULES['ddpm'](T=20, beta_min=0.01, beta_max=0.5), SCHEDULES['discrete'](schedule='rectified_flow(-9, 9)', T=20)):
        for steps in (20, 7, 33):
            path = states(schedule=schedule, steps=steps, sampler='ddim', dtype=torch.float64)
            levels = torch.stack([level.logsnr for _, level, _ in path])
            assert set(levels.tolist()) <= set(schedule._levels.tolist()) and (levels.diff() >= 0).all()
            assert levels[0] == schedule.logsnr_min and levels[-1] == schedule.logsnr_max
            if steps == 20: assert torch.equal(levels.flip(0), schedule._levels)
            if steps == 33: assert len(levels.unique()) == 21 and all(torch.equal(a[2], b[2]) or not torch.equal(a[1].logsnr, b[1].logsnr) or torch.allclose(a[2], b[2], rtol=1e-9) for a, b in zip(path, path[1:]))


def test_ancestral_sampling_of_ddpm_is_its_own_algorithm():
    "x_{i-1} = (x_i - β_i/√(1-ᾱ_i) ε̂)/√α_i + √β̃_i ξ, Ho et al., algorithm 2, step by step from the same noise, down to the data themselves"
    s = SCHEDULES['ddpm'](T=20, beta_min=0.01, beta_max=0.5, logsnr_max=math.inf)
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - s.betas, 0)])
    path = states(schedule=s, steps=20, dtype=torch.float64, generator=generator(3))
    g = generator(3)
    torch.randn(6, 2, generator=g, dtype=torch.float64)
    for i, (_, level, x), (_, _, after) in zip(range(20, 0, -1), path, path[1:]):
        xi, beta = torch.randn(6, 2, generator=g, dtype=torch.float64), s.betas[i - 1]
        eps = exact(x, level)[1]
        tilde = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta
        torch.testing.assert_close(after, (x - beta / (1 - alpha_bar[i]).sqrt() * eps) / (1 - beta).sqrt() + tilde.sqrt() * xi, rtol=1e-7, atol=1e-9)
