"Attempts to break workflow/Snakefile: killed and failed jobs, grids that are none, a stand-in for SLURM."
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

from lfdm.grids import grid
from lfdm.runs import FILES, beside, folder_of, load_run, make_run
from lfdm.studies import NETWORKS
from lfdm.tasks import kind_of
from tree import ROOT, cells

pytest.importorskip("snakemake")
TINY = dict(dataset="cluster", target=["x", "v"], logsnr_min=-5.1, epochs=2, width=8, batch_size=10_000,
            lr=1e-5, sample_steps=2, n_samples=50)
IMAGES = dict(kind="images", dataset="templates(n_train=20, n_test=4)", network="small(width=4)", epochs=1,
              batch_size=10, n_samples=4, sample_steps=2, judged=2, target=["v"])

WORKFLOW = ROOT / "workflow"

# Runs a submitted job at once, and keeps what it was asked for.
SLURM = dict.fromkeys(("sacctmgr", "sshare", "scontrol", "squeue", "scancel", "sinfo"), "echo mine") | {
    "sbatch": 'printf "%s\\n" "$@" > $SLURM/asked; for last; do :; done; SLURM_JOB_ID=7 bash -c '
              '"${last#--wrap=}" > $SLURM/out 2>&1 && echo "7|COMPLETED" > $SLURM/state '
              '|| echo "7|FAILED" > $SLURM/state; echo 7',
    "sacct": "cat $SLURM/state",
    "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"'}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where Snakemake is called: not in the repository, and with a relative path of the runs."
    folder = tmp_path_factory.mktemp("workflow")
    (folder / "bin").mkdir()
    for name, text in SLURM.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def snakemake(folder, *words):
    "Its exit status and what it said."
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
        "LFDM_RUNS": "runs", "XDG_CACHE_HOME": str(folder / "cache"), "SLURM": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "snakemake", "--snakefile", WORKFLOW / "Snakefile", *words]
    done = subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    return done.returncode, done.stdout + done.stderr


def call(folder, profile, *words, **config):
    "Snakemake with one of the profiles, on a grid."
    (folder / "grid.yaml").write_text(yaml.safe_dump(config))
    how = "--profile", WORKFLOW / f"profiles/{profile}", "--configfile", "grid.yaml"
    return snakemake(folder, *how, *words)


def read(folder, monkeypatch, **config):
    "The Snakefile up to its rules, which is Python: what it makes of a grid, without Snakemake's seconds."
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LFDM_RUNS", "runs")
    workflow = SimpleNamespace(basedir=WORKFLOW, overwrite_configfiles=[True])
    space = dict(workflow=workflow, config=config, WorkflowError=ValueError)
    exec((WORKFLOW / "Snakefile").read_text().partition("\nrule all")[0], space)
    return space


def contents(folder):
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def history(folder):
    """Three cells on this machine's two cores. Another process holds those that Snakemake starts first.

    One of them has a checkpoint. When that is free again, the cluster makes it.
    """
    three = TINY | {"target": ["x", "v", "eps"]}
    good, bad, worse = grid(**three)
    root = folder / "runs"
    def stop(phase, done, total):
        if done == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): make_run(bad, "tiny", root, progress=stop)
    there, other = folder_of(bad, "tiny", root), folder_of(worse, "tiny", root)
    partial = beside(there, "partial")
    before = contents(partial)
    assert "checkpoint.safetensors" in before
    with FileLock(beside(there, "lock")), FileLock(beside(other, "lock")):
        first = call(folder, "local", study="tiny", **three)
    state = contents(folder_of(good, "tiny", root)), there.exists(), before == contents(partial)
    quick = "--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1"
    mine = "--default-resources", "slurm_partition=short", "slurm_account=mine"
    return first, state, call(folder, "slurm", *quick, *mine, study="tiny", **TINY)


