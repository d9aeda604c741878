"Attempts to break lfdm.images.data: ends of cells, damaged files, folders of every wrong form."
import contextlib
import hashlib
import os
import pickle
import re
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import lfdm.images  # noqa: F401  all sets join IMAGES
from lfdm.core import from_spec
from lfdm.images import data
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
)
from photos import numbered, write
from tree import ROOT, files

torch.set_num_threads(1)
u8 = torch.uint8
by_name = lambda spec: from_spec(IMAGES, spec, 'image set')
refused = lambda match, error=(ValueError, TypeError, OSError): pytest.raises(error, match=match)


# --- bytes and densities

def test_bytes_come_back_from_the_ends_of_their_cells():
    b = torch.arange(255, dtype=u8)
    for x in (scaled(b, 255), *(dequantize(b, 255, u=torch.full((255,), u)) for u in (0., 1.))):
        assert x.dtype == torch.float32 and x.abs().max() < 1
        assert quantize(x, 255).equal(b) and quantize(x.double(), 255).equal(b)
    assert quantize(torch.tensor([-9., 9., 1., -1.]), 17).tolist() == [0, 16, 16, 0]


def test_the_place_in_the_cell_is_uniform_and_reproducible():
    n = 40_000
    draw = lambda seed: dequantize(torch.full((n,), 200, dtype=u8), 256, torch.Generator().manual_seed(seed))
    u = (draw(0).double() + 1) * 128 - 200
    assert draw(0).equal(draw(0)) and not draw(0).equal(draw(1))
    assert (u.sort().values - torch.linspace(0, 1, n)).abs().max() < 2 / n**.5   # Kolmogorov, Smirnov


GOOD = torch.full((4, 3, 8, 8), 16, dtype=u8)
WRONG = [   # (what, its arguments, what is said)
    *((f, (GOOD, 16), 'values up to 15, not 16') for f in (dequantize, scaled)),
    (quantize, (torch.tensor([0., -float('inf')]), 256), 'not finite'),
    *((require_images, ('pictures', x, *more), 'pictures.*' + said) for x, more, said in (
        (GOOD[0], (), 'shape'), (GOOD[..., :0], (), 'shape'), (GOOD[:3], (256, 4), 'too few'),
        (GOOD[:, :2], (256, 1, (1, 3)), '1 or 3'), (GOOD, (2,), '2 levels'),
        (GOOD.float(), (), 'quantize'))),
    *((image_grid, (GOOD.new_zeros(shape), 2), 'shape') for shape in ((2, 2, 4, 4), (0, 1, 4, 4)))]


@pytest.mark.parametrize('f, arguments, said', WRONG)
def test_wrong_input(f, arguments, said):
    with refused(said): f(*arguments)


def test_grid_puts_each_image_in_its_place():
    images = torch.arange(5, dtype=u8)[:, None, None, None].expand(5, 3, 2, 3)
    grid = image_grid(images, 2, levels=5)
    assert grid.shape == (8, 7, 3) and grid.dtype == np.uint8
    assert (grid[:2, :3] == 0).all() and (grid[:2, 4:] == 64).all() and (grid[6:, :3] == 255).all()
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all() and (grid[6:, 4:] == 255).all()   # no image
    assert image_grid(images[:, :1], 5, 5, gap=0).shape == (2, 15)


# --- sets

def test_digits_do_not_depend_on_the_seed_of_a_run():
    torch.manual_seed(5)
    d = Digits()
    assert d.train() is d.train() and d.train()[:, :, :4].max() == 0 and d.train().max() == 16
    content = d.train().numpy().tobytes() + d.test().numpy().tobytes()
    assert hashlib.sha256(content).hexdigest()[:8] == d.digest == '3d019220'


