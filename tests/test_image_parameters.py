"Attempts to break lfdm.images.parameters: careless values, images that moved, changed or do not fit."
import dataclasses
import os
import shutil

import pytest

from lfdm.images.parameters import ImageParameters, image_set
from lfdm.parameters import parameters_from
from photos import TINY, numbered, write

OTHER = dict(target="v", weighting="nelbo", error="huber", schedule="linear", logsnr_min=-9, logsnr_max=9,
             epochs=4, batch_size=63, lr=1e-3, seed=1, sampler="ddim", sample_steps=6, n_samples=51,
             dataset="templates", judged=9, network="small(width=4)", ema=None, clip=2, warmup=10, cooldown=9,
             flip=True, precision="bf16", compiled=True)


@pytest.mark.parametrize("content", [
    "0x16x16, 17 values, 3d019220", "16x16, 17 values, 3d019220", "1x16x16, 17 values, 3d01922",
    "1x16x16, x values, 3d019220"])
def test_images_cannot_be_described_by_hand(content):
    with pytest.raises(ValueError, match="content is found"): ImageParameters(content=content)


@pytest.mark.parametrize("bad, message", [
    (dict(device="cuda:9"), "unknown device.* 'cuda:9'. *Valid: 'cpu'"),
    (dict(network="small(widht=8)"), "'width'"), (dict(network="small("), "network"),
    (dict(batch_size=1501), "batch_size 1501 is larger than the data: 1500 training images"),
    (dict(judged=1), "judged must be from 2"), (dict(dataset="folder"), "needs a path"),
    (dict(path="/nowhere"), "path='/nowhere'.* the images of dataset 'digits'.* lie in no folder"),
    (dict(dataset="folder(path='a')", path="b"), "'b'.* beside .*'a'.*: give one of them"),
    (dict(dataset="folder", path=""), "path must name a folder"),
    (dict(dataset="templates(n_train=1, n_test=4)"), "too few training images .*: 1, and at least 4"),
    (dict(dataset="templates(n_train=4, n_test=1)"), "too few test images .*: 1, and at least 2"),
    (dict(logsnr_min=5, logsnr_max=5), "logsnr_min must be below")])
def test_what_a_careless_user_gives(bad, message):
    with pytest.raises((ValueError, TypeError), match=message): parameters_from(bad, ImageParameters)


# ---- names

def test_every_parameter_is_in_the_name():
    assert set(OTHER) | {"device", "path", "content"} == set(ImageParameters.__dataclass_fields__)
    names = {ImageParameters(**{name: other}).slug() for name, other in OTHER.items()}
    assert len(names | {ImageParameters().slug()}) == len(OTHER) + 1


def test_the_images_are_in_the_name_and_their_place_is_not(tmp_path):
    here, there = write(tmp_path / "here", numbered()), tmp_path / "there"
    p, moved = (ImageParameters(**TINY, path=path) for path in (here, shutil.copytree(here, there)))
    assert moved.slug() == p.slug() and moved == p and isinstance(moved.path, str)
    other = ImageParameters(**TINY, path=write(shutil.copytree(here, tmp_path / "other"), "000.png", seed=1))
    assert other.slug() != p.slug() and other.content[:-8] == p.content[:-8]
    jpg = ImageParameters(**TINY, path=write(tmp_path / "jpg", numbered().replace("png", "jpg")))
    assert jpg.content.endswith(", compressed with loss") and jpg.shape == (3, 8, 8) and jpg.levels == 256
    assert dataclasses.replace(jpg, path=None) == jpg


def test_images_that_change_are_seen_as_changed(tmp_path, monkeypatch):
    folder = write(tmp_path / "photos", numbered())
    p = lambda path=folder: ImageParameters(**TINY, path=path)
    seen = [p()]
    def now_another(): seen.append(p()); assert len({q.slug() for q in seen}) == len(seen)
    assert image_set("folder", folder) is image_set("folder", str(folder))
    times = os.stat(folder / "000.png")
    write(folder, "000.png", seed=1), os.utime(folder / "000.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    now_another()   # of one size and with its old time
    write(folder, "060.png", seed=2)
    now_another()
    (folder / "000.png").unlink()
    now_another()
    write(tmp_path / "elsewhere/photos", numbered(), seed=4)   # one relative path, two places
    for here in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(here)
        seen.append(p("photos"))
    assert seen[-1] != seen[-2] == seen[-3]


def test_sizes_that_do_not_fit_are_refused_at_once(tmp_path):
    mixed, odd = write(tmp_path / "mixed", numbered()), write(tmp_path / "odd", "1.png 2.png", (10, 10))
    write(mixed, "060.png", size=(16, 16))
    with pytest.raises(ValueError, match="8×8.*16×16"): ImageParameters(**TINY, path=mixed)
    assert ImageParameters(**TINY | dict(dataset="folder(size=8)"), path=mixed).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="10.*halv.*nearest sizes: 8.*12"):
        ImageParameters(dataset="folder", path=odd)
