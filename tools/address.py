"""Bring the repository's address, which settings.ini says, to every page that shows it.

    python tools/address.py          # write it, where another one stood before
    python tools/address.py --check  # only say whether all is up to date (exit status 1 if not)

The address is `git_url` of settings.ini if there is one, else that of `user` and `repo` at GitHub. What was
written last stands in CITATION.cff.
"""
import configparser
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CITATION = ROOT / "CITATION.cff"
SHOWN = re.compile(r'^repository-code: "(.+)"$', re.M)
# what nbdev writes from settings.ini itself, and what is written from the front page
ELSEWHERE = "settings.ini", "nbs/nbdev.yml", "lfdm/_modidx.py", "README.md"


def address():
    "Where the repository is."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    c = config["DEFAULT"]
    return c.get("git_url") or f"https://github.com/{c['user']}/{c['repo']}"


def pages():
    "The texts that may show it."
    listed = ["git", "ls-files", "-z", "*.md", "*.cff", "*.ipynb", "*.yml", "*.py", "*.toml"]
    names = {*subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")} - {"", *ELSEWHERE}
    return [ROOT / name for name in sorted(names) if not (ROOT / name).is_symlink()]


def outdated():
    "(page, its text as it should be) where they differ."
    before, now = SHOWN.search(CITATION.read_text(encoding="utf-8"))[1], address()
    for page in pages():
        if before == now or not page.exists(): continue
        text = page.read_text(encoding="utf-8")
        if before in text: yield page, text.replace(before, now)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]): sys.exit(__doc__)
    found = list(outdated())
    if sys.argv[1:] and found:
        sys.exit(f"settings.ini says {address()}: run `make export` for "
                 + ", ".join(str(page.relative_to(ROOT)) for page, _ in found))
    for page, text in found: page.write_text(text, encoding="utf-8")
