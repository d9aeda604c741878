"""Formulas and guards, broken on purpose: do their tests notice?

    python tests/mutations.py draw    # twenty of each, by the recorded seed, into mutations.json
    python tests/mutations.py one 7   # break that one
    python tests/mutations.py run     # break each in a copy of the repository and run the tests of its module

A mutation is known by the text of what it changes, as Python's own parser writes it, so that it is found again when
lines are broken otherwise or code has moved. What is worded otherwise today is said in its field `now`.
"""
import ast
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from tree import ROOT, copy_tree

FILE, SEED, MANY = Path(__file__).with_suffix(".json"), 20261126, 20
OTHER = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}


def modules(root):
    "The modules of the library, by their name."
    return {".".join(path.relative_to(root / "lfdm").with_suffix("").parts): path for path in sorted((root / "lfdm").rglob("[!_]*.py"))}


def inside_message(node, parents):
    "Is it part of what an error says, or of a name for people?"
    while node in parents:
        node = parents[node]
        if isinstance(node, (ast.Raise, ast.JoinedStr)): return True
    return False


def candidates(path):
    "(kind, place) of all that could be broken in a module: arithmetic, and the conditions under which it raises."
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and type(node.op) in OTHER and not inside_message(node, parents):
            if not any(isinstance(n, (ast.Constant, ast.List, ast.JoinedStr)) and not isinstance(getattr(n, "value", None), (int, float)) for n in ast.walk(node)): yield "formula", node
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise): yield "guard", node.test


def broken(source, text, kind):
    "The source with the first place of that text broken; None if there is none."
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if kind == "formula" and isinstance(node, ast.BinOp) and ast.unparse(node) == text: new = ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
        elif kind == "guard" and isinstance(node, ast.If) and ast.unparse(node.test) == text: node, new = node.test, ast.Constant(False)
        else: continue
        lines = source.encode().splitlines(keepends=True)
        start, end = sum(map(len, lines[:node.lineno - 1])) + node.col_offset, sum(map(len, lines[:node.end_lineno - 1])) + node.end_col_offset
        return (source.encode()[:start] + f"({ast.unparse(new)})".encode() + source.encode()[end:]).decode()


def draw():
    "Record twenty formulas and twenty guards."
    found = {"formula": [], "guard": []}
    for name, path in modules(ROOT).items():
        if name == "plots": continue
        for kind, node in candidates(path): found[kind].append(dict(kind=kind, module=name, text=ast.unparse(node)))
    rng = random.Random(SEED)
    chosen = [m for kind in found for m in rng.sample([dict(t) for t in {tuple(m.items()): None for m in found[kind]}], MANY)]
    FILE.write_text(json.dumps(chosen, indent=1, ensure_ascii=False) + "\n")


def run(tests_of, only=None):
    "Break each, or one, and run the tests of its module; prints which were caught."
    with tempfile.TemporaryDirectory() as root:
        copy, caught = copy_tree(Path(root)), 0
        chosen = json.loads(FILE.read_text())
        for i, m in enumerate(chosen):
            if only not in (None, i): continue
            place = m.get("now", m)
            path = modules(copy)[place["module"]]
            whole = path.read_text()
            new = broken(whole, place["text"], m["kind"])
            if new is None: print(f"{i:3} NOT FOUND {place}", flush=True); continue
            path.write_text(new)
            done = subprocess.run([sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests_of(place["module"])], cwd=copy, capture_output=True, text=True)
            path.write_text(whole)
            caught += done.returncode == 1
            print(f"{i:3} {'caught' if done.returncode == 1 else f'NOT CAUGHT ({done.returncode})'} {m['kind']} {place['module']}: {place['text'][:90]}", flush=True)
        if only is None: print(f"{caught} of {len(chosen)} caught")


def tests_of(module):
    "The tests of a module."
    return [f"tests/test_{name}.py" for name in MORE.get(module, [module.split(".")[-1]])]


MORE = dict(adaptive=["adaptive", "training"], networks=["training", "stack"], studies=["studies_record"], runs=["runs", "stack"])
MORE["images.data"] = MORE["images.templates"] = ["images"]


if __name__ == "__main__":
    if sys.argv[1] == "draw": draw()
    else: run(tests_of, int(sys.argv[2]) if sys.argv[1] == "one" else None)
