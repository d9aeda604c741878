"Attempts to break lfdm.images.features: its training, its file, samples that are none."
import math

import pytest
import torch

import lfdm.images.features as module
from lfdm.images.data import Digits, ImageSet, dequantize, quantize, scaled
from lfdm.images.features import classifier_view, feature_distance, feature_net
from lfdm.images.fid import moments

torch.set_num_threads(1)


def generator(seed=0): return torch.Generator().manual_seed(seed)


class Stripes(ImageSet):
    "Colour images of odd size, with two classes."
    name, levels, classes = "stripes", 9, 2
    def load(self): return {s: (torch.randint(0, 9, (60, 3, 7, 5), dtype=torch.uint8, generator=generator(i)), torch.arange(60) % 2) for i, s in enumerate(("train", "test"))}


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
    monkeypatch.setattr(module, "_trained", lambda *a: pytest.fail("trained again"))
    again = feature_net(Stripes(), steps=5)
    assert (again.digest, again.accuracy, again.name, again.training) == (net.digest, net.accuracy, net.name, False)
    monkeypatch.undo(); monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    for damaged in (b"", content[:100], content[:-40], content.replace(b'"stripes', b'"strpies'), content.replace(b"accuracy", b"inaccura")):
        path.write_bytes(damaged)
        assert feature_net(Stripes(), steps=5).digest == net.digest and path.read_bytes() == content
    path.unlink()
    def fails(tensors, file, facts): file.write_bytes(b"half"); raise OSError("disk full")
    monkeypatch.setattr(module, "save_file", fails)
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
    near, far = (feature_distance(quantize(scaled(seen, 17) + s * torch.randn(1500, 1, 16, 16, generator=generator(), dtype=torch.float64).float(), 17), digits, net)["value"] for s in (0.2, 0.5))
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
