"Attempts to break lfdm.validation: its numbers against plain Monte Carlo and the floor, odd bins."
import copy
import json
import math

import pytest
import torch

from lfdm.evaluation import floor
from lfdm.losses import DiffusionLoss
from lfdm.schedules import network_logsnr
from lfdm.validation import ValidationSet
from trained import DATA, LOSS, X, new_net

X64 = DATA.sample(20_000, 3, dtype=torch.float64)
CHOICES = [("cosine", "v", "nelbo"), ("linear", "x", "weighted"), ("ve", "eps", "nelbo")]


def near_exact(loss, offset=0.):
    "The network that knows the answer, plus an offset."
    def net(z, u):
        alpha, sigma = (a[:, None] for a in loss.schedule.scales(network_logsnr(u)))
        z = z * (alpha**2 + sigma**2)**0.5
        x = DATA.denoise(z, alpha, sigma)
        return loss.target.encode(x, (z - alpha * x) / sigma, alpha, sigma) + offset
    return net


@pytest.mark.parametrize("choice", CHOICES)
def test_loss_and_excess_agree_with_plain_monte_carlo_and_the_floor(choice):
    loss, g = DiffusionLoss(*choice), torch.Generator().manual_seed(1)
    measure, lower = ValidationSet(loss, X64, 20, denoise=DATA.denoise), floor(loss, DATA, 2001)
    exact, off = measure(near_exact(loss)), measure(near_exact(loss, .3))
    assert 0 <= exact["excess"] < 1e-9 * exact["loss"]
    assert max(exact["excess_per_logsnr"]) < 1e-9 * max(exact["loss_per_logsnr"])
    assert abs(exact["loss"] - lower) < 4 * exact["loss_se"] < .4 * exact["loss"]
    x = X64.repeat(3, 1)
    t, eps = torch.rand(len(x), generator=g).double(), torch.randn(x.shape, generator=g).double()
    plain = loss(near_exact(loss, .3), x, t=t, eps=eps)
    se = math.hypot(off["loss_se"], plain.std().item() / len(x)**.5)
    assert abs(off["loss"] - plain.mean().item()) < 4 * se
    assert abs(off["loss"] - off["excess"] - lower) < 4 * math.hypot(off["loss_se"], off["excess_se"])
    assert off["excess"] > 4 * off["excess_se"]


def test_the_loss_per_logsnr_lies_in_the_right_bins():
    "a loss of 1 everywhere: each bin then holds the density of λ there"
    bins = 7
    class Ones(DiffusionLoss):
        def cost(self, y, y_hat, level): return torch.ones_like(level.logsnr)
    v = ValidationSet(Ones(), X64, bins)
    edges = torch.linspace(-12.9, 12.9, bins + 1).double()
    expected = -v.loss.schedule.t(edges).diff() / v.width
    found = torch.tensor(v(lambda z, u: z)["loss_per_logsnr"]).double()
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(v.logsnr, (edges[1:] + edges[:-1]) / 2)


def test_a_report_is_json_and_measuring_leaves_no_trace():
    net = new_net()
    v, before = ValidationSet(LOSS, X, 5, denoise=DATA.denoise), copy.deepcopy(net.state_dict())
    report = v(net)
    assert json.loads(json.dumps(report)) == report == v(net)
    assert report == ValidationSet(LOSS, X, 5, denoise=DATA.denoise)(net)   # the same seed, the same set
    assert report["loss"] != ValidationSet(LOSS, X, 5, seed=1)(net)["loss"]
    assert all(torch.equal(before[k], p) for k, p in net.state_dict().items())
    assert set(report) == {a + b for a in ("loss", "excess") for b in ("", "_se", "_per_logsnr")}


def test_a_network_may_see_a_few_examples_at_a_time():
    sizes = []
    def net(z, u): sizes.append(len(z)); return z
    whole, chunked = (ValidationSet(LOSS, X, 5, others=["nelbo"], chunk=chunk)(net) for chunk in (None, 40))
    assert sizes == [101, 40, 40, 21] and whole == chunked and "nelbo_loss" in whole


def test_levels_keep_their_digits_whatever_the_data():
    "only the data are rounded; a network of zeros is told the loss of float32"
    zeros = lambda z, u: torch.zeros_like(z)
    loss, x = DiffusionLoss("cosine", "score", "weighted"), X64[:5000]
    found, expected = (ValidationSet(loss, x.to(d))(zeros)["loss"] for d in (torch.bfloat16, torch.float32))
    assert found == pytest.approx(expected, rel=.01)


@pytest.mark.parametrize("bad, says", [
    (dict(bins=102), "bins must be"), (dict(chunk=0), "chunk must be"),
    (dict(x=X[:1]), "x must hold two"), (dict(x=X[:, 0]), "x must hold two"),
    (dict(loss=DiffusionLoss("cosine(-inf, 12.9)", "v")), "finite range")])
def test_what_is_refused(bad, says):
    with pytest.raises(ValueError, match=says): ValidationSet(**dict(loss=LOSS, x=X, bins=5) | bad)
