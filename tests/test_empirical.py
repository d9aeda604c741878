"Attempts to break lfdm.empirical and lfdm.brackets: against fractions, mixtures, quadrature and the truth."
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm import brackets, empirical
from lfdm.brackets import bracket, overlap
from lfdm.data import DATASETS, GaussianMixture, NoDensity
from lfdm.empirical import Empirical
from lfdm.evaluation import floor, judge
from lfdm.images.data import Digits, scaled
from lfdm.losses import DiffusionLoss
from lfdm.sampling import sample
from lfdm.steps import exact_denoiser
from lfdm.validation import ValidationSet

torch.set_num_threads(1)
V = DiffusionLoss("cosine", "v", "weighted")


def randn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def exact(points, z, alpha, sigma):
    "The posterior mean and variance of one z, with exponents as exact fractions."
    points, z = [[Fraction(a) for a in x] for x in points.tolist()], [Fraction(a) for a in z.tolist()]
    squares = [sum((u - Fraction(alpha) * a)**2 for u, a in zip(z, x)) for x in points]
    low, half = min(squares), 2 * Fraction(sigma)**2
    weights = [math.exp(-min(float((q - low) / half), 800.)) for q in squares]
    rho = [Fraction(w / sum(weights)) for w in weights]
    mean = [sum(r * x[d] for r, x in zip(rho, points)) for d in range(len(z))]
    spread = sum(r * sum((a - m)**2 for a, m in zip(x, mean)) for r, x in zip(rho, points)) / len(z)
    return torch.tensor([float(m) for m in mean], dtype=torch.float64), float(spread)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), dim=st.integers(1, 4),
       log_sigma=st.floats(-14, 3), alpha=st.floats(0.1, 1),
       spread=st.sampled_from([1., 1e-6, 1e3]), offset=st.sampled_from([0., 1., 1e4]))
def test_posterior_mean_and_variance_are_those_of_fractions(
        seed, n, dim, log_sigma, spread, offset, alpha):
    "also where points nearly coincide, lie far from 0, or σ is below all their distances"
    x = spread * randn(n, dim, seed=seed) + offset
    if n > 2: x[1] = x[0] + 10**log_sigma * randn(dim, seed=seed + 1)   # two that σ cannot tell apart
    sigma = 10**log_sigma * spread
    z = (alpha * x[:1] + sigma * randn(1, dim, seed=seed + 2))
    mean, variance = exact(x, z[0], alpha, sigma)
    data = Empirical(x)
    # what rounding of z and x in float64 leaves of a logit
    reach = float((x - x[:1]).norm(dim=1).max())
    logit = 1e-8 + 1e-15 * float(z.abs().max() + x.abs().max()) * reach / sigma**2
    near = float((x - mean).norm(dim=1).max()) * min(1., 4 * logit) + 1e-14 * float(x.abs().max())
    assert (data.denoise(z, alpha, sigma)[0] - mean).abs().max() <= near
    if logit < 1e-6:
        allowed = 1e-4 * variance + 1e-20 + (1e-14 * float(x.abs().max()))**2
        assert abs(data.posterior_variance(z, alpha, sigma).item() - variance) <= allowed


@pytest.mark.parametrize("sigma", [1e-9, 1e-8, 1e-7])
def test_the_plain_expansion_would_fail(sigma):
    "two points σ apart: the reference and Empirical see which is nearer; the plain sum does not"
    for seed in range(20):
        x = torch.cat([randn(1, 2, seed=seed).repeat(2, 1), 3 * randn(3, 2, seed=seed + 50)])
        x[1] += sigma * randn(2, seed=seed + 100)
        z = x[:1] + sigma * randn(1, 2, seed=seed + 150)
        mean, _ = exact(x, z[0], 1., sigma)
        assert (Empirical(x).denoise(z, 1., sigma)[0] - mean).abs().max() < 1e-7 * sigma + 1e-15
    plain = -(z.square().sum(1)[:, None] - 2 * z @ x.T + x.square().sum(1)) / (2 * sigma**2)
    assert (plain.softmax(1) @ x - mean).abs().max() > 1e-5 * sigma


