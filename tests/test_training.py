"Attempts to break lfdm.training: odd batches, cut-short runs, bad checkpoints, and numbers checked against plain Monte Carlo."
import copy
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from lfdm.data import GaussianMixture
from lfdm.evaluation import floor
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP
from lfdm.schedules import SCHEDULES, CosineSchedule, network_logsnr
from lfdm.training import TrainState, clip_gradients, ema_decay, train, training_options, warmed_up
from lfdm.validation import ValidationSet

torch.set_num_threads(1)
DATA = GaussianMixture([[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3])
X = DATA.sample(101)
LOSS = DiffusionLoss('cosine', 'eps', 'weighted')


def new_state(seed=0, width=8, lr=1e-3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TrainState(MLP(2, width), lr, seed, **options)


def last(state, epochs=1, batch_size=20, x=X, loss=LOSS, validation=None):
    for state in train(state, loss, x, epochs, batch_size, validation): pass
    return state


def everything(state):
    "All that a state is made of, as text."
    tensors = lambda d: {k: tensors(v) if isinstance(v, dict) else v.tolist() if torch.is_tensor(v) else v for k, v in sorted(d.items(), key=str)}
    return repr((tensors(state.net.state_dict()), tensors(state.optimizer.state_dict()), [g.get_state().tolist() for g in state.generators], state.epoch, state.history,
                 state.steps, tensors(state.result.state_dict()), {m: tensors(s.state()) for m, s in state.learning.items()}))


# ---- batches

@pytest.mark.parametrize('n, batch_size', [(101, 20), (101, 100), (101, 101), (5, 1), (1, 1), (2, 2.)])
def test_every_example_is_seen_once_an_epoch(n, batch_size):
    x, seen = torch.arange(2. * n).reshape(n, 2), []
    class Recorder(DiffusionLoss):
        def __call__(self, net, x, generator): seen.append(x); return super().__call__(net, x, generator=generator)
    state = last(new_state(), 2, batch_size, x / n, Recorder())
    assert [len(b) for b in seen] == 2 * [int(min(batch_size, n - i)) for i in range(0, n, int(batch_size))]
    for epoch in torch.cat(seen).split(n): assert torch.equal((epoch * n)[:, 0].round().sort().values, x[:, 0])
    if n > 2: assert not torch.equal(*torch.cat(seen).split(n))
    assert state.epoch == 2 and [h['epoch'] for h in state.history] == [1, 2]


@pytest.mark.parametrize('wrong', [0, -1, 102, 1.5, math.nan, math.inf, True, 'true', '', None, [20]])
def test_bad_batch_sizes_and_epochs(wrong):
    state = new_state(); before = everything(state)
    with pytest.raises((ValueError, TypeError), match='batch_size.*' + ('nan' if wrong != wrong else str(wrong).replace('[', r'\['))):
        last(state, batch_size=wrong)
    if wrong not in (0, 102):
        with pytest.raises((ValueError, TypeError), match='epochs'): last(state, epochs=wrong)
    assert everything(state) == before


def test_no_data_is_refused():
    with pytest.raises(ValueError, match='batch_size 1 is larger than the data: 0 examples'): last(new_state(), batch_size=1, x=X[:0])


@pytest.mark.parametrize('lr, error', [(0, ValueError), (-1e-3, ValueError), (math.nan, ValueError), ('1e-3', TypeError), (True, TypeError), (None, TypeError)])
def test_bad_learning_rates(lr, error):
    with pytest.raises(error, match='lr must be'): TrainState(MLP(2, 4), lr)


@pytest.mark.parametrize('seed', [.5, math.nan, '0', None, True, 2**64, -2**63 - 1, 10**400])
def test_bad_seeds(seed):
    for make in (lambda: TrainState(MLP(2, 4), seed=seed), lambda: ValidationSet(LOSS, X, 4, seed=seed)):
        with pytest.raises((ValueError, TypeError), match='seed must be'): make()


# ---- resuming

def test_resumed_after_any_epoch_is_bit_identical(tmp_path):
    validation = ValidationSet(LOSS, X, bins=5, denoise=DATA.denoise)
    whole = new_state()
    for state in train(whole, LOSS, X, 4, 20, validation): state.save(tmp_path / f'{state.epoch}')
    expected = everything(whole)
    assert [h['epoch'] for h in whole.history] == [0, 1, 2, 3, 4]
    for epoch in (1, 2, 3, 4):
        other = new_state(seed=77)
        other.load(tmp_path / f'{epoch}')
        assert other.epoch == epoch
        assert everything(last(other, 4, 20, validation=validation)) == expected


def test_a_state_goes_on_where_it_stands():
    stopped = new_state()
    for state in train(stopped, LOSS, X, 4, 20):
        if state.epoch == 2: break
    assert everything(last(stopped, 4)) == everything(last(new_state(), 4))


def test_the_global_random_state_is_neither_read_nor_changed():
    results = []
    for seed in (1, 2):
        state = new_state()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        last(state, 2, validation=ValidationSet(LOSS, X, 5, denoise=DATA.denoise))
        assert torch.equal(torch.get_rng_state(), before)
        results.append(everything(state))
    assert results[0] == results[1]


def test_validation_does_not_change_training():
    plain, watched = last(new_state(), 2), last(new_state(), 2, validation=ValidationSet(LOSS, X, 5))
    assert all(torch.equal(a, b) for a, b in zip(plain.net.parameters(), watched.net.parameters()))
    assert [h['train_loss'] for h in plain.history] == [h['train_loss'] for h in watched.history[1:]]


# ---- checkpoints

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('checkpoint') / 'c.safetensors'
    last(new_state(), 2).save(path)
    return path


META = {'epoch': '2', 'history': '[]'}

def without(path, gone=(), new={}, meta=META):
    tensors = {k: v for k, v in load_file(path).items() if not k.startswith(gone or ('no such',))} | new
    save_file(tensors, path, meta)

DAMAGE = {
    'empty': lambda p: p.write_bytes(b''),
    'garbage': lambda p: p.write_bytes(bytes(range(256)) * 20),
    'zeros': lambda p: p.write_bytes(bytes(p.stat().st_size)),
    'text': lambda p: p.write_text('<<<<<<< HEAD\n'),
    'cut in the header': lambda p: p.write_bytes(p.read_bytes()[:100]),
    'cut in half': lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
    'last byte gone': lambda p: p.write_bytes(p.read_bytes()[:-1]),
    'one byte more': lambda p: p.write_bytes(p.read_bytes() + b'0'),
    'missing': lambda p: p.unlink(),
    'a folder': lambda p: (p.unlink(), p.mkdir()),
    'no metadata': lambda p: without(p, meta=None),
    'no epoch': lambda p: without(p, meta={'history': '[]'}),
    'epoch is no number': lambda p: without(p, meta={'epoch': 'two', 'history': '[]'}),
    'history is no json': lambda p: without(p, meta={'epoch': '2', 'history': '[{]'}),
    'history is no list': lambda p: without(p, meta={'epoch': '2', 'history': '5'}),
    'no weights': lambda p: without(p, 'net.'),
    'one weight gone': lambda p: without(p, 'net.layers.0.bias'),
    'one weight more': lambda p: without(p, new={'net.layers.99.bias': torch.zeros(3)}),
    'no generator': lambda p: without(p, 'generators'),
    'generator of a gpu': lambda p: without(p, new={'generators': torch.zeros(1, 16, dtype=torch.uint8)}),
    'generator of floats': lambda p: without(p, new={'generators': torch.zeros(1, 5056)}),
    'no moments': lambda p: without(p, 'optimizer.'),
    'moments of one weight gone': lambda p: without(p, 'optimizer.3.'),
    'one moment gone': lambda p: without(p, 'optimizer.3.exp_avg_sq'),
    'moments of another shape': lambda p: without(p, new={'optimizer.3.exp_avg': torch.zeros(3)}),
    'infinitely many steps': lambda p: without(p, new={'optimizer.0.step': torch.tensor(math.inf)}),
    'an average not asked for': lambda p: without(p, new={'ema.layers.0.bias': torch.zeros(8)}),
    'what a schedule learned, not asked for': lambda p: without(p, new={'schedule.0.seen': torch.zeros(4)}),
    'made with an average': lambda p: without(p, meta=META | {'options': '{"ema": 0.9}'}),
    'unknown options': lambda p: without(p, meta=META | {'options': '{"momentum": 0.9}'}),
    'options that cannot be': lambda p: without(p, meta=META | {'options': '{"ema": 2}'}),
    'options are no json': lambda p: without(p, meta=META | {'options': '{'}),
    'options are no dict': lambda p: without(p, meta=META | {'options': '[1]'}),
}

@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_changes_nothing(damage, checkpoint, tmp_path):
    path = tmp_path / 'damaged.safetensors'
    path.write_bytes(checkpoint.read_bytes())
    DAMAGE[damage](path)
    state = last(new_state(5), 1); before = everything(state)
    with pytest.raises(ValueError, match='damaged.safetensors'): state.load(path)
    assert everything(state) == before
    state.load(checkpoint)
    assert state.epoch == 2


@pytest.mark.parametrize('width', [7, 9, 16])
def test_a_checkpoint_of_another_width_changes_nothing(width, checkpoint):
    state = new_state(5, width); before = everything(state)
    with pytest.raises(ValueError, match='another shape'): state.load(checkpoint)
    assert everything(state) == before


def test_loading_keeps_the_own_learning_rate(checkpoint):
    state = new_state(lr=.5); state.load(checkpoint)
    assert state.optimizer.param_groups[0]['lr'] == .5


def test_a_full_disk_keeps_the_former_checkpoint(tmp_path):
    resource = pytest.importorskip('resource')  # a limit on the size of a file fails as a full disk does: in the middle of writing
    path = tmp_path / 'c.safetensors'
    state = last(new_state(), 2); state.save(path)
    former, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    last(state, 3)
    for limit in (0, 100, len(former) // 2):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(OSError, match='c.safetensors.*untouched'): state.save(path)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == former and os.listdir(tmp_path) == ['c.safetensors']
    state.save(path)
    assert path.read_bytes() != former


def test_the_former_checkpoint_stands_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path, replace, seen = tmp_path / 'c', os.replace, []
    state = last(new_state(), 1); state.save(path)
    former = path.read_bytes()
    def watched(a, b): seen.append(path.read_bytes() == former and new_state(3).load(a)); replace(a, b)
    monkeypatch.setattr(os, 'replace', watched)
    last(state, 2).save(path)
    assert seen == [None] and path.read_bytes() != former


def test_saving_to_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match='nowhere'): new_state().save(tmp_path / 'nowhere' / 'c.safetensors')


def test_a_leftover_draft_does_no_harm(tmp_path):
    (tmp_path / 'c.draft').write_text('half a checkp')
    new_state().save(tmp_path / 'c')
    new_state(3).load(tmp_path / 'c')
    assert os.listdir(tmp_path) == ['c']


# ---- the options of a step

ALL = dict(ema=.9, clip=.2, warmup=15)   # six steps an epoch: the warm-up ends in the third


def by_hand(epochs, lr=1e-3):
    "Adam without any option, in the plainest words."
    state = new_state(); net, g = state.net, state.generators[0]
    optimizer, losses = torch.optim.Adam(net.parameters(), lr, fused=True), []
    for _ in range(epochs):
        total = torch.zeros(())
        for batch in torch.randperm(len(X), generator=g).split(20):
            value = LOSS(net, X[batch], generator=g).mean()
            optimizer.zero_grad(); value.backward(); optimizer.step()
            total += value.detach() * len(batch)
        losses.append(total.item() / len(X))
    return net, losses


@pytest.mark.parametrize('options', [{}, dict(ema=None, clip=None, warmup=0), dict(ema=.99), dict(clip=1e9), dict(warmup=1)], ids=str)
def test_options_that_are_off_or_have_nothing_to_do_leave_training_as_it_was(options):
    "bit for bit; the average watches"
    (net, losses), state = by_hand(3), last(new_state(**options), 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), state.net.parameters(), strict=True))
    assert [h['train_loss'] for h in state.history] == losses and state.steps == 18
    assert (state.result is state.net) == (options.get('ema') is None)


