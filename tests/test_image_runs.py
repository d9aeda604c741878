"Attempts to break lfdm.images.task: killed and resumed, two processes, memory that runs out, images that changed, careless parameters."
import dataclasses
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

import lfdm.images.task as image_runs
import lfdm.runs as runs
from lfdm.images.parameters import image_set
from lfdm.images.task import ImageParameters, make_images
from lfdm.losses import DiffusionLoss
from lfdm.grids import grid
from lfdm.parameters import KINDS, kind_of, parameters_from
from lfdm.runs import FILES, folder_of, load_run, make_run
from lfdm.training import TrainState, train
from tree import ROOT, cells, edit

torch.set_num_threads(1)
TINY = dict(dataset='folder', network='small(width=4)', epochs=3, batch_size=15, lr=1e-3, warmup=5, ema=.9, n_samples=10, sample_steps=2, judged=6)   # 4 steps an epoch, the last of 5 images
few = settings(max_examples=40, deadline=None)


def write_images(folder, n=60, size=8, seed=0, first=0):
    "Images without labels, so that no classifier is trained on them. A sixth is for testing."
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True, parents=True)
    for i in range(first, first + n): Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(folder / f'{i:03}.png')
    return str(folder)


@pytest.fixture(scope='module')
def photos(tmp_path_factory): return write_images(tmp_path_factory.mktemp('images') / 'photos')


@pytest.fixture(autouse=True)
def every_epoch_is_saved(monkeypatch): monkeypatch.setattr(image_runs.ImageSettings, 'save_every', 0)


@pytest.fixture(scope='module')
def whole(photos, tmp_path_factory):
    "A run that was never disturbed."
    return make_run(ImageParameters(**TINY, path=photos), root=tmp_path_factory.mktemp('whole'))


def content(folder):
    "What must not depend on what happened on the way."
    folder = Path(folder)
    assert set(os.listdir(folder)) == set(FILES), 'the finished folder holds the record and nothing else'
    with np.load(folder / 'samples.npz') as f: samples = f['samples'].tobytes()
    return (folder / 'model.safetensors').read_bytes(), samples, (folder / 'metrics.jsonl').read_text(), (folder / 'summary.json').read_text()


def part(p, root): folder = folder_of(p, root=root); return folder.with_name(f'.{folder.name}.partial')


def stop_at(phase, share):
    "A progress that ends the run there."
    def progress(now, done, total):
        if now == phase and done >= share * total: raise KeyboardInterrupt
    return progress


# ---- killed and resumed

@pytest.mark.parametrize('options', [{}, dict(ema=None, clip=None, flip=True, target='v'), dict(network='small(width=4, dropout=0.2)')], ids=str)
def test_stopped_in_an_epoch_and_resumed_is_bit_identical(options, photos, whole, tmp_path):
    "weights lie channels last in memory, and are to do so again, as Adam's moments are"
    p = ImageParameters(**TINY | options, path=photos)
    expected = content(make_run(p, root=tmp_path / 'whole').folder) if options else content(whole.folder)
    for phase, share in (('images', .5), ('images', .9), ('sample', .5)):
        with pytest.raises(KeyboardInterrupt): make_run(p, root=tmp_path, progress=stop_at(phase, share))
        assert 'checkpoint.safetensors' in os.listdir(part(p, tmp_path))
        torch.manual_seed(share)   # nothing may follow from torch's own random state
    seen = []
    run = make_run(p, root=tmp_path, progress=lambda *a: seen.append(a))
    assert [a for a in seen if a[0] == 'images'] == [('images', 150, 150)], 'trained again'
    assert content(run.folder) == expected and [m['epoch'] for m in run.metrics] == [0, 1, 2, 3]


def in_child(root, path, steps):
    "Make the run, and die at once after so many steps."
    torch.set_num_threads(1)
    image_runs.ImageSettings.save_every = 0
    def progress(*_):
        nonlocal steps
        steps -= 1
        if steps < 0: os.kill(os.getpid(), signal.SIGKILL)
    make_run(ImageParameters(**TINY, path=path), root=root, progress=progress)


SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['lfdm.runs', 'pytest', 'scipy.integrate', 'scipy.interpolate', 'torch._dynamo'])   # as in test_runs.py


