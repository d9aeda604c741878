"Attempts to break lfdm.runs: killed anywhere, two at once, full and read-only disks, damaged records."
import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lfdm import runs
from lfdm.data import DATASETS
from lfdm.parameters import RESULTS_VERSION, Parameters
from lfdm.runs import FILES, folder_of, load_run, make_run
from lfdm.training import TrainState, train
from tiny import SERVER, Stopped, Tiny, content, made, part, register, small, stop_at, tree
from tree import edit

torch.set_num_threads(1)
OPTIONS = dict(ema=.8, clip=.3, warmup=6)   # four steps an epoch: the first checkpoint is within the warm-up


@pytest.fixture(autouse=True)
def tiny(monkeypatch): register(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that was never disturbed."
    return made(tmp_path_factory, lambda root: make_run(small(), root=root))


@pytest.fixture(scope="module")
def optional(tmp_path_factory):
    "One with all options of a training step."
    return made(tmp_path_factory, lambda root: make_run(small(**OPTIONS), root=root))


def seen(root, p=None):
    "Make the run; the reports of its progress."
    reports = []
    run = make_run(p or small(), root=root, progress=lambda *a: reports.append(a))
    return run, reports


# ---- other processes

def in_child(root, kill_at, started, go, queue):
    "Make the run; die at once at the kill_at-th event: a file opened, moved, made, removed; a report."
    torch.set_num_threads(1)
    DATASETS["tiny"] = Tiny
    count = 0
    def event():
        nonlocal count
        if count == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    def hook(name, args):
        files = "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"
        if name in files and str(root) in str(args[0]): event()
    if kill_at is not None: sys.addaudithook(hook)
    def progress(phase, done, total):
        if kill_at is not None: event()
        if started is not None: started.set(); go.wait(30)
    try: queue.put(f"made {make_run(small(), root=root, progress=progress).folder.name}")
    except Exception as e: queue.put(f"{type(e).__name__}: {e}")


def start(root, kill_at=None, started=None, go=None):
    queue = SERVER.SimpleQueue()
    child = SERVER.Process(target=in_child, args=(root, kill_at, started, go, queue), daemon=True)
    child.start()
    child.said = lambda: (child.join(60), queue.get() if child.exitcode == 0 else "killed")[1]
    return child


def test_killed_at_every_step_and_resumed_is_bit_identical(tmp_path, whole):
    "each start goes one event further than the one before; in between, half of what was written is lost"
    folder, work, deaths, resumed = folder_of(small(), root=tmp_path), part(small(), tmp_path), 0, 0
    for kill_at in range(80):
        said = start(tmp_path, kill_at).said()
        if said != "killed": break
        deaths += 1
        if folder.exists(): load_run(folder)   # exists, so it is whole
        written = {f.name: f for f in work.glob("*")}
        resumed += "checkpoint.safetensors" in written
        if "params.json" in written and "checkpoint.safetensors" not in written: continue   # complete
        for name, f in written.items():        # as if the write were still in progress
            if name == "checkpoint.safetensors" or deaths % 2 == 0: continue
            f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
        if deaths in (8, 12) and work.is_dir(): (work / ".tmpXyz123").write_bytes(bytes(100))
    assert said == f"made {folder.name}" and deaths >= 15 and resumed >= 8
    assert content(folder) == content(whole.folder)
    assert set(os.listdir(folder.parent)) <= {folder.name, f".{folder.name}.lock"}   # which nobody holds


def test_two_at_once_and_the_second_takes_over(tmp_path, whole):
    started, go = SERVER.Event(), SERVER.Event()
    first = start(tmp_path, started=started, go=go)
    assert started.wait(30)
    before = tree(tmp_path)
    says = re.escape(f"another process is making this run ({part(small(), tmp_path)}). Wait")
    with pytest.raises(RuntimeError, match=f"^{says}[^\n]*$"): make_run(small(), root=tmp_path)
    assert tree(tmp_path) == before and first.is_alive()
    first.kill(); first.join()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)
    assert os.listdir(tmp_path / "train") == [whole.folder.name]


def test_many_at_once(tmp_path, whole):
    said = [c.said() for c in [start(tmp_path) for _ in range(4)]]
    assert any(s.startswith("made") for s in said)
    assert all(s.startswith("made") or "another process" in s for s in said)
    assert content(whole.folder) == content(folder_of(small(), root=tmp_path))


