"""How exact is an estimate of the NELBO, for the same number of network evaluations?

    .venv/bin/python benchmarks/estimate.py   # about ten minutes; writes benchmarks/estimate.md

Each estimate is the mean NELBO (its diffusion term, λ from -12.9 to 12.9) over 500 test points from 2,000
evaluations of a denoiser: 4 for each point. The table has the variance of independent uniform times, the
definition's own estimate (cosine schedule, each level over its density), over that of

- uniform λ: independent levels, uniform in λ instead of t;
- stratified: one level in each of 2,000 equal parts of λ;
- `nelbo`: lfdm's. Each point has one level in each of 4 parts of λ, and the error's share of ‖ε‖² is taken
  out: a control variate, whose coefficient comes from the other points;
- by the floor: stratified, with levels where an estimate from the exact floor says that the error varies. For
  data with a linear denoiser, error / D = g has the standard deviation g √(1 - g²) once the control variate
  is out; a tenth of the levels stays uniform. With the control variate, over 64 neighbours in λ;
- beside the exact: ‖ε̂ - ε*‖² to the exact denoiser ε* at stratified levels, plus the floor, which quadrature
  knows. It needs an exact denoiser, evaluated as often as the network, and estimates another mean, that over
  the distribution of the data: what these 500 points have of their own is not in it.

The networks are trained for 20 epochs, weighted loss, seed 0. Each variance is that of 100 estimates with
other seeds: a ratio is good to about 20 % (one standard error).
"""
import math
import statistics
from pathlib import Path

import torch
from joblib import delayed

from lfdm.core import expand
from lfdm.data import DATASETS
from lfdm.grids import grid, make_grid, side_by_side
from lfdm.likelihood import nelbo
from lfdm.runs import progress_bar
from lfdm.schedules import SCHEDULES, Level
from lfdm.steps import exact_denoiser

POINTS, DRAWS, REPEATS, BINS = 500, 4, 100, 400
S = SCHEDULES["cosine"]()
LOW, HIGH = S.logsnr_min, S.logsnr_max


def stratified(n, g): return (torch.randperm(n, generator=g) + torch.rand(n, generator=g).double()) / n


