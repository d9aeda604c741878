"The site builds: a page for every notebook, and every image and link inside it leads somewhere."
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

import docs
import signatures
from tree import ROOT, cells, copy_tree, name, notebooks


class Page(HTMLParser):
    "The addresses and the ids of a page."

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.images, self.canonical = [], set(), [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids |= {attributes[k] for k in ("id", "name") if attributes.get(k)}
        if tag == "img": self.images.append(attributes)
        if attributes.get("rel") == "canonical": self.canonical.append(attributes["href"])
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
            if re.match(r"[a-z]+:|//", address) or link in ("/lfdm/", *page.canonical): continue
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


@pytest.fixture(scope="module")
def pages(site):
    return {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}


def test_every_image_has_an_alt_text_and_every_page_one_address(pages):
    home = re.search(r'site-url: "(.+?)/?"', (ROOT / "nbs/nbdev.yml").read_text(encoding="utf-8"))[1]
    for path, page in pages.items():
        untold = [image["src"][:60] for image in page.images if not (image.get("alt") or "").strip()]
        assert not untold, f"{path}: {untold}"
        at = path.removesuffix("index.html") if path == "index.html" else path
        none = path in ("404.html", "explorer/index.html")   # the second stands in a frame of its guide
        assert page.canonical == ([] if none else [f"{home}/{at}"]), path


def test_a_page_asks_nobody_else(site):
    "No style sheet, script, font or picture comes from another address."
    asked = re.compile(r"""<(?:script|img)[^>]*\bsrc="(https?:[^"]*)|"""
                       r"""<link[^>]*"stylesheet"[^>]*"(https?:[^"]*)|"""
                       r"""@import\s*(?:url\()?["']?(https?:[^"')]*)""")
    found = [f"{path.name}: {hit}" for path in (*site.rglob("*.html"), *site.rglob("*.css"))
             for hit in asked.findall(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_the_search_knows_equations_by_name(site):
    found = {row["section"]: row["href"] for row in json.loads((site / "search.json").read_text())}
    assert {"thesis 3.22", "paper 12", "Kingma & Gao 34", "note W1"} <= found.keys()
    page, _, anchor = found["thesis 3.22"].partition("#")
    assert anchor in Page(site / page).ids


def test_code_is_folded_in_studies_and_shown_in_the_library(site):
    folds = re.compile(r'<details class="code-fold">\s*<summary>Code')
    for page, folded in (("experiments/verdicts", True), ("guides/which_triple", True),
                         ("library/losses", False), ("guides/use_pytorch", False)):
        assert bool(folds.search((site / f"{page}.html").read_text())) == folded, page


def test_signatures_are_signatures(site):
    def example(x: int, *rest, how: str = "well", **more) -> list: pass
    class Choice: pass
    class Named(Choice):
        def __init__(self, name="a"): pass
    said = signatures.signature(example, "example").split("\n")
    assert said == ["def example(", "    x: int,", "    *rest,", "    how: str = 'well',", "    **more,",
                    ") -> list"]
    assert signatures.signature(Choice, "Choice") == "class Choice()"
    assert signatures.signature(Named, "Named") == "class Named(\n    name='a',\n)  # a subclass of Choice"
    left = re.compile("VAR_(POSITIONAL|KEYWORD)")
    assert not [path.name for path in site.rglob("*.html") if left.search(path.read_text())]


def test_words_for_a_picture():
    "The caption is quoted for YAML, which reads a colon as its own, and is the alt text; else the prose is."
    source = docs.with_words("#| fig-cap: Left: x. Right: y.\nplot()", "prose")
    assert source == '#| fig-alt: "Left: x. Right: y."\n#| fig-cap: "Left: x. Right: y."\nplot()'
    assert docs.with_words("plot()", "") == "plot()"
    told = docs.in_plain_words("## A heading\n\nOne.\n\n**Two** of [three](page.ipynb) [@key], $x$:")
    assert docs.with_words("plot()", told) == '#| fig-alt: "Two of three, x:"\nplot()'


def test_the_map_lists_every_notebook():
    "Once, in the order of the sidebar."
    page = ROOT / "nbs/guides/map.ipynb"
    text = "\n".join(source for source, _ in cells(page, "markdown")).partition("{#pages}")[2]
    listed = [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+\.ipynb)\)", text)]
    sidebar = re.findall(r"- (\S+\.ipynb)", (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    assert listed == [ROOT / "nbs" / link for link in sidebar if link != "guides/map.ipynb"]