def test_finished_by_another_between_looking_and_locking(tmp_path, whole, monkeypatch):
    folder, lock = folder_of(small(), root=tmp_path), runs.FileLock
    def late(*args, **kw):
        if not folder.exists(): shutil.copytree(whole.folder, folder)
        return lock(*args, **kw)
    monkeypatch.setattr(runs, "FileLock", late)
    monkeypatch.setattr(runs, "_finish", None)
    assert make_run(small(), root=tmp_path).folder == folder
    assert os.listdir(folder.parent) == [folder.name], "an empty work folder is left behind"


# ---- stopped

@pytest.mark.parametrize("death", [("train", 1), ("train", 2), ("train", 3), ("sample", 3)], ids=str)
def test_stopped_with_all_options_and_resumed_is_bit_identical(death, tmp_path, optional):
    with pytest.raises(Stopped): make_run(small(**OPTIONS), root=tmp_path, progress=stop_at(*death))
    run, reports = seen(tmp_path, small(**OPTIONS))
    assert reports[0] == ("train", death[1], 3)   # sampling begins after three
    assert content(run.folder) == content(optional.folder)


def test_a_kill_in_the_last_moment_keeps_the_training(tmp_path, monkeypatch):
    "between the complete record and its renaming, no work is lost"
    rename = os.replace
    def replace(a, b):
        if Path(b) == folder_of(small(), root=tmp_path): raise Stopped
        return rename(a, b)
    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(os, "replace", replace); make_run(small(), root=tmp_path)
    assert seen(tmp_path)[1] == [], "trained or sampled again"


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "a folder"])
def test_a_damaged_checkpoint_is_named_and_kept(damage, tmp_path, whole):
    with pytest.raises(Stopped): make_run(small(), root=tmp_path, progress=stop_at("train", 2))
    work = part(small(), tmp_path)
    checkpoint = work / "checkpoint.safetensors"
    BYTES[damage](checkpoint)
    before = tree(work)
    with pytest.raises(ValueError, match="checkpoint.*Move it away"): make_run(small(), root=tmp_path)
    assert tree(work) == before and not folder_of(small(), root=tmp_path).exists()
    checkpoint.rmdir() if checkpoint.is_dir() else checkpoint.unlink()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)


def test_a_checkpoint_of_other_options_is_refused(tmp_path):
    "the folders differ, so it takes a moved file"
    p = small(**OPTIONS)
    part(p, tmp_path).mkdir(parents=True)
    TrainState(runs.task_of(small()).new_network()).save(part(p, tmp_path) / "checkpoint.safetensors")
    says = "it was made with ema None, not 0.8; clip None, not 0.3; warmup 0, not 6"
    with pytest.raises(ValueError, match=says): make_run(p, root=tmp_path)


def test_a_file_in_place_of_the_work_folder(tmp_path):
    work = part(small(), tmp_path)
    work.parent.mkdir(); work.write_text("mine")
    with pytest.raises(OSError, match="cannot write the run"): make_run(small(), root=tmp_path)
    assert work.read_text() == "mine"


# ---- finished runs

def test_a_finished_run_is_loaded_not_made(whole, monkeypatch):
    monkeypatch.setattr(runs, "_finish", None)
    before = tree(whole.folder.parent)
    again = make_run(small(), root=whole.folder.parent.parent)
    assert again.parameters == small() == whole.parameters
    assert (again.summary, again.metrics) == (whole.summary, whole.metrics)
    assert torch.equal(again.samples, whole.samples) and tree(whole.folder.parent) == before
    assert [m["epoch"] for m in again.metrics] == [0, 1, 2, 3] and again.samples.shape == (50, 2)


def test_what_is_kept_judged_and_sampled_is_the_average(optional, whole):
    p, task = optional.parameters, optional.task
    loss = task.validation()(optional.net)["loss"]
    assert loss == optional.metrics[-1]["loss"] != whole.metrics[-1]["loss"]
    assert torch.equal(optional.sample(50, seed=0), optional.samples)
    state = TrainState(task.new_network(), p.lr, p.seed, **OPTIONS)
    for _ in train(state, p.loss(), Tiny().train(0), p.epochs, p.batch_size): pass
    nets = optional.net, state.average, state.net
    for net, average, last in zip(*(n.parameters() for n in nets), strict=True):
        assert torch.equal(net, average) and not torch.equal(net, last)


