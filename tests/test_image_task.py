"Attempts to break lfdm.images.task: killed, two processes, memory that runs out, images that went."
import dataclasses
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lfdm.grids import make_images
from lfdm.images import task as image_task
from lfdm.images.data import dequantize, quantize
from lfdm.images.parameters import ImageParameters, image_set
from lfdm.images.task import ImageTask
from lfdm.losses import DiffusionLoss
from lfdm.runs import folder_of, load_run, make_run
from lfdm.tasks import task_of
from lfdm.training import TrainState, train, with_precision
from photos import TINY, write_images
from tiny import SERVER, Stopped, content, part
from tree import ROOT, cells, edit

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return write_images(tmp_path_factory.mktemp("images") / "photos")


@pytest.fixture(scope="module", autouse=True)
def every_epoch_is_saved():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ImageTask, "save_every", 0)
        yield


@pytest.fixture(scope="module")
def whole(photos, every_epoch_is_saved, tmp_path_factory):
    "A run that was never disturbed."
    return make_run(ImageParameters(**TINY, path=photos), root=tmp_path_factory.mktemp("whole"))


def seen(p, root):
    "Make the run; the reports of its progress."
    reports = []
    return make_run(p, root=root, progress=lambda *a: reports.append(a)), reports


# ---- killed and resumed

@pytest.mark.parametrize("options", [{}, dict(ema=None, clip=None, flip=True, target="v"),
                                     dict(network="small(width=4, dropout=0.2)")], ids=str)
def test_stopped_in_an_epoch_and_resumed_is_bit_identical(options, photos, whole, tmp_path):
    "weights lie channels last in memory, and are to do so again, as Adam's moments are"
    p = ImageParameters(**TINY | options, path=photos)
    expected = make_run(p, root=tmp_path / "whole") if options else whole
    for phase, share in (("images", .5), ("images", .9), ("sample", .5)):
        def progress(now, done, total, phase=phase, share=share):
            if now == phase and done >= share * total: raise Stopped
        with pytest.raises(Stopped): make_run(p, root=tmp_path, progress=progress)
        assert "checkpoint.safetensors" in os.listdir(part(p, tmp_path))
        torch.manual_seed(share)   # nothing may follow from torch's own random state
    run, reports = seen(p, tmp_path)
    assert [a for a in reports if a[0] == "images"] == [("images", 150, 150)], "trained again"
    assert content(run.folder) == content(expected.folder)


def in_child(root, path, steps):
    "Make the run, and die at once after so many steps."
    torch.set_num_threads(1)
    ImageTask.save_every = 0
    def progress(*_):
        nonlocal steps
        steps -= 1
        if steps < 0: os.kill(os.getpid(), signal.SIGKILL)
    make_run(ImageParameters(**TINY, path=path), root=root, progress=progress)


def test_killed_in_an_epoch_and_resumed_is_bit_identical(photos, whole, tmp_path):
    child = SERVER.Process(target=in_child, args=(tmp_path, photos, 6), daemon=True)
    child.start(); child.join(60)
    assert child.exitcode == -signal.SIGKILL
    run, reports = seen(whole.parameters, tmp_path)
    assert reports[0] == ("images", 50, 150) and content(run.folder) == content(whole.folder)
    assert os.listdir(tmp_path / "train") == [run.folder.name]


def test_when_memory_runs_out_the_checkpoint_stays(whole, tmp_path, monkeypatch):
    calls, real = [], DiffusionLoss.__call__
    def full(*args, **kw):
        calls.append(1)
        if len(calls) > 6: raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return real(*args, **kw)
    says = "out of memory on 'cpu': .*2.00 GiB. Lower batch_size, choose precision='bf16', .*checkpoint"
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match=says):
        m.setattr(DiffusionLoss, "__call__", full)
        make_run(whole.parameters, root=tmp_path)
    run, reports = seen(whole.parameters, tmp_path)
    assert reports[0] == ("images", 50, 150) and content(run.folder) == content(whole.folder)


