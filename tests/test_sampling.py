"Attempts to break lfdm.sampling: few steps, odd chunks, bad choices, ends of the noise range, many networks."
import math
import re
from functools import partial

import pytest
import torch

from gaussians import exact, f64, generator, refuse, states
from lfdm.networks import MLP, StackedMLP
from lfdm.sampling import checked_schedule, sample, sample_stack, sampling, stack_denoiser
from lfdm.schedules import SCHEDULES
from lfdm.steps import SAMPLERS, Counted, ddim_step, network_denoiser
from lfdm.targets import TARGETS

every = pytest.mark.parametrize("sampler", SAMPLERS)


# ---- states

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_states_go_down_the_schedule(schedule):
    path = states(shape=(5000, 2), schedule=schedule, sampler="ddim", steps=7)
    expected = SCHEDULES[schedule]().logsnr(torch.linspace(1, 0, 8).double()).float()
    assert [i for i, _, _ in path] == list(range(8))
    torch.testing.assert_close(torch.stack([l.logsnr for _, l, _ in path]), expected)
    assert len({z.data_ptr() for _, _, z in path}) == 8       # no state is overwritten by the next
    _, level, prior = path[0]
    assert prior.std().item() == pytest.approx(level.scale.item(), rel=.03)


def test_a_chain_is_sampled_level_by_level_down_to_its_clean_end():
    "T steps of a chain of T levels visit each; fewer skip, more wait; t = 0 is λ_0 and not the first level"
    schedule = SCHEDULES["discrete"](schedule="rectified_flow(-9, 9)", T=20)
    for steps in (20, 7, 33):
        path = states(schedule=schedule, steps=steps, sampler="ddim", dtype=f64)
        levels = torch.stack([level.logsnr for _, level, _ in path])
        assert set(levels.tolist()) <= set(schedule._levels.tolist()) and (levels.diff() >= 0).all()
        assert (levels[0], levels[-1]) == (schedule.logsnr_min, schedule.logsnr_max)
        if steps >= 20: assert torch.equal(levels.unique(), schedule._levels.sort().values)


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
    ends, before = [], torch.get_rng_state()
    drawn = lambda seed: sample(exact, 5, steps=3, sampler=sampler, seed=seed)
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    for seed in (1, 2):
        g = generator()
        for i, _, z in sampling(exact, (6, 2), 5, sampler=sampler, generator=g):
            if i == 0: g.manual_seed(seed)
        ends.append(z)
    assert torch.equal(*ends) == (sampler in ("ddim", "euler", "heun", "adaptive", "dpmpp_2m"))
    assert torch.equal(torch.get_rng_state(), before)


# ---- chunks

@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m"])
@pytest.mark.parametrize("n, chunk", [(1, 2000), (5, 2)])
def test_chunks(n, chunk, sampler):
    "one after another from one stream, with no memory of the chunk before"
    calls, g, sizes = [], generator(), [min(chunk, n - i) for i in range(0, n, chunk)]
    x = sample(exact, n, (2, 3), 3, sampler=sampler, chunk=chunk, progress=lambda *a: calls.append(a))
    alone = [list(sampling(exact, (m, 2, 3), 3, sampler=sampler, generator=g))[-1][2] for m in sizes]
    assert torch.equal(x, torch.cat(alone)) and len(x.unique(dim=0)) == n
    assert calls == [(i + 1, 3 * len(sizes)) for i in range(3 * len(sizes))]


# ---- what a step is told

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
    def takes_all(denoiser, z, s, t, noise, **kw): assert not kw; return ddim_step(denoiser, z, s, t)
    bound = partial(SAMPLERS["dpmpp_2m"], before=None)   # which is DDIM
    ddim, *same = (sample(exact, 3, steps=4, sampler=step) for step in ("ddim", takes_all, bound))
    for x in same: torch.testing.assert_close(x, ddim)


# ---- the range of the training

def test_what_a_network_knows_is_honoured_whatever_wraps_it():
    net = network_denoiser(refuse, "eps", within=(-5., 5.))
    for denoiser in (net, Counted(Counted(net))):
        for ends in (-5.1, 5), (-5, 5.1):
            with pytest.raises(ValueError, match="leaves the range of the training, -5 to 5"):
                sampling(denoiser, (3, 2), 4, SCHEDULES["ve"](*ends))
        sampling(denoiser, (3, 2), 4, SCHEDULES["ve"](-5, 5))
    assert type(checked_schedule("ve", Counted(exact))) is SCHEDULES["ve"]


@pytest.mark.parametrize("within, schedule, kept", [
    ((-20., 5.), "linear(-10, 7)", "linear("), ((-5., 5.), "edm_sample(rho=3)", "rho=3"),
    ((-5., 5.), "discrete(schedule=shifted_cosine(shift=1), T=50)", "T=50")])
