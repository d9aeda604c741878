"""What `pip install lfdm` brings is enough for losses, and each extra for what it is named after.

Environments are imitated: one process hides every package that the core does not bring, imports the rest and
tries it; forks of it do the same for each extra.
"""
import configparser
import json
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tree import ROOT

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
MODULES = sorted(".".join(path.relative_to(ROOT).with_suffix("").parts)
                 for path in (ROOT / "lfdm").rglob("[!_]*.py"))


def wanted(extra):
    "The requirements of an extra beside those of the core; of the core itself if it is ''."
    return SETTINGS["requirements"].split() + SETTINGS.get(f"{extra}_requirements", "").split()


@cache
def distributions():
    "The names that can be imported -> the packages that have them."
    return {name: {*map(canonicalize_name, homes)} for name, homes in packages_distributions().items()}


def closure(needs):
    "All that pip installs for some requirements, by the metadata of what is installed here."
    found, waiting = set(), [(Requirement(need), "") for need in needs]
    while waiting:
        need, extra = waiting.pop()
        name = canonicalize_name(need.name)
        if need.marker and not need.marker.evaluate({"extra": extra}): continue
        for with_extra in ("", *need.extras):
            if (name, with_extra) in found: continue
            found.add((name, with_extra))
            try: waiting += [(Requirement(text), with_extra) for text in requires(name) or ()]
            except PackageNotFoundError: pass   # on another system
    return {name for name, _ in found}


@cache
def hidden(extra):
    "The names that cannot be imported where only an extra is installed."
    there = closure(wanted(extra))
    return sorted(name for name, homes in distributions().items() if not homes & (there | {"lfdm"}))


# an extra -> those that bring all of it and more
MORE = {"": ["diffusers", "studies"], "studies": ["images"],
        "images": ["workflow", "accelerate", "docs", "dev"]}
HARNESS = """if True:
    import importlib, json, os, sys
    hidden, more, modules, lines, report = json.loads(sys.argv[1])
    finders = sys.meta_path[:]
    class Hide:   # as if these were not installed
        def __init__(self, names): self.names = {*names}
        def find_spec(self, name, *where):
            if name.partition(".")[0] in self.names: return None
            return next((spec for finder in finders if (spec := finder.find_spec(name, *where))), None)
        def find_distributions(self, *context):
            for finder in finders: yield from getattr(finder, "find_distributions", lambda *_: ())(*context)
    def look(extra):
        sys.meta_path[:] = [Hide(hidden[extra])]
        said = {}
        for name in modules:
            try: importlib.import_module(name)
            except ModuleNotFoundError as e: said[name] = str(e)
        for line in lines[extra]:
            try: exec(line, {})
            except BaseException as e: said[line] = f"{type(e).__name__}: {e}"
        with open(report, "a") as file: print(json.dumps([extra, said]), file=file)
        for child in more.get(extra, ()):
            if os.fork() == 0: look(child), os._exit(0)
            os.wait()
    look("")
"""
# what each is good for, beside the import of its modules
NET = "net = lambda z, u: z; "
LINES = {
    "": [NET + "import torch; from lfdm import DiffusionLoss, Ring; DiffusionLoss()(net, Ring().sample(4))",
         "from lfdm import DiffusionLoss, Ring, floor; assert 0 < floor(DiffusionLoss(), Ring()) < 1",
         NET + "from lfdm import sample, network_denoiser, DiffusionLoss; "
         "sample(network_denoiser(net, 'v'), 2, (2,), 4, DiffusionLoss().schedule, 'adaptive')",
         "from lfdm import SCHEDULES, WEIGHTINGS; assert all(cls() for cls in SCHEDULES.values())",
         "from lfdm import which_loss; which_loss('diffusers')"],
    "studies": ["import lfdm; [getattr(lfdm, name) for name in dir(lfdm)]",
                "from lfdm import progress_bar; progress_bar()('train', 1, 2)",
                "import papermill, ipykernel, IPython, pandas, sympy, matplotlib.pyplot, seaborn",
                "from lfdm import which_loss; which_loss('diffusers').formula()"],
    "images": ["from lfdm import Digits; Digits().load()", "from torchvision import datasets",
               "import pytorch_fid.inception", "from PIL import Image"],
    "workflow": ["import snakemake.cli, papermill", "import snakemake_executor_plugin_slurm"],
    "accelerate": ["import accelerate", "from lfdm.images import task"],
    "diffusers": ["import diffusers; from lfdm import from_diffusers, DDPMSchedule, to_diffusers; "
                  "from_diffusers(to_diffusers(DDPMSchedule(), 'eps'))"],
    "docs": ["import nbdev.quarto, smalldocs.site, diffusers"],
    "dev": ["import nbdev, jupyterlab, pytest, hypothesis, mpmath, build, ruff, pre_commit",
            "import accelerate, snakemake, diffusers, ipywidgets"]}
