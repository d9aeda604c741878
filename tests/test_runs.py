"Attempts to break lfdm.runs: killed anywhere, two at once, full and read-only disks, damaged records, careless parameters."
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import lfdm.runs as runs
from lfdm.data import DATASETS, GaussianMixture
from lfdm.parameters import RESULTS_VERSION, Parameters, parameters_from
from lfdm.runs import FILES, folder_of, load_run, make_run
from tree import edit

torch.set_num_threads(1)


class Tiny(GaussianMixture):
    "Small enough for a run in half a second; the last batch has one example."
    n_train = n_test = 301
    def __init__(self): super().__init__([[0., 0.], [2., 1.]], [.5, .8])

SMALL = dict(dataset='tiny', epochs=3, batch_size=100, width=6, n_samples=50, sample_steps=5)


@pytest.fixture(autouse=True)
def tiny(monkeypatch): monkeypatch.setitem(DATASETS, 'tiny', Tiny)


def small(**kw): return Parameters(**SMALL | kw)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A run that was never disturbed."
    with pytest.MonkeyPatch.context() as m:
        m.setitem(DATASETS, 'tiny', Tiny)
        return make_run(small(), root=tmp_path_factory.mktemp('whole'))


def content(folder):
    "What must not depend on what happened on the way."
    folder = Path(folder)
    assert set(os.listdir(folder)) == set(FILES), 'the finished folder holds the record and nothing else'
    record = json.loads((folder / 'params.json').read_text())
    with np.load(folder / 'samples.npz') as f: samples = f['samples'].tobytes()
    return ((folder / 'model.safetensors').read_bytes(), samples, (folder / 'metrics.jsonl').read_text(), (folder / 'summary.json').read_text(),
            record['parameters'], record['results_version'])


def tree(folder):
    "Every file below a folder with its bytes."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob('*'))}


def part(root): folder = folder_of(small(), root=root); return folder.with_name(f'.{folder.name}.partial')


# ---- other processes: forked from a clean server that has imported the library, so a start takes no time

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['lfdm.runs', 'pytest', 'scipy.integrate', 'scipy.interpolate', 'torch._dynamo'])   # all that a run imports


def in_child(root, kill_at, started, go, queue):
    "Make the run; at the kill_at-th event (a file opened, moved, made or removed; a step of progress) die at once."
    torch.set_num_threads(1)
    DATASETS['tiny'] = Tiny
    count = 0
    def event():
        nonlocal count
        if count == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    def hook(name, args):
        if name in ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir') and str(root) in str(args[0]): event()
    if kill_at is not None: sys.addaudithook(hook)
    def progress(phase, done, total):
        if kill_at is not None: event()
        if started is not None: started.set(); go.wait(30)
    try: queue.put(f'made {make_run(small(), root=root, progress=progress).folder.name}')
    except Exception as e: queue.put(f'{type(e).__name__}: {e}')


def start(root, kill_at=None, started=None, go=None):
    queue = SERVER.SimpleQueue()
    child = SERVER.Process(target=in_child, args=(root, kill_at, started, go, queue), daemon=True)
    child.start()
    child.said = lambda: (child.join(60), queue.get() if child.exitcode == 0 else 'killed')[1]
    return child