def test_a_checkpoint_of_another_network_is_not_lost(whole, tmp_path):
    "the folders differ, so it takes a moved file"
    p, other = whole.parameters, dataclasses.replace(whole.parameters, network="small(width=8)")
    checkpoint = part(p, tmp_path) / "checkpoint.safetensors"
    checkpoint.parent.mkdir(parents=True)
    TrainState(task_of(other).new_network(), ema=p.ema, clip=p.clip, warmup=p.warmup).save(checkpoint)
    before, says = checkpoint.read_bytes(), "cannot be used: it belongs to a network of another shape"
    with pytest.raises(ValueError, match=says): make_run(p, root=tmp_path)
    assert checkpoint.read_bytes() == before and not folder_of(p, root=tmp_path).exists()


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
    loss = whole.task.validation()(whole.net)["loss"]
    assert loss == pytest.approx(whole.metrics[-1]["loss"], rel=1e-6)


def test_validation_sees_no_dropout(photos, tmp_path):
    for ema in (None, .5):
        options = dict(network="small(width=4, dropout=0.5)", ema=ema, epochs=1)
        run = make_run(ImageParameters(**TINY | options, path=photos), root=tmp_path)
        again = [run.task.validation()(run.net)["loss"] for _ in range(2)]
        assert again[0] == again[1] == pytest.approx(run.metrics[-1]["loss"], rel=1e-6)


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
    assert not folder_of(p, root=tmp_path).exists()
    monkeypatch.setattr(torch, "compile", torch._dynamo.disable)
    with pytest.raises(TypeError): bool(with_precision(whole.net, compiled=True))   # has no truth value
    run = make_run(p, root=tmp_path)
    weights = load_file(run.folder / "model.safetensors")
    assert run.metrics == whole.metrics and not any("_orig_mod" in k for k in weights)


def test_the_exact_set_has_its_excess(tmp_path, monkeypatch):
    monkeypatch.setattr(image_task, "judge_images", lambda *a: {})
    options = dict(dataset="templates(n_train=60, n_test=12)", epochs=1)
    run = make_run(ImageParameters(**TINY | options), root=tmp_path)
    assert all(0 < m["excess"] < m["loss"] for m in run.metrics)
    assert 0 < run.summary["nelbo_excess"] < run.summary["nelbo_loss"]


# ---- several processes

def launch(root, path):
    "The command of nbs/guides/gpus.ipynb for two processes on a CPU."
    given = [w for k, v in (TINY | dict(path=path)).items() for w in ("-p", k, str(v))]
    env = os.environ | {"LFDM_RUNS": str(root), "OMP_NUM_THREADS": "1",
                        "ACCELERATE_MIXED_PRECISION": "bf16"}   # what somebody once told `accelerate config`
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               ROOT / "workflow/train_images.py", "--study", "two", *given]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


@pytest.fixture(scope="module")
def launched(photos, tmp_path_factory):
    "What two launches said, side by side: one may write, one not."
    pytest.importorskip("accelerate")
    root = tmp_path_factory.mktemp("two")
    (root / "file").write_text("mine")
    children = [launch(root / where, photos) for where in ("runs", "file")]
    try: said = [c.communicate(timeout=240)[0] for c in children]
    finally:
        for c in children:
            if c.poll() is None: os.killpg(c.pid, signal.SIGKILL)   # with its processes
    return root, [(c.returncode, s) for c, s in zip(children, said)]


