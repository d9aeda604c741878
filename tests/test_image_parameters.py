"Attempts to break lfdm.images.parameters: careless values, images that moved, changed or do not fit."
import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from lfdm.images.parameters import ImageParameters
from lfdm.parameters import RESULTS_VERSION, parameters_from
from photos import TINY, write_images

REFUSED = (ValueError, TypeError)
NAMES = ["dataset", "network", "target", "weighting", "schedule", "sampler", "precision", "device"]
NUMBERS = ["epochs", "batch_size", "lr", "seed", "sample_steps", "n_samples", "judged", "warmup", "ema",
           "clip", "logsnr_min", "logsnr_max"]
NOTHING = [math.nan, math.inf, -math.inf, "true", "ten", "", [1], {}, (1,), True, 1j, b"1", 10**400, -1e300]
WORDS = [None, 3, 1.5, True, ["eps"], {}, "small(", "digits(n=3)", "v(k=3)", "()", '__import__("os")', "cuda",
         "cuda:0", "mps:1", "Digits"]
CONTENT = [0, 3, True, ["x"], b"x", "1x16x16", "0x16x16, 17 values, 3d019220", "16x16, 17 values, 3d019220",
           "1x16x16, 17 values, 3d01922", "1x16x16, x values, 3d019220"]
OTHER = dict(target="v", weighting="nelbo", schedule="linear", logsnr_min=-9, logsnr_max=9, epochs=4,
             batch_size=63, lr=1e-3, seed=1, sampler="ddim", sample_steps=6, n_samples=51,
             dataset="templates", judged=9, network="small(width=4)", ema=None, clip=2, warmup=10, flip=True,
             precision="bf16", compiled=True)
few = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def photos(tmp_path_factory): return write_images(tmp_path_factory.mktemp("images") / "photos")


# ---- one wrong field

@few
@given(st.sampled_from(NUMBERS), st.sampled_from(NOTHING))
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(REFUSED, match=name): ImageParameters(**{name: value})


@few
@given(st.sampled_from(NAMES), st.text(max_size=6) | st.sampled_from(WORDS))
def test_unknown_words_are_refused_by_name(name, value):
    if name == "device" and (torch.cuda.is_available() or torch.backends.mps.is_available()): return
    with pytest.raises(REFUSED) as e: ImageParameters(**{name: value})
    assert name in str(e.value) or repr(value).strip("'\"") in str(e.value)


@few
@given(st.sampled_from(["flip", "compiled"]), st.none() | st.integers() | st.floats() | st.text(max_size=5))
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be True or False"): ImageParameters(**{name: value})


@few
@given(st.text(max_size=30) | st.sampled_from(CONTENT))
def test_the_content_is_not_chosen(value):
    with pytest.raises(REFUSED, match="^content "): ImageParameters(content=value)


@pytest.mark.parametrize("bad, message", [
    (dict(device="cuda"), "unknown device 'cuda'. .*Valid: 'cpu'"),
    (dict(precision="fp16"), "unknown precision 'fp16'. .*'float32', 'bf16'"),
    (dict(dataset="digit"), "Did you mean 'digits'"), (dict(network="smal"), "Did you mean 'small'"),
    (dict(network="small(widht=8)"), "Did you mean 'width'"),
    (dict(batch_size=1501), "batch_size 1501 is larger than the data: 1500 training images"),
    (dict(network="small(width=0)"), "width must be at least"),
    (dict(network="small(width=1e12)"), "cannot be built"), (dict(judged=1), "judged must be from 2"),
    (dict(n_samples=1), "n_samples must be from 2"), (dict(path=3), "path must"),
    (dict(dataset="folder"), "needs a path"), (dict(width=3), "width"),
    (dict(logsnr_min=5, logsnr_max=5), "logsnr_min must be below")], ids=str)
def test_what_a_careless_user_gives(bad, message):
    if "device" in bad and torch.cuda.is_available(): pytest.skip("there is one")
    with pytest.raises(REFUSED, match=message): ImageParameters(**bad)


def test_parameters_of_images_are_told_from_points():
    with pytest.raises(ValueError, match="unknown parameter 'network'"):
        parameters_from(dict(network="small"))
    with pytest.raises(ValueError, match="unknown parameter 'width'"):
        parameters_from(dict(width=8), ImageParameters)


# ---- names

@pytest.mark.parametrize("name, other", OTHER.items())
def test_every_parameter_is_in_the_name(name, other):
    assert set(OTHER) | {"device", "path", "content"} == set(ImageParameters.__dataclass_fields__)
    assert ImageParameters(**{name: other}).slug() != ImageParameters().slug()


def test_names_stay_what_they_are():
    if RESULTS_VERSION != 2: pytest.skip("the names of results version 2")
    p = ImageParameters(content="1x16x16, 17 values, 3d019220")
    assert p.slug() == "digits-eps-weighted-cosine-s0-c0cf4dd1"


# ---- the images decide

def test_the_place_of_the_images_is_no_part_of_a_run(photos, tmp_path):
    there = ImageParameters(**TINY, path=photos)
    moved = ImageParameters(**TINY, path=shutil.copytree(photos, tmp_path / "elsewhere"))
    assert moved.slug() == there.slug() and moved == there and isinstance(moved.path, str)


def test_images_that_changed_are_another_run(photos, tmp_path):
    path = shutil.copytree(photos, tmp_path / "changed")
    write_images(path, 1, seed=1)
    before, after = (ImageParameters(**TINY, path=p) for p in (photos, path))
    assert after.slug() != before.slug() and after.content[:-8] == before.content[:-8]


def test_lossy_files_are_called_so(tmp_path):
    (tmp_path / "jpg").mkdir()
    for f in Path(write_images(tmp_path / "png", 20)).iterdir():
        Image.open(f).save(tmp_path / "jpg" / f"{f.stem}.jpg")
    p = ImageParameters(**TINY | dict(batch_size=4), path=tmp_path / "jpg")
    assert p.content.endswith(", compressed with loss") and p.shape == (3, 8, 8) and p.levels == 256
    assert dataclasses.replace(p, path=None) == p


def test_sizes_that_do_not_fit_are_refused_at_once(tmp_path):
    path = write_images(tmp_path / "mixed")
    write_images(tmp_path / "mixed", 1, size=16, first=60)
    with pytest.raises(ValueError, match="8.*16|16.*8"): ImageParameters(**TINY, path=path)
    assert ImageParameters(**TINY | dict(dataset="folder(size=8)"), path=path).shape == (3, 8, 8)
    odd = write_images(tmp_path / "odd", size=10)
    with pytest.raises(ValueError, match="10.*halv.*nearest sizes: 8.*12"): ImageParameters(**TINY, path=odd)
