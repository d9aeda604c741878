"""How fast is a training step? Ratios in one run, on the machine it runs on.

    .venv/bin/python -m uv pip install smalldiffusion==0.5.0   # the peer; without it the table leaves it out
    .venv/bin/python benchmarks/training.py                    # two minutes; writes benchmarks/training.md
    .venv/bin/python benchmarks/training.py --quick            # half a minute, printed and not written

Everything trains the same network (seven layers, width 128) on batches of 512 points in float32, whole
steps: batch, times, noise, forward, backward, Adam. Per model-step:

- smalldiffusion's training loop, fed ready-made batches, so that its data loader costs it next to nothing;
- a plain PyTorch loop: plain noise error, fused Adam, nothing else;
- lfdm's `train` for one network, and `train_stack` for several;
- the same stacks in as many processes as there are threads, one thread each, as `make_grid(workers=...)`;
- the arithmetic alone: 6 operations per weight and example, at the fastest matrix product of the same round.

The contestants take turns, round by round, so that a machine that slows down slows all of them. The table
has the medians over rounds, and the lowest and the highest. The share of the limit comes first: the peer's
own time moves between machines more than the rest.
"""
import argparse
import importlib.util
import platform
import statistics
import time
from itertools import islice
from pathlib import Path

import torch
from joblib import Parallel, delayed

from lfdm.data import DATASETS
from lfdm.losses import DiffusionLoss
from lfdm.networks import MLP, StackedMLP
from lfdm.training import TrainState, train, train_stack

BATCH, STEPS, STACKS, PROCESSES = 512, 97, (2, 4, 8, 16), torch.get_num_threads()
LOSS = DiffusionLoss("cosine", "eps", "weighted")
DATA = DATASETS["ring"]().sample(BATCH * STEPS)
FLOPS = 6 * BATCH * sum(p.numel() for p in MLP().parameters() if p.ndim == 2)


def peak():
    "The fastest matrix product, in operations per second: a large one, and the network's own."
    rates = []
    for shape, times in (((1024, 1024, 1024), 20), ((BATCH, 128, 128), 800)):
        a, b = torch.randn(shape[0], shape[1]), torch.randn(shape[1], shape[2])
        a @ b
        began = time.perf_counter()
        for _ in range(times): a @ b
        rates.append(2 * times * torch.tensor(shape).prod().item() / (time.perf_counter() - began))
    return max(rates)


def smalldiffusion():
    "Seconds per step of the peer's own loop."
    from smalldiffusion import ModelMixin, ScheduleLogLinear, training_loop
    from torch.utils.data import DataLoader

    class Net(torch.nn.Module, ModelMixin):
        def __init__(self):
            super().__init__()
            self.net, self.input_dims = MLP(), (2,)
        def forward(self, x, sigma, cond=None): return self.net(x, sigma[:, 0])

    batches = DataLoader(list(DATA.split(BATCH)), batch_size=None)
    loop = training_loop(batches, Net(), ScheduleLogLinear(1000), epochs=10)
    for _ in islice(loop, 10): pass
    began = time.perf_counter()
    for _ in islice(loop, STEPS): pass
    return (time.perf_counter() - began) / STEPS


def plain():
    "Seconds per step of a loop as anyone would write it."
    net = MLP()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
    warm_up, batches = [DATA[:BATCH]] * 10, DATA[torch.randperm(len(DATA))].split(BATCH)
    for i, x in enumerate([*warm_up, *batches]):
        if i == 10: began = time.perf_counter()
        t, eps = torch.rand(len(x)), torch.randn_like(x)
        z = torch.cos(torch.pi * t / 2)[:, None] * x + torch.sin(torch.pi * t / 2)[:, None] * eps
        loss = torch.nn.functional.mse_loss(net(z, t), eps)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return (time.perf_counter() - began) / STEPS


def epochs_of(loop):
    "Seconds of the second epoch: the first warms up."
    next(loop)
    began = time.perf_counter()
    next(loop)
    return time.perf_counter() - began


def alone(): return epochs_of(train(TrainState(MLP()), LOSS, DATA, 2, BATCH)) / STEPS


def stacked(m):
    state = TrainState(StackedMLP([MLP() for _ in range(m)]), seed=list(range(m)))
    return epochs_of(train_stack(state, [LOSS] * m, [DATA] * m, 2, BATCH)) / STEPS / m


def processes(m):
    "Seconds per model-step of stacks side by side: the slowest one's."
    return max(Parallel(PROCESSES)(delayed(stacked)(m) for _ in range(PROCESSES))) / PROCESSES


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 7
    peers = {"smalldiffusion": smalldiffusion} if importlib.util.find_spec("smalldiffusion") else {}
    contestants = peers | {"plain PyTorch loop": plain, "lfdm, one network": alone}
    contestants |= {f"lfdm, {m} stacked": (lambda m=m: stacked(m)) for m in STACKS}
    contestants |= {f"lfdm, {PROCESSES} processes of {m} stacked": (lambda m=m: processes(m)) for m in (2, 4)}
    for m in (2, 4): processes(m)     # starts them
    times, limits = {name: [] for name in contestants}, []
    for _ in range(rounds):
        limits.append(FLOPS / peak())
        for name, run in contestants.items(): times[name].append(run())
        print(".", end="", flush=True)
    times |= {"the arithmetic alone": limits}
    limit, first = statistics.median(limits), next(iter(contestants))
    reference = statistics.median(times[first])
    rows = [f"| | share of the limit | ms per model-step | times {first} |", "|---|---:|---:|---:|"]
    for name, t in times.items():
        ms, low, high = (1e3 * f(t) for f in (statistics.median, min, max))
        rows.append(f"| {name} | {100e3 * limit / ms:.0f} % | {ms:.2f} ({low:.2f} to {high:.2f}) "
                    f"| {1e3 * reference / ms:.2f} |")
    about = (f"Written by `benchmarks/training.py`: 7 layers of width 128, batch {BATCH}, float32, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__.split('+')[0]}, "
             f"{platform.machine()}; "
             f"medians of {rounds} rounds of {STEPS} steps, in turns (lowest to highest); "
             f"fastest matrix product {FLOPS / limit / 1e9:.0f} GFLOP/s. "
             "Only the ratios mean anything elsewhere.")
    text = "# Training steps\n\n" + "\n".join(rows) + f"\n\n{about}\n"
    print("\n\n" + text)
    if not quick: Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
