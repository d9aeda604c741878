"Attempts to break lfdm.images.quality: singular and wrong covariances, pytorch-fid on image files, weights that are not what they seem, a cache that is damaged, images of known probability."
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import lfdm.images.quality as quality
from lfdm.core import expand
from lfdm.images.features import FeatureNet, classifier_view, feature_distance, feature_net
from lfdm.images.fid import fid, frechet_distance, inception, inception_file, moments, stated
from lfdm.likelihood import discrete_reconstruction, flow_bits_per_dim, image_bound
from lfdm.images.data import Digits, ImageSet, dequantize, quantize, scaled
from lfdm.images.templates import Templates
from lfdm.schedules import SCHEDULES
from lfdm.steps import exact_denoiser

torch.set_num_threads(1)
f64 = torch.float64
few = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def generator(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed), dtype=f64)
def pictures(*shape, levels=256, seed=0): return torch.randint(0, levels, shape, dtype=torch.uint8, generator=generator(seed))
def gaussian(dims, n=50, seed=0): return moments(randn(n, dims, seed=seed) @ randn(dims, dims, seed=seed + 1) + randn(dims, seed=seed + 2))


# --- the distance

@given(st.integers(1, 12), st.integers(0, 1000))
@few
def test_distance_is_the_printed_formula(dims, seed):
    (mx, sx), (my, sy) = gaussian(dims, seed=seed), gaussian(dims, seed=seed + 500)
    printed = (mx - my).square().sum() + (sx + sy).trace() - 2 * np.trace(scipy.linalg.sqrtm((sx @ sy).numpy())).real
    value = frechet_distance(mx, sx, my, sy)
    assert value == pytest.approx(printed.item(), rel=1e-8) and value == pytest.approx(frechet_distance(my, sy, mx, sx), rel=1e-10)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_fewer_samples_than_features(n):
    "The truth comes from the samples themselves."
    x, y = randn(2, n, 30)
    value = frechet_distance(*moments(x), *moments(y))
    X, Y = x - x.mean(0), y - y.mean(0)
    exact = (x.mean(0) - y.mean(0)).square().sum() + ((X**2).sum() + (Y**2).sum() - 2 * torch.linalg.svdvals(X @ Y.T).sum()) / (n - 1)
    assert value == pytest.approx(exact.item(), rel=1e-9)


@given(st.integers(2, 40), st.integers(0, 1000))
@few
def test_a_set_is_at_no_distance_from_itself(n, seed):
    x = moments(randn(n, 8, seed=seed))
    assert 0 <= frechet_distance(*x, *x) < 1e-20


def test_no_difference_is_lost():
    (mean, cov), scale = gaussian(6), 1 + 1e-8
    assert frechet_distance(mean, cov, mean, scale**2 * cov) == pytest.approx((1e-8)**2 * cov.trace().item(), rel=1e-6)
    zero = torch.zeros(6, 6)
    assert frechet_distance(mean, zero, mean, cov) == pytest.approx(cov.trace().item())   # one is a point
    assert frechet_distance(mean, zero, mean + 2, zero) == pytest.approx(24)              # both are


def test_units_rotations_and_shifts():
    (mx, sx), (my, sy), q = gaussian(5), gaussian(5, seed=9), torch.linalg.qr(randn(5, 5))[0]
    value = frechet_distance(mx, sx, my, sy)
    assert frechet_distance(3 * mx, 9 * sx, 3 * my, 9 * sy) == pytest.approx(9 * value)
    assert frechet_distance(q @ mx, q @ sx @ q.T, q @ my, q @ sy @ q.T) == pytest.approx(value)
    assert frechet_distance(mx + 7, sx, my + 7, sy) == pytest.approx(value)
    assert frechet_distance(mx.tolist(), sx.numpy(), my.float(), sy.numpy()) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("wrong, said", [
    (([0.], [[1.]], [0., 0.], np.eye(2)), "1 and 2 features"), (([0., 0.], np.eye(3), [0., 0.], np.eye(2)), r"shape \(F, F\)"), (([0.], 1., [0.], [[1.]]), r"shape \(F, F\)"),
    (([0., math.nan], np.eye(2), [0., 0.], np.eye(2)), "not finite"), (([0., 0.], [[1., .5], [-.5, 1.]], [0., 0.], np.eye(2)), "symmetric"), (([0., 0.], [[1., 2.], [2., 1.]], [0., 0.], np.eye(2)), "negative eigenvalue")])