def test_a_run_samples_as_it_was_made(whole):
    assert torch.equal(load_run(whole.folder).sample(50, seed=0), whole.samples)
    assert not torch.equal(whole.sample(50, seed=1), whole.samples)
    for name, values in dict(steps=[0, -1, "true"], sampler=["", "dim"], n=[0]).items():
        for value in values:
            with pytest.raises((ValueError, TypeError), match=name): whole.sample(**{"n": 5, name: value})


def test_every_field_is_in_the_record(whole):
    record = json.loads((whole.folder / "params.json").read_text())
    assert list(record["parameters"]) == [f.name for f in dataclasses.fields(Parameters)]
    assert {k for k, v in record["parameters"].items() if v is None} == {"ema", "clip"}
    assert {"python", "torch", "numpy", "commit", "seconds"} <= set(record["environment"])
    assert "NaN" not in (whole.folder / "metrics.jsonl").read_text()


def test_a_record_from_before_a_parameter_was_added_is_found(copied, monkeypatch):
    edit(copied / "params.json", lambda r: [r["parameters"].pop(k) for k in Parameters.ADDED])
    monkeypatch.setattr(runs, "_finish", None)
    assert make_run(small(), root=copied.parent.parent).parameters == small()


def test_what_a_study_commits_loads(copied):
    "fewer samples, in float16"
    x = load_run(copied).samples
    np.savez(copied / "samples.npz", samples=x[:20].numpy().astype(np.float16))
    torch.testing.assert_close(load_run(copied).samples, x[:20], rtol=1e-3, atol=1e-3)


def test_a_run_of_another_device_loads(copied):
    edit(copied / "params.json", lambda r: r["parameters"].update(device="cuda:7"))
    run = load_run(copied)
    assert run.parameters.device == "cuda:7" and run.sample(3).isfinite().all()


# ---- damaged records

BYTES = {"missing": lambda p: p.unlink(), "empty": lambda p: p.write_bytes(b""),
         "garbage": lambda p: p.write_bytes(bytes(range(256)) * 9),
         "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
         "cut": lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
         "a folder": lambda p: (p.unlink(), p.mkdir()), "merge": lambda p: p.write_text("<<<<<<< HEAD\n{}\n")}


def refused(folder, says=None):
    "Loading and making say so in one line, and touch nothing."
    before = tree(folder.parent)
    for f in (lambda: load_run(folder), lambda: make_run(small(), root=folder.parent.parent)):
        with pytest.raises(ValueError, match=says) as e: f()
        assert str(folder) in str(e.value) and re.search("Move (the folder|it) away", str(e.value))
    assert tree(folder.parent) == before


