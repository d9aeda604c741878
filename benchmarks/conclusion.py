"""How much processor time does a conclusion cost? Recipes of training options, until the excess is 1.5 %.

    .venv/bin/python benchmarks/conclusion.py   # 80 minutes on two cores, resumed; writes conclusion.md

A screening study asks which of many losses are worth a full training. It needs each network near enough to
its floor that differences are those of the losses. Measured is the excess over the exact floor of the
weighted loss of each target on each 2D set, on the 10,000 validation points, after a budget of epochs. The
time to 1.5 % is read between budgets, linear in the logarithms of both, from the geometric mean over sets and
seeds. A recipe with a cooldown is trained anew for each budget.

Chosen is the recipe with the least processor time to 1.5 %, by the geometric mean over targets, on one seed.
Recipes within 5 % of the best are level: the first of them in the list is taken, with the fewest options.
The seeds that report it were not seen by the choice. bf16 is measured on those, with the recipe of screening
studies (`SCREENING`): the ratio of the excess with products in bf16 to that in float32, paired by seed.

Runs lie under runs/conclusion. The processor seconds of an epoch are measured in turns, with one thread.
"""
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from scipy import stats

from lfdm.data import DATASETS
from lfdm.grids import grid, make_grid
from lfdm.networks import StackedMLP
from lfdm.parameters import Parameters
from lfdm.runs import progress_bar
from lfdm.studies import SCREENING
from lfdm.tasks import task_of
from lfdm.training import TrainState, train_stack, with_precision

GOAL, BUDGETS, ROUNDS, IN_BF16 = 0.015, (2, 5, 10, 20, 40), 5, 10   # epochs of the comparison with bf16
LEVEL = 1.05   # recipes this near to the best are not told apart
SETS, TARGETS, TUNED_ON, REPORTED_ON = list(DATASETS), ["x", "eps", "v", "score"], [100], list(range(10))
PLAIN = "as it is, lr 0.001"


def recipes():
    "name -> options. A cooldown is the share of the training at its end."
    options = {"as it is": {}, "ema 0.999": dict(ema=0.999), "cooldown": dict(cooldown=1),
               "ema 0.999, cooldown": dict(ema=0.999, cooldown=1),
               "ema 0.999, batch 256": dict(ema=0.999, batch_size=256),
               "ema 0.999, batch 1,024": dict(ema=0.999, batch_size=1024),
               "ema 0.999, warmup 200": dict(ema=0.999, warmup=200),
               "ema 0.999, adaptive times": dict(ema=0.999, schedule="adaptive")}
    rates = {"as it is": (1e-3, 2e-3, 4e-3), "ema 0.999": (1e-3, 2e-3, 4e-3, 8e-3),
             "cooldown": (1e-3, 2e-3, 4e-3, 8e-3), "ema 0.999, cooldown": (4e-3,),
             "ema 0.999, batch 256": (2e-3,), "ema 0.999, batch 1,024": (2e-3, 4e-3),
             "ema 0.999, warmup 200": (4e-3,), "ema 0.999, adaptive times": (2e-3,)}
    return {f"{name}, lr {lr:g}": options[name] | dict(lr=lr) for name in options for lr in rates[name]}


# ---- the networks

def trainings(options, seeds, budgets):
    "epochs -> the parameters of that training; without a cooldown one training has all budgets."
    share, steps = options.get("cooldown", 0), math.ceil(50_000 / options.get("batch_size", 512))
    def asked(**more):
        axes = dict(dataset=SETS, seed=seeds, n_samples=2, sample_steps=1) | more
        if more.get("schedule") != "adaptive": return grid(target=TARGETS, **axes)
        # the same weight w(λ), bound to the cosine schedule
        weights = {y: f"implied(cosine, {y}, weighted)" for y in TARGETS}
        return [p for y, w in weights.items() for p in grid(target=y, weighting=w, **axes)]
    if not share: return {max(budgets): asked(**options, epochs=max(budgets))}
    return {e: asked(**options | dict(epochs=e, cooldown=round(share * e * steps))) for e in budgets}


