"Saved figures: the same bytes every time, what made them inside, and each scale where it belongs."
import pytest
import torch
from PIL import Image

from lfdm import plots
from lfdm.data import DATASETS, Cluster, Dataset, Ring
from lfdm.folders import SCALES
from lfdm.parameters import Parameters
from lfdm.plots import (
    exact_report,
    figure_record,
    keep,
    plot_field,
    plot_loss,
    plot_loss_per_logsnr,
    plot_samples,
    plot_sampling,
    plt,
    save_figure,
    scatter,
    use_style,
)
from lfdm.runs import make_run
from tiny import SERVER
from tree import files

PARAMETERS = {"set": "ring", "points": 300, "levels": [1.5, "inf"], "why": "<λ> & ‘more’", "none": None}


def draw(*folders):
    "Save a figure with points, letters and a shade."
    plt.switch_backend("agg")
    with plt.rc_context():
        use_style()
        fig, (left, right) = plt.subplots(1, 2, figsize=(4, 2))
        scatter(left, Ring().sample(300), title="λ = 2")
        right.plot([0, 1], label="$z_1$"), right.legend()
        right.fill_between([0, 1], [0, 1], alpha=0.3)
        for folder in folders: save_figure(fig, "fig-test", PARAMETERS, folder)
        plt.close(fig)


@pytest.fixture
def fig():
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    yield figure
    plt.close(figure)


def test_the_same_bytes_every_time_and_what_made_them(tmp_path):
    "saved twice by one process and once by another"
    folders = [tmp_path / name for name in "abc"]
    other = SERVER.Process(target=draw, args=(folders[2],))
    other.start(), draw(*folders[:2]), other.join(90)
    for form in ("png", "svg"):
        first, again, elsewhere = ((folder / f"fig-test.{form}").read_bytes() for folder in folders)
        assert first == again and first == elsewhere
        for word in (b"Matplotlib", b"Software", b"dc:date", b"Creator"): assert word not in first
        read = figure_record(folders[0] / f"fig-test.{form}")
        assert read == {"figure": "fig-test", "scale": "full", "parameters": PARAMETERS}
    text = first.decode()
    assert text.count("<image") == 1 and "<text" not in text, "points are one image, letters are outlines"
    with Image.open(folders[0] / "fig-test.png") as image:
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


@pytest.mark.parametrize("name, parameters, scale, said", [
    ("a", {}, "smok", "'smoke'"), ("../a", {}, "full", "'../a'"), ("a.png", {}, "full", "'a.png'"),
    ("", {}, "full", "''"), (3, {}, "full", "name must"), ("a", {"fig": object()}, "full", "JSON"),
    ("a", {"k": float("nan")}, "full", "JSON"), ("a", [1], "full", "dict")])
def test_bad_input_writes_nothing(fig, tmp_path, name, parameters, scale, said):
    with pytest.raises((TypeError, ValueError), match=said):
        save_figure(fig, name, parameters, tmp_path / "new", scale)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["png", "svg"])
def test_a_foreign_file_is_named(fig, tmp_path, form):
    fig.savefig(tmp_path / f"foreign.{form}")
    with pytest.raises(ValueError, match=f"foreign.{form} does not say how it was made"):
        figure_record(tmp_path / f"foreign.{form}")


def test_committed_figures_are_small_and_say_how_they_were_made():
    for path in (p for p in files() if p.parent.name == "figures" and p.name.startswith("fig-")):
        assert path.stat().st_size < 550_000, f"{path.name}: {path.stat().st_size:,} bytes"
        assert figure_record(path)["figure"] == path.stem.removesuffix("-quick")
        assert not path.stem.endswith("-smoke")


def test_plots_need_no_runs():
    "nor their training: what draws is quick to import"
    needed = {getattr(value, "__module__", "") for value in vars(plots).values()}
    assert not needed & {"lfdm.runs", "lfdm.studies", "lfdm.training"}


# ---- a run's figures

class Plain(Dataset):
    "Samples only: no density, so no floor."
    n_train = n_test = 600
    def draw(self, n, generator): return torch.randn(n, 2, generator=generator, dtype=torch.float64)


RUN_FIGURES = plot_loss, plot_loss_per_logsnr, plot_field, plot_sampling, plot_samples
TINY = dict(epochs=2, width=8, n_samples=60, sample_steps=6, batch_size=200)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    "A cluster of 600 points for training, or a set without density; any parameters."
    root = tmp_path_factory.mktemp("runs")
    sets = {"plain": Plain, "small": type("Small", (Cluster,), {"n_train": 600, "n_test": 600})}
    with pytest.MonkeyPatch.context() as patch:
        for name, cls in sets.items(): patch.setitem(DATASETS, name, cls)
        yield lambda **given: make_run(Parameters(**TINY | {"dataset": "small"} | given), root=root)


@pytest.mark.parametrize("given", [
    {}, {"dataset": "plain"}, {"target": "F(sigma_data=1)", "schedule": "edm_train"}, {"error": "huber"},
    {"schedule": "adaptive", "weighting": "sigmoid"}, {"weighting": "uncertainty"},
    {"schedule": "ddpm", "target": "score"},
    {"logsnr_min": -3, "logsnr_max": 1}], ids=str)
def test_figures_of_any_run(tiny_run, given):
    "the target's colour whatever its options; without a floor there is no line of one"
    run = tiny_run(**given)
    known = "floor" in run.summary
    assert known == (run.dataset.exact and run.parameters.error == "squared")
    for plot in RUN_FIGURES:
        fig = plot(run)
        fig.draw_without_rendering()
        labels = {text for ax in fig.axes for text in ax.get_legend_handles_labels()[1]}
        exact = "exact denoiser, same draws" in labels
        assert exact == (known and plot in (plot_loss, plot_loss_per_logsnr)), plot
        plt.close(fig)


def test_the_exact_line_is_measured_on_the_draws_of_the_test_loss(tiny_run):
    "its own excess is 0, and the network's loss on these draws is the one in the record"
    run = tiny_run()
    exact, last = exact_report(run), run.metrics[-1]
    assert exact["excess"] == 0 and exact["loss"] != run.summary["floor"]
    assert abs(exact["loss"] - run.summary["floor"]) < 4 * exact["loss_se"]
    again = run.task.validation()(run.net)
    assert again["loss"] == pytest.approx(last["loss"], rel=1e-6)
    left, right = plot_loss(run).axes
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(lines["test loss"]) == [m["loss"] for m in run.metrics]
    assert set(lines["exact denoiser, same draws"]) == {exact["loss"]}
    assert right.lines[0].get_ydata()[-1] == pytest.approx(100 * last["excess"] / run.summary["floor"])
    plt.close("all")


def test_the_snapshots_end_in_the_run_s_own_samples(tiny_run):
    run = tiny_run()
    fig = plot_sampling(run, n=60)
    drawn = fig.axes[-1].collections[0].get_offsets()
    level = run.loss.schedule.level(torch.tensor(0.))
    assert abs(drawn * level.scale.item() - run.samples.numpy()).max() < 1e-5
    titles = [ax.get_title() for ax in fig.axes]
    assert titles[0].startswith("step 0,") and titles[-1].startswith("step 6,")
    assert len(set(titles)) == len(titles)
    plt.close("all")


def test_what_is_no_run_is_refused():
    for plot in (*RUN_FIGURES, exact_report):
        with pytest.raises(TypeError, match="run must be a finished run"): plot(3)
