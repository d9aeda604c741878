"JupyterLab shows the notebooks for reading, and a save undoes it: one that nobody edited leaves no diff."
import asyncio
import copy
import json
import re

import nbformat
import pytest

import citations
import lab
from tree import ROOT, name, notebooks

REFS = citations.references()


def used(notebook):
    "A notebook as Lab's pages send it, after its cells have run."
    notebook = copy.deepcopy(notebook)
    notebook["metadata"]["kernelspec"]["display_name"] = "Python 3 (ipykernel)"
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.13.0"}
    for i, cell in enumerate(notebook["cells"]):
        cell["metadata"] |= {"trusted": True, "scrolled": True, "execution": {"iopub.status.busy": "now"}}
        if cell["cell_type"] != "code": continue
        cell["execution_count"] = i
        for out in cell["outputs"]:
            if out["output_type"] == "execute_result": out["execution_count"] = i
    return notebook


@pytest.mark.parametrize("path", notebooks(), ids=name)
def test_a_notebook_that_was_read_and_run_is_saved_as_it_was(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    lab.for_lab(notebook, REFS)
    shown = used(notebook)
    lab.for_disk(shown)
    assert nbformat.writes(shown) + "\n" == text


def test_through_jupyters_own_files(tmp_path):
    "What its server reads and writes, with the hook."
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    path = "nbs/library/10_schedules.ipynb"
    (tmp_path / path).parent.mkdir(parents=True)
    before = (ROOT / path).read_bytes()
    (tmp_path / path).write_bytes(before)
    (tmp_path / "own.ipynb").write_bytes(before)
    files = lab.reading(AsyncLargeFileManager)(root_dir=str(tmp_path), pre_save_hook=lab.before_save)

    async def open_and_save(path, change=lambda cells: None):
        model = await files.get(path)
        content = used(model["content"])
        change(content["cells"])
        await files.save({"type": "notebook", "format": "json", "content": content}, path)
        return model["content"]["cells"]
    shown = asyncio.run(open_and_save(path))
    assert (tmp_path / path).read_bytes() == before
    text = "\n".join(cell["source"] for cell in shown if cell["cell_type"] == "markdown")
    assert "[(Kumar 2025, 3.1)](" in text and " [@" not in text

    def edit(cells): cells[0]["source"] += " An edit with (round) [square] brackets."
    asyncio.run(open_and_save(path, edit))
    after = json.loads((tmp_path / path).read_text())
    assert after["cells"][0]["source"][-1].endswith("An edit with (round) [square] brackets.")
    assert after["cells"][1:] == json.loads(before)["cells"][1:]
    asyncio.run(open_and_save("own.ipynb"))   # a notebook elsewhere is the user's own
    assert "scrolled" in (tmp_path / "own.ipynb").read_text()


def test_what_a_reader_sees_first():
    "No front matter, no list of imports, no label in a heading, no key of a citation."
    labels = 0
    for path in notebooks():
        notebook = nbformat.read(path, as_version=4)
        labels += sum("{#" in cell["source"] for cell in notebook["cells"])
        lab.for_lab(notebook, REFS)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                prose = citations.CODE.sub("", re.sub(r'"\[[^"]*\]"|<!--.*?-->', "", cell["source"]))
                assert not re.search(r"^#.*\{#", prose, re.M) and not citations.GROUP.search(prose), prose
            folded = cell["metadata"].get("jupyter") == {"source_hidden": True}
            if cell["cell_type"] == "raw" or "#| hide" in cell["source"][:9]: assert folded, cell["source"]
            if "parameters" in cell["metadata"].get("tags", ()): assert not folded
    assert labels > 200


@pytest.mark.parametrize("source, folded", [
    ("#| hide\nx = 1", True), ("#| default_exp core", True), ("---\nskip_exec: true\n---", True),
    ("#| export\nimport math\n\nfrom a import (\n    b,\n)\n\nwith c('d'):\n    import e", True),
    ("#| export\nimport math\nx = 1", False), ("#| exports\ndef f(): pass", False), ("import math", False),
    ("#| echo: false\nplot()", True), ("#| hide_input", False)])
def test_what_is_folded(source, folded): assert lab.is_folded(source) == folded
