"""Build the site into _docs.

nbdev stages the notebooks in _proc, with the documentation of what they export (signatures.py).
Quarto renders them where it is installed. Elsewhere smalldocs does, from the same _quarto.yml; for
it the citations, cross-references and page names are first written out (Quarto does that by itself).
pages.py gives the pages what both leave out: KaTeX from the site itself, canonical links, names to search.
"""
import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import citations
import pages

ROOT = Path(__file__).resolve().parent.parent
STAGE, SITE = ROOT / "_proc", ROOT / "_docs"
KINDS = {"eq": "Equation", "fig": "Figure", "tbl": "Table"}
EQUATION = re.compile(r"\$\$(?P<body>[^$]+)\$\$\s*\{#(?P<label>eq-[\w-]+)\}")
LABEL = re.compile(r"(?:\{#|^#\| label: )((?:eq|fig|tbl)-[\w-]+)", re.M)
SPARED = "#|eval: false\n"  # as nobody writes it: to be taken away again
CAPTION = re.compile(r"^#\| (fig|tbl)-cap: (.*)$", re.M)
# options that smalldocs need not know
FOR_QUARTO = re.compile("bibliography|execute.enabled|grid|html-math-method|link-citations|output-file"
                        "|respect-user-color-scheme")
CONTINUED = re.compile(r"\n#\|  +(?=\S)")
SHOWN = re.compile(r"^#\| (hide|(echo|include): false|code-fold)|^show_doc", re.M)  # nothing to fold
# pages that are read for their results: their code is folded
FOLDED = ("experiments/*", "guides/which_*", "guides/what_*", "guides/scope*", "guides/map*")
REF = re.compile(r"(?<![\w\[])@((?:eq|fig|tbl)-[\w-]+)")


def demonstrates(source):
    "Does a cell import something and then do something with it, as lessons do?"
    try: tree = ast.parse(source)
    except SyntaxError: return False  # a magic
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return bool(imports) and len(imports) < len(tree.body) or any(node not in tree.body for node in imports)


def quoted(text):
    "A text as YAML takes it whatever stands in it, a colon for example."
    return json.dumps(text.strip().strip("\"'"), ensure_ascii=False)


def in_plain_words(markdown):
    "The last paragraph of a Markdown text without its marks, for those who cannot see the picture below it."
    apart = r"\$\$.*?\$\$|^#+ [^\n]*|^```.*?^```|\{[^}]*\}| ?\[@[^\]]*\]"   # equations, headings, code, names
    text = re.sub(apart, "", markdown, flags=re.S | re.M)
    last = text.strip().split("\n\n")[-1]
    last = re.sub(r"\[([^\]]*)\]\([^)]*\)|<[^>]*>|[*_`$\\|]|^[->#\d.]+ ", r"\1", last, flags=re.M)
    return " ".join(last.split())


def with_words(source, above):
    "A code cell with a caption that YAML can read and, from it or from the prose above, an alt text."
    caption = re.search(r"^#\| fig-cap: (.*)$", source, re.M)
    source = CAPTION.sub(lambda m: f"#| {m[1]}-cap: {quoted(m[2])}", source)
    alt = caption[1] if caption else above
    return f"#| fig-alt: {quoted(alt)}\n{source}" if alt and "#| fig-alt" not in source else source


def prepare(path, name):
    """Make a copy of a notebook ready for nbdev.

    A long caption goes on in lines that begin with `#|` and two spaces: nbdev wants it in one. To document
    what a notebook exports, nbdev runs each cell with an import: have it leave out the lessons.
    """
    page, above = json.loads(path.read_text(encoding="utf-8")), ""
    folded = any(name.match(pattern) for pattern in FOLDED)
    for cell in page["cells"]:
        source = CONTINUED.sub(" ", "".join(cell["source"]))
        if cell["cell_type"] == "markdown": above = in_plain_words(source) or above
        if cell["cell_type"] != "code": continue
        exported = re.search(r"^#\| export|^show_doc", source, re.M)
        drawn = any("image/png" in out.get("data", {}) for out in cell["outputs"])
        source = with_words(source, above if drawn else "")
        if folded and not SHOWN.search(source): source = "#| code-fold: true\n" + source
        cell["source"] = SPARED + source if demonstrates(source) and not exported else source
    path.write_text(json.dumps(page), encoding="utf-8")


