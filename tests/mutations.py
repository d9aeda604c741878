"""Formulas and guards, broken on purpose: do their tests notice?

    python tests/mutations.py draw    # twenty of each, by the recorded seed, into mutations.json
    python tests/mutations.py one 7   # break that one
    python tests/mutations.py run     # break each in a copy of the repository and run the tests of its module

A mutation is known by the text of what it changes, as Python's own parser writes it, so that it is found
again when lines are broken otherwise or code has moved. Its field `now` says how it is worded today.
"""
import ast
import itertools
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
    paths = sorted((root / "lfdm").rglob("[!_]*.py"))
    return {".".join(path.relative_to(root / "lfdm").with_suffix("").parts): path for path in paths}


def in_message(node, parents):
    "Is it part of what an error says, or of a name for people?"
    while node in parents:
        node = parents[node]
        if isinstance(node, (ast.Raise, ast.JoinedStr)): return True
    return False


def of_numbers(node):
    "Arithmetic without words or lists in it?"
    constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
    return (all(isinstance(v, (int, float)) for v in constants)
            and not any(isinstance(n, (ast.List, ast.JoinedStr)) for n in ast.walk(node)))


def candidates(path):
    "(kind, node) of all that could be broken in a module: arithmetic, and the conditions of its raises."
    tree = ast.parse(path.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        arithmetic = isinstance(node, ast.BinOp) and type(node.op) in OTHER
        if arithmetic and of_numbers(node) and not in_message(node, parents): yield "formula", node
        if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise): yield "guard", node.test


def place_of(tree, text, kind):
    "The first node of that text, and what it becomes; None if there is none."
    for node in ast.walk(tree):
        if kind == "formula" and isinstance(node, ast.BinOp) and ast.unparse(node) == text:
            return node, ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
        if kind == "guard" and isinstance(node, ast.If) and ast.unparse(node.test) == text:
            return node.test, ast.Constant(False)


def broken(source, text, kind):
    "The source with the first place of that text broken; None if there is none."
    found = place_of(ast.parse(source), text, kind)
    if found is None: return None
    node, new = found
    code = source.encode()
    starts = [0, *itertools.accumulate(map(len, code.splitlines(keepends=True)))]
    start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
    return (code[:start] + f"({ast.unparse(new)})".encode() + code[end:]).decode()


def draw():
    "Record twenty formulas and twenty guards. (Done once, before the tests were shortened.)"
    found = {"formula": {}, "guard": {}}
    for name, path in modules(ROOT).items():
        if name == "plots": continue
        for kind, node in candidates(path): found[kind][name, ast.unparse(node)] = None
    rng = random.Random(SEED)
    chosen = [dict(kind=kind, module=module, text=text)
              for kind in found for module, text in rng.sample(list(found[kind]), MANY)]
    FILE.write_text(json.dumps(chosen, indent=1, ensure_ascii=False) + "\n")


def caught(copy, module, text, kind):
    "Do the tests of a module fail when it is broken? None if the text is not there."
    path = modules(copy)[module]
    whole = path.read_text()
    new = broken(whole, text, kind)
    if new is None: return None
    path.write_text(new)
    tests = [f"tests/test_{name}.py" for name in MORE.get(module, [module.replace("images.", "image_")])]
    command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *tests]
    try: return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1
    finally: path.write_text(whole)


def run(only=None):
    "Break each, or one, and run the tests of its module; prints which were caught."
    with tempfile.TemporaryDirectory() as root:
        copy, chosen, count = copy_tree(Path(root)), json.loads(FILE.read_text()), 0
        for i, m in enumerate(chosen):
            if only not in (None, i): continue
            place = m.get("now", m)
            found = caught(copy, place["module"], place["text"], m["kind"])
            count += bool(found)
            word = {True: "caught", False: "NOT CAUGHT", None: "NOT FOUND"}[found]
            print(f"{i:3} {word} {m['kind']} {place['module']}: {place['text'][:70]}", flush=True)
        if only is None: print(f"{count} of {len(chosen)} caught")


MORE = {   # module -> its tests, where there are more than those of its name
    "training": ["training", "stack"],
    "likelihood": ["likelihood", "image_bounds"],
}


if __name__ == "__main__":
    if sys.argv[1] == "draw": draw()
    else: run(int(sys.argv[2]) if sys.argv[1] == "one" else None)
