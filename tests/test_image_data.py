"Attempts to break lfdm.images.data: roundings at the ends of cells, damaged files, folders of every wrong form, extremes. What is right in the normal case stands in nbs/library/52_image_data.ipynb."
import contextlib
import hashlib
import os
import pickle
import shutil
import struct
import tempfile
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from lfdm.core import from_spec, instance
from lfdm.images.data import CIFAR10, IMAGES, Digits, ImageFolder, ImageSet, decode, dequantize, image_grid, quantize, scaled, stratified

torch.set_num_threads(1)
f64 = torch.float64
few = settings(max_examples=20, deadline=None)
gen = lambda seed=0: torch.Generator().manual_seed(seed)


# --- bytes and densities

@settings(max_examples=300, deadline=None)
@given(st.integers(2, 256), st.integers(0, 255), st.floats(0, 1, exclude_max=True, width=32))
def test_a_dequantized_byte_stays_in_its_cell(levels, b, u):
    b = b % levels
    image = torch.tensor([b], dtype=torch.uint8)
    x = dequantize(image, levels, u=torch.tensor([u]))
    assert x.dtype == torch.float32 and -1 < x < 1
    assert Fraction(2 * b, levels) - 1 < Fraction(x.item()) < Fraction(2 * (b + 1), levels) - 1   # without any rounding
    assert quantize(x, levels) == image and quantize(x.double(), levels) == image and quantize(scaled(image, levels), levels) == image


@pytest.mark.parametrize('u', [0., 2.**-24, .5, 1 - 2.**-16, 1 - 2.**-24])
def test_every_byte_of_every_depth_comes_back_from_the_extremes(u):
    for levels in range(2, 257):
        b = torch.arange(levels, dtype=torch.uint8)
        assert quantize(dequantize(b, levels, u=torch.full((levels,), u)), levels).equal(b), levels


def test_without_the_margin_bytes_would_change():
    "So that the test above can fail."
    b = torch.arange(256, dtype=torch.uint8)
    assert not quantize(2 * (b + torch.full((256,), 1 - 2.**-24)) / 256 - 1, 256).equal(b)


def test_the_place_in_the_cell_is_uniform_and_reproducible():
    b = torch.full((40_000,), 200, dtype=torch.uint8)
    x = dequantize(b, 256, gen())
    u = (x.double() + 1) * 128 - 200
    assert x.equal(dequantize(b, 256, gen())) and not x.equal(dequantize(b, 256, gen(1)))
    assert abs(u.mean() - .5) < 4 * (1 / 12 / 40_000)**.5 and abs(u.var() - 1 / 12) < .002
    assert (u.sort().values - torch.linspace(0, 1, 40_000)).abs().max() < 2 / 40_000**.5   # Kolmogorov and Smirnov, far above the 1% level


@pytest.mark.parametrize('shape', [(0, 3, 4, 4), (2, 3, 4, 4), (5,), ()])
def test_any_shape(shape):
    b = torch.zeros(shape, dtype=torch.uint8)
    assert dequantize(b, 17).shape == scaled(b, 17).shape == quantize(scaled(b, 17), 17).shape == shape


@pytest.mark.parametrize('levels', [1, 0, 257, 2.5, True, '8', None, float('nan')])
def test_levels_out_of_range(levels):
    b = torch.zeros(3, dtype=torch.uint8)
    for f in (dequantize, scaled, lambda b, levels: quantize(b.float(), levels)):
        with pytest.raises((ValueError, TypeError), match='levels must be'): f(b, levels)


def test_wrong_input_of_the_conversions():
    for bad in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), np.zeros(3, np.uint8), [0, 1], None):
        for f in (dequantize, scaled):
            with pytest.raises(TypeError, match='uint8 tensor'): f(bad, 256)
    for f in (dequantize, scaled):
        with pytest.raises(ValueError, match='values up to 15, not 16'): f(torch.tensor([3, 16], dtype=torch.uint8), 16)
    for bad in (torch.tensor([float('nan')]), torch.tensor([0., float('inf')])):
        with pytest.raises(ValueError, match='not finite'): quantize(bad, 256)
    with pytest.raises(TypeError, match='floating-point'): quantize(torch.zeros(3, dtype=torch.uint8), 256)
    assert quantize(torch.tensor([-9., 9., 1., -1.]), 17).tolist() == [0, 16, 16, 0]


