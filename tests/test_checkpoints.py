"Attempts to break lfdm.checkpoints: damaged files, files of something else, a full disk, odd networks."
import json
import math
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lfdm.checkpoints import read_checkpoint, require_match
from lfdm.losses import DiffusionLoss
from lfdm.training import TrainState, train_stack
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


# ---- damage

META = {"epoch": "2", "history": "[]"}

def edited(path, gone="no such", new=None, meta=META):
    "Write the file again, as one from before digests: without some tensors, with others."
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith(gone)}
    save_file(tensors | (new or {}), path, meta)


def refused(state, path, match, run=None):
    "The state refuses the file and is what it was."
    before = everything(state)
    with pytest.raises(ValueError, match=match) as e: state.load(path, run)
    assert everything(state) == before and f"checkpoint {path} cannot be used" in str(e.value)


def edit(**kw): return lambda p: edited(p, **kw)
def meta(**kw): return edit(meta=META | kw)
def generators(*shape): return edit(new={"generators": torch.zeros(*shape, dtype=torch.uint8)})

MOMENTS, DEVICE = "does not hold this network's Adam moments", "random state is another device's"
SHAPE, AVERAGE, LEARNED = "another shape", "does not hold the average", "what these losses have learned"
DAMAGE = [
    (lambda p: p.write_bytes(b""), None), (lambda p: p.write_bytes(p.read_bytes() + b"0"), None),
    (lambda p: p.unlink(), None), (lambda p: (p.unlink(), p.mkdir()), None),
    (edit(meta=None), None), (edit(meta={"history": "[]"}), "epoch"), (meta(epoch="two"), "two"),
    (meta(history="[{]"), None), (meta(history="5"), "its history is no list"),
    (edit(gone="net.layers.0.bias"), SHAPE), (edit(new={"net.layers.99.bias": torch.zeros(3)}), SHAPE),
    (edit(gone="generators"), "generators"), (generators(1, 16), DEVICE), (generators(1, 5056), None),
    (edit(gone="optimizer.3.exp_avg_sq"), MOMENTS),
    (edit(new={"optimizer.3.exp_avg": torch.zeros(3)}), MOMENTS),
    (edit(new={"optimizer.0.step": torch.tensor(math.inf)}), "how many steps"),
    (edit(new={"ema.layers.0.bias": torch.zeros(8)}), AVERAGE),
    (edit(new={"schedule.0.seen": torch.zeros(4)}), LEARNED),
    (meta(options='{"ema": 0.9}'), "it was made with ema 0.9, not None"),
    (meta(options='{"momentum": 0.9}'), "momentum"), (meta(options="[1]"), None)]

