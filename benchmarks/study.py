"""What does a network of the 2D study cost? Processor time of each stage, beside the arithmetic alone.

    make benchmark                              # this and the training step; five minutes
    .venv/bin/python benchmarks/study.py        # two minutes; writes benchmarks/study.md
    .venv/bin/python benchmarks/study.py --quick              # a minute, printed and not written
    .venv/bin/python benchmarks/study.py --also before=PATH   # beside another checkout, round by round

A network of the thesis's study has 7 layers of width 128, sees 50,000 points in batches of 512 for 100
epochs, is validated on 10,000 points after each, draws 10,000 samples in 512 steps and is judged. Each
round is a new process of one thread, as `make_grid` has one for each core: it trains one stack of 4 for 15
epochs and measures the last (the first are not like the rest: units die later), takes 64 steps with 4 × 500
samples, judges (the second time counts), and measures the fastest matrix product. The stages are scaled up
to a whole network. Floors come from the cache that the first round fills, as in a study.

The arithmetic: 6 operations for each weight and training example, 2 for each validation point and sampling
step, at the speed of the fastest matrix product of the same round. A limit, and not one to be reached: the
products alone, on memory that is kept, come to 80 to 100 % of it.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STACK, EPOCHS, MEASURED, STEPS, SAMPLES = 4, 100, 15, 512, 10_000
STAGES = {
    "setting": "data, validation points and exact answers",
    "training": "training steps",
    "validation": "validation, after each epoch",
    "checkpoint": "checkpoint, after each epoch",
    "sampling": "sampling",
    "judging": "judging",
}


# ---- one round, in a process of its own

def spent(run, times=1):
    "Processor seconds of one call, this process's."
    began = time.process_time()
    for _ in range(times): run()
    return (time.process_time() - began) / times


def peak():
    "The fastest matrix product, in operations per second: a large one, or the network's own."
    import torch
    rates = []
    for n, k, m, times in ((1024, 1024, 1024, 15), (512, 128, 128, 1500)):
        a, b = torch.randn(n, k), torch.randn(k, m)
        a @ b
        rates.append(2 * n * k * m / spent(lambda a=a, b=b: a @ b, times))
    return max(rates)


class Timed:
    "A function that adds up its processor seconds."
    def __init__(self, function): self.function, self.seconds = function, 0.

    def __call__(self, *args):
        began = time.process_time()
        try: return self.function(*args)
        finally: self.seconds += time.process_time() - began


def trained(tasks, folder):
    "(the state after some epochs, seconds of steps, of validation and of a checkpoint in the last)."
    from lfdm.networks import StackedMLP
    from lfdm.training import TrainState, train_stack
    p = tasks[0].parameters
    state = TrainState(StackedMLP([task.new_network() for task in tasks]), p.lr, [p.seed] * len(tasks))
    losses, data = [t.parameters.loss() for t in tasks], [t.data.train(p.seed) for t in tasks]
    checks = [Timed(task.validation()) for task in tasks]
    loop = train_stack(state, losses, data, MEASURED, p.batch_size, checks)
    for _ in range(MEASURED - 1): next(loop)
    before = sum(check.seconds for check in checks)
    epoch = spent(lambda: next(loop))
    validation = sum(check.seconds for check in checks) - before
    return state, epoch - validation, validation, spent(lambda: state.save(folder / "checkpoint"))


def set_up():
    "Data, and validation points with exact answers: a network's share, of the eight on one set and seed."
    from lfdm.parameters import Parameters
    from lfdm.tasks import task_of
    asked = [Parameters(target=y, weighting=w, seed=5) for y in ("x", "eps", "v", "score")
             for w in ("weighted", "nelbo")]
    def all_eight():
        for p in asked: task_of(p).data.train(p.seed), task_of(p).validation()
    return spent(all_eight) / len(asked)


def round_of():
    "Processor seconds of each stage of a whole network, of what a process pays once, and of the arithmetic."
    import dataclasses

    import torch
    torch.set_num_threads(1)
    from lfdm.grids import sample_stacked
    from lfdm.parameters import Parameters
    from lfdm.tasks import task_of
    silent = lambda phase, done, total: None
    tasks = [task_of(Parameters(dataset=d, target="v")) for d in ("cluster", "ring", "swiss", "waves")]
    with tempfile.TemporaryDirectory() as folder:
        imported = time.process_time()
        state, training, validation, checkpoint = trained(tasks, Path(folder))
    few = [task_of(dataclasses.replace(t.parameters, n_samples=500, sample_steps=64)) for t in tasks]
    sample_stacked(few, state.result, silent)
    sampling = spent(lambda: sample_stacked(few, state.result, silent), 3)
    samples = [task.data.sample(SAMPLES, 1) for task in tasks]
    judge = lambda m: spent(lambda: tasks[m].judge(state.result.network(m), samples[m], silent))
    judge(1)   # finds what is remembered afterwards
    judging = judge(1)
    seconds = {
        "setting": set_up(),
        "training": training * EPOCHS / STACK,
        "validation": validation * EPOCHS / STACK,
        "checkpoint": checkpoint * EPOCHS / STACK,
        "sampling": sampling * (SAMPLES / 500) * (STEPS / 64) / STACK,
        "judging": judging,
    }
    limit = peak()
    products = 2 * sum(w[0].numel() for w in state.net.weights) / limit
    arithmetic = {
        "training": 3 * products * tasks[0].data.n_train * EPOCHS,
        "validation": products * 10_000 * EPOCHS,
        "sampling": products * SAMPLES * STEPS,
    }
    return {"seconds": seconds, "once": imported, "arithmetic": arithmetic, "limit": limit}


# ---- all rounds, in turns

def rounds_of(checkouts, many):
    "name -> what each round found; the checkouts take turns."
    found = {name: [] for name in checkouts}
    for _ in range(many):
        for name, root in checkouts.items():
            env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            if name != "now": env = {k: v for k, v in env.items() if not k.startswith("MALLOC_")}
            command = [sys.executable, __file__, "--round"]
            said = subprocess.check_output(command, env=env, cwd=root, text=True)
            found[name].append(json.loads(said.splitlines()[-1]))
            print(".", end="", flush=True)
    return found


def middle(values): return statistics.median(values)


def spread(values): return f"{middle(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(found):
    "A Markdown table: the stages of a network in each checkout, and the arithmetic."
    limits = {k: middle([r["arithmetic"].get(k, 0) for rs in found.values() for r in rs]) for k in STAGES}
    def row(title, seconds, limit):
        shares = [f"{100 * limit / middle(s):.0f} %" if limit else "" for s in seconds]
        cells = (cell for share, s in zip(shares, seconds) for cell in (share, spread(s)))
        return f"| {title} | {' | '.join(cells)} | {f'{limit:.1f}' if limit else ''} |"
    heads = "".join(f" share of the limit, {name} | CPU-seconds, {name} |" for name in found)
    of = lambda take: [[take(r) for r in rs] for rs in found.values()]
    rows = [row(title, of(lambda r, k=k: r["seconds"][k]), limits[k]) for k, title in STAGES.items()]
    whole = row("**a network**", of(lambda r: sum(r["seconds"].values())), sum(limits.values()))
    once = row("imports, once in each process", of(lambda r: r["once"]), 0)
    lines = [f"| |{heads} arithmetic |", f"|---|{'---:|' * (2 * len(found) + 1)}", *rows, whole, once]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--round", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.round: return print(json.dumps(round_of()))
    also = dict(pair.split("=", 1) for pair in asked.also)
    many = 3 if asked.quick else 5
    found = rounds_of({name: Path(path).resolve() for name, path in also.items()} | {"now": ROOT}, many)
    import torch
    speed = middle([r["limit"] for r in found["now"]])
    kept = "with" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "without"
    about = (f"Written by `benchmarks/study.py`: medians of {many} rounds (lowest to highest), {kept} the "
             f"malloc thresholds of the Makefile{' now' * bool(also)}; one thread, float32, "
             f"torch {torch.__version__.split('+')[0]}, {platform.machine()}; "
             f"fastest matrix product {speed / 1e9:.0f} GFLOP/s. Only the ratios mean anything elsewhere.")
    text = f"# A network of the study\n\n{table(found)}\n\n{about}\n"
    print("\n\n" + text)
    if not asked.quick: Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
