"Attempts to break lfdm.images.data: ends of cells, damaged files, folders of every wrong form."
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

import lfdm.images  # noqa: F401  all sets join IMAGES
from lfdm.core import from_spec, instance
from lfdm.images.data import (
    CIFAR10,
    IMAGES,
    Digits,
    ImageFolder,
    ImageSet,
    decode,
    dequantize,
    image_grid,
    quantize,
    require_images,
    scaled,
    stratified,
)

torch.set_num_threads(1)
u8 = torch.uint8
by_name = lambda spec: from_spec(IMAGES, spec, 'image set')
refused = lambda match, error=ValueError: pytest.raises(error, match=match)


# --- bytes and densities

@settings(max_examples=300, deadline=None)
@given(st.integers(2, 256), st.integers(0, 255), st.floats(0, 1, exclude_max=True, width=32))
def test_a_dequantized_byte_stays_in_its_cell(levels, b, u):
    b = b % levels
    image = torch.tensor([b], dtype=u8)
    x = dequantize(image, levels, u=torch.tensor([u]))
    low, high = (Fraction(2 * k, levels) - 1 for k in (b, b + 1))   # without any rounding
    assert x.dtype == torch.float32 and -1 < x < 1 and low < Fraction(x.item()) < high
    for y in (x, x.double(), scaled(image, levels)): assert quantize(y, levels) == image


def test_the_place_in_the_cell_is_uniform_and_reproducible():
    b, n = torch.full((40_000,), 200, dtype=u8), 40_000
    draw = lambda seed: dequantize(b, 256, torch.Generator().manual_seed(seed))
    u = (draw(0).double() + 1) * 128 - 200
    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))
    assert (u.sort().values - torch.linspace(0, 1, n)).abs().max() < 2 / n**.5   # Kolmogorov, Smirnov


@pytest.mark.parametrize('shape', [(0, 3, 4, 4), (2, 3, 4, 4), ()])
def test_any_shape(shape):
    b = torch.zeros(shape, dtype=u8)
    assert dequantize(b, 17).shape == scaled(b, 17).shape == quantize(scaled(b, 17), 17).shape == shape


@pytest.mark.parametrize('levels', [1, 257, 2.5, True, '8', None, float('nan')])
@pytest.mark.parametrize('f', [dequantize, scaled, lambda b, levels: quantize(b.float(), levels)])
def test_levels_out_of_range(f, levels):
    with refused('levels must be', (ValueError, TypeError)): f(torch.zeros(3, dtype=u8), levels)


def test_wrong_input_of_the_conversions():
    for f in (dequantize, scaled):
        for bad in (torch.zeros(3), torch.zeros(3, dtype=torch.int64), np.zeros(3, np.uint8), None):
            with refused('uint8 tensor', TypeError): f(bad, 256)
        with refused('values up to 15, not 16'): f(torch.tensor([3, 16], dtype=u8), 16)
    for bad in (float('nan'), float('inf')):
        with refused('not finite'): quantize(torch.tensor([0., bad]), 256)
    with refused('floating-point', TypeError): quantize(torch.zeros(3, dtype=u8), 256)
    assert quantize(torch.tensor([-9., 9., 1., -1.]), 17).tolist() == [0, 16, 16, 0]


def test_wrong_images():
    good = torch.zeros(4, 3, 8, 8, dtype=u8)
    require_images('pictures', good, 2, 4, (1, 3))
    for bad, said in ((good[0], 'shape'), (good[..., :0], 'shape'), (good[:3], 'too few'),
                      (good[:, :2], '1 or 3'), (good + 2, '2 levels')):
        with refused('pictures.*' + said): require_images('pictures', bad, 2, 4, (1, 3))
    for bad, said in ((good.float(), 'quantize'), (good.tolist(), 'uint8')):
        with refused('pictures.*' + said, TypeError): require_images('pictures', bad)


# --- sets

def test_digits_do_not_depend_on_the_seed_of_a_run():
    torch.manual_seed(5)
    d = Digits()
    assert d.digest == '3d019220'   # another value: other data, and records on the old ones no longer compare
    assert d.train() is d.train() and d.train()[:, :, :4].max() == 0 and d.train().max() == 16
    content = d.train().numpy().tobytes() + d.test().numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:8] == d.digest and d.labels().dtype == torch.int64
    with refused("Did you mean 'test'"): d.labels('tests')


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=60), st.data())
def test_a_split_is_a_partition_in_proportion(labels, data):
    labels = torch.tensor(labels)
    n = data.draw(st.integers(1, len(labels) - 1))
    train, test = stratified(labels, n, 'x')
    assert len(train) == n and sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for c in labels.unique():
        assert abs((labels[train] == c).sum() - n / len(labels) * (labels == c).sum()) <= 1.5


