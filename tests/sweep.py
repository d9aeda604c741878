"""What users throw at every public function, and what comes back.

    python tests/sweep.py            # counts, module by module
    python tests/sweep.py losses     # one module, its faults listed

A public function is what a module's `__all__` names: a new one joins by itself, and says so if it needs an
example in examples.py. One argument at a time is replaced by what nobody can mean there, by nothing and by
nan, and by the same value in another form. An answer is
  clear    a TypeError or ValueError of one line, at most 300 characters, that names the argument
  right    what was meant: the same numbers from a list or an array as from a tensor, nan for nan
  unclear  any other error
  silent   a result where there is none, or another one
"""
import collections
import contextlib
import importlib
import inspect
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from examples import LEFT, LONG, RIGHT, New, examples
from lfdm.images import features
from tree import ROOT

# ---- what is swept

DOORS = "require_", "checked_", "advice_", "check_"   # their callers are swept
INNER = {"core", "ledger", "proofs", "plots"}   # makes doors, reads this project's pages, draws
FREE = {"name", "what", "study", "path", "note", "of", "symbol", "command", "root", "folder", "value",
        "source"}


def library():
    "name -> module, for those that are swept."
    for path in sorted((ROOT / "lfdm").rglob("[!_]*.py")):
        name = ".".join(path.relative_to(ROOT / "lfdm").with_suffix("").parts)
        if name not in INNER: yield name, importlib.import_module(f"lfdm.{name}")


def public(module):
    "(name, function or class); no doors, protocols, errors, or records that only hold what they are given."
    for name in module.__all__:
        found = getattr(module, name)
        if not callable(found) or name.startswith(DOORS) or name in LEFT: continue
        record = inspect.isclass(found) and issubclass(found, (tuple, Exception))
        if not record and not getattr(found, "_is_protocol", False): yield name, found


def methods(cls, table):
    "(class.method, bound method) of an instance made of its examples; torch's modules are called by torch."
    if issubclass(cls, torch.nn.Module): return
    made, error = answer(cls, valid(cls, cls.__name__, table))
    if error: raise LookupError(f"the examples of {cls.__name__} in tests/examples.py: {error!r}")
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        name = f"{cls.__name__}.{name}"
        open_to_all = name.endswith(".__call__") or "._" not in name
        if open_to_all and inspect.isfunction(found) and name not in LEFT:
            yield name, getattr(made, found.__name__)


def swept(module, table, seen):
    "(name, callable) of all there is in a module, each method once for all classes that have it."
    for name, found in public(module):
        yield name, found
        if not inspect.isclass(found): continue
        for method, bound in methods(found, table):
            if bound.__func__ not in seen and parameters(bound): yield method, bound
            seen.add(bound.__func__)


def parameters(function):
    "Those that can be given by name."
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    return {k: p for k, p in inspect.signature(function).parameters.items() if p.kind in kinds}


def valid(function, name, table):
    "An example of each argument. Without one an argument keeps its default."
    general, own = table
    given = {}
    for k, p in parameters(function).items():
        unset = p.default in (p.empty, None) or k in LONG
        of_its_own = own.get(name) or own.get(name[name.rfind("."):], {})
        found = of_its_own.get(k, general.get(k, p.default) if unset else p.default)
        if found is p.empty: raise LookupError(f"{name} needs an example of {k} in tests/examples.py")
        given[k] = found.make() if isinstance(found, New) else found
    return given


# ---- what is thrown

class Anything: "No one takes it."


def wrong(example, free):
    "kind -> what nobody can mean there."
    if not isinstance(example, bool): yield "True", True
    yield "a dict", {"a": None}
    yield "a list of nothing", [None]
    yield "a list of words", ["nonsense"]
    yield "an object", Anything()
    yield "complex", 1 + 2j
    yield "bytes", b"nonsense"
    if not free: yield "a word", "nonsense"; yield "no word", ""
    if torch.is_tensor(example):
        yield "a complex tensor", example.to(torch.complex64)
        yield "a tensor of bools", torch.ones(example.shape, dtype=torch.bool)
    elif isinstance(example, int): yield from dict(inf=math.inf, half=1.5, negative=-7, huge=10**400).items()
    elif isinstance(example, float): yield "huge", 10**400
    elif example is not None: yield "3", 3


def odd(example, free):
    "kind -> what gives no number, if it is not refused."
    if isinstance(example, (int, float)) and not isinstance(example, bool): yield "nan", math.nan
    if not torch.is_tensor(example): return
    yield "a tensor elsewhere", example.to("meta")
    if example.is_floating_point(): yield "a tensor of nan", torch.full_like(example, math.nan)
    if example.ndim: yield "an empty tensor", example[:0]


