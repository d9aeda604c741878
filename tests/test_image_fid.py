"Attempts to break lfdm.images.fid: singular covariances, pytorch-fid on image files, weights that are none."
import math
import pickle
import resource
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import lfdm.images.fid as module
from lfdm.core import seeded
from lfdm.images.fid import INCEPTION_FILE, fid, frechet_distance, inception, inception_file, moments, stated

torch.set_num_threads(1)
f64 = torch.float64


def randn(*shape, seed=0): return torch.randn(*shape, generator=seeded(seed), dtype=f64)
def pictures(*shape, seed=0): return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


# --- the distance

@given(st.integers(2, 20), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_distance_is_that_of_the_samples(n, dims, seed):
    "The truth comes from the samples, also where both covariances are singular."
    x, y = randn(2, n, dims, seed=seed)
    X, Y = x - x.mean(0), y - y.mean(0)
    trace = ((X**2).sum() + (Y**2).sum() - 2 * torch.linalg.svdvals(X @ Y.T).sum()) / (n - 1)
    exact = ((x.mean(0) - y.mean(0)).square().sum() + trace).item()
    (mx, sx), (my, sy) = moments(x), moments(y)
    assert frechet_distance(mx, sx, my, sy) == pytest.approx(exact, rel=1e-9)
    assert 0 <= frechet_distance(mx, sx, mx, sx) < 1e-20


def test_no_difference_is_lost():
    (mean, cov), zero = moments(randn(50, 6)), torch.zeros(6, 6)
    tiny = frechet_distance(mean, cov, mean, (1 + 1e-8)**2 * cov)
    assert tiny == pytest.approx(1e-16 * cov.trace().item(), rel=1e-6)
    assert frechet_distance(mean, zero, mean, cov) == pytest.approx(cov.trace().item())   # one is a point
    assert frechet_distance(mean, zero, mean + 2, zero) == pytest.approx(24)              # both are


def test_moments_far_from_zero_in_any_batches():
    x = 1e4 + randn(2500, 3)
    mean, cov = moments(iter(x.split(13)))
    torch.testing.assert_close(mean, x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(cov, torch.cov(x.T), rtol=1e-9, atol=1e-12)
    same = moments([x[:0], x[:9], x[:0], x[9:]])   # empty batches change nothing
    for a, b in zip(same, (mean, cov)): torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cov, said", [
    (1., "shapes"), ([[1., .5], [-.5, 1.]], "symmetric"), ([[1., 2.], [2., 1.]], "negative eigenvalue")])
def test_what_is_no_gaussian(cov, said):
    with pytest.raises(ValueError, match=said): frechet_distance([0., 0.], cov, [0., 0.], np.eye(2))


@pytest.mark.parametrize("wrong, said", [
    (torch.zeros(1, 3), "at least 2"), (torch.tensor([[1., 2.], [math.inf, 0.]]), "number 1"),
    (torch.zeros(4), "shape"), ([torch.zeros(2, 3), torch.zeros(2, 4)], "a batch of 4 after")])
def test_what_has_no_moments(wrong, said):
    with pytest.raises((TypeError, ValueError), match=said): moments(wrong)


# --- Inception

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Random weights of the Inception network, in a file with the official name in a cache of its own."
    import pytorch_fid.inception as theirs
    file = tmp_path_factory.mktemp("hub") / "checkpoints" / INCEPTION_FILE
    file.parent.mkdir()
    with pytest.MonkeyPatch.context() as m, torch.random.fork_rng():
        m.setattr(theirs, "load_state_dict_from_url", lambda *a, **k: {})
        m.setattr(torch.nn.Module, "load_state_dict", lambda *a: None)
        torch.manual_seed(0)
        torch.save(theirs.fid_inception_v3().state_dict(), file)
    return file


@pytest.fixture
def hub(weights, monkeypatch):
    "torch's cache of downloads is that folder. Nothing may be fetched."
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("fetched"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(weights.parent.parent))


@pytest.fixture
def empty_hub(tmp_path, monkeypatch): monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))


def written(folder, images):
    "Images as PNG files."
    folder.mkdir()
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.filterwarnings("ignore:.*disp.*:DeprecationWarning", "ignore:Matrix is singular")
def test_pytorch_fid_says_the_same_of_files(hub, tmp_path):
    "Of 2,048 features the moments: the root of their covariance takes a minute."
    from pytorch_fid.fid_score import calculate_fid_given_paths, compute_statistics_of_path
    x, y = pictures(4, 3, 20, 20), 255 - pictures(5, 3, 20, 20, seed=1) // 3
    folders = [written(tmp_path / "x", x), written(tmp_path / "y", y)]
    ours = fid(x, y, dims=64, batch_size=3)
    theirs = calculate_fid_given_paths(folders, 5, "cpu", 64, num_workers=0)
    assert ours["value"] == pytest.approx(theirs, rel=1e-3)
    assert (ours["n"], ours["reference_n"], ours["dims"]) == (4, 5, 64)
    net = inception()
    theirs = compute_statistics_of_path(folders[0], net, 2, 2048, "cpu", 0)
    ours = moments(module._inception_features(net, x, 256, 2, None, 0, 4))
    for a, b in zip(ours, theirs): np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("digest, dims, name", [
    ("6726825d", 2048, "FID"), ("6726825d", 768, "Fréchet distance in 768"),
    ("01234567", 2048, "Fréchet distance in 2048 Inception features of weights 012")])
