"Attempts to break nbs/train.ipynb: run from elsewhere, with misspelt and wrong parameters."
import os
import re
import shlex
import subprocess

import pytest

from lfdm.parameters import Parameters
from lfdm.runs import FILES, load_run
from tree import ROOT, cells

papermill = pytest.importorskip("papermill")
from papermill.cli import _resolve_type  # noqa: E402
from papermill.parameterize import parameterize_notebook  # noqa: E402

NOTEBOOK = ROOT / "nbs/train.ipynb"
SMALL = dict(dataset="cluster", epochs=1, width=8, n_samples=200, sample_steps=4)


def listing(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_the_command_of_its_first_lines_from_another_folder(tmp_path, python):
    "the run is whole and where the last cell says, each cell shows what it should, papermill is content"
    before = listing(ROOT / "runs")
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    given = [str(word) for k, v in SMALL.items() for word in ("-p", k, v)]
    command = [python, "-m", "papermill", NOTEBOOK, "out.ipynb", "--no-progress-bar", *given]
    done = subprocess.run(command, cwd=tmp_path, env=env | {"LFDM_RUNS": str(tmp_path / "runs")},
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert listing(ROOT / "runs") == before, "the repository was written to"
    for word in ("Unable to parse", "unknown parameter", "Traceback", "No cell with tag", "Warning: "):
        assert word not in done.stderr, done.stderr
    run, = (tmp_path / "runs/train").iterdir()
    assert set(os.listdir(run)) == set(FILES) and load_run(run).parameters == Parameters(**SMALL)
    assert set(os.listdir(tmp_path)) == {"runs", "out.ipynb"}
    outputs = [o for _, cell in cells(tmp_path / "out.ipynb", "code") for o in cell["outputs"]]
    data = [o.get("data", {}) | {"text": o.get("text", "")} for o in outputs]
    text = "\n".join("".join(d.get(k, "")) for d in data for k in ("text", "text/plain", "text/markdown"))
    assert sum("image/png" in d for d in data) == 6
    assert "exact denoiser" in text and "against the exact prediction" in text
    assert "epochs=1" in text and "| floor |" in text and "nan" not in text.lower()
    printed = re.findall(r"\S*/cluster-eps-weighted-cosine-s0-\w{8}\b", text)
    assert printed and all((tmp_path / p).samefile(run) for p in printed)


def test_the_parameters_tag_is_there_once():
    code = cells(NOTEBOOK, "code")
    source, = [source for source, cell in code if "parameters" in cell["metadata"].get("tags", [])]
    given = {}
    exec(source, given)
    del given["__builtins__"]
    assert given.pop("study") == "train"
    assert Parameters(**given) == Parameters() and set(given) == set(Parameters.__dataclass_fields__)


# ---- what papermill makes of the command line, run up to the check of the parameters

def begin(options):
    "The notebook's first cells (names, check) with papermill's own conversions, without a kernel."
    words = shlex.split(options)
    given = {k: _resolve_type(v) for _, k, v in zip(*[iter(words)] * 3)}
    notebook = parameterize_notebook(papermill.iorw.load_notebook_node(str(NOTEBOOK)), given)
    code = [c.source for c in notebook.cells if c.cell_type == "code"]
    check = next(i for i, c in enumerate(code) if "parameters_from(" in c)
    assert not any("make_run" in c for c in code[:check + 1]) and check <= 3 + bool(given)
    space = {"__name__": "__main__", "In": [""], "Out": {}, "_ih": [""], "exit": exit,
             "get_ipython": lambda: None}
    for source in code[:check + 1]: exec(source, space)
    return space["parameters"]


@pytest.mark.parametrize("options, expected", [
    ("-p target v -p n_samples 1_000", dict(target="v", n_samples=1000)),
    ("-p epochs 1e1 -p lr 1", dict(epochs=10, lr=1.)),
    ("-p logsnr_min None -p logsnr_max 5", dict(logsnr_max=5.)), ("", {})])
def test_what_a_user_types(options, expected): assert begin(options) == Parameters(**expected)


@pytest.mark.parametrize("options, message", [
    ("-p Target v", "unknown parameter 'Target'. Did you mean 'target'"),
    ("-p study ../x", "study must be a plain folder name, not '../x'"),
    ("-p target true", "unknown target"),
    ("-p sampler None", "unknown sampler None"),
    ("-p epochs true", "epochs must"),
    ("-p seed 1e400", "seed must")])
def test_what_a_careless_user_types(options, message):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(message)): begin(options)
