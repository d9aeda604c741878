"What the tests look at: the files of this repository, and how to read a notebook."
import json
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files():
    "Every file that is, or is about to be, in the repository."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
    found = {ROOT / name for name in names if name}
    return sorted(path for path in found if path.is_symlink() or path.is_file())


def notebooks():
    "The notebooks, by their path from the root."
    return [path for path in files() if path.suffix == ".ipynb" and path.is_relative_to(ROOT / "nbs")]


def name(path):
    "A path as the tests print it."
    return str(path.relative_to(ROOT))


def cells(path, kind):
    "The (source, cell) pairs of one kind, `code` or `markdown`, in a notebook."
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [("".join(cell["source"]), cell) for cell in found if cell["cell_type"] == kind]


def copy_tree(to):
    "Copy the repository's files: what a test builds, it builds in a copy."
    for path in files():
        target = to / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target, follow_symlinks=False)
    return to


def edit(path, change):
    "Change a JSON file in place."
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