def excesses(options, seeds, budgets):
    "The excess as a share of the floor, shape (target, set, seed, budget)."
    found = np.empty((len(TARGETS), len(SETS), len(seeds), len(budgets)))
    for epochs, asked in trainings(options, seeds, budgets).items():
        runs, diverged = make_grid(asked, "conclusion", workers=cpu_count(), progress=progress_bar())
        if diverged: raise RuntimeError(f"{len(diverged)} networks of {options} diverged.")
        for p, run in runs.items():
            at = TARGETS.index(p.target), SETS.index(p.dataset), seeds.index(p.seed)
            for k, e in enumerate(budgets):
                if e == epochs or "cooldown" not in options:
                    found[(*at, k)] = run.metrics[e]["excess"] / run.summary["floor"]
    return found


def epochs_to_goal(excess, budgets):
    "Where the geometric mean of (set, seed, budget) crosses the goal; the first budget if it has by then."
    y, x = np.log(excess).mean((0, 1)) - math.log(GOAL), np.log(budgets)
    below = np.flatnonzero(y <= 0)
    if not len(below): return math.inf
    k = below[0]
    return math.exp(x[k] if k == 0 else x[k - 1] + (x[k] - x[k - 1]) * y[k - 1] / (y[k - 1] - y[k]))


# ---- processor time

class Loop:
    "Training of a stack of 4, an epoch at a time."
    def __init__(self, options):
        options = options | dict(target="v", epochs=99)
        if "schedule" in options: options["weighting"] = "implied(cosine, v, weighted)"
        tasks = [task_of(Parameters(dataset=d, **options)) for d in SETS]
        p, nets = tasks[0].parameters, StackedMLP([task.new_network() for task in tasks])
        losses, data = [t.parameters.loss() for t in tasks], [t.data.train(0) for t in tasks]
        state = TrainState(nets, p.lr, [0] * 4, p.ema, losses=losses)
        checks = [t.validation() for t in tasks]
        forward = with_precision(nets, p.precision)
        self.loop = train_stack(state, losses, data, 99, p.batch_size, checks, forward)
        next(self.loop)

    def epoch(self):
        "CPU-seconds of one epoch of one network."
        began = time.process_time()
        next(self.loop)
        return (time.process_time() - began) / 4


def seconds_of(kinds):
    "name -> median CPU-seconds of an epoch of one network. The rate and the cooldown cost nothing."
    torch.set_num_threads(1)
    costly = {name: {k: v for k, v in o.items() if k not in ("lr", "cooldown")} for name, o in kinds.items()}
    loops = {repr(options): Loop(options) for options in costly.values()}
    found = {key: [] for key in loops}
    for _ in range(ROUNDS):
        for key, loop in loops.items(): found[key].append(loop.epoch())
    return {name: statistics.median(found[repr(options)]) for name, options in costly.items()}


# ---- what is written

def shown(value, form=".0f", limit=None):
    if value == math.inf: return f"more than {limit:{form}}"
    return f"{value:{form}}"


def tuning(seconds):
    "A Markdown table of all recipes on the seed of the choice, and the chosen one's name."
    rows, cost = [f"| recipe | CPU-s an epoch | {' | '.join(TARGETS)} | geometric mean |",
                  f"|---|---:|{'---:|' * (len(TARGETS) + 1)}"], {}
    for name, options in recipes().items():
        budgets = BUDGETS[:-1] if "cooldown" in options else BUDGETS
        excess = excesses(options, TUNED_ON, budgets)
        times = [seconds[name] * epochs_to_goal(e, budgets) for e in excess]
        cost[name] = math.exp(np.mean(np.log(times)))
        limit = seconds[name] * budgets[-1]
        cells = " | ".join(shown(t, ".1f", limit) for t in times)
        mean = "" if cost[name] == math.inf else f"{cost[name]:.2f}"
        rows.append(f"| {name} | {seconds[name]:.2f} | {cells} | {mean} |")
    return "\n".join(rows), next(name for name in cost if cost[name] <= LEVEL * min(cost.values()))


def interval(logs):
    "exp of the mean of the seeds with its 95 % interval by t; logs of shape (seed,)."
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs)**0.5
    return [math.exp(q) for q in (logs.mean(), logs.mean() - half, logs.mean() + half)]