@pytest.mark.parametrize("damage", BYTES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(file, damage, copied):
    BYTES[damage](copied / file)
    refused(copied, re.escape(file))


def of_record(change): return "params.json", lambda f: edit(f, change)
def of_samples(array): return "samples.npz", lambda f: np.savez(f, samples=array)


LESS = {
    "a lost epoch": ("metrics.jsonl", lambda f: f.write_text("".join(f.read_text().splitlines(True)[:-1]))),
    "metrics are numbers": ("metrics.jsonl", lambda f: f.write_text("1\n2\n3\n4\n")),
    "an empty summary": ("summary.json", lambda f: f.write_text("{}")),
    "a summary that is no dict": ("summary.json", lambda f: f.write_text("null")),
    "a record that is no dict": ("params.json", lambda f: f.write_text("[]")),
    "no environment": of_record(lambda r: r.pop("environment")),
    "no parameters": of_record(lambda r: r.pop("parameters")),
    "no version": of_record(lambda r: r.pop("results_version")),
    "a parameter gone": of_record(lambda r: r["parameters"].pop("target")),
    "a parameter of the wrong type": of_record(lambda r: r["parameters"].update(epochs="3")),
    "epoch": of_record(lambda r: r["parameters"].update(epoch=5)),
    "another width": ("model.safetensors",
                      lambda f: save_file({k: v[:-1] for k, v in load_file(f).items()}, f)),
    "no model": ("model.safetensors", lambda f: save_file({}, f)),
    "samples of another name": ("samples.npz", lambda f: np.savez(f, x=np.zeros((3, 2)))),
    "samples of another shape": of_samples(np.zeros((50, 3))),
    "flat samples": of_samples(np.zeros(50)),
    "pickled samples": of_samples(np.array([{}])),
    "samples without npz": ("samples.npz", lambda f: np.save(f.open("wb"), np.zeros((50, 2))))}


@pytest.mark.parametrize("damage", LESS)
def test_a_record_that_does_not_fit_is_refused(damage, copied):
    file, change = LESS[damage]
    change(copied / file)
    refused(copied, file)


def test_the_record_of_another_run_is_not_taken_for_this_one(copied):
    edit(copied / "params.json", lambda r: r["parameters"].update(target="x"))
    says = f"{re.escape(str(copied))} is damaged: its record is of other parameters.*Move the folder away"
    with pytest.raises(ValueError, match=says): make_run(small(), root=copied.parent.parent)


@pytest.mark.parametrize("version", [0, RESULTS_VERSION - 1, RESULTS_VERSION + 1, str(RESULTS_VERSION), None])
def test_another_results_version_is_named(version, copied):
    edit(copied / "params.json", lambda r: r.update(results_version=version))
    refused(copied, f"results version {version}.*{RESULTS_VERSION}")


def test_no_run_names_the_nearest(copied):
    with pytest.raises(FileNotFoundError, match=f"Did you mean .{copied.name}"): load_run(str(copied)[:-1])
    with pytest.raises(FileNotFoundError, match="no runs"): load_run(copied.parent.parent / "nowhere" / "x")


def test_an_empty_folder_and_a_file_in_its_place(tmp_path):
    folder = folder_of(small(), root=tmp_path)
    folder.mkdir(parents=True); refused(folder, "params.json.*missing")
    folder.rmdir(); folder.write_text("mine"); refused(folder, "not a folder")


# ---- disks

@contextlib.contextmanager
def small_files(limit):
    "No file may grow beyond the limit: writes fail in the middle, as on a full disk."
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("file", [f for f in FILES if f != "model.safetensors"])
def test_a_full_disk_while_the_record_is_written(file, tmp_path, whole):
    link = part(small(), tmp_path) / file
    link.parent.mkdir(parents=True); link.symlink_to("/dev/full")
    says = "cannot write the run.*No space left.*run again to resume"
    with pytest.raises(OSError, match=says): make_run(small(), root=tmp_path)
    assert not folder_of(small(), root=tmp_path).exists()
    if link.is_symlink(): link.unlink()
    run, reports = seen(tmp_path)
    assert reports[0] == ("train", 3, 3), "the training was lost"
    assert content(run.folder) == content(whole.folder)


@pytest.mark.parametrize("after, limit", [(0, 0), (0, 500), (1, 2000), (3, 0), (3, 500)])
def test_a_full_disk_while_weights_are_written(after, limit, tmp_path, whole):
    "at the first checkpoint, at a later one, and at the record"
    with contextlib.ExitStack() as stack:
        def progress(*now):
            if now[:2] == ("train", after): stack.enter_context(small_files(limit))
        with pytest.raises(OSError, match="cannot write the run.*run again to resume"):
            make_run(small(), root=tmp_path, progress=progress)
    assert not folder_of(small(), root=tmp_path).exists()
    run, reports = seen(tmp_path)
    assert reports[0] == ("train", after, 3) and content(run.folder) == content(whole.folder)


def test_a_full_disk_while_the_model_is_written(tmp_path, monkeypatch):
    def full(*args, **kw): raise SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr(runs, "save_file", full)
    with pytest.raises(OSError, match="cannot write the run.*No space left"): make_run(small(), root=tmp_path)


@pytest.mark.parametrize("root", ["/dev/null", "/proc/lfdm", "/dev/full/deep/er"])
def test_a_root_that_cannot_be(root):
    if not Path(root).parent.exists() and not Path("/dev/full").exists(): pytest.skip("no such thing here")
    with pytest.raises(OSError, match=f"cannot write the run to {root}"): make_run(small(), root=root)


@contextlib.contextmanager
def nobody():
    "Someone without rights, whoever runs the tests."
    if os.name != "posix": pytest.skip("posix only")
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)