def same(example, free):
    "kind -> the same value in another form."
    if torch.is_tensor(example):
        yield "an array", example.numpy()
        if example.dtype != torch.uint8: yield "a list", example.tolist()
        if example.is_floating_point(): yield "a tensor of doubles", example.double()
    elif isinstance(example, bool): return
    elif isinstance(example, int):
        yield "a whole float", float(example)
        yield "numpy's int", np.int64(example)
    elif isinstance(example, float):
        yield "numpy's float", np.float64(example)


# ---- what comes back

def numbers(found, depth=0):
    "All numbers in a result, as arrays; those of a tensor elsewhere are not known."
    if torch.is_tensor(found):
        yield found.detach().double().numpy() if found.device.type == "cpu" else np.array(math.nan)
    elif isinstance(found, (bool, int, float, np.ndarray, np.generic)):
        if np.asarray(found).dtype.kind in "biuf": yield np.asarray(found, dtype=float)
    elif isinstance(found, dict): yield from numbers(list(found.values()), depth)
    elif isinstance(found, (list, tuple)): yield from (a for one in found for a in numbers(one, depth))
    elif depth < 2 and hasattr(found, "__dict__"): yield from numbers(vars(found), depth + 1)


def alike(a, b):
    a, b = list(numbers(a)), list(numbers(b))
    def close(x, y): return x.shape == y.shape and np.allclose(x, y, 1e-3, 1e-3, equal_nan=True)
    return len(a) == len(b) and all(map(close, a, b))


class Slow(Exception): pass


def answer(function, arguments, seconds=5):
    "(result, error) of a call."
    def late(*signal): raise Slow(f"more than {seconds} seconds")
    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            found = function(**arguments)
            return list(found) if inspect.isgenerator(found) else found, None
        except Exception as e: return None, e
        finally: signal.setitimer(signal.ITIMER_REAL, 0)


def names(message, argument):
    return re.search(rf"\b{argument}\b|\b{argument.replace('_', ' ')}\b", message) is not None


def verdict(argument, way, found, error, reference):
    "clear, right, unclear or silent; and what came."
    if error is not None:
        message = str(error)
        short = isinstance(error, (TypeError, ValueError)) and len(message) <= 300 and "\n" not in message
        clear = short and names(message, argument)
        return ("clear" if clear else "unclear"), f"{type(error).__name__}: {message}"
    if way is wrong: right = False
    elif way is same: right = alike(found, reference)
    else:
        there = list(numbers(found))
        right = not there or any(not a.size or np.isnan(a).any() for a in there) or alike(found, reference)
    return ("right" if right else "silent"), str(found)


def sweep(function, name, table):
    "(argument, kind, verdict, what came) of all that is thrown."
    reference, error = answer(function, valid(function, name, table), seconds=30)
    if error: raise LookupError(f"the examples of {name} in tests/examples.py: {error!r}")
    for argument, p in parameters(function).items():
        example = valid(function, name, table)[argument]
        thrown = [(way, *one) for way in (wrong, odd, same) for one in way(example, argument in FREE)]
        if p.default is not None and example is not None: thrown.append((wrong, "None", None))
        for way, kind, value in thrown:
            if (name, argument, kind) in RIGHT: continue
            came = answer(function, valid(function, name, table) | {argument: value})
            yield argument, kind, *verdict(argument, way, *came, reference)


@contextlib.contextmanager
def prepared():
    "The examples, in a folder where nothing can be harmed."
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["LFDM_RUNS"] = folder
        trained = features._trained
        with mock.patch.object(features, "_trained", lambda *given: trained(*given[:-1], 1)):
            yield examples(Path(folder))


def main(only):
    total, seen = collections.Counter(), set()
    with prepared() as table:
        for module_name, module in library():
            if only and module_name not in only: continue
            counts, start = collections.Counter(), time.time()
            for name, function in swept(module, table, seen):
                try: answers = list(sweep(function, name, table))
                except LookupError as e: print(e); continue
                for argument, kind, found, came in answers:
                    counts[found] += 1
                    if only and found in ("unclear", "silent"):
                        print(f"{found:8} {name}({argument} = {kind}): {' '.join(came.split())[:150]}")
            total += counts
            print(f"{module_name:20} {dict(counts)} {time.time() - start:.1f} s", flush=True)
    print(f"{sum(total.values())} inputs: {dict(total)}")


if __name__ == "__main__": main(sys.argv[1:])
