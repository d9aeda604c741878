"Attempts to break lfdm.runs: killed anywhere, two at once, full and read-only disks, damaged records."
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lfdm import runs
from lfdm.data import DATASETS
from lfdm.parameters import RESULTS_VERSION, Parameters
from lfdm.runs import CHECKPOINT, FILES, beside, folder_of, load_run, make_run, reseal
from lfdm.tasks import PointsTask
from tiny import SERVER, Stopped, Tiny, content, made, part, register, small, stop_at, tree
from tree import ROOT, edit

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch): register(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that was never disturbed."
    return made(tmp_path_factory, make)


def optional():
    "With all options of a training step. Four steps are an epoch: the first ends within the warm-up."
    return small(ema=.8, clip=.3, warmup=6)


def make(root, progress=None): return make_run(optional(), root=root, progress=progress)
def at(root): return folder_of(optional(), root=root)


def again(root, whole, *first):
    "Make the run to its end: it is the whole one, and its first report is that."
    assert not at(root).exists()
    reports = []
    run = make(root, lambda *now: reports.append(now))
    assert reports[:1] == [*first] and content(run.folder) == content(whole.folder)


# ---- other processes

def in_child(root, kill_at, started, go, queue):
    "Make the run; die at once at the kill_at-th event: a file opened, moved, made, removed; a report."
    torch.set_num_threads(1)
    DATASETS["tiny"] = Tiny
    count = 0
    def event(name, args):
        nonlocal count
        if name not in EVENTS or str(root) not in str(args[0]): return
        if count == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    sys.addaudithook(event)
    def progress(*now):
        event("open", [root])
        if started is not None: started.set(); go.wait(30)
    try: queue.put(f"made {make(root, progress).folder.name}")
    except Exception as e: queue.put(f"{type(e).__name__}: {e}")


EVENTS = "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"

def start(root, kill_at=None, started=None, go=None):
    queue = SERVER.SimpleQueue()
    child = SERVER.Process(target=in_child, args=(root, kill_at, started, go, queue), daemon=True)
    child.start()
    child.said = lambda: (child.join(60), queue.get() if child.exitcode == 0 else "killed")[1]
    return child


def test_killed_at_every_step_and_resumed_is_bit_identical(tmp_path, whole):
    "each start goes some events further than the one before; in between, half of what was written is lost"
    folder, work, deaths, resumed = at(tmp_path), part(optional(), tmp_path), 0, 0
    for kill_at in range(0, 300, 6):
        said = start(tmp_path, kill_at).said()
        if said != "killed": break
        deaths += 1
        if folder.exists(): load_run(folder)   # exists, so it is whole
        written = {f.name: f for f in work.glob("*")}
        resumed += CHECKPOINT in written
        if "params.json" in written and CHECKPOINT not in written: continue   # complete
        for name, f in written.items():        # as if the write were still in progress
            if name == CHECKPOINT or deaths % 2 == 0: continue
            f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
    assert said == f"made {folder.name}" and deaths >= 8 and resumed >= 5
    assert content(folder) == content(whole.folder)
    assert set(os.listdir(folder.parent)) <= {folder.name, f".{folder.name}.lock"}   # which nobody holds


def test_two_at_once_and_the_second_takes_over(tmp_path, whole):
    started, go = SERVER.Event(), SERVER.Event()
    first = start(tmp_path, started=started, go=go)
    assert started.wait(30)
    before = tree(tmp_path)
    says = re.escape(f"another process is making this run ({part(optional(), tmp_path)}). Wait")
    with pytest.raises(RuntimeError, match=f"^{says}[^\n]*$"): make(tmp_path)
    assert tree(tmp_path) == before and first.is_alive()
    first.kill(), first.join()
    said = [c.said() for c in [start(tmp_path) for _ in range(2)]]
    assert all(s.startswith("made") or "another process" in s for s in said) and "made" in str(said)
    assert content(whole.folder) == content(at(tmp_path))


def test_finished_by_another_between_looking_and_locking(tmp_path, whole, monkeypatch):
    folder, lock = at(tmp_path), runs.FileLock
    def late(*args, **kw):
        if not folder.exists(): shutil.copytree(whole.folder, folder)
        return lock(*args, **kw)
    monkeypatch.setattr(runs, "FileLock", late)
    make(tmp_path, stop_at("train", 0))
    assert os.listdir(folder.parent) == [folder.name]


def test_a_kill_between_the_complete_record_and_its_renaming_loses_nothing(tmp_path, whole, monkeypatch):
    rename = os.replace
    def replace(a, b):
        if Path(b) == at(tmp_path): raise Stopped
        return rename(a, b)
    with monkeypatch.context() as m, pytest.raises(Stopped):
        m.setattr(os, "replace", replace); make(tmp_path)
    again(tmp_path, whole)


def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, whole):
    with pytest.raises(Stopped): make(tmp_path, stop_at("train", 2))
    checkpoint = part(optional(), tmp_path) / CHECKPOINT
    DAMAGE["cut"](checkpoint)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="checkpoint.*Move it away"): make(tmp_path)
    assert tree(tmp_path) == before
    checkpoint.unlink()
    again(tmp_path, whole, ("train", 0, 3))


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    "of the same network: only its name tells it apart"
    p, other = small(lr=1e-3), small(lr=2e-3)
    with pytest.raises(Stopped): make_run(other, root=tmp_path, progress=stop_at("train", 2))
    os.replace(part(other, tmp_path), part(p, tmp_path))
    says = f"checkpoint .*another run, {other.slug()}.*Move it away"
    with pytest.raises(ValueError, match=says): make_run(p, root=tmp_path)