def test_a_failed_job_does_not_lose_the_others(history):
    (code, said), (finished, bad_exists, checkpoint_stays), _ = history
    assert code == 1 and said.count("RuntimeError: another process is making this run") == 2, said
    assert said.index("Error in rule train") < said.index("Finished jobid"), "there was nothing left to lose"
    assert set(finished) == set(FILES) and not bad_exists
    assert checkpoint_stays, "the work of a failed job was deleted"


def test_the_cluster_makes_what_is_missing_and_only_that(folder, history):
    _, (finished, *_), (code, said) = history
    good, bad = grid(**TINY)
    assert code == 0, said + (folder / "out").read_text()
    assert contents(folder_of(good, "tiny", folder / "runs")) == finished, "a finished run was made again"
    assert said.count("submitted with SLURM jobid 7") == 1
    asked = (folder / "asked").read_text()
    for words in ("-p\nshort\n", "--cpus-per-task=1", "--mem\n3000\n", "-t\n120\n"): assert words in asked
    for p in (good, bad):
        run = load_run(folder_of(p, "tiny", folder / "runs"))
        assert run.parameters == p, "the command of a job lost a parameter"
        notebook = folder / "runs/tiny/notebooks" / f"{p.slug()}.ipynb"
        outputs = [o for _, cell in cells(notebook, "code") for o in cell["outputs"]]
        assert all(o["output_type"] != "error" for o in outputs)


def test_finished_runs_need_no_job(folder, history):
    "whatever became of the workflow's own files"
    for f in (folder / "runs/tiny/notebooks").iterdir(): f.unlink()
    code, said = call(folder, "slurm", study="tiny", **TINY)
    assert code == 0 and "Nothing to be done" in said, said


def test_a_deleted_run_is_made_again(folder, monkeypatch):
    "though its notebook and its link are still there; and numbers may be words"
    axes = TINY | {"target": ["x"]}
    p, = grid(**axes)
    links = folder / "runs/deleted/notebooks"
    links.mkdir(parents=True)
    link = links / f"{p.slug()}.json"
    link.symlink_to(f"../{p.slug()}/summary.json")
    made = read(folder, monkeypatch, study="deleted", **axes | {"lr": "1e-5", "epochs": ["2"]})
    assert list(made["cells"].values()) == [p] and not link.is_symlink()


@pytest.mark.parametrize("given, message", [
    (dict(tagret=["x"]), "unknown axis 'tagret'. Did you mean 'target'? Valid: 'study', 'dataset', "),
    (dict(dataset=["ring", "rnig"]), "unknown dataset 'rnig'. Did you mean 'ring'? Valid: 'cluster', "),
    (dict(seed=[]), "axis 'seed' of the grid is empty."), (dict(study="empty"), "the grid is empty."),
    (dict(seed=0, study="../x"), "study must be a plain folder name, not '../x' (str)."),
    (dict(kind="image"), "unknown kind of run 'image'. Did you mean 'images'?"),
    (dict(kind="images", dataset="folder", path="nowhere"), "there is no folder 'nowhere'"),
    (dict(kind="images", seed=0, also=[dict(content="x")]), "unknown axis 'content'."),
    (dict(seed=0, also="x"), "also must be a list of axes")])
def test_a_bad_grid_is_refused_before_any_job(folder, monkeypatch, given, message):
    with pytest.raises(ValueError, match=re.escape(message)): read(folder, monkeypatch, **given)


def test_a_bad_grid_is_refused_in_a_few_lines(folder):
    code, said = call(folder, "local", studdy="x")
    assert code == 1 and "unknown axis 'studdy'. Did you mean 'study'?" in said and len(said.splitlines()) < 8


def test_the_thesis_grid_is_that_of_its_study():
    "so that the study finds the runs"
    axes = yaml.safe_load((WORKFLOW / "thesis.yaml").read_text())
    assert axes.pop("study") == "thesis"
    code = [s for s, _ in cells(ROOT / "nbs/experiments/thesis_runs.ipynb", "code")]
    space = dict(scale="full", NETWORKS=NETWORKS, grid=grid, Markdown=str,
                 lookup=lambda registry, name, kind: registry[name])
    exec(next(s for s in code if "parameters = grid(" in s), space)
    assert set(space["parameters"]) == set(grid(**axes)) and len(grid(**axes)) == 96


