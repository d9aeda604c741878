"The site builds: a page for every notebook, and every image and link inside it leads somewhere."
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from tree import copy_tree, name, notebooks


class Page(HTMLParser):
    "The addresses and the ids of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[k] for k in ("id", "name") if attributes.get(k)}
        self.links += [attributes[k] for k in ("src", "href") if attributes.get(k)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    copy = copy_tree(tmp_path_factory.mktemp("site"))
    built = subprocess.run([sys.executable, "tools/docs.py"], cwd=copy, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning:" not in built.stdout.lower(), built.stdout
    return copy / "_docs"


def test_every_notebook_has_a_page(site):
    "20_targets.ipynb is targets.html; train.ipynb, which exports nothing, is train.html."
    pages = {path.stem for path in site.rglob("*.html")}
    missing = [name(path) for path in notebooks() if re.sub(r"^\d+_", "", path.stem) not in pages]
    assert not missing, f"no page for {', '.join(missing)}"


def test_links_and_images_of_the_site_resolve(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:|//", address): continue
            home = site if address.startswith("/") else path.parent
            target = home / address.lstrip("/") if address else path
            if target.is_dir(): target /= "index.html"
            lost = anchor and target in pages and anchor not in pages[target].ids
            if lost or not target.exists(): broken.append(f"{path.name}: {link}")
    assert not broken, "\n".join(broken)


def test_nothing_is_left_unwritten(site):
    "No citation, cross-reference or label shows as it was typed."
    typed = re.compile(r"\[@[\w-]+|[@?](?:eq|fig|tbl|sec)-[\w-]+|\{#[\w-]+\}")
    left = [f"{path.name}: {hit}" for path in site.rglob("*.html")
            for hit in typed.findall(path.read_text(encoding="utf-8"))]
    assert not left, "\n".join(left)
