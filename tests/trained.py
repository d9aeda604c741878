"Small states for the tests of training, checkpoints, validation and stacks."
import torch

from lfdm.data import GaussianMixture
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP, StackedMLP
from lfdm.schedules import CosineSchedule
from lfdm.training import TrainState, train, train_stack

torch.set_num_threads(1)
DATA = GaussianMixture([[0., 0.], [2., 1.], [-1., 3.]], [.3, .6, .9], [.2, .5, .3])
X = DATA.sample(101)
LOSS = DiffusionLoss("cosine", "eps", "weighted")
OPTIONS = dict(ema=.9, clip=.2, warmup=15, cooldown=7)   # six steps an epoch: it ends in the third


def new_net(seed=0, width=8):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(2, width)


def new_state(seed=0, width=8, lr=1e-3, **options):
    return TrainState(new_net(seed, width), lr, seed, **options)


def trained(state, epochs=1, batch_size=20, x=X, loss=LOSS, validation=None):
    for _ in train(state, loss, x, epochs, batch_size, validation): pass
    return state


def new_stack(losses, lr=1e-3, shift=0, **options):
    "A state for these losses; network m begins as `new_state(m)` does."
    seeds = [m + shift for m in range(len(losses))]
    known = options.pop("known", losses)
    return TrainState(StackedMLP([new_net(m) for m in seeds]), lr, seeds, losses=known, **options)


def stacked(losses, epochs=1, data=None, validations=None, **options):
    state = new_stack(losses, **options)
    for _ in train_stack(state, losses, data or [X] * len(losses), epochs, 50, validations): pass
    return state


def same(a, b):
    "Have two networks the same weights, bit for bit?"
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def everything(state):
    "All that a state is made of, as text."
    def plain(d):
        if isinstance(d, dict): return {k: plain(v) for k, v in sorted(d.items(), key=str)}
        return d.tolist() if torch.is_tensor(d) else d
    parts = dict(net=state.net.state_dict(), result=state.result.state_dict(),
                 optimizer=state.optimizer.state_dict(),
                 random=dict(enumerate(g.get_state() for g in state.generators)),
                 learned={m: s.state() for m, s in state.learning.items()})
    return repr((plain(parts), state.epoch, state.steps, state.history))


class Learning(CosineSchedule):
    "A schedule that moves with the times it was asked for."
    def __init__(self):
        self._forget()
        super().__init__()
        self._forget()   # what the constructor asked

    def _forget(self): self._seen, self._asked = torch.zeros(4), torch.zeros((), dtype=torch.int64)

    def logsnr(self, t):
        if torch.is_tensor(t) and t.ndim:
            self._seen += t.sum().item()
            self._asked += 1
        seen = self._seen[0].item()
        return super().logsnr(t) * (1 - .1 * seen / (1 + seen))   # what was seen matters

    def state(self): return {"seen": self._seen, "seen.times": self._asked}

    def load_state(self, tensors):
        self._seen, self._asked = tensors["seen"], tensors["seen.times"]
        if self._asked < 0: raise ValueError("it saw less than nothing")


def learning(seed=0, **options):
    "A loss whose schedule learns, and a state that knows it."
    loss = DiffusionLoss(Learning())
    return loss, new_state(seed, losses=[loss], **options)