def test_two_processes_train_what_one_trains(launched, whole):
    "though the last batch has 5 images"
    root, ((code, said), _) = launched
    assert code == 0 and "Traceback" not in said and "Warning" not in said, said
    assert os.listdir(root / "runs" / "two") == [whole.folder.name]
    run = load_run(root / "runs" / "two" / whole.folder.name)
    assert run.parameters == whole.parameters
    for a, b in zip(run.metrics, whole.metrics, strict=True):
        for k in b: assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6), k
    for a, b in zip(run.net.parameters(), whole.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert run.summary["loss"] == pytest.approx(whole.summary["loss"], rel=1e-4)


def test_a_main_process_that_fails_ends_the_launch(launched):
    root, (_, (code, said)) = launched
    assert code != 0 and "cannot write the run to" in said and said.count("[rank0]: OSError") == 1, said
    assert (root / "file").read_text() == "mine"


def one_of_two(rank=1):
    return SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0,
                           prepare_model=lambda net: net, wait_for_everyone=lambda: None,
                           reduce=lambda total, how: total)


@pytest.mark.parametrize("options, message", [
    (dict(batch_size=1), "the last batch of an epoch has 1 examples for 2 processes"),
    (dict(batch_size=49), "the last batch of an epoch has 1 examples"),
    (dict(schedule="adaptive", weighting="sigmoid"), "train it on one")], ids=str)
def test_what_two_processes_cannot_do_is_refused_by_each(options, message, photos, tmp_path):
    p = ImageParameters(**TINY | options, path=photos)
    for rank in (0, 1):
        with pytest.raises(ValueError, match=message):
            make_run(p, root=tmp_path, accelerator=one_of_two(rank))


def test_each_process_has_a_device_of_its_own(whole):
    p = ImageParameters.from_record(dataclasses.asdict(whole.parameters) | dict(device="cuda:1"))
    with pytest.raises(ValueError, match="choose 'cuda', not 'cuda:1'"):
        next(task_of(p).fit(None, None, None, one_of_two()))


def test_a_late_process_leaves_nothing_behind(whole, tmp_path):
    "killed just before the renaming, made again by two: one renames before the other looks"
    work, folder = part(whole.parameters, tmp_path), folder_of(whole.parameters, root=tmp_path)
    shutil.copytree(whole.folder, work)
    late = one_of_two()
    late.wait_for_everyone = lambda: os.replace(work, folder)
    assert make_run(whole.parameters, root=tmp_path, accelerator=late) is None
    assert os.listdir(folder.parent) == [folder.name]


def test_shares_add_up_to_the_batch(whole):
    "the gradients of both shares have the whole batch's as their mean"
    p, images = whole.parameters, whole.dataset.train()[:15]
    noised = lambda batch, generator: dequantize(batch, 256, generator)
    def gradient(accelerator):
        state = TrainState(whole.task.new_network(), p.lr, p.seed)
        state.descend = lambda value: value.backward()
        for _ in train(state, p.loss(), images, 1, 15, prepare=noised, accelerator=accelerator): pass
        return torch.cat([q.grad.flatten() for q in state.net.parameters()])
    shares = [gradient(one_of_two(rank)) for rank in (0, 1)]
    torch.testing.assert_close((shares[0] + shares[1]) / 2, gradient(None), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*shares)


# ---- records

def of_samples(**arrays): return "samples.npz", lambda f: np.savez(f, **arrays)
def of_record(change): return "params.json", lambda f: edit(f, change)
def of_parameters(**given): return of_record(lambda r: r["parameters"].update(given))


DAMAGE = {
    "samples cut": ("samples.npz", lambda f: f.write_bytes(f.read_bytes()[:99])),
    "samples of numbers": of_samples(samples=np.zeros((10, 3, 8, 8), np.float32)),
    "samples without colours": of_samples(samples=np.zeros((10, 8, 8), np.uint8)),
    "samples of another name": of_samples(x=np.zeros((10, 3, 8, 8), np.uint8)),
    "a narrower model": ("model.safetensors", lambda f: save_file(
        {k: v[..., :1].contiguous() for k, v in load_file(f).items()}, f)),
    "a misspelt kind": of_record(lambda r: r.update(kind="image")),
    "a kind that is no word": of_record(lambda r: r.update(kind=["images"])),
    "no kind": of_record(lambda r: r.pop("kind")),
    "no content": of_parameters(content="8x8"),
    "content that does not fit": of_parameters(content="3x9x9, 256 values, 00000000"),
    "no network": of_parameters(network="smal"),
    "a switch that is a number": of_parameters(flip=0),
    "a parameter gone": of_record(lambda r: r["parameters"].pop("judged"))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage, copied):
    file, change = DAMAGE[damage]
    change(copied / file)
    says = f"^run {re.escape(str(copied))} cannot be read: {file}: [^\n]*Move the folder away[^\n]*$"
    with pytest.raises(ValueError, match=says) as e: load_run(copied)
    assert len(str(e.value)) < 800