def test_killed_at_every_step_and_resumed_is_bit_identical(tmp_path, whole):
    "each start goes one event further than the one before; in between, half of what was written is lost"
    folder, deaths, resumed = folder_of(small(), root=tmp_path), 0, 0
    for kill_at in range(80):
        said = start(tmp_path, kill_at).said()
        if said != 'killed': break
        deaths += 1
        if folder.exists(): load_run(folder)   # exists, so it is whole
        written = {f.name: f for f in part(tmp_path).glob('*')} if part(tmp_path).is_dir() else {}
        if 'params.json' in written and 'checkpoint.safetensors' not in written: continue   # the record is complete
        for name, f in written.items():        # as if the write were still in progress
            if name == 'checkpoint.safetensors': resumed += 1
            elif deaths % 2: f.write_bytes(f.read_bytes()[:f.stat().st_size // 2])
        if deaths in (8, 12) and part(tmp_path).is_dir(): (part(tmp_path) / '.tmpXyz123').write_bytes(bytes(100))   # safetensors killed in a write
    assert said == f'made {folder.name}' and deaths >= 15 and resumed >= 8
    assert content(folder) == content(whole.folder)
    assert set(os.listdir(folder.parent)) <= {folder.name, f'.{folder.name}.lock'}   # killed after the renaming, the lock's file stays: nobody holds it


def test_killed_at_random_moments_is_bit_identical(tmp_path, whole):
    rng = random.Random(0)
    for _ in range(6):
        child = start(tmp_path)
        child.join(rng.uniform(.02, .35))
        if child.exitcode is not None: break
        child.kill(); child.join()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)


def test_a_kill_in_the_last_moment_keeps_the_training(tmp_path, monkeypatch):
    "between the complete record and its renaming, no work is lost"
    class Killed(BaseException): pass
    def replace(a, b):
        if Path(b) == folder_of(small(), root=tmp_path): raise Killed
        return os_replace(a, b)
    os_replace = os.replace
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(os, 'replace', replace); make_run(small(), root=tmp_path)
    epochs = []
    make_run(small(), root=tmp_path, progress=lambda phase, done, total: epochs.append(done) if phase == 'train' else None)
    assert not epochs or epochs[0] == 3, 'trained again from nothing'


def test_two_at_once_and_the_second_takes_over(tmp_path, whole):
    started, go = SERVER.Event(), SERVER.Event()
    first = start(tmp_path, started=started, go=go)
    assert started.wait(30)
    before = tree(tmp_path)
    with pytest.raises(RuntimeError, match='another process is making this run') as e: make_run(small(), root=tmp_path)
    assert str(part(tmp_path)) in str(e.value) and '\n' not in str(e.value)
    assert tree(tmp_path) == before and first.is_alive()
    first.kill(); first.join()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)
    assert os.listdir(tmp_path / 'train') == [whole.folder.name]


def test_the_first_is_not_disturbed_by_a_second(tmp_path, whole):
    started, go = SERVER.Event(), SERVER.Event()
    first = start(tmp_path, started=started, go=go)
    assert started.wait(30)
    for _ in range(3):
        with pytest.raises(RuntimeError): make_run(small(), root=tmp_path)
    go.set()
    assert first.said() == f'made {whole.folder.name}'
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)


def test_many_at_once(tmp_path, whole):
    said = [c.said() for c in [start(tmp_path) for _ in range(4)]]
    assert any(s.startswith('made') for s in said)
    assert all(s.startswith('made') or 'another process' in s for s in said)
    assert content(whole.folder) == content(folder_of(small(), root=tmp_path))


def test_finished_by_another_between_looking_and_locking(tmp_path, whole, monkeypatch):
    folder, lock = folder_of(small(), root=tmp_path), runs.FileLock
    def late(*args, **kw):
        if not folder.exists(): shutil.copytree(whole.folder, folder)
        return lock(*args, **kw)
    monkeypatch.setattr(runs, 'FileLock', late)
    monkeypatch.setattr(runs, '_train_into', None)
    assert make_run(small(), root=tmp_path).folder == folder
    assert os.listdir(folder.parent) == [folder.name], 'an empty work folder is left behind'


# ---- finished runs

def test_a_finished_run_is_loaded_not_made(whole, monkeypatch):
    monkeypatch.setattr(runs, '_train_into', None)
    before = tree(whole.folder.parent)
    again = make_run(small(), root=whole.folder.parent.parent)
    assert again.parameters == small() == whole.parameters and again.summary == whole.summary and again.metrics == whole.metrics
    assert torch.equal(again.samples, whole.samples) and tree(whole.folder.parent) == before
    assert [m['epoch'] for m in again.metrics] == [0, 1, 2, 3] and again.samples.shape == (50, 2)


def test_a_run_samples_as_it_was_made(whole):
    assert torch.equal(load_run(whole.folder).sample(50, seed=0), whole.samples)
    assert not torch.equal(whole.sample(50, seed=1), whole.samples)


@pytest.mark.parametrize('choice', [{'steps': 0}, {'steps': -1}, {'sampler': ''}, {'sampler': 'dim'}, {'n': 0}, {'steps': 'true'}])
def test_a_run_refuses_bad_sampling(whole, choice):
    with pytest.raises((ValueError, TypeError), match='steps|sampler|n must'): whole.sample(**{'n': 5} | choice)


def test_every_field_is_in_the_record(whole):
    record = json.loads((whole.folder / 'params.json').read_text())
    assert set(record['parameters']) == {f.name for f in dataclasses.fields(Parameters)}
    assert all(v is not None or k in ('ema', 'clip') for k, v in record['parameters'].items()) and {'python', 'torch', 'numpy', 'commit', 'seconds'} <= set(record['environment'])
    for line in (whole.folder / 'metrics.jsonl').read_text().splitlines(): assert 'NaN' not in line and json.loads(line)