# --- sets

def test_digits_do_not_depend_on_the_seed_of_a_run():
    torch.manual_seed(5)
    d = Digits()
    assert d.digest == '3d019220'   # another value: other data, and records of runs on the old ones no longer compare
    assert d.train() is d.train() and d.train()[:, :, :4].max() == 0 and d.train().max() == 16
    assert d.labels('train').dtype == torch.int64 and len(d.labels('test')) == 297
    assert hashlib.sha256(d.train().numpy().tobytes() + d.test().numpy().tobytes()).hexdigest()[:8] == d.digest
    with pytest.raises(ValueError, match="Did you mean 'test'"): d.labels('tests')


@few
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.data())
def test_a_split_is_a_partition_in_proportion(labels, data):
    labels = torch.tensor(labels)
    n = data.draw(st.integers(1, len(labels) - 1))
    train, test = stratified(labels, n, 'x')
    assert len(train) == n and sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for c in labels.unique(): assert abs((labels[train] == c).sum() - n / len(labels) * (labels == c).sum()) <= 1.5


def test_names():
    assert set(IMAGES) == {'digits', 'templates', 'cifar10', 'folder'} and all(cls.name == name for name, cls in IMAGES.items())
    assert from_spec(IMAGES, 'templates(std=0.1)', 'image set').std == .1
    assert isinstance(instance(IMAGES, Digits, 'image set', ImageSet), Digits)
    with pytest.raises(ValueError, match="Did you mean 'digits'"): from_spec(IMAGES, 'digit', 'image set')
    with pytest.raises(ValueError, match="Did you mean 'std'"): from_spec(IMAGES, 'templates(sdt=0.1)', 'image set')


def test_a_set_of_ones_own_is_checked():
    class Own(ImageSet):
        name, levels = 'own', 4
        def __init__(self, top): self.top = top
        def load(self): return {s: (torch.full((2, 1, 2, 2), self.top, dtype=torch.uint8), None) for s in ('train', 'test')}
    assert Own(3).shape == (1, 2, 2) and Own(3).dims == 4 and Own(3).labels() is None and '2 + 2 images' in repr(Own(3))
    with pytest.raises(ValueError, match='values up to 3, not 4'): Own(4).train()
    with pytest.raises(NotImplementedError, match='no load'): ImageSet().train()


# --- CIFAR-10

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A folder in the official format with 4 images a file; torchvision is told the MD5 sums of these files instead of the official ones."
    from torchvision import datasets
    folder, md5 = tmp_path / 'data' / 'cifar-10-batches-py', {}
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
        write(name, {'data': rng.integers(0, 256, (4, 3072), dtype=np.uint8), 'labels': rng.integers(0, 10, 4).tolist()})
    write('batches.meta', {'label_names': list('abcdefghij')})
    monkeypatch.setattr(datasets.CIFAR10, 'train_list', [[name, md5[name]] for name, _ in datasets.CIFAR10.train_list])
    monkeypatch.setattr(datasets.CIFAR10, 'test_list', [[name, md5[name]] for name, _ in datasets.CIFAR10.test_list])
    monkeypatch.setattr(datasets.CIFAR10, 'meta', datasets.CIFAR10.meta | {'md5': md5['batches.meta']})
    monkeypatch.delenv('LFDM_DATA', raising=False)
    return folder


def test_cifar_is_found_in_every_way(cifar, monkeypatch, tmp_path):
    sets = [CIFAR10(cifar.parent), CIFAR10(cifar), CIFAR10(str(cifar)), from_spec(IMAGES, f'cifar10(path="{cifar.parent}")', 'image set')]
    monkeypatch.setenv('LFDM_DATA', str(cifar.parent))
    sets.append(CIFAR10())
    monkeypatch.delenv('LFDM_DATA')
    (tmp_path / 'settings.ini').write_text('lib_name = lfdm\n')
    monkeypatch.chdir(tmp_path)
    sets.append(CIFAR10())
    shutil.copytree(cifar, tmp_path / 'renamed')
    sets.append(CIFAR10(tmp_path / 'renamed'))
    monkeypatch.chdir(cifar)
    sets.append(CIFAR10('.'))
    raw = pickle.loads((cifar / 'data_batch_2').read_bytes())
    for s in sets:
        assert s.train().shape == (20, 3, 32, 32) and s.test().shape == (4, 3, 32, 32) and s.train().is_contiguous() and s.digest == sets[0].digest
        assert s.train()[4:8].flatten(1).numpy().tobytes() == raw['data'].tobytes() and s.labels()[4:8].tolist() == raw['labels']
    assert (sets[0].levels, sets[0].classes, sets[0].shape, sets[0].lossy) == (256, 10, (3, 32, 32), False)


