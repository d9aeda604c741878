"Attempts to break lfdm.images.task: killed, two processes, memory that runs out, images that went."
import contextlib
import dataclasses
import math
import os
import runpy
import shutil
import signal
import socket
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lfdm.grids import make_images
from lfdm.images import task as image_task
from lfdm.images.data import quantize
from lfdm.images.parameters import ImageParameters
from lfdm.images.task import ImageTask, mirrored
from lfdm.parameters import parameters_from
from lfdm.runs import folder_of, load_run, make_run
from lfdm.tasks import task_of
from photos import TINY, numbered, write
from tiny import SERVER, Stopped, content, part
from tree import ROOT, cells

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return write(tmp_path_factory.mktemp("images") / "photos", numbered())


@pytest.fixture(scope="module", autouse=True)
def every_epoch_is_saved():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ImageTask, "save_every", 0)
        yield


@pytest.fixture(scope="module")
def whole(photos, every_epoch_is_saved, tmp_path_factory):
    "A run that was never disturbed."
    return make_run(ImageParameters(**TINY, path=photos), root=tmp_path_factory.mktemp("whole"))


def resumed(p, root):
    "Make the run; the images it had seen before."
    reports = []
    run = make_run(p, root=root, progress=lambda *a: reports.append(a))
    return run, reports[0][1]


# ---- killed and resumed

def test_stopped_in_an_epoch_and_resumed_is_bit_identical(photos, tmp_path):
    "weights lie channels last in memory, and are to do so again, as Adam's moments are"
    network = "small(width=2, multipliers='1 1', halvings=1, mid=1, dropout=0.2)"
    options = TINY | dict(network=network, ema=None, clip=None, flip=True, target="v")
    p = ImageParameters(**options, path=photos)
    expected = make_run(p, root=tmp_path / "whole")
    for phase, share in (("images", .5), ("images", .9), ("sample", .5)):
        def progress(now, done, total, phase=phase, share=share):
            if now == phase and done >= share * total: raise Stopped
        with pytest.raises(Stopped): make_run(p, root=tmp_path, progress=progress)
        torch.manual_seed(share)   # nothing may follow from torch's own random state
    run, before = resumed(p, tmp_path)
    assert before == 150 and content(run.folder) == content(expected.folder)
    assert run.task.validation()(run.net)["loss"] == pytest.approx(run.metrics[-1]["loss"], rel=1e-6)


def in_child(root, path, steps):
    "Make the run, and die at once after so many steps."
    torch.set_num_threads(1)
    ImageTask.save_every = 0
    def progress(*_):
        nonlocal steps
        steps -= 1
        if steps < 0: os.kill(os.getpid(), signal.SIGKILL)
    make_run(ImageParameters(**TINY, path=path), root=root, progress=progress)


def ended(*children):
    "The exit codes of processes, once they end."
    for c in children: c.start()
    for c in children: c.join(90)
    codes = [c.exitcode for c in children]
    for c in children: c.kill()
    return codes


def child(function, *args): return SERVER.Process(target=function, args=args, daemon=True)


def test_killed_in_an_epoch_and_resumed_is_bit_identical(photos, whole, tmp_path):
    assert ended(child(in_child, tmp_path, photos, 6)) == [-signal.SIGKILL]
    run, before = resumed(whole.parameters, tmp_path)
    assert before == 50 and content(run.folder) == content(whole.folder)
    assert os.listdir(tmp_path / "train") == [run.folder.name]


def test_samples_that_are_not_finite_are_a_divergence(photos, tmp_path, monkeypatch):
    p = ImageParameters(**TINY | dict(epochs=1), path=photos)
    monkeypatch.setattr(image_task, "sample", lambda *a, **kw: torch.full((10, 3, 8, 8), math.nan))
    finished, diverged = make_images([p], root=tmp_path)
    assert not finished and "samples are not finite" in diverged[p]


# ---- what is computed

def test_a_run_samples_as_it_was_made(whole):
    "and is of float32 weights, of which the average is kept"
    assert torch.equal(quantize(load_run(whole.folder).sample(10, seed=0), 256), whole.samples)
    assert whole.samples.dtype == torch.uint8
    assert {v.dtype for v in whole.net.state_dict().values()} == {torch.float32}


def test_bf16_is_trained_in_float32_weights(photos, whole, tmp_path):
    run = make_run(ImageParameters(**TINY | dict(precision="bf16"), path=photos), root=tmp_path)
    assert {v.dtype for v in run.net.state_dict().values()} == {torch.float32}
    assert run.metrics[0] == whole.metrics[0], "measured in float32"
    loss, other = run.metrics[-1]["loss"], whole.metrics[-1]["loss"]
    assert loss != other == pytest.approx(loss, rel=.05)


def test_compiled_is_trained_alike(photos, whole, tmp_path, monkeypatch):
    "in the wrapper of torch.compile, without its minutes; one that is missing is told"
    p = ImageParameters(**TINY | dict(compiled=True), path=photos)
    def missing(*_): raise RuntimeError("No working C++ compiler found")
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="No working C"):
        m.setattr(torch, "compile", lambda net: missing)
        make_run(p, root=tmp_path)
    monkeypatch.setattr(torch, "compile", torch._dynamo.disable)
    run = make_run(p, root=tmp_path)
    weights = load_file(run.folder / "model.safetensors")
    assert run.metrics == whole.metrics and not any("_orig_mod" in k for k in weights)


def test_about_half_are_mirrored_from_left_to_right():
    x = torch.arange(12.).view(1, 1, 3, 4).expand(400, -1, -1, -1)
    seen = mirrored(x, torch.Generator().manual_seed(0))
    turned = (seen == x.flip(3)).flatten(1).all(1)
    assert 150 < turned.sum() < 250 and torch.equal(seen[~turned], x[~turned])


