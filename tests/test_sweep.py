"Whatever is thrown at a public function, the answer is right or a clear refusal; see sweep.py."
import pytest
import torch

from examples import LEFT, RIGHT
from sweep import library, prepared, sweep, swept

torch.set_num_threads(1)
MODULES = dict(library())


@pytest.fixture(scope="module")
def table():
    with prepared() as table: yield table


@pytest.fixture(scope="module")
def seen(): return set()   # methods that classes of several modules share are asked once


@pytest.mark.parametrize("module", MODULES)
def test_every_answer_is_right_or_a_clear_refusal(module, table, seen):
    faults = []
    for name, function in swept(MODULES[module], table, seen):
        answers = list(sweep(function, name, table))
        faults += [f"{found}: {name}({argument} = {kind}): {' '.join(came.split())[:200]}"
                   for argument, kind, found, came in answers if found in ("unclear", "silent")]
    assert not faults, "\n".join(faults)


def test_the_sweep_notices():
    "a wrong number, a raw error, a long one, one that names nothing; not a clear one"
    def silent(x: torch.Tensor): return 3.
    def raw(x): return x + 1
    def long(x): raise ValueError("x must be another one" * 20)
    def nameless(x): raise ValueError("wrong")
    def clear(x): raise ValueError("x must be another one")
    example = torch.ones(3)
    def found_in(function):
        def right_once(x): return 1. if x is example else function(x)
        return {found for _, _, found, _ in sweep(right_once, "right_once", ({"x": example}, {}))}
    assert "silent" in found_in(silent)
    for function in (raw, long, nameless): assert "unclear" in found_in(function), function
    assert found_in(clear) <= {"clear", "right"}


def test_no_example_is_left_of_what_is_gone(table):
    names = {name for module in MODULES.values() for name, _ in swept(module, table, set())}
    assert not {name for name in table[1] if name[0] != "."} - names
    assert not {name for name, *_ in RIGHT} - names
    public = {name for module in MODULES.values() for name in module.__all__}
    assert not {name.partition(".")[0] for name in LEFT} - public


def test_a_function_without_an_example_says_so():
    def new(never_heard_of): pass
    with pytest.raises(LookupError, match="new needs an example of never_heard_of"):
        list(sweep(new, "new", ({}, {})))