def test_cifar_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('LFDM_DATA', str(tmp_path / 'nothing'))
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*nothing.*path='the folder.*LFDM_DATA.*CIFAR10\.download\(\)"): CIFAR10()
    with pytest.raises(FileNotFoundError, match=r"CIFAR10\.download\('elsewhere'\)"): CIFAR10('elsewhere')


def test_cifar_that_is_damaged(cifar):
    whole = (cifar / 'data_batch_3').read_bytes()
    (cifar / 'data_batch_3').write_bytes(whole[:1000])
    (cifar / 'test_batch').unlink()
    with pytest.raises(ValueError, match=r'not whole: data_batch_3 \(damaged\), test_batch \(missing\)'): CIFAR10(cifar).train()
    (cifar / 'data_batch_3').write_bytes(whole)
    with pytest.raises(ValueError, match=r'not whole: test_batch \(missing\)'): CIFAR10(cifar).test()


def test_the_official_sums_are_compared(cifar, monkeypatch):
    "What is not the official file is not opened: a pickle can run anything."
    from torchvision import datasets
    monkeypatch.undo()
    monkeypatch.setattr(pickle, 'load', lambda *a, **k: pytest.fail('unpickled'))
    assert datasets.CIFAR10.test_list[0][1] == '40351d587109b95175f43aff81a1287e'
    with pytest.raises(ValueError, match='batches.meta .damaged'): CIFAR10(cifar).train()


def test_download_only_when_asked(cifar, monkeypatch, tmp_path):
    from torchvision import datasets
    asked = []
    def fetch(url, root, filename, md5):
        asked.append(url)
        shutil.copytree(cifar, Path(root) / cifar.name)
    monkeypatch.setattr(datasets.cifar, 'download_and_extract_archive', fetch)
    with pytest.raises(FileNotFoundError): CIFAR10(tmp_path / 'new')
    CIFAR10(cifar).train()
    assert not asked
    assert CIFAR10.download(tmp_path / 'new').n_test == 4 and len(asked) == 1


# --- folders

def write(folder, names, size=(8, 6), mode='RGB', seed=0, **options):
    "Random images of that name."
    rng = np.random.default_rng(seed)
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode).save(folder / name, **options)
    return folder


def test_four_forms_of_a_folder(tmp_path):
    pixels = lambda name: torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
    write(tmp_path, 'a/train/x/2.png a/train/x/1.png a/train/y/1.png a/test/x/9.png a/test/y/9.png b/train/2.png b/train/1.png b/test/1.png')
    a, b = ImageFolder(tmp_path / 'a'), ImageFolder(str(tmp_path / 'b'))
    assert a.train().equal(torch.stack([pixels(f'a/train/{n}.png') for n in ('x/1', 'x/2', 'y/1')])) and a.shape == (3, 6, 8) and a.n_test == 2
    assert a.labels().tolist() == [0, 0, 1] and a.labels('test').tolist() == [0, 1] and a.classes == 2 and a.class_names == ['x', 'y'] and not a.lossy
    assert b.train()[1].equal(pixels('b/train/2.png')) and b.labels() is None and b.classes is None and b.n_test == 1
    write(tmp_path, ' '.join(f'c/{c}/{i}.png' for c in 'xy' for i in range(12)) + ' ' + ' '.join(f'd/{i}.png' for i in range(3)), seed=1)
    c, d = ImageFolder(tmp_path / 'c'), ImageFolder(tmp_path / 'd')
    assert (c.n_train, c.n_test) == (20, 4) and c.labels('test').bincount().tolist() == [2, 2] and (d.n_train, d.n_test) == (2, 1) and d.labels() is None
    assert len(torch.cat([c.train(), c.test()]).flatten(1).unique(dim=0)) == 24
    assert c.digest == ImageFolder(tmp_path / 'c').digest != d.digest
    shutil.copytree(tmp_path / 'c', tmp_path / 'elsewhere')
    assert from_spec(IMAGES, f'folder(path="{tmp_path / "elsewhere"}")', 'image set').digest == c.digest