def each_step(state, steps):
    "The weights and the gradients used, after each of some steps."
    for i in range(steps):
        state.descend(LOSS(state.net, X[20 * i:20 * i + 20], generator=state.generators[0]).mean())
        yield [p.detach().clone() for p in state.net.parameters()], [p.grad.clone() for p in state.net.parameters()], state.optimizer.param_groups[0]['lr']


@pytest.mark.parametrize('ema', [.05, .3, .9999])
def test_the_average_by_hand(ema):
    state = new_state(ema=ema, lr=.1)
    average = [p.detach().double().clone() for p in state.net.parameters()]
    for n, (weights, _, _) in enumerate(each_step(state, 5)):
        d = min(ema, (1 + n) / (10 + n))
        average = [d * a + (1 - d) * w for a, w in zip(average, weights)]
        for a, b in zip(average, state.average.parameters(), strict=True): torch.testing.assert_close(a.float(), b, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(weights, state.net.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(state.average.parameters(), state.net.parameters()))
    assert not any(p.requires_grad for p in state.average.parameters()) and state.result is state.average


def test_the_decay_rises_to_its_value_and_stays():
    decays = [ema_decay(.99, n) for n in range(2000)]
    assert decays[0] == .1 and decays == sorted(decays) and decays[890:892] == [.99, .99] and decays[889] < .99
    assert ema_decay(.05, 0) == .05


def test_an_average_of_what_is_no_weight():
    "a buffer, as of batch normalization, is taken as it is"
    class Counting(MLP):
        def __init__(self): super().__init__(2, 4); self.register_buffer('seen', torch.zeros(()))
        def forward(self, z, u): self.seen += 1; return super().forward(z, u)
    state = last(TrainState(Counting(), ema=.9), 1)
    assert state.net.seen == state.average.seen == 6


def test_validation_sees_the_average():
    v = ValidationSet(LOSS, X, 5, denoise=DATA.denoise)
    state = last(new_state(ema=.9, lr=.05), 2, validation=v)
    same = lambda report: all(state.history[-1][k] == x for k, x in report.items())
    assert same(v(state.result)) and not same(v(state.net)) and state.history[0].items() > v(new_state().net).items()
    assert [h['train_loss'] for h in state.history[1:]] == [h['train_loss'] for h in last(new_state(lr=.05), 2).history]   # of the weights as they move


@pytest.mark.parametrize('clip', [1e-3, .05, 1e6])
def test_a_clipped_gradient_is_no_longer_and_points_where_it_did(clip):
    state = new_state()
    LOSS(state.net, X, generator=state.generators[0]).mean().backward()
    before = torch.cat([p.grad.flatten() for p in state.net.parameters()])
    norm = clip_gradients(state.net, clip)
    after = torch.cat([p.grad.flatten() for p in state.net.parameters()])
    assert norm == pytest.approx(before.norm().item(), rel=1e-5) and after.norm() <= clip * (1 + 1e-5)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), rtol=1e-4, atol=1e-7)
    if clip > 1: assert torch.equal(before, after)