@pytest.mark.parametrize("method", ["denoise", "score", "posterior_variance", "log_prob_at"])
def test_a_stored_set_is_a_mixture_of_points(method):
    m = GaussianMixture(randn(40, 2), 1e-7)
    z, level = 2 * randn(300, 2, seed=1), [torch.linspace(*ends, 300).double() for ends in ((0, 2), (.1, 50))]
    ours, theirs = (getattr(q, method)(z, *level) for q in (Empirical(m.means), m))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_score_is_the_gradient_of_the_density():
    data, z = Empirical(randn(50, 3)), randn(20, 3, seed=1).requires_grad_()
    data.log_prob_at(z, .8, .6).sum().backward()
    torch.testing.assert_close(z.grad, data.score(z.detach(), .8, .6), rtol=1e-9, atol=1e-9)


def test_both_ends_of_sigma():
    x = randn(30, 5)
    data = Empirical(x)
    for sigma in (1e-300, 1e-150, 1e-12): assert (data.denoise(x, 1., sigma) - x).abs().max() < 1e-14
    for sigma in (1e9, 1e150, 1e300):
        assert (data.denoise(sigma * randn(4, 5), 1., sigma) - x.mean(0)).abs().max() < 1e-7
    assert (data.denoise(x, 0., 1.) - x.mean(0)).abs().max() < 1e-15
    assert data.score(x, 1., 1e-12).abs().max() < 1e9   # rounding of x over σ², not more


def test_half_precision_computes_in_double():
    x = randn(100, 6).half()
    z = (x.double() + 0.01 * randn(100, 6, seed=1)).half()
    ours, truth = Empirical(x).denoise(z, 1., .01), Empirical(x.double()).denoise(z.double(), 1., .01)
    assert ours.dtype == torch.float16 and torch.equal(ours, truth.half())


def test_blocks_and_storage_do_not_matter(monkeypatch, tmp_path):
    b = torch.randint(0, 256, (60, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.save(tmp_path / "x.npy", b.numpy())
    z, logsnr = randn(15, 3, 4, 4), torch.linspace(-5, 5, 5)
    whole = Empirical(b.double() / 127.5 - 1, draws=30)
    for block, cells in ((2**19, 2**23), (100, 135)):   # all at once; two points, and two rows
        monkeypatch.setattr(empirical, "BLOCK", block), monkeypatch.setattr(empirical, "CELLS", cells)
        for stored in (b, b.numpy(), np.load(tmp_path / "x.npy", mmap_mode="r")):
            data = Empirical(stored, draws=30)
            both = [q.denoise(z, .8, .6) for q in (data, whole)]
            torch.testing.assert_close(*both, rtol=1e-10, atol=1e-12)
            on = [q.eps_errors_on(z, z, logsnr) for q in (data, whole)]
            torch.testing.assert_close(*on, rtol=1e-8, atol=1e-12)


def test_memory_is_bounded(tmp_path):
    "a file of 61 MB, 491 MB as floats: denoiser and floors take 250 MB besides the file, most of it fixed"
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (20_000, 3072))
    file[:] = np.random.default_rng(0).integers(0, 256, file.shape, dtype=np.uint8)
    file.flush()
    code = ("import numpy as np, torch, resource; from lfdm import empirical; empirical.CELLS = 2**21\n"
            "torch.set_num_threads(1); used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"x = np.load({str(tmp_path / 'x.npy')!r}, mmap_mode='r'); first = used()\n"
            "data = empirical.Empirical(x, draws=30); z = torch.randn(30, 3072).double()\n"
            "data.denoise(z, .7, .7); data.eps_errors(torch.tensor([-6.]))\n"
            "print((used() - first) / 1024)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 61 + 250   # the pages of the file that were read, and some arrays of 16 MiB


@pytest.mark.parametrize("seed", [0, 1])
def test_floors_of_two_points_by_quadrature(seed):
    "x = ±1: mmse(γ) = 1 - E tanh(γ + √γ n), whose integral is known"
    data = Empirical(torch.tensor([[1.], [-1.]]), draws=40_000, seed=seed)
    logsnr = torch.tensor([-6., -2., 0., 1., 2.]).double()
    u, mass = (torch.from_numpy(q) for q in np.polynomial.hermite_e.hermegauss(200))
    gamma = logsnr.exp()[:, None]
    truth = ((1 - torch.tanh(gamma + gamma.sqrt() * u)) * mass).sum(1) / math.sqrt(2 * math.pi) * gamma[:, 0]
    se = data.eps_floor_se(logsnr)
    assert ((data.eps_floor(logsnr) - truth).abs() < 4.5 * se + 2e-3 * truth).all()
    assert (se < 0.012 * truth)[:3].all()   # so that a factor 1.07 would be seen
    torch.testing.assert_close(data.mmse(logsnr), data.eps_floor(logsnr) * (-logsnr).exp())


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 60), dim=st.integers(1, 5))
def test_a_floor_is_the_denoisers_own_error(seed, n, dim):
    data = Empirical(randn(n, dim, seed=seed), draws=3000, seed=seed % 1000)
    logsnr = torch.tensor([-4., 0., 3.]).double()
    x = data.sample(3000, seed, dtype=torch.float64)
    direct = data.eps_errors_on(x, randn(3000, dim, seed=seed + 1), logsnr)
    se = (direct.var(0) / 3000 + data.eps_errors(logsnr).var(0) / 3000).sqrt()
    assert ((direct.mean(0) - data.eps_errors(logsnr).mean(0)).abs() < 5 * se + 1e-12).all()