class Estimates:
    "Estimates of the mean diffusion term, in nats, of one denoiser on the test points of one set."
    def __init__(self, denoiser, data):
        self.denoiser, self.exact = denoiser, exact_denoiser(data)
        self.x = data.test(0)[:POINTS].repeat(DRAWS, 1)
        self.points = self.x[:POINTS]
        g = data.eps_floor(LOW + (HIGH - LOW) * (torch.arange(BINS).double() + 0.5) / BINS).clamp(0, 1)
        varies = g * (1 - g * g).sqrt()
        self.mass = 0.9 * varies / varies.sum() + 0.1 / BINS

    def noisy(self, logsnr, g):
        level = Level(*(q.float() for q in (logsnr, *S.scales(logsnr))))
        eps = torch.randn(self.x.shape, generator=g)
        return expand(level.alpha, eps) * self.x + expand(level.sigma, eps) * eps, level, eps

    def error(self, logsnr, g):
        "(‖ε - ε̂‖², ‖ε‖² - D) for each evaluation."
        z, level, eps = self.noisy(logsnr, g)
        with torch.no_grad(): _, eps_hat = self.denoiser(z, level)
        return (eps - eps_hat).square().sum(1).double(), (eps.square().sum(1) - eps.shape[1]).double()

    def uniform_times(self, g):
        logsnr = S.logsnr(torch.rand(len(self.x), generator=g).double())
        return (self.error(logsnr, g)[0] / (2 * S.density(logsnr))).mean()

    def uniform_logsnr(self, g):
        logsnr = LOW + (HIGH - LOW) * torch.rand(len(self.x), generator=g).double()
        return (HIGH - LOW) / 2 * self.error(logsnr, g)[0].mean()

    def stratified(self, g):
        return (HIGH - LOW) / 2 * self.error(LOW + (HIGH - LOW) * stratified(len(self.x), g), g)[0].mean()

    def nelbo(self, g):
        return nelbo(self.denoiser, self.points, draws=DRAWS, seed=g.initial_seed()).diffusion.mean()

    def by_the_floor(self, g):
        place, width = stratified(len(self.x), g), (HIGH - LOW) / BINS
        edges = torch.cat([torch.zeros(1), self.mass.cumsum(0)])
        i = (torch.searchsorted(edges, place, right=True) - 1).clamp(0, BINS - 1)
        logsnr = LOW + width * (i + ((place - edges[i]) / self.mass[i]).clamp(0, 1))
        error, size = self.error(logsnr, g)
        return (self.without_size(error, size, logsnr.argsort()) * width / (2 * self.mass[i])).mean()

    def without_size(self, error, size, order, block=64):
        "The error less its share of ‖ε‖² - D, by the covariance among the other evaluations of a block."
        error, own, others = error.clone(), order[:len(order) // block * block].view(-1, block), block - 1
        e, s = error[own], size[own]
        product, errors, sizes = e * s, e.sum(1, True) - e, s.sum(1, True) - s
        slope = (product.sum(1, True) - product - errors * sizes / others) / (2 * self.x.shape[1] * others)
        error[own] -= slope * s
        return error

    def beside_the_exact(self, g):
        z, level, _ = self.noisy(LOW + (HIGH - LOW) * stratified(len(self.x), g), g)
        with torch.no_grad(): gap = self.denoiser(z, level)[1] - self.exact(z, level)[1]
        return (HIGH - LOW) / 2 * gap.square().sum(1).double().mean()   # the floor is a constant


WAYS = {
    "uniform λ": Estimates.uniform_logsnr,
    "stratified": Estimates.stratified,
    "`nelbo`": Estimates.nelbo,
    "by the floor": Estimates.by_the_floor,
    "beside the exact": Estimates.beside_the_exact,
}


def variances(denoiser, data):
    "(mean in nats, variance of independent uniform times, name -> that of each way)."
    torch.set_num_threads(1)
    estimates = Estimates(denoiser, data)
    def found(way): return [way(estimates, torch.Generator().manual_seed(i)).item() for i in range(REPEATS)]
    plain = found(Estimates.uniform_times)
    of = {name: statistics.variance(found(way)) for name, way in WAYS.items()}
    return statistics.mean(found(Estimates.nelbo)), statistics.variance(plain), of


def of_network(folder, data):
    from lfdm.runs import load_run
    return variances(load_run(folder).denoiser(), data)


def of_exact(data): return variances(exact_denoiser(data), data)


def main():
    targets, short = ["x", "eps", "v", "score"], dict(epochs=20, n_samples=2, sample_steps=1)
    asked = grid(dataset=list(DATASETS), target=targets, **short)
    runs, _ = make_grid(asked, "benchmark estimate", workers=2, progress=progress_bar())
    sets = {name: cls() for name, cls in DATASETS.items()}
    asked = {(name, "exact"): delayed(of_exact)(data) for name, data in sets.items()}
    asked |= {(p.dataset, p.target): delayed(of_network)(runs.folders[p], sets[p.dataset]) for p in runs}
    found = dict(zip(asked, side_by_side(list(asked.values()), 2, ordered=True)))
    rows = [f"| set | denoiser | nats | {' | '.join(WAYS)} |", f"|---|---|{'---:|' * (1 + len(WAYS))}"]
    for name in sets:
        for denoiser in ("exact", *targets):
            mean, plain, of = found[name, denoiser]
            ratios = [f"{plain / v:,.0f}" if v else "no variance" for v in of.values()]
            rows.append(f"| {name} | {denoiser} | {mean:.2f} | {' | '.join(ratios)} |")
    middle = {way: math.exp(statistics.mean(math.log(plain / of[way]) for _, plain, of in found.values()))
              for way in list(WAYS)[:-1]}
    least = {way: min(plain / of[way] for _, plain, of in found.values()) for way in middle}
    said = "; ".join(f"{way} {middle[way]:.0f} (lowest {least[way]:.0f})" for way in middle)
    about = (f"Written by `benchmarks/estimate.py`: {POINTS} points, {DRAWS} evaluations of each, {REPEATS} "
             "repeats. The variance of independent uniform times over that of each other way, and the mean "
             f"of `nelbo` in nats. Geometric means of the ratios: {said}.")
    text = "# Estimates of the NELBO\n\n" + "\n".join(rows) + f"\n\n{about}\n"
    print("\n\n" + text)
    Path(__file__).with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
