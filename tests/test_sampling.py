"Attempts to break lfdm.sampling: few steps, odd chunks, bad choices, ends of the noise range, many networks."
import math
import re
from functools import partial

import pytest
import torch

from gaussians import exact, f64, gaussian, generator, refuse, states
from lfdm.core import from_spec
from lfdm.networks import MLP, StackedMLP
from lfdm.sampling import checked_schedule, sample, sample_stack, sampling
from lfdm.schedules import SCHEDULES
from lfdm.steps import SAMPLERS, Counted, ddim_step, network_denoiser

every = pytest.mark.parametrize("sampler", SAMPLERS)
both = pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
every_schedule = pytest.mark.parametrize("schedule", ["cosine", "linear", "ve"])
UNCUT = SCHEDULES["cosine"](-math.inf, math.inf)


# ---- the distribution

@every_schedule
def test_ancestral_sampling_reaches_the_distribution_as_the_steps_grow(schedule):
    n, gaps = 20_000, {}
    for steps in (4, 32, 256):
        x = sample(exact, n, 2, steps, schedule, "ancestral", seed=steps, chunk=n).double()
        gaps[steps] = abs(x.var(0).mean().item() / .25 - 1)
    assert gaps[4] > 2 * gaps[32] > 4 * gaps[256] or gaps[256] < 4 / n**.5
    assert gaps[4] > .1                                             # few steps are visibly wrong
    assert gaps[256] < 2 / 256 * 12.9 + 4 * n**-.5                  # first order in the step of λ
    assert (x.mean(0) - 2).abs().max() < .02 + 4 * .5 * n**-.5      # the prior forgets all but α at t = 1
    assert abs(((x - 2) / .5).pow(3).mean().item()) < .2


@every_schedule
def test_ddim_maps_the_prior_as_the_probability_flow_does(schedule):
    "for a Gaussian: the standardized value stays the same along the flow"
    def standard(level, z):
        mean, variance = gaussian.moments(level)
        return (z - mean) / variance**.5
    path = states(shape=(50, 2), steps=2000, schedule=schedule, sampler="ddim", dtype=f64)
    (_, first, z1), (_, end, z0) = path[0], path[-1]
    torch.testing.assert_close(standard(end, z0), standard(first, z1), atol=.01, rtol=0)


def test_a_single_step_is_the_guess():
    for sampler in ("ancestral", "ddim", "dpmpp_2m"):   # those that remix it
        (_, t, prior), (_, s, z) = states(steps=1, sampler=sampler, dtype=f64)
        torch.testing.assert_close(z, exact(prior, t)[0], atol=.02, rtol=0)


# ---- states

@both
@every_schedule
def test_the_states_go_down_the_schedule(sampler, schedule):
    path = states(schedule=schedule, sampler=sampler, steps=7.)
    expected = SCHEDULES[schedule]().logsnr(torch.linspace(1, 0, 8).double()).float()
    assert [i for i, _, _ in path] == list(range(8))
    torch.testing.assert_close(torch.stack([l.logsnr for _, l, _ in path]), expected)
    assert all(z.shape == (6, 2) and z.dtype == torch.float32 and z.isfinite().all() for _, _, z in path)
    assert len({z.data_ptr() for _, _, z in path}) == 8       # no state is overwritten by the next


def test_the_prior_has_the_scale_of_the_noise():
    for schedule in SCHEDULES.values():
        (_, level, z), *_ = states(shape=(20_000, 2), steps=1, schedule=schedule)
        assert z.std().item() == pytest.approx(level.scale.item(), rel=.02)


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (3, 5), (2, 3, 4, 4)])
def test_other_shapes_and_types(shape):
    *_, (_, _, z) = states(shape=shape, dtype=f64)
    assert z.shape == shape and z.dtype == f64