@pytest.mark.parametrize('name, other', dict(target='v', weighting='nelbo', schedule='linear', logsnr_min=-9, logsnr_max=9, epochs=4, batch_size=99, width=7,
                                             lr=2e-3, seed=1, sampler='ddim', sample_steps=6, n_samples=51, dataset='ring', ema=.99, clip=1, warmup=10).items())
def test_every_parameter_has_its_own_folder(name, other, monkeypatch):
    here = folder_of(small())
    assert folder_of(small(**{name: other})) != here and folder_of(small()) == here
    monkeypatch.setattr(runs, 'RESULTS_VERSION', RESULTS_VERSION + 1)
    assert folder_of(small()) != here


@pytest.mark.parametrize('one, other', [({'epochs': 3}, {'epochs': 3.}), ({'lr': 1}, {'lr': 1.}), ({}, {'logsnr_min': -12.9}), ({'logsnr_min': 0}, {'logsnr_min': -0.}),
                                        ({'seed': 0}, {'seed': -0.}), ({'batch_size': 100}, {'batch_size': 1e2}), ({'logsnr_max': None}, {'logsnr_max': 12.9})])
def test_equal_parameters_have_one_folder(one, other): assert small(**one) == small(**other) and folder_of(small(**one)) == folder_of(small(**other))


# ---- parameters added later

def test_what_was_run_before_a_parameter_was_added_keeps_its_name():
    "names as they were before ema, clip and warmup"
    if RESULTS_VERSION != 2: pytest.skip('the names of results version 2')
    assert Parameters().slug() == 'ring-eps-weighted-cosine-s0-e02f69e6'
    assert Parameters(target='v', seed=3, lr=.01, schedule='linear', ema=None, warmup=0.).slug() == 'ring-v-weighted-linear-s3-9796387b'
    names = {small(**o).slug() for o in ({}, dict(ema=.9), dict(ema=.99), dict(clip=1), dict(clip=2), dict(warmup=1), dict(warmup=1, ema=.9))}
    assert len(names) == 7


def test_a_record_from_before_a_parameter_was_added_is_found(tmp_path, whole, monkeypatch):
    folder = tmp_path / 'train' / whole.folder.name
    shutil.copytree(whole.folder, folder)
    record = json.loads((folder / 'params.json').read_text())
    for k in Parameters.ADDED: del record['parameters'][k]
    (folder / 'params.json').write_text(json.dumps(record))
    monkeypatch.setattr(runs, '_train_into', None)
    run = make_run(small(), root=tmp_path)
    assert run.parameters == small() and (run.parameters.ema, run.parameters.clip, run.parameters.warmup) == (None, None, 0)
    del record['parameters']['width']   # was always there
    (folder / 'params.json').write_text(json.dumps(record))
    with pytest.raises(ValueError, match='parameters missing: width'): load_run(folder)


# ---- the options of a step

OPTIONS = dict(ema=.8, clip=.3, warmup=6)   # four steps an epoch: the first checkpoint is in the middle of the warm-up


@pytest.fixture(scope='module')
def optional(tmp_path_factory):
    "A run with all options that was never disturbed."
    with pytest.MonkeyPatch.context() as m:
        m.setitem(DATASETS, 'tiny', Tiny)
        return make_run(small(**OPTIONS), root=tmp_path_factory.mktemp('optional'))


@pytest.mark.parametrize('death', [('train', 1), ('train', 2), ('train', 3), ('sample', 3)], ids=str)
def test_killed_with_all_options_and_resumed_is_bit_identical(death, tmp_path, optional):
    def progress(*a):
        if a[:2] == death: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_run(small(**OPTIONS), root=tmp_path, progress=progress)
    assert content(make_run(small(**OPTIONS), root=tmp_path).folder) == content(optional.folder)


