"Attempts to break lfdm.images.features: its training, its file, samples that are none."
import math

import pytest
import torch

import lfdm.images.features as module
from lfdm.images.data import Digits, ImageSet, dequantize, quantize, scaled
from lfdm.images.features import classifier_view, feature_distance, feature_net
from lfdm.images.fid import moments

torch.set_num_threads(1)
DIGITS = Digits()


def generator(seed=0): return torch.Generator().manual_seed(seed)


class Stripes(ImageSet):
    "Colour images of odd size, with two classes."
    name, levels, classes = "stripes", 9, 2
    def load(self):
        draw = lambda seed: torch.randint(0, 9, (60, 3, 7, 5), dtype=torch.uint8, generator=generator(seed))
        return {s: (draw(i), torch.arange(60) % 2) for i, s in enumerate(("train", "test"))}


def test_training_depends_on_the_seed_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = feature_net(Stripes(), steps=20, root=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2), torch.set_num_threads(2)
    try: again, threads = feature_net(Stripes(), steps=20, root=tmp_path / "b"), torch.get_num_threads()
    finally: torch.set_num_threads(1)
    assert again.digest == first.digest and threads == 2
    assert first.digest != feature_net(Stripes(), 1, 20, tmp_path / "a").digest
    names = [f"stripes-{Stripes().digest}-s{s}-20steps.safetensors" for s in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "a/features").iterdir()) == names
    features = first.features(scaled(Stripes().train(), 9)).detach()
    assert moments(features)[1].trace() == pytest.approx(1, rel=1e-5)


def test_the_file_is_whole_or_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    net = feature_net(Stripes(), steps=5)
    path, = (tmp_path / "features").iterdir()
    content = path.read_bytes()
    with monkeypatch.context() as m:
        m.setattr(module, "_trained", lambda *a: pytest.fail("trained again"))
        again = feature_net(Stripes(), steps=5)
    said = lambda net: (net.digest, net.accuracy, net.name, net.training)
    assert said(again) == said(net)
    for damaged in (b"", content[:100], content[:-40], content.replace(b'"stripes', b'"strpies'),
                    content.replace(b"accuracy", b"inaccura")):
        path.write_bytes(damaged)
        assert feature_net(Stripes(), steps=5).digest == net.digest and path.read_bytes() == content
    path.unlink()
    def fails(tensors, file, facts): file.write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(module, "save_file", fails)
    with pytest.raises(OSError, match="disk full"): feature_net(Stripes(), steps=5)
    assert not list((tmp_path / "features").iterdir())


@pytest.fixture(scope="module")
def net(tmp_path_factory): return feature_net(DIGITS, seed=1, root=tmp_path_factory.mktemp("runs"))


def test_digits_are_read(net):
    assert net.accuracy >= 0.97
    real = classifier_view(DIGITS.test(), DIGITS, net)
    absurd = classifier_view(torch.full((9, 1, 16, 16), 8, dtype=torch.uint8), DIGITS, net)
    assert real["entropy"] > 2.29 and real["confident"] > 0.7 and sum(real["frequencies"]) == pytest.approx(1)
    assert absurd["entropy"] == 0 and absurd["n"] == 9


def test_what_feature_distance_compares(net):
    seen, real = DIGITS.train(), DIGITS.test()
    distance = lambda x, **options: feature_distance(x, DIGITS, net, **options)
    at_floor = lambda d: abs(d["value"] - d["noise"]) < 3 * d["noise_sd"]
    ours = distance(seen)
    assert at_floor(ours) and (ours["n"], ours["reference_n"]) == (750, 297) and "FID" not in ours["measure"]
    assert distance(scaled(seen, 17)) == ours == distance(dequantize(seen, 17, generator()))
    assert ours != distance(seen, seed=1) and distance(real, n=297)["value"] < 1e-12
    other = distance(real, split="train")
    assert at_floor(other)
    assert (other["n"], other["reference"], other["reference_n"]) == (148, "digits train", 1500)
    noisy = lambda s: quantize(scaled(seen, 17) + s * torch.randn(seen.shape, generator=generator()), 17)
    near, far = (distance(noisy(s))["value"] for s in (0.2, 0.5))
    assert ours["noise"] + 4 * ours["noise_sd"] < near < far


@pytest.mark.parametrize("judge", [feature_distance, classifier_view])
@pytest.mark.parametrize("change, error, said", [
    (lambda x: x[:1], ValueError, "too few"), (lambda x: x.expand(-1, 3, -1, -1), ValueError, "shape"),
    (lambda x: x.float() * math.nan, ValueError, "not finite"), (lambda x: x + 17, ValueError, "17 levels"),
    (lambda x: x.long(), TypeError, "uint8"), (lambda x: None, TypeError, "uint8")])
def test_samples_that_are_none(net, judge, change, error, said):
    with pytest.raises(error, match=said): judge(change(DIGITS.test()), DIGITS, net)


def test_more_wrong_choices(net):
    for wrong, said in ((dict(n=1), "n must"), (dict(n=298), "n must"), (dict(repeats=1), "repeats"),
                        (dict(split="tset"), "'test'"), (dict(seed=-1), "seed")):
        with pytest.raises(ValueError, match=said): feature_distance(DIGITS.test(), DIGITS, net, **wrong)
    class Blank(Digits): classes = None
    with pytest.raises(ValueError, match="no labels"): feature_net(Blank())
    with pytest.raises(ValueError, match="steps"): feature_net(DIGITS, steps=0)