def test_what_is_no_gaussian_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said): frechet_distance(*wrong)


def test_moments_in_any_batches():
    x = 1e4 + randn(2500, 3)
    for cut in (13, 1024, 2500):
        mean, cov = moments(iter(x.split(cut)))
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
        torch.testing.assert_close(cov, torch.cov(x.T), rtol=1e-9, atol=1e-12)
    assert moments(x.float().requires_grad_())[1].dtype == f64


@pytest.mark.parametrize("wrong, error, said", [(torch.zeros(1, 3), ValueError, "at least 2"), ([], ValueError, "at least 2"), (torch.tensor([[1., 2.], [math.inf, 0.]]), ValueError, "number 1"), (torch.zeros(4), TypeError, "shape"),
                                                ([torch.zeros(2, 3), torch.zeros(2, 4)], ValueError, "4 features"), ([np.zeros((2, 3))], TypeError, "tensor")])
def test_features_that_are_none(wrong, error, said):
    with pytest.raises(error, match=said): moments(wrong)


# --- Inception

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Random weights of the Inception network, in a file with the official name in a cache of its own. Nothing may be fetched."
    import pytorch_fid.inception as theirs
    folder = tmp_path_factory.mktemp("hub") / "checkpoints"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as m, torch.random.fork_rng():
        m.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: {})
        m.setattr(torch.nn.Module, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        state = theirs.fid_inception_v3().state_dict()
    torch.save(state, folder / quality.INCEPTION_FILE)
    return folder / quality.INCEPTION_FILE


@pytest.fixture
def hub(weights, monkeypatch):
    "torch's cache of downloads is that folder."
    def never(*a, **k): raise AssertionError("fetched from the network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", never)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(weights.parent.parent))
    return weights


def written(folder, images):
    "Images as PNG files."
    folder.mkdir()
    for i, image in enumerate(images): Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning", "ignore:Matrix is singular")   # pytorch-fid's own
@pytest.mark.parametrize("channels, dims", [(1, 64), (3, 192)])
def test_pytorch_fid_says_the_same_of_files(hub, tmp_path, channels, dims):
    from pytorch_fid.fid_score import calculate_fid_given_paths
    x, y = pictures(4, channels, 20, 20), 255 - pictures(5, channels, 20, 20, seed=1) // 3
    theirs = calculate_fid_given_paths([written(tmp_path / "x", x), written(tmp_path / "y", y)], 5, "cpu", dims, num_workers=0)
    ours = fid(x, y, dims=dims, batch_size=3)
    assert ours["value"] == pytest.approx(theirs, rel=1e-4) and (ours["n"], ours["reference_n"], ours["dims"]) == (4, 5, dims)


def test_all_features_are_those_of_pytorch_fid(hub, tmp_path):
    "2,048 of them; their matrix root takes a minute, so it stops at the moments."
    from pytorch_fid.fid_score import compute_statistics_of_path
    from pytorch_fid.inception import InceptionV3
    x = pictures(2, 3, 20, 20)
    theirs = compute_statistics_of_path(written(tmp_path / "x", x), InceptionV3([3]), 2, 2048, "cpu", 0)
    for a, b in zip(moments(quality._inception_features(inception(), x, 256, 1, None, 0, 2)), theirs): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