# ---- a grid of images

def test_a_grid_of_images_is_made(folder):
    "by the notebook of images, though content and options are no plain words"
    p, = grid(kind_of("images"), **{k: v for k, v in IMAGES.items() if k != "kind"})
    code, said = call(folder, "local", **IMAGES)
    logs = (folder / "runs/train_images/notebooks").glob("*.log")
    assert code == 0, said + "".join(f.read_text() for f in logs)
    for words in ("gpu=0", "mem_mb=8000", "runtime=1440"): assert words in said
    assert load_run(folder_of(p, "train_images", folder / "runs")).parameters == p


def test_further_cells_of_a_grid_of_images(folder, monkeypatch):
    further = [dict(target="v", weighting="sigmoid", seed="1")]
    made = read(folder, monkeypatch, kind="images", dataset=["digits", "templates"], flip=True, also=further)
    assert len(made["cells"]) == 4 and sum("-sigmoid-cosine-s1-" in slug for slug in made["cells"]) == 2


def test_the_grid_of_cifar10_is_that_of_its_study():
    "so that the study finds the runs; the images themselves need not be here"
    axes = yaml.safe_load((WORKFLOW / "cifar10.yaml").read_text())
    also, = axes.pop("also")
    assert (axes.pop("kind"), axes.pop("study")) == ("images", "images")
    here = dict(content="3x32x32, 256 values, 00000000", device="cpu")
    typed = lambda axes: {k: float(v) if k == "lr" else v for k, v in axes.items()} | here   # 2e-4 is a word
    of_file = [p for more in ({}, also) for p in grid(kind_of("images"), **typed(axes | more))]
    sources = [s for s, _ in cells(ROOT / "nbs/experiments/images.ipynb", "code")]
    space = dict(scale="full", dataset="cifar10", path=axes["path"], device=axes["device"], workers=1,
                 grid=lambda kind, **axes: grid(kind, **axes | here), ImageParameters=kind_of("images"))
    for first, last in (("DIGITS =", "if (dataset"), ("TARGETS,", "images, one")):
        source = next(s for s in sources if s.startswith(first))
        exec(source[:source.index(last)], space)
        space["size"] = space["SIZES"]["cifar10", "full"]
    assert len(of_file) == 9 and set(of_file) == set(space["asked"])
    assert axes["device"] == "cuda" and axes["path"] == "data", "what the head of the file says"


def test_the_page_shows_commands_that_work(folder):
    "each snakemake line of the page; the longest as a dry run, where there is no SLURM"
    page = "\n".join(s for name in ("cluster", "gpus")
                     for s, _ in cells(ROOT / f"nbs/guides/{name}.ipynb", "markdown"))
    shown = {line.removesuffix(" -n") for line in page.splitlines() if line.startswith("snakemake ")}
    lines = {line.split("/profiles/")[1]: shlex.split(line)[1:] for line in shown if "cifar10" not in line}
    longest = "local --config seed=[0] target=[x,v] study=part"
    files = {f"local --configfile {f}.yaml" for f in ("my", "digits")}
    assert lines.keys() == {"local", "slurm", longest} | files
    here = [word.replace("workflow/", f"{WORKFLOW}/") for word in lines[longest]]
    code, said = snakemake(folder, *here, "-n")
    assert code == 0 and int(re.search(r"^train +(\d+)$", said, re.M)[1]) == 16, said
    axes = yaml.safe_load(re.search(r"`digits.yaml`:\n\n```\n(.*?)```", page, re.S)[1])
    assert len(grid(kind_of(axes.pop("kind")), **{k: v for k, v in axes.items() if k != "study"})) == 2