def test_names():
    assert set(IMAGES) == {'digits', 'templates', 'cifar10', 'folder'}
    assert all(cls.name == name for name, cls in IMAGES.items())
    assert by_name('templates(std=0.1)').std == .1
    assert isinstance(instance(IMAGES, Digits, 'image set', ImageSet), Digits)
    for wrong, said in (('digit', 'digits'), ('templates(sdt=0.1)', 'std')):
        with refused(f"Did you mean '{said}'"): by_name(wrong)


def test_a_set_of_ones_own_is_checked():
    class Own(ImageSet):
        name, levels = 'own', 4
        def __init__(self, top): self.top = top
        def load(self):
            return {s: (torch.full((2, 1, 2, 2), self.top, dtype=u8), None) for s in ('train', 'test')}
    assert Own(3).shape == (1, 2, 2) and Own(3).dims == 4 and Own(3).labels() is None
    assert '2 + 2 images' in repr(Own(3))
    with refused('values up to 3, not 4'): Own(4).train()
    with refused('no load', NotImplementedError): ImageSet().train()


# --- CIFAR-10

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A folder in the official format with 4 images a file, and torchvision told its MD5 sums."
    from torchvision import datasets
    folder, md5, rng = tmp_path / 'data' / 'cifar-10-batches-py', {}, np.random.default_rng(0)
    folder.mkdir(parents=True)
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
        pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, 10, 4)
        write(name, {'data': pixels, 'labels': labels.tolist()})
    write('batches.meta', {'label_names': list('abcdefghij')})
    for which in ('train_list', 'test_list'):
        listed = [[name, md5[name]] for name, _ in getattr(datasets.CIFAR10, which)]
        monkeypatch.setattr(datasets.CIFAR10, which, listed)
    monkeypatch.setattr(datasets.CIFAR10, 'meta', datasets.CIFAR10.meta | {'md5': md5['batches.meta']})
    monkeypatch.delenv('LFDM_DATA', raising=False)
    return folder


def test_cifar_is_found_in_every_way(cifar, monkeypatch, tmp_path):
    sets = [CIFAR10(cifar.parent), CIFAR10(str(cifar)), by_name(f'cifar10(path="{cifar.parent}")')]
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
        assert s.train().shape == (20, 3, 32, 32) and s.test().shape == (4, 3, 32, 32)
        assert s.train().is_contiguous() and s.digest == sets[0].digest
        assert s.train()[4:8].numpy().tobytes() == raw['data'].tobytes()
        assert s.labels()[4:8].tolist() == raw['labels']
    assert (s.levels, s.classes, s.shape, s.lossy) == (256, 10, (3, 32, 32), False)


def test_cifar_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv('LFDM_DATA', str(tmp_path / 'nothing'))
    said = r"no CIFAR-10 in .*nothing.*path='the folder.*CIFAR10\.download\(\)"
    with refused(said, FileNotFoundError): CIFAR10()
    with refused(r"CIFAR10\.download\('elsewhere'\)", FileNotFoundError): CIFAR10('elsewhere')


def test_cifar_that_is_damaged(cifar):
    whole = (cifar / 'data_batch_3').read_bytes()
    (cifar / 'data_batch_3').write_bytes(whole[:1000])
    (cifar / 'test_batch').unlink()
    with refused(r'not whole: data_batch_3 \(damaged\), test_batch \(missing\)'): CIFAR10(cifar).train()


def test_what_is_not_official_is_not_opened(cifar, monkeypatch):
    "A pickle can run anything."
    from torchvision import datasets
    monkeypatch.undo()
    monkeypatch.setattr(pickle, 'load', lambda *a, **k: pytest.fail('unpickled'))
    assert datasets.CIFAR10.test_list[0][1] == '40351d587109b95175f43aff81a1287e'
    with refused('batches.meta .damaged'): CIFAR10(cifar).train()


def test_download_only_when_asked(cifar, monkeypatch, tmp_path):
    from torchvision import datasets
    fetch = lambda url, root, filename, md5: shutil.copytree(cifar, Path(root) / cifar.name)
    monkeypatch.setattr(datasets.cifar, 'download_and_extract_archive', fetch)
    with pytest.raises(FileNotFoundError): CIFAR10(tmp_path / 'new')
    assert CIFAR10.download(tmp_path / 'new').n_test == 4