def test_what_is_no_image_is_passed_over(tmp_path):
    write(tmp_path, 'a/1.png a/2.PNG a/sub/3.png b/1.png .hidden/1.png')
    for name in ('README.md', 'a/Thumbs.db', 'a/._1.png'): (tmp_path / name).write_text('no image')
    f = ImageFolder(tmp_path)
    assert f.class_names == ['a', 'b'] and len(f.files['all'][0]) == 4 and f.n_train == 3


def test_size_cuts_and_resizes(tmp_path):
    write(tmp_path, '1.png 2.png'), write(tmp_path, '3.png', size=(20, 30))
    with pytest.raises(ValueError, match=r"1\.png' has mode 'RGB', 8×6, and '.*3\.png' has mode 'RGB', 20×30 \(1 of 3 differ.*size="): ImageFolder(tmp_path).train()
    assert from_spec(IMAGES, f'folder(path="{tmp_path}", size=4)', 'image set').shape == (3, 4, 4)
    assert ImageFolder(tmp_path, size=1).shape == (3, 1, 1)
    write(tmp_path / 'same', '1.png 2.png', size=(6, 6))
    assert ImageFolder(tmp_path / 'same', size=6).digest == ImageFolder(tmp_path / 'same').digest
    for bad in (0, -1, 2.5, 'big', True, 5000):
        with pytest.raises((ValueError, TypeError), match='size must be'): ImageFolder(tmp_path, size=bad)


def test_lossy_copies_say_so(tmp_path):
    write(tmp_path, 'a/1.png a/2.png b/1.png'), write(tmp_path, 'b/2.jpg', quality=75), write(tmp_path, 'c/1.webp c/2.webp')
    shutil.copytree(tmp_path / 'b', tmp_path / 'd'), (tmp_path / 'd/2.jpg').rename(tmp_path / 'd/2.png')   # the content counts, not the name
    assert [ImageFolder(tmp_path / f).lossy for f in 'abcd'] == [False, True, True, True]


@pytest.mark.parametrize('mode', ['P', 'RGBA', 'LA', '1', 'I;16', 'CMYK'])
def test_modes_that_are_neither_grey_nor_colour(tmp_path, mode):
    ending = 'jpg' if mode == 'CMYK' else 'png'
    for i in range(2): Image.new(mode, (8, 8)).save(tmp_path / f'{i}.{ending}')
    with pytest.raises(ValueError, match=rf"0\.{ending}' has mode '{mode}'; images must have one of 'L', 'RGB'.*convert"): ImageFolder(tmp_path).train()
    write(tmp_path, '/'.join(['more', f'0.{ending}'])), shutil.copy(tmp_path / f'0.{ending}', tmp_path / 'more' / f'1.{ending}')
    with pytest.raises(ValueError, match=f"mode 'RGB', 8×6, and .* has mode '{mode}', 8×8.*one mode"): ImageFolder(tmp_path / 'more', size=4).train()


def test_sixteen_bits_a_channel_are_not_cut_to_eight(tmp_path):
    "PIL would open it as RGB and drop the lower bytes without a word."
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    png = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress((b'\0' + bytes(range(12))) * 2)) + chunk(b'IEND', b'')
    for name in ('1.png', '2.png'): (tmp_path / name).write_bytes(png)
    assert Image.open(tmp_path / '1.png').mode == 'RGB'
    with pytest.raises(ValueError, match="has mode 'RGB;16'"): ImageFolder(tmp_path).train()