def test_what_is_kept_judged_and_sampled_is_the_average(optional, whole):
    p = optional.parameters
    assert p.validation()(optional.net)['loss'] == optional.metrics[-1]['loss'] != whole.metrics[-1]['loss']
    assert torch.equal(optional.sample(50, seed=0), optional.samples)
    loss, x = p.loss(), Tiny().train(0)
    state = runs.TrainState(p.new_network(), p.lr, p.seed, **OPTIONS)
    for state in runs.train(state, loss, x, p.epochs, p.batch_size): pass
    for a, b, c in zip(optional.net.parameters(), state.average.parameters(), state.net.parameters(), strict=True): assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_checkpoint_of_other_options_is_not_gone_on_with(tmp_path):
    "the folders differ, so it takes a moved file"
    p = small(**OPTIONS)
    work = folder_of(p, root=tmp_path).with_name(f'.{p.slug()}.partial'); work.mkdir(parents=True)
    runs.TrainState(small().new_network()).save(work / 'checkpoint.safetensors')
    with pytest.raises(ValueError, match='it was made with ema None, not 0.8; clip None, not 0.3; warmup 0, not 6'): make_run(p, root=tmp_path)


@pytest.mark.parametrize('name, value', [('ema', 0), ('ema', 1), ('ema', '0.9'), ('ema', math.nan), ('clip', 0), ('clip', math.inf), ('clip', True), ('warmup', -1), ('warmup', None), ('warmup', .5)])
def test_wrong_options(name, value):
    with pytest.raises((ValueError, TypeError), match=f'^{name} must'): Parameters(**{name: value})


# ---- damaged records