def test_a_set_of_ones_own_is_checked():
    class Own(ImageSet):
        name, levels = 'own', 4
        def __init__(self, top): self.top = top
        def load(self):
            return {s: (torch.full((2, 1, 2, 2), self.top, dtype=u8), None) for s in ('train', 'test')}
    assert Own(3).shape == (1, 2, 2) and Own(3).dims == 4 and Own(3).labels() is None
    with refused('values up to 3, not 4'): Own(4).train()
    with refused('no load', NotImplementedError): ImageSet().train()


# --- CIFAR-10

@pytest.fixture
def cifar(tmp_path, monkeypatch):
    "A folder in the official format with 4 images a file, and torchvision told its MD5 sums."
    from torchvision import datasets
    folder, md5, rng = tmp_path / 'data' / 'cifar-10-batches-py', {}, np.random.default_rng(0)
    folder.mkdir(parents=True)
    def pickled(name, **content):
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    for name in [*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']:
        pickled(name, data=rng.integers(0, 256, (4, 3072), np.uint8), labels=rng.integers(0, 10, 4).tolist())
    pickled('batches.meta', label_names=list('abcdefghij'))
    for which in ('train_list', 'test_list'):
        listed = [[name, md5[name]] for name, _ in getattr(datasets.CIFAR10, which)]
        monkeypatch.setattr(datasets.CIFAR10, which, listed)
    monkeypatch.setattr(datasets.CIFAR10, 'meta', datasets.CIFAR10.meta | {'md5': md5['batches.meta']})
    monkeypatch.setenv('LFDM_DATA', str(tmp_path / 'nothing'))
    return folder


def test_cifar_is_found_in_every_way(cifar, monkeypatch, tmp_path):
    renamed = shutil.copytree(cifar, tmp_path / 'renamed')
    sets = [CIFAR10(cifar.parent), CIFAR10(str(cifar)), by_name(f'cifar10(path="{cifar.parent}")'),
            CIFAR10(renamed)]
    monkeypatch.setenv('LFDM_DATA', str(cifar.parent))
    sets.append(CIFAR10())
    monkeypatch.delenv('LFDM_DATA')
    (tmp_path / 'settings.ini').write_text('lib_name = lfdm\n')
    monkeypatch.chdir(tmp_path)
    sets.append(CIFAR10())
    raw = pickle.loads((cifar / 'data_batch_2').read_bytes())
    for s in sets:
        assert s.train().shape == (20, 3, 32, 32) and s.n_test == 4 and s.digest == sets[0].digest
        assert s.train().is_contiguous() and s.train()[4:8].numpy().tobytes() == raw['data'].tobytes()
        assert s.labels()[4:8].tolist() == raw['labels']


def test_cifar_that_is_missing_or_damaged(cifar, monkeypatch):
    with refused(r"no CIFAR-10 in .*nothing.*path='the folder.*CIFAR10\.download\(\)"): CIFAR10()
    with refused(r"CIFAR10\.download\('elsewhere'\)", FileNotFoundError): CIFAR10('elsewhere')
    (cifar / 'data_batch_3').write_bytes((cifar / 'data_batch_3').read_bytes()[:1000])
    (cifar / 'test_batch').unlink()
    # a pickle can run anything: what is not official is not opened
    monkeypatch.setattr(pickle, 'load', lambda *a, **k: pytest.fail('unpickled'))
    with refused(r'not whole: data_batch_3 \(damaged\), test_batch \(missing\)'): CIFAR10(cifar).train()


def test_download_only_when_asked(cifar, monkeypatch, tmp_path):
    from torchvision import datasets
    fetch = lambda url, root, filename, md5: shutil.copytree(cifar, Path(root) / cifar.name)
    monkeypatch.setattr(datasets.cifar, 'download_and_extract_archive', fetch)
    with refused('no CIFAR-10'): CIFAR10(tmp_path / 'new')
    assert CIFAR10.download(tmp_path / 'new').n_test == 4


# --- folders

def test_four_forms_of_a_folder(tmp_path):
    pixels = lambda name: torch.from_numpy(np.array(Image.open(tmp_path / name))).permute(2, 0, 1)
    write(tmp_path, 'a/train/x/2.png a/train/x/1.png a/train/y/1.png a/test/x/9.png a/test/y/9.png', (8, 6))
    write(tmp_path, 'b/train/2.png b/train/1.png b/test/1.png')
    a, b = ImageFolder(tmp_path / 'a'), ImageFolder(str(tmp_path / 'b'))
    assert a.train().equal(torch.stack([pixels(f'a/train/{n}.png') for n in ('x/1', 'x/2', 'y/1')]))
    assert a.labels().tolist() == [0, 0, 1] and a.labels('test').tolist() == [0, 1] and not a.lossy
    assert a.shape == (3, 6, 8) and a.n_test == a.classes == 2 and a.class_names == ['x', 'y']
    assert b.train()[1].equal(pixels('b/train/2.png')) and b.labels() is None and b.classes is None
    write(tmp_path, ' '.join(f'c/{c}/{i}.png' for c in 'xy' for i in range(12)), seed=1)
    for name in ('README.md', 'x/Thumbs.db', 'x/._1.png'): (tmp_path / 'c' / name).write_text('no image')
    write(tmp_path, 'c/.hidden/1.png d/0.png d/1.PNG d/2.png', seed=2)
    c, d = ImageFolder(tmp_path / 'c'), ImageFolder(tmp_path / 'd')
    assert (c.n_train, c.n_test, d.n_train, d.n_test) == (20, 4, 2, 1) and d.labels() is None
    assert c.labels('test').bincount().tolist() == [2, 2]
    assert len(torch.cat([c.train(), c.test()]).flatten(1).unique(dim=0)) == 24
    elsewhere = shutil.copytree(tmp_path / 'c', tmp_path / 'elsewhere')
    assert by_name(f'folder(path="{elsewhere}")').digest == c.digest != d.digest


def test_many_images_are_decoded_once(tmp_path, monkeypatch):
    write(tmp_path / "photos", numbered(3))
    monkeypatch.setenv("LFDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MANY", 3)
    def read():
        images = ImageFolder(tmp_path / "photos")
        return torch.cat([images.train(), images.test()]), images.lossy
    first = read()
    kept, = (tmp_path / "cache" / "folders").iterdir()
    with monkeypatch.context() as no: no.setattr(data, "_first_kind", None); again = read()
    assert torch.equal(first[0], again[0]) and first[1] is again[1] is False
    kept.write_bytes(kept.read_bytes()[:-9])   # damaged: decoded anew
    assert torch.equal(read()[0], first[0])
    write(tmp_path / "photos", "002.png", seed=1)   # changed: decoded anew
    assert not torch.equal(read()[0], first[0])


def test_size_cuts_and_resizes(tmp_path):
    write(tmp_path, '1.png 2.png', (8, 6)), write(tmp_path, '3.png', (20, 30))
    both = r"1\.png' has mode 'RGB', 8×6, and '.*3\.png' has mode 'RGB', 20×30 \(1 of 3 differ.*size="
    with refused(both): ImageFolder(tmp_path).train()
    assert by_name(f'folder(path="{tmp_path}", size=4)').shape == (3, 4, 4)
    same = write(tmp_path / 'same', '1.png 2.png')
    assert ImageFolder(same, size=8).digest == ImageFolder(same).digest


def test_lossy_copies_say_so(tmp_path):
    write(tmp_path, 'a/1.png a/2.png b/1.png b/2.jpg c/1.webp c/2.webp d/1.png d/2.jpg')
    (tmp_path / 'd/2.jpg').rename(tmp_path / 'd/2.png')   # the content counts, not the name
    with Image.open(write(tmp_path, 'e/1.jpg') / 'e/1.jpg') as image:   # phones show the first of two
        image.save(tmp_path / 'e/2.mpo', save_all=True, append_images=[Image.new('RGB', (4, 4))])
    (tmp_path / 'e/2.mpo').rename(tmp_path / 'e/2.jpg')
    assert [ImageFolder(tmp_path / f).lossy for f in 'abcde'] == [False, True, True, True, True]


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(pixels, width, height, bits, colours):
    "A PNG of any kind; no pixels: only its header."
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colours, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(pixels)) + chunk(b'IEND', b'')