def test_killed_in_an_epoch_and_resumed_is_bit_identical(photos, whole, tmp_path):
    child = SERVER.Process(target=in_child, args=(tmp_path, photos, 6), daemon=True)
    child.start(); child.join(60)
    assert child.exitcode == -signal.SIGKILL and 'checkpoint.safetensors' in os.listdir(part(whole.parameters, tmp_path))
    seen = []
    run = make_run(whole.parameters, root=tmp_path, progress=lambda *a: seen.append(a))
    assert seen[0] == ('images', 50, 150) and content(run.folder) == content(whole.folder)
    assert os.listdir(tmp_path / 'train') == [run.folder.name]


def test_a_run_samples_as_it_was_made(whole):
    "and is of float32 weights, of which the average is kept"
    assert torch.equal(image_runs.quantize(load_run(whole.folder).sample(10, seed=0), 256), whole.samples)
    assert whole.samples.dtype == torch.uint8 and {v.dtype for v in whole.net.state_dict().values()} == {torch.float32}
    assert whole.parameters.validation()(whole.net)['loss'] == pytest.approx(whole.metrics[-1]['loss'], rel=1e-6)


def test_validation_sees_no_dropout(photos, tmp_path):
    for ema in (None, .5):
        run = make_run(ImageParameters(**TINY | dict(network='small(width=4, dropout=0.5)', ema=ema, epochs=1), path=photos), root=tmp_path)
        again = [run.parameters.validation()(run.net)['loss'] for _ in range(2)]
        assert again[0] == again[1] == pytest.approx(run.metrics[-1]['loss'], rel=1e-6)


def test_when_memory_runs_out_the_checkpoint_stays(photos, whole, tmp_path, monkeypatch):
    called, real = [], DiffusionLoss.__call__
    def full(*args, **kw):
        called.append(1)
        if len(called) > 6: raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return real(*args, **kw)
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="out of memory on 'cpu': .*2.00 GiB.*Lower batch_size, choose precision='bf16', or a smaller network. .*the checkpoint"):
        m.setattr(DiffusionLoss, '__call__', full)
        make_run(whole.parameters, root=tmp_path)
    seen = []
    assert content(make_run(whole.parameters, root=tmp_path, progress=lambda *a: seen.append(a)).folder) == content(whole.folder) and seen[0] == ('images', 50, 150)


def test_a_checkpoint_of_another_network_is_not_lost(photos, whole, tmp_path):
    "the folders differ, so it takes a moved file"
    p = whole.parameters
    part(p, tmp_path).mkdir(parents=True)
    checkpoint = part(p, tmp_path) / 'checkpoint.safetensors'
    TrainState(dataclasses.replace(p, network='small(width=8)').new_network(), **p.options()).save(checkpoint)
    before = checkpoint.read_bytes()
    with pytest.raises(ValueError, match='checkpoint .* cannot be used: it belongs to a network of another shape. Move it away'): make_run(p, root=tmp_path)
    assert checkpoint.read_bytes() == before and not folder_of(p, root=tmp_path).exists()


def test_samples_that_are_not_finite_are_a_divergence(photos, tmp_path, monkeypatch):
    p = ImageParameters(**TINY | dict(epochs=1), path=photos)
    monkeypatch.setattr(image_runs, 'sample', lambda *a, **kw: torch.full((10, 3, 8, 8), math.nan))
    finished, diverged = make_images([p], root=tmp_path)
    assert not finished and 'samples are not finite' in diverged[p]


# ---- precision and compilation

def test_bf16_is_trained_in_float32_weights(photos, whole, tmp_path):
    run = make_run(ImageParameters(**TINY | dict(precision='bf16'), path=photos), root=tmp_path)
    assert {v.dtype for v in run.net.state_dict().values()} == {torch.float32} and run.samples.dtype == torch.uint8
    assert run.metrics[0] == whole.metrics[0], 'measured in float32'
    assert run.metrics[-1]['loss'] != whole.metrics[-1]['loss'] == pytest.approx(run.metrics[-1]['loss'], rel=.05)


def test_compiled_is_trained_alike(photos, whole, tmp_path, monkeypatch):
    "in the wrapper of torch.compile, without its minutes"
    monkeypatch.setattr(torch, 'compile', torch._dynamo.disable)
    wrapped = image_runs.computed(whole.parameters.new_network(), compiled=True)
    with pytest.raises(TypeError): bool(wrapped)   # has no truth value
    run = make_run(ImageParameters(**TINY | dict(compiled=True), path=photos), root=tmp_path)
    assert run.metrics == whole.metrics and not any('_orig_mod' in k for k in load_file(run.folder / 'model.safetensors'))