def test_a_chain_is_sampled_level_by_level_down_to_its_clean_end():
    "T steps of a chain of T levels visit each; fewer skip, more wait; t = 0 is λ_0 and not the first level"
    ddpm = SCHEDULES["ddpm"](T=20, beta_min=0.01, beta_max=0.5)
    for schedule in (ddpm, SCHEDULES["discrete"](schedule="rectified_flow(-9, 9)", T=20)):
        for steps in (20, 7, 33):
            path = states(schedule=schedule, steps=steps, sampler="ddim", dtype=f64)
            levels = torch.stack([level.logsnr for _, level, _ in path])
            assert set(levels.tolist()) <= set(schedule._levels.tolist()) and (levels.diff() >= 0).all()
            assert levels[0] == schedule.logsnr_min and levels[-1] == schedule.logsnr_max
            if steps == 20: assert torch.equal(levels.flip(0), schedule._levels)
            if steps == 33: assert len(levels.unique()) == 21
            for (_, t, a), (_, s, b) in zip(path, path[1:]):
                if t.logsnr == s.logsnr: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_ancestral_sampling_of_ddpm_is_its_own_algorithm():
    "x_{i-1} = (x_i - β_i/√(1-ᾱ_i) ε̂)/√α_i + √β̃_i ξ: Ho et al., algorithm 2, down to the data"
    s = SCHEDULES["ddpm"](T=20, beta_min=0.01, beta_max=0.5, logsnr_max=math.inf)
    alpha_bar = torch.cat([torch.ones(1, dtype=f64), torch.cumprod(1 - s.betas, 0)])
    path, g = states(schedule=s, steps=20, dtype=f64), generator()
    torch.randn(6, 2, generator=g, dtype=f64)
    for i, (_, level, x), (_, _, after) in zip(range(20, 0, -1), path, path[1:]):
        xi, beta = torch.randn(6, 2, generator=g, dtype=f64), s.betas[i - 1]
        mean = (x - beta / (1 - alpha_bar[i]).sqrt() * exact(x, level)[1]) / (1 - beta).sqrt()
        tilde = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * beta
        torch.testing.assert_close(after, mean + tilde.sqrt() * xi, rtol=1e-7, atol=1e-9)


# ---- randomness

@every
def test_samples_follow_from_the_seed_alone(sampler):
    "and the prior alone decides where no step adds noise"
    results, ends = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(sample(exact, 5, steps=3, sampler=sampler, seed=3))
        assert torch.equal(torch.get_rng_state(), before)
        g = generator()
        for i, _, z in sampling(exact, (6, 2), 5, sampler=sampler, generator=g):
            if i == 0: g.manual_seed(seed)
        ends.append(z)
    assert torch.equal(*results)
    assert not torch.equal(results[0], sample(exact, 5, steps=3, sampler=sampler, seed=4))
    assert torch.equal(*ends) == (sampler in ("ddim", "euler", "heun", "adaptive", "dpmpp_2m"))


# ---- chunks

@both
@pytest.mark.parametrize("n, chunk", [(1, 2000), (1, 1), (5, 2), (6, 2), (7, 100), (5., 2.)])
def test_chunks(n, chunk, sampler):
    calls, sizes = [], []
    def denoiser(z, level): sizes.append(len(z)); return exact(z, level)
    x = sample(denoiser, n, steps=3, sampler=sampler, chunk=chunk, progress=lambda *a: calls.append(a))
    assert x.shape == (n, 2) and x.isfinite().all() and len(x.unique(dim=0)) == n
    assert sizes[::3] == [int(min(chunk, n - i)) for i in range(0, int(n), int(chunk))]
    assert calls == [(i + 1, len(sizes)) for i in range(len(sizes))]


def test_two_step_memory_does_not_pass_from_chunk_to_chunk():
    g = generator()
    alone = [list(sampling(exact, (4, 2), 6, sampler="dpmpp_2m", generator=g))[-1][2] for _ in range(2)]
    assert torch.equal(torch.cat(alone), sample(exact, 8, steps=6, sampler="dpmpp_2m", chunk=4))


# ---- what a step is told

@every
def test_a_name_its_function_and_a_partial_of_it_are_one(sampler):
    step = SAMPLERS[sampler]
    a, b, c = (sample(exact, 5, steps=4, sampler=s) for s in (sampler, step, partial(step)))
    assert torch.equal(a, b) and torch.equal(a, c)


