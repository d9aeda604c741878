"""Does every line of the ledger bite? Whatever a notebook proves or checks is put to the test once more with
one side off by a sign, by a factor of 1.05 and by a power (where that changes it); where this side is 0
everywhere, by a shift. The line bites if each of these fails. A check is dull if its tolerance lets one pass;
a proof is exact, so that it is dull only where a side is 0. What is refuted is only listed: it was decided by
the function that printed it. beside.py begins this in the process that all notebooks run in.
"""
import contextlib
import functools
import io
import json
import os
import random

import sympy
import torch

import lfdm.proofs as proofs

CHANGES = {
    "sign": lambda r: -r,
    "factor": lambda r: 1.05 * r,
    "power": lambda r: r * abs(r),
    "shift": lambda r: r + 0.05}


def due(differs):
    "The changes that must be noticed: a shift only where no other one changes anything."
    made = [name for name in ("sign", "factor", "power") if differs(name)]
    return made if "factor" in made else ["shift"]


def differ(left, right):
    "Do two sides differ at one of ten random points?"
    for seed in range(10):
        a, b = proofs._at_random(left, right, random.Random(seed))
        if not abs(a - b) <= 1e-6 * max(abs(a), abs(b)): return True
    return False


def symbols_bite(left, right, source, case=None):
    "Which changes of the right side a proof notices: numbers are enough, for what they refute is not proved."
    left, right = sympy.sympify(left), sympy.sympify(right)
    wanted = due(lambda name: differ(right, CHANGES[name](right)))
    return {name: differ(left, CHANGES[name](right)) for name in wanted}


def numbers_bite(check):
    "The same for a check: it is made again."
    def bite(value, expected, source, *args, **options):
        right = proofs._numbers("expected", expected)
        wanted = due(lambda name: not torch.equal(right, CHANGES[name](right)))
        return {name: _fails(check, value, CHANGES[name](right), source, *args, **options) for name in wanted}
    return bite


def _fails(judge, *args, **options):
    try:
        with contextlib.redirect_stdout(io.StringIO()): judge(*args, **options)
    except AssertionError: return True
    return False


def watch(path):
    "From now on every verdict leaves a line in this file: which changes were made, and what was noticed."
    bites = dict(prove=symbols_bite, check=numbers_bite(proofs.check), refute=lambda *_, **__: {})
    for name, bite in bites.items(): setattr(proofs, name, _watched(getattr(proofs, name), bite, path))


def _watched(judge, bite, path):
    @functools.wraps(judge)
    def inside(*args, **options):
        judge(*args, **options)
        source = options["source"] if "source" in options else args[2]
        line = json.dumps({"by": judge.__name__, "source": source, "noticed": bite(*args, **options)})
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)   # many processes write whole lines
        os.write(file, (line + "\n").encode())
        os.close(file)
    return inside