def test_a_record_loads_where_nobody_has_heard_of_images(whole):
    code = (f"import sys, lfdm.runs; assert 'lfdm.images.task' not in sys.modules; "
            f"run = lfdm.runs.load_run({str(whole.folder)!r}); "
            "assert run.parameters.kind == 'images' and run.sample(2, steps=1).shape == (2, 3, 8, 8)")
    child = SERVER.Process(target=exec, args=(code, {}), daemon=True)
    child.start(); child.join(60)
    assert child.exitcode == 0


def test_a_record_loads_without_its_images(tmp_path):
    path = write_images(tmp_path / "mine")
    run = make_run(ImageParameters(**TINY | dict(epochs=1), path=path), root=tmp_path / "runs")
    shutil.rmtree(path); image_set.cache_clear()
    again = load_run(run.folder)
    assert again.parameters == run.parameters and torch.equal(again.samples, run.samples)
    assert again.sample(2).shape == (2, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match="there is no folder"): _ = again.dataset
    assert make_run(run.parameters, root=tmp_path / "runs").summary == run.summary


def test_a_run_is_found_wherever_its_images_lie_and_not_for_others(photos, whole, tmp_path):
    moved = ImageParameters(**TINY, path=shutil.copytree(photos, tmp_path / "elsewhere"))
    assert make_run(moved, root=whole.folder.parent.parent).folder == whole.folder
    write_images(tmp_path / "elsewhere", 1, seed=1); image_set.cache_clear()
    with pytest.raises(ValueError, match="the images are not those of the run"):
        make_run(moved, root=tmp_path)


# ---- the notebook

CELLS = [(source, cell["metadata"].get("tags", []))
         for source, cell in cells(ROOT / "nbs" / "train_images.ipynb", "code")]


def begin(**given):
    "The notebook up to the check of its parameters, with what papermill would put in."
    position = next(i for i, (source, _) in enumerate(CELLS) if "parameters_from(" in source)
    assert [i for i, (_, tags) in enumerate(CELLS) if "parameters" in tags] == [0]
    assert not any("make_run(" in source for source, _ in CELLS[:position + 1])
    space = {"__name__": "__main__", "In": [""], "Out": {}}
    exec(CELLS[0][0], space)
    space |= given
    for source, _ in CELLS[1:position + 1]: exec(source, space)
    return space["parameters"]


def test_the_notebook_has_the_defaults():
    assert begin() == ImageParameters()
    exec(CELLS[0][0], shown := {})
    fields = {f.name for f in dataclasses.fields(ImageParameters)}
    assert set(shown) - {"__builtins__", "study"} == fields - {"content"}


@pytest.mark.parametrize("given, message", [
    (dict(epoch=5), "unknown parameter 'epoch'. Did you mean 'epochs'"),
    (dict(netwrok="small"), "Did you mean 'network'"), (dict(bf16=True), "unknown parameter 'bf16'"),
    (dict(flip="yes"), "flip must be True or False"), (dict(epochs=2.5), "epochs must be a whole number"),
    (dict(study="../x"), "study must be a plain folder name")], ids=str)
def test_what_a_careless_user_types(given, message):
    with pytest.raises((ValueError, TypeError), match=message): begin(**given)
