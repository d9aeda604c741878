"Saved figures: the same bytes every time, what made them inside, and each scale where it belongs."
import subprocess
import sys

import pytest
from PIL import Image

from lfdm.folders import SCALES
from lfdm.plots import figure_record, keep, plt, save_figure
from tree import ROOT, files

PARAMETERS = {"set": "ring", "points": 300, "levels": [1.5, "inf"], "why": "<λ> & ‘more’", "none": None}
DRAW = f"""if True:
    import sys
    import matplotlib
    matplotlib.use("agg")
    import torch
    from lfdm.plots import plt, save_figure, scatter, use_style
    above = "lfdm.runs", "lfdm.studies", "lfdm.training"
    assert not [name for name in above if name in sys.modules], "plots need no runs"
    from lfdm.data import DATASETS
    from lfdm.schedules import SCHEDULES
    use_style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(4, 2))
    scatter(left, DATASETS["ring"]().sample(300), title="λ = 2")
    t = torch.linspace(0, 1, 50)
    right.plot(t, SCHEDULES["cosine"]().logsnr(t), label="$z_1$"); right.legend()
    right.fill_between(t, t, alpha=0.3)
    for folder in sys.argv[1:]: save_figure(fig, "fig-test", {PARAMETERS!r}, folder)
"""
FORMS = pytest.mark.parametrize("form", ["png", "svg"])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    "A figure with a scatter, saved twice by one process and once by another: three folders."
    folders = [tmp_path_factory.mktemp("figures") for _ in range(3)]
    for group in (folders[:2], folders[2:]):
        command = [sys.executable, "-c", DRAW, *map(str, group)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def fig():
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    yield figure
    plt.close(figure)


@FORMS
def test_the_same_bytes_every_time_and_what_made_them(drawn, form):
    first, again, other = ((folder / f"fig-test.{form}").read_bytes() for folder in drawn)
    assert first == again, "the second saving of a figure differs from the first"
    assert first == other, "another process writes other bytes"
    for word in (b"Matplotlib", b"Software", b"dc:date", b"Creator"): assert word not in first
    read = figure_record(drawn[0] / f"fig-test.{form}")
    assert read == {"figure": "fig-test", "scale": "full", "parameters": PARAMETERS}


def test_points_and_letters_in_the_files(drawn):
    text = (drawn[0] / "fig-test.svg").read_text(encoding="utf-8")
    assert text.count("<image") == 1 and "<text" not in text, "points are one image, letters are outlines"
    with Image.open(drawn[0] / "fig-test.png") as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255), "the palette keeps white"


def test_scales_have_their_own_files(fig, tmp_path, monkeypatch):
    names = [path.name for scale in SCALES for path in save_figure(fig, "a", {}, tmp_path, scale)]
    assert names == ["a.png", "a.svg", "a-quick.png", "a-quick.svg", "a-smoke.png", "a-smoke.svg"]
    assert figure_record(tmp_path / "a-quick.png")["scale"] == "quick"
    again, _ = save_figure(fig, "a", {}, tmp_path / "b", "quick")
    assert (tmp_path / "a-quick.png").read_bytes() == again.read_bytes(), "the scale was written in twice"
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    assert all(path.is_relative_to(tmp_path) for path in save_figure(fig, "a", {}, scale="smoke"))


def test_what_a_study_keeps_of_a_figure(fig, tmp_path):
    keep(fig, "a", {"seeds": 3, "n": 1}, "quick", "one seed", tmp_path, n=2)
    assert figure_record(tmp_path / "a-quick.svg")["parameters"] == {"seeds": 3, "n": 2}
    assert not plt.fignum_exists(fig.number) and fig.texts[0].get_text() == " quick: one seed"


@pytest.mark.parametrize("name, parameters, scale, error, said", [
    ("a", {}, "smok", ValueError, "Did you mean 'smoke'?"), ("../a", {}, "full", ValueError, "'../a'"),
    ("a.png", {}, "full", ValueError, "'a.png'"), ("", {}, "full", ValueError, "''"),
    (3, {}, "full", TypeError, "name must be a str"), ("a", {"fig": object()}, "full", TypeError, "JSON"),
    ("a", {"k": float("nan")}, "full", ValueError, "JSON"), ("a", [1], "full", TypeError, "dict")])
@pytest.mark.parametrize("given", [True, False])
def test_bad_input_writes_nothing(fig, tmp_path, monkeypatch, name, parameters, scale, error, said, given):
    monkeypatch.setenv("LFDM_RUNS", str(tmp_path))
    before = sorted((ROOT / "figures").iterdir())
    with pytest.raises(error) as e:
        save_figure(fig, name, parameters, tmp_path / "new" if given else None, scale)
    assert said in str(e.value) and not list(tmp_path.iterdir())
    assert sorted((ROOT / "figures").iterdir()) == before


@FORMS
def test_a_foreign_file_is_named(fig, tmp_path, form):
    fig.savefig(tmp_path / f"foreign.{form}")
    with pytest.raises(ValueError, match=f"foreign.{form} does not say how it was made"):
        figure_record(tmp_path / f"foreign.{form}")


def test_committed_figures_are_small_and_say_how_they_were_made():
    for path in (p for p in files() if p.parent.name == "figures" and p.name.startswith("fig-")):
        assert path.stat().st_size < 550_000, f"{path.name}: {path.stat().st_size:,} bytes"
        assert figure_record(path)["figure"] == path.stem.removesuffix("-quick")
        assert not path.stem.endswith("-smoke")
