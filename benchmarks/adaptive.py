"""What does it save to compute the adaptive schedules of a stack together?

    .venv/bin/python benchmarks/adaptive.py   # a minute; writes benchmarks/adaptive.md

Eight networks of width 64 (v, two weights, two sets, two seeds, batches of 512) are trained as one stack, an
epoch at a time, in turn with their schedules together and one after the other. The weights are the same to
the bit; the ratio is that of processor time, from pairs of epochs in one process.
"""
import statistics
import time
from pathlib import Path

import torch

from lfdm.adaptive import AdaptiveSchedule
from lfdm.grids import grid
from lfdm.networks import StackedMLP
from lfdm.tasks import task_of
from lfdm.training import TrainState, train_stack

PAIRS = 10
AXES = dict(width=64, schedule="adaptive", logsnr_min=-9.6, logsnr_max=12.9, target="v",
            weighting=["sech", "sigmoid"], dataset=["ring", "swiss"], seed=[100, 101])


def epochs(together):
    "A generator: the processor seconds of each epoch; at the end it returns the weights."
    tasks = [task_of(p) for p in grid(**AXES)]
    losses = [task.parameters.loss() for task in tasks]
    seeds = [task.parameters.seed for task in tasks]
    state = TrainState(StackedMLP([task.new_network() for task in tasks]), 1e-3, seeds, losses=losses)
    data = [task.data.train(seed) for task, seed in zip(tasks, seeds)]
    joins = AdaptiveSchedule.joins
    if not together: AdaptiveSchedule.joins = lambda self, batch_size=None: False
    steps = train_stack(state, losses, data, PAIRS + 1)
    next(steps)   # the groups are made here; this epoch warms up
    AdaptiveSchedule.joins = joins
    for _ in range(PAIRS):
        began = time.process_time()
        next(steps)
        yield time.process_time() - began
    return [w.detach().clone() for w in state.net.parameters()]


def main():
    torch.set_num_threads(1)
    both, seconds, weights = [epochs(True), epochs(False)], [], []
    for _ in range(PAIRS): seconds.append([next(one) for one in both])
    for one in both:
        try: next(one)
        except StopIteration as end: weights.append(end.value)
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    ratios = sorted(a / b for a, b in seconds)
    a, b = (statistics.median(column) for column in zip(*seconds))
    text = f"""# Adaptive schedules of a stack

Together: {a:.2f} s of processor time an epoch of eight networks; one after the other: {b:.2f} s.
Ratio: median {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f} in {PAIRS} pairs of
epochs. The weights are the same to the bit.

Written by `benchmarks/adaptive.py`.
"""
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


main()
