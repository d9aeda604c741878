"The names at the top are those of the modules, and the registries are complete whatever is imported first."
import ast
import os
import subprocess
import sys
import textwrap
from functools import cache

import pytest

import lfdm
from lfdm import _HOMES, _NAMES
from tree import ROOT


@cache
def exported():
    "The public names of each module, by its own `__all__`."
    found = {}
    for path in sorted((ROOT / "lfdm").rglob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        lists = [node.value for node in tree.body if isinstance(node, ast.Assign) and
                 any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)]
        found[".".join(path.relative_to(ROOT / "lfdm").with_suffix("").parts)] = ast.literal_eval(lists[0])
    return found


def row(module, names):
    "The row of lfdm/__init__.py for a module."
    lines = textwrap.wrap(" ".join(names), 98)
    text = "\n".join(f"        '{line} '" for line in lines[:-1]) + f"\n        '{lines[-1]}',"
    return f"    '{module}':\n{text.lstrip(chr(10))}"


@pytest.mark.parametrize("module", exported())
def test_the_top_knows_the_names_of_each_module(module):
    names = exported()[module]
    here = _NAMES.get(module, "").split()
    assert sorted(here) == sorted(names), f"in lfdm/__init__.py, the row should be\n{row(module, names)}"


def test_the_top_knows_no_other_module():
    assert [*_NAMES] == [*exported()]


# a name of two modules: each in its row, and refused at the top
TWICE = {"require_network", "require_points", "checked_scale", "require_finite", "place",
         "checked_schedule", "checked_kind"}
# a function in a module, and a module: Python gives the module, as soon as it is imported
MODULES = {"lookup", "ledger", "sampling"}


def test_no_clash_is_resolved_in_silence():
    assert {name for name, homes in _HOMES.items() if len(homes) > 1} == TWICE
    assert _HOMES.keys() & {*_NAMES, "images"} == MODULES
    for name in TWICE:
        with pytest.raises(ImportError, match=f"^{name} is a name of lfdm.*import it from the one you mean"):
            getattr(lfdm, name)
        with pytest.raises(ImportError, match="import it from the one you mean"):
            exec(f"from lfdm import {name}")
    for name in MODULES: assert getattr(lfdm, name) is sys.modules[f"lfdm.{name}"]


def test_each_name_is_the_object_of_its_module():
    for name, homes in _HOMES.items():
        if name in TWICE | MODULES: continue
        assert getattr(lfdm, name) is getattr(sys.modules[f"lfdm.{homes[0]}"], name), name
    assert {*dir(lfdm)} >= _HOMES.keys() - TWICE | {"losses", "images"} and not TWICE & {*dir(lfdm)}
    assert lfdm.images.data.Digits is lfdm.Digits and lfdm.losses.DiffusionLoss is lfdm.DiffusionLoss


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(lfdm, "DiffusonLoss")
    with pytest.raises(ImportError, match="DiffusonLoss"): exec("from lfdm import DiffusonLoss")
    done = python("import lfdm; lfdm.DiffusonLoss", check=False)
    assert "Did you mean: 'DiffusionLoss'?" in done.stderr


def python(code, check=True):
    "Run some code in a new process."
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_top_is_light():
    "It imports nothing but importlib, so that asking for the version costs milliseconds."
    code = "import sys; before = {*sys.modules}; import lfdm; print(*{*sys.modules} - before)"
    assert python(code).stdout.split() == ["lfdm"]


# ---- registries

SCHEDULES = ("cosine shifted_cosine linear linear_logsnr ve edm_train edm_sample rectified_flow logit_normal "
             "adaptive laplace cauchy cosmap mode beta discrete ddpm")
WEIGHTINGS = ("nelbo weighted rescaled simple snr snr_plus_one truncated_snr min_snr soft_min_snr debiased "
              "p2 jit cosmap_weight ddpm_vlb sech exponential sigmoid edm edm_monotonic implied "
              "monotonic uncertainty")
FIRST = f"""if True:
    import importlib, os, sys
    import lfdm.core, torch
    for module in sys.argv[1:]:
        if os.fork(): assert os.wait()[1] == 0, module
        else:
            importlib.import_module(module)
            from lfdm.schedules import SCHEDULES
            from lfdm.weightings import WEIGHTINGS
            assert " ".join(SCHEDULES) == {SCHEDULES!r}, SCHEDULES
            assert " ".join(WEIGHTINGS) == {WEIGHTINGS!r}, WEIGHTINGS
            for registry in (SCHEDULES, WEIGHTINGS):
                assert type(registry) is dict and all(cls.name == name for name, cls in registry.items())
            os._exit(0)
"""


def test_registries_are_complete_whatever_is_imported_first():
    "And in one order: of a table, of the property tests' draws."
    joining = [f"lfdm.{name}" for name in ("adaptive", "densities", "discrete", "uncertainty", "schedules")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", FIRST, *joining], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