def test_the_advice_for_a_range_out_of_reach_is_one_that_works(within, schedule, kept):
    "and keeps the options; the linear schedule does not reach below -10.05"
    asked = lambda schedule: sampling(network_denoiser(refuse, "v", within), (3, 2), 4, schedule)
    with pytest.raises(ValueError) as e: asked(schedule)
    advised = str(e.value).split("Choose '")[1].removesuffix("'.")
    assert kept in advised and asked(advised)
    with pytest.raises(ValueError, match="cannot be cut to that range"): asked("ddpm(beta_max=0.01)")


# ---- ranges without end, and 16 bits

@every
@pytest.mark.parametrize("ends", [(-math.inf, 5.), (-5., math.inf), (-math.inf, math.inf)], ids=str)
def test_a_range_without_end_is_sampled_or_refused_before_any_work(sampler, ends):
    "a network that predicts the noise does not know the data at α = 0; of the data, the noise at σ = 0"
    s = SCHEDULES["cosine"](*ends)
    for target in TARGETS:
        torch.manual_seed(0)
        denoiser = Counted(network_denoiser(MLP(2, 8), target))
        try: states = sampling(denoiser, (3, 2), 5, s, sampler)
        except ValueError as e:
            assert re.match("logsnr_m(in|ax) must be finite", str(e))
            assert target not in ("v", "F") or sampler not in ("ancestral", "ddim", "heun", "dpmpp_2m")
        else:
            assert denoiser.evaluations == 0
            *_, (_, level, z) = states
            assert z.isfinite().all() and level.logsnr == ends[1]


@every
def test_16_bits_are_sampled_in_float32(sampler):
    "with levels that 16 bits do not tell apart"
    steps = 20 if sampler == "adaptive" else 300
    how = dict(schedule=SCHEDULES["cosine"](-7, 7), sampler=sampler, steps=steps)
    exactly = states(dtype=torch.float32, **how)
    for dtype in (torch.bfloat16, torch.float16):
        for (*_, a), (*_, b) in zip(states(dtype=dtype, **how), exactly):
            assert a.dtype == dtype and torch.equal(a, b.to(dtype))


# ---- many networks

@every
def test_a_stack_gives_what_each_network_gives_alone(sampler):
    torch.manual_seed(1)
    nets, targets, seeds, told = [MLP(2, 8) for _ in range(3)], ["x", "eps", "v"], [5, 6, 7], []
    how = dict(steps=4, schedule=SCHEDULES["cosine"](-6, 6), sampler=sampler, chunk=3)
    note, near = lambda *a: told.append(a), 2e-3 if sampler == "adaptive" else 1e-4
    together = sample_stack(StackedMLP(nets), targets, 5, seeds=seeds, progress=note, **how)
    alone = [sample(network_denoiser(*pair), 5, seed=seed, **how)
             for *pair, seed in zip(nets, targets, seeds)]
    torch.testing.assert_close(together, torch.stack(alone), rtol=near, atol=near)
    assert len(together.flatten().unique()) == 30 and not together.requires_grad
    assert told == [(i, 8) for i in range(1, 9)]
    for wrong in dict(targets=["x"]), dict(seeds=[1, 2]):
        with pytest.raises(ValueError, match=f"3 networks need as many {[*wrong][0]}"):
            sample_stack(StackedMLP(nets), **dict(targets=targets, n=3) | wrong)


# ---- what goes wrong

@pytest.mark.parametrize("choice, message", [
    *((dict(sampler=bad), "unknown sampler") for bad in ("DDIM", ["ddim"])),
    (dict(schedule="cosin"), "unknown schedule"), (dict(seed=2**32), "seed must"),
    *(({name: 0}, f"{name} must") for name in ("n", "steps", "chunk", "dim"))])
def test_bad_choices_come_before_any_work(choice, message):
    with pytest.raises((ValueError, TypeError), match=message): sample(refuse, **dict(n=6) | choice)
    if choice.keys() <= {"sampler", "schedule", "steps"}:   # not even iterated
        with pytest.raises((ValueError, TypeError)): sampling(refuse, (6, 2), **choice)


def test_targets_of_a_stack_may_have_any_options():
    "one that is a tensor is compared with none: such targets are computed apart"
    class Scaled(TARGETS["eps"]):
        def __init__(self, k): self.k = k
        def to_eps(self, y_hat, z, alpha, sigma): return self.k * y_hat
    net, z = StackedMLP([MLP(2, 8, 2) for _ in range(3)]), torch.randn(3, 4, 2)
    level = SCHEDULES["cosine"]().level(torch.tensor(.5))
    targets = [Scaled(torch.tensor([1., 2.])), Scaled(torch.tensor([1., 3.])), "v"]
    x_hat, eps_hat = stack_denoiser(net, targets)(z, level)
    for m, target in enumerate(targets):
        alone = network_denoiser(net.alone(m), target)(z[m], level)
        torch.testing.assert_close((x_hat[m], eps_hat[m]), alone)