@pytest.mark.parametrize('ending', ['png', 'jpg', 'bmp', 'tif', 'webp'])
def test_damaged_files_are_named_and_counted(tmp_path, ending):
    write(tmp_path, ' '.join(f'{i}.{ending}' for i in range(6)), size=(32, 32))
    for i in (2, 4):
        whole = (tmp_path / f'{i}.{ending}').read_bytes()
        (tmp_path / f'{i}.{ending}').write_bytes(whole[:len(whole) * 2 // 3])
    with pytest.raises(ValueError, match=rf"2 of 6 images cannot be read, such as '.*2\.{ending}'.*Replace or delete"): ImageFolder(tmp_path).train()


def test_files_that_are_no_images_at_all(tmp_path):
    write(tmp_path, '3.png 4.png'), (tmp_path / '1.png').write_bytes(b''), (tmp_path / '2.jpg').write_text('<html>')
    with pytest.raises(ValueError, match=r"2 of 4 images cannot be read, such as '.*1\.png' \(UnidentifiedImageError"): ImageFolder(tmp_path).train()
    for name in ('3.png', '4.png'): (tmp_path / name).write_bytes(b'\0')
    with pytest.raises(ValueError, match='4 of 4 images cannot be read'): ImageFolder(tmp_path).train()


@contextlib.contextmanager
def unprivileged():
    "As a user who may not read everything: root may."
    if not hasattr(os, 'geteuid'): pytest.skip('no such permissions here')
    if os.geteuid(): return (yield)
    try: os.seteuid(65534)
    except OSError: pytest.skip('cannot become another user')
    try: yield
    finally: os.seteuid(0)


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as place:   # pytest's folders are closed to others
        folder = write(Path(place), '1.png 2.png')
        folder.chmod(0o755), (folder / '1.png').chmod(0o644), (folder / '2.png').chmod(0)
        with unprivileged(), pytest.raises(ValueError, match=r"1 of 2 images cannot be read, such as '.*2\.png' \(PermissionError"): ImageFolder(folder).train()
        folder.chmod(0o311)
        with unprivileged(), pytest.raises(PermissionError, match=folder.name): ImageFolder(folder)
        folder.chmod(0o755)


def test_folders_of_a_wrong_form(tmp_path):
    write(tmp_path, 'beside/1.png beside/cat/1.png half/train/1.png differ/train/cat/1.png differ/test/dog/1.png flat/train/cat/1.png flat/test/1.png one/1.png empty/cat/1.png')
    for name in ('empty/dog', 'none'): (tmp_path / name).mkdir()
    for name, message in (('beside', r"images \(such as '1\.png'\) beside folders \(such as 'cat'\)"), ('half', "folder 'train' but no 'test'"), ('differ', r"train has \['cat'\], test has \['dog'\]"),
                          ('flat', r"train has \['cat'\], test has None"), ('one', 'one image'), ('empty', "1 of 2 class folders .*: 'dog'"), ('none', 'no images in .*endings')):
        with pytest.raises(ValueError, match=message): ImageFolder(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='there is no folder'): ImageFolder(tmp_path / 'nothing')
    with pytest.raises(NotADirectoryError, match='is a file'): ImageFolder(tmp_path / 'one/1.png')
    with pytest.raises(ValueError, match='needs a path'): from_spec(IMAGES, 'folder', 'image set')


def test_threads_change_nothing(tmp_path):
    write(tmp_path, ' '.join(f'{i:02}.png' for i in range(40)))
    files = sorted(tmp_path.iterdir())
    assert decode(files, threads=1)[0].equal(decode(files, threads=7)[0])


# --- pictures

def test_grid_puts_each_image_in_its_place():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 3)
    grid = image_grid(images, 2, levels=5)
    assert grid.shape == (3 * 3 - 1, 2 * 4 - 1, 3) and grid.dtype == np.uint8
    assert (grid[:2, :3] == 0).all() and (grid[:2, 4:] == 64).all() and (grid[6:, :3] == 255).all()   # 1 of 4: 63.75
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all() and (grid[6:, 4:] == 255).all()       # lines, and the place without an image
    assert image_grid(images[:, :1], 5, 5, gap=0).shape == (2, 15)


def test_wrong_input_of_the_grid():
    for bad in (torch.zeros(2, 2, 4, 4), torch.zeros(4, 4), torch.zeros(0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r'shape \(n, 1 or 3, H, W\)'): image_grid(bad.to(torch.uint8), 2)
    with pytest.raises(ValueError, match='columns must be'): image_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 0)
    with pytest.raises(TypeError, match='uint8'): image_grid(torch.zeros(2, 1, 4, 4), 2)