def test_training_uses_the_clipped_gradient():
    free, clipped = (list(each_step(new_state(clip=c), 4)) for c in (None, .01))
    assert all(torch.cat([g.flatten() for g in gradients]).norm() > .02 for _, gradients, _ in free)
    assert all(torch.cat([g.flatten() for g in gradients]).norm() <= .01 * (1 + 1e-5) for _, gradients, _ in clipped)
    assert not torch.equal(free[-1][0][0], clipped[-1][0][0])


def test_the_learning_rate_by_step():
    assert [lr for _, _, lr in each_step(new_state(lr=.1, warmup=4), 5)] == pytest.approx([.025, .05, .075, .1, .1])
    assert [lr for _, _, lr in each_step(new_state(lr=.1), 2)] == [.1, .1]
    assert [warmed_up(n, 2) for n in range(4)] == [.5, 1, 1, 1] and warmed_up(0, 0) == warmed_up(0, 1) == 1


WRONG = {'ema': [0, 1, 0., 1., -.5, 1.5, math.nan, math.inf, True, '0.9', [.9], 10**400], 'clip': [0, -1, math.nan, math.inf, True, '1', [1]],
         'warmup': [-1, .5, math.nan, math.inf, True, '5', None, [5]]}

@pytest.mark.parametrize('name, value', [(k, v) for k, values in WRONG.items() for v in values], ids=lambda v: str(v)[:12])
def test_bad_options(name, value):
    for make in (training_options, lambda **kw: TrainState(MLP(2, 4), **kw)):
        with pytest.raises((ValueError, TypeError), match=f'^{name} must'): make(**{name: value})


