"The repository keeps its own rules: exports, notebooks, links, docstrings, metadata, imports."
import ast
import configparser
import dataclasses
import importlib
import inspect
import json
import os
import re
import runpy
import statistics
import subprocess
import sys

import pytest
import yaml
from fastcore.docments import docments
from packaging.requirements import Requirement

import address
import citations
from tree import ROOT, cells, copy_tree, files, name, notebooks

SETTINGS = configparser.ConfigParser(delimiters=["="])
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
NOTEBOOKS = pytest.mark.parametrize("notebook", notebooks(), ids=name)
LIBRARY = sorted((ROOT / "nbs/library").glob("*.ipynb"))


def modules(root=ROOT):
    "The modules of the library, in packages too, with their files: 'core', ..., 'images.data'."
    paths = sorted((root / "lfdm").rglob("[!_]*.py"))
    return {".".join(path.relative_to(root / "lfdm").with_suffix("").parts): path for path in paths}


MODULES = list(modules())


def run(*command, **kwargs):
    "Run a command in the repository; its output is the message when it fails."
    done = subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT} | kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- what is generated is up to date

def differing(copy):
    "The generated files that are not the same in a copy."
    patterns, known = ("lfdm/**/*.py", "nbs/**/*.ipynb", "nbs/*.yml"), set(files())
    def read(root):
        paths = [path.relative_to(root) for f in patterns for path in root.glob(f)]
        paths = [path for path in paths if root == copy or ROOT / path in known]
        return {str(path): (root / path).read_bytes() for path in paths}
    ours, theirs = read(ROOT), read(copy)
    return sorted(f for f in ours | theirs if ours.get(f) != theirs.get(f))


def test_export_and_clean_change_nothing(tmp_path):
    "lfdm/ is what the notebooks export, these are clean, and nbs/nbdev.yml is what nbdev writes."
    copy = copy_tree(tmp_path)
    for path in modules(copy).values(): path.unlink()   # one without a notebook must not survive
    run(sys.executable, "-c", """if True:
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export
        from nbdev.quarto import refresh_quarto_yml
        nbdev_export.__wrapped__(); nbdev_clean.__wrapped__(); refresh_quarto_yml()""",
        cwd=copy, env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    differ = differing(copy)
    assert not differ, f"run `make export`; out of date: {', '.join(differ)}"


def test_readme_is_up_to_date():
    run(sys.executable, "tools/readme.py", "--check")


# --- notebooks

@NOTEBOOKS
def test_notebook_form(notebook):
    "Kernel python3, one default_exp at most, no stored error, small files, short cells or whole classes."
    text = notebook.read_text(encoding="utf-8")
    code = cells(notebook, "code")
    kernel = json.loads(text)["metadata"]["kernelspec"]
    assert (kernel["name"], kernel["language"]) == ("python3", "python")
    assert sum("#| default_exp" in source for source, _ in code) <= 1, "a second one loses code silently"
    errors = [out for _, cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert not errors, f"stored error: {errors[0]['ename']}: {errors[0]['evalue']}"
    assert len(text.encode()) <= 1_500_000, "make the stored figures smaller"
    lengths = []
    for source, _ in code:
        source = re.sub(r"^#\|.*\n", "", source, flags=re.M)
        n = len(source.splitlines()), len(source)
        most = (150, 9000) if whole_class(source) else (60, 4000)
        assert n[0] <= most[0] and n[1] <= most[1], f"{n[0]} lines, {n[1]} characters: {source[:80]!r}"
        lengths.append(n)
    lines, characters = map(statistics.median, zip(*lengths or [(0, 0)]))
    assert lines <= 16 and characters <= 600, f"the median cell has {lines} lines, {characters} characters"


def whole_class(source):
    "Does a cell hold one class, and at most the lines that put it into a registry?"
    try: body = ast.parse(source).body
    except SyntaxError: return False  # a magic
    rest = [node for node in body if not isinstance(node, ast.ClassDef)]
    one = len(body) - len(rest) == 1
    return one and len(rest) <= 2 and all(isinstance(node, ast.Assign) for node in rest)


@pytest.mark.parametrize("notebook", LIBRARY, ids=name)
def test_a_library_notebook_is_a_lesson(notebook):
    "It exports a module, shows a picture, and ends in what to remember."
    code = cells(notebook, "code")
    assert any("#| default_exp" in source for source, _ in code)
    outputs = [out for _, cell in code for out in cell["outputs"]]
    assert any(kind.startswith("image/") for out in outputs for kind in out.get("data", {})), "no picture"
    headings = re.findall(r"^## (.+?)(?: \{.*)?$", prose(notebook), re.M)
    assert headings and headings[-1] == "What to remember", "the last section is not 'What to remember'"


def test_nothing_imports_from_a_later_notebook():
    "Numbers are in the order of reading and of imports. (An import within a function may come late.)"
    before = set()
    for notebook in LIBRARY:
        code = [source for source, _ in cells(notebook, "code")]
        before.add(re.search(r"#\| default_exp (\S+)", "\n".join(code))[1])
        exported = "\n".join(source for source in code if re.match(r"#\| exports?\b", source))
        later = set(re.findall(r"^from lfdm\.([\w.]+) import", exported, re.M)) - before
        assert not later, f"{notebook.name} imports {later}"


DIRECTIVES = ("default_exp", "export", "exports", "exporti", "hide", "eval", "echo", "output", "include",
              "label")


def test_a_continued_caption_is_no_directive():
    "`#|` and two spaces go on with a caption. To nbdev each line is a directive, known by its first word."
    for notebook in notebooks():
        for source, _ in cells(notebook, "code"):
            words = {*re.findall(r"^#\|  +(\w+)", source, re.M)} & {*DIRECTIVES}
            assert not words, f"{name(notebook)}: nbdev takes {words} of a caption for directives"


def test_no_line_is_wide():
    "Ruff measures notebooks, tests and tools; here the rest. (Not the list of names that nbdev writes.)"
    for path in (*modules().values(), ROOT / "workflow/Snakefile"):
        text = re.sub(r"^__all__ = \[[^]]*\]", "", path.read_text(), flags=re.M)
        wide = [line for line in text.splitlines() if len(line) > 110]
        assert not wide, f"{name(path)}: {wide}"


def test_the_sidebar_lists_every_notebook():
    "The library in the order of its numbers."
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "nbs")) for path in notebooks())
    library = [page for page in listed if page.startswith("library/")]
    assert library == sorted(library)


