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
LIBRARY = sorted((ROOT / "nbs/library").glob("*.ipynb"))
WIDTH = 110


def modules(root=ROOT):
    "The modules of the library, in packages too: 'core', ..., 'images.data'."
    paths = [path.relative_to(root / "lfdm").with_suffix("") for path in (root / "lfdm").rglob("[!_]*.py")]
    return sorted(".".join(path.parts) for path in paths)


MODULES = modules()


def run(*command, **kwargs):
    "Run a command in the repository; its output is the message when it fails."
    done = subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT} | kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def module_path(root, name):
    "The file of a module."
    return (root / "lfdm").joinpath(*name.split(".")).with_suffix(".py")


# --- what is generated is up to date

def differing(copy):
    "The generated files that are not the same in a copy."
    def read(root):
        paths = [path for f in ("lfdm/**/*.py", "nbs/**/*.ipynb", "nbs/*.yml") for path in root.glob(f)]
        known = set(files())
        return {name: (root / name).read_bytes() for name in (str(p.relative_to(root)) for p in paths)
                if root == copy or ROOT / name in known}
    ours, theirs = read(ROOT), read(copy)
    return sorted(f for f in ours | theirs if ours.get(f) != theirs.get(f))


def test_export_and_clean_change_nothing(tmp_path):
    "lfdm/ is what the notebooks export, these are clean, and nbs/nbdev.yml is what nbdev writes."
    copy = copy_tree(tmp_path)
    for module in modules(copy): module_path(copy, module).unlink()  # one without a notebook must not survive
    run(sys.executable, "-c", """if True:
        from nbdev.clean import nbdev_clean
        from nbdev.doclinks import nbdev_export
        from nbdev.quarto import refresh_quarto_yml
        nbdev_export.__wrapped__(); nbdev_clean.__wrapped__(); refresh_quarto_yml()""",
        cwd=copy, env={k: v for k, v in os.environ.items() if k != "IN_TEST"})
    differ = differing(copy)
    assert not differ, f"run `make export`; out of date: {', '.join(differ)}"
    module_path(copy, "images.data").write_text("import nothing_of_this_name\n")
    assert differing(copy) == ["lfdm/images/data.py"]  # modules in packages are compared too


def test_a_package_has_no_module_beside_it():
    both = [name for name in MODULES if module_path(ROOT, name).with_suffix("").is_dir()]
    assert not both, f"a package and a module have the same name: {', '.join(both)}"


def test_readme_is_up_to_date():
    run(sys.executable, "tools/readme.py", "--check")


# --- notebooks

@NOTEBOOKS
def test_notebook_form(notebook):
    "Kernel python3, one default_exp at most, no stored error, small files, short cells or whole classes."
    text = notebook.read_text(encoding="utf-8")
    code = cells(notebook, "code")
    kernel = re.search(r'"kernelspec": {[^}]*}', text)
    wanted = ('"name": "python3"', '"language": "python"')
    assert kernel and all(w in kernel[0] for w in wanted), "the kernelspec must be python3, with its language"
    exports = [source for source, _ in code if "#| default_exp" in source]
    assert len(exports) <= 1, "a second default_exp loses code silently"
    errors = [out for _, cell in code for out in cell["outputs"] if out["output_type"] == "error"]
    assert not errors, f"stored error: {errors[0]['ename']}: {errors[0]['evalue']}"
    size = notebook.stat().st_size
    assert size <= 1_500_000, f"{size:,} bytes: make the stored figures smaller"
    sources = [re.sub(r"^#\|.*\n", "", source, flags=re.M) for source, _ in code]
    for source in sources:
        lines, most = (150, 9000) if whole_class(source) else (60, 4000)
        n = len(source.splitlines())
        assert n <= lines and len(source) <= most, f"{n} lines, {len(source)} characters: {source[:80]!r}"
    lengths = [(len(source.splitlines()), len(source)) for source in sources] or [(0, 0)]
    lines, characters = map(statistics.median, zip(*lengths))
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
    order, later = {}, []
    for notebook in LIBRARY:
        code = [source for source, _ in cells(notebook, "code")]
        module = re.search(r"#\| default_exp (\S+)", "\n".join(code))[1]
        order[module] = notebook.name
        exported = "\n".join(source for source in code if re.match(r"#\| exports?\b", source))
        for wanted in re.findall(r"^from lfdm\.([\w.]+) import", exported, re.M):
            if wanted not in order: later.append(f"{notebook.name} imports {wanted}")
    assert not later, "\n".join(later)


DIRECTIVES = ("default_exp", "export", "exports", "exporti", "hide", "eval", "echo", "output", "include",
              "label")


@NOTEBOOKS
def test_a_continued_caption_is_no_directive(notebook):
    "`#|` and two spaces go on with a caption. To nbdev each line is a directive, known by its first word."
    lines = [line for source, _ in cells(notebook, "code") for line in source.splitlines()]
    continued = [(before, line) for before, line in zip(lines, lines[1:]) if re.match(r"#\|  +\S", line)]
    for before, line in continued:
        assert re.match(r"#\|(  +\S| (fig|tbl)-cap: )", before), f"it continues no caption: {line}"
        word = re.split(r"\W", line[2:].strip())[0]
        assert word not in DIRECTIVES, f"nbdev takes it for a directive: {line}"


# --- width

def code_lines(path):
    "Each line of code of a file with its place; what nbdev generates aside."
    if path.suffix == ".ipynb": sources = [source for source, _ in cells(path, "code")]
    else: sources = [re.sub(r"^__all__ = \[[^\]]*\]", "", path.read_text(encoding="utf-8"), flags=re.M)]
    return [(line, f"{name(path)}: {line.strip()[:70]}") for text in sources for line in text.splitlines()]