def time_to_goal(excess, budgets, seconds):
    "CPU-seconds to the goal: geometric mean and interval over the seeds of (set, seed, budget)."
    each = [epochs_to_goal(excess[:, [s]], budgets) for s in range(excess.shape[1])]
    late = each.count(math.inf)
    if late: return f"more than {budgets[-1] * seconds:.1f} on {late} of {len(each)} seeds"
    return "{:.1f} ({:.1f} to {:.1f})".format(*(seconds * q for q in interval(np.log(each))))


def reported(recipe, seconds):
    "A Markdown table: plain training and the recipe on the reported seeds."
    heads = [*(f"{e} epochs" for e in BUDGETS), "CPU-s to 1.5 %"]
    rows = [f"| recipe | target | {' | '.join(heads)} |", f"|---|---|{'---:|' * len(heads)}"]
    for name, options in {PLAIN: recipes()[PLAIN], recipe: recipes()[recipe]}.items():
        budgets = BUDGETS if name == PLAIN else BUDGETS[:-1]
        for target, excess in zip(TARGETS, excesses(options, REPORTED_ON, budgets)):
            per_seed = np.log(excess).mean(0)
            percent = (tuple(100 * q for q in interval(logs)) for logs in per_seed.T)
            cells = ["{:.2f} % ({:.2f} to {:.2f})".format(*three) for three in percent]
            cells += [""] * (len(BUDGETS) - len(cells))
            cells.append(time_to_goal(excess, budgets, seconds[name]))
            rows.append(f"| {name} | {target} | {' | '.join(cells)} |")
    return "\n".join(rows)


def in_bf16(options):
    "A Markdown table: the excess with products in bf16 over that in float32."
    budgets = BUDGETS[:-1]   # as reported
    plain = excesses(options, REPORTED_ON, budgets)[..., budgets.index(IN_BF16)]
    rough = excesses(options | dict(precision="bf16"), REPORTED_ON, (IN_BF16,))[..., 0]
    ratio = np.log(rough / plain)   # (target, set, seed)
    rows = [f"| target | {' | '.join(SETS)} | all sets |", f"|---|{'---:|' * (len(SETS) + 1)}"]
    found = [[interval(logs) for logs in (*of_sets, of_sets.mean(0))] for of_sets in ratio]
    for target, of_sets in zip(TARGETS, found):
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*three) for three in of_sets]
        rows.append(f"| {target} | {' | '.join(cells)} |")
    all_sets, one_set = max(f[-1][2] for f in found), max(three[2] for f in found for three in f)
    said = (f"The intervals allow an excess at most {all_sets:.2f} times as large over all sets, and "
            f"{one_set:.2f} times on a single one: a grid that screens for larger differences may use bf16.")
    return "\n".join([*rows, "", said])


def main():
    kinds = recipes() | {"bf16": dict(lr=1e-3, precision="bf16")}
    seconds = seconds_of(kinds)
    tuned, best = tuning(seconds)
    if recipes()[best] != {k: v for k, v in SCREENING.items() if k != "epochs"}:
        raise SystemExit(f"{tuned}\n\nThe best recipe is {best!r}. SCREENING has another: {SCREENING}.")
    slower, seeds = seconds["bf16"] / seconds[PLAIN], REPORTED_ON
    text = f"""# Time to a conclusion

CPU-seconds of training, of one network, until the excess over the floor is 1.5 % (geometric mean over
{len(SETS)} sets), on seed {TUNED_ON[0]}. Where it is there after {BUDGETS[0]} epochs, that time stands.

{tuned}

Chosen, as the first within 5 % of the best: **{best}**. The excess on seeds {seeds[0]} to {seeds[-1]}
(geometric mean over sets and seeds, 95 % interval over seeds):

{reported(best, seconds)}

## bf16

The excess with products in bf16 over that in float32 after {IN_BF16} epochs of the screening recipe, paired
by seed: geometric mean and 95 % interval. An epoch took {slower:.2f} times the CPU-seconds of float32 here.

{in_bf16(recipes()[best])}

Written by `benchmarks/conclusion.py`: stacks of 4, batches of 512 unless said otherwise, width 128, cosine
schedule, λ from -12.9 to 12.9, weighted loss. CPU-seconds are those of training with validation after each
epoch, without data, samples and judging. Not every option was tried at every rate. Trainings with a cooldown
ended at {BUDGETS[-2]} epochs, and so did the chosen recipe's on the reported seeds.
"""
    print("\n\n" + text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