def test_a_compiler_that_is_missing_is_told(photos, tmp_path, monkeypatch):
    def missing(*_): raise RuntimeError('No working C++ compiler found')
    monkeypatch.setattr(torch, 'compile', lambda net: missing)
    p = ImageParameters(**TINY | dict(compiled=True, epochs=1), path=photos)
    with pytest.raises(RuntimeError, match='No working C'): make_run(p, root=tmp_path)
    assert not folder_of(p, root=tmp_path).exists()


# ---- several processes

def launch(root, path, **options):
    "The command of nbs/guides/gpus.ipynb for two processes on a CPU."
    given = [w for k, v in (TINY | dict(path=path) | options).items() for w in ('-p', k, str(v))]
    env = os.environ | {'LFDM_RUNS': str(root), 'OMP_NUM_THREADS': '1', 'ACCELERATE_MIXED_PRECISION': 'bf16'}   # what somebody once told `accelerate config`
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', ROOT / 'tools/train_images.py', '--study', 'two', *given],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


@pytest.fixture(scope='module')
def launched(photos, tmp_path_factory):
    "What two launches said, side by side: one may write, one not."
    pytest.importorskip('accelerate')
    root = tmp_path_factory.mktemp('two')
    (root / 'file').write_text('mine')
    children = [launch(root / where, photos) for where in ('runs', 'file')]
    try: said = [c.communicate(timeout=240)[0] for c in children]
    finally:
        for c in children:
            if c.poll() is None: os.killpg(c.pid, signal.SIGKILL)   # with its processes
    return root, [(c.returncode, s) for c, s in zip(children, said)]


def test_two_processes_train_what_one_trains(launched, whole):
    "though the last batch has 5 images"
    root, ((code, said), _) = launched
    assert code == 0 and 'Traceback' not in said and 'Warning' not in said, said
    assert os.listdir(root / 'runs' / 'two') == [whole.folder.name], 'another name, a lock or work in progress'
    run = load_run(root / 'runs' / 'two' / whole.folder.name)
    assert run.parameters == whole.parameters and len(run.metrics) == len(whole.metrics)
    for a, b in zip(run.metrics, whole.metrics, strict=True):
        for k in b: assert a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-6), k
    for (k, a), b in zip(run.net.state_dict().items(), whole.net.state_dict().values(), strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=k)
    assert run.summary['loss'] == pytest.approx(whole.summary['loss'], rel=1e-4)


def test_a_main_process_that_fails_ends_the_launch(launched):
    root, (_, (code, said)) = launched
    assert code != 0 and 'cannot write the run to' in said and said.count('[rank0]: OSError') == 1, said
    assert (root / 'file').read_text() == 'mine'


def one_of_two(rank=1, **calls): return SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0, prepare_model=lambda net: net, wait_for_everyone=lambda: None, **calls)


@pytest.mark.parametrize('options, message', [(dict(batch_size=1), 'the last batch of an epoch has 1 examples for 2 processes'), (dict(batch_size=49), 'the last batch of an epoch has 1 examples'),
                                              (dict(schedule='adaptive', weighting='sigmoid'), 'train it on one')])
def test_what_two_processes_cannot_do_is_refused_by_each(options, message, photos, tmp_path):
    p = ImageParameters(**TINY | options, path=photos)
    for rank in (0, 1):
        with pytest.raises(ValueError, match=message): make_run(p, root=tmp_path, accelerator=one_of_two(rank))


def test_each_process_has_a_device_of_its_own(photos, whole):
    p = dataclasses.replace(whole.parameters); object.__setattr__(p, 'device', 'cuda:1')
    with pytest.raises(ValueError, match="choose 'cuda', not 'cuda:1'"): next(p.fit(None, None, None, one_of_two()))


def test_a_late_process_leaves_nothing_behind(photos, whole, tmp_path):
    "killed just before the renaming, made again by two: one renames before the other looks"
    work, folder = part(whole.parameters, tmp_path), folder_of(whole.parameters, root=tmp_path)
    shutil.copytree(whole.folder, work)
    late = one_of_two()
    late.wait_for_everyone = lambda: os.replace(work, folder)
    assert make_run(whole.parameters, root=tmp_path, accelerator=late) is None and os.listdir(folder.parent) == [folder.name]