def test_only_the_official_weights_give_a_fid(hub, monkeypatch):
    net = inception()
    x = pictures(2, 1, 8, 8)
    monkeypatch.setattr(quality, "inception", lambda weights, device, dims, download: SimpleNamespace(digest=weights, parameters=net.parameters, dims=dims))
    monkeypatch.setattr(quality, "_inception_features", lambda net, images, *a: [images.flatten(1).float()])
    for digest, dims, name in (("6726825d", 2048, "FID"), ("6726825d", 768, "Fréchet distance in 768 Inception features of weights 6726825d"), (net.digest, 2048, f"Fréchet distance in 2048 Inception features of weights {net.digest}")):
        assert fid(x, x, digest, dims=dims)["measure"] == name


def test_the_network_is_built_without_a_trace(hub):
    import pytorch_fid.inception as theirs
    torch.manual_seed(5); before, fetch = torch.get_rng_state(), theirs.load_state_dict_from_url
    net = inception(dims=64)
    assert torch.equal(torch.get_rng_state(), before) and theirs.load_state_dict_from_url is fetch and not net.training and not any(p.requires_grad for p in net.parameters())
    calls = []
    one, three = (fid(x, y, dims=64, batch_size=b, progress=lambda *a: calls.append(a))["value"] for b, x, y in ((50, pictures(2, 1, 9, 9), pictures(3, 1, 9, 9, seed=1)), (2, pictures(2, 1, 9, 9).expand(-1, 3, -1, -1), pictures(3, 1, 9, 9, seed=1))))
    assert one == pytest.approx(three, rel=1e-5) and calls[-1] == ("fid", 5, 5) and [c[1] for c in calls] == [2, 5, 2, 4, 5]


def test_where_weights_are_looked_for(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    assert inception_file(weights) == weights
    with pytest.raises(FileNotFoundError, match="pt_inception-2015-12-05-6726825d.pth.*download=True"): inception_file()
    with pytest.raises(FileNotFoundError, match="nowhere.pth"): inception_file(tmp_path / "nowhere.pth", download=True)
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: asked.append((url, path, hash_prefix)))
    assert str(inception_file(download=True)) == asked[0][1] and asked[0][2] == "6726825d" and asked[0][0].endswith(quality.INCEPTION_FILE)
    def broken(*a, **k): raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(OSError, match="no route.*weights=..."): inception_file(download=True)


class Trap:
    def __reduce__(self): return (pytest.fail, ("a file of weights ran code",))


def test_files_that_are_no_weights(tmp_path):
    whole = {"fc.weight": torch.zeros(3)}
    (tmp_path / "empty").write_bytes(b""); (tmp_path / "trap").write_bytes(pickle.dumps(Trap(), 2))
    torch.save({"x": Trap()}, tmp_path / "trap.pth"); torch.save(whole, tmp_path / "other"); torch.save(3, tmp_path / "three")
    torch.save(torch.zeros(99), tmp_path / "cut"); (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:200])
    for name in ("empty", "trap", "trap.pth", "cut"):
        with pytest.raises(ValueError, match="cannot be read"): inception(tmp_path / name)
    for name in ("other", "three"):
        with pytest.raises(ValueError, match="does not hold"): inception(tmp_path / name)


def test_images_are_checked_before_any_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    good = pictures(4, 3, 8, 8)
    for wrong, error, said in ((good.float(), TypeError, "quantize"), (good[:1], ValueError, "too few"), (good[0], ValueError, "shape"), (good[:, :2], ValueError, "channels"), (good.tolist(), TypeError, "uint8"), (good[..., :0], ValueError, "shape")):
        for pair in ((wrong, good), (good, wrong)):
            with pytest.raises(error, match=said): fid(*pair)
    with pytest.raises(ValueError, match="17 levels"): fid(good, good, levels=17)
    with pytest.raises(ValueError, match="batch_size"): fid(good, good, batch_size=0)


# --- the classifier

class Stripes(ImageSet):
    "Colour images of odd size, with two classes."
    name, levels, classes = "stripes", 9, 2
    def load(self): return {s: (pictures(60, 3, 7, 5, levels=9, seed=i), torch.arange(60) % 2) for i, s in enumerate(("train", "test"))}