# --- links, images, citations, cross-references

def prose(page):
    "The Markdown of a page, without its code."
    if page.suffix == ".md": text = page.read_text(encoding="utf-8")
    else: text = "\n\n".join(source for source, _ in cells(page, "markdown"))
    return citations.CODE.sub("", text)


@pytest.mark.parametrize("page", [f for f in files() if f.suffix == ".md"], ids=name)
def test_links_and_images_resolve(page):
    "Those of notebooks are tested on the site."
    for link in re.findall(r"""(?:\]\(|(?:src|href)=")([^)\s"]+)""", prose(page)):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path): continue
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads to nothing"
        heads = re.findall(r"^#+\s+(.*?)\s*(?:\{#([\w-]+).*\})?$", prose(target), re.M) if anchor else []
        slugs = [label or re.sub(r"[^\w.-]+", "-", head).strip("-").lower() for head, label in heads]
        assert not anchor or anchor.lower() in slugs, f"{link} leads to nothing"


def test_tags_can_be_read():
    "KaTeX shows the whole formula as an error when its tag holds a bare &."
    for notebook in notebooks():
        wrong = re.findall(r"\\tag\{[^}]*(?<!\\)&[^}]*\}", prose(notebook))
        assert not wrong, f"{name(notebook)}: write \\& in {', '.join(wrong)}"


def test_no_addresses_of_machines_or_registries():
    "Nothing here knows where it was written, or where packages come from."
    folder = r"(?<![\w/+=.~-])/(?:(?:work|home)/|root\b|tmp/probe)"
    hosts = "pypi[.]org", "python[h]osted", "index[-]url", "find[-]links", "registry[.]npm"
    known = re.compile("|".join((folder, *hosts)))
    texts = {path: path.read_bytes() for path in files() if not path.is_symlink()}
    found = [f"{name(path)}: {hit[0]}" for path, text in texts.items() if b"\0" not in text
             for hit in known.finditer(text.decode())]
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
    known = {"self", "cls"} | {n for n, p in inspect.signature(f).parameters.items()
                               if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}  # docments cannot see theirs
    above = f.__mro__[1:] if dataclasses.is_dataclass(f) else []
    above = [base for base in above if dataclasses.is_dataclass(base) and "__init__" in vars(base)]
    above += [c.__call__ for c in vars(sys.modules[f.__module__]).values()
              if getattr(c, "_is_protocol", False) and c.__module__ == f.__module__]
    for thing in above: known |= {n for n, note in docments(thing, returns=False).items() if note}
    return [n for n, note in notes.items() if not note and n not in known]


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
    for ours, theirs in (("lib_name", "name"), *((k, k) for k in ("version", "description", "author"))):
        assert seen[theirs] == SETTINGS[ours]
    assert seen["python_requires"] == f">={SETTINGS['min_python']}"
    assert sorted(seen["packages"]) == ["lfdm", "lfdm.images"]
    assert seen["install_requires"] == SETTINGS["requirements"].split()
    extras = ("studies", "images", "workflow", "accelerate", "diffusers", "docs", "dev")
    assert seen["extras_require"] == {extra: SETTINGS[f"{extra}_requirements"].split() for extra in extras}
    lines = {"lfdm/__init__.py": '__version__ = "{}"', "CITATION.cff": "version: {}", "CHANGELOG.md": "## {}"}
    for file, line in lines.items():
        assert line.format(SETTINGS["version"]) in (ROOT / file).read_text(encoding="utf-8"), file