def test_shares_add_up_to_the_batch(whole):
    "the gradients of both shares have the whole batch's as their mean"
    p, images = whole.parameters, whole.dataset.train()[:15]
    def gradient(accelerator):
        state = TrainState(p.new_network(), p.lr, p.seed)
        state.descend = lambda value: value.backward()
        if accelerator: accelerator.reduce = lambda total, how: total
        for _ in train(state, p.loss(), images, 1, 15, prepare=lambda b, g: image_runs.dequantize(b, 256, g), accelerator=accelerator): pass
        return torch.cat([q.grad.flatten() for q in state.net.parameters()])
    shares = [gradient(one_of_two(rank)) for rank in (0, 1)]
    torch.testing.assert_close((shares[0] + shares[1]) / 2, gradient(None), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(*shares)


# ---- records

DAMAGE = {
    'samples.npz': [lambda f: f.write_bytes(f.read_bytes()[:99]), lambda f: np.savez(f, samples=np.zeros((10, 3, 8, 8), np.float32)), lambda f: np.savez(f, samples=np.zeros((10, 8, 8), np.uint8)),
                    lambda f: np.savez(f, x=np.zeros((10, 3, 8, 8), np.uint8))],
    'model.safetensors': [lambda f: f.write_bytes(bytes(99)), lambda f: save_file({}, f), lambda f: save_file({k: v[..., :1].contiguous() for k, v in load_file(f).items()}, f)],
    'params.json': [lambda f: f.write_text('{'), lambda f: edit(f, lambda r: r.update(kind='image')), lambda f: edit(f, lambda r: r.update(kind=['images'])), lambda f: edit(f, lambda r: r.pop('kind')),
                    lambda f: edit(f, lambda r: r['parameters'].update(content='8x8')), lambda f: edit(f, lambda r: r['parameters'].update(content='3x9x9, 256 values, 00000000')),
                    lambda f: edit(f, lambda r: r['parameters'].update(network='smal')), lambda f: edit(f, lambda r: r['parameters'].update(flip=0)), lambda f: edit(f, lambda r: r['parameters'].pop('judged'))],
}

@pytest.mark.parametrize('file, i', [(f, i) for f, damages in DAMAGE.items() for i in range(len(damages))])
def test_a_damaged_file_is_named(file, i, copied):
    DAMAGE[file][i](copied / file)
    with pytest.raises(ValueError, match=f'run {re.escape(str(copied))} cannot be read: {file}: .*Move the folder away') as e: load_run(copied)
    assert len(str(e.value)) < 800 and '\n' not in str(e.value)


def test_an_unknown_kind_is_told():
    for name, hint in (('image', "Did you mean 'images'"), ('', 'Valid'), (None, 'Valid'), (3, 'Valid')):
        with pytest.raises(ValueError, match=f'unknown kind of run {re.escape(repr(name))}.*{hint}'): kind_of(name)


def test_a_record_loads_where_nobody_has_heard_of_images(whole):
    code = f"import sys, lfdm.runs; assert 'lfdm.images.task' not in sys.modules; run = lfdm.runs.load_run({str(whole.folder)!r}); assert run.parameters.kind == 'images' and run.sample(2, steps=1).shape == (2, 3, 8, 8)"
    child = SERVER.Process(target=exec, args=(code, {}), daemon=True)
    child.start(); child.join(60)
    assert child.exitcode == 0


def test_a_record_loads_without_its_images(tmp_path):
    path = write_images(tmp_path / 'mine')
    run = make_run(ImageParameters(**TINY | dict(epochs=1), path=path), root=tmp_path / 'runs')
    shutil.rmtree(path); image_set.cache_clear()
    again = load_run(run.folder)
    assert again.parameters == run.parameters and torch.equal(again.samples, run.samples) and again.sample(2).shape == (2, 3, 8, 8)
    with pytest.raises(FileNotFoundError, match='there is no folder'): again.dataset
    assert make_run(run.parameters, root=tmp_path / 'runs').summary == run.summary


# ---- the images decide

def test_the_place_of_the_images_is_no_part_of_a_run(photos, whole, tmp_path):
    elsewhere = ImageParameters(**TINY, path=shutil.copytree(photos, tmp_path / 'elsewhere'))
    assert elsewhere.slug() == whole.parameters.slug() and elsewhere == whole.parameters and isinstance(elsewhere.path, str)
    assert make_run(elsewhere, root=whole.folder.parent.parent).folder == whole.folder, 'found, wherever its images lie'


def test_lossy_files_are_called_so_in_the_record(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(20): Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / f'{i}.jpg')
    p = ImageParameters(**TINY | dict(batch_size=4), path=str(tmp_path))
    assert p.content.endswith(', compressed with loss') and p.shape == (3, 8, 8) and p.levels == 256
    assert dataclasses.replace(p, path=None) == p and p.data.lossy


def test_images_that_changed_are_another_run(photos, whole, tmp_path):
    path = shutil.copytree(photos, tmp_path / 'changed')
    write_images(path, 1, seed=1)
    changed = ImageParameters(**TINY, path=path)
    assert changed.slug() != whole.parameters.slug() and changed.content[:-8] == whole.parameters.content[:-8]
    stale = dataclasses.replace(whole.parameters, path=str(path))
    with pytest.raises(ValueError, match='the images are not those of the run'): make_run(stale, root=tmp_path)


def test_images_of_mixed_sizes_are_refused_at_once(tmp_path):
    path = write_images(tmp_path / 'mixed')
    write_images(tmp_path / 'mixed', 1, size=16, first=60)
    with pytest.raises(ValueError, match='8.*16|16.*8'): ImageParameters(**TINY, path=path)
    assert ImageParameters(**TINY | dict(dataset='folder(size=8)'), path=path).shape == (3, 8, 8)


def test_a_size_that_cannot_be_halved_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match='10.*halv.*nearest sizes: 8.*12'): ImageParameters(**TINY, path=write_images(tmp_path / 'odd', size=10))


