"""Write README.md from nbs/index.ipynb.

python tools/readme.py          write it
python tools/readme.py --check  only say whether it is up to date (exit status 1 if not)
"""
import json
import os
import re
import sys
from pathlib import Path

import citations

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
README = ROOT / "README.md"
HEADER = "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that and run `make export`. -->\n\n"
LINK = re.compile(r"""(\]\(|(?:src|href)=")([^)\s"]+)""")
HIDDEN = {"hide", "default_exp"}


def text(source):
    "A notebook's string, which may be stored as a list of lines."
    return source if isinstance(source, str) else "".join(source)


def relink(address):
    "An address seen from nbs/ as seen from the root; web addresses and #anchors stay."
    path, mark, anchor = address.partition("#")
    if not path or re.match(r"[a-z]+:", path): return address
    target = (INDEX.parent / path).resolve()  # follows nbs/figures to figures/
    return os.path.relpath(target, ROOT) + mark + anchor


def markdown(source, refs):
    "A Markdown cell or output, its links and citations made right for the README."
    relinked = citations.outside_code(lambda part: LINK.sub(lambda m: m[1] + relink(m[2]), part), source)
    return citations.write(relinked, refs, lambda key: refs[key].get("url"))


def directives(source):
    "The `#|` lines of a code cell as a dict, and the code without them."
    lines = source.splitlines()
    given = [line[2:].strip() for line in lines if line.startswith("#|")]
    found = dict(re.match(r"([\w-]+):?\s*(.*)", line).groups() for line in given)
    return found, "\n".join(line for line in lines if not line.startswith("#|")).strip()


def output(out, refs):
    "One stored output: text in a fence, Markdown and HTML as they are."
    if out["output_type"] == "stream": return "```\n" + text(out["text"]).rstrip() + "\n```"
    data = out.get("data", {})
    if "text/markdown" in data: return markdown(text(data["text/markdown"]), refs).strip()
    if any(kind.startswith("image/") for kind in data):
        raise SystemExit("index.ipynb stores an image as an output: "
                         "save it in figures/ and show that with ![](figures/...)")
    if "text/html" in data:
        return re.sub(r"<style.*?</style>\s*", "", text(data["text/html"]), flags=re.S).strip()
    return "```\n" + text(data.get("text/plain", "")).rstrip() + "\n```"


def blocks(cell, refs):
    "What a cell shows."
    source = text(cell["source"])
    if cell["cell_type"] == "markdown": yield markdown(source, refs).strip()
    if cell["cell_type"] != "code": return
    found, code = directives(source)
    if HIDDEN & found.keys() or found.get("include") == "false": return
    if code and found.get("echo") != "false": yield f"```python\n{code}\n```"
    if found.get("output") != "false": yield from (output(out, refs) for out in cell["outputs"])


def readme():
    "The whole README."
    refs = citations.references()
    cells = json.loads(INDEX.read_text(encoding="utf-8"))["cells"]
    return HEADER + "\n\n".join(block for cell in cells for block in blocks(cell, refs) if block) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if not README.exists() or README.read_text(encoding="utf-8") != readme():
            sys.exit("README.md is not what nbs/index.ipynb says: run `make export`")
    elif sys.argv[1:]: sys.exit(__doc__)
    else: README.write_text(readme(), encoding="utf-8")