DEEP = np.array([[0, 10_000], [20_000, 30_000]])
KINDS = {   # mode that is refused -> (ending, how to write such a file)
    **{mode: ('png', lambda f, mode=mode: Image.new(mode, (2, 2), 1).save(f)) for mode in ('P', '1')},
    'RGBA': ('png', lambda f: Image.new('RGBA', (2, 2)).save(f)),
    'CMYK': ('jpg', lambda f: Image.new('CMYK', (2, 2)).save(f)),
    'I;16': ('png', lambda f: Image.fromarray(DEEP.astype(np.uint16)).save(f)),
    'I': ('tif', lambda f: Image.fromarray(DEEP.astype(np.int32)).save(f)),
    'F': ('tif', lambda f: Image.fromarray(DEEP.astype(np.float32)).save(f)),
    'RGB;16': ('png', lambda f: f.write_bytes(png(b''.join(
        b'\0' + np.repeat(row, 3).astype('>u2').tobytes() for row in DEEP), 2, 2, 16, 2))),
    'RGB with transparency': ('png', lambda f: Image.new('RGB', (2, 2)).save(f, transparency=(0, 0, 0))),
    'RGB in several frames': ('png webp tif', lambda f: Image.new('RGB', (2, 2)).save(
        f, save_all=True, append_images=[Image.new('RGB', (2, 2), 'red')]))}


