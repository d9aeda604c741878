"Many networks trained as one program: each gives what it gives alone, whatever the others do."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.losses import DiffusionLoss
from lfdm.networks import StackedMLP
from lfdm.schedules import SCHEDULES
from lfdm.targets import TARGETS
from lfdm.training import alike, clip_gradients, train_stack
from lfdm.validation import ValidationSet
from lfdm.weightings import WEIGHTINGS, LogSNRWeighting
from trained import DATA, LOSS, Learning, X, new_net, new_stack, new_state, same, stacked, trained

SETS = [DATA.sample(101, seed=m) for m in range(5)]
ALL = dict(ema=.9, clip=.05, warmup=2, cooldown=2)   # three steps
REGISTRIES = SCHEDULES, TARGETS, WEIGHTINGS
TRIPLES = st.tuples(*(st.sampled_from(list(registry)) for registry in REGISTRIES)).filter(
    lambda t: not SCHEDULES[t[0]].learned or issubclass(WEIGHTINGS[t[2]], LogSNRWeighting))


def each_alone(triples, **options):
    "The networks of a stack, trained alone; anew, as a schedule that learns has its history from the stack."
    for m, triple in enumerate(triples):
        loss = DiffusionLoss(*triple)
        yield m, trained(new_state(m, losses=[loss], **options), 1, 50, SETS[m], loss)


def close(a, b): return all((p - q).abs().max() < 1e-3 for p, q in zip(a.parameters(), b.parameters()))


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.lists(TRIPLES, min_size=1, max_size=5), st.sampled_from([{}, ALL]))
def test_a_stack_of_any_losses_gives_what_each_gives_alone(triples, options):
    "float32 rounding is all that may differ over the first steps, the last of them of a smaller batch"
    together = stacked([DiffusionLoss(*triple) for triple in triples], data=SETS[:len(triples)], **options)
    for m, alone in each_alone(triples, **options):
        train_loss = alone.history[-1]["train_loss"]
        assert together.history[-1][m]["train_loss"] == pytest.approx(train_loss, rel=2e-4)
        assert close(alone.net, together.net.network(m)) and close(alone.result, together.result.network(m))
        assert torch.equal(alone.generators[0].get_state(), together.generators[m].get_state())
        rates = [state.optimizer.param_groups[0]["lr"] for state in (alone, together)]
        assert together.steps == alone.steps == 3 and rates[0] == rates[1]


# ---- which are computed as one

def test_losses_are_alike_if_all_digits_of_their_options_are():
    "repr rounds: k = 2.0000001 and k = 2.0000002 print the same, and are two losses"
    close, other = (DiffusionLoss("cosine", "v", f"sigmoid(k={k})") for k in (2.0000001, 2.0000002))
    assert repr(close) == repr(other)
    again = DiffusionLoss("cosine", "v", "sigmoid(k=2.0000001)")
    assert alike([close, again, other, other]) == [slice(0, 2), slice(2, 4)]
    class Mine(DiffusionLoss): pass
    class Shifted(type(LOSS.schedule)): pass
    class Secret(type(LOSS.target)):
        def __init__(self, k): self._k = k   # an option that it does not keep by its name
    secrets = [DiffusionLoss("cosine", Secret(k)) for k in (1, 2)]
    apart = [LOSS, Mine(), DiffusionLoss(Shifted()), *secrets]
    assert alike(apart) == [slice(m, m + 1) for m in range(len(apart))]
    assert alike([secrets[0]] * 2) == [slice(0, 2)]
    learning = [DiffusionLoss("adaptive", "v", "sigmoid") for _ in range(2)]
    assert alike(learning, 50) == [slice(0, 2)]
    for one_each in (alike(learning), alike(learning, 49), alike([learning[0]] * 2, 50)):
        assert one_each == [slice(0, 1), slice(1, 2)]


def test_what_one_network_of_a_stack_teaches_its_schedule_is_its_own():
    "neighbours computed as one loss would mix their histories: each learns from its own data, as alone"
    make = lambda: [DiffusionLoss("adaptive(decay=0.5)", "v", "sigmoid") for _ in range(2)]
    losses, data = make(), [SETS[0], 3 * SETS[1]]
    stacked(losses, 2, data)
    histories = [loss.schedule.state()["history"] for loss in losses]
    for m, loss in enumerate(make()):
        trained(new_state(m, losses=[loss]), 2, 50, data[m], loss)
        history = loss.schedule.state()["history"]
        torch.testing.assert_close(history, histories[m], rtol=1e-3, atol=1e-6, equal_nan=True)
    assert not torch.allclose(histories[0].nan_to_num(), histories[1].nan_to_num(), rtol=0.1)


