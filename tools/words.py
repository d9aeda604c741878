"""The words of a make command: `make train target=v epochs=5`.

    python tools/words.py check GOALS WORDS     # refuse what no target takes
    python tools/words.py train WORDS           # run nbs/train.ipynb with them
    python tools/words.py study WORDS NAME...   # run studies

WORDS is make's own list of what was given on the command line, $(MAKEOVERRIDES): the environment does not
count. The check comes before any set-up, so it needs Python alone.
"""
import ast
import difflib
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "nbs/train.ipynb"
STUDIES = ROOT / "nbs/experiments"
SCALES = "full", "quick"
# the words of a target, beside the parameters of the notebook that it runs
OF_TARGET = {"train": ("out", "args"), "study": ("name", "args"), "figures": ("scale",), "draw": ("scale",),
             "test": ("args",), "lab": ("args",), "benchmark": ("args",)}
# for every target: the Python that makes .venv, and what the environment may say as well
EVERYWHERE = re.compile(r"PYTHON|SHELL|(UV|PIP|LFDM|OMP)_\w+")


def parse(words):
    "Make's list of the words of a command line: name -> value."
    parts = re.findall(r"(?:[^\s\\]|\\.)+", words, re.S)
    texts = [re.sub(r"\\(.)", r"\1", part, flags=re.S).replace("$$", "$") for part in parts]
    pairs = (text.partition("=") for text in reversed(texts))   # make has the last one first
    return {name.rstrip(":?+!"): value for name, _, value in pairs}


def refuse(message):
    "End with one line."
    sys.exit(message.rstrip("."))


def unknown(kind, name, valid):
    "The message on a bad name: the nearest, and all."
    near = difflib.get_close_matches(name.lower(), valid, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(valid)}."


def targets():
    "The targets of the Makefile, in its order."
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"^([a-z]+):", text, re.M)


def studies():
    "The names of the studies."
    return sorted(path.stem for path in STUDIES.glob("*.ipynb"))


def parameters(notebook):
    "The names in a notebook's cell of parameters."
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    source, = ("".join(cell["source"]) for cell in found if "parameters" in cell["metadata"].get("tags", ()))
    return [node.targets[0].id for node in ast.parse(source).body if isinstance(node, ast.Assign)]


def check(goals, words):
    "End with a message unless the targets are known and take the words."
    for goal in goals:
        if goal not in targets() and goal != ".venv/ready":
            refuse(unknown("target", goal, targets()) + " What each does: make")
    named = words.get("name", "")
    if "study" in goals and named not in studies():
        if not named: refuse(f"which study? make study name=likelihood. There are: {', '.join(studies())}.")
        refuse(unknown("study", named, studies()))
    valid = {word: None for goal in goals for word in words_of(goal, named)}
    for name in words:
        if name in valid or EVERYWHERE.fullmatch(name): continue
        command = f"make {' '.join(goals)}".strip()
        if not valid: refuse(f"{command} takes no words, but {name!r} was given.")
        refuse(unknown(f"word of `{command}`:", name, [*valid]))
    if "scale" in words and "scale" in valid and words["scale"] not in SCALES:
        refuse(unknown("scale", words["scale"], SCALES))


def words_of(goal, study):
    "What a target takes."
    notebook = TRAIN if goal == "train" else STUDIES / f"{study}.ipynb" if goal == "study" else None
    return [*(parameters(notebook) if notebook else ()), *OF_TARGET.get(goal, ())]


# ---- notebooks

def run(notebook, output, given, args=""):
    "Run a notebook as papermill's command does. What goes wrong is one line; the rest is in the notebook."
    import click
    import papermill.cli
    from papermill.exceptions import PapermillExecutionError
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    command = [str(notebook), str(output), "--no-progress-bar", "--stdout-file", "-", "--stderr-file", "-"]
    try: papermill.cli.papermill.main([*command, *words, *shlex.split(args)], standalone_mode=False)
    except PapermillExecutionError as e:
        said = re.sub(r"\x1b\[[0-9;]*m", "", str(e.evalue)).strip()
        refuse(f"{said if e.ename in ('ValueError', 'TypeError') else f'{e.ename}: {said}'}\n"
               f"(cell {e.exec_count} of {notebook.relative_to(ROOT)}; as far as it ran: {output})")
    except (KeyboardInterrupt, click.Abort):
        print("stopped: the same command again goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(130)   # what else had to end has nothing to add
    except Exception as e:
        if type(e).__module__.split(".")[0] not in ("click", "nbclient", "papermill"): raise
        refuse(f"{notebook.relative_to(ROOT)}: {' '.join(str(e).split())}")


def train(words):
    "Train, sample and judge one model."
    given = {name: value for name, value in words.items() if name in parameters(TRAIN)}
    output = words.get("out", "runs/train.ipynb")
    run(TRAIN, output, given, words.get("args", ""))
    print(f"The notebook with its figures: {output}")


def study(words, names):
    "Run studies, one after the other."
    for name in names:
        notebook, output = STUDIES / f"{name}.ipynb", f"runs/{name}.ipynb"
        own = parameters(notebook)
        given = {"scale": "full"} | {word: value for word, value in words.items() if word in own}
        print(f"== {notebook.relative_to(ROOT)}, {given['scale']} scale", flush=True)
        run(notebook, output, given, words.get("args", ""))
    print("The figures: figures/. With tables and text:", *(f"runs/{name}.ipynb" for name in names))


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "check": check(rest[0].split(), parse(rest[1]))
    elif what == "train": train(parse(rest[0]))
    else: study(parse(rest[0]), rest[1:])