@pytest.mark.parametrize('mode', KINDS)
def test_modes_that_are_neither_grey_nor_colour(tmp_path, mode):
    "are refused with advice that keeps their values"
    endings, make = KINDS[mode]
    for ending in endings.split():
        folder = write(tmp_path / ending, f'c.{ending}', (2, 2))
        make(folder / f'd.{ending}')
        with refused(rf"d.{ending}' has mode '{mode}' \(1 of 2 images\)"): ImageFolder(folder, size=4).train()
        files = [folder / f'{name}.{ending}' for name in 'ab']
        for file in files: make(file)
        with refused(rf"a.{ending}' has mode '{mode}'; images must have one of 'L'") as e: decode(files)
        if 'frames' in mode: continue
        advice = re.search(r'Image\.[^,]*\(.*\)|image\.convert.*\)', str(e.value))
        for file in files:
            with Image.open(file) as image:
                eval(advice[0] if advice else 'image', dict(globals(), image=image, white=65535)).save(file)
        values = decode(files)[0][1, 0].flatten().tolist()
        if mode[0] in 'IF' or ';16' in mode: assert values == [0, 39, 78, 117]
        if mode == '1': assert values == [255] * 4


@pytest.mark.parametrize('ending', ['png', 'jpg', 'tif', 'webp'])
def test_damaged_files_are_named_and_counted(tmp_path, ending):
    write(tmp_path, ' '.join(f'{i}.{ending}' for i in range(6)), (32, 32))
    for i in (2, 4):
        whole = (tmp_path / f'{i}.{ending}').read_bytes()
        (tmp_path / f'{i}.{ending}').write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / f'5.{ending}').write_bytes(b''), (tmp_path / '6.jpg').write_text('<html>')
    with refused(rf"4 of 7 image files cannot be read, such as '.*2\.{ending}'.*Replace or delete"):
        ImageFolder(tmp_path).train()


