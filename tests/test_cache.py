"Attempts to break lfdm.cache: another input read as this one, folders that cannot be, many at once."
import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lfdm import data, evaluation
from lfdm.cache import cached_arrays, key_of, npz_bytes, remembered
from lfdm.core import typed
from lfdm.data import Cluster, Ring
from tiny import same


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


ARRAYS = {"a": np.arange(600.).reshape(2, 300), "b": np.array(3, dtype=np.int16), "c": np.array(["x", "yy"]),
          "d": np.zeros((0, 2), np.float16)}


def counted():
    "make(), and the list that grows with each call"
    calls = []
    return lambda: calls.append(1) or ARRAYS, calls


def saved(save, array):
    with io.BytesIO() as f: save(f, array); return f.getvalue()


@pytest.mark.parametrize("damage", [
    lambda b: b, lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b[:60] + bytes([b[60] ^ 1]) + b[61:],
    lambda b: saved(np.save, np.arange(3)), lambda b: saved(np.savez, np.array([{}]))], ids=range(6))
def test_a_file_comes_back_as_it_was_or_is_made_again(tmp_path, damage):
    "cut anywhere, one bit of the data turned, another kind of file, one that would have to be unpickled"
    make, calls = counted()
    path = tmp_path / "deep" / "er" / "a.npz"
    assert same(cached_arrays(path, make), ARRAYS) and path.read_bytes() == npz_bytes(ARRAYS)
    path.write_bytes(damaged := damage(npz_bytes(ARRAYS)))
    assert all(same(cached_arrays(p, make), ARRAYS) for p in (path, str(path)))
    assert len(calls) == 1 + (damaged != npz_bytes(ARRAYS)) and path.read_bytes() == npz_bytes(ARRAYS)
    assert list(path.parent.iterdir()) == [path]


def refused(*a, **kw): raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize("where", [(os, "replace"), (Path, "mkdir")])
def test_a_full_or_read_only_disk_is_told_and_loses_nothing(tmp_path, monkeypatch, where):
    path = tmp_path / "a.npz"
    path.write_bytes(b"damaged")
    monkeypatch.setattr(*where, refused)
    with pytest.warns(UserWarning, match="not kept, for .*a.npz: .*Read-only"):
        assert same(cached_arrays(path, lambda: ARRAYS), ARRAYS)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [b"damaged"], "a draft was left"


@pytest.mark.parametrize("place", ["a file", "read-only", "no source"])
def test_what_cannot_be_kept_for_a_user_is_made_each_time(folder, monkeypatch, place):
    "without a word, for nothing is lost"
    if place == "a file": folder.write_text("mine")
    if place == "read-only": monkeypatch.setattr(os, "replace", refused)
    make, calls = counted()
    parts = (eval("lambda: 1"),) if place == "no source" else (1,)
    for _ in range(2): assert same(remembered("x", make, parts), ARRAYS)
    assert len(calls) == 2 and not files(folder)