def test_a_step_is_told_what_it_asks_for_and_nothing_else():
    told = []
    def asks(denoiser, z, s, t, noise, before, steps=None):
        told.append((before, steps))
        denoiser(z + 1, s)                                      # its first guess, at another place
        return ddim_step(denoiser, z, s, t)
    path = states(steps=4, sampler=asks)
    assert [steps for _, steps in told] == [4] * 4 and told[0][0] is None
    for (l, guess), (_, _, z), (_, s, _) in zip([before for before, _ in told[1:]], path, path[1:]):
        assert all(map(torch.equal, l, s))                      # the level of the guess, here not the state's
        torch.testing.assert_close(guess, exact(z + 1, s))
    def asks_nothing(denoiser, z, s, t, noise): return ddim_step(denoiser, z, s, t)
    def takes_all(denoiser, z, s, t, noise, **kw): assert not kw; return ddim_step(denoiser, z, s, t)
    plain = sample(exact, 3, steps=4, sampler="ddim")
    for step in (asks_nothing, takes_all): assert torch.equal(sample(exact, 3, steps=4, sampler=step), plain)


# ---- the range of the training

def test_what_a_network_knows_is_honoured_whatever_wraps_it():
    net = network_denoiser(refuse, "eps", within=(-5., 5.))
    says = "leaves the range of the training, -5 to 5"
    for denoiser in (net, Counted(net), Counted(Counted(net))):
        for schedule in ("cosine", SCHEDULES["ve"](-5.1, 5), SCHEDULES["ve"](-5, 5.1)):
            with pytest.raises(ValueError, match=says): checked_schedule(schedule, denoiser)
            with pytest.raises(ValueError, match=says): sampling(denoiser, (3, 2), 4, schedule)
            with pytest.raises(ValueError, match=says): sample(denoiser, 3, schedule=schedule)
        sampling(denoiser, (3, 2), 4, SCHEDULES["ve"](-5, 5))
    assert getattr(exact, "within", None) is None and Counted(exact).within is None
    assert type(checked_schedule("ve", exact)) is SCHEDULES["ve"]


CUT = [((-5, 5), SCHEDULES["ve"](-7, 7)), ((-5, 5), SCHEDULES["ve"](-7, 4)),
       ((-20., 5), SCHEDULES["linear"](-10, 7)),
       ((-20., 5), SCHEDULES["cosine"](-25, 7)), ((-5, 5), SCHEDULES["edm_sample"](rho=3)),
       ((-5, 5), SCHEDULES["discrete"](schedule="shifted_cosine(shift=1)", T=50)),
       ((-12, 9.5), SCHEDULES["ddpm"]()), ((-5, 5), SCHEDULES["adaptive"](bins=7)),
       ((-5, 5), SCHEDULES["logit_normal"](m=0.5))]

@pytest.mark.parametrize("within, schedule", CUT, ids=lambda v: str(v)[:20])
def test_the_advice_for_a_range_out_of_reach_is_one_that_works(within, schedule):
    "and keeps the options; the linear schedule does not reach below -10.05"
    net = network_denoiser(MLP(2, 8), "v", within=within)
    with pytest.raises(ValueError) as e: sampling(net, (3, 2), 4, schedule)
    advised = str(e.value).split("Choose '")[1].removesuffix("'.")
    assert len(list(sampling(net, (3, 2), 4, advised))) == 5
    advised = from_spec(SCHEDULES, advised, "schedule")
    ends = ("logsnr_min", "logsnr_max", "scales")
    def options(s): return {k: v for k, v in vars(s).items() if k[0] != "_" and k not in ends}
    assert type(advised) is type(schedule) and options(advised) == options(schedule)
    assert advised.logsnr_max == min(within[1], schedule.logsnr_max)


@pytest.mark.parametrize("within, schedule", [((-5, 5), "ddpm"), ((5, 6), SCHEDULES["ve"](-7, 4))], ids=str)
def test_a_range_that_cannot_be_cut(within, schedule):
    with pytest.raises(ValueError, match="cannot be cut to that range. Choose another."):
        sampling(network_denoiser(MLP(2, 8), "v", within=within), (3, 2), 4, schedule)


# ---- the ends of the noise range, and untrained networks

@both
@pytest.mark.parametrize("target", ["v", "x"])
def test_the_uncut_cosine_schedule_works_with_a_target_defined_everywhere(target, sampler):
    denoiser = network_denoiser(MLP(2, 8), target)
    path = states(denoiser, schedule=UNCUT, sampler=sampler)
    assert path[0][1].logsnr == -math.inf and path[-1][1].logsnr == math.inf
    assert all(z.isfinite().all() for _, _, z in path)
    guess = denoiser(path[-2][2], path[-2][1])[0].detach()   # nothing is added where σ = 0
    torch.testing.assert_close(path[-1][2], guess)


