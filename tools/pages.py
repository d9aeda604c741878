"""The last touch to the pages of the site, the same whether Quarto or smalldocs made them.

KaTeX comes from the site itself, so that a page works without the web and asks nobody for anything;
each page names its one address; pictures have an alt text, and those that are charts suit a dark
page; 404.html works at any depth; and the search knows equations by the names people type.
"""
import base64
import html
import io
import json
import re
import sys
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent
KATEX = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[\w.]+/dist/")
WEB_FONTS = re.compile(r"""@import\s*(?:url\(\s*)?(["']?)https://fonts\.[^"')]*\1\s*\)?\s*;""")
# what Quarto adds to a page with a script of its own, for the widgets of Jupyter: there are none here
WIDGETS = re.compile(r"""<script[^>]*src="https://cdnjs\.[^>]*></script>|<script[^>]*>define\('jquery'.*?</script>""",
                     re.S)
IMAGE = re.compile(r"<img\b[^>]*>")
TABLE = re.compile(r"<table\b.*?</table>", re.S)
INLINE = "data:image/png;base64,"
WHITE = 245   # of 255: paper


def fact(name):
    "A value of nbs/nbdev.yml, which nbdev writes from settings.ini."
    text = (ROOT / "nbs" / "nbdev.yml").read_text(encoding="utf-8")
    return re.search(rf'{name}: "(.+)"', text)[1]


def is_chart(image):
    "Is more than half of a picture white paper? A photograph's colours must stay as they are."
    small = image.convert("RGBA").reduce(max(1, min(image.size) // 64))
    pixels = list(zip(*[iter(small.tobytes())] * 4))
    return sum(a < 10 or min(r, g, b) >= WHITE for r, g, b, a in pixels) > len(pixels) / 2


def opened(source, page):
    "The file of an image on a page, or None if it is no PNG of ours."
    if source.startswith(INLINE): return io.BytesIO(base64.b64decode(source.removeprefix(INLINE)))
    path = page.parent / unquote(source)
    return path if path.suffix == ".png" and path.is_file() else None


def dressed(tag, page):
    "An image's tag with the size, so that nothing moves while it loads, and marked if it is a chart."
    from PIL import Image  # check_site.py, which needs an address from here, has none
    source = html.unescape(re.search(r'src="([^"]*)"', tag)[1])
    chart, size = source.endswith(".svg"), ""
    if picture := opened(source, page):
        with Image.open(picture, formats=["PNG"]) as image:
            chart, size = is_chart(image), 'width="{}" height="{}" '.format(*image.size)
    if "width=" in tag: size = ""
    if chart and 'class="' in tag: tag = tag.replace('class="', 'class="chart ')
    elif chart: size += 'class="chart" '
    return tag.replace("<img ", f"<img {size}")


def finished(text, page, site):
    "The HTML of a page, finished."
    name, up = page.relative_to(site).as_posix(), "../" * (len(page.relative_to(site).parts) - 1)
    address = fact("site-url").rstrip("/")
    text = KATEX.sub(f"{up}assets/katex/", text)
    text = re.sub(rf'"{re.escape(address)}/[\w/]*(?=assets/card)', f'"{address}/', text)
    text = text.replace(f'<a href="{address}/', f'<a href="{up}')   # nbdev links names to the published site
    text = WIDGETS.sub("", text)
    text = IMAGE.sub(lambda m: dressed(m[0], page), text)
    text = TABLE.sub(r'<div class="wide">\g<0></div>', text)
    if name == "404.html":   # the server shows it at addresses of any depth
        return text.replace("<head>", f'<head><base href="{urlparse(address).path}/">', 1)
    if 'rel="canonical"' not in text:
        at = f"{address}/" if name == "index.html" else f"{address}/{name}"
        text = text.replace("</head>", f'<link rel="canonical" href="{html.escape(at)}"></head>', 1)
    return text


def name_equations(site):
    "Let the search find the ledger's rows by names such as `thesis 3.22`."
    sys.path.insert(0, str(ROOT))
    from lfdm.ledger import search_entries
    index = site / "search.json"
    known, rows = json.loads(index.read_text(encoding="utf-8")), []
    for name, address, says in search_entries():
        at = address.replace(".ipynb", ".html")
        rows.append({"objectID": at, "href": at, "title": "Equations", "section": name, "text": says})
    index.write_text(json.dumps(rows + known, ensure_ascii=False), encoding="utf-8")


def finish(site):
    "Finish every page of a site."
    for page in site.rglob("*.html"):
        page.write_text(finished(page.read_text(encoding="utf-8"), page, site), encoding="utf-8")
    for theme in (site / "site_libs").rglob("*.css"):   # the reader's own fonts will do
        text = theme.read_text(encoding="utf-8")
        if WEB_FONTS.search(text): theme.write_text(WEB_FONTS.sub("", text), encoding="utf-8")
    name_equations(site)