def test_a_stored_set_is_easier_than_its_population():
    "on average over sets; for 20 points by far more than the error of 60 sets"
    swiss, logsnr = DATASETS["swiss"](), torch.linspace(-8, 8, 9).double()
    sets = [Empirical(swiss.sample(20, s), draws=200, seed=s) for s in range(60)]
    ratio = torch.stack([q.eps_errors(logsnr).mean(0) for q in sets]) / swiss.eps_floor(logsnr)
    assert (ratio.mean(0) < 1 + 3 * ratio.std(0) / 60**.5).all()
    assert (ratio.mean(0) + 4 * ratio.std(0) / 60**.5 < 1)[4:].all()
    assert abs(ratio.mean(0)[0] - 19 / 20) < 4 * ratio.std(0)[0] / 60**.5   # the variance of 20 points


def test_the_table_is_the_samples_it_is_made_of():
    data = Empirical(DATASETS["ring"]().sample(500), draws=300)
    logsnr = torch.linspace(-20, 40, 23).double()
    torch.testing.assert_close(data.eps_floor(logsnr), data.eps_errors(logsnr).mean(0), rtol=0.02, atol=2e-3)
    assert data.eps_floor(torch.tensor([-math.inf, math.inf, 700.])).tolist() == [0, 0, 0]


def test_odd_sets():
    one = Empirical(torch.tensor([[1., 2.]]))
    assert one.denoise(torch.zeros(1, 2), 1., 5.).tolist() == [[1., 2.]]
    assert not one.eps_floor(torch.linspace(-9, 9, 5)).any() and floor(V, one) == 0
    twice = Empirical(torch.tensor([[1., 0.], [1., 0.], [1., 3.]]))
    mean = twice.denoise(torch.tensor([[1., 1.5]]), 1., 100.)
    assert torch.allclose(mean, torch.tensor([[1., 1.]]), atol=1e-3)
    same = Empirical(torch.ones(50, 3))
    assert not same.eps_errors(torch.linspace(-9, 30, 5)).any()


def test_it_is_a_data_set_like_the_others():
    x = DATASETS["cluster"]().sample(400)
    data = Empirical(x)
    assert set(map(tuple, data.sample(50).tolist())) <= set(map(tuple, x.tolist()))
    assert not torch.equal(data.sample(50), data.sample(50, split="test"))
    drawn = sample(exact_denoiser(data), 50, 2, 256, "cosine", "ddim", seed=0)
    assert torch.cdist(drawn, x).amin(1).max() < 0.05
    report = ValidationSet(V, x, denoise=data.denoise)(lambda z, u: 0 * z)
    best = report["loss"] - report["excess"]
    assert abs(best - floor(V, data)) < 5 * report["loss_se"]
    assert judge(data.sample(100), data, repeats=2)["mean_distance"]["value"] < 1
    images = Empirical(Digits().train(), convert=lambda b: scaled(b, 17))
    out = sample(exact_denoiser(images), 2, (1, 16, 16), 16, "cosine", "ddim", seed=0)
    assert out.shape == (2, 1, 16, 16) and images.sample(2).shape == out.shape


def test_no_density_without_noise():
    data = Empirical(randn(5, 2))
    for ask in (lambda: data.log_prob(randn(2, 2)), data.entropy, lambda: data.score(randn(2, 2), 1., 0.)):
        with pytest.raises(NoDensity, match="1/n"): ask()


@pytest.mark.parametrize("x, says", [
    (torch.tensor([[0., math.nan]]), "point 0"), (torch.tensor([[1.], [math.inf]]), "point 1"),
    (torch.zeros(0, 2), "without a 0"), (torch.zeros(3), r"\(n, ...\)"), (torch.zeros(2, 2).long(), "int64"),
    (torch.zeros(2, 2, dtype=torch.complex64), "complex"), (np.zeros((2, 2), "U3"), "floats or bytes")])