BYTES = {'missing': lambda p: p.unlink(), 'empty': lambda p: p.write_bytes(b''), 'garbage': lambda p: p.write_bytes(bytes(range(256)) * 9),
         'zeros': lambda p: p.write_bytes(bytes(p.stat().st_size)), 'cut': lambda p: p.write_bytes(p.read_bytes()[:p.stat().st_size // 2]),
         'a folder': lambda p: (p.unlink(), p.mkdir()), 'merge': lambda p: p.write_text('<<<<<<< HEAD\n{}\n')}

def refused(folder, says=None):
    "Loading and making say so in one line, and touch nothing."
    before = tree(folder.parent)
    for f in (lambda: load_run(folder), lambda: make_run(small(), root=folder.parent.parent)):
        with pytest.raises(ValueError, match=says) as e: f()
        assert str(folder) in str(e.value) and 'Move the folder away' in str(e.value)
    assert tree(folder.parent) == before


@pytest.mark.parametrize('damage', BYTES)
@pytest.mark.parametrize('file', FILES)
def test_a_damaged_file_is_named(file, damage, copied):
    BYTES[damage](copied / file)
    refused(copied, re.escape(file))


LESS = {
    'a lost epoch': lambda d: (d / 'metrics.jsonl').write_text(''.join((d / 'metrics.jsonl').read_text().splitlines(True)[:-1])),
    'metrics are numbers': lambda d: (d / 'metrics.jsonl').write_text('1\n2\n3\n4\n'),
    'an empty summary': lambda d: (d / 'summary.json').write_text('{}'),
    'a summary that is no dict': lambda d: (d / 'summary.json').write_text('null'),
    'a record that is no dict': lambda d: (d / 'params.json').write_text('[]'),
    'no environment': lambda d: edit(d / 'params.json', lambda r: r.pop('environment')),
    'no parameters': lambda d: edit(d / 'params.json', lambda r: r.pop('parameters')),
    'a parameter gone': lambda d: edit(d / 'params.json', lambda r: r['parameters'].pop('target')),
    'a parameter of the wrong type': lambda d: edit(d / 'params.json', lambda r: r['parameters'].update(epochs='3')),
    'model of another width': lambda d: save_file({k: v[:-1] for k, v in load_file(d / 'model.safetensors').items()}, d / 'model.safetensors'),
    'no model': lambda d: save_file({}, d / 'model.safetensors'),
    'samples of another name': lambda d: np.savez(d / 'samples.npz', x=np.zeros((3, 2))),
    'samples of another shape': lambda d: np.savez(d / 'samples.npz', samples=np.zeros((50, 3))),
    'flat samples': lambda d: np.savez(d / 'samples.npz', samples=np.zeros(50)),
    'pickled samples': lambda d: np.savez(d / 'samples.npz', samples=np.array([{}])),
    'samples without npz': lambda d: (np.save(d / 's.npy', np.zeros((50, 2))), os.replace(d / 's.npy', d / 'samples.npz')),
}

@pytest.mark.parametrize('damage', LESS)
def test_a_record_that_does_not_fit_is_refused(damage, copied):
    LESS[damage](copied)
    refused(copied)


def test_the_record_of_another_run_is_not_taken_for_this_one(copied):
    edit(copied / 'params.json', lambda r: r['parameters'].update(target='x'))
    with pytest.raises(ValueError, match='Move the folder away') as e: make_run(small(), root=copied.parent.parent)
    assert str(copied) in str(e.value)


def test_an_unknown_key_is_named(copied):
    edit(copied / 'params.json', lambda r: r['parameters'].update(epoch=5))
    refused(copied, 'epoch')


@pytest.mark.parametrize('version', [0, RESULTS_VERSION - 1, RESULTS_VERSION + 1, str(RESULTS_VERSION), None])
def test_another_results_version_is_named(version, copied):
    edit(copied / 'params.json', lambda r: r.update(results_version=version))
    refused(copied, f'results version {version}.*{RESULTS_VERSION}')


def test_a_record_without_a_version(copied):
    edit(copied / 'params.json', lambda r: r.pop('results_version'))
    refused(copied, 'results.version')


def test_a_record_with_fewer_samples_in_float16_loads(copied):
    "what is committed of a study"
    x = load_run(copied).samples
    np.savez(copied / 'samples.npz', samples=x[:20].numpy().astype(np.float16))
    torch.testing.assert_close(load_run(copied).samples, x[:20], rtol=1e-3, atol=1e-3)


def test_a_folder_that_was_moved_still_loads(whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / 'my favourite run')
    assert load_run(str(tmp_path / 'my favourite run')).summary == whole.summary


def test_a_run_of_another_device_loads(copied):
    edit(copied / 'params.json', lambda r: r['parameters'].update(device='cuda:7'))
    run = load_run(copied)
    assert run.parameters.device == 'cuda:7' and run.sample(3).isfinite().all()


def test_no_run_names_the_nearest(copied):
    with pytest.raises(FileNotFoundError, match=f'Did you mean .{copied.name}'): load_run(copied.with_name(copied.name[:-1]))
    with pytest.raises(FileNotFoundError, match='no runs'): load_run(copied.parent.parent / 'nowhere' / 'x')


def test_an_empty_folder_and_a_file_in_its_place(tmp_path):
    folder = folder_of(small(), root=tmp_path)
    folder.mkdir(parents=True); refused(folder, 'params.json.*missing')
    folder.rmdir(); folder.write_text('mine')
    for f in (lambda: load_run(folder), lambda: make_run(small(), root=tmp_path)):
        with pytest.raises((ValueError, OSError), match='not a folder') as e: f()
        assert str(folder) in str(e.value)
    assert folder.read_text() == 'mine'


# ---- work in progress that cannot be used

def cut_short(root, after=2):
    "A run stopped after some epochs."
    class Stop(Exception): pass
    def progress(phase, done, total):
        if done == after: raise Stop
    with pytest.raises(Stop): make_run(small(), root=root, progress=progress)


@pytest.mark.parametrize('damage', ['empty', 'garbage', 'cut', 'a folder'])
def test_a_damaged_checkpoint_is_named_and_kept(damage, tmp_path, whole):
    cut_short(tmp_path)
    checkpoint = part(tmp_path) / 'checkpoint.safetensors'
    BYTES[damage](checkpoint)
    before = tree(part(tmp_path))
    with pytest.raises(ValueError, match='checkpoint.*Move it away'): make_run(small(), root=tmp_path)
    assert tree(part(tmp_path)) == before and not folder_of(small(), root=tmp_path).exists()
    checkpoint.rmdir() if checkpoint.is_dir() else checkpoint.unlink()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)


def test_a_file_in_place_of_the_work_folder(tmp_path):
    part(tmp_path).parent.mkdir(); part(tmp_path).write_text('mine')
    with pytest.raises(OSError, match='cannot write the run'): make_run(small(), root=tmp_path)
    assert part(tmp_path).read_text() == 'mine'


def test_interrupted_in_sampling_resumes(tmp_path, whole):
    def progress(phase, done, total):
        if phase == 'sample' and done == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_run(small(), root=tmp_path, progress=progress)
    epochs = []
    run = make_run(small(), root=tmp_path, progress=lambda *a: epochs.append(a))
    assert epochs[0] == ('train', 3, 3) and content(run.folder) == content(whole.folder)


# ---- disks

@contextlib.contextmanager
def small_files(limit):
    "No file may grow beyond the limit: writes fail in the middle, as on a full disk."
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='no /dev/full')
@pytest.mark.parametrize('file', [f for f in FILES if f != 'model.safetensors'])
def test_a_full_disk_while_the_record_is_written(file, tmp_path, whole):
    part(tmp_path).mkdir(parents=True)
    (part(tmp_path) / file).symlink_to('/dev/full')
    with pytest.raises(OSError, match='cannot write the run.*No space left.*run again to resume'): make_run(small(), root=tmp_path)
    assert not folder_of(small(), root=tmp_path).exists()
    if (part(tmp_path) / file).is_symlink(): (part(tmp_path) / file).unlink()
    epochs = []
    run = make_run(small(), root=tmp_path, progress=lambda *a: epochs.append(a))
    assert epochs[0] == ('train', 3, 3), 'the training was lost'
    assert content(run.folder) == content(whole.folder)