def test_the_address_stands_once():
    "In settings.ini; what shows it is written from there."
    run(sys.executable, "tools/address.py", "--check")
    ours = address.address()
    known = {"settings.ini", "tools/address.py", "tests/test_house.py"}
    for path in files():
        if path.is_symlink() or name(path) in known or b"\0" in (content := path.read_bytes()): continue
        shown = {*re.findall(r"https://[\w.-]+/[\w.-]+/lfdm\b(?!/)", content.decode())}
        assert shown <= {ours}, f"{name(path)}: {shown}"


def test_a_new_address_comes_to_every_page(tmp_path):
    copy = copy_tree(tmp_path)
    git = ("git", "-c", "user.name=t", "-c", "user.email=t")
    run(*git, "init", "-q", cwd=copy), run(*git, "add", "-A", cwd=copy)
    old, page = address.address(), copy / "nbs/guides/scope.ipynb"
    page.write_text(page.read_text().replace("# ", f"# {old} ", 1))
    settings = copy / "settings.ini"
    settings.write_text(re.sub("^user = .*", "user = someone", settings.read_text(), flags=re.M))
    check = [sys.executable, "tools/address.py", "--check"]
    done = subprocess.run(check, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 1 and "CITATION.cff, nbs/guides/scope.ipynb" in done.stderr
    run(sys.executable, "tools/address.py", cwd=copy), run(*check, cwd=copy)
    new = "https://github.com/someone/lfdm"
    for path in (page, copy / "CITATION.cff"): assert new in path.read_text() and old not in path.read_text()


def test_constraints_pin_every_requirement():
    listed = re.findall(r"^[^#].*$", (ROOT / "constraints.txt").read_text(), re.M)
    pins = dict(line.split("==") for line in listed)
    assert listed == sorted(f"{k}=={v}" for k, v in pins.items())
    for need in map(Requirement, (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split()):
        pinned = need.name in pins and need.specifier.contains(pins[need.name])
        assert pinned, f"{need} is not pinned: run `make lock`"


def test_workflows_are_pinned_and_may_only_read():
    "By full commit, with the version beside it. Only a publishing job may do more; it has none of our code."
    for path in (ROOT / ".github/workflows").iterdir():
        text = path.read_text()
        for line in re.findall(r"uses:.*", text):
            assert re.fullmatch(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), f"{path.name}: {line}"
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            if "permissions" not in job: continue
            assert not any("checkout" in step.get("uses", "") for step in job["steps"]), path.name
            runs = [step["run"] for step in job["steps"] if "run" in step]
            assert all(run.startswith("gh release create ") for run in runs), path.name


# --- imports

BLOCKED = ("jupyter jupyterlab jupyter_client jupyter_core nbdev execnb fastcore papermill ipykernel "
           "ipywidgets IPython matplotlib seaborn pytest torchvision pytorch_fid PIL diffusers accelerate")
IMPORT = """if True:
    import importlib, sys, time
    class Block:  # as if these were not installed
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in "{blocked}".split():
                raise ModuleNotFoundError(f"lfdm imports {{name}}", name=name)
    sys.meta_path.insert(0, Block())
    import torch
    start = time.process_time()
    for name in "{modules}".split(): importlib.import_module(f"lfdm.{{name}}")
    print(time.process_time() - start)"""


def test_imports_are_few_and_fast():
    "Without Jupyter, nbdev and matplotlib (lfdm.plots has that), and in under 2 s beyond torch."
    modules = " ".join(m for m in MODULES if m != "plots")
    code = IMPORT.format(blocked=BLOCKED, modules=modules)
    for _ in range(2):   # the first may wait for the disk
        seconds = float(run(sys.executable, "-c", code))
        if seconds < 2: return
    raise AssertionError(f"importing {modules} took {seconds:.2f} s beyond torch")