@pytest.mark.parametrize('ending', ['png', 'jpg', 'tif', 'webp'])
def test_photos_are_turned_as_viewers_show_them(tmp_path, ending):
    base, exif = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5), Image.Exif()
    plain, turned, read = tmp_path / 'plain', tmp_path / 'turned', lambda f: decode([f])[0][0, 0]
    for folder in (plain, turned): folder.mkdir()
    options = dict(png={}, tif={}, jpg=dict(quality=100), webp=dict(lossless=True))[ending]
    for i in range(1, 10):   # 9 is none
        exif[0x0112] = i
        image = base if ending != 'webp' else base.convert('RGB')
        image.save(plain / f'{i}.{ending}', **options)
        image.save(turned / f'{i}.{ending}', exif=exif, **options)
    x = read(plain / f'1.{ending}')
    shown = [x, x.flip(1), x.rot90(2), x.flip(0), x.T, x.rot90(-1), x.rot90(2).T, x.rot90(1), x]
    for i, y in enumerate(shown, 1): assert read(turned / f'{i}.{ending}').equal(y), i
    with refused(r"8×6, and .* 6×8 \(4 of 9"): ImageFolder(turned).train()


def test_damaged_exif_says_nothing(tmp_path):
    Image.new('L', (8, 6)).save(tmp_path / 'a.jpg', exif=b'Exif\0\0MM\0*\0\0\xff\xff')
    assert decode([tmp_path / 'a.jpg'])[0].shape == (1, 1, 6, 8)


def test_links_are_followed_and_broken_ones_told(tmp_path):
    write(tmp_path, 'set/a/1.png set/b/1.png more/2.png more/deep/3.png cats/4.png')
    (tmp_path / 'set/a/more').symlink_to(tmp_path / 'more')
    (tmp_path / 'set/c').symlink_to(tmp_path / 'cats')
    (tmp_path / 'set/b/5.png').symlink_to(tmp_path / 'cats/4.png')
    found = ImageFolder(tmp_path / 'set').files['all']
    assert [f.name for f in found[0]] == ['1.png', '2.png', '3.png', '1.png', '5.png', '4.png']
    assert found[1] == [*'aaabbc']
    link, gone = tmp_path / 'set/a/circle', tmp_path / 'more/deep/gone'
    for target in (tmp_path, tmp_path / 'set/a'):
        link.symlink_to(target)
        with refused('circle.* leads to a folder that it lies in'): ImageFolder(tmp_path / 'set')
        link.unlink()
    gone.symlink_to(tmp_path / 'nowhere')
    with refused("names in .* lead to no file, such as 'gone"): ImageFolder(tmp_path / 'set')
    gone.unlink()
    os.mkfifo(tmp_path / 'set/a/pipe.png')
    with refused("such as 'pipe.png'"): ImageFolder(tmp_path / 'set')


def test_splits_are_known_in_any_case(tmp_path):
    write(tmp_path, 'Train/x/1.png Train/y/1.png TEST/x/2.png TEST/y/2.png')
    f = ImageFolder(tmp_path)
    assert (f.n_train, f.n_test, f.class_names) == (2, 2, ['x', 'y'])
    write(tmp_path, 'val/x/3.png cover.png')
    with pytest.warns(UserWarning, match='2 images .* lie beside.*cover.png'): ImageFolder(tmp_path)
    write(tmp_path, 'tRAIN/x/1.png')
    with refused("one folder 'train' and one 'test'"): ImageFolder(tmp_path)


def test_what_looks_like_a_split_or_an_image(tmp_path):
    classes = ImageFolder(write(tmp_path / 'vehicles', 'Car/1.png Train/1.png'))
    assert classes.class_names == ['Car', 'Train']
    Image.new('L', (8, 8)).save(tmp_path / 'vehicles/Car/2.gif')
    with pytest.warns(UserWarning, match="1 images in .* format that is not read, such as '2.gif'"):
        assert ImageFolder(tmp_path / 'vehicles').n_train == 1


# --- hostile files