def test_the_exact_set_has_its_excess(tmp_path, monkeypatch):
    monkeypatch.setattr(image_task, "judge_images", lambda *a: {})
    options = dict(dataset="templates(n_train=30, n_test=6)", epochs=1)
    run = make_run(ImageParameters(**TINY | options), root=tmp_path)
    assert all(0 < m["excess"] < m["loss"] for m in run.metrics)
    assert 0 < run.summary["nelbo_excess"] < run.summary["nelbo_loss"]


# ---- several processes

def one_process(rank, port, root, path):
    "What `torchrun` of nbs/guides/gpus.ipynb starts on a CPU, one of two."
    given = [w for k, v in (TINY | dict(path=path)).items() for w in ("-p", k, str(v))]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "LFDM_RUNS": str(root),
                   "ACCELERATE_MIXED_PRECISION": "bf16"}   # what somebody once told `accelerate config`
    sys.argv = ["train_images.py", "--study", "two", *given]
    with open(f"{root} says {rank}", "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        try: runpy.run_path(str(ROOT / "workflow/train_images.py"), run_name="__main__")
        except OSError as e: sys.exit(f"{type(e).__name__}: {e}")


def launched(root, path):
    "The exit codes of two processes that make one run, and what they said."
    pytest.importorskip("accelerate")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    codes = ended(*(child(one_process, rank, port, root, path) for rank in (0, 1)))
    return codes, [open(f"{root} says {rank}").read() for rank in (0, 1)]


def test_two_processes_train_what_one_trains(photos, whole, tmp_path):
    "though the last batch has 5 images"
    codes, said = launched(tmp_path / "runs", photos)
    assert codes == [0, 0] and "Warning" not in "".join(said), said
    assert os.listdir(tmp_path / "runs" / "two") == [whole.folder.name]
    run = load_run(tmp_path / "runs" / "two" / whole.folder.name)
    assert run.parameters == whole.parameters
    for a, b in zip(run.metrics, whole.metrics, strict=True):
        for k in b: assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6), k
    for a, b in zip(run.net.parameters(), whole.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_main_process_that_fails_ends_the_other(photos, tmp_path):
    (tmp_path / "file").write_text("mine")
    codes, said = launched(tmp_path / "file", photos)
    assert codes[0] == 1 and codes[1] not in (0, None), said
    assert (tmp_path / "file").read_text() == "mine"


def test_each_process_has_a_device_of_its_own(whole):
    p = ImageParameters.from_record(dataclasses.asdict(whole.parameters) | dict(device="cuda:1"))
    with pytest.raises(ValueError, match="choose 'cuda', not 'cuda:1'"):
        next(task_of(p).fit(None, None, None, SimpleNamespace(num_processes=2)))


def test_a_late_process_leaves_nothing_behind(whole, tmp_path):
    "killed just before the renaming, made again by two: one renames before the other looks"
    work, folder = part(whole.parameters, tmp_path), folder_of(whole.parameters, root=tmp_path)
    shutil.copytree(whole.folder, work)
    late = SimpleNamespace(is_main_process=False, wait_for_everyone=lambda: os.replace(work, folder))
    assert make_run(whole.parameters, root=tmp_path, accelerator=late) is None
    assert os.listdir(folder.parent) == [folder.name]


# ---- records

def test_a_record_that_gives_digits_a_path_still_has_them():
    p = ImageParameters()
    old = ImageParameters.from_record(dataclasses.asdict(p) | dict(path="/nowhere"))
    assert old.slug() == p.slug() and task_of(old).data.name == "digits"


def test_smallest_sets_that_can_be_judged(tmp_path):
    write(tmp_path, "train/1.png train/2.png test/1.png test/2.png")
    p = ImageParameters(**TINY | dict(batch_size=2), path=tmp_path)
    bound = make_run(p, root=tmp_path / "runs").summary["bits_per_dim"]
    assert all(math.isfinite(v) for v in bound.values())


def test_samples_that_do_not_fit_are_refused(whole):
    for bad in (np.zeros((10, 3, 8, 8), np.float32), np.zeros((10, 8, 8), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 of shape \(n, 3, 8, 8\)"): whole.task.restored(bad)


def test_a_record_loads_where_nobody_has_heard_of_images(whole):
    code = (f"import sys, lfdm.runs; assert 'lfdm.images' not in sys.modules; "
            f"run = lfdm.runs.load_run({str(whole.folder)!r}); "
            "assert run.sample(2, steps=1).shape == (2, 3, 8, 8)")
    assert ended(child(exec, code, {})) == [0]


def test_a_run_is_found_without_its_images_and_not_made_with_others(photos, whole, tmp_path):
    root, there = whole.folder.parent.parent, tmp_path / "there"
    moved = ImageParameters(**TINY, path=shutil.copytree(photos, there))
    assert make_run(moved, root=root).folder == whole.folder
    write(there, "000.png", seed=1)
    with pytest.raises(ValueError, match="images are not those of the run"): make_run(moved, root=tmp_path)
    shutil.rmtree(there)
    assert make_run(moved, root=root).summary == whole.summary
    with pytest.raises(FileNotFoundError, match="there is no folder"): _ = task_of(moved).data


# ---- the notebook

def test_the_notebook_has_the_defaults():
    code, _ = cells(ROOT / "nbs" / "train_images.ipynb", "code")[0]
    exec(code, shown := {})
    shown = {k: v for k, v in shown.items() if k not in ("study", "__builtins__")}
    assert set(shown) == set(ImageParameters.__dataclass_fields__) - {"content"}
    assert parameters_from(shown, ImageParameters) == ImageParameters()
