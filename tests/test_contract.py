"Attempts to use a loss with other people's networks, wrong and right (nbs/guides/use_pytorch.ipynb)."
import collections
import copy
import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lfdm.core import seeded
from lfdm.discrete import DDPMSchedule
from lfdm.losses import DiffusionLoss
from lfdm.parameters import Parameters
from lfdm.schedules import SCHEDULES, Schedule
from lfdm.steps import network_denoiser
from lfdm.targets import TARGETS, Target, convert
from lfdm.weightings import WEIGHTINGS, implied_w

torch.set_num_threads(1)
close = torch.testing.assert_close
X = torch.randn(4, 3, 8, 8, generator=seeded(0))
LOSS = DiffusionLoss("cosine", "v", "sigmoid")
NET = lambda z, u: 0.5 * z
Output = collections.namedtuple("Output", "logits hidden")


class Net(nn.Module):
    "Of points; it keeps what it was shown."
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, z, u, y=None):
        self.seen = z.dtype, u.dtype, y
        return self.layers(torch.cat([z, 2 * u[:, None] - 1], 1))


def points(n=8): return torch.randn(n, 2, generator=seeded(1))


# ---- mistakes, each through the door that a user takes, with the argument's name and what to do

TIMESTEPS = torch.tensor([0, 3, 500, 999])
SWAPPED = "schedule 'v' is a target, target 'cosine' is a schedule. Write schedule='cosine', target='v'"
AS_TIMES = r"For timesteps from 0 to T - 1 the times are .timesteps \+ 1. / T"
MISTAKES = {
    "swapped": (lambda: DiffusionLoss("v", "cosine"), SWAPPED),
    "swapped classes": (lambda: DiffusionLoss(TARGETS["v"], SCHEDULES["cosine"]()),
                        "schedule .* is a target"),
    "one word": (lambda: DiffusionLoss("v"), "schedule 'v' is a target. Write target='v'"),
    "target and weighting": (lambda: DiffusionLoss("cosine", "sigmoid(k=3)", "v"),
                             r"target 'sigmoid.k=3.' is a weighting, weighting 'v' is a target"),
    "swapped elsewhere": (lambda: implied_w(0., "eps", "cosine", "weighted"), "schedule 'eps' is a target"),
    "betas": (lambda: DiffusionLoss(torch.linspace(1e-4, 0.02, 1000)), r"schedule .*BetasSchedule\(betas\)"),
    "betas in an array": (lambda: DiffusionLoss(np.linspace(1e-4, 0.02, 9)),
                          r"schedule .*BetasSchedule\(betas\)"),
    "betas in a list": (lambda: DiffusionLoss([1e-4, 0.02]), r"schedule .*BetasSchedule\(betas\)"),
    "a scheduler": (lambda: DiffusionLoss(SimpleNamespace(add_noise=0)),
                    r"schedule .*from_diffusers\(scheduler\)"),
    "velocity": (lambda: DiffusionLoss("cosine", "velocity"), "target 'velocity' may be 'v', .* or 'flow'"),
    "scaled_linear": (lambda: DiffusionLoss("scaled_linear"),
                      "schedule 'scaled_linear' needs its β.*0.00085"),
    "timesteps": (lambda: LOSS(NET, X, TIMESTEPS), f"^t must be times .*torch.int64.*{AS_TIMES}"),
    "timesteps as floats": (lambda: LOSS(NET, X, TIMESTEPS.float()),
                            f"^t must lie in .0, 1., not 3. {AS_TIMES}"),
    "timesteps in an array": (lambda: LOSS(NET, X, TIMESTEPS.numpy()),
                              f"^t must be times .*int64.*{AS_TIMES}"),
    "timesteps for a factor": (lambda: LOSS.factor(TIMESTEPS), f"^t must be times .*{AS_TIMES}"),
    "timesteps of a chain": (lambda: DiffusionLoss("ddpm").factor(TIMESTEPS),
                             r"t must .*timesteps \+ 1. / 1000"),
    "timesteps for a schedule": (lambda: SCHEDULES["cosine"]().alpha(TIMESTEPS),
                                 f"^t must be times .*{AS_TIMES}"),
    "timesteps for a staircase": (lambda: SCHEDULES["ddpm"]().logsnr(TIMESTEPS), "^t must be times"),
    "labels in their place": (lambda: LOSS(NET, X, torch.tensor([0, 1, 1, 0])),
                              "^t must be times .*y=labels"),
    "a tuple": (lambda: LOSS(lambda z, u: (z, u), X), r"network returned a tuple of 2.* net\(z, u\)\[0\]"),
    "a list": (lambda: LOSS(lambda z, u: [z], X), r"network returned list.* net\(z, u\)\[0\]"),
    "a named tuple": (lambda: LOSS(lambda z, u: Output(z, u), X),
                      r"network returned Output.* net\(z, u\)\[0\]"),
    "an object": (lambda: LOSS(lambda z, u: SimpleNamespace(logits=z), X),
                  r"SimpleNamespace.* net\(z, u\).logits"),
    "a dict": (lambda: LOSS(lambda z, u: {"logits": z}, X),
               r"network returned dict.* net\(z, u\)\['logits'\]"),
    "an output of diffusers": (lambda: LOSS(lambda z, u: SimpleNamespace(sample=z), X),
                               r"network returned .*as_network\(net\).* net\(z, 1000 \* u\).sample"),
    "a variance as well": (lambda: LOSS(lambda z, u: torch.cat([z, z], 1), X), r"shape .*chunk\(2, 1\)\[0\]"),
    "whole timesteps wanted": (lambda: LOSS(lambda z, u: z + nn.Embedding(9, 8)(u)[:, None, None], X),
                               r"network takes whole timesteps.* net\(z, \(1000 \* u\).long\(\)\)"),
    "a table of timesteps": (lambda: LOSS(lambda z, u: z + torch.ones(9)[u], X),
                             "network takes whole timesteps"),
    "no time wanted": (lambda: LOSS(nn.Linear(8, 8), X), r"net is called as net\(z, u\).*Write a lambda"),
    "a keyword unknown to it": (lambda: LOSS(NET, X, y=1),
                                r"net is called as net\(z, u, y=...\).*Write a lambda"),
    "a loss": (lambda: LOSS(LOSS, X), "^net must be a network, .*not a loss"),
    "torch's loss": (lambda: LOSS(nn.MSELoss(), X), "^net must be a network, .*not a loss, MSELoss"),
    "a class": (lambda: LOSS(Net, X), "^net must be a network, not the class Net: make one"),
    "no network": (lambda: LOSS(X), r"^net must be a network, .*not a tensor.* loss\(net, x\)"),
    "the other order": (lambda: LOSS(X, NET), r"^net must be a network, .*not a tensor.* loss\(net, x\)"),
    "no data": (lambda: LOSS(NET), r"^x is missing: write loss\(net, x\)"),
    "no data but labels": (lambda: LOSS(NET, y=TIMESTEPS), "^x is missing"),
    "bytes": (lambda: LOSS(NET, (9 * X).byte()), r"^x must be floating-point .*torch.uint8.* x / 127.5 - 1"),
    "noise": (lambda: LOSS(lambda z, u, **k: z, X, noise=X), "^noise would go to the network: .* is eps"),
    "timesteps by name": (lambda: LOSS(lambda z, u, **k: z, X, timesteps=TIMESTEPS),
                          "^timesteps would .* is t"),
    "another device": (lambda: LOSS.to("cuda:99"), "unknown device"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_what_to_do(name):
    make, says = MISTAKES[name]
    with pytest.raises((TypeError, ValueError), match=says) as e: make()
    assert len(str(e.value)) <= 300 and "\n" not in str(e.value)


def test_other_errors_of_a_network_stay_its_own():
    def out_of_range(z, u): raise IndexError("mine")
    def of_another_type(z, u): raise TypeError("mine as well")
    for net, error in (out_of_range, IndexError), (of_another_type, TypeError):
        with pytest.raises(error, match="^mine") as e: LOSS(net, X)
        assert e.value.__cause__ is None


# ---- synonyms

WORDS = {"epsilon": "eps", "noise": "eps", "v_prediction": "v", "sample": "x", "x0": "x",
         "flow_prediction": "flow"}


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_the_field_is_the_target_it_means(word):
    "the name in lfdm stands in reprs, runs' names and weights of them"
    name = WORDS[word]
    assert repr(DiffusionLoss("cosine", word)) == repr(DiffusionLoss("cosine", name))
    assert Parameters(target=word) == Parameters(target=name)
    assert Parameters(target=word).slug() == Parameters(target=name).slug()
    bound, plain = (WEIGHTINGS["implied"]("cosine", q, "min_snr") for q in (word, name))
    assert repr(bound) == repr(plain)
    z, half = X[:, 0, 0], torch.full((4,), 0.5**0.5)
    assert convert(z, word, "v", z, half, half).equal(convert(z, name, "v", z, half, half))
    guess = [network_denoiser(NET, q)(z, SCHEDULES["cosine"]().level(half / 2))[0] for q in (word, name)]
    assert guess[0].equal(guess[1])


def test_diffusers_words_mean_what_diffusers_means():
    "every prediction_type, and the cosine chain, as diffusers itself makes them"
    diffusers = pytest.importorskip("diffusers")
    from lfdm.interop import PREDICTIONS, from_diffusers
    for word, name in PREDICTIONS.items(): assert Target.synonyms[word] == name
    made = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    schedule, target = from_diffusers(made)
    loss = DiffusionLoss("squaredcos_cap_v2", "sample")
    for same in (schedule, target), ("ddpm(beta=cosine)", "x"):
        assert repr(loss) == repr(DiffusionLoss(*same))
    close(loss.schedule.betas, made.betas.double(), rtol=1e-5, atol=1e-9)
    assert repr(DDPMSchedule(beta="squaredcos_cap_v2")) == repr(loss.schedule)
    short = DiffusionLoss("squaredcos_cap_v2(T=50)").schedule
    assert short.T == 50 and short.beta == "cosine"
    p = Parameters(schedule="squaredcos_cap_v2", target="v_prediction")
    assert (p.schedule, p.target) == ("ddpm(beta=cosine)", "v")


def test_no_synonym_hides_a_name():
    for base, registry in (Schedule, SCHEDULES), (Target, TARGETS):
        words = base.synonyms.keys() | base.two_meanings.keys()
        assert not words & registry.keys() and not base.synonyms.keys() & base.two_meanings.keys()
        for name in base.synonyms.values(): assert name.partition("(")[0] in registry
    names = [*SCHEDULES, *Schedule.synonyms, *TARGETS, *Target.synonyms, *WEIGHTINGS]
    assert len(set(names)) == len(names), "a word in two registries: swapped words could not be told"


# ---- what goes through to the network

def test_keywords_reach_the_network_as_they_are():
    net, x = Net(), points()
    labels, more = torch.arange(8), torch.empty(1, device="meta")   # where they lie is the network's affair
    got = LOSS(net, x, y=labels, generator=seeded(0))
    assert net.seen[2] is labels and got.equal(LOSS(net, x, generator=seeded(0)))
    LOSS(net, x, y=more)
    assert net.seen[2] is more
    with torch.no_grad(): by_hand = LOSS(lambda z, u: net(z, u, labels), x, generator=seeded(0))
    assert by_hand.equal(got.detach())


@pytest.mark.parametrize("scale, warned", [(1, False), (3, False), (5.5, True), (255, True)])
def test_a_warning_of_data_out_of_range_comes_once(scale, warned):
    loss = DiffusionLoss("cosine", "v")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3): loss(NET, scale * X)
    assert len(caught) == warned
    if warned:
        said = str(caught[0].message)
        assert said.startswith("x is not of about unit size") and "x / 127.5 - 1" in said
        assert caught[0].filename == __file__


def test_vmap_reads_nothing():
    loss = DiffusionLoss()
    got = torch.func.vmap(lambda x: loss(NET, x, eps=X[0]), randomness="different")(X)
    assert got.shape == (4, 3)


class Reads(TorchDispatchMode):
    "Counts how often a tensor's value is read: each waits for a GPU."
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return function(*args, **(kwargs or {}))


TRIPLES = [*itertools.product(("cosine", "ddpm"), ("v", "eps", "x"), ("sigmoid", "min_snr"))]


@pytest.mark.parametrize("triple", TRIPLES)
def test_a_step_reads_no_value(triple):
    loss, net, x = DiffusionLoss(*triple), Net(), points()
    with Reads() as first: loss(net, x)
    with Reads() as later:
        for _ in range(3): loss(net, x, y=x).mean().backward()
    assert later.count == 0 < first.count


# ---- precision, accumulation, wrappers

def test_autocast_leaves_times_and_loss_in_float32():
    net, x = Net(), points(64)
    plain = LOSS(net, x, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16): got = LOSS(net, x, generator=seeded(0))
    assert net.seen[:2] == (torch.float32, torch.float32) and got.dtype == torch.float32
    assert not got.equal(plain)
    close(got, plain, rtol=0.1, atol=0.02)


def gradient(value, net):
    net.zero_grad()
    value.backward()
    return net.layers[0].weight.grad.clone()


def test_parts_of_a_batch_add_up_to_its_gradient():
    net, x = Net(), points()
    t, eps = LOSS.drawn(x)
    whole = gradient(LOSS(net, x, t, eps).mean(), net)
    net.zero_grad()
    for part in torch.arange(8).split(4): (LOSS(net, x[part], t[part], eps[part]).mean() / 2).backward()
    close(net.layers[0].weight.grad, whole)


def test_a_compiled_network_gives_the_same():
    net, x = Net(), points()
    compiled = torch.compile(net, backend="eager")
    for kw in {}, {"y": x}:
        close(LOSS(compiled, x, generator=seeded(0), **kw), LOSS(net, x, generator=seeded(0), **kw))


class Fine(nn.Linear):
    "It asks for times of 32 bits."
    time_dtype = torch.float32
    def forward(self, z, u):
        self.seen = z.dtype, u.dtype
        return super().forward(z)


def test_a_wrapper_passes_on_what_the_network_asks():
    net = Fine(2, 2).bfloat16()
    wrapped = nn.DataParallel(net)   # like DDP, it keeps the network as `module`
    for called in net, wrapped:
        LOSS(called, points())
        assert net.seen == (torch.bfloat16, torch.float32)


def process(rank, store, out):
    "One of two, with half of a batch and its own randomness."
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net, x, own = Net(), points(), slice(4 * rank, 4 * rank + 4)
    t, eps = LOSS.drawn(x, generator=seeded(5))
    ddp = nn.parallel.DistributedDataParallel(net)
    LOSS(ddp, x[own], t[own], eps[own], y=x[own]).mean().backward()
    torch.save(net.layers[0].weight.grad, f"{out}{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_make_the_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(process, (str(tmp_path / "store"), str(tmp_path / "grad")), nprocs=2)
    net, x = Net(), points()
    whole = gradient(LOSS(net, x, *LOSS.drawn(x, generator=seeded(5))).mean(), net)
    for rank in (0, 1): close(torch.load(tmp_path / f"grad{rank}.pt", weights_only=True), whole)


def test_to_a_device_gives_itself():
    for thing in (LOSS, LOSS.schedule, LOSS.target, LOSS.weighting, LOSS.error):
        before = copy.deepcopy(vars(thing))
        assert thing.to("cpu") is thing and thing.to(torch.device("cpu")) is thing
        assert repr(vars(thing)) == repr(before)
        with pytest.raises(TypeError, match="^device must be a"): thing.to(None)