@pytest.mark.parametrize('after, limit', [(0, 0), (0, 500), (1, 2000), (3, 0), (3, 500)])
def test_a_full_disk_while_weights_are_written(after, limit, tmp_path, whole):
    "at the first checkpoint, at a later one, and at the record"
    with contextlib.ExitStack() as stack:
        def progress(phase, done, total):
            if (phase, done) == ('train', after): stack.enter_context(small_files(limit))
        with pytest.raises(OSError, match='cannot write the run.*run again to resume'): make_run(small(), root=tmp_path, progress=progress)
    assert not folder_of(small(), root=tmp_path).exists()
    epochs = []
    run = make_run(small(), root=tmp_path, progress=lambda *a: epochs.append(a))
    assert epochs[0] == ('train', after, 3) and content(run.folder) == content(whole.folder)


def test_a_full_disk_while_the_model_is_written(tmp_path, whole, monkeypatch):
    def full(*args, **kw): raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    with monkeypatch.context() as m:
        m.setattr(runs, 'save_file', full)
        with pytest.raises(OSError, match='cannot write the run.*No space left'): make_run(small(), root=tmp_path)
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)


@pytest.mark.parametrize('root', ['/dev/null', '/proc/lfdm', '/dev/full/deep/er'])
def test_a_root_that_cannot_be(root):
    if not Path(root).parent.exists() and not Path('/dev/full').exists(): pytest.skip('no such thing here')
    with pytest.raises(OSError, match=f'cannot write the run to {root}'): make_run(small(), root=root)


@contextlib.contextmanager
def nobody():
    "Someone without rights, whoever runs the tests."
    if os.name != 'posix': pytest.skip('posix only')
    root = os.geteuid() == 0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)


@pytest.fixture
def open_folder():
    "A folder that everyone can reach."
    import tempfile
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for p in (folder, *folder.rglob('*')): p.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize('mode', [0o555, 0])
def test_a_folder_without_permission(mode, open_folder):
    (open_folder / 'train').mkdir(); (open_folder / 'train').chmod(mode)
    with nobody(), pytest.raises(OSError, match='cannot .*Permission denied') as e: make_run(small(), root=open_folder)
    assert str(open_folder) in str(e.value)


def test_a_finished_run_on_a_read_only_disk_loads(open_folder, whole):
    shutil.copytree(whole.folder, open_folder / 'train' / whole.folder.name)
    for p in open_folder.rglob('*'): p.chmod(0o555 if p.is_dir() else 0o444)
    with nobody(): assert make_run(small(), root=open_folder).summary == whole.summary


# ---- what else may be missing or in the way

def test_a_machine_without_git(tmp_path, whole, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    run = make_run(small(), root=tmp_path)
    assert run.environment['commit'] is None and content(run.folder) == content(whole.folder)


def test_the_commit_is_not_that_of_a_strangers_repository(tmp_path, monkeypatch):
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    git('init'); git('commit', '--allow-empty', '-m', 'thesis')
    monkeypatch.chdir(tmp_path)
    assert runs._versions()['commit'] != git('rev-parse', 'HEAD')


def test_a_strangers_settings_ini_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / 'settings.ini').write_bytes('[stil]\nfarbe = grün'.encode('latin-1'))
    (tmp_path / 'deep').mkdir()
    monkeypatch.chdir(tmp_path / 'deep')
    monkeypatch.delenv('LFDM_RUNS', raising=False)
    assert folder_of(small()) == tmp_path / 'deep' / 'runs' / 'train' / small().slug()


def test_where_runs_lie(tmp_path, monkeypatch):
    monkeypatch.setenv('LFDM_RUNS', str(tmp_path / 'elsewhere'))
    assert folder_of(small()) == tmp_path / 'elsewhere' / 'train' / small().slug()
    assert folder_of(small(), 'study', tmp_path / 'given') == tmp_path / 'given' / 'study' / small().slug()
    monkeypatch.setenv('LFDM_RUNS', '')
    root = Path(runs.__file__).resolve().parent.parent
    monkeypatch.chdir(root / 'nbs')
    assert folder_of(small()) == root / 'runs' / 'train' / small().slug()