def test_schedules_that_learn_are_never_shared_between_networks():
    losses = [DiffusionLoss(Learning()) for _ in range(3)]
    with pytest.raises(ValueError, match="cannot share a schedule or weighting"): stacked([losses[0]] * 2)
    for known in ((), losses[::-1]):
        with pytest.raises(ValueError, match="does not know it"): stacked(losses, known=known)


# ---- one that goes wrong

@pytest.mark.parametrize("options, worse", [(ALL, 1e30), (ALL, 1e3)])
def test_one_that_diverges_leaves_the_others_alone(options, worse):
    "nor does a long gradient shorten its neighbours'"
    well = stacked([LOSS] * 3, 2, SETS[:3], **options)
    ill = stacked([LOSS] * 3, 2, [SETS[0], SETS[1] * worse, SETS[2]], **options)
    assert ("diverged" in ill.history[-1][1]) == (worse == 1e30)
    for m in (0, 2):
        assert ill.history[-1][m] == well.history[-1][m]
        assert same(ill.result.network(m), well.result.network(m))


def test_all_of_them_diverging_is_an_error():
    with pytest.raises(FloatingPointError, match="all 2 networks diverged by epoch 1"):
        stacked([LOSS] * 2, data=[X * 1e30] * 2)


FITS = dict(losses=[LOSS] * 2, data=[X[:10]] * 2, epochs=1, batch_size=5)
BAD = {"2 networks need as many losses": dict(losses=[LOSS]),
       "must have one shape": dict(data=[X[:10], X[:11]]), "data must be finite": dict(data=[X / 0] * 2),
       "as many losses, data and seeds": dict(data=[X]), "batch_size 11 is larger": dict(batch_size=11),
       "2 networks need as many validations, not 1": dict(validations=[ValidationSet(LOSS, X, 5)]),
       "state must be of a StackedMLP": dict(state=new_state())}

@pytest.mark.parametrize("says, bad", BAD.items(), ids=BAD)
def test_a_stack_that_does_not_fit_together(says, bad):
    with pytest.raises((ValueError, TypeError), match=says):
        next(train_stack(**dict(state=new_stack([LOSS] * 2)) | FITS | bad))


def test_a_stack_takes_lists_and_arrays_and_may_be_compiled():
    plain, state = stacked([LOSS] * 2), new_stack([LOSS] * 2, clip=1e9)
    state.net = torch.compile(state.net, backend="eager")
    for _ in train_stack(state, (LOSS, LOSS), [X.tolist(), X.numpy()], 1, 50): pass
    assert same(plain.net, state.net) and clip_gradients(state.net, 1.).shape == (2,)


# ---- clipping and validation

def test_each_network_of_a_stack_is_clipped_by_its_own_norm():
    "gradients of very different lengths, some of them below the limit and one of them zero"
    stack, scales = StackedMLP([new_net(m) for m in range(4)]), torch.tensor([0., .1, 1., 100.])
    (scales * stack(torch.randn(4, 50, 2), torch.rand(4, 50)).square().mean((1, 2))).sum().backward()
    flat = lambda: torch.cat([p.grad.flatten(1) for p in stack.parameters()], 1)
    before, norms = flat(), clip_gradients(stack, .3)
    torch.testing.assert_close(norms, before.norm(dim=1))
    torch.testing.assert_close(flat(), before * (.3 / norms).clamp(max=1)[:, None])


def test_validation_of_a_stack_sees_the_averages():
    losses = [DiffusionLoss("cosine", y) for y in ("x", "v")]
    validations = [ValidationSet(loss, X, 5) for loss in losses]
    state = stacked(losses, 2, validations=validations, lr=.05, ema=.9)
    for m, (v, report) in enumerate(zip(validations, state.history[-1])):
        assert report["loss"] == v(state.average.alone(m))["loss"] != v(state.net.alone(m))["loss"]