# --- folders

def write(folder, names, size=(8, 6), mode='RGB', seed=0, **options):
    "Random images of that name."
    rng = np.random.default_rng(seed)
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / name, **options)
    return folder


def test_four_forms_of_a_folder(tmp_path):
    pixels = lambda name: torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
    write(tmp_path, 'a/train/x/2.png a/train/x/1.png a/train/y/1.png a/test/x/9.png a/test/y/9.png')
    write(tmp_path, 'b/train/2.png b/train/1.png b/test/1.png')
    a, b = ImageFolder(tmp_path / 'a'), ImageFolder(str(tmp_path / 'b'))
    assert a.train().equal(torch.stack([pixels(f'a/train/{n}.png') for n in ('x/1', 'x/2', 'y/1')]))
    assert a.labels().tolist() == [0, 0, 1] and a.labels('test').tolist() == [0, 1] and not a.lossy
    assert a.shape == (3, 6, 8) and a.n_test == a.classes == 2 and a.class_names == ['x', 'y']
    assert b.train()[1].equal(pixels('b/train/2.png')) and b.labels() is None and b.classes is None
    write(tmp_path, ' '.join(f'c/{c}/{i}.png' for c in 'xy' for i in range(12)), seed=1)
    write(tmp_path, 'd/0.png d/1.png d/2.png', seed=2)
    c, d = ImageFolder(tmp_path / 'c'), ImageFolder(tmp_path / 'd')
    assert (c.n_train, c.n_test, d.n_train, d.n_test) == (20, 4, 2, 1) and d.labels() is None
    assert c.labels('test').bincount().tolist() == [2, 2]
    assert len(torch.cat([c.train(), c.test()]).flatten(1).unique(dim=0)) == 24
    shutil.copytree(tmp_path / 'c', tmp_path / 'elsewhere')
    assert by_name(f'folder(path="{tmp_path / "elsewhere"}")').digest == c.digest != d.digest


def test_what_is_no_image_is_passed_over(tmp_path):
    write(tmp_path, 'a/1.png a/2.PNG a/sub/3.png b/1.png .hidden/1.png')
    for name in ('README.md', 'a/Thumbs.db', 'a/._1.png'): (tmp_path / name).write_text('no image')
    f = ImageFolder(tmp_path)
    assert f.class_names == ['a', 'b'] and len(f.files['all'][0]) == 4 and f.n_train == 3


def test_size_cuts_and_resizes(tmp_path):
    write(tmp_path, '1.png 2.png'), write(tmp_path, '3.png', size=(20, 30))
    both = r"1\.png' has mode 'RGB', 8×6, and '.*3\.png' has mode 'RGB', 20×30 \(1 of 3 differ.*size="
    with refused(both): ImageFolder(tmp_path).train()
    assert by_name(f'folder(path="{tmp_path}", size=4)').shape == (3, 4, 4)
    write(tmp_path / 'same', '1.png 2.png', size=(6, 6))
    assert ImageFolder(tmp_path / 'same', size=6).digest == ImageFolder(tmp_path / 'same').digest
    for bad in (0, 2.5, 'big', True, 5000):
        with refused('size must be', (ValueError, TypeError)): ImageFolder(tmp_path, size=bad)


def test_lossy_copies_say_so(tmp_path):
    write(tmp_path, 'a/1.png a/2.png b/1.png b/2.jpg c/1.webp c/2.webp')
    shutil.copytree(tmp_path / 'b', tmp_path / 'd')
    (tmp_path / 'd/2.jpg').rename(tmp_path / 'd/2.png')   # the content counts, not the name
    assert [ImageFolder(tmp_path / f).lossy for f in 'abcd'] == [False, True, True, True]


@pytest.mark.parametrize('mode', ['P', 'RGBA', 'LA', '1', 'I;16', 'CMYK'])
def test_modes_that_are_neither_grey_nor_colour(tmp_path, mode):
    name = '0.jpg' if mode == 'CMYK' else '0.png'
    for file in (name, name.replace('0', '1')): Image.new(mode, (8, 8)).save(tmp_path / file)
    with refused(rf"{name}' has mode '{mode}'; images must have one of 'L', 'RGB'.*convert"):
        ImageFolder(tmp_path).train()
    write(tmp_path / 'more', name)
    shutil.copy(tmp_path / name, tmp_path / 'more' / name.replace('0', '1'))
    with refused(f"mode 'RGB', 8×6, and .* has mode '{mode}', 8×8.*one mode"):
        ImageFolder(tmp_path / 'more', size=4).train()