def test_resumed_with_all_options_is_bit_identical(tmp_path):
    "the warm-up ends between the second checkpoint and the third"
    validation = ValidationSet(LOSS, X, bins=5, denoise=DATA.denoise)
    whole = new_state(**ALL)
    for state in train(whole, LOSS, X, 4, 20, validation): state.save(tmp_path / f'{state.epoch}')
    expected = everything(whole)
    for epoch in (1, 2, 3, 4):
        other = new_state(seed=77, **ALL)
        other.load(tmp_path / f'{epoch}')
        assert other.steps == 6 * epoch and other.average is not other.net
        assert everything(last(other, 4, 20, validation=validation)) == expected
    new_state(**ALL).save(tmp_path / '0')
    other = new_state(seed=77, **ALL); other.load(tmp_path / '0')
    assert other.steps == 0 and everything(last(other, 4, 20, validation=validation)) == expected


def test_a_checkpoint_from_before_the_options_is_one_without(checkpoint, tmp_path):
    (tmp_path / 'old').write_bytes(checkpoint.read_bytes())
    without(tmp_path / 'old')
    state = new_state(5); state.load(tmp_path / 'old')
    assert everything(last(state, 3)).replace(repr(state.history), '') == everything(whole := last(new_state(), 3)).replace(repr(whole.history), '')
    with pytest.raises(ValueError, match='made with ema None, not 0.9'): new_state(ema=.9).load(tmp_path / 'old')