def test_the_exact_set_has_its_excess(tmp_path, monkeypatch):
    monkeypatch.setattr(image_runs, 'judge_images', lambda *a: {})
    run = make_run(ImageParameters(**TINY | dict(dataset='templates(n_train=60, n_test=12)', epochs=1)), root=tmp_path)
    assert all(0 < m['excess'] < m['loss'] for m in run.metrics) and 0 < run.summary['nelbo_excess'] < run.summary['nelbo_loss']


# ---- parameters

NAMES = ['dataset', 'network', 'target', 'weighting', 'schedule', 'sampler', 'precision', 'device']
NUMBERS = ['epochs', 'batch_size', 'lr', 'seed', 'sample_steps', 'n_samples', 'judged', 'warmup', 'ema', 'clip', 'logsnr_min', 'logsnr_max']
SWITCHES = ['flip', 'compiled']
nothing = st.sampled_from([math.nan, math.inf, -math.inf, 'true', 'ten', '', [1], {}, (1,), True, 1j, b'1', 10**400, -1e300])
other_words = st.text(max_size=6) | st.sampled_from([None, 3, 1.5, True, ['eps'], {}, 'small(', 'digits(n=3)', 'v(k=3)', '()', '__import__("os")', 'cuda', 'cuda:0', 'mps:1', 'Digits'])

@few
@given(st.sampled_from(NUMBERS), nothing)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises((ValueError, TypeError)) as e: ImageParameters(**{name: value})
    assert name in str(e.value)


@few
@given(st.sampled_from(NAMES), other_words)
def test_unknown_words_are_refused_by_name(name, value):
    if name == 'device' and (torch.cuda.is_available() or torch.backends.mps.is_available()): return
    with pytest.raises((ValueError, TypeError)) as e: ImageParameters(**{name: value})
    assert name in str(e.value) or repr(value).strip('\'"') in str(e.value)


@few
@given(st.sampled_from(SWITCHES), st.none() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.booleans()))
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(TypeError, match=f'^{name} must be True or False'): ImageParameters(**{name: value})


@few
@given(st.text(max_size=30) | st.sampled_from([0, 3, True, ['x'], b'x', '1x16x16', '0x16x16, 17 values, 3d019220', '16x16, 17 values, 3d019220', '1x16x16, 17 values, 3d01922', '1x16x16, x values, 3d019220']))
def test_the_content_is_not_chosen(value):
    with pytest.raises((ValueError, TypeError), match='^content '): ImageParameters(content=value)