@both
@pytest.mark.parametrize("target", ["eps", "score"])
def test_no_clamp_where_alpha_is_zero(target, sampler):
    with pytest.raises(ZeroDivisionError, match="alpha = 0.*'v'"):
        states(network_denoiser(MLP(2, 8), target), schedule=UNCUT, sampler=sampler)


@every
@pytest.mark.parametrize("target", ["x", "eps", "v", "score"])
def test_an_untrained_network_gives_finite_samples_and_keeps_no_graph(sampler, target):
    torch.manual_seed(0)
    denoiser = network_denoiser(MLP(2, 8), target)
    for schedule in SCHEDULES:
        path = states(denoiser, (3, 2), schedule=schedule, sampler=sampler)
        assert path[-1][2].isfinite().all() and not any(z.requires_grad for _, _, z in path)


# ---- many networks

@every
def test_a_stack_gives_what_each_network_gives_alone(sampler):
    torch.manual_seed(1)
    nets, targets, seeds = [MLP(2, 8) for _ in range(3)], ["x", "eps", "v"], [5, 6, 7]
    how = dict(steps=6, schedule=SCHEDULES["cosine"](-6, 6), sampler=sampler, chunk=3)
    told, near = [], 2e-3 if sampler == "adaptive" else 1e-4
    how["progress"] = lambda *a: told.append(a)
    together = sample_stack(StackedMLP(nets), targets, 5, seeds=seeds, **how)
    del how["progress"]
    alone = [sample(network_denoiser(*pair), 5, seed=seed, **how)
             for *pair, seed in zip(nets, targets, seeds)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=near, atol=near)
    assert len(together.flatten().unique()) == 30 and told == [(i, 12) for i in range(1, 13)]


def test_a_stack_that_does_not_fit_together():
    stack = StackedMLP([MLP(2, 8)] * 2)
    with pytest.raises(ValueError, match="2 networks need as many targets, not 1"):
        sample_stack(stack, ["x"], 3)
    with pytest.raises(ValueError, match="2 networks need as many seeds, not 3"):
        sample_stack(stack, ["x"] * 2, 3, seeds=[1, 2, 3])


# ---- what goes wrong

@pytest.mark.parametrize("choice, message", [
    ({"sampler": "dim"}, "unknown sampler 'dim'. Did you mean 'ddim'?"),
    ({"sampler": "DDIM"}, "Did you mean 'ddim'?"),
    *(({"sampler": bad}, f"unknown sampler {bad!r}") for bad in (3, None, "", "dpm++", ["ddim"])),
    ({"schedule": "cosin"}, "unknown schedule 'cosin'. Did you mean 'cosine'?"),
    ({"schedule": None}, "schedule must be a name"),
    ({"steps": 0}, "steps must be at least 1, not 0"),
    ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
    *(({"steps": bad}, "steps must") for bad in (-3, "true", True, None, math.nan, math.inf, 10**400)),
], ids=str)
def test_bad_choices_come_before_any_work(choice, message):
    for f in (lambda **kw: sampling(refuse, (6, 2), **kw), partial(sample, refuse, 6)):   # not even iterated
        with pytest.raises((ValueError, TypeError), match=re.escape(message)): f(**choice)


BAD = [*((name, bad) for name in ("n", "chunk", "dim")
         for bad in (0, -1, 1.5, math.nan, math.inf, "3", True, None, 10**400)),
       *(("seed", bad) for bad in (.5, "0", None, True, math.nan, 2**64, 10**400))]

@pytest.mark.parametrize("name, bad", BAD, ids=lambda v: str(v)[:12])
def test_bad_numbers_come_before_any_work(name, bad):
    with pytest.raises((ValueError, TypeError), match=f"{name} must"):
        sample(refuse, **{"n": 6} | {name: bad})


@pytest.mark.parametrize("shape", [(2, 1), (2,), (1, 2), (3, 2)])
def test_a_network_of_the_wrong_shape_is_refused(shape):
    "(n, 1) and (n,) with n = D = 2 broadcast silently"
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        states(network_denoiser(lambda z, u: torch.zeros(shape), "v"), shape=(2, 2))


@pytest.mark.parametrize("device", ["cdu", "", 3.5])
def test_an_unknown_device_is_refused(device):
    with pytest.raises((ValueError, TypeError, RuntimeError), match="(?i)device"):
        sample(refuse, 3, device=device)