def test_only_the_official_weights_give_a_fid(monkeypatch, digest, dims, name):
    x = pictures(2, 1, 8, 8)
    monkeypatch.setattr(module, "inception", lambda *a: SimpleNamespace(digest=digest))
    monkeypatch.setattr(module, "_inception_features", lambda net, images, *a: [images.flatten(1).float()])
    measure = fid(x, x, dims=dims)["measure"]
    assert measure.startswith(name) and (measure == "FID") == (name == "FID")


def test_the_network_is_built_without_a_trace(hub, monkeypatch):
    import pytorch_fid.inception as theirs
    torch.manual_seed(5)
    before, fetch = torch.get_rng_state(), theirs.load_state_dict_from_url
    net, calls = inception(dims=64), []
    assert torch.equal(torch.get_rng_state(), before) and theirs.load_state_dict_from_url is fetch
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    monkeypatch.setattr(module, "inception", lambda *a: net)
    x, y = pictures(2, 1, 9, 9), pictures(3, 1, 9, 9, seed=1)
    value = fid(x, y, dims=64, batch_size=2, progress=lambda *a: calls.append(a))["value"]
    grey = fid(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1), dims=64)["value"]
    assert grey == pytest.approx(value, rel=1e-5) and calls == [("fid", n, 5) for n in (2, 4, 5)]


def test_where_weights_are_looked_for(weights, empty_hub, tmp_path, monkeypatch):
    assert inception_file(weights) == weights
    with pytest.raises(FileNotFoundError, match=f"{INCEPTION_FILE}.*download=True"): inception_file()
    with pytest.raises(FileNotFoundError, match="nowhere.pth"): inception_file(tmp_path / "nowhere.pth", True)
    asked = {}
    fetch = lambda url, path, hash_prefix: asked.update(url=url, path=path, prefix=hash_prefix)
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert str(inception_file(download=True)) == asked["path"] and asked["prefix"] == "6726825d"
    assert asked["url"].endswith(INCEPTION_FILE)
    def broken(*a, **k): raise OSError("no route")
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(OSError, match="no route.*weights=..."): inception_file(download=True)


class Trap:
    def __reduce__(self): return (pytest.fail, ("a file of weights ran code",))


def test_files_that_are_no_weights(tmp_path):
    for name, content in (("trap.pth", {"x": Trap()}), ("other", {"fc.weight": torch.zeros(3)}), ("three", 3),
                          ("cut", torch.zeros(99))): torch.save(content, tmp_path / name)
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:200])
    (tmp_path / "empty").write_bytes(b""), (tmp_path / "trap").write_bytes(pickle.dumps(Trap(), 2))
    for name in ("empty", "trap", "trap.pth", "cut", "other", "three"):
        said = "does not hold" if name in ("other", "three") else "cannot be read"
        with pytest.raises(ValueError, match=said): inception(tmp_path / name)


def test_files_that_claim_much_are_not_read(tmp_path):
    "Gigabytes in a header, in a compressed archive and in a sparse file: sizes are compared first."
    wide = torch.zeros(1).expand(2**30)
    torch.save({"x": wide}, tmp_path / "claims.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as file:
        for i in range(5): file.writestr(f"archive/data/{i}", bytes(2**26))
    with (tmp_path / "sparse.pth").open("wb") as file: file.truncate(2**34)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("claims", "bomb", "sparse"):
        with pytest.raises(ValueError, match="MB of memory"): inception(tmp_path / f"{name}.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**18   # kB


def test_the_old_format_of_torch_is_read(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = module._read_weights(tmp_path / "old.pth", (tmp_path / "old.pth").read_bytes())
    assert all(torch.equal(found[k], state[k]) for k in state)


def test_arguments_are_checked_before_any_weights(empty_hub):
    good = pictures(4, 3, 8, 8)
    for wrong, said in ((good.float(), "quantize"), (good[:1], "too few"), (good[:, :2], "channels"),
                        (good.tolist(), "uint8"), (good.to("meta"), "meta")):
        for pair in ((wrong, good), (good, wrong)):
            with pytest.raises((TypeError, ValueError), match=said): fid(*pair)
    for option in (dict(levels=17), dict(batch_size=0), dict(dims=100), dict(device="nowhere"),
                   dict(weights=3), dict(progress=3), dict(download="yes"), dict(of=3)):
        with pytest.raises((TypeError, ValueError), match=next(iter(option))): fid(good, good, **option)


def test_a_number_comes_with_its_conditions():
    report = dict(measure="FID", value=12.34, n=1000, reference="cifar10 train", reference_n=50_000,
                  dims=2048, weights="6726825d", noise=.5, noise_sd=.1)
    none = dict(sampler=None, steps=None, ema=None, seed=0)
    assert stated(report, sampler="ddim", steps=50, ema=0.999, seed=3) == (
        "FID 12.34 (real images 0.5 ± 0.1), n = 1,000 against 50,000 of cifar10 train, 2048 features, "
        "weights 6726825d; sampler ddim, steps 50, EMA 0.999, seed 3")
    bound = stated(dict(total=3.21, se=.02, n=50), **none, draws=8)
    assert bound == "3.210 ± 0.020 bits/dim, n = 50; EMA none, seed 0, draws 8"
    with pytest.raises(ValueError, match="report must be one of .* lacks 'measure'"): stated({}, **none)
