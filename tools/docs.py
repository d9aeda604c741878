"""Build the site into _docs.

nbdev stages the notebooks in _proc, with the documentation of what they export. Quarto renders
them where it is installed. Elsewhere smalldocs does, from the same _quarto.yml; for it the
citations, cross-references and page names are first written out (Quarto does that by itself).
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import citations

ROOT = Path(__file__).resolve().parent.parent
STAGE, SITE = ROOT / "_proc", ROOT / "_docs"
KINDS = {"eq": "Equation", "fig": "Figure", "tbl": "Table"}
EQUATION = re.compile(r"\$\$(?P<body>[^$]+)\$\$\s*\{#(?P<label>eq-[\w-]+)\}")
LABEL = re.compile(r"(?:\{#|^#\| label: )((?:eq|fig|tbl)-[\w-]+)", re.M)
SPARED = "#|eval: false\n"  # as nobody writes it: to be taken away again
CAPTION = re.compile(r"^#\| (fig|tbl)-cap: (.*)$", re.M)
# options that smalldocs need not know
FOR_QUARTO = re.compile("bibliography|execute.enabled|html-math-method|link-citations|output-file")
CONTINUED = re.compile(r"\n#\|  +(?=\S)")
WEB_FONTS = re.compile(r"@import url\(https://fonts[^)]*\);")
REF = re.compile(r"(?<![\w\[])@((?:eq|fig|tbl)-[\w-]+)")


def demonstrates(source):
    "Does a cell import something and then do something with it, as lessons do?"
    try: tree = ast.parse(source)
    except SyntaxError: return False  # a magic
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    return bool(imports) and len(imports) < len(tree.body) or any(node not in tree.body for node in imports)


def prepare(path):
    """Make a copy of a notebook ready for nbdev.

    A long caption goes on in lines that begin with `#|` and two spaces: nbdev wants it in one. To document
    what a notebook exports, nbdev runs each cell with an import: have it leave out the lessons.
    """
    page = json.loads(path.read_text(encoding="utf-8"))
    for cell in page["cells"]:
        if cell["cell_type"] != "code": continue
        source = cell["source"] = CONTINUED.sub(" ", "".join(cell["source"]))
        wanted = re.search(r"^#\| export|^show_doc", source, re.M)
        if demonstrates(source) and not wanted:
            cell["source"] = SPARED + source
    path.write_text(json.dumps(page), encoding="utf-8")


def stage():
    "Fill _proc."
    shutil.rmtree(STAGE, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(shutil.copytree(ROOT / "nbs", Path(folder) / "nbs"))  # with what it links to
        for path in pages.rglob("*.ipynb"): prepare(path)
        # nbdev wants some `quarto` on the PATH, even where only smalldocs will follow
        stand_in = Path(folder) / "quarto"
        stand_in.write_text("#!/bin/sh\n")
        stand_in.chmod(0o755)
        env = os.environ | {"PATH": os.environ["PATH"] + os.pathsep + folder, "PYTHONPATH": str(ROOT)}
        # each page has a shell of its own, and all of them would collect the garbage of all at the end
        code = ("import os, sys; from nbdev.quarto import nbdev_proc_nbs; "
                f"nbdev_proc_nbs(path={str(pages)!r}, n_workers=0); sys.stdout.flush(); os._exit(0)")
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True)
    for path in STAGE.rglob("*.ipynb"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(json.dumps(SPARED)[1:-1], ""), encoding="utf-8")


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
    return citations.write(text, refs, lambda key: f"#ref-{key}")


def number_caption(source, labels):
    "A code cell with its figure's number before the caption."
    label = LABEL.search(source)
    if not label: return source
    def caption(m):
        text = f"{labels[label[1]][1]}: " + m[2].strip("\"'")
        return f"#| {m[1]}-cap: " + json.dumps(text, ensure_ascii=False)
    return CAPTION.sub(caption, source)


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


def render():
    "Make the pages, in _proc/_docs."
    if shutil.which("quarto"):
        return subprocess.run(["quarto", "render", "--no-cache"], cwd=STAGE, check=True)
    from smalldocs.site import build
    refs = citations.references()
    name_pages()
    for path in STAGE.rglob("*.ipynb"):
        try: for_smalldocs(path, refs)
        except ValueError as e: sys.exit(f"{path.name}: {e}")
    for warning in build(STAGE, quiet=True).warnings:
        if not FOR_QUARTO.search(warning): print("warning:", warning)
    for theme in (STAGE / "_docs").rglob("themes/*.css"):  # the reader's own fonts will do
        theme.write_text(WEB_FONTS.sub("", theme.read_text(encoding="utf-8")), encoding="utf-8")


def add_explorer():
    "Write the explorer, which its guide shows in a frame."
    code = "import sys; from lfdm.explorer import write_explorer; write_explorer(sys.argv[1])"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, SITE / "explorer" / "index.html"]
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def link_inside():
    "nbdev links names to the published site: make these links relative, so that any copy is whole."
    address = re.search(r'site-url: "(.+)"', (ROOT / "nbs" / "nbdev.yml").read_text(encoding="utf-8"))[1]
    for page in SITE.rglob("*.html"):
        up = "../" * (len(page.relative_to(SITE).parts) - 1)
        html = page.read_text(encoding="utf-8")
        page.write_text(html.replace(f'<a href="{address}/', f'<a href="{up}'), encoding="utf-8")


if __name__ == "__main__":
    stage()
    render()
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(STAGE / "_docs", SITE)
    link_inside()
    add_explorer()
    print(f"{len(list(SITE.rglob('*.html')))} pages: {SITE.relative_to(ROOT) / 'index.html'}")
