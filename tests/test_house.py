"The repository keeps its own rules: exports, notebooks, links, docstrings, metadata, imports."
import ast
import configparser
import dataclasses
import importlib
import inspect
import os
import re
import runpy
import statistics
import subprocess
import sys

import pytest
from fastcore.docments import docments
from packaging.requirements import Requirement

import citations
from tree import ROOT, cells, copy_tree, files, name, notebooks

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
NOTEBOOKS = pytest.mark.parametrize("notebook", notebooks(), ids=name)
PAGES = pytest.mark.parametrize("page", notebooks() + [f for f in files() if f.suffix == ".md"], ids=name)
MODULES = sorted(path.stem for path in (ROOT / "lfdm").glob("[!_]*.py"))


def run(*command, **kwargs):
    "Run a command in the repository; its output is the message when it fails."
    done = subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT} | kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what is generated is up to date

def test_export_and_clean_change_nothing(tmp_path):
    "lfdm/ is what the notebooks export, these are clean, and nbs/nbdev.yml is what nbdev writes."
    copy = copy_tree(tmp_path)
    for module in (copy / "lfdm").glob("[!_]*.py"): module.unlink()  # a module without a notebook must not survive
    run(sys.executable, "-c", """if True:
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export
        from nbdev.quarto import refresh_quarto_yml
        nbdev_export.__wrapped__(); nbdev_clean.__wrapped__(); refresh_quarto_yml()""",
        cwd=copy, env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    def read(root): return {str(p.relative_to(root)): p.read_bytes() for f in ("lfdm/*.py", "nbs/**/*.ipynb", "nbs/*.yml") for p in root.glob(f)
                            if (ROOT / p.relative_to(root)) in files() or root == copy}
    ours, theirs = read(ROOT), read(copy)
    differ = sorted(f for f in ours | theirs if ours.get(f) != theirs.get(f))
    assert not differ, f"run `make export`; out of date: {', '.join(differ)}"


def test_readme_is_up_to_date():
    run(sys.executable, "tools/readme.py", "--check")


# --- notebooks

@NOTEBOOKS
def test_notebook_form(notebook):
    "Kernel python3, at most one default_exp, no stored error, small files, short cells."
    text = notebook.read_text(encoding="utf-8")
    code = cells(notebook, "code")
    kernel = re.search(r'"kernelspec": {[^}]*}', text)
    assert kernel and '"name": "python3"' in kernel[0] and '"language": "python"' in kernel[0], "the kernelspec must be python3, with its language"
    assert sum("#| default_exp" in source for source, _ in code) <= 1, "a second default_exp loses code silently"
    errors = [out for _, cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert not errors, f"stored error: {errors[0]['ename']}: {errors[0]['evalue']}"
    assert notebook.stat().st_size <= 1_500_000, f"{notebook.stat().st_size:,} bytes: make the stored figures smaller"
    lengths = [len(source.splitlines()) for source, _ in code] or [0]
    assert max(lengths) <= 60, f"a code cell of {max(lengths)} lines"
    assert statistics.median(lengths) <= 10, f"the median code cell has {statistics.median(lengths)} lines"


def test_train_has_parameters():
    "papermill needs the tag `parameters`: without it every run silently takes the defaults."
    tagged = [cell for _, cell in cells(ROOT / "nbs/train.ipynb", "code") if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1


# --- links, images, citations, cross-references

def prose(page):
    "The Markdown of a page, without its code."
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else "\n\n".join(source for source, _ in cells(page, "markdown"))
    return citations.CODE.sub("", text)


def anchors(page):
    "The places a link to a page may name: headings, labels, and what the page exports."
    text = prose(page)
    code = "\n".join(source for source, _ in cells(page, "code")) if page.suffix == ".ipynb" else ""
    heads = re.findall(r"^#+\s+(.*?)\s*(?:\{.*\})?$", text, re.M)
    slugs = {re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", head).strip().lower()) for head in heads}
    labels = re.findall(r"\{#([\w-]+)", text) + re.findall(r"^#\| label: (\S+)", code, re.M)
    exported = [n.lower() for n in re.findall(r"^(?:def|class) (\w+)", code, re.M)]
    return slugs | set(labels) | set(exported)


@PAGES
def test_links_and_images_resolve(page):
    broken = []
    for link in re.findall(r"""(?:\]\(|(?:src|href)=")([^)\s"]+)""", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path): continue
        target = page.parent / path if path else page
        if not target.exists(): broken.append(link)
        elif anchor and target.suffix in (".ipynb", ".md") and anchor.lower() not in anchors(target): broken.append(link)
    assert not broken, f"{name(page)} links to nothing: {', '.join(broken)}"


@PAGES
def test_citations_and_references_resolve(page):
    text, labels = prose(page), anchors(page)
    references = re.compile(r"@((?:eq|fig|tbl)-[\w-]+)")
    unknown = [label for label in references.findall(text) if label not in labels]
    assert not unknown, f"{name(page)} refers to no label of its own: {', '.join(unknown)}"
    citations.write(references.sub("", text), citations.references(), lambda key: None)  # says what it cannot find


@PAGES
def test_tags_can_be_read(page):
    "KaTeX shows the whole formula as an error when its tag holds a bare &."
    wrong = re.findall(r"\\tag\{[^}]*(?<!\\)&[^}]*\}", prose(page))
    assert not wrong, f"write \\& in {', '.join(wrong)}"


def test_no_addresses_of_machines_or_registries():
    "Nothing here knows where it was written, or where packages come from."
    folder = re.compile(r"(?<![\w/+=.~-])/(?:(?:work|home)/|root\b|tmp/probe)")
    registry = re.compile("|".join(["pypi" + r"\.org", "python" + "hosted", "index" + "-url", "find" + "-links", "registry" + r"\.npm"]))
    found = []
    for path in files():
        if path.is_symlink() or b"\0" in path.read_bytes(): continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if hit := folder.search(line) or registry.search(line): found.append(f"{name(path)}:{number}: {hit[0]}")
    assert not found, "\n".join(found)


# --- the code's own documentation

def public(module):
    "The functions and classes a module exports."
    module = importlib.import_module(f"lfdm.{module}")
    found = [getattr(module, n) for n in getattr(module, "__all__", [])]
    return [o for o in found if inspect.isfunction(o) or inspect.isclass(o)]


def undocumented(f):
    "The parameters without a docment."
    if inspect.isclass(f) and "__init__" not in vars(f): return []
    try: notes = docments(f, returns=False)
    except (TypeError, ValueError): return []
    variable = {n for n, p in inspect.signature(f).parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}  # docments cannot see their comments
    bases = [base for base in f.__mro__[1:] if dataclasses.is_dataclass(base) and "__init__" in vars(base)] if dataclasses.is_dataclass(f) else []
    inherited = {n for base in bases for n, note in docments(base, returns=False).items() if note}   # a field is said where it is first given
    return [n for n, note in notes.items() if not note and n not in {"self", "cls"} | variable | inherited]


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_and_docments(module):
    "One line says what each public thing is, and a comment beside each parameter what that is."
    missing = []
    for thing in public(module):
        doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__  # a class's own
        if not doc or "\n" in doc.strip(): missing.append(f"{thing.__name__}: no one-line docstring")
        missing += [f"{thing.__name__}: no docment for {n}" for n in undocumented(thing)]
    assert not missing, "\n".join(missing)


# --- packaging and the Makefile

def test_setup_agrees_with_settings(monkeypatch):
    seen = {}
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: seen.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    assert seen["name"] == SETTINGS["lib_name"] and seen["version"] == SETTINGS["version"]
    assert seen["description"] == SETTINGS["description"] and seen["author"] == SETTINGS["author"]
    assert seen["python_requires"] == f">={SETTINGS['min_python']}" and seen["packages"] == [SETTINGS["lib_path"]]
    assert seen["install_requires"] == SETTINGS["requirements"].split()
    assert seen["extras_require"] == {extra: SETTINGS[f"{extra}_requirements"].split() for extra in ("dev", "workflow", "accelerate", "diffusers")}
    assert f'version = "{SETTINGS["version"]}"' in (ROOT / "lfdm/__init__.py").read_text().replace("__", "")
    assert f"version: {SETTINGS['version']}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {SETTINGS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert [line for line in lines if not line.startswith("#")] == sorted(f"{k}=={v}" for k, v in pins.items())
    for need in map(Requirement, (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split()):
        assert need.name in pins and need.specifier.contains(pins[need.name]), f"{need} is not pinned: run `make lock`"


def test_make_lists_its_targets():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = re.findall(r"^  make (\w+) +\S", run("make", "--no-print-directory"), re.M)
    assert sorted(listed) == sorted(targets)


# --- imports

BLOCKED = "jupyter jupyterlab jupyter_client jupyter_core nbdev execnb fastcore papermill ipykernel ipywidgets IPython matplotlib seaborn pytest"
IMPORT = """if True:
    import importlib, sys, time
    class Block:  # as if these were not installed
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in "{blocked}".split(): raise ModuleNotFoundError(f"lfdm imports {{name}}", name=name)
    sys.meta_path.insert(0, Block())
    import torch
    start = time.perf_counter()
    for name in "{modules}".split(): importlib.import_module(f"lfdm.{{name}}")
    print(time.perf_counter() - start)"""


def test_imports_are_few_and_fast():
    "Without Jupyter, nbdev and matplotlib (lfdm.plots has that), and in under 2 s beyond torch."
    modules = " ".join(m for m in MODULES if m != "plots")
    code = IMPORT.format(blocked=BLOCKED, modules=modules)
    seconds = min(float(run(sys.executable, "-c", code)) for _ in range(2))  # the first may wait for the disk
    assert seconds < 2, f"importing {modules} took {seconds:.2f} s beyond torch"
