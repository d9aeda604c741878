"The error as the fourth choice: its formulas, what it does to training and to references."
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfdm.best_answers import best_answer, error_floor
from lfdm.contrastive import ContrastiveLoss
from lfdm.core import from_spec, seeded
from lfdm.data import DATASETS, GaussianMixture
from lfdm.errors import ERRORS
from lfdm.evaluation import floor
from lfdm.grids import grid, make_grid
from lfdm.losses import DiffusionLoss, draw
from lfdm.parameters import Parameters
from lfdm.runs import make_run
from lfdm.validation import ValidationSet

SCALED = ("huber", "pseudo_huber", "log_cosh")
SMALL = dict(dataset="cluster", width=8, epochs=2, batch_size=5000, n_samples=20, sample_steps=2)
positive = st.floats(1e-6, 1e6)


@pytest.mark.parametrize("name", SCALED)
@given(r=positive, c=positive)
def test_an_error_lies_between_the_square_and_its_line(name, r, c):
    rho = ERRORS[name]().rho(*torch.tensor([r, c], dtype=torch.float64)).item()
    assert 0 < rho <= r**2 * (1 + 1e-12) and rho <= 2 * c * r * (1 + 1e-12)
    if r < 1e-4 * c: assert rho == pytest.approx(r**2, rel=1e-3)
    if r > 1e4 * c: assert rho == pytest.approx(2 * c * r, rel=1e-3)


@pytest.mark.parametrize("name", SCALED)
@given(r=st.floats(-100, 100), c=st.floats(1e-2, 100))
def test_the_slope_is_half_the_derivative(name, r, c):
    at = torch.tensor(r, dtype=torch.float64).requires_grad_()
    error, c = ERRORS[name](), torch.tensor(c, dtype=torch.float64)
    error.rho(at.abs(), c).backward()
    assert error.slope(at, c).item() == pytest.approx(at.grad.item() / 2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("spec", ["l1", "huber(c=0.2)", "pseudo_huber(c=0.3, of=vector)",
                                  "log_cosh(c=0.5, grows=snr)"])
def test_a_cost_is_finite_and_even_and_0_only_at_0(spec):
    "of elements and of the vector, with a constant scale and with one that grows"
    error, logsnr = from_spec(ERRORS, spec, "error"), torch.tensor([-12., 0., 12.])
    for size in (0., 1e-15, 1., 1e15):
        residual = torch.tensor([[1., -2.], [3., .5], [-1., 0.]]) * size
        cost = error(residual, logsnr)
        assert cost.shape == (3,) and cost.isfinite().all() and (cost > 0).any() == (size > 0)
        torch.testing.assert_close(cost, error(-residual, logsnr))


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_a_large_scale_is_the_square(seed):
    x, g = DATASETS["ring"]().sample(50, seed), seeded(seed)
    t, eps = draw(x, g)
    net = lambda z, u: z.tanh()
    square = DiffusionLoss("cosine", "v")(net, x, t, eps)
    for name in SCALED:
        value = DiffusionLoss("cosine", "v", error=f"{name}(c=1e4)")(net, x, t, eps)
        torch.testing.assert_close(value, square, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("error", ["l1", "huber(c=0.5)", "pseudo_huber(c=2)", "log_cosh(c=2)"])
def test_of_one_gaussian_the_best_answer_is_its_mean(error):
    data = GaussianMixture(torch.zeros(1, 2), 1.)
    loss, square = (DiffusionLoss("cosine(-6, 6)", "v", error=e) for e in (error, "squared"))
    g = seeded(0)
    x = data.draw(50, g)
    z, _, level = loss.noisy(x, *draw(x, g))
    torch.testing.assert_close(*(best_answer(of, data, z, level) for of in (loss, square)))


def test_floors_of_other_errors_are_refused_or_sampled():
    loss = DiffusionLoss("cosine(-6, 6)", "v", error="huber(c=1e3)")
    with pytest.raises(ValueError, match="error_floor samples it"): floor(loss, DATASETS["ring"]())
    found, se = error_floor(loss, DATASETS["ring"](), n=2000)
    assert abs(found - floor(DiffusionLoss("cosine(-6, 6)", "v"), DATASETS["ring"]())) < 4 * se


def test_validation_has_no_excess_over_a_mean_that_is_not_the_best():
    data = DATASETS["ring"]()
    report = ValidationSet(DiffusionLoss(error="l1"), data.test()[:50], denoise=data.denoise,
                           others=("nelbo",))(lambda z, u: z)
    assert "loss" in report and "excess" not in report and report["nelbo_excess"] > 0


def test_a_run_and_a_stack_with_another_error_agree(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    asked = grid(Parameters, **SMALL, error=["squared", "huber(c=0.5)"])
    runs, diverged = make_grid(asked, "stack", workers=1)
    assert not diverged and len({p.slug() for p in asked}) == 2
    alone = make_run(asked[1], "alone")
    assert alone.summary["loss"] == pytest.approx(runs[asked[1]].summary["loss"], rel=1e-4)
    squared = runs[asked[0]].summary
    assert "floor" not in alone.summary and squared["floor"] > 0
    assert alone.summary["nelbo_floor"] == squared["nelbo_floor"]


@pytest.mark.parametrize("kappa", [0., .05, .5])
def test_the_contrastive_loss_is_the_plain_one_less_that_of_another_pair(kappa):
    x, net = DATASETS["ring"]().sample(20, 0), lambda z, u: z.tanh()
    loss = ContrastiveLoss(kappa)
    t, eps = draw(x, seeded(0))
    z, y, level = loss.noisy(x, t, eps)
    plain = DiffusionLoss("rectified_flow", "flow")
    other = plain.cost(y.roll(1, 0), net(z / level.scale[:, None], None), level)
    expected = plain(net, x, t, eps) - kappa * other
    torch.testing.assert_close(loss(net, x, t, eps), expected)


def test_a_contrastive_loss_gets_no_number_of_the_plain_one():
    "no floor, no best answer, no excess over the mean; and its value is what validation tells"
    loss, data = ContrastiveLoss(.3), DATASETS["ring"]()
    with pytest.raises(ValueError, match="best answer is no mean"): floor(loss, data)
    with pytest.raises(ValueError, match="no best answer is known"): error_floor(loss, data, n=10)
    reports = [ValidationSet(of, data.test()[:500], denoise=data.denoise)(lambda z, u: z)
               for of in (loss, DiffusionLoss("rectified_flow", "flow"))]
    assert reports[0]["loss"] < reports[1]["loss"] - .1
    assert "excess" not in reports[0] and "excess" in reports[1]