def test_sixteen_bits_a_channel_are_not_cut_to_eight(tmp_path):
    "PIL would open it as RGB and drop the lower bytes without a word."
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    pixels = zlib.compress((b'\0' + bytes(range(12))) * 2)
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0))
    png = b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', pixels) + chunk(b'IEND', b'')
    for name in ('1.png', '2.png'): (tmp_path / name).write_bytes(png)
    assert Image.open(tmp_path / '1.png').mode == 'RGB'
    with refused("has mode 'RGB;16'"): ImageFolder(tmp_path).train()


@pytest.mark.parametrize('ending', ['png', 'jpg', 'bmp', 'tif', 'webp'])
def test_damaged_files_are_named_and_counted(tmp_path, ending):
    write(tmp_path, ' '.join(f'{i}.{ending}' for i in range(6)), size=(32, 32))
    for i in (2, 4):
        whole = (tmp_path / f'{i}.{ending}').read_bytes()
        (tmp_path / f'{i}.{ending}').write_bytes(whole[:len(whole) * 2 // 3])
    with refused(rf"2 of 6 images cannot be read, such as '.*2\.{ending}'.*Replace or delete"):
        ImageFolder(tmp_path).train()


def test_files_that_are_no_images_at_all(tmp_path):
    write(tmp_path, '3.png 4.png')
    (tmp_path / '1.png').write_bytes(b''), (tmp_path / '2.jpg').write_text('<html>')
    with refused(r"2 of 4 images cannot be read, such as '.*1\.png' \(UnidentifiedImageError"):
        ImageFolder(tmp_path).train()
    for name in ('3.png', '4.png'): (tmp_path / name).write_bytes(b'\0')
    with refused('4 of 4 images cannot be read'): ImageFolder(tmp_path).train()


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
        with unprivileged(), refused(r"1 of 2 images.*2\.png' \(PermissionError"): ImageFolder(folder).train()
        folder.chmod(0o311)
        with unprivileged(), refused(folder.name, PermissionError): ImageFolder(folder)
        folder.chmod(0o755)


@pytest.mark.parametrize('files, message', [
    ('1.png cat/1.png', r"images \(such as '1\.png'\) beside folders \(such as 'cat'\)"),
    ('train/1.png', "folder 'train' but no 'test'"),
    ('train/cat/1.png test/dog/1.png', r"train has \['cat'\], test has \['dog'\]"),
    ('train/cat/1.png test/1.png', r"train has \['cat'\], test has None"),
    ('1.png', 'one image'), ('', 'no images in .*endings'),
    ('cat/1.png dog/', "1 of 2 class folders .*: 'dog'")])
def test_folders_of_a_wrong_form(tmp_path, files, message):
    for name in files.split():
        if name.endswith('/'): (tmp_path / name).mkdir()
        else: write(tmp_path, name)
    with refused(message): ImageFolder(tmp_path)


def test_folders_that_are_none(tmp_path):
    with refused('there is no folder', FileNotFoundError): ImageFolder(tmp_path / 'nothing')
    with refused('is a file', NotADirectoryError): ImageFolder(write(tmp_path, '1.png') / '1.png')
    with refused('needs a path'): by_name('folder')


def test_threads_change_nothing(tmp_path):
    files = sorted(write(tmp_path, ' '.join(f'{i:02}.png' for i in range(40))).iterdir())
    assert decode(files, threads=1)[0].equal(decode(files, threads=7)[0])


# --- pictures

def test_grid_puts_each_image_in_its_place():
    images = torch.arange(5, dtype=u8)[:, None, None, None].expand(5, 3, 2, 3)
    grid = image_grid(images, 2, levels=5)
    assert grid.shape == (8, 7, 3) and grid.dtype == np.uint8
    assert (grid[:2, :3] == 0).all() and (grid[:2, 4:] == 64).all() and (grid[6:, :3] == 255).all()
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all() and (grid[6:, 4:] == 255).all()   # no image
    assert image_grid(images[:, :1], 5, 5, gap=0).shape == (2, 15)


def test_wrong_input_of_the_grid():
    for shape in ((2, 2, 4, 4), (4, 4), (0, 1, 4, 4)):
        with refused(r'shape \(n, 1 or 3, H, W\)'): image_grid(torch.zeros(shape, dtype=u8), 2)
    with refused('columns must be'): image_grid(torch.zeros(2, 1, 4, 4, dtype=u8), 0)
    with refused('uint8', TypeError): image_grid(torch.zeros(2, 1, 4, 4), 2)