@pytest.mark.parametrize('bad, message', [
    (dict(device='cuda'), "unknown device 'cuda'. .*Valid: 'cpu'"), (dict(precision='fp16'), "unknown precision 'fp16'. .*'float32', 'bf16'"), (dict(dataset='digit'), "Did you mean 'digits'"),
    (dict(network='smal'), "Did you mean 'small'"), (dict(network='small(widht=8)'), "Did you mean 'width'"), (dict(batch_size=1501), 'batch_size 1501 is larger than the data: 1500 training images'),
    (dict(network='small(width=0)'), 'width must be at least'), (dict(network='small(width=1e12)'), 'cannot be built'), (dict(judged=1), 'judged must be from 2'), (dict(n_samples=1), 'n_samples must be from 2'), (dict(path=3), 'path must'),
    (dict(dataset='folder'), "needs a path"), (dict(logsnr_min=5, logsnr_max=5), 'logsnr_min must be below'), (dict(width=3), "width")], ids=str)
def test_what_a_careless_user_gives(bad, message):
    if bad.get('device') and torch.cuda.is_available(): pytest.skip('there is one')
    with pytest.raises((ValueError, TypeError), match=message): ImageParameters(**bad)


@pytest.mark.parametrize('name, other', dict(target='v', weighting='nelbo', schedule='linear', logsnr_min=-9, logsnr_max=9, epochs=4, batch_size=63, lr=1e-3, seed=1, sampler='ddim', sample_steps=6, n_samples=51,
                                             dataset='templates', network='small(width=4)', ema=None, clip=2, warmup=10, flip=True, precision='bf16', compiled=True, judged=9).items())
def test_every_parameter_is_in_the_name(name, other):
    assert ImageParameters(**{name: other}).slug() != ImageParameters().slug() == ImageParameters(path='anywhere').slug()


def test_names_stay_what_they_are():
    if runs.RESULTS_VERSION != 2: pytest.skip('the names of results version 2')
    assert ImageParameters(content='1x16x16, 17 values, 3d019220').slug() == 'digits-eps-weighted-cosine-s0-c0cf4dd1'


def test_a_grid_of_images():
    cells_ = grid(kind_of('images'), target=['x', 'v'], seed=[0, 1])
    assert [(p.target, p.seed) for p in cells_] == [('x', 0), ('x', 1), ('v', 0), ('v', 1)] and all(isinstance(p, ImageParameters) for p in cells_) and KINDS['images'] is ImageParameters
    with pytest.raises(ValueError, match="unknown axis 'width'"): grid(kind_of('images'), width=[8])


# ---- the notebook

NOTEBOOK = ROOT / 'nbs' / 'train_images.ipynb'


def begin(**given):
    "The notebook up to the check of its parameters, with what papermill would put in."
    code = [(s, 'parameters' in c['metadata'].get('tags', [])) for s, c in cells(NOTEBOOK, 'code')]
    tagged = [i for i, (_, tag) in enumerate(code) if tag]
    position = next(i for i, (s, _) in enumerate(code) if 'parameters_from(' in s)
    assert tagged == [0] and not any('make_run(' in s for s, _ in code[:position + 1])
    space = {'__name__': '__main__', 'In': [''], 'Out': {}}
    exec(code[0][0], space)
    space |= given
    for s, _ in code[1:position + 1]: exec(s, space)
    return space['parameters']


def test_the_notebook_has_the_defaults():
    assert begin() == ImageParameters()
    shown = {}
    exec(next(s for s, c in cells(NOTEBOOK, 'code') if 'parameters' in c['metadata'].get('tags', [])), shown)
    assert set(shown) - {'__builtins__', 'study'} == {f.name for f in dataclasses.fields(ImageParameters)} - {'content'}


@pytest.mark.parametrize('given, message', [(dict(epoch=5), "unknown parameter 'epoch'. Did you mean 'epochs'"), (dict(netwrok='small'), "Did you mean 'network'"), (dict(bf16=True), "unknown parameter 'bf16'"),
                                            (dict(flip='yes'), 'flip must be True or False'), (dict(study='../x'), 'study must be a plain folder name'), (dict(epochs=2.5), 'epochs must be a whole number')])
def test_what_a_careless_user_types(given, message):
    with pytest.raises((ValueError, TypeError), match=message): begin(**given)


def test_parameters_of_images_are_told_from_points():
    with pytest.raises(ValueError, match="unknown parameter 'network'"): parameters_from(dict(network='small'))
    with pytest.raises(ValueError, match="unknown parameter 'width'"): parameters_from(dict(width=8), ImageParameters)
