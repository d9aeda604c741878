"Attempts to break workflow/Snakefile: failed jobs, grids that are none, a stand-in for SLURM."
import os
import re
import shlex
import subprocess
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

from lfdm.grids import grid
from lfdm.runs import CHECKPOINT, FILES, beside, folder_of, load_run, make_run
from lfdm.studies import NETWORKS
from lfdm.tasks import kind_of
from tiny import tree
from tree import ROOT, cells

pytest.importorskip("snakemake")
TINY = dict(dataset="cluster", target=["x", "v"], logsnr_min=-5.1, epochs=1, width=8, batch_size=50_000,
            lr=1e-5, sample_steps=2, n_samples=50)
IMAGES = dict(dataset="templates(n_train=20, n_test=4)", network="small(width=4)", epochs=1, batch_size=10,
              n_samples=4, sample_steps=2, judged=2, target=["v", "x"])

WORKFLOW = ROOT / "workflow"

# Runs a submitted job at once, and keeps what it was asked for.
SLURM = dict.fromkeys(("sacctmgr", "sshare", "scontrol", "squeue", "scancel", "sinfo"), "echo mine") | {
    "sbatch": 'printf "%s\n" "$@" > $SLURM/asked; for last; do :; done; SLURM_JOB_ID=7 bash -c '
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


@pytest.fixture(scope="module")
def snakemake(folder, python):
    "To call it: its exit status and what it said."
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {
        "LFDM_RUNS": "runs", "XDG_CACHE_HOME": str(folder / "cache"), "SLURM": str(folder),
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    command = python, "-m", "snakemake", "--snakefile", WORKFLOW / "Snakefile"
    how = dict(cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    def call(*words):
        done = subprocess.run([*command, *words], **how)
        return done.returncode, done.stdout + done.stderr
    return call


@pytest.fixture(scope="module")
def call(folder, snakemake):
    "Snakemake with one of the profiles, on a grid."
    def call(profile, *words, **config):
        (folder / "grid.yaml").write_text(yaml.safe_dump(config))
        return snakemake("--profile", WORKFLOW / f"profiles/{profile}", "--configfile", "grid.yaml", *words)
    return call


def read(folder, monkeypatch, **config):
    "The Snakefile up to its rules, which is Python: what it makes of a grid, without Snakemake's seconds."
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LFDM_RUNS", "runs")
    workflow = SimpleNamespace(basedir=WORKFLOW, overwrite_configfiles=[True])
    space = dict(workflow=workflow, config=config, WorkflowError=ValueError)
    exec((WORKFLOW / "Snakefile").read_text().partition("\nrule all")[0], space)
    return space


def test_a_failed_job_does_not_lose_the_others(folder, call):
    "in a grid of images, whose content and options are no plain words; another process holds one of its runs"
    root = folder / "runs"
    good, bad = grid(kind_of("images"), **IMAGES)
    there = folder_of(bad, "photos", root)
    work = beside(there, "partial")
    work.mkdir(parents=True)
    (work / CHECKPOINT).write_text("of the other process")
    with FileLock(beside(there, "lock")):
        code, said = call("local", kind="images", study="photos", **IMAGES)
    assert code == 1 and said.count("RuntimeError: another process is making this run") == 1, said
    assert said.index("Error in rule train") < said.index("Finished jobid"), "there was nothing left to lose"
    assert load_run(folder_of(good, "photos", root)).parameters == good and not there.exists()
    assert os.listdir(work) == [CHECKPOINT], "the work of a failed job was deleted"
    for words in ("gpu=0", "mem_mb=8000", "runtime=1440"): assert words in said


def test_the_cluster_makes_what_is_missing_and_only_that(folder, call):
    "a finished run needs no job, though the workflow's own files are not there"
    first, second = grid(**TINY)
    finished = make_run(first, "tiny", folder / "runs").folder
    before = tree(finished)
    quick = "--latency-wait", "5", "--slurm-init-seconds-before-status-checks", "1"
    mine = "--default-resources", "slurm_partition=short", "slurm_account=mine"
    code, said = call("slurm", *quick, *mine, study="tiny", **TINY)
    assert code == 0, said + (folder / "out").read_text()
    assert tree(finished) == before and set(before) == set(FILES), "a finished run was made again"
    assert said.count("submitted with SLURM jobid 7") == 1
    asked = (folder / "asked").read_text()
    for words in ("-p\nshort\n", "--cpus-per-task=1", "--mem\n3000\n", "-t\n120\n"): assert words in asked
    run = load_run(folder_of(second, "tiny", folder / "runs"))
    assert run.parameters == second, "the command of a job lost a parameter"
    notebook = folder / "runs/tiny/notebooks" / f"{second.slug()}.ipynb"
    outputs = [o for _, cell in cells(notebook, "code") for o in cell["outputs"]]
    assert all(o["output_type"] != "error" for o in outputs)


def test_a_deleted_run_is_made_again(folder, monkeypatch):
    "though its notebook and its link are still there; and numbers may be words"
    axes = TINY | {"target": ["x"]}
    p, = grid(**axes)
    links = folder / "runs/deleted/notebooks"
    links.mkdir(parents=True)
    link = links / f"{p.slug()}.json"
    link.symlink_to(f"../{p.slug()}/summary.json")
    made = read(folder, monkeypatch, study="deleted", **axes | {"lr": "1e-5", "epochs": ["1"]})
    assert list(made["cells"].values()) == [p] and not link.is_symlink()


@pytest.mark.parametrize("given, message", [
    (dict(tagret=["x"]), "unknown axis 'tagret'. Did you mean 'target'?"),
    (dict(study="empty"), "the grid is empty."), (dict(seed=0, study="{x}"), "takes no braces"),
    (dict(kind="image"), "unknown kind of run 'image'. Did you mean 'images'?"),
    (dict(kind="images", dataset="folder", path="nowhere"), "there is no folder 'nowhere'"),
    (dict(kind="images", seed=0, also=[dict(content="x")]), "unknown axis 'content'."),
    (dict(seed=0, also="x"), "also must be a list of axes")])
def test_a_bad_grid_is_refused_before_any_job(folder, monkeypatch, given, message):
    with pytest.raises(ValueError, match=re.escape(message)): read(folder, monkeypatch, **given)


def test_a_bad_grid_is_refused_in_a_few_lines(call):
    code, said = call("local", studdy="x")
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


def test_further_cells_of_a_grid_of_images(folder, monkeypatch):
    further = [dict(target="v", weighting="sigmoid", seed="1")]
    made = read(folder, monkeypatch, kind="images", target=["x", "v"], flip=True, also=further)["cells"]
    assert len(made) == 3 and sum("-v-sigmoid-cosine-s1-" in slug for slug in made) == 1


def test_the_grid_of_cifar10_is_that_of_its_study():
    "so that the study finds the runs; the images themselves need not be here"
    axes = yaml.safe_load((WORKFLOW / "cifar10.yaml").read_text())
    also, = axes.pop("also")
    assert (axes.pop("kind"), axes.pop("study")) == ("images", "cifar10-thesis")
    here = dict(content="3x32x32, 256 values, 00000000", device="cpu")
    typed = lambda axes: {k: float(v) if k == "lr" else v for k, v in axes.items()} | here   # 2e-4 is a word
    of_file = [p for more in ({}, also) for p in grid(kind_of("images"), **typed(axes | more))]
    sources = [s for s, _ in cells(ROOT / "nbs/experiments/images.ipynb", "code")]
    space = dict(scale="full", dataset=None, path=axes["path"], device=axes["device"],
                 grid=lambda kind, **axes: grid(kind, **axes | here), ImageParameters=kind_of("images"))
    for first in ("DIGITS =", "TARGETS,"):
        source = next(s for s in sources if s.startswith(first))
        exec(source.partition("\nimages = ")[0], space)
        space["size"] = space["SIZES"]["cifar10-thesis"]["full"]
    assert len(of_file) == 9 and set(of_file) == set(space["asked_with"]({}))
    assert axes["device"] == "cuda" and axes["path"] == "data", "what the head of the file says"


def test_the_page_shows_commands_that_work(snakemake):
    "each snakemake line of the page; the longest as a dry run, where there is no SLURM"
    page = "\n".join(s for name in ("cluster", "gpus")
                     for s, _ in cells(ROOT / f"nbs/guides/{name}.ipynb", "markdown"))
    shown = {line.removesuffix(" -n") for line in page.splitlines() if line.startswith("snakemake ")}
    lines = {line.split("/profiles/")[1]: shlex.split(line)[1:] for line in shown if "cifar10" not in line}
    longest = "local --config seed=[0] target=[x,v] study=part"
    files = {f"local --configfile {f}.yaml" for f in ("my", "digits")}
    assert lines.keys() == {"local", "slurm", longest} | files
    here = [word.replace("workflow/", f"{WORKFLOW}/") for word in lines[longest]]
    code, said = snakemake(*here, "-n")
    assert code == 0 and int(re.search(r"^train +(\d+)$", said, re.M)[1]) == 16, said
    axes = yaml.safe_load(re.search(r"`digits.yaml`:\n\n```\n(.*?)```", page, re.S)[1])
    assert len(grid(kind_of(axes.pop("kind")), **{k: v for k, v in axes.items() if k != "study"})) == 2