def test_no_line_of_code_is_wide():
    code = [path for path in files() if path.suffix in (".py", ".ipynb") and path.name != "_modidx.py"]
    wide = [place for path in code + [ROOT / "workflow/Snakefile"]
            for line, place in code_lines(path) if len(line) > WIDTH]
    assert not wide, f"{len(wide)} lines of more than {WIDTH} characters:\n" + "\n".join(wide)


def test_the_sidebar_lists_every_notebook():
    "The library in the order of its numbers."
    listed = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(str(path.relative_to(ROOT / "nbs")) for path in notebooks())
    library = [page for page in listed if page.startswith("library/")]
    assert library == sorted(library)


def test_train_has_parameters():
    "papermill needs the tag `parameters`: without it every run silently takes the defaults."
    code = cells(ROOT / "nbs/train.ipynb", "code")
    tagged = [cell for _, cell in code if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1


# --- links, images, citations, cross-references

def prose(page):
    "The Markdown of a page, without its code."
    if page.suffix == ".md": text = page.read_text(encoding="utf-8")
    else: text = "\n\n".join(source for source, _ in cells(page, "markdown"))
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
        has_anchors = target.suffix in (".ipynb", ".md") and target.exists()
        lost = anchor and has_anchors and anchor.lower() not in anchors(target)
        if lost or not target.exists(): broken.append(link)
    assert not broken, f"{name(page)} links to nothing: {', '.join(broken)}"


@PAGES
def test_citations_and_references_resolve(page):
    text, labels = prose(page), anchors(page)
    references = re.compile(r"@((?:eq|fig|tbl)-[\w-]+)")
    unknown = [label for label in references.findall(text) if label not in labels]
    assert not unknown, f"{name(page)} refers to no label of its own: {', '.join(unknown)}"
    citations.write(references.sub("", text), citations.references(), lambda key: None)  # names what lacks


@PAGES
def test_tags_can_be_read(page):
    "KaTeX shows the whole formula as an error when its tag holds a bare &."
    wrong = re.findall(r"\\tag\{[^}]*(?<!\\)&[^}]*\}", prose(page))
    assert not wrong, f"write \\& in {', '.join(wrong)}"


def test_no_addresses_of_machines_or_registries():
    "Nothing here knows where it was written, or where packages come from."
    folder = re.compile(r"(?<![\w/+=.~-])/(?:(?:work|home)/|root\b|tmp/probe)")
    hosts = ["pypi" + r"\.org", "python" + "hosted", "index" + "-url", "find" + "-links",
             "registry" + r"\.npm"]
    registry = re.compile("|".join(hosts))
    found = []
    for path in files():
        if path.is_symlink() or b"\0" in path.read_bytes(): continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            hit = folder.search(line) or registry.search(line)
            if hit: found.append(f"{name(path)}:{number}: {hit[0]}")
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
    variable = {n for n, p in inspect.signature(f).parameters.items()
                if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}  # docments cannot see their comments
    bases = f.__mro__[1:] if dataclasses.is_dataclass(f) else []
    bases = [base for base in bases if dataclasses.is_dataclass(base) and "__init__" in vars(base)]
    inherited = {n for base in bases for n, note in docments(base, returns=False).items() if note}
    contracts = [c for c in vars(sys.modules[f.__module__]).values()
                 if getattr(c, "_is_protocol", False) and c.__module__ == f.__module__]
    inherited |= {n for c in contracts for n, note in docments(c.__call__, returns=False).items() if note}
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
    assert seen["python_requires"] == f">={SETTINGS['min_python']}"
    assert sorted(seen["packages"]) == ["lfdm", "lfdm.images"]
    assert seen["install_requires"] == SETTINGS["requirements"].split()
    extras = ("dev", "workflow", "accelerate", "diffusers")
    assert seen["extras_require"] == {extra: SETTINGS[f"{extra}_requirements"].split() for extra in extras}
    assert f'version = "{SETTINGS["version"]}"' in (ROOT / "lfdm/__init__.py").read_text().replace("__", "")
    assert f"version: {SETTINGS['version']}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {SETTINGS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_requirement():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    listed = [line for line in lines if not line.startswith("#")]
    assert listed == sorted(f"{k}=={v}" for k, v in pins.items())
    for need in map(Requirement, (SETTINGS["requirements"] + " " + SETTINGS["dev_requirements"]).split()):
        pinned = need.name in pins and need.specifier.contains(pins[need.name])
        assert pinned, f"{need} is not pinned: run `make lock`"


def test_make_lists_its_targets():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = re.findall(r"^  make (\w+) +\S", run("make", "--no-print-directory"), re.M)
    assert sorted(listed) == sorted(targets)


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
    start = time.perf_counter()
    for name in "{modules}".split(): importlib.import_module(f"lfdm.{{name}}")
    print(time.perf_counter() - start)"""


def test_imports_are_few_and_fast():
    "Without Jupyter, nbdev and matplotlib (lfdm.plots has that), and in under 2 s beyond torch."
    modules = " ".join(m for m in MODULES if m != "plots")
    code = IMPORT.format(blocked=BLOCKED, modules=modules)
    seconds = min(float(run(sys.executable, "-c", code)) for _ in range(2))  # the first may wait for the disk
    assert seconds < 2, f"importing {modules} took {seconds:.2f} s beyond torch"