def test_training_depends_on_the_seed_alone(tmp_path):
    torch.manual_seed(1); before = torch.get_rng_state()
    first = feature_net(Stripes(), steps=20, root=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2); torch.set_num_threads(2)
    try: assert feature_net(Stripes(), steps=20, root=tmp_path / "b").digest == first.digest and torch.get_num_threads() == 2
    finally: torch.set_num_threads(1)
    assert feature_net(Stripes(), 1, 20, tmp_path / "a").digest != first.digest
    assert sorted(p.name for p in (tmp_path / "a/features").iterdir()) == [f"stripes-{Stripes().digest}-s{s}-20steps.safetensors" for s in (0, 1)]
    x = first.features(scaled(Stripes().train(), 9)).detach()
    assert moments(x)[1].trace() == pytest.approx(1, rel=1e-5)


def test_the_file_is_whole_or_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    net = feature_net(Stripes(), steps=5)
    path, = (tmp_path / "features").iterdir()
    content = path.read_bytes()
    monkeypatch.setattr(quality, "_trained", lambda *a: pytest.fail("trained again"))
    again = feature_net(Stripes(), steps=5)
    assert (again.digest, again.accuracy, again.name, again.training) == (net.digest, net.accuracy, net.name, False)
    monkeypatch.undo(); monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    for damaged in (b"", content[:100], content[:-40], content.replace(b'"stripes', b'"strpies'), content.replace(b"accuracy", b"inaccura")):
        path.write_bytes(damaged)
        assert feature_net(Stripes(), steps=5).digest == net.digest and path.read_bytes() == content
    path.unlink()
    def fails(tensors, file, facts): file.write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(quality, "save_file", fails)
    with pytest.raises(OSError, match="disk full"): feature_net(Stripes(), steps=5)
    assert not list((tmp_path / "features").iterdir())


@pytest.fixture(scope="module")
def net(tmp_path_factory): return feature_net(Digits(), seed=1, root=tmp_path_factory.mktemp("runs"))


def test_digits_are_read(net):
    assert net.accuracy >= 0.97
    digits = Digits()
    real, absurd = classifier_view(digits.test(), digits, net), classifier_view(torch.full((9, 1, 16, 16), 8, dtype=torch.uint8), digits, net)
    assert real["entropy"] > 2.29 and real["confident"] > 0.7 and sum(real["frequencies"]) == pytest.approx(1) and absurd["entropy"] == 0 and absurd["n"] == 9


def test_what_feature_distance_compares(net):
    digits = Digits()
    seen, real = digits.train(), digits.test()
    ours = feature_distance(seen, digits, net)
    assert abs(ours["value"] - ours["noise"]) < 3 * ours["noise_sd"] and (ours["n"], ours["reference_n"]) == (750, 297) and "FID" not in ours["measure"]
    assert feature_distance(seen, digits, net) == ours != feature_distance(seen, digits, net, seed=1)
    assert feature_distance(scaled(seen, 17), digits, net) == ours == feature_distance(dequantize(seen, 17, generator()), digits, net)
    assert feature_distance(real, digits, net, n=297)["value"] < 1e-12
    other = feature_distance(real, digits, net, split="train")
    assert (other["n"], other["reference"], other["reference_n"]) == (148, "digits train", 1500) and abs(other["value"] - other["noise"]) < 3 * other["noise_sd"]
    near, far = (feature_distance(quantize(scaled(seen, 17) + s * randn(1500, 1, 16, 16).float(), 17), digits, net)["value"] for s in (0.2, 0.5))
    assert ours["noise"] + 4 * ours["noise_sd"] < near < far


