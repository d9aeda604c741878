"Attempts to break lfdm.cache: another input read as this one, folders that cannot be, many at once."
import os

import numpy as np
import pytest
import torch

from lfdm import data, evaluation
from lfdm.cache import key_of, remembered
from lfdm.core import typed
from lfdm.data import Cluster, GaussianMixture, Ring


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LFDM_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def files(folder): return sorted(folder.rglob("*.npz"))


def test_every_bit_of_what_numbers_depend_on_is_in_their_name():
    a = torch.linspace(0, 1, 6).double()
    def f(x): return x + 1
    def g(x): return x + 2
    parts = [(), ("ab",), ("a", "b"), (1,), (1.0,), ("1",), (None,), (a,), (a.float(),), (a.reshape(2, 3),),
             (torch.nextafter(a, a + 1),), (f,), (g,), (typed(f),), (f, a), (a, f)]
    keys = [key_of(*p) for p in parts]
    assert len(set(keys)) == len(parts) - 1 and keys[11] == keys[13]   # a door is not what is computed
    assert key_of(a.numpy(), f) == key_of(a, f)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try: assert key_of(a) != key_of(a.float())
    finally: torch.set_num_threads(threads)


def test_what_is_kept_is_what_is_made(folder):
    "bit for bit; of a set that differs in one bit it is another file, and of one with code of its own none"
    class Other(Cluster):
        half = .5
        def eps_error(self, alpha, sigma, fine=4.): return super().eps_error(alpha, sigma, fine) * self.half
    logsnr = torch.linspace(-10, 10, 99).double()
    sets = [lambda: Cluster(), lambda: Cluster(std=float(np.nextafter(.2, 1))), Other]
    made = [s().eps_floor(logsnr) for s in sets]
    assert len(files(folder)) == 2 and torch.allclose(made[2], made[0] / 2)
    assert all(s().eps_floor(logsnr).equal(floor) for s, floor in zip(sets, made))
    assert len(files(folder)) == 2


def test_a_judgement_is_the_same_made_and_kept(folder):
    ring = Ring(k=8)
    x = ring.sample(200, 7)
    made, here = evaluation.judge(x, ring, repeats=3), len(files(folder))
    evaluation._noise_floor.cache_clear()
    assert evaluation.judge(x, Ring(k=8), repeats=3) == made and len(files(folder)) == here == 3
    evaluation.judge(x[:-1], ring, repeats=3), evaluation.judge(x, ring, repeats=4)
    assert len(files(folder)) == 9


def test_nothing_is_kept_of_a_set_that_is_not_known(folder):
    class Own(data.Dataset):
        dim = 2
        def draw(self, n, generator): return torch.randn(n, 2, generator=generator)
    evaluation.judge(Own().sample(50), Own(), repeats=2)
    assert not files(folder)


@pytest.mark.parametrize("place", ["a file", "read-only", "no source"])
def test_what_cannot_be_kept_is_made_each_time(folder, monkeypatch, place):
    "without a word, for nothing is lost"
    if place == "a file": folder.write_text("mine")
    def refused(*a, **kw): raise OSError("Read-only file system")
    if place == "read-only": monkeypatch.setattr(os, "replace", refused)
    parts = (eval("lambda: 1"),) if place == "no source" else (1,)
    calls = []
    def make(): return calls.append(1) or {"a": np.arange(3)}
    for _ in range(2): assert remembered("x", make, parts)["a"].tolist() == [0, 1, 2]
    assert len(calls) == 2 and not files(folder)


def test_a_damaged_file_is_made_again(folder):
    mixture = GaussianMixture([[0., 0.], [1., 2.]], .5)
    floor = mixture.eps_floor(0.)
    file, = files(folder)
    whole = file.read_bytes()
    for damaged in (b"", whole[:-9], whole[:200] + bytes([whole[200] ^ 4]) + whole[201:]):
        file.write_bytes(damaged)
        assert GaussianMixture([[0., 0.], [1., 2.]], .5).eps_floor(0.) == floor
        assert file.read_bytes() == whole
