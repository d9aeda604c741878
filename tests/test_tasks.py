"Attempts to break lfdm.tasks: both kinds of runs keep one contract."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lfdm import tasks
from lfdm.data import DATASETS
from lfdm.images.parameters import ImageParameters
from lfdm.parameters import Parameters
from lfdm.tasks import RUN_KINDS, kind_of, task_of
from tiny import register, small

FEW = {Parameters: dict(width=8), ImageParameters: dict(network="small(width=4)", judged=4)}
KINDS = pytest.mark.parametrize("kind", FEW, ids=lambda kind: kind.kind)


def test_each_kind_has_its_parameters():
    assert [kind_of(name) for name in RUN_KINDS] == [*FEW] and [kind.kind for kind in FEW] == [*RUN_KINDS]
    for name, hint in ("image", "Did you mean 'images'"), ("point", "Did you mean 'points'"), ("", "Valid: "):
        with pytest.raises(ValueError, match=f"unknown kind of run {name!r}.*{hint}"): kind_of(name)


@KINDS
def test_a_network_depends_on_its_seed_alone(kind):
    def numbers(seed, state):
        torch.manual_seed(state)
        before, net = torch.get_rng_state(), task_of(kind(**FEW[kind], seed=seed)).new_network()
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([w.flatten() for w in net.parameters()])
    assert torch.equal(numbers(0, 1), numbers(0, 2)) and not torch.equal(numbers(0, 1), numbers(1, 1))


@KINDS
def test_samples_come_back_as_they_were_kept(kind):
    task = task_of(kind(**FEW[kind]))
    dtype = torch.uint8 if kind is ImageParameters else torch.float32
    samples = torch.arange(3 * np.prod(task.shape)).reshape(3, *task.shape).to(dtype)
    assert torch.equal(task.restored(task.stored(samples)), samples)
    for bad in (samples[..., :1], samples.flatten(), samples[None]):
        with pytest.raises(ValueError, match="samples"): task.restored(task.stored(bad))


def test_the_excess_is_told_beside_the_floor(monkeypatch):
    register(monkeypatch)
    task = task_of(small())
    found = task.judge(task.new_network(), task.data.test(0), None)
    assert found["excess_ratio"] == found["excess"] / found["floor"] > 0


def test_the_exact_answer_on_the_same_points_is_asked_for_once(monkeypatch):
    "whatever the target; other points, or the same at other levels, are other ones"
    asked, denoise = [], DATASETS["cluster"].denoise
    def counted(self, z, alpha, sigma):
        asked.append(len(z))
        return denoise(self, z, alpha, sigma)
    monkeypatch.setattr(DATASETS["cluster"], "denoise", counted)
    def excess(**kw):
        task = task_of(small(dataset="cluster", **kw))
        return task.validation()(lambda z, u: 0 * z)["excess"]
    tasks._exact.cache_clear()
    found = [excess(target=target) for target in ("x", "eps", "x")]
    assert len(asked) == 1 and found[0] == found[2]
    different = dict(seed=7), dict(schedule="linear"), dict(logsnr_max=5.)
    for i, kw in enumerate(different): excess(target="x", **kw); assert len(asked) == 2 + i
    tasks._exact.cache_clear()
    assert excess(target="x") == found[0]


def test_answers_on_another_device_are_others():
    "even where all numbers are the same"
    class Elsewhere(torch.Tensor):
        device = torch.device("cuda")
    answers = iter(["here", "there"])
    exact = tasks._Exact(SimpleNamespace(denoise=lambda *given: next(answers)))
    z, one = torch.ones(3, 2), torch.ones(3, 1)
    assert [exact(x, one, one) for x in (z, z.as_subclass(Elsewhere), z)] == ["here", "there", "here"]