@pytest.mark.parametrize('name, other', [('ema', .8), ('ema', None), ('clip', 1.), ('clip', None), ('warmup', 0), ('warmup', 14)])
def test_a_checkpoint_of_other_options_is_refused_and_changes_nothing(name, other, tmp_path):
    last(new_state(**ALL), 1).save(tmp_path / 'c')
    state = last(new_state(5, **ALL | {name: other}), 1); before = everything(state)
    with pytest.raises(ValueError, match=f'it was made with {name} {ALL[name]}, not {other}\\. Move'): state.load(tmp_path / 'c')
    assert everything(state) == before


@pytest.mark.parametrize('damage', ['ema.', 'ema.layers.0.bias'])
def test_a_lost_average_is_missed(damage, tmp_path):
    last(new_state(**ALL), 1).save(tmp_path / 'c')
    without(tmp_path / 'c', damage, meta={'epoch': '1', 'history': '[]', 'options': json.dumps(ALL)})
    state = new_state(5, **ALL); before = everything(state)
    with pytest.raises(ValueError, match='does not hold the average'): state.load(tmp_path / 'c')
    assert everything(state) == before


# ---- schedules that learn

class Learning(CosineSchedule):
    "A schedule that counts what it was asked, and refuses to have seen less than nothing."
    def __init__(self, bins=4): super().__init__(); self._seen, self._asked = torch.zeros(bins), torch.zeros((), dtype=torch.int64)
    def logsnr(self, t):
        if torch.is_tensor(t) and t.ndim: self._seen += t.sum().item(); self._asked += 1
        return super().logsnr(t) * (1 - .1 * self._seen[0].item() / (1 + self._seen[0].item()))   # what was seen matters
    def state(self): return {'seen': self._seen, 'seen.times': self._asked}
    def load_state(self, tensors):
        if tensors['seen.times'] < 0: raise ValueError('it saw less than nothing')
        self._seen, self._asked = tensors['seen'], tensors['seen.times']


def learning(seed=0, bins=4, **options):
    loss = DiffusionLoss(Learning(bins))
    return loss, new_state(seed, schedules=[loss.schedule], **options)


