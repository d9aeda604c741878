"Attempts to break lfdm.images.features: its training, its file, samples that are none."
import json
import math
import random
import resource

import pytest
import torch
from safetensors import safe_open

import lfdm.images.features as module
from lfdm.core import seeded
from lfdm.images.data import Digits, ImageSet, dequantize, scaled
from lfdm.images.features import FeatureNet, classifier_view, feature_distance, feature_net
from lfdm.images.fid import moments

torch.set_num_threads(1)
DIGITS = Digits()


class Stripes(ImageSet):
    "Colour images of odd size, with two classes."
    name, levels, classes = "stripes", 9, 2
    def load(self):
        draw = lambda seed: torch.randint(0, 9, (60, 3, 7, 5), dtype=torch.uint8, generator=seeded(seed))
        return {s: (draw(i), torch.arange(60) % 2) for i, s in enumerate(("train", "test"))}


@pytest.mark.parametrize("many", [10_000, 60])   # 60 images are a small set, and a large one
def test_training_depends_on_the_seed_alone(tmp_path, monkeypatch, many):
    monkeypatch.setattr(module, "MANY_IMAGES", many)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = feature_net(Stripes(), steps=20, root=tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2), torch.set_num_threads(2)
    try: again, threads = feature_net(Stripes(), steps=20, root=tmp_path / "b"), torch.get_num_threads()
    finally: torch.set_num_threads(1)
    assert again.digest == first.digest and threads == 2
    assert first.digest != feature_net(Stripes(), 1, 20, tmp_path / "a").digest
    assert moments(first.features(scaled(Stripes().train(), 9)))[1].trace() == pytest.approx(1, rel=1e-5)
    monkeypatch.setattr(module, "_trained", lambda *a: pytest.fail("trained again"))
    assert feature_net(Stripes(), steps=20, root=tmp_path / "a").digest == first.digest
    assert first.head.in_features == (32 if many > 60 else 64)


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
    damages = [b"", content[:100], content[:-40], b"[]".join(content.split(b"{", 1))]
    for before, after in ((b"stripes", b"strpies"), (b"accuracy", b"inaccura"), (b"seed", b"need")):
        damages.append(content.replace(before, after))
    for place in random.Random(0).sample(range(8 * len(content)), 12):   # one bit flipped
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        damages.append(bytes(flipped))
    for damaged in damages:
        path.write_bytes(damaged)
        state = torch.get_rng_state()
        again = feature_net(Stripes(), steps=5)
        assert said(again) == said(net) and torch.equal(torch.get_rng_state(), state)
    assert path.read_bytes() == content


def test_a_file_that_claims_much_is_not_read(tmp_path):
    "A sparse file of 3 GB whose header says so: shapes are compared before anything is read."
    feature_net(Stripes(), steps=5, root=tmp_path)
    path, = (tmp_path / "features").iterdir()
    with safe_open(path, "pt") as file: metadata = file.metadata()
    wide = {"dtype": "F32", "shape": [3 * 2**28], "data_offsets": [0, 3 * 2**30]}
    header = json.dumps({"__metadata__": metadata, "head.bias": wide}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 3 * 2**30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    feature_net(Stripes(), steps=5, root=tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**20 and path.stat().st_size < 2**20


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path, monkeypatch):
    (tmp_path / "features").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept in"): net = feature_net(Stripes(), 0, 5, tmp_path)
    def full(*a): raise OSError("disk full")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.warns(UserWarning, match="disk full"):
        assert feature_net(Stripes(), 0, 5, tmp_path / "b").digest == net.digest
    assert not list((tmp_path / "b/features").iterdir())


def test_no_name_leads_out_of_the_folder(tmp_path):
    class Named(Stripes): name = "../../x"
    with pytest.raises(ValueError, match="dataset.name must be a plain folder name"):
        feature_net(Named(), steps=5, root=tmp_path / "runs")
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("judge", [feature_distance, classifier_view])
@pytest.mark.parametrize("change, said", [
    (lambda x: x.expand(-1, 3, -1, -1), "shape"), (lambda x: x.float() * math.nan, "not finite"),
    (lambda x: x + 17, "17 levels"), (lambda x: x[:1], "too few")])
def test_samples_that_are_none(net, judge, change, said):
    with pytest.raises(ValueError, match=said): judge(change(DIGITS.test()), DIGITS, net)


def test_networks_of_ones_own_and_too_many_samples():
    net = FeatureNet(1, 10)   # never trained here: no accuracy is known
    own = feature_distance(DIGITS.test(), DIGITS, net, repeats=2)
    assert own["accuracy"] is None and len(own["weights"]) == 8
    with pytest.raises(ValueError, match="n must"): feature_distance(DIGITS.test(), DIGITS, net, n=298)