# what is refused without an extra, and which one the message names
REFUSED = {
    "": {"from lfdm import make_run": "studies", "from lfdm.plots import plot_loss": "studies",
         "import lfdm; lfdm.Parameters": "studies",
         "from lfdm import Digits; Digits().load()": "images",
         "from lfdm import CIFAR10; CIFAR10.download('x')": "images",
         "from lfdm import decode; decode(['x.png'])": "images",
         "from lfdm import to_diffusers; to_diffusers()": "diffusers"},
    "studies": {"from lfdm import Digits; Digits().load()": "images",
                "from lfdm import to_diffusers; to_diffusers()": "diffusers"}}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    "What each imitated environment could not import or do: what -> the message."
    lines = {extra: [*LINES[extra], *REFUSED.get(extra, ())] for extra in LINES}
    report = tmp_path_factory.mktemp("extras") / "report"
    told = json.dumps([{extra: hidden(extra) for extra in LINES}, MORE, MODULES, lines, str(report)])
    done = subprocess.run([sys.executable, "-c", HARNESS, told], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    found = dict(map(json.loads, report.read_text().splitlines()))
    assert done.returncode == 0 and found.keys() == LINES.keys(), done.stderr
    return found


def test_every_extra_is_looked_at():
    extras = {key.removesuffix("_requirements") for key in SETTINGS if key.endswith("_requirements")}
    assert extras | {""} == LINES.keys()
    for extra, larger in MORE.items():
        for other in larger: assert {*hidden(other)} < {*hidden(extra)}, f"{other} has less than {extra}"


# what the core cannot import: these train, record runs, or draw
STUDIES = {f"lfdm.{name}" for name in (
    "checkpoints", "training", "parameters", "tasks", "runs", "grids", "studies", "plots",
    "images.features", "images.parameters", "images.task")}


def test_the_core_imports_what_a_loss_needs(said):
    "And names the extra of each module that it cannot import."
    missing = {name: text for name, text in said[""].items() if name in MODULES}
    assert missing.keys() == STUDIES, missing
    for name, text in missing.items(): assert 'pip install "lfdm[studies]"' in text, f"{name}: {text}"


@pytest.mark.parametrize("extra", [extra for extra in LINES if extra not in ("", "diffusers")])
def test_an_extra_imports_every_module(said, extra):
    assert not {name: text for name, text in said[extra].items() if name in MODULES}


@pytest.mark.parametrize("extra", LINES)
def test_an_extra_does_what_it_is_for(said, extra):
    failed = {line: said[extra][line] for line in LINES[extra] if line in said[extra]}
    assert not failed, failed


@pytest.mark.parametrize("extra", REFUSED)
def test_a_missing_extra_is_named(said, extra):
    for line, named in REFUSED[extra].items():
        text = said[extra].get(line, "no error")
        assert text.startswith("ModuleNotFoundError"), f"{line}: {text}"
        assert f'pip install "lfdm[{named}]"' in text, f"{line}: {text}"


def test_the_core_is_light():
    "Beside what torch itself needs: numpy, scipy, torchdiffeq."
    assert closure(wanted("")) - closure(["torch"]) == {"numpy", "scipy", "torchdiffeq"}