def test_what_a_schedule_learned_is_resumed_bit_identically(tmp_path):
    loss, whole = learning(**ALL)
    for state in train(whole, loss, X, 4, 20): state.save(tmp_path / f'{state.epoch}')
    assert loss.schedule._asked > 0 and len(loss.schedule._seen.unique()) == 1
    for epoch in (1, 3):
        loss, other = learning(77, **ALL)
        last(other, 1, loss=loss)
        other.load(tmp_path / f'{epoch}')
        assert everything(last(other, 4, loss=loss)) == everything(whole)


@pytest.mark.parametrize('damage', [dict(gone='schedule.0.seen'), dict(gone='schedule'), dict(new={'schedule.0.seen': torch.zeros(5)}), dict(new={'schedule.1.seen': torch.zeros(4)}),
                                    dict(new={'schedule.0.seen': torch.zeros(4).double()}), dict(new={'schedule.0.seen.times': torch.tensor(-1)})], ids=str)
def test_what_a_schedule_learned_is_taken_whole_or_not_at_all(damage, tmp_path):
    loss, state = learning()
    last(state, 2, loss=loss).save(tmp_path / 'c')
    without(tmp_path / 'c', **damage)
    loss, state = learning(5); last(state, 1, loss=loss); before = everything(state)
    with pytest.raises(ValueError, match='what these schedules have learned|less than nothing'): state.load(tmp_path / 'c')
    assert everything(state) == before


def test_a_schedule_that_learns_must_be_known_to_the_state(checkpoint):
    loss, state = learning()
    for stranger in (new_state(), learning()[1]):
        with pytest.raises(ValueError, match=r'schedules=\[loss.schedule\]'): last(stranger, 1, loss=loss)
    with pytest.raises(ValueError, match='does not know it'): last(state, 1)
    with pytest.raises(ValueError, match='does not hold what these schedules have learned'): state.load(checkpoint)
    with pytest.raises(ValueError, match='1 networks need as many schedules, not 2'): new_state(schedules=[Learning(), Learning()])
    assert new_state(schedules=[LOSS.schedule]).learning == {}   # one that does not learn may be named


# ---- training that goes wrong

@pytest.mark.parametrize('validation', [None, ValidationSet(LOSS, X, 5)], ids=['plain', 'validated'])
def test_nan_in_training(validation):
    state = new_state(lr=1e20)
    with pytest.raises(FloatingPointError, match=r'epoch \d+ .*Eps.*lr 1e\+20.*Lower lr'): last(state, 50, validation=validation)
    assert len(state.history) == state.epoch + bool(validation) and all(math.isfinite(h.get('train_loss', 0)) for h in state.history)


def test_nan_in_the_data():
    with pytest.raises(FloatingPointError, match='epoch 1 '): last(new_state(), 3, x=X / 0)


def test_a_network_of_the_wrong_shape_is_refused():
    class Column(MLP):
        def forward(self, z, u): return super().forward(z, u)[:, :1]
    with pytest.raises(ValueError, match=r'returned shape \(20, 1\)'): last(TrainState(Column(2, 4)), 1)


# ---- the validation set

@pytest.mark.parametrize('bins', [0, -1, 102, 2.5, math.nan, True, '5', None])
def test_bad_bins(bins):
    with pytest.raises((ValueError, TypeError), match='bins must be'): ValidationSet(LOSS, X, bins)


@pytest.mark.parametrize('ends', [(-math.inf, 12.9), (-12.9, math.inf), (-math.inf, math.inf)])
def test_an_infinite_range_is_refused(ends):
    with pytest.raises(ValueError, match='finite range'): ValidationSet(DiffusionLoss(SCHEDULES['cosine'](*ends), 'v'), X, 5)


class Exact:
    "The network that knows the answer, plus an offset."
    def __init__(self, loss, offset=0.): self.loss, self.offset = loss, offset
    def __call__(self, z, u):
        alpha, sigma = (a[:, None] for a in self.loss.schedule.scales(network_logsnr(u)))
        z = z * (alpha**2 + sigma**2)**0.5
        x = DATA.denoise(z, alpha, sigma)
        return self.loss.target.encode(x, (z - alpha * x) / sigma, alpha, sigma) + self.offset


