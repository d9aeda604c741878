"Attempts to break lfdm.checkpoints: files that are damaged, of something else, or written on a full disk."
import itertools
import json
import math
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from lfdm.checkpoints import read_checkpoint, require_match, training_options
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP
from lfdm.training import TrainState, train, train_stack
from lfdm.validation import ValidationSet
from trained import (
    DATA,
    LOSS,
    OPTIONS,
    Learning,
    X,
    everything,
    learning,
    new_stack,
    new_state,
    same,
    stacked,
    trained,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.safetensors"
    trained(new_state(), 2).save(path)
    return path


META = {"epoch": "2", "history": "[]"}

def edited(path, gone="no such", new=None, meta=META):
    "Write the file again: without some tensors, with others."
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith(gone)}
    save_file(tensors | (new or {}), path, meta)


def refused(state, path, match, run=None):
    "The state refuses the file and is what it was."
    before = everything(state)
    with pytest.raises(ValueError, match=match) as e: state.load(path, run)
    assert everything(state) == before and f"checkpoint {path} cannot be used" in str(e.value)


def bytes_of(change): return lambda p: p.write_bytes(change(p.read_bytes()))
def edit(**kw): return lambda p: edited(p, **kw)
def options(text): return edit(meta=META | {"options": text})

MOMENTS, DEVICE = "does not hold this network's Adam moments", "random state is another device's"
SHAPE, AVERAGE, LEARNED = "another shape", "does not hold the average", "what these schedules have learned"
DAMAGE = {
    "empty": (bytes_of(lambda b: b""), "cannot be used"),
    "garbage": (bytes_of(lambda b: bytes(range(256)) * 20), "cannot be used"),
    "zeros": (bytes_of(lambda b: bytes(len(b))), "cannot be used"),
    "text": (bytes_of(lambda b: b"<<<<<<< HEAD\n"), "cannot be used"),
    "cut in the header": (bytes_of(lambda b: b[:100]), "cannot be used"),
    "cut in half": (bytes_of(lambda b: b[:len(b) // 2]), "cannot be used"),
    "last byte gone": (bytes_of(lambda b: b[:-1]), "cannot be used"),
    "one byte more": (bytes_of(lambda b: b + b"0"), "cannot be used"),
    "missing": (lambda p: p.unlink(), "cannot be used"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be used"),
    "no metadata": (edit(meta=None), "cannot be used"),
    "no epoch": (edit(meta={"history": "[]"}), "epoch"),
    "epoch is no number": (edit(meta=META | {"epoch": "two"}), "two"),
    "history is no json": (edit(meta=META | {"history": "[{]"}), "cannot be used"),
    "history is no list": (edit(meta=META | {"history": "5"}), "its history is no list"),
    "no weights": (edit(gone="net."), SHAPE),
    "one weight gone": (edit(gone="net.layers.0.bias"), SHAPE),
    "one weight more": (edit(new={"net.layers.99.bias": torch.zeros(3)}), SHAPE),
    "no generator": (edit(gone="generators"), "generators"),
    "generator of a gpu": (edit(new={"generators": torch.zeros(1, 16, dtype=torch.uint8)}), DEVICE),
    "two generators": (edit(new={"generators": torch.zeros(2, 5056, dtype=torch.uint8)}), DEVICE),
    "no generator at all": (edit(new={"generators": torch.zeros(0, 5056, dtype=torch.uint8)}), DEVICE),
    "generator of floats": (edit(new={"generators": torch.zeros(1, 5056)}), "cannot be used"),
    "generator of zeros": (edit(new={"generators": torch.zeros(1, 5056, dtype=torch.uint8)}), "cannot be"),
    "no moments": (edit(gone="optimizer."), MOMENTS),
    "moments of one weight gone": (edit(gone="optimizer.3."), MOMENTS),
    "one moment gone": (edit(gone="optimizer.3.exp_avg_sq"), MOMENTS),
    "moments of another shape": (edit(new={"optimizer.3.exp_avg": torch.zeros(3)}), MOMENTS),
    "infinitely many steps": (edit(new={"optimizer.0.step": torch.tensor(math.inf)}), "how many steps"),
    "an average not asked for": (edit(new={"ema.layers.0.bias": torch.zeros(8)}), AVERAGE),
    "learned, not asked for": (edit(new={"schedule.0.seen": torch.zeros(4)}), LEARNED),
    "made with an average": (options('{"ema": 0.9}'), "it was made with ema 0.9, not None"),
    "unknown options": (options('{"momentum": 0.9}'), "momentum"),
    "options that cannot be": (options('{"ema": 2}'), "ema must lie between 0 and 1"),
    "options are no json": (options("{"), "cannot be used"),
    "options are no dict": (options("[1]"), "cannot be used"),
}

@pytest.mark.parametrize("damage, why", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_changes_nothing(damage, why, checkpoint, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    state = trained(new_state(5), 1)
    refused(state, path, why)
    state.load(checkpoint)
    assert state.epoch == 2


@pytest.mark.parametrize("width", [7, 9, 16])
def test_a_checkpoint_of_another_width_changes_nothing(width, checkpoint):
    refused(new_state(5, width), checkpoint, SHAPE)


def test_a_record_is_plain_and_reading_changes_no_state(checkpoint):
    record, state = read_checkpoint(checkpoint), new_state(5)
    before = everything(state)
    require_match(record, state)
    assert everything(state) == before
    assert (record.epoch, record.steps, len(record.history)) == (2, 12, 2)
    assert record.options == training_options()
    assert record.average == record.learned == {} and record.random_states.shape == (1, 5056)


def test_loading_keeps_the_own_learning_rate(checkpoint):
    state = new_state(lr=.5)
    state.load(checkpoint)
    assert state.optimizer.param_groups[0]["lr"] == .5


def test_the_format_of_the_file(tmp_path):
    "its keys and metadata: files are older than the code"
    loss, state = learning(**OPTIONS)
    trained(state, 1, loss=loss).save(tmp_path / "c")
    record = read_checkpoint(tmp_path / "c")
    net = state.net.state_dict()
    moments = [f"optimizer.{i}.{k}" for i in range(len(net)) for k in ("exp_avg", "exp_avg_sq", "step")]
    expected = [f"{part}.{k}" for part in ("net", "ema") for k in net] + moments
    assert sorted(load_file(tmp_path / "c")) == sorted(
        [*expected, "generators", "schedule.0.seen", "schedule.0.seen.times"])
    assert record.options == state.options and record.history == json.loads(json.dumps(state.history))


# ---- what is resumed

@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
def test_resumed_after_any_epoch_is_bit_identical(options, tmp_path):
    "the warm-up ends between the second checkpoint and the third"
    validation = ValidationSet(LOSS, X, bins=5, denoise=DATA.denoise)
    whole = new_state(**options)
    whole.save(tmp_path / "0")
    for state in train(whole, LOSS, X, 4, 20, validation): state.save(tmp_path / f"{state.epoch}")
    expected = everything(whole)
    assert [h["epoch"] for h in whole.history] == [0, 1, 2, 3, 4]
    for epoch in range(5):
        other = new_state(seed=77, **options)
        other.load(tmp_path / f"{epoch}")
        assert other.epoch == epoch and other.steps == 6 * epoch
        assert (other.average is None) == (not options) and other.average is not other.net
        assert everything(trained(other, 4, validation=validation)) == expected


def test_a_stack_with_all_options_resumes_bit_identically(tmp_path):
    "in the middle of the warm-up, with schedules that learn beside one that does not"
    data = [DATA.sample(101, seed=m) for m in range(3)]
    def fresh(shift=0):
        losses = [DiffusionLoss(Learning()), DiffusionLoss("cosine", "v"), DiffusionLoss(Learning())]
        validations = [ValidationSet(loss, X, 5, denoise=DATA.denoise) for loss in losses]
        state = new_stack(losses, shift=shift, **OPTIONS)
        return state, train_stack(state, losses, data, 4, 50, validations)
    whole, run = fresh()
    for _ in run: pass
    _, run = fresh()
    next(run).save(tmp_path / "c")
    other, run = fresh(7)
    other.load(tmp_path / "c")
    assert other.steps == 3 and list(other.learning) == [0, 2]
    for _ in run: pass
    assert everything(other) == everything(whole)


def test_what_a_schedule_learned_is_resumed_bit_identically(tmp_path):
    loss, whole = learning(**OPTIONS)
    for state in train(whole, loss, X, 4, 20): state.save(tmp_path / f"{state.epoch}")
    assert loss.schedule._asked > 0
    for epoch in (1, 3):
        loss, other = learning(77, **OPTIONS)
        trained(other, 1, loss=loss)
        other.load(tmp_path / f"{epoch}")
        assert everything(trained(other, 4, loss=loss)) == everything(whole)


def test_a_checkpoint_from_before_the_options_is_one_without(checkpoint, tmp_path):
    (tmp_path / "old").write_bytes(checkpoint.read_bytes())
    edited(tmp_path / "old")
    state = new_state(5)
    state.load(tmp_path / "old")
    whole = trained(new_state(), 3)
    assert trained(state, 3).history == whole.history[2:] and same(state.net, whole.net)
    refused(new_state(ema=.9), tmp_path / "old", "made with ema None, not 0.9")


OTHER = [("ema", .8), ("ema", None), ("clip", 1.), ("clip", None), ("warmup", 0)]

@pytest.mark.parametrize("name, other", OTHER)
def test_a_checkpoint_of_other_options_is_refused(name, other, tmp_path):
    trained(new_state(**OPTIONS), 1).save(tmp_path / "c")
    state = trained(new_state(5, **OPTIONS | {name: other}), 1)
    refused(state, tmp_path / "c", f"it was made with {name} {OPTIONS[name]}, not {other}\\. Move")


@pytest.mark.parametrize("gone", ["ema.", "ema.layers.0.bias"])
def test_a_lost_average_is_missed(gone, tmp_path):
    trained(new_state(**OPTIONS), 1).save(tmp_path / "c")
    edited(tmp_path / "c", gone, meta={"epoch": "1", "history": "[]", "options": json.dumps(OPTIONS)})
    refused(new_state(5, **OPTIONS), tmp_path / "c", AVERAGE)


@pytest.mark.parametrize("damage", [
    dict(gone="schedule.0.seen"), dict(gone="schedule"), dict(new={"schedule.0.seen": torch.zeros(5)}),
    dict(new={"schedule.1.seen": torch.zeros(4)}), dict(new={"schedule.0.seen": torch.zeros(4).double()}),
    dict(new={"schedule.0.seen.times": torch.tensor(-1)})], ids=str)
def test_what_a_schedule_learned_is_taken_whole_or_not_at_all(damage, tmp_path):
    loss, state = learning()
    trained(state, 2, loss=loss).save(tmp_path / "c")
    edited(tmp_path / "c", **damage)
    loss, state = learning(5)
    refused(trained(state, 1, loss=loss), tmp_path / "c", f"{LEARNED}|less than nothing")


def test_when_one_schedule_refuses_what_it_learned_none_takes_it(tmp_path):
    fresh = lambda: new_stack([DiffusionLoss(Learning()) for _ in range(2)])
    state = fresh()
    state.learning[0]._seen += 200
    state.learning[1]._asked -= 1
    state.save(tmp_path / "c")
    refused(fresh(), tmp_path / "c", "less than nothing")


def test_a_checkpoint_of_something_else_is_refused(checkpoint, tmp_path):
    refused(learning()[1], checkpoint, LEARNED)
    stacked([LOSS] * 2).save(tmp_path / "two")
    refused(new_stack([LOSS] * 3), tmp_path / "two", SHAPE)
    refused(TrainState(MLP(2, 8)), tmp_path / "two", SHAPE)


# ---- writing

def test_a_full_disk_keeps_the_former_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")  # a limit on a file's size fails as a full disk does: midway
    path, state = tmp_path / "c.safetensors", trained(new_state(), 2)
    state.save(path)
    former, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    trained(state, 3)
    for limit in (0, 100, len(former) // 2):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match="c.safetensors.*untouched"): state.save(path)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == former and os.listdir(tmp_path) == ["c.safetensors"]
    state.save(path)
    assert path.read_bytes() != former


def test_the_former_checkpoint_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / "c", os.replace, []
    state = trained(new_state(), 1)
    state.save(path)
    former = path.read_bytes()
    def watched(a, b):
        new_state(3).load(a)
        seen.append(path.read_bytes() == former)
        replace(a, b)
    monkeypatch.setattr(os, "replace", watched)
    trained(state, 2).save(path)
    assert seen == [True] and path.read_bytes() != former


def test_where_a_checkpoint_is_written(tmp_path):
    "not into a folder that is not there; over a leftover draft"
    with pytest.raises(OSError, match="nowhere"): new_state().save(tmp_path / "nowhere" / "c")
    (tmp_path / "c.draft").write_text("half a checkp")
    new_state().save(tmp_path / "c")
    new_state(3).load(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]


# ---- damage that no shape shows

def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    "of 200 flips anywhere in the file each is refused, or what is read is the same"
    path, whole = tmp_path / "c", trained(new_state(**OPTIONS), 2)
    whole.save(path, "a run")
    content, expected, rng, noticed = path.read_bytes(), everything(whole), random.Random(0), 0
    start = 8 + int.from_bytes(content[:8], "little")
    for k in range(200):
        place = rng.randrange(
            start if k % 3 else 8, len(content) if k % 3 else start
        )  # a third in the header
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        state = new_state(5, **OPTIONS)
        try: state.load(path, "a run")
        except ValueError as e: noticed += "cannot be used" in str(e)
        else: assert everything(state) == expected, f"byte {place} changed the state unnoticed"
    assert noticed > 185


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trained(new_state(), 1).save(tmp_path / "c", "eps-ring")
    refused(new_state(5), tmp_path / "c", "belongs to another run, eps-ring, not to v-ring", "v-ring")
    for run in ("eps-ring", None): new_state(5).load(tmp_path / "c", run)


# ---- whatever network there is

class Net(torch.nn.Module):
    "Predicts from z and time with what its kind has."
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)
        if kind == "tied": self.c = self.a
        if kind == "views":
            both = torch.arange(4.)
            self.register_buffer("first", both[:2]); self.register_buffer("last", both[1:3])
        if kind == "frozen": self.b.requires_grad_(False)
        if kind == "hidden": self.register_buffer("seen", torch.zeros(()), persistent=False)
        if kind == "counts": self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        if kind == "norm": self.norm = torch.nn.BatchNorm1d(2)
        self.calls = 0

    def forward(self, z, u):
        y = self.a(torch.cat([z, u[:, None]], 1))
        self.calls += 1
        if self.kind == "late" and self.calls < 5: return y
        if self.kind in ("hidden", "counts"): self.seen += 1; y = y + .01 * self.seen
        if self.kind == "norm": y = self.norm(y)
        if self.kind == "views": y = y + self.first * self.last
        return y if self.kind == "unused" else self.b(y)


def of_kind(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(kind)


@pytest.mark.parametrize(
    "kind", ["plain", "unused", "late", "tied", "views", "frozen", "hidden", "counts", "norm"]
)
@pytest.mark.parametrize("options", [{}, OPTIONS], ids=["plain", "all options"])
def test_any_network_is_trained_saved_and_resumed_exactly(kind, options, tmp_path):
    whole = trained(TrainState(of_kind(kind), **options), 1, x=X[:100])
    whole.save(tmp_path / "c")
    other = TrainState(of_kind(kind, 9), **options)
    other.net.calls = whole.net.calls   # what it keeps outside of tensors is its own business
    other.load(tmp_path / "c")
    assert other.steps == whole.steps
    assert everything(trained(other, 3, x=X[:100])) == everything(trained(whole, 3, x=X[:100]))
    if kind == "tied": assert other.net.a.weight is other.net.c.weight


def test_plain_and_compiled_checkpoints_are_one(tmp_path):
    "compiled as a whole or in a part; the compiler itself is not asked"
    plain, whole, part = (of_kind("tied", seed) for seed in (0, 1, 2))
    whole = torch.compile(whole, backend="eager")
    part.b = torch.compile(part.b, backend="eager")
    states = [TrainState(net, **OPTIONS) for net in (plain, whole, part)]
    for a, b in itertools.permutations(states, 2):
        trained(a, a.epoch + 1).save(tmp_path / "c")
        b.load(tmp_path / "c")
        for p, q in zip(a.result.parameters(), b.result.parameters(), strict=True): assert torch.equal(p, q)
        assert b.steps == a.steps


class Extra(torch.nn.Linear):
    def get_extra_state(self): return {"made": "today"}
    def set_extra_state(self, state): pass


@pytest.mark.parametrize(
    "net, says",
    [
        (Extra(2, 2), "extra state: .*_extra_state"),
        (torch.nn.Linear(2, 2, dtype=torch.cfloat), "complex"),
        (torch.nn.Identity(), "no parameter"),
        (torch.nn.Linear(2, 2).requires_grad_(False), "none requires a gradient"),
        (torch.nn.LazyLinear(2), "lazy"),
        (None, "net must be"),
        (lambda z, u: z, "net must be"),
    ],
    ids=str,
)
def test_a_network_that_no_checkpoint_brings_back_is_refused_at_once(net, says):
    with pytest.raises((TypeError, ValueError), match=says): TrainState(net)


# ---- the options

WRONG = {"ema": [0, 1, 0., 1., -.5, 1.5, math.nan, math.inf, True, "0.9", [.9], 10**400],
         "clip": [0, -1, math.nan, math.inf, True, "1", [1]],
         "warmup": [-1, .5, math.nan, math.inf, True, "5", None, [5]]}

EACH = [(k, v) for k, values in WRONG.items() for v in values]

@pytest.mark.parametrize("name, value", EACH, ids=lambda v: str(v)[:12])
def test_bad_options(name, value):
    for make in (training_options, new_state):
        with pytest.raises((ValueError, TypeError), match=f"^{name} must"): make(**{name: value})
