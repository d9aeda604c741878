"Attempts to break lfdm.images.features: its training, its file, samples that are none."
import math

import pytest
import torch

import lfdm.images.features as module
from lfdm.core import seeded
from lfdm.images.data import Digits, ImageSet, dequantize, quantize, scaled
from lfdm.images.features import classifier_view, feature_distance, feature_net
from lfdm.images.fid import moments

torch.set_num_threads(1)
DIGITS = Digits()


class Stripes(ImageSet):
    "Colour images of odd size, with two classes."
    name, levels, classes = "stripes", 9, 2
    def load(self):
        draw = lambda seed: torch.randint(0, 9, (60, 3, 7, 5), dtype=torch.uint8, generator=seeded(seed))
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
    assert moments(first.features(scaled(Stripes().train(), 9)))[1].trace() == pytest.approx(1, rel=1e-5)


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


@pytest.fixture(scope="module")
def net(tmp_path_factory): return feature_net(DIGITS, 1, 250, tmp_path_factory.mktemp("runs"))


def test_what_the_classifier_sees(net):
    real = classifier_view(DIGITS.test(), DIGITS, net)
    absurd = classifier_view(torch.full((9, 1, 16, 16), 8, dtype=torch.uint8), DIGITS, net)
    assert net.accuracy > 0.9 and real["entropy"] > 2.2 and sum(real["frequencies"]) == pytest.approx(1)
    assert absurd["entropy"] == 0 and absurd["n"] == 9


def test_what_feature_distance_compares(net):
    seen, real = DIGITS.train(), DIGITS.test()
    distance = lambda x, repeats=4, **options: feature_distance(x, DIGITS, net, repeats=repeats, **options)
    at_floor = lambda d: abs(d["value"] - d["noise"]) < 3 * d["noise_sd"]
    ours = distance(seen, 20)
    assert at_floor(ours) and (ours["n"], ours["reference_n"]) == (750, 297) and "FID" not in ours["measure"]
    assert distance(scaled(seen, 17)) == distance(seen) == distance(dequantize(seen, 17, seeded(0)))
    assert distance(seen, seed=1) != distance(seen) and distance(real, n=297)["value"] < 1e-12
    other = distance(real, 20, split="train")
    assert at_floor(other)
    assert (other["n"], other["reference"], other["reference_n"]) == (148, "digits train", 1500)
    noisy = quantize(scaled(seen, 17) + 0.4 * torch.randn(seen.shape, generator=seeded(0)), 17)
    assert distance(noisy)["value"] > ours["noise"] + 4 * ours["noise_sd"]


@pytest.mark.parametrize("judge", [feature_distance, classifier_view])
@pytest.mark.parametrize("change, error, said", [
    (lambda x: x[:1], ValueError, "too few"), (lambda x: x.expand(-1, 3, -1, -1), ValueError, "shape"),
    (lambda x: x.float() * math.nan, ValueError, "not finite"), (lambda x: x + 17, ValueError, "17 levels"),
    (lambda x: x.long(), TypeError, "uint8"), (lambda x: None, TypeError, "uint8")])
def test_samples_that_are_none(net, judge, change, error, said):
    with pytest.raises(error, match=said): judge(change(DIGITS.test()), DIGITS, net)


@pytest.mark.parametrize("wrong, said", [
    (dict(n=1), "n must"), (dict(n=298), "n must"), (dict(repeats=1), "repeats"),
    (dict(split="tset"), "'test'"), (dict(seed=-1), "seed")])
def test_wrong_choices(net, wrong, said):
    with pytest.raises(ValueError, match=said): feature_distance(DIGITS.test(), DIGITS, net, **wrong)