@pytest.mark.parametrize("damage, why", DAMAGE)
def test_a_damaged_checkpoint_changes_nothing(damage, why, checkpoint, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(checkpoint.read_bytes())
    damage(path)
    refused(trained(new_state(5), 1), path, why)


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    "of 150 flips, a third of them in the header, each is refused, or what is read is the same"
    path, whole, rng, noticed = tmp_path / "c", trained(new_state(**OPTIONS), 2), random.Random(0), 0
    whole.save(path, "a run")
    content, state = path.read_bytes(), new_state(5, **OPTIONS)
    state.load(path, "a run")
    expected = everything(state)
    start = 8 + int.from_bytes(content[:8], "little")
    for k in range(150):
        place = rng.randrange(start, len(content)) if k % 3 else rng.randrange(start)
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try: state.load(path, "a run")
        except ValueError as e: noticed += "cannot be used" in str(e)
        else: assert everything(state) == expected, f"byte {place} changed the state unnoticed"
    assert noticed > 130


def test_the_format_of_the_file(tmp_path):
    "its keys and metadata: files are older than the code; reading and matching change no state"
    loss, state = learning(**OPTIONS)
    trained(state, 2, loss=loss).save(tmp_path / "c")
    record, net, before = read_checkpoint(tmp_path / "c"), state.net.state_dict(), everything(state)
    require_match(record, state)
    assert everything(state) == before
    moments = [f"optimizer.{i}.{k}" for i in range(len(net)) for k in ("exp_avg", "exp_avg_sq", "step")]
    expected = [f"{part}.{k}" for part in ("net", "ema") for k in net] + moments
    assert sorted(load_file(tmp_path / "c")) == sorted(
        [*expected, "generators", "schedule.0.seen", "schedule.0.seen.times"])
    assert record.options == state.options and record.history == json.loads(json.dumps(state.history))
    assert (record.epoch, record.steps, record.run, record.hidden) == (2, 12, "", {})


# ---- what is resumed

def test_a_stack_with_all_options_resumes_bit_identically(tmp_path):
    "in the middle of the warm-up, with schedules that learn beside one that does not"
    data = [DATA.sample(101, seed=m) for m in range(3)]
    def fresh(shift=0):
        losses = [DiffusionLoss(Learning()), DiffusionLoss("cosine", "v"), DiffusionLoss(Learning())]
        validations = [ValidationSet(loss, X, 5, denoise=DATA.denoise) for loss in losses]
        state = new_stack(losses, shift=shift, **OPTIONS)
        return state, train_stack(state, losses, data, 4, 50, validations)
    whole, run = fresh()
    for _ in run:
        if whole.epoch == 1: whole.save(tmp_path / "c")
    other, run = fresh(7)
    other.load(tmp_path / "c")
    assert other.steps == 3 and list(other.learning) == [0, 2]
    for _ in run: pass
    assert everything(other) == everything(whole)


def test_a_checkpoint_from_before_the_options_is_one_without(checkpoint, tmp_path):
    (tmp_path / "old").write_bytes(checkpoint.read_bytes())
    edited(tmp_path / "old")
    state = new_state(5)
    state.load(tmp_path / "old")
    whole = trained(new_state(), 3)
    assert trained(state, 3).history == whole.history[2:] and same(state.net, whole.net)
    refused(new_state(ema=.9), tmp_path / "old", "made with ema None, not 0.9")


def test_a_checkpoint_of_other_options_or_without_its_average_is_refused(tmp_path):
    path = tmp_path / "c"
    trained(new_state(**OPTIONS), 1).save(path)
    for name, other in (("ema", None), ("clip", 1.), ("warmup", 0)):
        state = new_state(5, **OPTIONS | {name: other})
        refused(state, path, f"it was made with {name} {OPTIONS[name]}, not {other}\\. Move")
    edited(path, "ema.layers.0.bias", meta=META | {"epoch": "1", "options": json.dumps(OPTIONS)})
    refused(new_state(5, **OPTIONS), path, AVERAGE)


@pytest.mark.parametrize("damage", [
    dict(gone="schedule.0.seen"), dict(new={"schedule.1.seen": torch.zeros(4)}),
    dict(new={"schedule.0.seen": torch.zeros(4).double()})])
def test_what_a_schedule_learned_is_taken_whole_or_not_at_all(damage, tmp_path):
    loss, state = learning()
    trained(state, 2, loss=loss).save(tmp_path / "c")
    edited(tmp_path / "c", **damage)
    refused(learning(5)[1], tmp_path / "c", LEARNED)


def test_when_one_schedule_refuses_what_it_learned_none_takes_it(tmp_path):
    fresh = lambda: new_stack([DiffusionLoss(Learning()) for _ in range(2)])
    state = fresh()
    state.learning[0]._seen += 200
    state.learning[1]._asked -= 1
    state.save(tmp_path / "c")
    refused(fresh(), tmp_path / "c", "less than nothing")


def test_a_checkpoint_of_something_else_is_refused(checkpoint, tmp_path):
    new_state().save(tmp_path / "c", "eps-ring")
    refused(new_state(5), tmp_path / "c", "belongs to another run, eps-ring, not to v-ring", "v-ring")
    faster = new_state(lr=.5)
    for run in ("eps-ring", None): faster.load(tmp_path / "c", run)
    assert faster.optimizer.param_groups[0]["lr"] == .5   # its own
    refused(learning()[1], checkpoint, LEARNED)
    refused(new_state(5, 16), checkpoint, SHAPE)
    stacked([LOSS] * 2).save(tmp_path / "two")
    for state in (new_stack([LOSS] * 3), new_state()): refused(state, tmp_path / "two", SHAPE)


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


# ---- whatever network there is

class Net(nn.Module):
    "Predicts from z and time with what its kind has."
    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b, self.calls = kind, nn.Linear(3, 2), nn.Linear(2, 2), 0
        if kind == "tied": self.c = self.a
        if kind == "views":
            both = torch.arange(4.)
            self.register_buffer("first", both[:2]); self.register_buffer("last", both[1:3])
        if kind == "frozen": self.b.requires_grad_(False)
        if kind == "hidden": self.register_buffer("seen", torch.zeros(()).long(), persistent=False)
        if kind == "cache": self.register_buffer("times", torch.zeros(0), persistent=False)
        if kind == "norm": self.norm = nn.BatchNorm1d(2)
        if kind == "normed": self.b = nn.utils.parametrizations.weight_norm(self.b)

    def forward(self, z, u):
        y = self.a(torch.cat([z, u[:, None]], 1))
        self.calls += 1
        if self.kind == "late" and self.calls < 5: return y
        if self.kind == "hidden": self.seen += 1; y = y + .01 * self.seen
        if self.kind == "cache": self.times = torch.arange(2.)
        if self.kind == "norm": y = self.norm(y)
        if self.kind == "views": y = y + self.first * self.last
        if self.kind == "random": y = nn.functional.dropout(y, .3)   # no module that tells of it
        return y if self.kind == "unused" else self.b(y)


def of_kind(kind, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net(kind)


KINDS = ["unused", "late", "tied", "views", "frozen", "hidden", "cache", "norm", "normed", "random"]

@pytest.mark.parametrize("kind", KINDS)
def test_any_network_is_trained_saved_and_resumed_exactly(kind, tmp_path):
    whole = trained(TrainState(of_kind(kind), **OPTIONS), 1, x=X[:100])
    whole.save(tmp_path / "c")
    other = TrainState(of_kind(kind, 9), **OPTIONS)
    other.net.calls = whole.net.calls   # what it keeps outside of tensors is its own business
    other.load(tmp_path / "c")
    assert other.steps == whole.steps
    for kept, buffer in zip(whole.result.buffers(), whole.net.buffers()): assert torch.equal(kept, buffer)
    assert everything(trained(other, 3, x=X[:100])) == everything(trained(whole, 3, x=X[:100]))
    if kind == "tied": assert other.net.a.weight is other.net.c.weight


def test_plain_and_compiled_checkpoints_are_one(tmp_path):
    "compiled as a whole or in a part; the compiler itself is not asked"
    plain, whole, part = (of_kind("tied", seed) for seed in (0, 1, 2))
    part.b = torch.compile(part.b, backend="eager")
    states = [TrainState(net, **OPTIONS) for net in (plain, torch.compile(whole, backend="eager"), part)]
    for a, b in zip(states, [*states[1:], states[0]]):
        trained(a, a.epoch + 1).save(tmp_path / "c")
        b.load(tmp_path / "c")
        assert same(a.result, b.result) and same(a.net, b.net) and b.steps == a.steps


class Extra(nn.Linear):
    def get_extra_state(self): return {"made": "today"}
    def set_extra_state(self, state): pass


def having(**parts):
    net = nn.Linear(2, 2)
    for name, part in parts.items(): setattr(net, name, part)
    return net


@pytest.mark.parametrize("net, says", [
    (Extra(2, 2), r"extra state: .*\(_extra_state\)"), (nn.Linear(2, 2, dtype=torch.cfloat), "complex"),
    (nn.Identity(), "no parameter"), (nn.Linear(2, 2).requires_grad_(False), "none requires a gradient"),
    (nn.LazyLinear(2), "lazy"), (nn.Embedding(3, 2, sparse=True), "sparse gradients"),
    (having(levels=nn.Parameter(torch.arange(3), requires_grad=False)), r"no floats.*\(levels\)"),
    (nn.Linear(2, 2, device="meta"), "without a device"),
    (having(a=nn.Buffer(torch.ones(1, device="meta"))), r"\(a\)"),
    (having(places=nn.Buffer(torch.arange(2).expand(3, 2))), r"lies over itself.*\(places\)")])
def test_a_network_that_no_checkpoint_brings_back_is_refused_at_once(net, says):
    with pytest.raises(ValueError, match=says): TrainState(net)


def test_a_network_that_cannot_be_copied_has_no_average():
    net = nn.Linear(3, 2)
    net.last = net(torch.zeros(1, 3))   # torch copies no tensor that was computed
    with pytest.raises(ValueError, match=r"net cannot be copied, as an average \(ema\) needs"):
        TrainState(net, ema=.9)