@pytest.mark.parametrize("change, error, said", [(lambda x: x[:1], ValueError, "too few"), (lambda x: x.expand(-1, 3, -1, -1), ValueError, "shape"), (lambda x: x.float() * math.nan, ValueError, "not finite"), (lambda x: x + 17, ValueError, "17 levels"),
                                                 (lambda x: x.long(), TypeError, "uint8"), (lambda x: None, TypeError, "uint8")])
def test_samples_that_are_none(net, change, error, said):
    for judge in (feature_distance, classifier_view):
        with pytest.raises(error, match=said): judge(change(Digits().test()), Digits(), net)


def test_more_wrong_choices(net):
    x, digits = Digits().test(), Digits()
    for wrong, said in ((dict(n=1), "n must"), (dict(n=298), "n must"), (dict(repeats=1), "repeats"), (dict(split="tset"), "'test'"), (dict(seed=-1), "seed")):
        with pytest.raises(ValueError, match=said): feature_distance(x, digits, net, **wrong)
    class Blank(Digits): classes = None
    with pytest.raises(ValueError, match="no labels"): feature_net(Blank())
    with pytest.raises(ValueError, match="steps"): feature_net(digits, steps=0)


# --- bits per dimension

class Pixels:
    "Bytes of L levels, independent, with known probabilities; the exact denoiser of their middles."
    def __init__(self, levels=4, shape=(1, 2, 2)):
        self.p, self.levels, self.shape = torch.linspace(1, 3, levels, dtype=f64) / torch.linspace(1, 3, levels, dtype=f64).sum(), levels, shape
        self.middles = scaled(torch.arange(levels, dtype=torch.uint8), levels).double()
    def draw(self, n): return torch.multinomial(self.p, n * math.prod(self.shape), True, generator=generator()).view(n, *self.shape).to(torch.uint8)
    def log_prob(self, images): return self.p.log()[images.long()].flatten(1).sum(1)
    def denoise(self, z, alpha, sigma):
        logit = self.p.log() - ((z[..., None] - expand(alpha, z)[..., None] * self.middles) / expand(sigma, z)[..., None])**2 / 2
        return logit.softmax(-1) @ self.middles


def truth(s, images): return -s.log_prob(images) / (images[0].numel() * math.log(2))
def within(gap, expected=0., n=4): return abs(gap.mean() - expected) < n * gap.std() / len(gap)**0.5


@pytest.mark.parametrize("levels", [2, 5])
def test_whole_bytes_at_the_optimum(levels):
    s, schedule = Pixels(levels), SCHEDULES["cosine"](-10, 10)
    images = s.draw(1500)
    bound = image_bound(exact_denoiser(s), images, levels, schedule, draws=40, decoder="discrete", dtype=f64)
    assert bound.offset == 0 and bound.reconstruction.max() < 1e-5 and within(bound.total - truth(s, images)) and bound.report()["se"] < 0.05


def test_dequantized_images_at_the_optimum():
    class Coarse(Templates): name, levels = "coarse", 8
    s, schedule = Coarse(), SCHEDULES["cosine"](-12.9, 11)
    images = s.test()[:40]
    bound = image_bound(exact_denoiser(s), images, 8, schedule, draws=64, dtype=f64)
    assert bound.offset == 2 and within(bound.total - truth(s, images)) and bound.report()["se"] < 0.1
    flow = flow_bits_per_dim(exact_denoiser(s), images[:16], 8, schedule, dtype=f64, rtol=1e-3, atol=1e-3)
    assert abs((flow - truth(s, images[:16])).mean()) < 0.05


def test_a_worse_denoiser_has_a_larger_bound():
    s = Pixels()
    images = s.draw(800)
    def off(z, level):
        x_hat, eps_hat = exact_denoiser(s)(z, level)
        return x_hat, 0.8 * eps_hat
    bounds = [image_bound(d, images, 4, draws=30, decoder="discrete", dtype=f64).total.mean() for d in (exact_denoiser(s), off)]
    assert bounds[1] > bounds[0] + 0.5