# ---- finished runs

def test_a_finished_run_is_loaded_not_made(whole):
    before, run = tree(whole.folder.parent), make(whole.folder.parent.parent, stop_at("train", 0))
    assert run.parameters == optional() and alike(run, whole) and tree(whole.folder.parent) == before
    assert [m["epoch"] for m in run.metrics] == [0, 1, 2, 3] and run.samples.shape == (50, 2)
    assert {"python", "torch", "numpy", "commit", "seconds"} <= set(run.environment)


def test_what_is_kept_judged_and_sampled_is_the_average(whole):
    assert whole.task.validation()(whole.net)["loss"] == whole.metrics[-1]["loss"]
    for run in (whole, load_run(whole.folder)): assert torch.equal(run.sample(50, seed=0), run.samples)
    assert not torch.equal(whole.sample(50, seed=1), whole.samples)


def old(folder, change=lambda record: None):
    "As records were before they had digests."
    edit(folder / "params.json", lambda record: (record.pop("sha256"), change(record)))


def test_a_record_of_another_time_or_device_loads_and_says_that_it_has_no_digests(copied):
    old(copied, lambda r: [r["parameters"].pop(k) for k in Parameters.ADDED])
    edit(copied / "params.json", lambda r: r["parameters"].update(device="cuda:7"))
    with pytest.warns(UserWarning, match="carries no digests"): run = load_run(copied)
    assert run.parameters.device == "cuda:7" and run.sample(3).isfinite().all() and not run.verified


def test_what_a_study_commits_loads(copied):
    "fewer samples, in float16: a change on purpose, with the digests renewed"
    x = load_run(copied).samples[:20]
    np.savez(copied / "samples.npz", samples=x.numpy().astype(np.float16))
    assert not load_run(copied, check=False).verified
    reseal(copied)
    run = load_run(copied)
    torch.testing.assert_close(run.samples, x, rtol=1e-3, atol=1e-3)
    assert run.verified


# ---- damaged records

DAMAGE = {"missing": lambda p: p.unlink(),
          "cut": lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
          "a folder": lambda p: (p.unlink(), p.mkdir())}


def refused(folder, says=None):
    "Loading and making say so in one line, and touch nothing."
    before = tree(folder.parent)
    for f in (lambda: load_run(folder), lambda: make(folder.parent.parent)):
        with pytest.raises(ValueError, match=says) as e: f()
        assert str(folder) in str(e.value) and re.search("Move (the folder|it) away", str(e.value))
    assert tree(folder.parent) == before


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(file, copied, whole):
    for damage in DAMAGE.values():
        damage(copied / file)
        refused(copied, re.escape(file))
        if (copied / file).is_dir(): (copied / file).rmdir()
        shutil.copy(whole.folder / file, copied / file)


def of_record(change): return "params.json", lambda f: edit(f, change)
def of_samples(**arrays): return "samples.npz", lambda f: np.savez(f, **arrays)
def of_lines(change): return "metrics.jsonl", lambda f: f.write_text(change(f.read_text()))


LESS = {
    "a lost epoch": of_lines(lambda text: text[:text.rindex("{")]),
    "an empty summary": ("summary.json", lambda f: f.write_text("{}")),
    "no environment": of_record(lambda r: r.pop("environment")),
    "an entry more": of_record(lambda r: r.update(sha257={})),
    "a wrong type": of_record(lambda r: r["parameters"].update(epochs="3")),
    "another version": of_record(lambda r: r.update(results_version=RESULTS_VERSION - 1)),
    "samples of another shape": of_samples(samples=np.zeros((50, 3))),
    "pickled samples": of_samples(samples=np.array([{}]))}


@pytest.mark.parametrize("damage", LESS)
@pytest.mark.filterwarnings("ignore:this run carries no digests")
def test_a_record_that_does_not_fit_is_refused(damage, copied):
    "with digests or, where they are renewed or missing, by what it holds"
    file, change = LESS[damage]
    change(copied / file)
    refused(copied, f"{file}: (it changed|unknown entry)")
    old(copied)
    refused(copied, "results version 1.*2" if "version" in damage else file)