@pytest.fixture
def open_folder():
    "A folder that everyone can reach."
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for p in (folder, *folder.rglob("*")): p.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o555, 0])
def test_a_folder_without_permission(mode, open_folder):
    (open_folder / "train").mkdir(); (open_folder / "train").chmod(mode)
    says = f"cannot .*{open_folder}.*Permission denied"
    with nobody(), pytest.raises(OSError, match=says): make_run(small(), root=open_folder)


def test_a_finished_run_on_a_read_only_disk_loads(open_folder, whole):
    shutil.copytree(whole.folder, open_folder / "train" / whole.folder.name)
    for p in open_folder.rglob("*"): p.chmod(0o555 if p.is_dir() else 0o444)
    with nobody(): assert make_run(small(), root=open_folder).summary == whole.summary


# ---- what else may be missing or in the way

def test_a_machine_without_git_and_another_random_state(tmp_path, whole, monkeypatch):
    "the global random state is neither read nor changed"
    monkeypatch.setenv("PATH", str(tmp_path))
    torch.manual_seed(12345); np.random.seed(5); random.seed(5)
    state = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before, run = state(), make_run(small(), root=tmp_path)
    assert state() == before
    assert run.environment["commit"] is None and content(run.folder) == content(whole.folder)


def test_the_commit_is_not_that_of_a_strangers_repository(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    git("init"); git("commit", "--allow-empty", "-m", "thesis")
    monkeypatch.chdir(tmp_path)
    assert runs._versions()["commit"] != git("rev-parse", "HEAD")


def test_where_runs_lie(tmp_path, monkeypatch):
    at = lambda root: root / "train" / small().slug()
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path / "elsewhere"))
    assert folder_of(small()) == at(tmp_path / "elsewhere")
    assert folder_of(small(), "study", tmp_path / "given") == tmp_path / "given" / "study" / small().slug()
    monkeypatch.setenv("LFDM_RUNS", "")
    root = Path(runs.__file__).resolve().parent.parent
    monkeypatch.chdir(root / "nbs")
    assert folder_of(small()) == at(root / "runs")
    (tmp_path / "settings.ini").write_bytes("[stil]\nfarbe = grün".encode("latin-1"))   # a stranger's
    (tmp_path / "deep").mkdir(); monkeypatch.chdir(tmp_path / "deep")
    assert folder_of(small()) == at(tmp_path / "deep" / "runs")


@pytest.mark.parametrize("study", ["", "..", ".", "a/b", "../x", 2024, None, Path("x")])
def test_a_study_is_a_plain_folder_name(study, tmp_path):
    with pytest.raises(ValueError, match="study must be a plain folder name"):
        folder_of(small(), study, tmp_path)


def test_the_three_lines_work_where_jupyter_starts(tmp_path, whole, monkeypatch):
    "a relative path is meant from here, or else from the project's root; a folder may be moved"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = lfdm\n"); (tmp_path / "nbs").mkdir()
    shutil.copytree(whole.folder, tmp_path / "runs" / "train" / "my favourite run")
    for begin in (".", "nbs"):
        monkeypatch.chdir(tmp_path / begin)
        assert load_run("runs/train/my favourite run").summary == whole.summary
    with pytest.raises(FileNotFoundError, match="Did you mean .my favourite run"):
        load_run("runs/train/my favourite")


def test_nan_in_training_loses_nothing(tmp_path):
    ill = small(lr=1e6, target="score", weighting="nelbo")
    with pytest.raises(FloatingPointError, match="epoch 1 .*lr 1e.06.*Lower lr"):
        make_run(ill, root=tmp_path)
    assert [p for p in (tmp_path / "train").iterdir() if not p.name.startswith(".")] == []


def test_a_progress_bar_serves_two_runs(capfd):
    bar = runs.progress_bar()
    for _ in range(2):
        for now in (("train", 1, 3), ("train", 3, 3), ("sample", 1, 2), ("sample", 2, 2)): bar(*now)
    err = capfd.readouterr().err
    assert err.count("3/3") == 2 and err.count("2/2") == 2