def test_one_bound_whatever_the_batches():
    s = Pixels()
    images, calls = s.draw(101), []
    whole, parts = (image_bound(exact_denoiser(s), images, 4, draws=30, seed=3, batch_size=b, dtype=f64, progress=lambda *a: calls.append(a)) for b in (500, 25))
    assert len(parts.total) == 101 and calls == [("bound", 101, 101)] + [("bound", n, 101) for n in (21, 41, 61, 81, 101)]
    assert abs((whole.total - parts.total).mean()) < 4 * ((whole.total - parts.total).std() / 101**0.5)
    same, other = (image_bound(exact_denoiser(s), images, 4, draws=30, seed=seed, batch_size=500, dtype=f64) for seed in (3, 4))
    assert torch.equal(same.total, whole.total) and not torch.equal(other.total, whole.total)
    report = whole.report()
    assert report["total"] == pytest.approx(sum(report[k] for k in ("prior", "diffusion", "reconstruction", "offset"))) and report["n"] == 101
    assert math.isnan(image_bound(exact_denoiser(s), images[:1], 4, draws=2).report()["se"])


@pytest.mark.parametrize("logsnr", [-5., 1., 4., 20.])
def test_the_discrete_decoder_is_a_distribution(logsnr):
    "Its cost is that of a posterior under a flat prior: at most log L on average over the levels, and 0 where there is no noise."
    b = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(-1, 1, 40, 40)
    cost = discrete_reconstruction(b, 8, SCHEDULES["cosine"](-20, 20).level_at(torch.tensor(logsnr, dtype=f64))) / 1600
    assert 0 <= cost.min() + 1e-9 and cost.mean() < math.log(8) + 1e-3 and (cost.max() < 1e-4 if logsnr == 20 else True) and (cost.mean() > 1.9 if logsnr == -5 else True)


def test_wrong_images_and_choices():
    s, denoiser = Pixels(), exact_denoiser(Pixels())
    images = s.draw(4)
    for f in (image_bound, flow_bits_per_dim):
        for wrong, error, said in ((dequantize(images, 4), TypeError, "quantize"), (images[:0], ValueError, "too few"), (images + 4, ValueError, "4 levels"), (images[0], ValueError, "shape")):
            with pytest.raises(error, match=said): f(denoiser, wrong, 4)
        with pytest.raises(ValueError, match="levels"): f(denoiser, images, 1)
        with pytest.raises(ValueError, match="batch_size"): f(denoiser, images, 4, batch_size=0)
        with pytest.raises(ValueError, match="cosine"): f(denoiser, images, 4, "cosin")
    with pytest.raises(ValueError, match="'discrete'"): image_bound(denoiser, images, 4, decoder="discret")
    with pytest.raises(ValueError, match="draws"): image_bound(denoiser, images, 4, draws=0)
    with pytest.raises(ValueError, match="'sign'"): flow_bits_per_dim(denoiser, images, 4, trace="sine")
    with pytest.raises(FloatingPointError): image_bound(lambda z, level: (z, z / 0), images, 4)


def test_a_number_comes_with_its_conditions():
    report = dict(measure="FID", value=12.34, n=1000, reference="cifar10 train", reference_n=50_000, dims=2048, weights="6726825d")
    assert stated(report, sampler="ddim", steps=50, ema=0.999, seed=3) == "FID 12.34, n = 1,000 against 50,000 of cifar10 train, 2048 features, weights 6726825d; sampler ddim, steps 50, EMA 0.999, seed 3"
    assert "(real images 0.5 ± 0.1)" in stated(report | dict(noise=.5, noise_sd=.1), sampler=None, steps=None, ema=None, seed=0)
    assert stated(dict(total=3.21, se=.02, n=50), sampler=None, steps=None, ema=None, seed=0, draws=8) == "3.210 ± 0.020 bits/dim, n = 50; EMA none, seed 0, draws 8"
    with pytest.raises(TypeError, match="ema"): stated(report, sampler="ddim", steps=50, seed=3)