def test_only_the_formats_that_are_promised_are_opened(tmp_path, monkeypatch):
    "and nowhere in this repository without naming them"
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *a, **k: pytest.fail('started a program'))
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.eps')
    (tmp_path / 'a.eps').rename(tmp_path / 'a.png')
    psd = b'8BPS\0\1' + bytes(6) + struct.pack('>HIIHH', 3, 8, 8, 8, 3) + bytes(400)
    (tmp_path / 'b.png').write_bytes(psd)
    with refused(r'2 of 2 image files cannot be read.*none of BMP, JPEG, PNG, TIFF, WEBP'):
        ImageFolder(tmp_path).train()
    for path in files():
        if path.suffix not in ('.py', '.ipynb') or path.parent == ROOT / 'tests': continue
        for call in re.findall(r'Image\.open\(.*', path.read_text()): assert 'formats=' in call, (path, call)


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    header = png(b'', 13_000, 13_000, 8, 2)
    for i in range(400): (tmp_path / f'{i:03}.png').write_bytes(header)
    monkeypatch.setattr(torch, 'empty', lambda shape, **k: torch.zeros(shape, **k) if not np.prod(shape) else
                        pytest.fail('allocated'))
    for size in (None, 8):
        with refused("400 of 400 .*13000×13000 pixels, not from 1"): ImageFolder(tmp_path, size).train()
    monkeypatch.setattr(data, 'MOST_BYTES', 100_000)
    many = write(tmp_path / 'many', ' '.join(f'{i}.png' for i in range(10)), (100, 100))
    with refused("10 images of 100×100 pixels take 0.0 GB"): ImageFolder(many).train()
    monkeypatch.undo()
    assert ImageFolder(many, size=4).n_train == 8


@pytest.mark.parametrize('ending', ['png', 'jpg', 'bmp', 'tif', 'webp'])
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_flipped_bytes_are_an_error_or_an_image(ending, data):
    with tempfile.TemporaryDirectory() as place:
        file = write(place, f'a.{ending}', (16, 16)) / f'a.{ending}'
        content = bytearray(file.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        file.write_bytes(content)
        try: assert decode([file])[0].dtype == u8
        except ValueError as e: assert len(str(e)) <= 300


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
        folder = write(place, '1.png 2.png')
        folder.chmod(0o755), (folder / '1.png').chmod(0o644), (folder / '2.png').chmod(0)
        with unprivileged(), refused(r"1 of 2 .*2\.png' \(PermissionError"): ImageFolder(folder).train()
        write(folder, 'deep/cat/dog/3.png'), (folder / 'deep/cat/dog').chmod(0)   # is not passed over
        with unprivileged(), refused('dog', PermissionError): ImageFolder(folder / 'deep')
        (folder / 'deep/cat/dog').chmod(0o755), folder.chmod(0o311)
        with unprivileged(), refused(folder.name, PermissionError): ImageFolder(folder)
        folder.chmod(0o755)


@pytest.mark.parametrize('files, message', [
    ('1.png cat/1.png', r"images \(such as '1\.png'\) beside folders \(such as 'cat'\)"),
    ('train/1.png', "one folder 'train' and one 'test', or class folders, not 'train'"),
    ('training/1.png testing/1.png', "one folder 'train'"), ('Train/1.png val/1.png', "one folder 'train'"),
    ('train/cat/1.png test/dog/1.png', r"train has \['cat'\], test has \['dog'\]"),
    ('1.png', 'one image'), ('', 'no images in .*endings'),
    ('cat/1.png dog/', "1 of 2 class folders .*: 'dog'")])
def test_folders_of_a_wrong_form(tmp_path, files, message):
    for name in files.split(): write(tmp_path, name) if name[-1] != '/' else (tmp_path / name).mkdir()
    with refused(message): ImageFolder(tmp_path)


def test_paths_that_are_no_folder(tmp_path):
    for bad, said in (('/none', 'there is no folder'), ('', 'must name'), ('a\0', 'must name'),
                      (write(tmp_path, '1.png') / '1.png', 'is a file')):
        with refused(said): ImageFolder(bad)
