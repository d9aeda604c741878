"The ledger of equations and the errata say what the notebooks have printed, no more and no less."
import re
from types import SimpleNamespace

import pytest

import lfdm.ledger as ledger
from tree import ROOT

SEEDS = ROOT.parent / "shared" / "seeds"
LINES = ledger.checks()


def line(verdict, source, can_fail=True, case=""):
    "A line as a notebook might print it."
    place = SimpleNamespace(address="page.ipynb", name="Page")
    return SimpleNamespace(verdict=verdict, source=source, equations=ledger.named(source), place=place,
                           can_fail=can_fail, case=case)


# --- how a line names equations

SOURCES = {   # K: Kingma & Gao
    "thesis 3.21, NELBO in x": "thesis 3.21", "K 34, 35; 36 with 1/π": "K 34|K 35|K 36",
    "thesis 3.18 to 3.20: one step": "thesis 3.18|thesis 3.19|thesis 3.20",
    "paper 8–11 and 13": "paper 8|paper 9|paper 10|paper 11|paper 13",
    "thesis 3.52 and paper 15, w_s": "thesis 3.52|paper 15", "thesis 3.11, so 3.9": "thesis 3.11|thesis 3.9",
    "K E.3, cosine density": "K E.3", "K 15, w = 1 in x": "K 15", "note W2 with the variance": "note W2",
    "the flow, thesis 3.55 with K 91": "thesis 3.55|K 91", "thesis 3.2.2: a section": "",
    "K 91, the text after it: a claim": "",
    "K 50, if the score is conservative": "", "thesis, algorithm 1: none": "", "a synthesis 3.5": ""}


@pytest.mark.parametrize("text", SOURCES)
def test_sources_are_read(text):
    found = [" ".join(equation) for equation in ledger.named(text.replace("K ", "Kingma & Gao "))]
    assert sorted(found) == sorted(filter(None, SOURCES[text].replace("K ", "Kingma & Gao ").split("|")))


def test_numbers_at_the_end_are_no_part_of_a_source():
    sources = {l.source for l in LINES}
    assert "thesis 3.6, paper 4: the three terms of the NELBO" in sources   # : worst relative difference ...
    assert "thesis, text before 3.52: w_s as printed" in sources            # : a is not b


# --- the ledger

def test_every_equation_has_one_entry():
    "toml itself refuses a second one."
    numbers = [(document, number) for document, known in ledger.DOCUMENTS.items() for number in known]
    assert list(ledger.entries()) == numbers


def test_the_ledger_keeps_its_word():
    assert not ledger.faults(LINES), "\n".join(ledger.faults(LINES))


def test_pages_are_up_to_date():
    pages = [ledger.NBS / name for name in ledger.PAGES]
    stale = [page.name for page in pages if ledger.refreshed(page) != page.read_text(encoding="utf-8")]
    assert not stale, f"run `make export`; out of date: {', '.join(stale)}"


def without(*key, verdict=None):
    return [l for l in LINES if key not in l.equations or verdict not in (None, l.verdict)]


@pytest.mark.parametrize("lines, says", [
    (without("thesis", "3.26"), "paper 10 shall be proved"),   # its twin
    ([*LINES, line("refuted", "thesis 3.21 as printed")], "thesis 3.21 shall be proved, but it is refuted"),
    (without("thesis", "3.8", verdict="refuted"), "thesis 3.8 shall be wrong as printed"),
    ([*LINES, line("proved", "thesis 3.99")], "has no thesis 3.99"),
    ([*LINES, line("checked", "thesis 3.6", can_fail=False)], "nothing can fail"),
    ([*LINES, line("proved", "thesis 3.2")], "change its status")], ids=range(6))
def test_a_ledger_that_does_not_keep_its_word_is_found(lines, says):
    assert any(says in fault for fault in ledger.faults(lines))


def test_a_special_case_is_no_proof():
    "Nor does a word in its label make it one."
    key = next(key for key, row in ledger.ledger(LINES).items() if row.status == "proved" and not row.twin)
    name = " ".join(key)
    special = [*without(*key), line("special", f"{name}, proved", case="D = 1")]
    assert any(f"{name} shall be proved, but no cell prints" in fault for fault in ledger.faults(special))
    printed = [("proved", "D = 1", "thesis 2.5: in full"), ("proved", "", "thesis 2.5 for D = 1: in part")]
    told = "\n".join(f"{v} for {c}: {s}" if c else f"{v}: {s}" for v, c, s in printed)
    assert ledger.LINE.findall(told) == printed


def test_an_open_equation_takes_the_status_of_its_first_check():
    waiting = [key for key, row in ledger.ledger(LINES).items() if row.status == "open"]
    for verdict in ("proved", "checked"):
        rows = ledger.ledger(LINES + [line(verdict, " ".join(key)) for key in waiting])
        assert {rows[key].status for key in waiting} <= {verdict}


def test_places_exist_and_mention_the_equation():
    page = "library/10_schedules.ipynb"
    assert ledger.place_faults(f"{page}#the-forward-process", [("thesis", "3.2")]) == []
    assert ledger.place_faults(f"{page}#no-such-heading", None)
    assert ledger.place_faults("no_page.ipynb", None)
    assert ledger.place_faults(page, [("thesis", "4.6")])


# --- the errata

def test_an_erratum_without_its_check_is_found():
    assert ledger.errata_faults([l for l in LINES if l.source != "Kingma & Gao 36 as printed"])


def test_what_is_wrong_as_printed_is_an_erratum():
    listed = {equation for e in ledger.errata() for equation in e.equations}
    wrong = [" ".join(key) for key, row in ledger.ledger(LINES).items() if row.status == "wrong"]
    missing = [name for name in wrong if name not in listed]
    assert not missing, f"no erratum lists {', '.join(missing)}"


# --- against the documents, where they are at hand

@pytest.mark.skipif(not SEEDS.is_dir(), reason="the documents are not here")
def test_numbers_are_those_of_the_documents():
    text = {path.name: path.read_text(encoding="utf-8") for path in SEEDS.iterdir()}
    thesis = re.findall(r"(?:\\(?:quad|qquad) ?\(|\\tag\{)(\d\.\d+)[)}]", text["thesis.txt"])
    paper = re.findall(r"\\quad ?\((\d+)\)", text["paper.txt"])
    tagged = r"\\tag\{(\d+)\}|\((\d{1,2})\)(?=\s*(?:\\n|\\\\|\n|$))"
    kingma_gao = [a or b for a, b in re.findall(tagged, text["kingma-gao.txt"])]
    assert sorted(set(thesis)) == sorted(ledger.DOCUMENTS["thesis"])
    assert sorted(set(paper)) == sorted(ledger.DOCUMENTS["paper"])
    assert sorted(set(kingma_gao)) == sorted(n for n in ledger.DOCUMENTS["Kingma & Gao"] if n.isdigit())
    displayed = text["training-objective.md"].count("$$") // 2
    rows = re.search(r"^\| Weighting .*?\n\n", text["training-objective.md"], re.S | re.M)[0].count("\n") - 3
    assert len(ledger.DOCUMENTS["note"]) == displayed + rows


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the documents are not here")
def test_quotes_stand_in_the_documents():
    squeeze = lambda s: re.sub(r"\s+", " ", s)
    texts = {path.name: squeeze(path.read_text(encoding="utf-8")) for path in SEEDS.iterdir()}
    quotes = [(e.where, name, quote) for e in ledger.errata() for name, quote in e.quotes]
    wrong = [f"{where}: {quote}" for where, name, quote in quotes if squeeze(quote) not in texts[name]]
    assert not wrong, "\n".join(wrong)