def test_the_three_lines_work_where_jupyter_starts(tmp_path, whole, monkeypatch):
    "a relative path is meant from here, or else from the project's root"
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = lfdm\n'); (tmp_path / 'nbs').mkdir()
    shutil.copytree(whole.folder, tmp_path / 'runs' / 'train' / whole.folder.name)
    for start in ('.', 'nbs'):
        monkeypatch.chdir(tmp_path / start)
        assert load_run(f'runs/train/{whole.folder.name}').summary == whole.summary
    with pytest.raises(FileNotFoundError, match=f'Did you mean .{whole.folder.name}'): load_run(f'runs/train/{whole.folder.name[:-1]}')


def test_the_global_random_state_is_neither_read_nor_changed(tmp_path, whole):
    torch.manual_seed(12345); np.random.seed(5); random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert content(make_run(small(), root=tmp_path).folder) == content(whole.folder)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_nan_in_training_loses_nothing(tmp_path):
    for _ in range(2):
        with pytest.raises(FloatingPointError, match='epoch 1 .*lr 1e.06.*Lower lr'): make_run(small(lr=1e6, target='score', weighting='nelbo'), root=tmp_path)
    assert [p for p in (tmp_path / 'train').iterdir() if not p.name.startswith('.')] == []


def test_a_progress_bar_serves_two_runs(capfd):
    bar = runs.progress_bar()
    for _ in range(2):
        for phase, done, total in (('train', 1, 3), ('train', 3, 3), ('sample', 1, 2), ('sample', 2, 2)): bar(phase, done, total)
    err = capfd.readouterr().err
    assert err.count('3/3') == 2 and err.count('2/2') == 2


# ---- parameters

WRONG = [math.nan, math.inf, -math.inf, 'true', '', '5', None, [], [5], {}, True, False, 1.5, -1, 10**30, 10**400, -10**400, 1j, b'5', torch.tensor([1, 2])]
NUMBERS = 'epochs batch_size width seed sample_steps n_samples'.split()
NAMES = {'dataset': 'rings', 'target': 'epsilon', 'weighting': 'weigthed', 'schedule': 'cos', 'sampler': 'ancestor', 'device': 'cpuu'}

