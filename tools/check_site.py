"""Open every page of the built site in a browser: no errors, nothing missing, all math rendered.

It needs what the tests do not: playwright and a Chromium.

    make docs
    pip install playwright                         # in an environment of its own
    python tools/check_site.py --chromium "$(command -v chromium)"

The site is served under its published path. It asks nobody else for anything: a request to another
address is refused and reported. So is a page that scrolls sideways on a phone. Exit status 0: all
pages are right, or there is no playwright here.
"""
import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path
from urllib.parse import urlparse

from pages import fact

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 800}
SITE = Path(__file__).resolve().parent.parent / "_docs"
# What a reader sees of math that did not render: a formula still in its delimiters, or KaTeX's red.
UNRENDERED = """() => {
    const raw = [...document.querySelectorAll('.math')]
        .filter(m => !m.querySelector('.katex, mjx-container'));
    const red = [...document.querySelectorAll('.katex-error, mjx-merror')];
    const loose = [...document.querySelectorAll('main p, main td, main li, main figcaption')]
        .filter(e => !e.querySelector('.katex') && /\\\\\\(|\\\\\\[|\\$[^$\\s][^$]*\\$/.test(e.innerText));
    return [...raw, ...red, ...loose].map(e => e.textContent.trim().slice(0, 80));
}"""
BROKEN = "() => [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src.slice(0, 80))"
UNTOLD = "() => [...document.images].filter(i => !i.alt.trim()).map(i => i.src.slice(0, 80))"
SIDEWAYS = "() => document.documentElement.scrollWidth - window.innerWidth"
COUNT = "() => document.querySelectorAll('.katex, mjx-container').length"


def serve(folder, path):
    "Serve a folder on a free port of this machine, under a path; its address."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def translate_path(self, asked): return super().translate_path(asked.removeprefix(path))
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}{path}"


def answer(route, home, troubles):
    "Let the site's own requests through."
    url = route.request.url
    if url.startswith((home, "data:", "blob:")): return route.continue_()
    troubles.append(f"asks the web for {url}")
    route.abort()


def check(browser, home, page_path, args):
    "Open one page, in one colour scheme after the other; the number of formulas and what is wrong."
    troubles = []
    page = browser.new_page(viewport=DESKTOP)
    page.route("**/*", lambda route: answer(route, home, troubles))
    page.on("console", lambda said: said.type == "error" and troubles.append(f"console: {said.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("response", lambda r: r.status >= 400 and troubles.append(f"{r.status}: {r.url}"))
    page.goto(f"{home}/{page_path}", wait_until="networkidle")
    troubles += [f"math not rendered: {text}" for text in page.evaluate(UNRENDERED)]
    troubles += [f"image missing: {src}" for src in page.evaluate(BROKEN)]
    troubles += [f"image without an alt text: {src}" for src in page.evaluate(UNTOLD)]
    formulas = page.evaluate(COUNT)
    page.set_viewport_size(PHONE)
    wide = page.evaluate(SIDEWAYS)
    if wide > 0: troubles.append(f"scrolls sideways on a phone, by {wide} pixels")
    page.set_viewport_size(DESKTOP)
    if args.shots:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=args.shots / f"{Path(page_path).stem}-{scheme}.png", full_page=True)
    page.close()
    return formulas, list(dict.fromkeys(troubles))


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--chromium", help="the browser's program (without it, the one playwright installed)")
    parser.add_argument("--shots", type=Path, help="a folder for screenshots, light and dark")
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError: return print("skipped: playwright is not installed here")
    pages = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html"))
    if not pages: sys.exit("there is no site in _docs: run `make docs`")
    if args.shots: args.shots.mkdir(parents=True, exist_ok=True)

    home, bad = serve(SITE, urlparse(fact("site-url")).path.rstrip("/")), 0
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for page in pages:
            formulas, troubles = check(browser, home, page, args)
            print(f"{page}: {formulas} formulas, {'ok' if not troubles else f'{len(troubles)} wrong'}")
            for trouble in troubles: print("   ", trouble)
            bad += bool(troubles)
        browser.close()
    print(f"{len(pages) - bad} pages right, {bad} wrong")
    sys.exit(bool(bad))


if __name__ == "__main__": main()