def test_the_record_of_another_run_is_not_taken_for_this_one(copied):
    edit(copied / "params.json", lambda r: r["parameters"].update(target="x"))
    reseal(copied)
    says = f"^run {re.escape(str(copied))} is damaged: .* other parameters: target 'x', not 'eps'. Move"
    with pytest.raises(ValueError, match=says): make(copied.parent.parent)


def alike(run, whole):
    same = all(getattr(run, k) == getattr(whole, k) for k in ("parameters", "metrics", "summary"))
    weights = (net.state_dict().values() for net in (run.net, whole.net))
    return same and torch.equal(run.samples, whole.samples) and all(map(torch.equal, *weights))


def test_a_flipped_bit_is_noticed_or_harmless(copied, whole):
    rng, noticed = random.Random(0), 0
    for file in FILES * 12:
        before = (copied / file).read_bytes()
        flipped, place = bytearray(before), rng.randrange(len(before))
        flipped[place] ^= 1 << rng.randrange(8)
        (copied / file).write_bytes(flipped)
        try: assert alike(load_run(copied), whole), (file, place)
        except ValueError: noticed += 1
        (copied / file).write_bytes(before)
    assert noticed >= 50 and alike(load_run(copied), whole)


@pytest.mark.filterwarnings("ignore:this run carries no digests")
def test_sizes_are_compared_before_anything_is_allocated(copied):
    "40 GB of weights and 2 GB of samples in a record of 2 kB"
    before = (copied / "params.json").read_bytes()
    old(copied, lambda r: r["parameters"].update(width=100_000))
    with pytest.raises(ValueError, match="it belongs to another network"): load_run(copied)
    (copied / "params.json").write_bytes(before)
    with zipfile.ZipFile(copied / "samples.npz", "w") as archive, archive.open("samples.npy", "w") as file:
        header = dict(descr="<f8", fortran_order=False, shape=(150_000_000, 2))
        np.lib.format.write_array_header_1_0(file, header)
    old(copied)
    says = r"samples.npz: samples of float64 and shape \(150000000, 2\)"
    with pytest.raises(ValueError, match=says): load_run(copied)


def test_what_is_no_folder_and_what_is_near(tmp_path, copied):
    with pytest.raises(FileNotFoundError, match=f"Did you mean .{copied.name}"): load_run(str(copied)[:-1])
    with pytest.raises(FileNotFoundError, match="no runs"): load_run(copied.parent.parent / "nowhere" / "x")
    shutil.rmtree(copied); copied.mkdir(); refused(copied, "params.json.*missing")
    copied.rmdir(); copied.write_text("mine"); refused(copied, "not a folder")


# ---- disks

@contextlib.contextmanager
def small_files(limit):
    "No file may grow beyond the limit: writes fail in the middle, as on a full disk."
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("phase, done, limit", [("train", 0, 500), ("train", 3, 0), ("sample", 5, 500),
                                                ("sample", 5, 1400)])
def test_a_full_disk(phase, done, limit, tmp_path, whole):
    "at the first checkpoint, at the last one, and in the record"
    with contextlib.ExitStack() as stack:
        def progress(*now):
            if now[:2] == (phase, done): stack.enter_context(small_files(limit))
        with pytest.raises(OSError, match="cannot write the run.*run again to resume"):
            make(tmp_path, progress)
    again(tmp_path, whole, ("train", done if phase == "train" else 3, 3))


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


def test_what_may_not_be_written(open_folder, whole):
    "a finished run on a read-only disk loads"
    (open_folder / "train").mkdir()
    for mode in (0o555, 0):
        (open_folder / "train").chmod(mode)
        says = f"^cannot write the run to {open_folder}.*resume"
        with nobody(), pytest.raises(OSError, match=says): make(open_folder)
    (open_folder / "train").chmod(0o755)
    shutil.copytree(whole.folder, open_folder / "train" / whole.folder.name)
    for p in open_folder.rglob("*"): p.chmod(0o555 if p.is_dir() else 0o444)
    with nobody(): assert make(open_folder).summary == whole.summary


def test_what_may_not_be_read(open_folder, whole):
    shutil.copytree(whole.folder, folder := open_folder / "train" / whole.folder.name)
    (folder / "params.json").chmod(0)
    says = f"^run {folder} may not be read: Permission denied.$"
    with nobody(), pytest.raises(PermissionError, match=says): make(open_folder)