@pytest.mark.parametrize('value', WRONG, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize('name', NUMBERS)
def test_wrong_whole_numbers(name, value):
    with pytest.raises((ValueError, TypeError), match=f'^{name} must'): Parameters(**{name: value})


@pytest.mark.parametrize('value', [v for v in WRONG if not (isinstance(v, float) and v == 1.5)] + [0, 0., -1e-3], ids=lambda v: str(v)[:20])
def test_wrong_learning_rates(value):
    with pytest.raises((ValueError, TypeError), match='^lr must'): Parameters(lr=value)


@pytest.mark.parametrize('value', [v for v in WRONG if not (v is None or isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 10)], ids=lambda v: str(v)[:20])
@pytest.mark.parametrize('name', ['logsnr_min', 'logsnr_max'])
def test_wrong_ends(name, value):
    with pytest.raises((ValueError, TypeError, ZeroDivisionError), match='logsnr'): Parameters(**{name: value})


@pytest.mark.parametrize('ends', [(3, 3), (4, 3), (12.9, None), (None, -12.9), (math.inf, math.inf)])
@pytest.mark.parametrize('schedule', ['cosine', 'linear', 've'])
def test_an_empty_range(schedule, ends):
    with pytest.raises(ValueError, match='logsnr'): Parameters(schedule=schedule, logsnr_min=ends[0], logsnr_max=ends[1])


@pytest.mark.parametrize('value', WRONG, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize('name', NAMES)
def test_wrong_names(name, value):
    with pytest.raises(ValueError, match=f'^unknown {name} .*Valid: '): Parameters(**{name: value})


@pytest.mark.parametrize('name', NAMES)
def test_a_misspelt_name_has_a_hint(name):
    with pytest.raises(ValueError, match=f"^unknown {name} '{NAMES[name]}'. Did you mean '.*'. Valid: "): Parameters(**{name: NAMES[name]})


@pytest.mark.parametrize('name', NUMBERS)
def test_numpy_numbers_are_taken_or_refused_never_ignored(name):
    for value in (np.int64(7), np.float32(7), np.float64(7), np.uint8(7)):
        try: p = Parameters(**{name: value})
        except TypeError as e: assert str(e).startswith(f'{name} must')
        else: assert type(getattr(p, name)) is int and getattr(p, name) == 7 and json.dumps(dataclasses.asdict(p))


def test_limits():
    Parameters(epochs=1, batch_size=1, width=1, sample_steps=1, n_samples=2, seed=2**63 - 1, lr=1e-300)
    Parameters(batch_size=50_000)
    with pytest.raises(ValueError, match='batch_size 50001 is larger than the data: 50000'): Parameters(batch_size=50_001)
    with pytest.raises(ValueError, match='n_samples must'): Parameters(n_samples=1)


@pytest.mark.parametrize('choice', [{'target': 'eps', 'logsnr_min': -300}, {'target': 'score', 'logsnr_min': -300}, {'target': 'score', 'logsnr_max': 300}])
def test_a_range_where_the_target_is_not_defined_is_refused_before_work(choice):
    "in float32 the scale is 0 there; the network must not be trained first"
    with pytest.raises((ValueError, ZeroDivisionError), match='alpha|sigma|logsnr'): Parameters(**choice)


def test_nothing_is_written_for_bad_parameters(tmp_path, monkeypatch):
    monkeypatch.setenv('LFDM_RUNS', str(tmp_path)); monkeypatch.chdir(tmp_path)
    for namespace in ({'epochs': 0}, {'epoch': 5}, {'target': 'epsilon'}, {'logsnr_min': 13.}, {'batch_size': 10**6}, {'device': 'true'}):
        with pytest.raises((ValueError, TypeError)): make_run(parameters_from(namespace))
    assert os.listdir(tmp_path) == []


# ---- a notebook's variables

def test_a_notebooks_variables_become_parameters():
    "modules, functions, hidden names and the shell's own are no parameters"
    found = parameters_from({'epochs': 1e1, 'target': 'v', '_': 5, '__name__': 'x', '_i3': 'epochs', 'In': [''], 'Out': {}, 'np': np, 'exit': exit, 'Path': Path, 'logsnr_min': None})
    assert found == Parameters(epochs=10, target='v')


@pytest.mark.parametrize('wrong, right', [('epoch', 'epochs'), ('batchsize', 'batch_size'), ('targets', 'target'), ('LR', 'lr'), ('learning_rate', None),
                                          ('n_sample', 'n_samples'), ('Seed', 'seed'), ('logsnrmin', 'logsnr_min'), ('data_set', 'dataset')])
@pytest.mark.parametrize('value', [5, 1e3, 'true', None, True, [1]], ids=str)
def test_a_misspelt_parameter(wrong, right, value):
    with pytest.raises(ValueError, match=f"^unknown parameter '{wrong}'. " + (f"Did you mean '{right}'" if right else 'Valid')): parameters_from({wrong: value, 'epochs': 3})


@pytest.mark.parametrize('name, value', [('lr', np.float32(.5)), ('seed', np.int64(3)), ('epochs', torch.tensor(3)), ('device', torch.device('cpu')),
                                         ('target', b'v'), ('width', {8}), ('schedule', object())], ids=lambda v: str(v)[:12])
def test_a_parameter_of_an_odd_type_is_not_silently_the_default(name, value):
    try: found = parameters_from({name: value})
    except (TypeError, ValueError) as e: assert name in str(e)
    else: assert getattr(found, name) == value and type(getattr(found, name)) in (int, float, str)


@pytest.mark.parametrize('typed', ['1e1', '10', '10.0'])
def test_papermills_numbers(typed):
    translate = pytest.importorskip('papermill.cli')._resolve_type
    assert parameters_from({'epochs': translate(typed), 'logsnr_min': translate('None')}) == Parameters(epochs=10)


@pytest.mark.parametrize('typed', ['true', 'True', 'None', '1.5', 'nan', 'inf', '-3', '1e400', 'ten', '', '1_000x'])
def test_papermills_other_values(typed):
    translate = pytest.importorskip('papermill.cli')._resolve_type
    with pytest.raises((TypeError, ValueError), match='^epochs must'): parameters_from({'epochs': translate(typed)})
    with pytest.raises(ValueError, match='^unknown device'): parameters_from({'device': translate(typed)})


@pytest.mark.parametrize('study', ['', '..', '.', 'a/b', '../x', 2024, None, Path('x')])
def test_a_study_is_a_plain_folder_name(study, tmp_path):
    with pytest.raises(ValueError, match='study must be a plain folder name'): folder_of(small(), study, tmp_path)