def stage():
    "Fill _proc."
    shutil.rmtree(STAGE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        nbs = Path(shutil.copytree(ROOT / "nbs", Path(folder) / "nbs"))  # with what it links to
        for path in nbs.rglob("*.ipynb"): prepare(path, path.relative_to(nbs))
        # nbdev wants some `quarto` on the PATH, even where only smalldocs will follow
        stand_in = Path(folder) / "quarto"
        stand_in.write_text("#!/bin/sh\n")
        stand_in.chmod(0o755)
        env = os.environ | {"PATH": os.environ["PATH"] + os.pathsep + folder,
                            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tools")))}
        # each page has a shell of its own, and all of them would collect the garbage of all at the end
        code = ("import os, sys, signatures; from nbdev.quarto import nbdev_proc_nbs; "
                f"nbdev_proc_nbs(path={str(nbs)!r}, n_workers=0); sys.stdout.flush(); os._exit(0)")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    for path in STAGE.rglob("*.ipynb"):
        page = json.loads(path.read_text(encoding="utf-8"))
        for cell in page["cells"]:   # Quarto reads lists of lines
            cell["source"] = "".join(cell["source"]).removeprefix(SPARED).splitlines(keepends=True)
        path.write_text(json.dumps(page), encoding="utf-8")
    site = STAGE / "_quarto.yml"
    text = site.read_text(encoding="utf-8").replace("REPOSITORY", pages.fact("repo-url"))
    site.write_text(text, encoding="utf-8")


def number_labels(text):
    "Number the labels of a page, each kind by itself: `eq-snr` -> (1, 'Equation 1')."
    labels, count = {}, dict.fromkeys(KINDS, 0)
    for label in dict.fromkeys(LABEL.findall(text)):
        kind = label.split("-")[0]
        count[kind] += 1
        labels[label] = count[kind], f"{KINDS[kind]} {count[kind]}"
    return labels


def write_out(text, labels, refs):
    "A Markdown text with its equation numbers, cross-references and citations written out."
    known = ", ".join(labels)

    def equation(m):
        number = labels[m["label"]][0]
        return f"[]{{#{m['label']}}}\n\n$${m['body'].rstrip()} \\qquad({number})\n$$"

    def ref(m):
        if m[1] not in labels:
            raise ValueError(f"@{m[1]} refers to nothing on this page; its labels: {known}")
        return f"[{labels[m[1]][1]}](#{m[1]})"
    text = citations.outside_code(lambda part: REF.sub(ref, EQUATION.sub(equation, part)), text)
    # before the first sign of a table's cell smalldocs finds its last, and no math if that is a digit
    text = re.sub(r"(?<=\| )\$(?=\S)", "\u2060$", text)
    return citations.write(text, refs, lambda key: f"#ref-{key}")


def number_caption(source, labels):
    "A code cell with its figure's number before the caption."
    label = LABEL.search(source)
    if not label: return source
    number = labels[label[1]][1]
    return CAPTION.sub(lambda m: f"#| {m[1]}-cap: {quoted(number + ': ' + json.loads(m[2]))}", source)


def for_smalldocs(path, refs):
    "Rewrite one staged notebook in what smalldocs reads."
    page = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(c["source"]) for c in page["cells"]]
    outputs = [o["data"] for c in page["cells"] for o in c.get("outputs", [])
               if "text/markdown" in o.get("data", {})]
    labels = number_labels("\n".join(sources))
    prose = [s for s, c in zip(sources, page["cells"]) if c["cell_type"] == "markdown"]
    prose += ["".join(data["text/markdown"]) for data in outputs]
    used = sorted({key for text in prose for key in citations.cited(text, refs) if key in refs})

    for source, cell in zip(sources, page["cells"]):
        if cell["cell_type"] == "markdown": cell["source"] = write_out(source, labels, refs)
        else: cell["source"] = number_caption(source, labels)
    for data in outputs: data["text/markdown"] = write_out("".join(data["text/markdown"]), labels, refs)
    if used:
        items = "\n\n".join(f"[]{{#ref-{key}}}{citations.full(refs[key])}" for key in used)
        page["cells"].append({"cell_type": "markdown", "metadata": {}, "source": f"## References\n\n{items}"})
    path.write_text(json.dumps(page), encoding="utf-8")


def name_pages():
    "Give the staged notebooks the names of their pages: 20_targets.ipynb becomes targets.html."
    renamed = {}
    for path in STAGE.rglob("*.ipynb"):
        found = re.search(r"output-file: ([\w-]+)\.html", path.read_text(encoding="utf-8"))
        if found and found[1] != path.stem: renamed[path] = path.with_name(f"{found[1]}.ipynb")
    for path in [*STAGE.rglob("*.ipynb"), STAGE / "sidebar.yml"]:
        text = path.read_text(encoding="utf-8")
        for old, new in renamed.items(): text = text.replace(old.name, new.name)
        path.write_text(text, encoding="utf-8")
    for old, new in renamed.items(): old.rename(new)


def quarto():
    "Quarto's program: on the PATH, or the one that the package quarto-cli has put beside this Python."
    beside = Path(sys.executable).with_name("quarto")
    return shutil.which("quarto") or (str(beside) if beside.exists() else None)


def render():
    "Make the pages, in _proc/_docs; the name of what made them."
    if program := quarto():
        subprocess.run([program, "render", "--no-cache"], cwd=STAGE, check=True)
        return "Quarto " + subprocess.check_output([program, "--version"], text=True).strip()
    from smalldocs.site import build
    refs = citations.references()
    name_pages()
    for path in STAGE.rglob("*.ipynb"):
        try: for_smalldocs(path, refs)
        except ValueError as e: sys.exit(f"{path.name}: {e}")
    for warning in build(STAGE, quiet=True).warnings:
        if not FOR_QUARTO.search(warning): print("warning:", warning)
    return "smalldocs " + importlib.metadata.version("smalldocs")


def add_explorer():
    "Write the explorer, which its guide shows in a frame."
    code = "import sys; from lfdm.explorer import write_explorer; write_explorer(sys.argv[1])"
    page, env = SITE / "explorer" / "index.html", os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, page], cwd=ROOT, env=env, check=True)


if __name__ == "__main__":
    stage()
    builder = render()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "_docs", SITE)
    pages.finish(SITE)
    add_explorer()
    count = len(list(SITE.rglob("*.html")))
    print(f"{count} pages, made by {builder}: {SITE.relative_to(ROOT) / 'index.html'}")