def test_all_is_on_the_disk_before_it_is_published(tmp_path, monkeypatch):
    "a file before it gets its name, the folder before the checkpoint goes, all before the run gets its name"
    done, where, folder, work = {}, "/proc/self/fd/{}".format, at(tmp_path), part(optional(), tmp_path)
    work.mkdir(parents=True)
    (left := work / ".tmpXyz123").touch()   # by a killed process
    def noted(name, path_of, count=itertools.count()):  # noqa: B008
        real = getattr(os, name)
        def call(first, *rest):
            done[name, path_of(first)] = next(count)
            return real(first, *rest)
        monkeypatch.setattr(os, name, call)
    for name in ("replace", "unlink"): noted(name, str)
    noted("fsync", lambda fd: os.readlink(where(fd)))
    make(tmp_path)
    for name in FILES:
        draft = str(work / f".{name}.{os.getpid()}")
        assert done["fsync", draft] < done["replace", draft] < done["fsync", str(work)]
    last = done["unlink", str(work / CHECKPOINT)]
    assert max(done["fsync", str(work)], done["unlink", str(left)]) < last < done["replace", str(work)]
    assert done["replace", str(work)] < done["fsync", str(folder.parent)]


# ---- what else may be missing or in the way

def test_nothing_is_written_through_a_link_and_nothing_removed_but_what_the_run_made(tmp_path):
    mine, work, folder = tmp_path / "mine", part(optional(), tmp_path), at(tmp_path)
    for path in (folder.parent, mine): path.mkdir()
    for name in ("notes.txt", CHECKPOINT): (mine / name).write_text("mine")
    for link in (work, folder, beside(folder, "lock")):
        for to in (mine, mine / "notes.txt", tmp_path / "nowhere"):
            if link == folder and to.exists(): continue   # a run may be stored elsewhere
            link.symlink_to(to)
            with pytest.raises(ValueError, match=f"{link} is a symbolic link: remove it"): make(tmp_path)
            link.unlink(); beside(folder, "lock").unlink(missing_ok=True)
    work.mkdir()
    (work / "notes.txt").write_text("mine"); (work / ".samples.npz.123").write_text("a draft")
    for name in FILES: (work / name).symlink_to(mine / "notes.txt")
    run = make(tmp_path)
    assert set(os.listdir(run.folder)) == {*FILES, "notes.txt"} and run.verified
    assert tree(mine) == {"notes.txt": b"mine", CHECKPOINT: b"mine"}


def test_a_machine_without_git_and_another_random_state(tmp_path, whole, monkeypatch):
    "the global random state is neither read nor changed"
    monkeypatch.setenv("PATH", str(tmp_path))
    torch.manual_seed(12345); np.random.seed(5); random.seed(5)
    def state():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    before, run = state(), make(tmp_path)
    assert state() == before
    assert run.environment["commit"] is None and content(run.folder) == content(whole.folder)


def test_the_commit_is_not_that_of_a_strangers_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", tmp_path], check=True, capture_output=True)
    (tmp_path / ".git" / "HEAD").write_text("0" * 40)
    monkeypatch.chdir(tmp_path)
    assert runs._versions()["commit"] != "0" * 40


def test_where_a_run_lies(tmp_path, whole, monkeypatch):
    "a relative path is meant from here, or else from the project's root; a folder may be moved"
    with pytest.raises(ValueError, match="study must be a plain folder name"): folder_of(small(), "a/b")
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path / "set"))
    assert folder_of(small(), "s").parent == tmp_path / "set" / "s"
    monkeypatch.setenv("LFDM_RUNS", "")
    monkeypatch.chdir(ROOT / "nbs")
    assert folder_of(small()).parent == ROOT / "runs" / "train"
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = lfdm\n"); (tmp_path / "nbs").mkdir()
    shutil.copytree(whole.folder, tmp_path / "runs" / "train" / "my favourite run")
    for begin in (".", "nbs"):
        monkeypatch.chdir(tmp_path / begin)
        assert load_run("runs/train/my favourite run").summary == whole.summary


@pytest.mark.parametrize("fault, says", [
    (RuntimeError("[alloc.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nframe #0"),
     "^out of memory on 'cpu': .*9 bytes.. Lower batch_size.*checkpoint"),
    (FileNotFoundError("there is no folder of images"), "^there is no folder of images$")], ids=str)
def test_what_is_said_of_a_fault_in_training(fault, says, tmp_path, monkeypatch):
    def fit(*_): raise fault
    monkeypatch.setattr(PointsTask, "fit", fit)
    with pytest.raises(type(fault), match=says): make(tmp_path)


def test_nan_in_training_leaves_no_run(tmp_path):
    ill = small(lr=1e6, target="score", weighting="nelbo")
    with pytest.raises(FloatingPointError, match="epoch 1 .*lr 1e.06.*Lower lr"): make_run(ill, root=tmp_path)
    assert not list((tmp_path / "train").glob("[!.]*"))