def test_what_cannot_be_stored(x, says):
    with pytest.raises((TypeError, ValueError), match=says): Empirical(x)


# ---- brackets

def product(dim, n, seed):
    "Points of a rotated product of the 2D sets, and the rotation's dimension."
    sets = [DATASETS[name]() for name in list(DATASETS) * (dim // 8)]
    rotation = torch.linalg.qr(randn(dim, dim, seed=dim))[0]
    return torch.cat([d.sample(n, 1000 * seed + i) for i, d in enumerate(sets)], 1).double() @ rotation


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_the_bracket_holds_the_truth(dim):
    logsnr, sets = torch.linspace(-10, 10, 15).double(), [d() for d in DATASETS.values()]
    if dim == 2: x, out = DATASETS["waves"]().sample(4000), DATASETS["waves"]().sample(2000, 1, "test")
    else: x, out = product(dim, 4000, 1), product(dim, 2000, 2)
    b = bracket(V, x, out, logsnr=logsnr, components=64, draws=1000)
    if dim == 2: sets = sets[3:]
    truth = sum(d.eps_floor(logsnr) for d in sets) / len(sets)
    at = b.units[0] * truth
    assert (b.below.value <= at + 4 * b.below.se).all() and (b.above.value >= at - 4 * b.above.se).all()
    assert (b.below.se < 0.04).all() and (b.above.se < 0.04).all()   # so that these can fail
    for side in (b.below, b.above): assert abs(side.value - at)[0] < 4 * side.se[0] < 0.12   # hardly a signal
    if dim == 64: assert b.below.value[-1] == 0 and b.above.total < 1.01


def test_a_linear_denoiser_is_the_best_of_a_gaussian():
    "the upper value of Gaussian data is the truth, within 1 %, where the eigenvalues are far from equal"
    scale = torch.tensor([3., 1., 0.1, 0.01])
    x, out = (scale * randn(4000, 4, seed=s) @ torch.linalg.qr(randn(4, 4))[0] for s in (0, 1))
    b = bracket(V, x, out, components=1, draws=500, logsnr=torch.linspace(-12, 12, 13))
    e = b.logsnr.exp()[:, None]
    truth = (e * scale**2 / (1 + e * scale**2)).mean(1) * b.units[0]
    assert ((b.above.value / truth - 1).abs() < 4 * b.above.se / truth + 0.01).all()
    assert (b.above.se / truth < 0.025).all()


def test_reductions_are_factors_and_units_are_the_losses():
    x = DATASETS["swiss"]().sample(300)
    b = bracket(V, x, draws=50, logsnr=torch.linspace(-9, 9, 7))
    both = bracket(V, x, draws=50, logsnr=torch.linspace(-9, 9, 7), reduction="sum", half=True)
    assert both.above.total == pytest.approx(b.above.total) and b.dims == 2   # 2 × ½
    assert b.under(V, "sum").below.total == pytest.approx(2 * b.below.total)
    for triple in ("cosine eps min_snr", "rectified_flow flow weighted", "ddpm eps weighted"):
        other = b.under(DiffusionLoss(*triple.split()))
        s, t = other.loss.schedule, other.loss.target
        factor = other.loss.weighting.factor(b.logsnr, s, t) / t.eps_ratio(*s.scales(b.logsnr))
        torch.testing.assert_close(other.units[0], factor.double(), rtol=1e-5, atol=0.)
        curve = type("Curve", (), {"eps_floor": lambda self, l: DATASETS["swiss"]().eps_floor(l)})()
        fine = bracket(V, x, draws=4, logsnr=torch.linspace(-14, 14, 113)).under(other.loss)
        of_truth = (fine.units[1] @ DATASETS["swiss"]().eps_floor(fine.logsnr)).item()
        assert of_truth == pytest.approx(floor(other.loss, curve), rel=2e-3)


def test_classes_lower_the_bracket_to_theirs():
    cluster = DATASETS["cluster"]()
    def drawn(n, split):
        x = cluster.sample(n, 0, split)
        return x, torch.cdist(x.double(), cluster.means).argmin(1)
    (x, classes), (out, out_classes) = drawn(3000, "train"), drawn(2000, "test")
    b = bracket(V, x, out, classes, out_classes, logsnr=torch.linspace(-9, 9, 9))
    e = b.logsnr.exp() * cluster.stds[0, 0]**2
    truth = b.units[0] * e / (1 + e)
    assert (b.below.value <= truth + 4 * b.below.se).all()
    assert ((b.above.value / truth - 1).abs() < 0.05).all()


def test_a_network_is_placed():
    "the exact denoiser as a network: its loss is the floor, below what is memorized at high λ only"
    swiss = DATASETS["swiss"]()
    def best(z, u):
        a, s = torch.cos(math.pi / 2 * u.double()), torch.sin(math.pi / 2 * u.double())
        x = swiss.denoise(z.double(), a, s)
        return (a[:, None] * (z - a[:, None] * x) / s[:, None] - s[:, None] * x).to(z)
    b = bracket(V, swiss.sample(300), swiss.sample(2000, 1, "test"), draws=1000)
    value, less = b.of(best)
    assert abs(value.total - floor(V, swiss)) < 4 * value.total_se < 0.1
    assert (less.value + 2 * less.se < 0)[b.logsnr > 6].all()
    assert (less.value.abs() < 0.02)[b.logsnr < -4].all()


def test_a_transform_is_put_on_both_sides():
    x = DATASETS["waves"]().sample(500)
    turn = torch.tensor([[.6, -.8], [.8, .6]])
    grid = dict(logsnr=torch.linspace(-9, 9, 5), draws=200)
    transforms = None, lambda q: q @ turn, lambda q: 2 * q
    plain, turned, doubled = (bracket(V, x, **grid, transform=f) for f in transforms)
    assert turned.below.total == pytest.approx(plain.below.total, abs=0.1)
    ratio = doubled.errors.memorized[:, 0].mean() / plain.errors.memorized[:, 0].mean()
    assert ratio == pytest.approx(4, rel=0.02)
    twice = bracket(V, x, **grid, transform=lambda q: q * (1 - 2 * torch.randint(2, (len(q), 1))), copies=2)
    assert twice.stored == 2 * plain.stored and twice.held_out == plain.held_out
    labels = torch.arange(500) % 2
    assert bracket(V, x, labels=labels, transform=lambda q: 1 * q, copies=2, **grid).stored == 900


def test_what_a_bracket_refuses():
    x, out = randn(100, 2), randn(30, 2, seed=1)
    with pytest.raises(ValueError, match="shares 5 of its 25"): bracket(V, x, torch.cat([out[:20], x[:5]]))
    assert overlap(x, torch.cat([out[:2], x[:3].float().double()])).tolist() == [False] * 2 + [True] * 3
    with pytest.raises(ValueError, match="one for each of 100"): bracket(V, x, out, torch.zeros(99).long())
    with pytest.raises(ValueError, match="go together"): bracket(V, x, out, torch.zeros(100).long())
    with pytest.raises(ValueError, match="has \\[7\\]"):
        bracket(V, x, out, torch.zeros(100).long(), torch.full((30,), 7))
    with pytest.raises(ValueError, match="shape"): bracket(V, x, out[:, :1])
    with pytest.raises(ValueError, match="held_out: x must be finite"): bracket(V, x, out / 0)
    l1 = DiffusionLoss("cosine", "v", "weighted", "l1")
    with pytest.raises(ValueError, match="no mean"): bracket(l1, x)
    with pytest.raises(ValueError, match="fewer than 20"): bracket(V, x[:19])
    with pytest.raises(ValueError, match="rise"): bracket(V, x, logsnr=[0., 0., 1.])
    flat = torch.cat([x, torch.ones(100, 1)], 1)
    constant = bracket(V, flat, draws=20, logsnr=torch.linspace(-5, 5, 3))
    assert constant.above.value.isfinite().all()
    point = bracket(V, torch.ones(4, 2), out, draws=20, logsnr=torch.linspace(-5, 5, 3))
    assert not point.below.value.any() and point.above.value.isfinite().all()


def test_many_dimensions_take_the_diagonal(monkeypatch):
    monkeypatch.setattr(brackets, "LARGEST", 3)
    b = bracket(V, randn(200, 4), randn(100, 4, seed=1), draws=50, logsnr=torch.linspace(-5, 5, 5))
    assert 0.9 < b.above.total < 1.1


def test_image_sets_go_in_as_they_are():
    digits = Digits()   # their own levels, splits and range
    b = bracket(V, digits, draws=60, components=4, logsnr=torch.linspace(-9, 9, 5))
    assert (b.dims, b.stored, b.held_out) == (256, 1500, 297) and b.errors.points.abs().max() < 1
    assert b.below.total < b.above.total < bracket(V, digits, draws=60, components=1,
                                                   logsnr=torch.linspace(-9, 9, 5)).above.total + 0.05