CHOICES = [('cosine', 'eps', 'weighted'), ('cosine', 'v', 'nelbo'), ('linear', 'x', 'weighted'), ('ve', 'eps', 'nelbo'), ('ve', 'v', 'weighted')]
ids = '-'.join
X64 = DATA.sample(20_000, 3, dtype=torch.float64)

@pytest.mark.parametrize('choice', CHOICES, ids=ids)
def test_the_exact_network_has_no_excess_and_its_loss_is_the_floor(choice):
    loss = DiffusionLoss(*choice)
    report = ValidationSet(loss, X64, 20, denoise=DATA.denoise)(Exact(loss))
    assert 0 <= report['excess'] < 1e-9 * report['loss'] and max(report['excess_per_logsnr']) < 1e-9 * max(report['loss_per_logsnr'])
    assert abs(report['loss'] - floor(loss, DATA, 2001)) < 4 * report['loss_se']
    assert report['loss_se'] < .1 * report['loss']


@pytest.mark.parametrize('choice', CHOICES, ids=ids)
def test_loss_and_excess_agree_with_plain_monte_carlo_and_the_floor(choice):
    loss, g = DiffusionLoss(*choice), torch.Generator().manual_seed(1)
    net = Exact(loss, offset=.3)
    report = ValidationSet(loss, X64, 20, denoise=DATA.denoise)(net)
    x = X64.repeat(3, 1)
    plain = loss(net, x, t=torch.rand(len(x), generator=g).double(), eps=torch.randn(x.shape, generator=g).double())
    assert abs(report['loss'] - plain.mean().item()) < 4 * math.hypot(report['loss_se'], plain.std().item() / len(x)**.5)
    lower = floor(loss, DATA, 2001)
    assert abs(report['loss'] - report['excess'] - lower) < 4 * math.hypot(report['loss_se'], report['excess_se'])
    assert report['excess'] > 4 * report['excess_se']


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 60), st.integers(1, 60), st.integers(0, 99))
def test_the_loss_per_logsnr_integrates_to_the_loss(n, bins, seed):
    "for every number of examples and bins, also where one does not divide the other"
    bins = min(n, bins)
    v = ValidationSet(LOSS, X[:n], bins, seed, DATA.denoise)
    report = v(new_state().net)
    for name in ('loss', 'excess'):
        per = report[f'{name}_per_logsnr']
        assert len(per) == len(v.logsnr) == bins
        assert sum(per) * v.width == pytest.approx(report[name], rel=1e-9)


def test_the_loss_per_logsnr_lies_in_the_right_bins():
    "a loss of 1 everywhere: each bin then holds the density of λ there"
    class Ones(DiffusionLoss):
        def error(self, y, y_hat, level): return torch.ones_like(level.logsnr)
    for bins, n in ((20, 20_000), (7, 20_000)):
        v = ValidationSet(Ones(), X64[:n], bins)
        edges = torch.linspace(-12.9, 12.9, bins + 1).double()
        expected = -v.loss.schedule.t(edges).diff() / v.width
        torch.testing.assert_close(torch.tensor(v(lambda z, u: z)['loss_per_logsnr']).double(), expected, rtol=2e-3, atol=1e-9)


def test_the_same_seed_gives_the_same_set_and_another_another():
    a, b, c = (ValidationSet(LOSS, X, 5, seed) for seed in (0, 0, 1))
    assert torch.equal(a.z, b.z) and not torch.equal(a.z, c.z) and not torch.equal(a.level.logsnr, c.level.logsnr)


def test_a_report_is_json_and_measuring_leaves_no_trace():
    net = new_state().net
    v = ValidationSet(LOSS, X, 5, denoise=DATA.denoise)
    before = copy.deepcopy(net.state_dict())
    report = v(net)
    assert json.loads(json.dumps(report)) == report == v(net)
    assert all(p.grad is None for p in net.parameters()) and all(torch.equal(before[k], p) for k, p in net.state_dict().items())
    assert set(report) == {f'{a}{b}' for a in ('loss', 'excess') for b in ('', '_se', '_per_logsnr')}
    assert set(ValidationSet(LOSS, X, 5)(net)) == {'loss', 'loss_se', 'loss_per_logsnr'}
