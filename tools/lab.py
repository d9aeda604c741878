"""What `make lab` tells JupyterLab: `jupyter lab --config tools/lab.py`.

Lab opens on the front page. It shows the notebooks of nbs/ without what is meant for the site: cells that the
site hides are folded, citations are names and years, and labels are no part of a heading. When a notebook is
saved, all of this is undone, and it is cleaned as by `make export`: if nobody edited it, there is no diff.
"""
import ast
import re
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
sys.path.insert(0, str(TOOLS))

import citations  # noqa: E402

START = "nbs/index.ipynb"
FOLDED = re.compile(r"#\| *(hide|default_exp|echo: false)\b|---\n")   # how such a cell begins

# what the site reads -> what Lab shows -> what the site reads
LABEL = re.compile(r"^(#+ .*\S) \{#([\w-]+)\}$", re.M), r'\1 <a id="\2"></a>'
LABEL_BACK = re.compile(r'^(#+ .*\S) <a id="([\w-]+)"></a>$', re.M), r"\1 {#\2}"
EQUATION = re.compile(r"\$\$ (\{#eq-[\w-]+\})"), r"$$ <!-- \1 -->"
EQUATION_BACK = re.compile(r"\$\$ <!-- (\{#eq-[\w-]+\}) -->"), r"$$ \1"
CITED_BACK = re.compile(r'\[[^\[\]]*\]\(\S* "(\[[^"\]]*@[^"\]]*\]|@[\w-]+)"\)'), r"\1"


def cited(text, refs):
    "The citations of a text as links, which keep in their title what they were."
    def linked(label, was):
        address = next((refs[key]["url"] for key in re.findall(r"@([\w-]+)", was) if "url" in refs[key]), "#")
        return f'[{label}]({address} "{was}")'
    def group(m):
        if any(key not in refs for key in re.findall(r"@([\w-]+)", m[0])): return m[0]
        return linked(citations.write(m[0], refs, lambda key: None), m[0])
    def bare(m): return linked(citations.write(m[0], refs, lambda key: None), m[0]) if m[1] in refs else m[0]
    parts = re.split(rf"({citations.GROUP.pattern})", text)   # each with its inside
    return "".join(citations.BARE.sub(bare, part) if i % 3 == 0 else citations.GROUP.sub(group, part)
                   for i, part in enumerate(parts) if i % 3 < 2)


def is_folded(source):
    "Is a cell for the site alone, or are its lines nothing but the imports of a module?"
    if FOLDED.match(source) or not re.match(r"#\| *exports?\n", source): return bool(FOLDED.match(source))
    lines = [line for node in ast.parse(source).body
             for line in (node.body if isinstance(node, ast.With) else [node])]
    return all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in lines)


def for_lab(notebook, refs):
    "Change a notebook to what a reader of Lab sees first."
    for cell in notebook["cells"]:
        source = cell["source"]
        if cell["cell_type"] == "markdown":
            def shown(part): return cited(EQUATION[0].sub(EQUATION[1], LABEL[0].sub(LABEL[1], part)), refs)
            cell["source"] = citations.outside_code(shown, source)
        elif is_folded(source):
            cell["metadata"]["jupyter"] = {"source_hidden": True}


def for_disk(notebook):
    "Change it back, and clean it."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown": continue
        def written(part):
            for pattern, text in (CITED_BACK, EQUATION_BACK, LABEL_BACK): part = pattern.sub(text, part)
            return part
        cell["source"] = citations.outside_code(written, "".join(cell["source"]))
    c = get_config(path=ROOT)
    clean_nb(notebook, c.clear_all, c.allowed_metadata_keys.split(), c.allowed_cell_metadata_keys.split(),
             c.clean_ids)


def ours(path): return path.strip("/").startswith("nbs/") and path.endswith(".ipynb")


def before_save(model, path="", **_):
    "Jupyter calls this with what it is about to save."
    if model["type"] == "notebook" and ours(path): for_disk(model["content"])


def reading(base):
    "The class of Jupyter's that reads and writes files, with the notebooks of nbs/ as a reader wants them."
    class Reading(base):
        async def get(self, path, content=True, *args, **kwargs):
            model = await super().get(path, content, *args, **kwargs)
            if content and model["type"] == "notebook" and ours(path):
                for_lab(model["content"], citations.references())
            return model
    return Reading


if "get_config" in globals():   # Jupyter reads this file, and gives it this function; tests import it
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    c = get_config()  # noqa: F821
    c.ServerApp.root_dir = str(ROOT)
    c.ServerApp.contents_manager_class = reading(AsyncLargeFileManager)
    c.ContentsManager.pre_save_hook = before_save
    c.LabApp.default_url = f"/lab/tree/{START}"
    c.LabServerApp.app_settings_dir = c.LabApp.app_settings_dir = str(TOOLS / "lab_settings")
